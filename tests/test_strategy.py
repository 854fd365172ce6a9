"""Spec strings: built-in names, options, registered strategies, classes by path, and clear errors."""

import dataclasses
import re
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch.nn.functional as F
from small import build, tiny

from mtp_mem import forward_backward, load_strategy, strategy
from mtp_mem.errors import BadInput, Missing
from mtp_mem.strategies.chunked_vocab import ChunkedVocab
from mtp_mem.strategies.naive import Naive


def test_specs() -> None:
    assert load_strategy("naive") == Naive()
    assert load_strategy("chunked_vocab:chunk=7") == ChunkedVocab(chunk=7)
    assert load_strategy("mtp_mem.strategies.chunked_vocab:ChunkedVocab:chunk=3") == ChunkedVocab(chunk=3)


def test_every_builtin_has_one_line_of_documentation() -> None:
    for name in strategy.loadable():
        assert 20 < len(strategy.summary(name)) < 130


def test_registered_strategies_come_after_the_builtin_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", "mtp_mem.strategies.chunked_vocab:ChunkedVocab", strategy.GROUP)
    monkeypatch.setattr(strategy, "entry_points", lambda **_: [entry])
    assert list(strategy.available()) == [*strategy.BUILTIN, "theirs"]
    assert load_strategy("theirs:chunk=5") == ChunkedVocab(chunk=5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sequental", "unknown strategy 'sequental'; did you mean 'sequential'? Valid: naive, sequential"),
        ("chunked_vocab:chunks=3", "strategy 'chunked_vocab': unknown option 'chunks'; did you mean 'chunk'?"),
        ("chunked_vocab:chunk=x", "chunk = 'x': expected a whole number"),
        ("chunked_vocab:chunk=0", "chunk = 0: expected a whole number of at least 1"),
        ("naive:chunk=1", "strategy 'naive': unknown option 'chunk' Valid: none"),
        ("native:tokens=0", "tokens = 0: expected a whole number of tokens, at least 1"),
        ("native:policy=aut", "unknown value 'aut'; did you mean 'auto'? Valid: auto, accurate"),
        ("no_such_module:Class", "no module 'no_such_module'"),
        ("mtp_mem.step:Nothing", "module 'mtp_mem.step' has no 'Nothing'"),
        ("mtp_mem.step:TrainingStep", "missing"),
        ("mtp_mem.config.schema:Sweep", "has no method backward"),
        ("mtp_mem.step:forward_backward", "is no class"),
        ("", "unknown strategy ''"),
    ],
)
def test_mistakes_are_named(spec: str, words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)):
        load_strategy(spec)


def test_a_strategy_whose_package_is_missing(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import not_installed_here\nclass Needy: pass\n")  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Missing, match="needs the package 'not_installed_here'"):
        load_strategy("needy:Needy")
    (tmp_path / "not_installed_here_too.py").write_text("import not_installed_here\n")  # type: ignore[operator]
    with pytest.raises(Missing, match="needs the package 'not_installed_here'"):
        load_strategy("not_installed_here_too:Needy")


def test_a_module_that_raises_when_asked_for_its_class(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def __getattr__(name):\n    raise RuntimeError('no GPU')\n"
    (tmp_path / "asks_late.py").write_text(code)  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadInput, match=r"strategy 'asks_late:Any': importing 'asks_late': RuntimeError: no GPU"):
        load_strategy("asks_late:Any")


@dataclasses.dataclass(frozen=True)
class OfUnknownType:
    """A strategy with a field of a type that only a type checker imports."""

    chunk: "KnownToTypeCheckersAlone" = None  # type: ignore[name-defined]  # noqa: F821

    def backward(self, cut: Any, heads: Any, targets: Any, weights: Any) -> Any: ...


def test_types_of_options_are_looked_up_for_options_alone() -> None:
    path = f"{__name__}:OfUnknownType"
    assert load_strategy(path) == OfUnknownType()
    with pytest.raises(BadInput, match=r"cannot be made: NameError: name 'KnownToTypeCheckersAlone' is not defined"):
        load_strategy(f"{path}:chunk=1")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_native_hands_its_options_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library, given = F.linear_cross_entropy, []

    def watched(*args: Any, options: Any, **others: Any) -> Any:
        given.append((options.batch_chunk_size, options.acc_policy))
        return library(*args, options=options, **others)

    monkeypatch.setattr(F, "linear_cross_entropy", watched)
    model, batch = build(tiny(n_future=2))
    for spec in ("native", "native:tokens=5", "native:policy=accurate"):
        forward_backward(model, batch, load_strategy(spec))
    assert given == [(None, "auto")] * 2 + [(5, "auto")] * 2 + [(None, "accurate")] * 2


def test_native_says_which_torch_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(Missing, match=r"strategy 'native' needs torch 2\.13 or newer; here is torch \d"):
        load_strategy("native")
    assert "native" not in strategy.loadable()


def test_the_package_has_one_name(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))
    with pytest.raises(ImportError, match=r"import this package as mtp_mem\.strategies"):
        __import__("strategies")
