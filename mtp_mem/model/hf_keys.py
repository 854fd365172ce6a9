"""A Hugging Face `config.json` as typed keys that remember which of them were read.

What nobody read can be named, so that no part of a config is passed over in silence.
"""

import json
from pathlib import Path
from typing import Any

from mtp_mem.errors import BadInput

# fmt: off
WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id",
    "cache_implementation", "eos_token_id", "ep_size", "initializer_range", "max_window_layers", "model_type",
    "n_group", "norm_topk_prob", "pad_token_id", "pretraining_tp", "query_pre_attn_scalar", "rope_interleave",
    "routed_scaling_factor", "scoring_func", "seq_aux", "sliding_window_size", "topk_group", "topk_method",
    "transformers_version", "use_cache",
})
# fmt: on
"""Keys that change neither a tensor's shape nor which tensors there are."""


class Keys:
    """Typed access to a config.

    A key that is absent gets its default; one that is null is None, as in transformers.

    Attributes:
        assumed: defaults that stood in for an absent key, apart from those that mean "none" (null, false, zero).
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._table = table
        self._read: set[str] = set()
        self.assumed: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._table)

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """From a file.

        Raises:
            BadInput: the file cannot be read, or is no JSON object.
        """
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise BadInput(f"cannot be read: {e.strerror}") from None
        except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise BadInput(f"is not valid JSON: {e}") from None
        if not isinstance(table, dict):
            raise BadInput(f"is not a Hugging Face config: expected a JSON object, not {_short(table)}")
        return cls(table)

    def size(self, name: str) -> int:
        """A whole number of at least 1 that must be there."""
        if name not in self._table:
            raise BadInput(f"key {name} is missing (expected a whole number)")
        value = self._value(name, int, "a whole number of at least 1")
        if value is None or value < 1:
            raise BadInput(f"{self.show(name)}: expected a whole number of at least 1")
        return int(value)

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A whole number of at least 0, or None."""
        value: int | None = self._value(name, int, "a whole number of at least 0", default)
        if value is not None and value < 0:
            raise BadInput(f"{self.show(name)}: expected a whole number of at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number, or None."""
        value = self._value(name, (int, float), "a number", default)
        return None if value is None else float(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string, or None."""
        value: str | None = self._value(name, str, "a string", default)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; null is false."""
        return bool(self._value(name, bool, "true or false", default))

    def table(self, name: str) -> "Keys":
        """A JSON object; empty where there is none."""
        return Keys(self._value(name, dict, "a JSON object") or {})

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty where there is none."""
        value = self._value(name, list, "a list of strings") or []
        if not all(isinstance(item, str) for item in value):
            raise BadInput(f"{self.show(name)}: expected a list of strings")
        return list(value)

    def show(self, name: str) -> str:
        """`name = value` in JSON's spelling."""
        value = self._table.get(name, self.assumed.get(name))
        return f"{name} = {_short(value)}"

    def unread(self) -> list[str]:
        """Keys that were never read and are not known to be without effect."""
        return [name for name in self._table if name not in self._read | WITHOUT_EFFECT]

    def _value(self, name: str, kind: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        self._read.add(name)
        if name not in self._table:
            if default:
                self.assumed[name] = default
            return default
        value = self._table[name]
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadInput(f"{self.show(name)}: expected {expected}")
        return value


def _short(value: Any) -> str:
    text = json.dumps(value)  # ASCII on one line, whatever the file holds
    return text if len(text) <= 60 else f"{text[:57]}..."
