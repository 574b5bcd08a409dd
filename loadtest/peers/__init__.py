"""The servers that people would pick instead, each as its own documentation would have it written."""
