"""The layers around every route: pure ASGI middleware, one concern per file."""
