"""Checkpoint directory -> measured engine in a Triton model repository; needs neither torch nor transformers."""
