"""The allocator's model against recordings of real GPUs, allocation by allocation: MTP_MEM_TAPES names their folder.

Without the folder the tapes that this file makes are replayed: each is a rule of PyTorch's allocator that recordings
show, and a model without the rule must fail on one of them.
"""

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from mtp_mem._util import MiB
from mtp_mem.memory.tape import Kind, Tape, TapeEvent
from mtp_mem.prediction import caching_allocator, recording
from mtp_mem.prediction.recording import hold

FOLDER = os.environ.get("MTP_MEM_TAPES")
RECORDED = sorted(Path(FOLDER).glob("*.tape.json.gz")) if FOLDER else []


def recorded(path: Path) -> Tape:
    return Tape.from_json(json.loads(gzip.decompress(path.read_bytes())))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.removesuffix(".tape.json.gz"))
def test_a_recording_of_a_gpu(path: Path) -> None:
    tape = recorded(path)
    held = hold(tape)
    assert held.difference == ""
    assert held.at == len(tape.events)
    assert held.model_reserved_peak == max(totals.reserved for totals in held.totals)
    assert len(held.totals) == len(tape.events) + 1
    assert all(totals.requested <= totals.allocated <= totals.reserved for totals in held.totals)


def tape(
    expandable: bool,
    *events: tuple[Kind, float, float],
    segments: dict[float, float] | None = None,
    lengths: dict[float, float] | None = None,
) -> Tape:
    """A tape in MiB, from nothing; with `segments` after the last event, and the blocks that the events leave there.

    `lengths` are of blocks that are not as long as their request.
    """
    whole = [TapeEvent(kind, int(address * MiB), int(nbytes * MiB)) for kind, address, nbytes in events]
    blocks: dict[int, tuple[int, int]] = {}
    for kind, address, nbytes in whole:
        if kind == "alloc":
            blocks[address] = (-(-nbytes // 512) * 512, nbytes)
        elif kind == "free":
            del blocks[address]
    for address, length in (lengths or {}).items():
        blocks[int(address * MiB)] = (int(length * MiB), blocks[int(address * MiB)][1])
    last = {int(a * MiB): (int(n * MiB), n == 2) for a, n in (segments or {}).items()}
    return Tape(expandable, {}, {}, whole, last, blocks if last else {})


BYTE = 1 / MiB
TAPES = {
    "sizes round up to 512 B": tape(
        False, ("segment", 0, 2), ("alloc", 0, BYTE), ("alloc", 512 * BYTE, 513 * BYTE), ("alloc", 1536 * BYTE, BYTE)
    ),
    "1 MiB is small, a byte more is large": tape(
        False, ("segment", 0, 2), ("alloc", 0, 1), ("segment", 50, 20), ("alloc", 50, 1 + BYTE)
    ),
    "from 10 MiB on a segment of its own, in steps of 2 MiB": tape(
        False,
        ("segment", 0, 10),
        ("alloc", 0, 10),
        ("segment", 50, 22),
        ("alloc", 50, 20 + BYTE),
        segments={0: 10, 50: 22},
    ),
    "a rest of 1 MiB is not split off": tape(
        False, ("segment", 0, 14), ("alloc", 0, 13), segments={0: 14}, lengths={0: 14}
    ),
    "the smallest block that fits, and its rest of less than 1 MiB stays with it": tape(
        *(False, ("segment", 0, 20), ("alloc", 0, 5), ("alloc", 5, 2), ("alloc", 7, 3)),
        *(("alloc", 10, 2), ("free", 0, 5), ("free", 7, 3), ("alloc", 7, 2 + BYTE), ("alloc", 0, 5)),
    ),
    "of two that fit alike the lower one": tape(
        *(False, ("segment", 0, 20), ("alloc", 0, 3), ("alloc", 3, 3), ("alloc", 6, 3)),
        *(("alloc", 9, 3), ("free", 6, 3), ("free", 0, 3), ("alloc", 0, 3), ("alloc", 6, 3)),
    ),
    "free neighbours merge": tape(
        *(False, ("segment", 0, 20), ("alloc", 0, 5), ("alloc", 5, 5), ("alloc", 10, 10)),
        *(("free", 0, 5), ("free", 5, 5), ("alloc", 0, 9), ("free", 0, 9), ("free", 10, 10), ("alloc", 0, 20)),
    ),
    "empty_cache gives back segments that are free as a whole": tape(
        *(False, ("segment", 0, 20), ("alloc", 0, 9), ("segment", 50, 12), ("alloc", 50, 12), ("segment", 90, 2)),
        *(("alloc", 90, BYTE), ("free", 50, 12), ("free", 90, BYTE), ("drop", 50, 12), ("drop", 90, 2)),
        segments={0: 20},
    ),
    "a growing end is taken last": tape(
        *(True, ("map", 0, 40), ("alloc", 0, 25), ("alloc", 25, 2), ("free", 0, 25)),
        ("alloc", 0, 12),  # 25 MiB are free inside, 13 MiB at the end, which would fit closer
        *(("map", 40, 20), ("alloc", 27, 25)),
        segments={0: 60},
    ),
    "whole pages are unmapped, and the lowest hole with room is filled": tape(
        *(True, ("map", 0, 100), ("alloc", 0, 99), ("map", 100, 20), ("alloc", 99, 2), ("map", 120, 60)),
        *(("alloc", 101, 60), ("alloc", 161, 2), ("free", 0, 99), ("free", 101, 60)),
        *(("unmap", 0, 80), ("unmap", 120, 40), ("map", 0, 60), ("alloc", 0, 50)),
        *(("map", 60, 20), ("alloc", 50, 39), ("map", 120, 40), ("alloc", 101, 45), ("oom", 0, 500)),
        segments={0: 180},
    ),
}


@pytest.mark.parametrize("rule", TAPES)
def test_a_rule_that_was_seen_on_gpus(rule: str) -> None:
    TAPES[rule].check()
    assert hold(TAPES[rule]).difference == ""


BROKEN = {
    "rounds to 256 B": ("ROUND = 512", "ROUND = 256"),
    "a request of 1 MiB is large": ("small = size <= SMALL\n", "small = size < SMALL\n"),
    "a request up to 2 MiB is small": ("SMALL = MiB", "SMALL = 2 * MiB"),
    "10 MiB share a segment": ("if size < OWN_SEGMENT", "if size <= OWN_SEGMENT"),
    "no rounding to 2 MiB": ("-(-size // SMALL_SEGMENT) * SMALL_SEGMENT", "size"),
    "a rest of 1 MiB is split off": ("else rest > SMALL and", "else rest >= SMALL and"),
    "splits always": ("else rest > SMALL and", "else rest >= ROUND and"),
    "never splits": ("else rest > SMALL and", "else rest > 1000 * SMALL and"),
    "worst fit": ("        nbytes = free[at][0]\n", "        at = len(free) - 1\n        nbytes = free[at][0]\n"),
    "the upper one of two": (
        "        nbytes = free[at][0]\n",
        "        at = bisect.bisect_left(free, (free[at][0] + 1,)) - 1\n        nbytes = free[at][0]\n",
    ),
    "no merge with what is before": (
        "in (block.before, block.after)",
        "in (block.before if self.expandable else None, block.after)",
    ),
    "no merge with what is behind": (
        "in (block.before, block.after)",
        "in (block.before, block.after if self.expandable else None)",
    ),
    "keeps whole segments": ("block.before is None and block.after is None and", "block.after is block and"),
    "gives back segments in use": ("block.before is None and block.after is None and", "block.after is None and"),
    "the growing end as it is": ("free[at + 1][2].room < free[at][2].room", "free[at + 1][2].room < 0"),
    "expandable segments split like others": ("if small or self.expandable else rest", "if small else rest"),
    "gives back parts of pages": ("page = self.page(block.small)\n        begin", "page = ROUND\n        begin"),
    "pages of 2 MiB": ("SMALL_SEGMENT if small else self.large_segment", "SMALL_SEGMENT"),
    "holes stay": ("for _, unmapped in self.unmapped[small]:", "for _, unmapped in self.unmapped[small][-1:]:"),
    "a hole does not count what is before it": ("start = unmapped.before if", "start = unmapped if"),
}
SEEN_ON_GPUS = (
    "rounds to 256 B",
    "a request up to 2 MiB is small",
    "no rounding to 2 MiB",
    "splits always",
    "worst fit",
    "no merge with what is before",
    "the growing end as it is",
)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = with_change(*BROKEN[rule], monkeypatch)
    differences = {name: broken.hold(tape).difference for name, tape in TAPES.items()}
    assert any(differences.values())
    if RECORDED and rule in SEEN_ON_GPUS:
        assert any(broken.hold(recorded(path)).difference for path in sorted(RECORDED, key=lambda p: p.stat().st_size))


def with_change(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The replay, over a model in whose source one place is another."""
    source = Path(caching_allocator.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    changed = {caching_allocator.__name__: source.replace(old, new)}
    changed[recording.__name__] = Path(recording.__file__).read_text(encoding="utf-8")
    for name, text in changed.items():
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, name, "exec"), module.__dict__)
    return sys.modules[recording.__name__]


def test_what_differs_is_said() -> None:
    words = {
        "nothing was allocated, and so nothing was checked": tape(False, ("segment", 0, 2)),
        "event 2, alloc of 512 B: the model put it at 200, the GPU at 400": tape(
            False, ("segment", 0, 2), ("alloc", 0, 512 * BYTE), ("alloc", 1024 * BYTE, 512 * BYTE)
        ),
        "event 1, alloc of 512 B: the model got 2,097,152 B at 0, the GPU 20,971,520 B at 0": tape(
            False, ("segment", 0, 20), ("alloc", 0, 512 * BYTE)
        ),
        "event 0, alloc of 512 B: the model got 2,097,152 B at 4000000000000000, the GPU no memory": tape(
            False, ("alloc", 0, 512 * BYTE)
        ),
        "after the last event: the model holds 2,097,152 B of segments, the GPU 4,194,304 B": tape(
            False, ("segment", 0, 2), ("alloc", 0, 1), segments={0: 2, 50: 2}
        ),
        "event 3, oom of 2,097,152 B: the model gives back 20,971,520 B at 0, the GPU no memory": tape(
            *(True, ("map", 0, 20), ("alloc", 0, 20), ("free", 0, 20), ("oom", 0, 2))
        ),
        "event 6, drop of 12,582,912 B: the model gives back 25,165,824 B in 2 pieces, the GPU 12,582,912 B at 0": tape(
            *(False, ("segment", 0, 12), ("alloc", 0, 12), ("segment", 50, 12), ("alloc", 50, 12)),
            *(("free", 0, 12), ("free", 50, 12), ("drop", 0, 12)),
        ),
    }
    for difference, one in words.items():
        assert hold(one).difference == difference
