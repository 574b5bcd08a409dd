"""What operators run beside the service."""
