"""The only importer of gRPC: windows in, logits out."""
