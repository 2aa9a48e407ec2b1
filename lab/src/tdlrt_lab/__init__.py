"""Laboratory of tdlrt: training runs, baselines, sweeps, reports and the command line."""
