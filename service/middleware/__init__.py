"""What happens to every request before any route: pure ASGI, one concern a file."""
