"""Imports between rooms (modules and subpackages of mtp_mem) point one way, and `import mtp_mem` stays light."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "_version",
    "errors",
    "_util",
    "environment",
    "config",
    "model",
    "data",
    "strategy",
    "strategies",
    "distributed",
    "step",
    "memory",
    "prediction",
    "verification",
    "testing",
    "runs",
    "report",
    "cli",
    "__main__",
)
"""From the bottom up: a room imports itself and what stands before it."""

NAMES_ONLY_THE_COMMAND_LINE_NEEDS = ("rich", "tokenizers", "platformdirs", "psutil", "pynvml", "matplotlib", "jinja2")


def modules() -> dict[str, Path]:
    """Every module of the package with its file, as it is installed."""
    files = {
        "mtp_mem": ROOT / "mtp_mem",
        "mtp_mem.strategies": ROOT / "strategies",
        "mtp_mem.profiles": ROOT / "profiles",
    }
    paths = {}
    for package, folder in files.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imports(module: str, *, everywhere: bool) -> frozenset[str]:
    """The package's modules that `module` imports when loaded; `everywhere`: in functions and for types too."""
    known = modules()
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "mtp_mem":
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
                names.add(child.module)
            elif isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif everywhere or not isinstance(child, (ast.FunctionDef, ast.If)):
                visit(child)

    visit(ast.parse(known[module].read_text(encoding="utf-8")))
    return frozenset(name for name in names if name in known and name not in ("mtp_mem", module))


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in modules() if name.count(".") and room(name) != "profiles"])
def test_imports_point_down(module: str) -> None:
    own = ORDER.index(room(module))
    up = [name for name in imports(module, everywhere=True) if ORDER.index(room(name)) > own]
    assert not up, f"{module} imports {up}, which stand above it"


def test_no_module_imports_itself_by_a_detour() -> None:
    assert longest_chain()


def test_the_longest_chain_of_imports() -> None:
    chain = longest_chain()
    assert len(chain) <= 14, " -> ".join(chain)


def longest_chain() -> list[str]:
    chains: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...] = ()) -> list[str]:
        assert module not in above, f"{' -> '.join([*above, module])} is a circle"
        if module not in chains:
            below = [chain(name, (*above, module)) for name in imports(module, everywhere=False)]
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    return max((chain(module) for module in modules() if module != "mtp_mem"), key=len)


def test_few_entries_at_the_top_and_in_every_room() -> None:
    top = [path for path in (ROOT / "mtp_mem").iterdir() if not path.name.startswith("__")]
    named = [path.name for path in top if path.name not in ("_version.py", "py.typed")]
    assert len(named) <= 16, sorted(named)
    for folder in (path for path in (ROOT / "mtp_mem").rglob("*") if path.is_dir() and path.name != "__pycache__"):
        files = [path.name for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
        assert len(files) <= 12, (folder, sorted(files))


def test_a_trainer_imports_nothing_that_only_the_command_line_needs() -> None:
    # torch itself imports some where they are installed.
    code = f"""import sys, torch
before = set(sys.modules)
import mtp_mem
print([name for name in {NAMES_ONLY_THE_COMMAND_LINE_NEEDS} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
