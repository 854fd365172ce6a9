"""Whatever the heads, shapes, masks, weights and chunks: the gradients of plain autograd on `model(tokens)`, in fp64.

Hypothesis draws the cases, the same ones in every run. The truth is `plain_step` with everything trainable: freezing a
part may change no other part's gradient.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import KINDS, UNEMBEDDINGS
from torch import Tensor

from mtp_mem import IGNORE, Batch, ModelConfig, MTPModel, forward_backward, load_strategy, make_batch
from mtp_mem.strategy import Strategy, loadable
from mtp_mem.verification.problem import plain_step

CASES = settings(derandomize=True, deadline=None, max_examples=40, database=None)
BOUND = 1e-12
# Gradients that cancel to zero (queries and keys at S = 1) are rounding alone, in proportion to what cancelled.
FLOOR = 1e-15
PARTS = ("embedding", "trunk_layers", "head_layers", "norm", "unembedding")
SPECS = loadable()
CHUNKED = ["chunked_vocab", "chunked_tokens"]


@dataclass(frozen=True)
class Case:
    """One training step."""

    head: str
    unembedding: str
    n: int
    batch: int
    sequence: int
    dim: int
    heads: tuple[int, int]  # query heads, key and value heads
    vocab_size: int
    ignored: str
    weights: tuple[float, ...] | None
    scale: float
    frozen: frozenset[str]  # of PARTS; of the heads the last one alone
    prefilled: bool
    chunks: tuple[int, int]
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    # V = 1 is left out: every gradient is 0 then, and nothing says how large rounding may be.
    n = draw(st.integers(1, 8))
    shape = {
        "batch": draw(st.integers(1, 3)),
        "sequence": draw(st.integers(1, 10)),
        "vocab_size": draw(st.integers(2, 40)),
    }
    chunk = st.integers(1, max(shape["vocab_size"], shape["batch"] * shape["sequence"]) + 2)
    weight = st.sampled_from([1.0, 0.0, 0.15, 0.7, 2.5])
    return Case(
        head=draw(st.sampled_from(KINDS)),
        unembedding=draw(st.sampled_from(UNEMBEDDINGS)),
        n=n,
        dim=draw(st.sampled_from([4, 12, 20, 28])),
        heads=draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        ignored=draw(st.sampled_from(["tail", "random", "heads", "everything"])),
        weights=draw(st.none() | st.tuples(*[weight] * n)),
        scale=draw(st.sampled_from([1.0, 0.37, 65536.0])),
        frozen=draw(st.frozensets(st.sampled_from(PARTS))),
        prefilled=draw(st.booleans()),
        chunks=(draw(chunk), draw(chunk)),
        seed=draw(st.integers(0, 99)),
        **shape,
    )


@dataclass
class Step:
    """A case's model and batch, with the right losses and gradients."""

    case: Case

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(case.seed)
        config = ModelConfig(
            vocab_size=case.vocab_size,
            dim=case.dim,
            n_layers=2,
            n_attention_heads=case.heads[0],
            n_kv_heads=case.heads[1],
            ffn_dim=10,
            n_future=case.n,
            head=case.head,  # type: ignore[arg-type]
            unembedding=case.unembedding,  # type: ignore[arg-type]
            match_layers=False,
        )
        self.model = MTPModel(config, dtype="fp64")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)  # softmax far from uniform
        self.batch = _masked(
            make_batch(torch.randint(case.vocab_size, (case.batch, case.sequence)), case.n), case.ignored
        )
        named = dict(self.model.named_parameters())
        self.before = {name: 0.1 * torch.randn_like(p) if case.prefilled else None for name, p in named.items()}
        self._fill()
        self.losses = plain_step(self.model, self.batch, case.weights, case.scale)
        self.right = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named.items()}
        self.floor = FLOOR * max(float(gradient.norm()) for gradient in self.right.values())
        modules = {part: getattr(self.model, part) for part in case.frozen}
        if "head_layers" in modules:
            modules["head_layers"] = modules["head_layers"][-1]
        frozen = {parameter for module in modules.values() for parameter in module.parameters()}
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.frozen = {name for name, p in named.items() if p in frozen}

    def run(self, strategy: Strategy) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The losses, and `.grad` by parameter name."""
        self._fill()
        losses = forward_backward(self.model, self.batch, strategy, self.case.weights, self.case.scale)
        return losses, {name: p.grad for name, p in self.model.named_parameters()}

    def off(self, gradient: Tensor, right: Tensor) -> bool:
        return not float((gradient - right).norm()) <= BOUND * float(right.norm()) + self.floor

    def _fill(self) -> None:
        for name, parameter in self.model.named_parameters():
            before = self.before[name]
            parameter.grad = None if before is None else before.clone()


def _masked(batch: Batch, ignored: str) -> Batch:
    targets = batch.targets
    if ignored == "random":
        targets[torch.rand(targets.shape) < 0.5] = IGNORE
    elif ignored == "heads":
        targets[torch.rand(len(targets)) < 0.5] = IGNORE
    elif ignored == "everything":
        targets[:] = IGNORE
    return Batch(batch.tokens, targets)


def in_chunks(spec: str, chunk: int) -> Strategy:
    """The strategy with its chunk option, whatever it is called, set."""
    strategy = load_strategy(spec)
    for option in dataclasses.fields(strategy):  # type: ignore[arg-type]
        if option.name in ("chunk", "tokens"):
            return load_strategy(f"{spec}:{option.name}={chunk}")
    return strategy


@pytest.mark.parametrize("spec", SPECS)
@CASES
@given(case=cases())
def test_the_gradients_of_plain_autograd(spec: str, case: Case) -> None:
    step = Step(case)
    losses, gradients = step.run(in_chunks(spec, case.chunks[0]))
    torch.testing.assert_close(losses, step.losses, rtol=BOUND, atol=BOUND)
    wrong = []
    for name, right in step.right.items():
        gradient, before = gradients[name], step.before[name]
        if name in step.frozen:
            untouched = gradient is None if before is None else gradient is not None and torch.equal(gradient, before)
            wrong += [] if untouched else [f"{name} is frozen and changed"]
        elif gradient is None or step.off(gradient, right):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("spec", CHUNKED)
@CASES
@given(case=cases())
def test_any_two_chunk_sizes_agree(spec: str, case: Case) -> None:
    step = Step(case)
    (losses, one), (others, two) = (step.run(in_chunks(spec, chunk)) for chunk in case.chunks)
    torch.testing.assert_close(losses, others, rtol=BOUND, atol=BOUND)
    for name, a in one.items():
        b = two[name]
        assert (a is None) == (b is None), name
        assert a is None or b is None or not step.off(a, b), name
