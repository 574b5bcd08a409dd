"""The engine in Triton: windows in, logits out. No other package of the service imports gRPC."""
