"""Decode the tokens of a middle: denoising, speculative and autoregressive loops, and the rules they share."""
