"""Text from a model: strategies, stops, the loop, the sampler and conversations."""
