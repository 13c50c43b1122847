"""Write a model folder with its matrices in NVFP4."""
