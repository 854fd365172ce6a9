"""What a comparison takes, by closed forms: FLOPs as torch counts them, bytes as the fake instrument predicts them."""

import dataclasses

import pytest
from small import build, tiny
from torch.utils.flop_counter import FlopCounterMode

from mtp_mem import Workload, forward_backward, load_profile, load_strategy
from mtp_mem.config.gpus import load_gpu
from mtp_mem.model.shape import Shape
from mtp_mem.prediction.formulas import baseline, formula_peak, step_flops
from mtp_mem.prediction.simulated_step import simulate


@pytest.mark.parametrize("spec", ["naive", "sequential", "checkpointed", "chunked_vocab"])
@pytest.mark.parametrize("n", [1, 4])
def test_products_as_torch_counts_them(spec: str, n: int) -> None:
    config = tiny(n_future=n)
    model, batch = build(config)
    with FlopCounterMode(display=False) as counter:  # type: ignore[no-untyped-call]
        forward_backward(model, batch, load_strategy(spec))
    counted = counter.get_flop_counts()["Global"]
    attention = [op for op in counted if "attention" in str(op)]
    workload = Workload(batch=2, sequence=24)
    shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload))
    assert shape is not None
    without = dataclasses.replace(shape, S=0)
    products = sum(flops for op, flops in counted.items() if op not in attention)
    missing = shape.n * 2 * shape.N * shape.V * shape.D if "vocab" in spec else 0  # addmm_, which torch does not count
    assert step_flops(spec, without) == products + missing
    assert step_flops(spec, shape) > step_flops(spec, without)


def test_the_growth_with_n_follows_the_paper() -> None:
    # Table S5 has 1.04 and 1.12 for n = 2 and 4 of the 1.3B model.
    profile = load_profile("mtp-1.3b")
    flops = {}
    for n in (1, 2, 4):
        shape = Shape.of(dataclasses.asdict(profile.model.with_n(n)), dataclasses.asdict(profile.workload), cuda=True)
        assert shape is not None
        flops[n] = step_flops("sequential", shape)
    assert flops[2] / flops[1] == pytest.approx(1.04, abs=0.01)
    assert flops[4] / flops[1] == pytest.approx(1.12, abs=0.02)


@pytest.mark.parametrize("n", [1, 4])
def test_bytes_are_those_of_the_prediction(n: int) -> None:
    profile, gpu = load_profile("mtp-0.3b"), load_gpu("h200")
    config, workload = profile.model.with_n(n), profile.workload
    trace = simulate(config, workload, load_strategy("sequential"), gpu=gpu)
    assert baseline(config, workload) == pytest.approx(trace.baseline, rel=1e-4)
    assert formula_peak("sequential", config, workload) == pytest.approx(trace.peak().nbytes, rel=0.01)
