"""Processes of the service: the launcher, the Triton server that it embeds, and how both end."""
