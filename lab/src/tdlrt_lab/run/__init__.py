"""A run: the training, its checkpoints and directory, and plots, timing and export."""
