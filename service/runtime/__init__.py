"""The processes of the service: the launcher, the embedded Triton server, and the HTTP protocol."""
