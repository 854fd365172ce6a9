"""Which training setup fits, and what it costs: trunk checkpointing, micro-batches, optimizers and GPUs compared.

The step stays the same: its sequences are split into micro-batches, its gradient is the same sum. The cost of
recomputation is the step's FLOPs over those of the step without any; micro-batches cost none.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mtp_mem._util import Progress, format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import NODE, Profile, Training, Workload
from mtp_mem.errors import unknown
from mtp_mem.model.shape import Shape
from mtp_mem.prediction.caching_allocator import Fit, fit
from mtp_mem.prediction.formulas import step_flops, trunk_recompute_flops
from mtp_mem.prediction.largest_fit import LeftOut, Point, ProbedBytes, Prober
from mtp_mem.strategy import Strategy

CHOICES: dict[str, tuple[Any, ...]] = {
    "trunk_checkpointing": ("none", 2, "full"),
    "micro_batches": (1, 2, 4, 8, 16, 32, 64),
    "optimizer": ("adamw", "adamw-8bit", "sgd"),
    "world": (2, 4, 8, 16, 32, 64),
}
"""What `--vary` may name, and the values that are tried; of micro-batches those that divide the batch."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setup with one strategy.

    Attributes:
        strategy: the spec.
        training: the setup.
        workload: the micro-batch.
        figures: the allocator's predicted peaks.
        flops: FLOPs of the step's products over those without recomputation; None without a closed form.
    """

    strategy: str
    training: Training
    workload: Workload
    figures: ProbedBytes
    flops: Fraction | None

    def fit(self, limit: int) -> Fit:
        """Whether the step fits into `limit` bytes."""
        return fit(self.figures.allocated, self.figures.reserved, limit)

    @property
    def words(self) -> str:
        """The setup in few words."""
        training = self.training
        ranks = f"{training.sharding} x {training.world}, " if training.sharding != "none" else ""
        return f"{ranks}{training.trunk_words}, {training.micro_batches} x {self.workload.batch}, {training.optimizer}"

    @property
    def cost(self) -> tuple[int, Fraction, int]:
        """GPUs, recomputation and micro-batches, to sort by in this order."""
        return self.training.world, self.flops or Fraction(1), self.training.micro_batches


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
    base = profile.training
    if "world" in choices:
        base = dataclasses.replace(base, sharding="fsdp2" if base.sharding == "none" else base.sharding, world=NODE)
        choices["world"] = tuple(w for w in CHOICES["world"] if base.sharding != "hsdp" or w % NODE == 0)
    combined = []
    for values in itertools.product(*choices.values()):
        training = dataclasses.replace(base, **dict(zip(choices, values, strict=True)))
        workload = dataclasses.replace(profile.workload, batch=sequences // training.micro_batches)
        combined.append((training, workload))
    return combined


def try_setups(
    profile: Profile, gpu: GPU, n: int, strategies: Mapping[str, Strategy], vary: Sequence[str], progress: Progress
) -> tuple[tuple[Tried, ...], LeftOut]:
    """Every variation with every strategy, the cheapest first, of equal ones the one that needs most bytes.

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
    rows: list[Tried] = []
    left_out = LeftOut()
    for training, workload in variations(profile, vary):
        varied = dataclasses.replace(profile, training=training, workload=workload)
        prober = Prober(varied, gpu, strategies, progress)
        point = Point(batch=workload.batch, sequence=workload.sequence, n=n)
        for spec in strategies:
            if spec not in left_out.reasons:
                with left_out.unless_it_raises(spec):
                    figures, flops = prober.probe(spec, point), _flops(spec, varied, n)
                    rows.append(
                        Tried(strategy=spec, training=training, workload=workload, figures=figures, flops=flops)
                    )
    kept = [row for row in rows if row.strategy not in left_out.reasons]
    kept.sort(key=lambda row: (row.cost, -row.figures.allocated))
    return tuple(kept), left_out


def cheapest(rows: Sequence[Tried], limit: int) -> Tried | None:
    """The cheapest row that fits; among equally cheap ones the one that leaves most bytes."""
    fitting = [row for row in rows if row.fit(limit) != "no"]
    if not fitting:
        return None
    equal = (row for row in fitting if row.cost == fitting[0].cost)
    return min(equal, key=lambda row: row.figures.allocated)


def setup_advice(rows: Sequence[Tried], limit: int) -> str:
    """The setup to use and what it costs, in one sentence."""
    best = cheapest(rows, limit)
    if best is None:
        least = min(rows, key=lambda row: row.figures.allocated)
        over = format_bytes(least.figures.allocated - limit)
        return f"Nothing fits: {least.strategy} with {least.words} needs the least, which is {over} too much."
    cost = (
        "FLOPs not known" if best.flops is None else f"{share(best.flops)} FLOPs" if best.flops > 1 else "no more FLOPs"
    )
    left = format_bytes(limit - best.figures.allocated)
    return f"Use {best.strategy} with {best.words}: the cheapest that fits, {cost}; {left} are left."


def share(flops: Fraction | None) -> str:
    """The FLOPs that recomputation adds, in per cent; `flops` is as in `Tried`."""
    return "?" if flops is None else f"{float(flops - 1):+.0%}"


def _flops(spec: str, profile: Profile, n: int) -> Fraction | None:
    model, workload = profile.model.with_n(n).facts(), dataclasses.asdict(profile.workload)
    # The number of FLOPs is the same in every dtype, and with a cap.
    shape = Shape.of(model | {"logit_softcap": None}, workload | {"dtype": "bf16"}, cuda=True)
    if shape is None:
        return None
    own = step_flops(spec, shape) + trunk_recompute_flops(shape, profile.training)
    return Fraction(own, step_flops("sequential", shape))
