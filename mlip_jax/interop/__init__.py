"""Weights of other libraries, read from safetensors files into this package's parameters."""
