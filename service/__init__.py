"""The REST service: a FastAPI application that calls Triton over gRPC."""
