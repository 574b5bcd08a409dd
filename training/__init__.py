"""The Horovod jobs that train a checkpoint; run them from the repository root as ``python -m training.<job>``."""
