"""A run: training, checkpoints, the run directory, and what is made of a finished run."""
