"""Pickles of strangers: plain data comes in as it went out, and nothing else is looked at twice."""

import builtins
import os
import pickle
import pickletools
import struct
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mem.config import plain_pickle
from mtp_mem.config.plain_pickle import loads
from mtp_mem.errors import BadInput

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_data_comes_in_as_it_went_out(value: Any, protocol: int) -> None:
    content = pickle.dumps([value, value, "x" * 300], protocol)
    assert loads(content) == [value, value, "x" * 300]
    assert loads(content + b"\0\0") == [value, value, "x" * 300]  # as the memory viewer's page pads it


def test_what_is_shared_stays_shared() -> None:
    row = {"a": 1}
    first, second = loads(pickle.dumps([row, row]))
    assert first is second
    first.append(0) if isinstance(first, list) else first.update(b=2)
    assert second == {"a": 1, "b": 2}


def refusal(content: bytes) -> str:
    """Why the bytes are not read; empty: they are."""
    try:
        loads(content)
    except BadInput as e:
        return str(e)
    return ""


class Runs:
    """Runs a command when a pickle of it is loaded, if its loader lets it."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("call", [os.system, builtins.eval, builtins.print, bytearray, set, frozenset, complex])
def test_nothing_runs(call: Any, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    content = pickle.dumps({"segments": [Runs(call, "print('RAN')")]}, protocol)
    with pytest.raises(BadInput, match=r"holds more than plain data \(\w+ at byte \d+\), and is not read any further"):
        loads(content)
    assert "RAN" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("value", [{1: 2}, {(1, 2): 3}, {None: 1}, {b"a": 1}, {1, 2}, b"bytes", bytearray(b"x"), 1j])
def test_what_no_snapshot_holds_is_refused(value: Any) -> None:
    with pytest.raises(BadInput):
        loads(pickle.dumps(value))


def nested_keys(depth: int) -> bytes:
    """A tuple of itself twice, and so on, as a key: to hash it takes 2^depth steps."""
    return b"\x80\x04" + b"}" + b")" + b"\x94" + b"h\x00\x86\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(1, depth)
    ) + b"h" + bytes([depth]) + b"Ns."  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + b"N" + b"r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo of 2^32 places
        b"\x80\x04" + b"X" + struct.pack("<I", 2**32 - 1) + b"short.",
        b"\x80\x05" + b"\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a tebibyte
        b"\x80\x04" + b"(" * 1_000_000,
        b"\x80\x04" + b"]\x94h\x00a" * 200_000 + b".",
        b"\x80\x04" + b")" + b"\x85" * 1_000_000 + b".",  # a tuple in a tuple in a tuple
        nested_keys(60),
        b"\x80\x02" + b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x04\x8a\xff" + b"\xff" * 255 + b".",
    ],
)
def test_few_bytes_take_little(content: bytes) -> None:
    begun = time.perf_counter()
    assert len(refusal(content)) < 200
    assert time.perf_counter() - begun < 20


def test_how_much_is_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MOST_PARTS", 1000)
    assert loads(pickle.dumps(list(range(900)))) == list(range(900))
    with pytest.raises(BadInput, match="consists of more than 1,000 parts"):
        loads(pickle.dumps(list(range(1100))))


@given(st.binary(max_size=60), st.sampled_from(["", *(op.code for op in pickletools.opcodes)]))
def test_any_bytes(content: bytes, code: str) -> None:
    for start in (b"", b"\x80\x04", b"\x80\x02(]}"):
        assert "\n" not in refusal(start + code.encode("latin-1") + content)


@given(st.data())
def test_a_changed_pickle(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps({"a": [1, 2.5, "text", {"b": (1, 2)}], "c": [None, True, 2**40]}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in refusal(bytes(content[: data.draw(st.integers(0, len(content)))]))
