"""How many parameters a model has, counted on the model itself without making its weights."""

from functools import cache

import torch

from mtp_mem.config.schema import Dtype, ModelConfig
from mtp_mem.errors import BadInput
from mtp_mem.model.mtp_model import PARAMETER_DTYPES, MTPModel


@cache
def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by the part that owns them (see `MTPModel.groups`), each counted once.

    Raises:
        BadInput: a weight would have more elements than torch can count.
    """
    try:
        model = MTPModel(config, device="meta")
    except (RuntimeError, TypeError) as e:
        raise BadInput(f"no model of this shape can be made: {e}".split("\n")[0]) from None
    return {name: sum(p.numel() for p in group) for name, group in model.groups().items()}


def weight_bytes(count: int, dtype: Dtype) -> int:
    """Bytes of so many parameters; bf16-mixed keeps them in fp32."""
    size: int = torch.empty((), dtype=PARAMETER_DTYPES[dtype]).element_size()
    return count * size
