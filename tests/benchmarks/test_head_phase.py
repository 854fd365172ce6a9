"""The head phase of every strategy that can be loaded: time beside the bare products', bytes from an untimed pass.

Before each timed round the bare products run and are timed too, so that a drift of the machine cancels in the ratio.
`-k small` is the size for CI, `-k cpu` those of tox -e benchmark, `-k cuda` those of tox -e gpu; `-k cuda-n4` is one.
"""

from typing import Any

import pytest
import torch
from benchmarks.head_phase import SHAPES, HeadPhase, HeadShape, copy_bandwidth, seconds

from mtp_mem import load_strategy
from mtp_mem.strategy import loadable

CASES = {f"{size}-{shape.label}": (size, shape) for size, shapes in SHAPES.items() for shape in shapes}
ROUNDS = {"small": 3, "cpu": 9, "cuda": 15}


@pytest.fixture(scope="module")
def bandwidth() -> dict[str, float]:
    """Bytes per second of a large copy, by device."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {device: copy_bandwidth(device) for device in devices}


@pytest.mark.parametrize("spec", loadable())
@pytest.mark.parametrize(("size", "shape"), CASES.values(), ids=CASES.keys())
def test_head_phase(benchmark: Any, bandwidth: dict[str, float], size: str, shape: HeadShape, spec: str) -> None:
    if shape.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    strategy = load_strategy(spec)
    phase = HeadPhase(shape)
    try:
        peak = phase.peak_over_inputs(strategy)
        products = phase.bare_products()
        products()
    except torch.OutOfMemoryError as e:
        pytest.skip(f"out of memory: {e}".split("\n")[0])
    floors: list[float] = []
    times: list[float] = []

    def floor() -> None:
        floors.append(seconds(products, shape.device))

    def run() -> None:
        times.append(seconds(lambda: phase.run(strategy), shape.device))

    benchmark.group = f"head phase, n={shape.n} {shape.name}"
    benchmark.pedantic(run, setup=floor, rounds=ROUNDS[size], warmup_rounds=1)
    ratios = torch.tensor([t / f for t, f in zip(times, floors, strict=True)][1:], dtype=torch.float64)  # less warm-up
    p20, median, p80 = ratios.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    benchmark.extra_info |= {
        "strategy": spec,
        "n": shape.n,
        "device": shape.device,
        "peak_over_inputs_bytes": peak,
        "lower_bound_bytes": shape.lower_bound,
        "times_floor": median,
        "times_floor_p20": p20,
        "times_floor_p80": p80,
        "fraction_of_floor": 1 / median,
        "floor_flops_per_s": shape.flops / sorted(floors)[len(floors) // 2],
        "copy_bytes_per_s": bandwidth[shape.device],
        "tokens_per_s": shape.n * shape.N / sorted(times)[len(times) // 2],
    }
    assert peak >= shape.lower_bound - shape.N * shape.D * shape.dtype.itemsize
    assert all(g is not None and torch.isfinite(g).all() for g in (phase.cut.grad, phase.unembedding.grad))
