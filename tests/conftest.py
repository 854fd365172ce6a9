"""Without an installation there is nothing to test: one line, and exit code 3 as the command line has it."""

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
    """Half a million objects of imported libraries: half of the tests' time went into looking at them again."""
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: the last ones decide how long one of two workers has nothing to do."""
    longest = ("test_verify.py", "test_gradients.py", "test_huggingface.py", "test_bytes.py", "test_cli.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
