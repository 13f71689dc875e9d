"""Many checkpoints to one."""
