"""Captured steps and the passage between NumPy and PyTorch."""
