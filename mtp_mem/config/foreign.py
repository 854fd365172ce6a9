"""The one way to read a file that somebody else may have written: JSON and TOML of bounded size and depth, clean text.

What a value means is for the caller to check, field by field (mtp_mem/config/toml.py).
"""

import json
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from mtp_mem.errors import LONGEST_TEXT, BadInput, clean_text

LARGEST_FILE = 2**28  # bytes
DEEPEST, LARGEST_NUMBER = 40, 2**63
LONG_NUMBER = b"0" * len(str(LARGEST_NUMBER))  # any digits

_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_PLAIN = bytes(set(range(32, 127)) - set(b"\\"))


def read_bytes(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """The bytes of a regular file; anything else (a pipe, a device, a folder) is refused without waiting for it.

    Raises:
        BadInput: it cannot be read, is no file, or has more than `largest` bytes.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput(f"{path}: not a regular file")
            content = file.read(largest + 1)
    except (OSError, ValueError) as e:  # ValueError: NUL in the name
        raise BadInput(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(content) > largest:
        raise BadInput(f"{path}: larger than {largest:,} bytes, more than any file that mtp_mem writes")
    return content


def read_json(path: Path, *, nan: bool = False) -> Any:
    """The JSON document that a file holds, its texts cleaned (`clean`).

    Args:
        path: the file.
        nan: whether NaN and infinities may stand in it, as Python's own writer puts them there.

    Raises:
        BadInput: it cannot be read, is too large, or is no JSON that `document` takes.
    """
    content = read_bytes(path)
    try:
        return document(content, nan=nan)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a file holds, its texts cleaned (`clean`).

    Raises:
        BadInput: it cannot be read, or is no TOML.
    """
    content = read_bytes(path)
    try:
        table: dict[str, Any] = clean(tomllib.loads(content.decode()))
        return table
    except (ValueError, RecursionError, BadInput) as e:
        why = "nested too deep" if isinstance(e, RecursionError) else clean_text(str(e))
        raise BadInput(f"{path}: is not valid TOML: {why}") from None


def document(content: bytes | str, *, nan: bool = False) -> Any:
    """The value of a JSON document; its texts lose control characters, and what is beyond 1000 characters.

    Raises:
        BadInput: no JSON, NaN or an infinity in it unless `nan`, an integer beyond 2**63, or nested more than 40 deep.
    """
    raw = content.encode(errors="replace") if isinstance(content, str) else content
    harmless = _harmless(raw)
    try:
        if harmless:
            value = (_ANY if nan else _STRICT).decode(raw.decode("ascii"))
        else:
            value = json.loads(content, **(_ANY_HOOKS if nan else _STRICT_HOOKS))
    except BadInput:
        raise
    except (ValueError, RecursionError) as e:
        why = ": nested too deep" if isinstance(e, RecursionError) else ""
        raise BadInput(f"not a whole JSON object (cut off?){why}") from None
    return value if harmless else clean(value)


def _harmless(content: bytes) -> bool:
    """Whether this JSON needs no cleaning: printable ASCII, no escape, no long text or number, not deep.

    This saves time: it holds for every line that mtp_mem writes, and a file may have a hundred thousand.
    """
    return (
        not content.translate(None, _PLAIN)
        and content.count(b"{") + content.count(b"[") <= DEEPEST
        and max(map(len, content.split(b'"'))) < LONGEST_TEXT
        and LONG_NUMBER not in content.translate(_DIGITS_ALIKE)
    )


def clean(value: Any, depth: int = 0) -> Any:
    """The value with every text in it cleaned.

    Raises:
        BadInput: it is nested more than 40 deep, or holds a whole number beyond 2**63.
    """
    if depth > DEEPEST:
        raise BadInput(f"nested more than {DEEPEST} deep")
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, depth + 1) for item in value]
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise BadInput("holds a whole number beyond 2**63")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadInput(f"holds {text[:20]}, which no float can hold")
    return number


def _whole(text: str) -> int:
    if len(text) > len(str(-LARGEST_NUMBER)) or abs(number := int(text)) >= LARGEST_NUMBER:
        raise BadInput("holds a whole number beyond 2**63")
    return number


def _no_constant(name: str) -> Any:
    raise BadInput(f"holds {name}, which JSON does not have")


_ANY_HOOKS: dict[str, Any] = {"parse_int": _whole}
_STRICT_HOOKS: dict[str, Any] = {**_ANY_HOOKS, "parse_float": _finite, "parse_constant": _no_constant}
_ANY, _STRICT = json.JSONDecoder(), json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
