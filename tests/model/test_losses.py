"""The losses' defaults and edges; their gradients are held by test_equivalence.py and test_properties.py."""

import pytest
import torch

from mtp_mem import IGNORE
from mtp_mem._util import MiB
from mtp_mem.errors import BadInput
from mtp_mem.model.losses import LossOptions, full
from mtp_mem.strategies.chunked_vocab import VOCAB_CHUNK, ChunkedVocab


def test_the_default_slab_is_what_the_documentation_says() -> None:
    assert 64 * MiB == 8192 * VOCAB_CHUNK * 4


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_slab_has_a_width(chunk: int) -> None:
    with pytest.raises(BadInput, match=f"chunk = {chunk}: expected a whole number of at least 1"):
        ChunkedVocab(chunk=chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_softmax_and_loss_have_the_precision_that_is_promised(dtype: torch.dtype) -> None:
    # Logits that the dtype holds exactly: whatever is off afterwards was lost in softmax or loss.
    hidden, unembedding = torch.eye(8, dtype=dtype)[None], torch.randn(300, 8).bfloat16().to(dtype)
    targets = torch.randint(300, (1, 8))
    targets[0, 3] = IGNORE
    right = torch.nn.functional.cross_entropy(unembedding.T.double(), targets[0], ignore_index=IGNORE)
    for loss in (full, ChunkedVocab(chunk=7).loss, ChunkedVocab(chunk=300).loss):
        computed = loss(hidden, unembedding, targets)
        assert computed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(computed.double(), right, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)


def test_only_the_gradients_that_are_asked_for() -> None:
    targets = torch.randint(30, (1, 5))
    for wants in ((True, False), (False, True), (True, True)):
        hidden = torch.randn(1, 5, 4, requires_grad=wants[0])
        unembedding = torch.randn(30, 4, requires_grad=wants[1])
        ChunkedVocab(chunk=7).loss(hidden, unembedding, targets).backward()
        assert (hidden.grad is not None, unembedding.grad is not None) == wants


def test_a_z_loss_of_logits_far_apart_is_finite() -> None:
    hidden, unembedding = torch.tensor([[1.0, 0.0]]), torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    loss = full(hidden, unembedding, torch.tensor([0]), options=LossOptions(z_loss=1e-3))
    assert loss.item() == pytest.approx(1e-3 * 1000.0**2)
