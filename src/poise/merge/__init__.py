"""Many checkpoints to one."""

from .api import merge
from .merging import Merged

__all__ = ["Merged", "merge"]
