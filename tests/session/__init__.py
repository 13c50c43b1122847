"""One LSP session with any engine: how good, how fast, and what a cancelled request leaves behind."""
