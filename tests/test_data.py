"""Targets are shifted as the contract says, and real text becomes the tokens that a profile asks for."""

from pathlib import Path

import pytest
import torch
from small import tiny

from mtp_mem import IGNORE, Workload, make_batch
from mtp_mem.data import corpus_batch, load_corpus
from mtp_mem.errors import BadInput

SHORT = Workload(batch=2, sequence=8, tokenizer="bytes")


def test_targets_of_a_packed_example() -> None:
    batch = make_batch(torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]), 3)
    assert batch.targets.tolist() == [
        [[11, 12, 13, IGNORE], [21, 22, 23, IGNORE]],
        [[12, 13, IGNORE, IGNORE], [22, 23, IGNORE, IGNORE]],
        [[13, IGNORE, IGNORE, IGNORE], [23, IGNORE, IGNORE, IGNORE]],
    ]


def test_heads_beyond_the_sequence_have_no_target() -> None:
    assert make_batch(torch.tensor([[5]]), 2).targets.tolist() == [[[IGNORE]], [[IGNORE]]]
    assert make_batch(torch.tensor([[5, 6]]), 3).targets.tolist() == [[[6, IGNORE]], [[IGNORE] * 2], [[IGNORE] * 2]]


def test_bytes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("häuser und gärten", encoding="utf-8")
    corpus = load_corpus(SHORT, 256, tmp_path / "t.txt")
    batch = corpus_batch(corpus, tiny(vocab_size=256, n_future=2), SHORT)
    assert batch.tokens.untyped_storage().nbytes() == batch.tokens.nbytes  # it does not keep the corpus
    assert bytes(batch.tokens.flatten().tolist()) == "häuser und gärten".encode()[:16]
    assert batch.targets.shape == (2, 2, 8)


def test_bpe_has_exactly_the_vocabulary_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workload = Workload(batch=2, sequence=64, tokenizer="bpe")
    first = load_corpus(workload, 1000)
    (cached,) = (tmp_path / "mtp_mem").iterdir()
    again = load_corpus(workload, 1000)
    assert first.digest == again.digest
    assert first.ids is not None
    assert 900 < int(first.ids.max()) < 1000
    cached.write_text("{ broken")
    assert load_corpus(workload, 1000).digest == first.digest


def test_a_vocabulary_that_the_text_cannot_fill_is_drawn_uniformly(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("to be or not to be, that is the question " * 5)
    workload = Workload(batch=2, sequence=8, tokenizer="bpe")
    corpus = load_corpus(workload, 5000, tmp_path / "t.txt")
    assert "ids are drawn uniformly" in corpus.note
    first, again = (corpus_batch(corpus, tiny(vocab_size=5000), workload) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert int(first.tokens.max()) > 2500


@pytest.mark.parametrize(
    ("content", "vocab_size", "words"),
    [
        (b"short", 256, "too short: 5 tokens, but a batch of 2 x 8 needs 16"),
        (b"\xff\xfe broken text", 256, "not UTF-8: invalid start byte at byte 0"),
        (b"long enough for two rows", 200, "vocab_size = 200 is smaller than the 256 byte tokens"),
    ],
)
def test_text_that_does_not_fit(tmp_path: Path, content: bytes, vocab_size: int, words: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        load_corpus(SHORT, vocab_size, tmp_path / "t.txt")
    with pytest.raises(BadInput, match="No such file"):
        load_corpus(SHORT, 256, tmp_path / "none.txt")
