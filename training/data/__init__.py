"""From the origins of text to shard sets, as ``python -m training.data``; see `training.data.__main__`."""
