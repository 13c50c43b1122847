"""Code completion on your own machine: fill the middle with a text-diffusion model."""

__version__ = "0.1.0"
