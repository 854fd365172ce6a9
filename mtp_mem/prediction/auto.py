"""Which strategy, and how large a chunk: chosen so that the logits do not define the step's peak.

A step needs some bytes whatever its heads do: the trunk's backward, the optimizer, the heads without logits. That is
the floor (mtp_mem/prediction/floor.py), simulated without data. Logits that fit below it cost nothing.

1. `sequential`, if its peak is the floor: the full loss then costs nothing, and its gradients are naive's bit for bit.
2. Else `chunked_tokens` with the largest power of two of tokens whose peak is the floor.
3. Else, where no chunk reaches it (in low precision the fp32 sum of the unembedding's gradient exceeds it), the
   largest chunk whose peak is within 1 % of the smallest chunk's: its logits no longer decide anything.
"""

import bisect
from dataclasses import dataclass
from functools import cache, lru_cache

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import ModelConfig, Training, Workload
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.strategies.chunked_tokens import CPU_TOKENS, CUDA_TOKENS
from mtp_mem.strategy import Strategy, load_strategy

SMALLEST = {False: CPU_TOKENS[0], True: CUDA_TOKENS[0]}  # tokens; by whether CUDA runs
NEAR = 1.01


@dataclass(frozen=True)
class Choice:
    """A strategy for one step.

    Attributes:
        spec: the strategy as `load_strategy` takes it.
        why: one clause for people.
    """

    spec: str
    why: str


def resolve_auto(
    strategy: Strategy,
    config: ModelConfig,
    workload: Workload,
    training: Training | None = None,
    *,
    cuda: bool,
    gpu: GPU | None = None,
) -> tuple[Strategy, str | None]:
    """The strategy that is to run, and what was chosen and why; None where nothing was chosen.

    A strategy whose class says `chooses_by_step = True` stands for the one that `choose` finds.
    """
    if not getattr(strategy, "chooses_by_step", False):
        return strategy, None
    choice = choose(config, workload, training or Training(), cuda=cuda, gpu=gpu)
    return load_strategy(choice.spec), f"{choice.spec}: {choice.why}"


@lru_cache(maxsize=64)
def choose(
    config: ModelConfig, workload: Workload, training: Training | None = None, *, cuda: bool, gpu: GPU | None = None
) -> Choice:
    """Choose by the rules at the head of this file.

    Args:
        config: the model, with its n.
        workload: batch, sequence, dtype.
        training: the rest of the setup.
        cuda: whether the step runs on CUDA: its attention, its products, its smallest useful chunk.
        gpu: adds the buffers of its kernels; None adds none.
    """
    simulation = Simulation(config, workload, training, cuda=cuda, gpu=gpu)
    floor = simulation.floor().peak().nbytes

    @cache
    def peak(spec: str) -> int:
        return simulation.trace(load_strategy(spec)).peak().nbytes

    if peak("sequential") <= floor:
        return Choice("sequential", "even one head's full logits fit below what the rest of the step needs anyway")
    specs = [f"chunked_tokens:chunk={chunk}" for chunk in _chunks(workload.tokens, SMALLEST[cuda])]
    limit = max(floor, int(NEAR * peak(specs[0])))
    spec = specs[bisect.bisect_right(specs, limit, lo=1, key=peak) - 1]  # the first one is within the limit
    if peak(spec) <= floor:
        return Choice(spec, "the largest chunk whose logits fit below what the rest of the step needs anyway")
    over = format_bytes(peak(spec) - floor)
    why = f"no chunk reaches the step without logits; this one needs {over} more, and smaller ones save little"
    return Choice(spec, why)


def _chunks(tokens: int, smallest: int) -> list[int]:
    """Powers of two from the smallest useful chunk up to all tokens."""
    chunks = [min(smallest, tokens)]
    while chunks[-1] < tokens:
        chunks.append(min(2 * chunks[-1], tokens))
    return chunks
