"""Count what is offered and what becomes of it: on this machine only, numbers only, never text."""
