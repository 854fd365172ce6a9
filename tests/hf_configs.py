"""The Hugging Face configs in tests/hf, their published parameters, and changed ones."""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "hf"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

PUBLISHED = {
    "deepseek-v3": 671_026_419_200,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2b": 2_506_172_416,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def changed(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A config with some keys changed, or left out where the value is `...`."""
    table = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    return path
