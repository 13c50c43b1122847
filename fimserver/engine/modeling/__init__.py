"""Compute the forward pass: layers, KV cache, prompt cache, CUDA graphs."""
