"""What PyTorch or a device needs and a model does not: captured steps, kernels, known values."""
