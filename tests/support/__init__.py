"""Code shared by several tests, one topic per module; test modules do not import each other."""
