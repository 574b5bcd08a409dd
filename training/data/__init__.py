"""Turn text from various sources into shard sets: ``python -m training.data``; see `training.data.__main__`."""
