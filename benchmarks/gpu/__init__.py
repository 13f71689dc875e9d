"""What `gpu_check.py` measures, section by section, and the processes in which it does."""
