"""The closed forms against what the instruments find: to the byte where every tensor is counted."""

import dataclasses
from typing import Any

import pytest
from benchmarks.head_phase import HeadPhase, HeadShape
from small import tiny

from mtp_mem import ModelConfig, Training, Workload, load_strategy
from mtp_mem.config.schema import Dtype
from mtp_mem.model.shape import Shape
from mtp_mem.prediction.floor import NoLogits
from mtp_mem.prediction.formulas import baseline, formula_bytes, peak_over_baseline, slope
from mtp_mem.prediction.simulated_step import Simulation, simulate

WIDE = {"vocab_size": 4099, "n_layers": 6}  # logits larger than all else; no formula's moment is in doubt

PLAIN = ["naive", "sequential", "checkpointed"]


def shape_of(config: ModelConfig, workload: Workload) -> Shape:
    shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload))
    assert shape is not None
    return shape


@pytest.mark.parametrize("n", [1, 3, 6])
def test_what_the_trunk_keeps(n: int) -> None:
    config, workload = tiny(**WIDE, n_future=n), Workload(batch=2, sequence=64)
    trace = simulate(config, workload, load_strategy("sequential"), cuda=False)
    kept = trace.peak().by_category["trunk activations"]
    assert kept == shape_of(config, workload).trunk + 4 * n  # the n loss weights are made before the trunk runs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_peak_above_the_baseline(n: int, dtype: Dtype) -> None:
    config = tiny(**WIDE, n_future=n)
    workload = Workload(batch=4, sequence=128, dtype=dtype)
    simulation = Simulation(config, workload, cuda=False)
    for spec in ("naive", "sequential", "checkpointed", "chunked_vocab:chunk=512", "chunked_tokens:chunk=128"):
        trace = simulation.trace(load_strategy(spec))
        formula = peak_over_baseline(spec, shape_of(config, workload))
        assert formula is not None
        missing = trace.peak().nbytes - trace.baseline - formula
        # Left out on purpose: scalars (losses, counts), and chunked_vocab's few numbers a row.
        assert 0 <= missing <= (44 * workload.tokens if "vocab" in spec else 32 * n + 32), spec


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"qkv_bias": True}, {"qk_norm": True, "n_kv_heads": 1}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_other_attentions(changes: dict[str, Any], dtype: str) -> None:
    config, workload = tiny(**WIDE, n_future=2, **changes), Workload(batch=4, sequence=128, dtype=dtype)  # type: ignore[arg-type]
    trace = simulate(config, workload, load_strategy("sequential"), cuda=False)
    shape = shape_of(config, workload)
    assert trace.peak().by_category["trunk activations"] == shape.trunk + 4 * 2
    assert shape.gradients == sum(s.nbytes for s in trace.storages.values() if s.category == "parameters")
    missing = trace.peak().nbytes - trace.baseline - (peak_over_baseline("sequential", shape) or 0)
    assert 0 <= missing <= 32 * 2 + 32


def test_fp32_on_cuda_keeps_keys_and_values_repeated() -> None:
    config, workload = tiny(**WIDE, n_future=2), Workload(batch=4, sequence=128)
    trace = simulate(config, workload, load_strategy("sequential"))
    shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload), cuda=True)
    assert shape is not None
    assert trace.peak().by_category["trunk activations"] == shape.trunk + 4 * 2  # the loss weights


SETUPS = [
    Training(trunk_checkpointing="full"),
    Training(trunk_checkpointing=2),
    Training(optimizer="adamw-foreach"),
    Training(optimizer="adamw-loop"),
    Training(optimizer="sgd", trunk_checkpointing="full"),
]


@pytest.mark.parametrize(
    ("dtype", "shape"), [("fp32", {"batch": 4, "sequence": 128}), ("bf16", {"batch": 1, "sequence": 16})]
)
@pytest.mark.parametrize("training", SETUPS, ids=str)
def test_other_setups(shape: dict[str, int], training: Training, dtype: str) -> None:
    config, workload = tiny(**WIDE, n_future=2), Workload(**shape, dtype=dtype)  # type: ignore[arg-type]
    trace = simulate(config, workload, load_strategy("sequential"), training, cuda=False)
    fields = (dataclasses.asdict(config), dataclasses.asdict(workload))
    formula = formula_bytes("sequential", *fields, training, cuda=False)
    assert formula is not None
    missing = trace.peak().nbytes - trace.baseline - formula
    assert 0 <= missing <= 0.03 * trace.peak().nbytes
    assert trace.baseline <= baseline(config, workload, training) + 8 * 60  # steps of each parameter


