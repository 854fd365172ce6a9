"""Without an installation there is nothing to test: pytest ends with one line and exit code 3, as the command does."""

import gc
import importlib.util

import pytest


def pytest_configure(config: pytest.Config) -> None:
    try:
        installed = importlib.util.find_spec("mtp_mem.strategies") is not None
    except ModuleNotFoundError:  # torch, or the package itself
        installed = False
    if not installed:
        pytest.exit("mtp_mem is not installed: `pip install -e '.[dev]'` in the clone installs it", returncode=3)


@pytest.fixture(autouse=True, scope="module")
def garbage_collections_pass_over_what_is_imported() -> None:
    """Freezes half a million objects of imported libraries: collections of them took half of the tests' time."""
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: a long one at the end leaves one of two workers without work."""
    longest = ("test_verify.py", "test_gradients.py", "test_huggingface.py", "test_bytes.py", "test_cli.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
