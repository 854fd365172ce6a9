"""Heads on more than one GPU: torch.distributed's own DDP and FSDP2 around the cut."""
