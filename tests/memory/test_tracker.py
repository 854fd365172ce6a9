"""The tracked bytes are the bytes: equal, without any tolerance, to the CPU allocator's own events."""

import gc
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler quiet

import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from small import KINDS, build, gradients, plain_joint, tiny
from torch.profiler import ProfilerActivity, profile

from mtp_mem import TrainingStep, Workload, load_strategy, make_optimizer
from mtp_mem.errors import Missing
from mtp_mem.memory.cpu import track
from mtp_mem.memory.trace import Trace
from mtp_mem.memory.tracker import Tracker, calibrate
from mtp_mem.model.losses import full
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.step import forward_backward


def allocator_peak(run: Callable[[], object]) -> int:
    """Highest running sum of the CPU allocator's events while `run` runs, without any dispatch mode."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def tracked(run: Callable[[Tracker], object], parameters: list[tuple[str, torch.Tensor]]) -> Trace:
    tracker = Tracker(517, 64, parameters)
    tracker.resident("parameters", parameters)
    with tracker:
        run(tracker)
    return tracker.trace


def scratch(product: Callable[[], torch.Tensor]) -> int:
    """Bytes that a product takes inside, besides its result."""
    product()
    return allocator_peak(product) - product().nbytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    "spec", ["naive", "sequential", "chunked_vocab:chunk=1000", "chunked_tokens:chunk=40", "checkpointed"]
)
def test_equals_the_allocator(spec: str, n: int, dtype: str) -> None:
    model, batch = build(tiny(vocab_size=4099, n_layers=5, n_future=n), dtype, sequence=64)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    step.optimizer.zero_grad()
    over_baseline = allocator_peak(step)
    trace = track(step)
    peak = trace.peak()
    inside = over_baseline - (peak.nbytes - trace.baseline)
    if dtype == "bf16" and "chunked_vocab" in spec:
        # At its peak stands a product of low precision, for which the CPU's kernel may take scratch of its own:
        # whether it does depends on the processor.
        slab, rows = torch.randn(128, 1000).bfloat16(), torch.randn(128, 64).bfloat16()
        assert 0 <= inside <= scratch(lambda: slab.T @ rows)
    else:
        assert inside == 0
    assert sum(peak.by_category.values()) == peak.nbytes
    assert max(trace.phase_peaks().values()) == peak.nbytes
    state = sum(v.nbytes for s in step.optimizer.state.values() for v in s.values())
    assert trace.baseline == sum(t.nbytes for t in [*model.parameters(), batch.tokens, batch.targets]) + state


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["native", "native:tokens=64"])
def test_an_operator_written_in_python_hides_nothing(spec: str, dtype: str) -> None:
    model, batch = build(tiny(vocab_size=4099, n_layers=5, n_future=3), dtype, sequence=64)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    step.optimizer.zero_grad()
    over_baseline = allocator_peak(step)
    trace = track(step)
    inside = over_baseline - (trace.peak().nbytes - trace.baseline)
    assert any(s.category == "logits" and s.shape[-1:] == (4099,) for s in trace.storages.values())
    if dtype == "bf16":  # the CPU's product of low precision takes scratch of its own, in fp32
        assert 0 <= inside <= 128 * 4099 * 4
    else:
        assert inside == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["naive", "sequential"])
def test_equals_the_allocator_for_every_kind(spec: str, kind: str) -> None:
    config = tiny(vocab_size=1031, n_layers=4, n_future=3, head=kind, unembedding="replicated", medusa_blocks=2)
    model, batch = build(config, sequence=64)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    step.optimizer.zero_grad()
    over_baseline = allocator_peak(step)
    trace = track(step)
    assert trace.peak().nbytes - trace.baseline == over_baseline


@pytest.mark.parametrize("trunk_layers", [1, 8])
def test_the_cut_costs_no_byte_of_the_peak(trunk_layers: int) -> None:
    # Once with the logits on top and once with the trunk's activations (V small).
    model, batch = build(tiny(vocab_size=4099 if trunk_layers == 1 else 67, n_layers=trunk_layers + 2, n_future=2))
    parameters = list(model.named_parameters())
    plain = tracked(lambda tracker: plain_joint(model, batch, tracker.phase), parameters)
    model.zero_grad(set_to_none=True)
    cut = tracked(
        lambda tracker: forward_backward(model, batch, load_strategy("naive"), phase=tracker.phase), parameters
    )
    assert cut.peak().nbytes == plain.peak().nbytes


def test_naive_grows_by_its_logits_and_sequential_does_not() -> None:
    logits = 2 * 512 * 2053 * 4  # bytes of one head's, fp32; N = 16 D, so gradients are small beside them

    @cache
    def over(spec: str, n: int) -> tuple[int, int]:
        # Simulated: tests/prediction/test_simulated_step.py holds these bytes against tracked ones.
        workload = Workload(batch=2, sequence=512)
        trace = simulate(tiny(vocab_size=2053, n_future=n), workload, load_strategy(spec), cuda=False)
        peak = trace.peak()
        return peak.nbytes - trace.baseline, peak.by_category["logits"]

    for low, high in ((1, 2), (2, 4), (4, 8)):
        assert over("naive", high)[0] - over("naive", low)[0] >= (high - low) * logits
        for spec in ("sequential", "chunked_vocab", "checkpointed"):
            assert over(spec, high)[0] - over(spec, low)[0] < (high - low) * logits / 10
            assert over(spec, high)[1] == over(spec, low)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_counted_by_hand(dtype: torch.dtype) -> None:
    N, V, D = 512, 2053, 64
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    unembedding = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))

    def run() -> None:
        full(hidden, unembedding, targets).backward()
        hidden.grad = unembedding.grad = None

    run()
    tracker = Tracker(V, D, [])
    tracker.resident("other", [("hidden", hidden), ("unembedding", unembedding), ("targets", targets)])
    with tracker:
        run()
    # log-softmax, its gradient, the logits' gradient; the loss and the one that flows into it
    by_hand = 3 * N * V * 4 + 2 * 4
    assert tracker.trace.peak().nbytes - tracker.trace.baseline == by_hand
    assert allocator_peak(run) == by_hand


@pytest.mark.parametrize(
    ("spec", "widths"),
    [
        ("sequential", {70}),
        ("checkpointed", {70}),
        ("chunked_vocab:chunk=30", {30}),
    ],
)
def test_only_logits_are_called_logits(spec: str, widths: set[int]) -> None:
    # A recomputed layer runs its backward within its head's loss; with a small V it is larger than the logits.
    model, batch = build(tiny(vocab_size=70, n_layers=3, n_future=2, unembedding="replicated"))
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    assert {s.shape[-1] for s in track(step).storages.values() if s.category == "logits"} == widths


def test_a_sum_that_autograd_makes_in_place_is_no_new_buffer() -> None:
    # Three dense gradients meet at `weight`: plain autograd holds the running sum and one more, never three.
    weight, upstream = torch.ones(1000, requires_grad=True), torch.ones(1000)

    def run() -> None:
        torch.autograd.backward([weight.sin(), weight.cos(), weight.exp()], [upstream] * 3)
        weight.grad = None

    run()
    expected = allocator_peak(run)
    tracker = Tracker(517, 64, [])
    tracker.resident("other", [("weight", weight), ("upstream", upstream)])
    with tracker:
        run()
    assert any(event.kind == "move" for event in tracker.trace.events)
    assert tracker.trace.peak().nbytes - tracker.trace.baseline == expected


def test_a_sum_into_a_gradient_that_somebody_holds_is_a_new_buffer() -> None:
    weight, upstream = torch.ones(1000, requires_grad=True), torch.ones(1000)
    held: list[torch.Tensor] = []

    def run() -> None:
        last = weight.exp()
        last.register_hook(held.append)  # keeps the first gradient that reaches the product
        torch.autograd.backward([weight.sin(), weight.view(1000) * 1, last], [upstream] * 3)
        weight.grad = None
        held.clear()

    run()
    expected = allocator_peak(run)
    tracker = Tracker(517, 64, [])
    tracker.resident("other", [("weight", weight), ("upstream", upstream)])
    with tracker:
        run()
    assert tracker.trace.peak().nbytes - tracker.trace.baseline == expected


def test_holds_nothing_and_changes_no_gradient() -> None:
    model, batch = build(tiny(n_future=2), "fp64")
    strategy = load_strategy("sequential")
    expected = gradients(model, lambda: forward_backward(model, batch, strategy))
    seen: list[weakref.ref[torch.Tensor]] = []

    def run(tracker: Tracker) -> None:
        losses = forward_backward(model, batch, strategy, phase=tracker.phase)
        seen.append(weakref.ref(losses))

    computed = gradients(model, lambda: tracked(run, list(model.named_parameters())))
    assert seen[0]() is None
    assert all(torch.equal(computed[name], expected[name]) for name in expected)  # type: ignore[arg-type]


def test_calibration_finds_the_engine_only_buffer() -> None:
    assert calibrate() == calibrate()
    assert all(count > 0 for count in calibrate())


def test_a_torch_that_sums_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mem.memory.tracker._issued_by_engine", lambda: False)
    with pytest.raises(Missing, match=r"does not know how torch .* sums gradients"):
        Tracker(517, 64, [])


def test_phases_come_in_the_order_of_the_step() -> None:
    model, batch = build(tiny(n_future=2))
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy("sequential"))
    step()
    assert list(track(step).phase_peaks()) == [
        "trunk forward",
        *("head 2 forward", "head 2 loss", "head 2 backward"),
        *("head 1 forward", "head 1 loss", "head 1 backward"),
        *("trunk backward", "clip"),
    ]


JOINT = ["head 1 forward", "head 1 loss", "head 2 forward", "head 2 loss", "heads backward"]
TURNS = [f"head {i} {part}" for i in (2, 1) for part in ("forward", "loss", "backward")]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("naive", JOINT),
        ("sequential", TURNS),
        ("chunked_vocab", TURNS),
        ("chunked_tokens", TURNS),
        ("checkpointed", [*JOINT, "head 2 forward", "head 2 loss", "head 1 forward", "head 1 loss"]),
    ],
)
def test_every_strategy_says_where_it_is(spec: str, expected: list[str]) -> None:
    model, batch = build(tiny(n_future=2))
    phases: list[str] = []
    forward_backward(model, batch, load_strategy(spec), phase=phases.append)
    assert phases == ["trunk forward", *expected, "trunk backward"]


@pytest.mark.parametrize("spec", ["naive", "sequential", "chunked_vocab", "checkpointed"])
def test_a_step_leaves_nothing_for_the_garbage_collector(spec: str) -> None:
    model, batch = build(tiny(n_future=2))
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec))
    step()
    gc.collect()
    gc.disable()
    try:
        trace = track(step)
    finally:
        gc.enable()
    left = trace.live_after(len(trace.events))
    assert len(left) == len(trace.resident) + sum(p.grad is not None for p in model.parameters())


def test_the_sum_of_the_unembedding_s_gradient_is_a_gradient() -> None:
    config = tiny(vocab_size=4099, n_layers=4, n_future=2)
    workload = Workload(batch=1, sequence=64, dtype="bf16")
    trace = simulate(config, workload, load_strategy("chunked_tokens:chunk=16"))
    sums = [s for s in trace.storages.values() if s.shape == (4099, 64) and s.dtype == "float32"]
    assert [s.category for s in sums] == ["gradients"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "spec", ["naive", "sequential", "chunked_vocab:chunk=33", "chunked_tokens:chunk=24", "checkpointed"]
)
def test_logits_as_wide_as_hidden_states_are_told_apart(spec: str, dtype: str) -> None:
    # The same step with V = D and with V = D + 2, where the width says it: as many tensors of every category.
    counts, logits = [], []
    for vocab_size in (64, 66):
        config = tiny(vocab_size=vocab_size, dim=64, n_layers=4, n_future=2)
        workload = Workload(batch=2, sequence=24, dtype=dtype)  # type: ignore[arg-type]
        storages = simulate(config, workload, load_strategy(spec), cuda=False).storages.values()
        counts.append(Counter((s.phase, s.category) for s in storages))
        logits.append(sum(s.nbytes for s in storages if s.category == "logits") / vocab_size)
    assert counts[0] == counts[1]
    assert logits[0] == logits[1] or "chunk=33" in spec
