"""Answers questions: admission, queue, cache, pipeline and the registry of models."""
