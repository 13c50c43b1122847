"""One LSP session with any engine: how good it is, how fast, and how soon it is free again."""
