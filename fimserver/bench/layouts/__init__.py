"""Compare the prompt layouts of instruction-tuned models."""