SPECS = ("naive", "sequential", "checkpointed", "chunked_vocab:chunk=512", "chunked_tokens:chunk=64")


PARTS_AND_PRECISIONS: list[tuple[Dtype, Training]] = [
    ("bf16", Training(micro_batches=3)),
    ("bf16", Training(micro_batches=2, trunk_checkpointing="full")),
    ("bf16", Training(frozen="trunk")),
    ("bf16", Training(frozen="trunk", micro_batches=2, optimizer="adamw-foreach")),
    ("bf16", Training(master_weights=True)),
    ("bf16", Training(master_weights=True, optimizer="adamw-foreach", micro_batches=2)),
    ("bf16", Training(set_to_none=False)),
    ("fp32", Training(set_to_none=False, trunk_checkpointing="full", frozen="norm")),
    ("bf16", Training(set_to_none=False, master_weights=True)),
    ("bf16", Training(frozen="all but heads")),
    ("fp32", Training(frozen="embedding")),
    ("bf16", Training(frozen="trunk layers", trunk_checkpointing=2)),
    ("bf16", Training(frozen="unembedding")),
    ("bf16", Training(frozen="unembedding,trunk", micro_batches=2)),
    ("bf16", Training(frozen="unembedding,norm", set_to_none=False)),
    ("bf16", Training(frozen="heads")),
    ("bf16", Training(frozen=("heads", "norm", "unembedding"))),
    ("fp32", Training(frozen=("heads", "trunk layers"), optimizer="adamw-loop")),
    ("bf16", Training(frozen="head 1")),
    ("bf16", Training(frozen="head 2,norm", micro_batches=2)),
    ("fp32", Training(frozen="trunk,head 2")),
    ("bf16", Training(frozen="trunk,head 1,norm,unembedding")),
    ("bf16", Training(frozen="trunk,heads")),
    ("bf16-mixed", Training()),
    ("bf16-mixed", Training(trunk_checkpointing="full", micro_batches=2)),
    ("bf16-mixed", Training(set_to_none=False)),
    ("bf16-mixed", Training(frozen="all but heads", optimizer="adamw-foreach")),
    ("bf16-mixed", Training(frozen="heads,norm", trunk_checkpointing=2)),
]


@pytest.mark.parametrize(
    ("batch", "sequence", "dtype", "training"),
    [
        *((4, 128, *setup) for setup in PARTS_AND_PRECISIONS),
        *((1, 16, *setup) for setup in PARTS_AND_PRECISIONS[::4]),
    ],
    ids=str,
)
def test_frozen_parts_micro_batches_and_precisions(batch: int, sequence: int, dtype: Dtype, training: Training) -> None:
    config = tiny(**WIDE | {"n_layers": 4}, n_future=2)
    workload = Workload(batch=batch, sequence=sequence, dtype=dtype)
    simulation = Simulation(config, workload, training, cuda=False)
    assert abs(simulation.baseline - baseline(config, workload, training)) <= 8 * 60  # steps of each parameter
    fields = (dataclasses.asdict(config), dataclasses.asdict(workload))
    for spec in SPECS:
        trace = simulation.trace(load_strategy(spec))
        formula = formula_bytes(spec, *fields, training, cuda=False)
        assert formula is not None
        assert 0 <= trace.peak().nbytes - trace.baseline - formula <= 0.03 * trace.peak().nbytes, spec


def test_a_tied_table_is_frozen_as_the_embedding_is() -> None:
    tied = dataclasses.asdict(tiny(**WIDE, unembedding="tied"))
    workload = dataclasses.asdict(Workload(batch=1, sequence=16))
    for frozen, parts in (("unembedding", set()), ("trunk", {"embedding", "trunk layers", "unembedding"})):
        shape = Shape.of(tied, workload, training=Training(frozen=frozen))
        assert shape is not None
        assert shape.frozen == parts


@pytest.mark.parametrize(
    "training",
    [
        Training(label_smoothing=0.1),
        Training(z_loss=1e-4),
        Training(frozen="trunk,head 1,norm"),
        Training(frozen="all but heads,heads"),
    ],
)
def test_no_formula_where_none_was_counted(training: Training) -> None:
    fields = (dataclasses.asdict(tiny(**WIDE)), dataclasses.asdict(Workload(batch=1, sequence=16)))
    assert formula_bytes("sequential", *fields, training, cuda=False) is None
    capped = dataclasses.asdict(tiny(**WIDE, logit_softcap=30.0))
    assert formula_bytes("sequential", capped, fields[1], cuda=False) is None


