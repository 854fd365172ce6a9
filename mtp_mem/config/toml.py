"""The one typed converter: a table's, a document's or an option's values become a dataclass's fields.

Every error names what is wrong, where it stands, and what is valid.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from mtp_mem.errors import BadInput, unknown

T = TypeVar("T")
WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """A class's fields with their types; cached, because a file of records asks once for each record."""
    return typing.get_type_hints(cls)


@cache
def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls)}


def from_table(cls: type[T], table: Mapping[str, Any], where: str = "", root: type | None = None) -> T:
    """Build the dataclass `cls` from a table.

    Args:
        cls: the dataclass.
        table: its fields by name; tables inside become dataclasses inside.
        where: what stands before a key's name in errors.
        root: the dataclass of the whole file, so that an error can say which table a misplaced key belongs to.

    Raises:
        BadInput: a key is unknown or missing, or a value has the wrong type.
    """
    root = root or cls
    hints = type_hints(typing.cast(Any, cls))
    fields = _fields(typing.cast(Any, cls))
    as_they_are = _as_they_are(typing.cast(Any, cls))
    values = {}
    for key, value in table.items():
        if key not in fields:
            for name, inner in type_hints(root).items():
                if dataclasses.is_dataclass(inner) and key in (f.name for f in dataclasses.fields(inner)):
                    raise BadInput(f"key {where}{key} stands in the wrong table: it belongs to [{name}]")
            raise unknown("key", f"{where}{key}", [where + name for name in fields])
        taken = type(value) in as_they_are[key]
        values[key] = value if taken else convert(hints[key], value, f"{where}{key}", root)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise BadInput(f"key {where}{name} is missing (expected {describe(hints[name])})")
    return cls(**values)


def convert(hint: Any, value: Any, where: str, root: type | None = None) -> Any:
    """The value, converted to the type hint: lists become tuples, whole numbers floats, tables dataclasses.

    Args:
        hint: int, float, str, bool, a Literal, a tuple or dict of these, a dataclass, or one of these or None.
        value: as TOML or JSON gives it.
        where: its name in errors.
        root: see `from_table`.

    Raises:
        BadInput: it is of another type.
    """
    if hint is Any or type(value) in _taken_as_they_are(hint):  # not isinstance: true is no whole number
        return value
    origin, args = _parts(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert_to_one(args, value, where, root)
    if origin is Literal:
        if value not in args:
            raise unknown("value", str(value), map(str, args), where)
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, typing.cast(type, hint)):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(typing.cast(type, hint), value, f"{where}.", root)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(args[0], item, f"{where}[{i}]", root) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: convert(args[1], item, f"{where}.{key}", root) for key, item in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    raise BadInput(f"{where} = {short(value)}: expected {describe(hint)}")


@cache
def _as_they_are(cls: Any) -> dict[str, frozenset[type]]:
    """Of each field the types whose values `convert` leaves as they are."""
    return {name: _taken_as_they_are(hint) for name, hint in type_hints(cls).items()}


@cache
def _taken_as_they_are(hint: Any) -> frozenset[type]:
    """Types whose values `convert` leaves as they are, for this type hint."""
    origin, args = _parts(hint)
    if origin in (types.UnionType, typing.Union):
        each = frozenset[type]().union(*map(_taken_as_they_are, args))
        return each - {int} if float in each else each
    if origin is dict and args == (str, Any):
        return frozenset({dict})
    return frozenset({hint}) if isinstance(hint, type) else frozenset()


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def _convert_to_one(hints: tuple[Any, ...], value: Any, where: str, root: type | None) -> Any:
    """The value as the first of these types that takes it."""
    errors = []
    for hint in hints:
        if hint is not type(None):
            try:
                return convert(hint, value, where, root)
            except BadInput as e:
                errors.append(e)
    raise errors[0] if len(errors) == 1 else BadInput(f"{where} = {short(value)}: expected {_any_of(hints)}")


def parse(hint: Any, text: str, where: str) -> Any:
    """The value that a text (of an option or a spec) stands for; of several types in the hint, of the first that fits.

    Raises:
        BadInput: it stands for no value of this type.
    """
    origin, args = _parts(hint)
    hints = [one for one in args if one is not type(None)] if origin in (types.UnionType, typing.Union) else [hint]
    for one in hints:
        value: Any = text
        try:
            if one is bool:
                value = {"true": True, "false": False}[text.lower()]
            elif one in (int, float):
                value = one(text)
            return convert(one, value, where)
        except (ValueError, KeyError, BadInput) as e:
            if len(hints) == 1 and isinstance(e, BadInput):
                raise
    raise BadInput(f"{where} = {text!r}: expected {describe(hint)}")


def describe(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _any_of(args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list, each item {describe(args[0])}"
    if dataclasses.is_dataclass(hint) or hint is dict or origin is dict:
        return "a table"
    return WORDS.get(hint, "a value")


def _any_of(hints: tuple[Any, ...]) -> str:
    return ", or ".join(describe(hint) for hint in hints if hint is not type(None))


def short(value: Any) -> str:
    """The value as Python writes it, in at most 40 characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**128 else "a number of over 38 digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
