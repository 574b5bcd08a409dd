"""The commands of the service; each module imports its heavy packages only when the command runs."""
