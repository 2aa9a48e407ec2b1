"""Experiments: models, data, training runs and their results."""
