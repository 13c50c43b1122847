"""Adapt a fill-in-the-middle model to masked diffusion, to measure its decoding on text that means something."""
