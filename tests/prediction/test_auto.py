"""`auto`: what it chooses keeps the logits out of the peak, and it says what it chose."""

import pytest
from small import build, gradients, tiny

from mtp_mem import Workload, forward_backward, load_strategy
from mtp_mem.prediction.auto import Choice, choose, resolve_auto
from mtp_mem.prediction.simulated_step import Simulation, simulate

LONG = Workload(batch=4, sequence=256)


def test_small_logits_are_free() -> None:
    config = tiny(vocab_size=64, dim=128, n_layers=6, n_future=2)
    choice = choose(config, LONG, cuda=False)
    assert choice.spec == "sequential"
    simulation = Simulation(config, LONG, cuda=False)
    assert simulation.trace(load_strategy("sequential")).peak().nbytes <= simulation.floor().peak().nbytes
    assert "fit below" in choice.why


@pytest.mark.parametrize("n", [1, 4])
def test_the_largest_chunk_below_the_floor(n: int) -> None:
    config = tiny(vocab_size=4099, n_layers=6, n_future=n)
    choice = choose(config, LONG, cuda=False)
    name, _, chunk = choice.spec.partition(":chunk=")
    assert name == "chunked_tokens"
    peak = simulate(config, LONG, load_strategy(choice.spec), cuda=False).peak().nbytes
    floor = Simulation(config, LONG, cuda=False).floor().peak().nbytes
    twice = simulate(config, LONG, load_strategy(f"{name}:chunk={2 * int(chunk)}"), cuda=False).peak().nbytes
    if peak <= floor:
        assert twice > floor
    else:  # no chunk reaches the floor: smaller ones would hardly be smaller
        assert "no chunk reaches" in choice.why
        least = simulate(config, LONG, load_strategy(f"{name}:chunk=128"), cuda=False).peak().nbytes
        assert peak <= 1.01 * least < twice


def test_fewer_tokens_than_the_smallest_chunk() -> None:
    config = tiny(vocab_size=4099, n_future=2)
    choice = choose(config, Workload(batch=1, sequence=16), cuda=False)
    assert choice.spec in ("sequential", "chunked_tokens:chunk=16")


def test_only_strategies_that_choose_are_settled() -> None:
    config = tiny(n_future=2)
    naive = load_strategy("naive")
    assert resolve_auto(naive, config, LONG, cuda=False) == (naive, None)
    strategy, chosen = resolve_auto(load_strategy("auto"), config, LONG, cuda=False)
    choice = choose(config, LONG, cuda=False)
    assert isinstance(choice, Choice)
    assert strategy == load_strategy(choice.spec)
    assert chosen == f"{choice.spec}: {choice.why}"


def test_without_a_model_it_is_chunked_tokens() -> None:
    model, batch = build(tiny(n_future=2), "fp64")
    expected = gradients(model, lambda: forward_backward(model, batch, load_strategy("chunked_tokens")))
    computed = gradients(model, lambda: forward_backward(model, batch, load_strategy("auto")))
    assert all((computed[name] == expected[name]).all() for name in expected)  # type: ignore[union-attr]


def test_low_precision_on_cuda() -> None:
    config = tiny(vocab_size=4099, n_layers=12, n_future=2)
    choice = choose(config, Workload(batch=8, sequence=256, dtype="bf16"), cuda=True)
    assert choice.spec.startswith("chunked_tokens:chunk=") or choice.spec == "sequential"
