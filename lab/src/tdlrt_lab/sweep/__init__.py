"""Sweeps: many runs from one description, shared by processes, resumable, failures isolated."""
