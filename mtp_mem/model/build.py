"""The model that a config describes: this package's own, a Hugging Face decoder with heads, or what a factory makes.

Parameters are counted on the model itself, made on device meta without data for its weights.
"""

import dataclasses
import importlib
import json
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem._util import importing_from_here
from mtp_mem.config.other_models import FactoryConfig, HuggingFaceConfig, transformers
from mtp_mem.config.schema import Dtype, ModelConfig, Training
from mtp_mem.errors import BadInput, one_line
from mtp_mem.model.huggingface import HuggingFaceMTP, from_hf
from mtp_mem.model.layers import PARAMETER_DTYPES, Attention, causal_attention, default_dtype
from mtp_mem.model.mtp_model import MTPModel, default_attention
from mtp_mem.model.own import Model, groups, set_up

ATTENTION_NAMES: dict[Attention, str] = {
    "sdpa": "mtp_mem_causal",
    "flash": "mtp_mem_fused",
    "efficient": "mtp_mem_efficient",
}
"""Names of the kinds of attention in transformers; at a name with "flash" it would look for another package."""


def make_model(
    config: ModelConfig,
    *,
    dtype: Dtype = "fp32",
    device: torch.device | str = "cpu",
    attention: Attention | None = None,
) -> Model:
    """A model with n heads, initialised at random.

    Args:
        config: what to make.
        dtype: of parameters and products; "bf16-mixed" keeps fp32 parameters and runs forward passes under autocast.
        device: where the parameters are made.
        attention: see `Attention`; by default `default_attention` of dtype and device. A factory's model has its own.

    Raises:
        BadInput: transformers cannot make the model, it cannot be cut, or a factory returns no `Model` of n heads.
    """
    if isinstance(config, HuggingFaceConfig):
        return _huggingface(config, dtype, torch.device(device), attention)
    if isinstance(config, FactoryConfig):
        return _from_factory(config, dtype, torch.device(device))
    return MTPModel(config, dtype=dtype, device=device, attention=attention)


SPARSE = (nn.Embedding, nn.EmbeddingBag)
CANNOT_MAKE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError),
    RuntimeError,  # from torch, for a negative size
)
"""What transformers raises for a config that it cannot make a model of."""


@cache
def parameters(config: ModelConfig, training: Training | None = None) -> dict[str, int]:
    """Number of parameters by the part that owns them (see `MTPModel.groups`), each counted once.

    Args:
        config: the model's shape.
        training: count only those that this setup trains.

    Raises:
        BadInput: a weight would have more elements than torch can count; the setup freezes a part that does not exist.
    """
    try:
        with Unfilled():  # type: ignore[no-untyped-call]
            model = make_model(config, device="meta")
    except (RuntimeError, TypeError) as e:
        raise BadInput(f"no model of this shape can be made: {e}".split("\n")[0]) from None
    if training is not None:
        set_up(model, dataclasses.replace(training, trunk_checkpointing="none"))
    counted = {name: [p.numel() for p in group if p.requires_grad] for name, group in groups(model).items()}
    return {name: sum(numbers) for name, numbers in counted.items()}


class Unfilled(TorchDispatchMode):
    """Skips the random initialisation of weights while a model without data is made.

    On device meta torch initialises in Python: seven times as long as everything else takes, to no effect.
    """

    _FILLS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in self._FILLS else func(*args, **(kwargs or {}))


def weight_bytes(count: int, dtype: Dtype) -> int:
    """Bytes of `count` parameters; bf16-mixed keeps them in fp32."""
    return count * PARAMETER_DTYPES[dtype].itemsize


def _huggingface(
    config: HuggingFaceConfig, dtype: Dtype, device: torch.device, attention: Attention | None
) -> HuggingFaceMTP:
    library = transformers()
    kind = attention or default_attention(dtype, device)
    settings = json.loads(config.settings)
    settings |= {"num_hidden_layers": config.n_layers, "vocab_size": config.vocab_size}
    if isinstance(types := settings.get("layer_types"), list):
        settings["layer_types"] = types[: config.n_layers]
    for each, name in ATTENTION_NAMES.items():  # no mask function, so that no mask is made
        library.AttentionInterface.register(name, partial(_attention, each))
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()  # it would warn of token ids beyond a reduced vocabulary
    try:
        own = library.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        with device:
            lm = library.AutoModelForCausalLM.from_config(
                own, attn_implementation=ATTENTION_NAMES[kind], dtype=PARAMETER_DTYPES[dtype]
            )
    except CANNOT_MAKE as e:
        if isinstance(e, RuntimeError) and device.type != "meta":
            parameters(config)  # raises on device meta too, unless memory ran out
            raise
        raise BadInput(f"{config.architecture}: transformers cannot make it: {one_line(e)}") from None
    finally:
        library.logging.set_verbosity(verbosity)
    model = from_hf(lm.train(), config.n_future, config.head)
    model.mixed, model.for_cuda = dtype == "bf16-mixed", kind != "sdpa"
    return model


def _from_factory(config: FactoryConfig, dtype: Dtype, device: torch.device) -> Model:
    module, _, name = config.factory.partition(":")
    try:
        with default_dtype(PARAMETER_DTYPES[dtype]), device, importing_from_here():
            model = getattr(importlib.import_module(module), name)(config.n_future)
    except (Exception, SystemExit) as e:
        raise BadInput(f"{config.factory}({config.n_future}): {one_line(e)}") from None
    if not isinstance(model, nn.Module) or not isinstance(model, Model):
        missing = [name for name in ("n_future", "vocab_size", "dim", "trunk", "heads") if not hasattr(model, name)]
        raise BadInput(
            f"{config.factory}: returns a {type(model).__name__} without {', '.join(missing) or 'being a module'};"
            " expected an nn.Module with n_future, vocab_size, dim, trunk and heads (see mtp_mem/model/own.py)"
        )
    if model.n_future != config.n_future:
        raise BadInput(f"{config.factory}({config.n_future}): returns a model with n_future = {model.n_future}")
    if sparse := [name for name, one in model.named_modules() if isinstance(one, SPARSE) and one.sparse]:
        raise BadInput(
            f"{config.factory}: {sparse[0]} makes sparse gradients, which cannot be measured; sparse = False can"
        )
    return model


def _attention(
    kind: Attention,
    _module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    width = v.shape[-1]
    if width != q.shape[-1]:  # no fused kernel takes values of another width: pad them
        v = F.pad(v, (0, q.shape[-1] - width))
    return causal_attention(q, k, v, kind, scaling)[..., :width].transpose(1, 2).contiguous(), None
