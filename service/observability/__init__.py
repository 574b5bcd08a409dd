"""Logs, metrics, traces, and the context of a request."""
