"""What a model is: its value, its parameters, its state, and the reference that computes it."""
