"""Many checkpoints to one."""

from .api import merge
from .merging import Merged
from .moments import SecondMoments, save_second_moments
from .protocol import merge_tensors

__all__ = ["Merged", "SecondMoments", "merge", "merge_tensors", "save_second_moments"]
