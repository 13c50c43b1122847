"""Check the installation and the model, or plan the memory of a model (``fimserver doctor``)."""
