"""Load on a running service, and what it costs; talks HTTP only."""
