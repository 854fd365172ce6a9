"""What to run: models, workloads, sweeps, GPUs, and the files that describe them."""
