"""Measure masked diffusion models."""
