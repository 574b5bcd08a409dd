"""Measurements that chose the runtime, the lengths of windows, and say how fast an engine could be."""
