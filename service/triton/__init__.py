"""The client of Triton: windows in, logits out. No other package of the service imports gRPC."""
