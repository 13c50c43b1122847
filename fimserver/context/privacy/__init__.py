"""Privacy: which files are never read, and which texts no model is shown."""
