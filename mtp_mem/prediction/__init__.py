"""Without a GPU: what a step would allocate on one, and what would fit."""
