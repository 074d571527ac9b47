"""Training: data, the demonstration, pictures."""
