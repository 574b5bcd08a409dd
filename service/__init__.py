"""The REST service: FastAPI in front, one gRPC channel to Triton behind."""
