"""Bytes and FLOPs of a step in closed form: what the instruments are held against, and what the dashed lines show.

What a strategy needs above the cut it says itself (`peak_bytes`, `flops_factor`); here the rest of the step is added.
Each formula counts the tensors that are live at the one moment that sets the peak. Symbols: mtp_mem/model/shape.py.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from statistics import StatisticsError, linear_regression
from typing import Any

from mtp_mem.config.schema import ModelConfig, Training, Workload
from mtp_mem.errors import MtpMemError
from mtp_mem.model.build import parameters, weight_bytes
from mtp_mem.model.shape import Shape
from mtp_mem.strategy import BUILTIN, load_strategy, strategy_class


def peak_over_baseline(spec: str, shape: Shape) -> int | None:
    """Peak bytes of a step above its parameters, optimizer state and batch; None for a strategy without a formula.

    The largest of these moments: the heads at their worst; a layer's forward pass, if the trunk is frozen; each trunk
    layer's backward as it begins (everything above has its gradient, nothing below is freed, a checkpointed layer has
    been recomputed, see `Shape.in_flight`); all gradients at the end; the optimizer's temporaries beside them.
    """
    peak_bytes = getattr(load_strategy(spec), "peak_bytes", None)
    heads: int | None = None if peak_bytes is None else peak_bytes(shape)
    if heads is None:
        return None
    in_flight = shape.left_behind(shape.n) + shape.in_flight(shape.trains("trunk layers"))
    # The embedding's gradient comes last; if one is there already, the new one is live until it is added.
    last = shape.unembedding + shape.hidden if shape.accumulates and shape.trains("embedding") else 0
    moments, live = [shape.trunk + heads, shape.gradients + max(last, temporaries(shape))], shape.trunk
    if shape.trunk_layers and not shape.cut_gradient:
        moments.append(shape.below + shape.forward_alone + shape.left_behind(0))
    left = shape.layer_parameters * (shape.trains("trunk layers") and not shape.accumulates)
    for done, kept in enumerate(reversed(shape.kept)):
        whole = shape.layer(shape.trains("trunk layers")) - shape.hidden if kept == shape.hidden else 0
        moments.append(live + whole + in_flight + done * left)
        live -= kept
    return max(moments) - shape.gradients * shape.training.keeps_gradients  # kept ones are in the baseline


def temporaries(shape: Shape) -> int:
    """Bytes that the optimizer's step takes besides gradients and state, at its worst (mtp_mem/model/optimizers.py).

    Fp32 copies are stepped with fp32 gradients, twice as large, which replace the bf16 ones one by one: beside the last
    fp32 gradient its bf16 one is still live.
    """
    wide = 2 if shape.training.master_weights else 1
    beside = 0
    if shape.training.optimizer == "adamw-foreach":
        beside = wide * shape.gradients
    elif shape.training.optimizer == "adamw-loop":
        beside = 2 * wide * max(shape.unembedding, shape.D * shape.F * shape.value)
    if wide == 1:
        return beside
    return shape.gradients + max(beside, shape.D * shape.value if shape.tied else shape.unembedding)


def formula_bytes(
    spec: str, model: dict[str, Any], workload: dict[str, Any], training: Training | None = None, *, cuda: bool
) -> int | None:
    """`peak_over_baseline` of a record's fields; None where there is no formula.

    Nothing is imported for a strategy that is not built in: a results file may come from anywhere.
    """
    shape = Shape.of(model, workload, cuda, training)
    if shape is None or spec.partition(":")[0] not in BUILTIN:
        return None
    try:
        return peak_over_baseline(spec, shape)
    except MtpMemError:  # an option that this version does not know, a kernel that is not installed
        return None


def flops_factor(spec: str) -> Fraction:
    """FLOPs of the heads over those of a joint backward without recomputation; 1 for a strategy that is not ours."""
    name = spec.partition(":")[0]
    return getattr(strategy_class(name), "flops_factor", Fraction(1)) if name in BUILTIN else Fraction(1)


def step_flops(spec: str, shape: Shape) -> int:
    """FLOPs of the products of layers, attention and the heads' logits; a multiplication and an addition count as two.

    A backward costs two forwards; a strategy that recomputes multiplies its heads' share by its `flops_factor`. With
    parameter-matched heads only the logits grow with n (Gloeckle et al. 2024, table S5: step times that follow this up
    to 6.7B).
    """
    s, layer = shape, layer_flops(shape)
    logits = 2 * s.N * s.V * s.D
    name = spec.partition(":")[0]
    layers_too = name in BUILTIN and getattr(strategy_class(name), "recomputes_layers", False)
    factor = flops_factor(spec)
    heads = 3 * s.n * (factor * logits + (factor if layers_too else 1) * layer)
    return int(3 * s.trunk_layers * layer + heads)


def layer_flops(shape: Shape) -> int:
    """FLOPs of one layer's forward pass."""
    return 2 * shape.N * (shape.layer_weights + shape.S * shape.A)  # attention looks back only: half of 4 N S A


def trunk_recompute_flops(shape: Shape, training: Training) -> int:
    """FLOPs of the trunk layers that a step runs forward a second time."""
    every = training.checkpoint_every
    return -(-shape.trunk_layers // every) * layer_flops(shape) if every else 0


def slope(points: Sequence[tuple[int, int]]) -> float | None:
    """Least-squares slope of (n, bytes), in bytes per head; None for fewer than two n."""
    try:
        return linear_regression([n for n, _ in points], [nbytes for _, nbytes in points]).slope
    except StatisticsError:  # fewer than two n
        return None


def baseline(config: ModelConfig, workload: Workload, training: Training | None = None) -> int:
    """Bytes live before a step: parameters, the optimizer's state, tokens and n rows of targets; gradients if kept."""
    training, count = training or Training(), sum(parameters(config).values())
    weights = weight_bytes(count, workload.dtype)
    if training.frozen_parts:
        count = sum(parameters(config, training).values())
    gradients = weight_bytes(count, workload.dtype)
    stepped = 4 * count if training.master_weights else gradients
    state = {"sgd": stepped, "adamw-8bit": 2 * count + 8 * count // 256}
    kept = state.get(training.optimizer, 2 * stepped) + stepped * training.master_weights
    kept += gradients * training.keeps_gradients
    return weights + kept + 8 * (1 + config.n_future) * workload.tokens


def formula_peak(
    spec: str, config: ModelConfig, workload: Workload, training: Training | None = None, *, cuda: bool = True
) -> int | None:
    """A step's peak bytes in closed form, without what the allocator and kernels add; None without a formula."""
    fields = (config.facts(), dataclasses.asdict(workload))
    over_baseline = formula_bytes(spec, *fields, training, cuda=cuda)
    return None if over_baseline is None else baseline(config, workload, training) + over_baseline
