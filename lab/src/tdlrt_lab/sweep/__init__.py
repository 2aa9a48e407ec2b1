"""Sweeps: many resumable runs from one description, in one or several processes."""
