"""Code completion on your own machine: fill the middle with a text-diffusion model."""

__version__ = "0.1.0"
INSTALLED_FROM = "."  # what pip installs, in a checkout: no package index has a project of ours under any name yet
