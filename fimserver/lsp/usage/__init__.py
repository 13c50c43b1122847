"""Count completions offered, accepted and rejected: on this machine only, numbers only, never text."""
