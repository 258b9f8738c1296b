"""What JAX or a device needs and a model does not: compiled steps, traced blocks, axes."""
