"""Multiply by weights in NVFP4: the format, the reference in plain torch, and GPU kernels."""
