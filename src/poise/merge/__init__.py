"""Many checkpoints to one."""

from .moments import SecondMoments, save_second_moments
from .protocol import merge_tensors

__all__ = ["SecondMoments", "merge_tensors", "save_second_moments"]
