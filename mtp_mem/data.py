"""Text -> tokens -> batches: real text by default, n shifted rows of targets, the tail ignored."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtp_mem._util import atomic_write
from mtp_mem.config.foreign import read_bytes
from mtp_mem.config.schema import ModelConfig, Workload
from mtp_mem.errors import BadInput, clean_text
from mtp_mem.model.losses import IGNORE as IGNORE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Batch:
    """One training step's input: tokens (B, S) int64, targets (n, B, S) int64 with IGNORE where there is no target."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Corpus:
    """Token ids of a text.

    Attributes:
        ids: (length,) int64, or None where ids are drawn uniformly.
        source: where the text came from, for people.
        note: why ids are drawn uniformly although a text was asked for; empty otherwise.
        path: the file it was read from, if any.
        digest: identifies the ids; two runs with equal digests saw the same tokens.
    """

    ids: Tensor | None
    source: str
    note: str = ""
    digest: str = "uniform"
    path: Path | None = None


def make_batch(tokens: Tensor, n_future: int) -> Batch:
    """Targets of n heads: targets[i, :, t] = tokens[:, t + i + 1], IGNORE where that runs past the sequence.

    Args:
        tokens: (B, S) int64.
        n_future: n, the number of heads.
    """
    return Batch(tokens, future_targets(tokens, n_future))


def future_targets(labels: Tensor, n: int) -> Tensor:
    """Targets (n, B, S) of n heads: row i is the labels i + 1 places on, IGNORE where that runs past the sequence.

    Args:
        labels: (B, S) int64, as transformers takes them: the tokens, IGNORE where there is nothing to learn.
        n: number of heads.
    """
    targets = labels.new_full((n, *labels.shape), IGNORE)  # (n, B, S)
    for i in range(min(n, labels.shape[1] - 1)):
        targets[i, :, : -(i + 1)] = labels[:, i + 1 :]
    return targets


def check_vocabulary(workload: Workload, vocab_size: int) -> None:
    """Raises BadInput for a vocabulary smaller than the workload's tokens need."""
    if workload.tokenizer != "uniform" and vocab_size < 256:
        raise BadInput(
            f"model.vocab_size = {vocab_size} is smaller than the 256 byte tokens that tokenizer"
            f" {workload.tokenizer!r} needs; valid: 256 or more, or tokenizer = 'uniform'"
        )


def load_corpus(workload: Workload, vocab_size: int, text: Path | None = None) -> Corpus:
    """Tokenise the text as the workload says.

    Args:
        workload: chooses the tokenizer: bytes, a BPE vocabulary trained on the text (cached), or uniform random ids.
        vocab_size: V; the BPE vocabulary is trained to this size, and where the text fills less, ids are uniform.
        text: a UTF-8 file; by default the help topics that every CPython installation carries.

    Raises:
        BadInput: unreadable, not UTF-8 or too short a text, or any text where ids are uniform; a vocabulary
            smaller than the tokens need.
    """
    if workload.tokenizer == "uniform":
        if text is not None:
            raise BadInput(f"{text}: this profile draws ids uniformly (workload.tokenizer = 'uniform')")
        return Corpus(None, "uniform random ids")
    check_vocabulary(workload, vocab_size)
    content, source = _read(text)
    if workload.tokenizer == "bytes":
        ids = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8).long()
    else:
        tokenizer = _trained_bpe(content, vocab_size)
        if tokenizer.get_vocab_size() < vocab_size:
            note = (
                f"{source} fills a BPE vocabulary of {tokenizer.get_vocab_size()} tokens, not {vocab_size}:"
                " ids are drawn uniformly instead"
            )
            return Corpus(None, "uniform random ids", note)
        ids = torch.tensor(tokenizer.encode(content).ids)
    if len(ids) < workload.tokens:
        raise BadInput(
            f"{source}: too short: {len(ids)} tokens, but a batch of {workload.batch} x {workload.sequence} needs"
            f" {workload.tokens}"
        )
    return Corpus(ids, source, digest=hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16], path=text)


def corpus_batch(corpus: Corpus, model: ModelConfig, workload: Workload, rank: int = 0) -> Batch:
    """The rank's B*S tokens of the corpus as a batch; uniform ids are drawn with the workload's seed + rank.

    Args:
        corpus: the text.
        model: for V and n.
        workload: for B, S and the seed.
        rank: number of this process; each one takes the next B*S tokens, from the beginning again where the text ends.
    """
    if corpus.ids is None:
        generator = torch.Generator().manual_seed(workload.seed + rank)
        tokens = torch.randint(model.vocab_size, (workload.batch, workload.sequence), generator=generator)
    else:
        begin = rank % (len(corpus.ids) // workload.tokens) * workload.tokens
        ids = corpus.ids[begin : begin + workload.tokens].clone()  # a view would keep the whole corpus
        tokens = ids.view(workload.batch, workload.sequence)
    return make_batch(tokens, model.n_future)


def _read(path: Path | None) -> tuple[str, str]:
    if path is None:
        from pydoc_data.topics import topics  # 450 kB and more, so only on demand

        return "\n\n".join(topics[key] for key in sorted(topics)), "CPython's pydoc_data.topics"
    content = read_bytes(path)
    try:
        return content.decode(), clean_text(str(path))
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8: {e.reason} at byte {e.start}") from None


def _trained_bpe(text: str, vocab_size: int) -> "Tokenizer":
    """A byte-level BPE tokenizer trained on `text`, cached per text and size."""
    import platformdirs
    import tokenizers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    digest = hashlib.sha256(f"{tokenizers.__version__}\0{vocab_size}\0{text}".encode()).hexdigest()[:24]
    cached = Path(platformdirs.user_cache_dir("mtp_mem")) / f"bpe-{vocab_size}-{digest}.json"
    if os.path.exists(cached):
        try:
            kept = Tokenizer.from_str(read_bytes(cached).decode())
            if max(kept.get_vocab().values(), default=vocab_size) < vocab_size:
                return kept
        except (KeyboardInterrupt, SystemExit):
            raise
        except (
            BaseException
        ):  # for a damaged file the library raises bare Exception, or panics; training again mends it
            pass
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    )
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached) as partial:
            tokenizer.save(str(partial))
    except Exception:  # without a cache every run trains again, for a second; the library raises bare Exception
        pass
    return tokenizer
