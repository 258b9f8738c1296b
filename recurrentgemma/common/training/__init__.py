"""Training: data, packing, optimisation, adapters, runs and logs."""
