"""The Horovod jobs that train a checkpoint; run from the repository's root as ``python -m training.<job>``."""
