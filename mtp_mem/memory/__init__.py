"""Instruments: what one training step allocates, on a CPU or on a CUDA device."""
