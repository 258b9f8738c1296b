"""Readers and writers of RecurrentGemma checkpoints, one module a format."""
