"""What the shipped model is trained on, and with."""
