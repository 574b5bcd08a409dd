"""The commands of the service: light modules that import what they run when they run."""
