"""The laboratory of tdlrt: runs, methods to compare with, sweeps, reports, the command line."""
