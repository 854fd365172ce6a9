"""Pickles of strangers: numbers, texts, lists, tuples and dicts are read, anything else is refused.

Python's own unpickler can be told to load no classes, and still takes gigabytes or hours for a few bytes that ask for
it (a memo of 2^32 places, a tuple of tuples of tuples as a key). This reader knows only the opcodes of plain data, of
protocol 2 or later: a pickle can name no code, keys are texts, and the number of parts is bounded.
"""

import pickle
import pickletools
import struct
from typing import Any

from mtp_mem.errors import BadInput

MOST_PARTS = 2**25  # opcodes; some two million events of the allocator

_CONSTANTS: dict[int, Any] = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False}
_NUMBERS = {
    pickle.BININT[0]: struct.Struct("<i"),
    pickle.BININT1[0]: struct.Struct("<B"),
    pickle.BININT2[0]: struct.Struct("<H"),
    pickle.BINFLOAT[0]: struct.Struct(">d"),
}
_LENGTHS = {  # by opcode: the format of the length of what follows
    pickle.LONG1[0]: struct.Struct("<B"),
    pickle.SHORT_BINUNICODE[0]: struct.Struct("<B"),
    pickle.BINUNICODE[0]: struct.Struct("<I"),
}
_BINGET, _LONG_BINGET, _INDEX = pickle.BINGET[0], pickle.LONG_BINGET[0], struct.Struct("<I")
_PUTS = {pickle.BINPUT[0]: struct.Struct("<B"), pickle.LONG_BINPUT[0]: struct.Struct("<I")}
_TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
_FRAME, _STOP, _MARK = pickle.FRAME[0], pickle.STOP[0], pickle.MARK[0]
_LIST, _DICT, _EMPTY_TUPLE, _TUPLE = pickle.EMPTY_LIST[0], pickle.EMPTY_DICT[0], pickle.EMPTY_TUPLE[0], pickle.TUPLE[0]
_APPEND, _APPENDS, _SETITEM, _SETITEMS = pickle.APPEND[0], pickle.APPENDS[0], pickle.SETITEM[0], pickle.SETITEMS[0]
_MEMOIZE, _LONG1 = pickle.MEMOIZE[0], pickle.LONG1[0]


def loads(content: bytes) -> Any:
    """What a pickle of plain data holds; parts of it may be shared, and a list may even hold itself.

    Raises:
        BadInput: it is cut off, holds more than plain data, or is of more parts than MOST_PARTS.
    """
    if content[:1] != pickle.PROTO or not 2 <= int.from_bytes(content[1:2], "big") <= pickle.HIGHEST_PROTOCOL:
        raise BadInput("not a pickle of protocol 2 or later")
    try:
        return _loads(content)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError):
        raise BadInput("not a whole pickle (cut off?)") from None


def _loads(content: bytes) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # stacks below the marks
    memo: dict[int, Any] = {}
    at, parts = 2, 0
    while True:
        code = content[at]
        at += 1
        if code == _BINGET:
            stack.append(memo[content[at]])
            at += 1
            continue
        if code == _LONG_BINGET:
            stack.append(memo[_INDEX.unpack_from(content, at)[0]])
            at += 4
            continue
        parts += 1
        if parts > MOST_PARTS:
            raise BadInput(f"consists of more than {MOST_PARTS:,} parts")
        if code == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif code in _NUMBERS:
            number = _NUMBERS[code]
            stack.append(number.unpack_from(content, at)[0])
            at += number.size
        elif code == _MARK:
            outer.append(stack)
            stack = []
        elif code == _SETITEMS:
            items, stack = stack, outer.pop()
            _set(stack[-1], items[::2], items[1::2])
        elif code == _SETITEM:
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key], [value])
        elif code == _APPENDS:
            items, stack = stack, outer.pop()
            _extend(stack[-1], items)
        elif code == _APPEND:
            value = stack.pop()
            _extend(stack[-1], [value])
        elif code in _LENGTHS:
            number = _LENGTHS[code]
            begin = at + number.size
            at = begin + number.unpack_from(content, at)[0]
            if at > len(content):
                raise ValueError
            part = content[begin:at]
            is_number = code == _LONG1
            stack.append(
                int.from_bytes(part, "little", signed=True) if is_number else part.decode(errors="surrogatepass")
            )
        elif code in _PUTS:
            number = _PUTS[code]
            memo[number.unpack_from(content, at)[0]] = stack[-1]
            at += number.size
        elif code == _DICT:
            stack.append({})
        elif code == _LIST:
            stack.append([])
        elif code in _TUPLES:
            count = _TUPLES[code]
            stack[-count:] = [tuple(stack[-count:])]
        elif code == _TUPLE:
            items, stack = stack, outer.pop()
            stack.append(tuple(items))
        elif code == _EMPTY_TUPLE:
            stack.append(())
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == _FRAME:
            at += 8
        elif code == _STOP:
            (value,) = stack
            return value
        else:
            what = next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"code {code}")
            raise BadInput(f"holds more than plain data ({what} at byte {at - 1}), and is not read any further")


def _set(target: Any, keys: list[Any], values: list[Any]) -> None:
    if type(target) is not dict or any(type(key) is not str for key in keys):
        raise BadInput("holds a dict with a key that is not a string")
    target.update(zip(keys, values, strict=True))


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError
    target.extend(items)
