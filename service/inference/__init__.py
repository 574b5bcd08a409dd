"""From a question to its ranked spans: admission, queue, cache, models."""
