"""Train the shipped model."""