def test_gradients_can_set_the_peak() -> None:
    config, workload = tiny(vocab_size=300, dim=128, n_layers=6), Workload(batch=1, sequence=2)
    trace = simulate(config, workload, load_strategy("sequential"), cuda=False)
    shape = shape_of(config, workload)
    assert peak_over_baseline("sequential", shape) == shape.gradients
    parameters = sum(s.nbytes for s in trace.storages.values() if s.category == "parameters")
    assert shape.gradients == parameters
    assert 0 <= trace.peak().nbytes - trace.baseline - shape.gradients <= 8192  # the clipping's norms


@pytest.mark.parametrize("n", [1, 4])
def test_the_floor_holds_no_logits(n: int) -> None:
    config, workload = tiny(**WIDE, n_future=n), Workload(batch=4, sequence=128)
    floor = simulate(config, workload, NoLogits(), cuda=False).peak()
    assert "logits" not in floor.by_category
    assert all(s.shape[-1:] != (4099,) for s in floor.live)
    for spec in ("naive", "sequential", "checkpointed", "chunked_vocab:chunk=64"):
        assert simulate(config, workload, load_strategy(spec), cuda=False).peak().nbytes >= floor.nbytes


def test_no_formula_where_none_holds() -> None:
    shape = dataclasses.asdict(tiny())
    assert Shape.of({**shape, "head": "causal"}, dataclasses.asdict(Workload(batch=1, sequence=8))) is None
    assert peak_over_baseline("native", shape_of(tiny(), Workload(batch=1, sequence=8))) is None


def test_slope() -> None:
    assert slope([(1, 10), (2, 30), (4, 70)]) == pytest.approx(20)
    assert slope([(1, 10), (3, 10)]) == 0
    assert slope([(4, 10)]) is None


@pytest.mark.parametrize("n", [1, 2, 4])
def test_chunked_tokens_as_cuda_runs_it(n: int) -> None:
    # The fp32 sum of the unembedding's gradient stands beside the logits, and at the end beside its bf16 copy.
    for dim, layers, sequence, chunk in ((64, 6, 128, 128), (64, 6, 128, 512), (512, n, 8, 32), (512, n, 8, 16)):
        config = tiny(vocab_size=4099, n_layers=layers, dim=dim, n_future=n)
        workload = Workload(batch=4, sequence=sequence, dtype="bf16")
        spec = f"chunked_tokens:chunk={chunk}"
        trace = simulate(config, workload, load_strategy(spec))
        shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload), cuda=True)
        assert shape is not None
        formula = peak_over_baseline(spec, shape)
        assert formula is not None
        # Left out: scalars, and a few numbers for each row of the chunk.
        assert 0 <= trace.peak().nbytes - trace.baseline - formula <= 32 * n + 32 + 32 * chunk, dim


@pytest.mark.parametrize("n", [1, 4])
def test_the_head_phase_of_chunked_tokens(n: int) -> None:
    # Above the inputs: the lower bound (gradients of unembedding and hidden states) and one chunk, to the scalar.
    N, D, V, chunk = 128, 64, 4099, 32
    phase = HeadPhase(HeadShape(N=N, D=D, V=V, n=n))
    over = phase.peak_over_inputs(load_strategy(f"chunked_tokens:chunk={chunk}"))
    bound = phase.shape.lower_bound - (N * D * 4 if n == 1 else 0)  # the cut's gradient is made after the first head
    rows = N * (8 + 1 + 4) + chunk * (4 + 21)
    assert 0 <= over - bound - chunk * V * 4 - rows <= 32 * n + 32


@pytest.mark.parametrize(
    ("dtype", "training"),
    [
        ("bf16", Training()),
        ("fp32", Training(set_to_none=False)),
        ("bf16-mixed", Training(frozen="all but heads")),
    ],
)
def test_at_the_size_of_a_real_model_a_few_numbers_a_row_are_missing(dtype: Dtype, training: Training) -> None:
    config = ModelConfig(
        vocab_size=128256, dim=2048, n_layers=3, n_attention_heads=32, n_kv_heads=8, ffn_dim=8192, n_future=2
    )
    workload = Workload(batch=2, sequence=4096, dtype=dtype)
    simulation = Simulation(config, workload, training)
    shape = Shape.of(dataclasses.asdict(config), dataclasses.asdict(workload), cuda=True, training=training)
    assert shape is not None
    for spec in SPECS:
        trace = simulation.trace(load_strategy(spec))
        missing = trace.peak().nbytes - trace.baseline - (peak_over_baseline(spec, shape) or 0)
        assert 0 <= missing <= (44 if "vocab" in spec else 16) * workload.tokens, spec
