"""Which training setup fits, and what it costs: trunk checkpointing, micro-batches and optimizers held side by side.

The step stays the same: its sequences are split into micro-batches, its gradient is the same sum. What recomputation
costs is counted in FLOPs over those of the step without any; micro-batches cost none.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mtp_mem._util import Progress, format_bytes
from mtp_mem.config.schema import GPU, Profile, Training, Workload
from mtp_mem.errors import BadInput, Missing, one_line, unknown
from mtp_mem.model.shape import Shape
from mtp_mem.prediction.auto import resolve_auto
from mtp_mem.prediction.caching_allocator import Fit, fit
from mtp_mem.prediction.formulas import step_flops, trunk_recompute_flops
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.strategy import Strategy

CHOICES: dict[str, tuple[Any, ...]] = {
    "trunk_checkpointing": ("none", 2, "full"),
    "micro_batches": (1, 2, 4, 8, 16, 32, 64),
    "optimizer": ("adamw", "adamw-8bit", "sgd"),
}
"""What `--vary` may name, and the values that are tried; of micro-batches those that divide the batch."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setup with one strategy.

    Attributes:
        strategy: the spec.
        training: the setup.
        workload: the micro-batch.
        allocated: the allocator's predicted peak in bytes.
        reserved: likewise, of its segments.
        flops: of the step's products over those without recomputation; None without a closed form.
    """

    strategy: str
    training: Training
    workload: Workload
    allocated: int
    reserved: int
    flops: Fraction | None

    def fit(self, limit: int) -> Fit:
        """Whether it fits into so many bytes."""
        return fit(self.allocated, self.reserved, limit)

    @property
    def words(self) -> str:
        """The setup in few words."""
        training = self.training
        return f"{training.trunk_words}, {training.micro_batches} x {self.workload.batch}, {training.optimizer}"


def variations(profile: Profile, vary: Sequence[str]) -> list[tuple[Training, Workload]]:
    """Every combination of the options' values, the profile's own batch split into micro-batches.

    Raises:
        BadInput: an option that cannot be varied.
    """
    for option in vary:
        if option not in CHOICES:
            raise unknown("option", option, CHOICES, "--vary")
    sequences = profile.workload.batch * profile.training.micro_batches
    choices = {option: CHOICES[option] for option in vary}
    if "micro_batches" in choices:
        choices["micro_batches"] = tuple(k for k in CHOICES["micro_batches"] if sequences % k == 0)
    combined = []
    for values in itertools.product(*choices.values()):
        training = dataclasses.replace(profile.training, **dict(zip(choices, values, strict=True)))
        workload = dataclasses.replace(profile.workload, batch=sequences // training.micro_batches)
        combined.append((training, workload))
    return combined


@dataclass(frozen=True)
class Tries:
    """All that was tried, the cheapest first, of equal ones the one that needs most.

    Attributes:
        rows: a setup with a strategy each.
        left_out: strategies that could not be predicted, each with the reason.
        failed: those of the left out ones that raised an error of their own.
    """

    rows: tuple[Tried, ...]
    left_out: Mapping[str, str]
    failed: tuple[str, ...]


def try_setups(
    profile: Profile, gpu: GPU, n: int, strategies: Mapping[str, Strategy], vary: Sequence[str], progress: Progress
) -> Tries:
    """Every variation with every strategy.

    Args:
        profile: model, step and setup to vary from.
        gpu: the target.
        n: number of heads.
        strategies: by spec.
        vary: options of `CHOICES`.
        progress: told of each step that is simulated.

    Raises:
        BadInput: an option that cannot be varied.
    """
    config = profile.model.with_n(n)
    rows: list[Tried] = []
    left_out: dict[str, str] = {}
    failed: list[str] = []
    for training, workload in variations(profile, vary):
        simulation = Simulation(config, workload, training, gpu=gpu)
        for spec, strategy in strategies.items():
            if spec in left_out:
                continue
            progress(f"{spec}: {training.trunk_checkpointing}, {training.micro_batches} x {workload.batch}")
            try:
                chosen, _ = resolve_auto(strategy, config, workload, training, cuda=True, gpu=gpu)
                facts = predicted(simulation.trace(chosen), gpu)
            except (Exception, SystemExit) as e:
                left_out[spec] = one_line(e)
                failed += [] if isinstance(e, (BadInput, Missing)) else [spec]
                continue
            rows.append(
                Tried(
                    strategy=spec,
                    training=training,
                    workload=workload,
                    allocated=facts["peak_allocated_bytes"],
                    reserved=facts["peak_reserved_bytes"],
                    flops=_flops(spec, profile, config.with_n(n), training),
                )
            )
    kept = [row for row in rows if row.strategy not in left_out]
    kept.sort(key=lambda row: (row.flops or Fraction(1), row.training.micro_batches, -row.allocated))
    return Tries(tuple(kept), left_out, tuple(failed))


def cheapest(rows: Sequence[Tried], limit: int) -> Tried | None:
    """The first that fits; among equally cheap ones the one that leaves most."""
    fitting = [row for row in rows if row.fit(limit) != "no"]
    if not fitting:
        return None
    cost = (fitting[0].flops, fitting[0].training.micro_batches)
    return min((row for row in fitting if (row.flops, row.training.micro_batches) == cost), key=lambda r: r.allocated)


def setup_advice(rows: Sequence[Tried], limit: int) -> str:
    """The setup to use and what it costs, in one sentence."""
    best = cheapest(rows, limit)
    if best is None:
        least = min(rows, key=lambda row: row.allocated)
        over = format_bytes(least.allocated - limit)
        return f"Nothing fits: {least.strategy} with {least.words} needs least, and {over} too much."
    cost = (
        "no FLOP more"
        if best.flops == 1
        else "FLOPs not known"
        if best.flops is None
        else f"{_share(best.flops)} FLOPs"
    )
    left = format_bytes(limit - best.allocated)
    return f"Use {best.strategy} with {best.words}: the cheapest that fits, {cost}; {left} are left."


def _share(flops: Fraction) -> str:
    return f"{float(flops - 1):+.0%}"


def _flops(spec: str, profile: Profile, config: Any, training: Training) -> Fraction | None:
    workload = {**dataclasses.asdict(profile.workload), "dtype": "bf16"}
    shape = Shape.of(dataclasses.asdict(config), workload, cuda=True)
    if shape is None:
        return None
    try:
        own = step_flops(spec, shape) + trunk_recompute_flops(shape, training)
    except BadInput:
        return None
    return Fraction(own, step_flops("sequential", shape))
