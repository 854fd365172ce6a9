"""Every training setup: predicted, tracked and allocated bytes are equal, and the gradient is the one without it."""

import contextlib
import dataclasses

import pytest
import torch
from memory.test_tracker import allocator_peak
from small import build, tiny

from mtp_mem import ModelConfig, MTPModel, Training, TrainingStep, Workload, load_strategy
from mtp_mem.config.gpus import load_gpu
from mtp_mem.errors import BadInput
from mtp_mem.memory.cpu import track
from mtp_mem.model.head_tree import keep_inputs
from mtp_mem.model.optimizers import make_optimizer, optimizer_state, state_by_rule
from mtp_mem.model.own import set_up
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.step import clip_gradients, forward_backward

CONFIG = tiny(vocab_size=1031, n_layers=4, n_future=2)
SETUPS = {
    "as usual": Training(),
    "checkpointed trunk": Training(trunk_checkpointing="full"),
    "every 2nd layer checkpointed": Training(trunk_checkpointing=2),
    "foreach": Training(optimizer="adamw-foreach"),
    "loop": Training(optimizer="adamw-loop"),
    "sgd": Training(optimizer="sgd"),
    "3 micro-batches": Training(micro_batches=3),
    "frozen trunk": Training(frozen="trunk"),
    "all but heads frozen": Training(frozen="all but heads"),
    "frozen norm and unembedding": Training(frozen=("norm", "unembedding")),
    "gradients kept": Training(set_to_none=False),
    "all at once": Training(
        trunk_checkpointing="full", optimizer="adamw-foreach", micro_batches=2, frozen=("embedding",), set_to_none=False
    ),
}
MASTER = {
    "fp32 copies": Training(master_weights=True),
    "fp32 copies, foreach": Training(master_weights=True, optimizer="adamw-foreach"),
    "fp32 copies, gradients kept": Training(master_weights=True, set_to_none=False),
}
CASES = [(name, setup, dtype) for name, setup in SETUPS.items() for dtype in ("fp32", "bf16")]
# Fake tensors, which take longer.
CASES += [(name, SETUPS[name], "bf16-mixed") for name in ("as usual", "foreach", "all at once")]
CASES += [(name, setup, "bf16") for name, setup in MASTER.items()]


def real_step(training: Training, dtype: str, spec: str) -> TrainingStep:
    model, batch = build(CONFIG, dtype, sequence=32)
    set_up(model, training)
    optimizer = make_optimizer(model, name=training.optimizer, master=training.master_weights)
    step = TrainingStep(model, optimizer, batch, load_strategy(spec), training=training)
    step()
    return step


