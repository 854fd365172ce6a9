"""Floating-point operations of a training step, in closed form: what its time follows where products decide it."""

from mtp_mem.prediction.formulas import Shape
from mtp_mem.strategy import load_strategy


def step_flops(spec: str, shape: Shape) -> int:
    """Products of the layers, their attention and the heads' logits; a multiplication and an addition count as two.

    A backward costs two forwards, and what a strategy recomputes one more: its heads' logits (vocabulary slabs), or the
    whole heads (checkpoints). With parameter-matched heads only the logits grow with n (Gloeckle et al. 2024, table S5:
    step times that follow this up to 6.7B).
    """
    s = shape
    weights = 2 * s.D * (s.D + s.K) + 3 * s.D * s.F  # of a layer
    layer = 2 * s.N * weights + 2 * s.N * s.S * s.D  # attention looks back only: half of 4 N S D
    logits = 2 * s.N * s.V * s.D
    forward = (s.trunk_layers + s.n) * layer + s.n * logits
    name = spec.partition(":")[0]
    if name == "checkpointed":
        return 3 * forward + s.n * (layer + logits)
    slabs = name in ("chunked_vocab", "cce") or getattr(load_strategy(spec), "loss", "") == "chunked_vocab"
    return 3 * forward + slabs * s.n * logits