@pytest.mark.parametrize("spec", ["naive", "chunked_tokens:chunk=24"])
@pytest.mark.parametrize(
    ("name", "training", "dtype"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_predicted_equals_tracked(name: str, training: Training, dtype: str, spec: str) -> None:
    real = track(real_step(training, dtype, spec))
    workload = Workload(batch=2, sequence=32, dtype=dtype)  # type: ignore[arg-type]
    simulated = simulate(CONFIG, workload, load_strategy(spec), training, cuda=False)
    assert simulated.baseline == real.baseline
    peak, expected = simulated.peak(), real.peak()
    assert (peak.nbytes, peak.phase, peak.op) == (expected.nbytes, expected.phase, expected.op)
    assert peak.by_category == expected.by_category
    assert sum(peak.by_category.values()) == peak.nbytes
    assert simulated.phase_peaks() == real.phase_peaks()


@pytest.mark.parametrize("name", SETUPS)
def test_tracked_equals_the_allocator(name: str) -> None:
    training = SETUPS[name]
    step = real_step(training, "fp32", "sequential")
    step.model.zero_grad(set_to_none=training.set_to_none)
    over_baseline = allocator_peak(step)
    trace = track(step)
    # On a CPU an unfused AdamW makes scalars that no operator returns: 8 bytes, and 4 as they are cast.
    inside = over_baseline - (trace.peak().nbytes - trace.baseline)
    scalars = 12 if training.optimizer in ("adamw-foreach", "adamw-loop") else 0
    assert 0 <= inside <= scalars


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("how", ["full", 2, 3])
def test_a_checkpointed_trunk_changes_no_bit(how: object, dtype: str) -> None:
    gradients = {}
    for checkpointing in ("none", how):
        model, batch = build(CONFIG, dtype, sequence=32)
        set_up(model, Training(trunk_checkpointing=checkpointing))  # type: ignore[arg-type]
        forward_backward(model, batch, load_strategy("sequential"))
        gradients[checkpointing] = [parameter.grad for parameter in model.parameters()]
    for one, other in zip(gradients["none"], gradients[how], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_checkpointed_trunk_keeps_a_layer_s_input_alone() -> None:
    workload = Workload(batch=2, sequence=32, dtype="bf16")
    kept = {}
    for how in ("none", "full"):
        step = simulate(CONFIG, workload, load_strategy("sequential"), Training(trunk_checkpointing=how))  # type: ignore[arg-type]
        kept[how] = step.phase_peaks()["head 2 forward"]
    assert kept["none"] - kept["full"] > 1.5 * 2 * 64 * 64  # two trunk layers' activations, without their inputs


@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "adamw-loop", "sgd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_state_that_is_made_by_rule_is_the_optimizer_s_own(name: str, dtype: str) -> None:
    model, batch = build(CONFIG, dtype, sequence=32)
    optimizer = make_optimizer(model, name=name)  # type: ignore[arg-type]
    TrainingStep(model, optimizer, batch, load_strategy("naive"))()
    for parameter in model.parameters():
        own = optimizer.state[parameter]
        ruled = state_by_rule(parameter, name, contextlib.nullcontext)  # type: ignore[arg-type]
        facts = [[(key, t.shape, t.dtype, t.device) for key, t in state.items()] for state in (own, ruled)]
        assert facts[0] == facts[1]


def test_eight_bit_state_is_a_byte_a_moment_and_a_scale_for_256() -> None:
    parameter = torch.nn.Parameter(torch.empty(300, 100, dtype=torch.bfloat16))
    state = state_by_rule(parameter, "adamw-8bit", contextlib.nullcontext)
    assert sum(t.nbytes for t in state.values()) == 2 * 30_000 + 2 * 4 * 118
    small = torch.nn.Parameter(torch.empty(4095))
    assert sum(t.nbytes for t in state_by_rule(small, "adamw-8bit", contextlib.nullcontext).values()) == 8 * 4095


def test_fp32_copies_take_18_bytes_a_parameter_in_the_optimizer() -> None:
    model = MTPModel(CONFIG, dtype="bf16")
    count = sum(parameter.numel() for parameter in model.parameters())
    trace = simulate(
        CONFIG,
        Workload(batch=1, sequence=8, dtype="bf16"),
        load_strategy("chunked_tokens"),
        Training(master_weights=True),
    )
    steps = 4 * len(list(model.parameters()))
    assert trace.baseline == count * (2 + 4 + 8) + steps + 8 * 8 * 3
    assert trace.phase_peaks()["optimizer"] >= count * 18


@pytest.mark.parametrize(("dtype", "parameters", "state"), [("bf16", 0.920, 1.840), ("fp32", 1.840, 3.681)])
def test_qwen_2_5_0_5b(dtype: str, parameters: float, state: float) -> None:
    config = ModelConfig(
        vocab_size=151936,
        dim=896,
        n_layers=24,
        n_attention_heads=14,
        n_kv_heads=2,
        ffn_dim=4864,
        unembedding="tied",
        qkv_bias=True,
    )
    workload = Workload(batch=1, sequence=8, dtype=dtype)  # type: ignore[arg-type]
    by_category = simulate(config, workload, load_strategy("sequential")).peak().by_category
    assert round(by_category["parameters"] / 2**30, 3) == parameters
    assert round(by_category["optimizer"] / 2**30, 3) == state


def test_a_copied_parameter_follows_its_copy() -> None:
    step = real_step(Training(master_weights=True), "bf16", "naive")
    for name, value in optimizer_state(step.model, step.optimizer):
        if name.endswith("fp32 copy"):
            assert torch.equal(value.to(torch.bfloat16), step.model.get_parameter(name.partition(":")[0]))


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_clipping_is_torch_s(norm: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(7, 3)) for _ in range(5)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(7, 3)
        other.grad = one.grad.clone()
    ours.append(torch.nn.Parameter(torch.randn(2)))
    clip_gradients(ours, norm)
    torch.nn.utils.clip_grad_norm_(theirs, norm, foreach=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=False))  # type: ignore[arg-type]


def test_foreach_takes_a_temporary_as_large_as_all_parameters() -> None:
    workload, gpu = Workload(batch=1, sequence=8, dtype="bf16"), load_gpu("h200")
    beyond_gradients = {}
    weights = sum(p.nbytes for p in MTPModel(CONFIG, dtype="bf16").parameters())
    for name in ("adamw", "adamw-foreach", "adamw-loop"):
        trace = simulate(CONFIG, workload, load_strategy("chunked_tokens"), Training(optimizer=name), gpu=gpu)  # type: ignore[arg-type]
        beyond_gradients[name] = trace.phase_peaks().get("optimizer", 0) - trace.baseline - weights
    assert weights <= beyond_gradients["adamw-foreach"] < weights + 4096
    assert beyond_gradients["adamw-loop"] < 2 * CONFIG.vocab_size * 64 * 2 + 4096  # of the largest parameter
    assert beyond_gradients["adamw"] < 0  # no operator of its step makes a tensor


def test_from_the_second_micro_batch_on_all_are_alike() -> None:
    workload, gpu = Workload(batch=2, sequence=32, dtype="bf16"), load_gpu("h200")
    figures = [
        predicted(simulate(CONFIG, workload, load_strategy("sequential"), Training(micro_batches=k), gpu=gpu), gpu)
        for k in (1, 2, 9)
    ]
    assert figures[1] == figures[2] != figures[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_other_precisions_are_predicted_for_cuda(dtype: str) -> None:
    gpu = load_gpu("h100-80gb")
    workload = Workload(batch=2, sequence=32, dtype=dtype)  # type: ignore[arg-type]
    trace = simulate(CONFIG, workload, load_strategy("naive"), gpu=gpu)
    operator = "flash" if dtype == "bf16-mixed" else "efficient"
    assert any(f"_scaled_dot_product_{operator}_attention_backward" in s.op for s in trace.storages.values())
    assert predicted(trace, gpu)["baseline_bytes"] == trace.baseline + 2 * workspaces(gpu).nbytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trunk_checkpointing": "half"}, "expected none, full, or k"),
        ({"trunk_checkpointing": 0}, "expected none, full, or k"),
        ({"optimizer": "adam"}, "did you mean 'adamw'?"),
        ({"micro_batches": 0}, "must be from 1 to"),
        ({"frozen": "tronk"}, "did you mean 'trunk'?"),
    ],
)
def test_what_no_setup_is(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match="training") as error:
        dataclasses.replace(Training(), **changes)  # type: ignore[arg-type]
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("frozen", "words"),
    [(("head 9",), "unknown part 'head 9'"), (("all but heads", "heads"), "nothing is left to train")],
)
def test_what_this_model_cannot_freeze(frozen: tuple[str, ...], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        set_up(MTPModel(CONFIG), Training(frozen=frozen))


@pytest.mark.parametrize("spec", ["naive", "sequential", "chunked_tokens:chunk=16"])
@pytest.mark.parametrize("unembedding", ["shared", "tied"])
def test_the_heads_alone_are_those_of_the_real_step(spec: str, unembedding: str) -> None:
    training = Training(part="heads", set_to_none=False)
    config = tiny(vocab_size=517, n_future=2, unembedding=unembedding)
    model, batch = build(config)
    hidden = keep_inputs(model.trunk(batch.tokens).detach().requires_grad_(), batch.tokens)
    step = TrainingStep(model, make_optimizer(model), batch, load_strategy(spec), training=training, hidden=hidden)
    step()
    assert all(parameter.grad is None for parameter in model.trunk_layers.parameters())
    real = track(step)
    workload = Workload(batch=batch.tokens.shape[0], sequence=batch.tokens.shape[1], dtype="fp32")
    alone = simulate(config, workload, load_strategy(spec), training, cuda=False)
    assert alone.peak().nbytes - alone.baseline == real.peak().nbytes - real.baseline
    below = sum(p.numel() for p in model.trunk_layers.parameters())
    below += 0 if unembedding == "tied" else model.embedding.weight.numel()
    above = sum(p.numel() for p in model.parameters()) - below
    # Parameters and their gradients, hidden states and theirs, two rows of targets; no tokens, no optimizer state.
    assert alone.baseline == 4 * 2 * (above + hidden.numel()) + 8 * 2 * batch.tokens.numel()


def test_the_heads_alone_are_predicted_and_not_run() -> None:
    with pytest.raises(BadInput, match=r"training.part = 'heads' with sharding 'ddp': expected none"):
        Training(part="heads", sharding="ddp", world=2)


def test_medusa_on_a_frozen_7b_trunk() -> None:
    # Reported: batch 1 fits 24 GB, batch 4 does not. So it is with an unembedding for each of 5 Medusa heads.
    config = ModelConfig(
        vocab_size=32000,
        dim=4096,
        n_layers=32,
        n_attention_heads=32,
        ffn_dim=11008,
        n_future=6,
        head="medusa",
        unembedding="replicated",
    )
    gpu, peaks = load_gpu("rtx4090"), {}
    for batch in (1, 4):
        workload = Workload(batch=batch, sequence=2048, dtype="bf16")
        trace = simulate(config, workload, load_strategy("naive"), Training(frozen="trunk"), gpu=gpu)
        peaks[batch] = predicted(trace, gpu)["peak_allocated_bytes"]
    assert peaks[1] < gpu.total_bytes < peaks[4]


def test_a_large_vocabulary_costs_12_bytes_a_logit() -> None:
    config = ModelConfig(vocab_size=248320, dim=2048, n_layers=1, n_attention_heads=16, ffn_dim=2048)
    workload = Workload(batch=4, sequence=4096, dtype="bf16")
    peak = simulate(config, workload, load_strategy("naive"), gpu=load_gpu("h200")).peak()
    assert peak.by_category["logits"] == 12 * workload.tokens * config.vocab_size
