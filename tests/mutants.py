"""Small bugs: a source with one place of its syntax tree changed; tests/mutation.py runs the tests against them."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PAIRS = "Add Sub, Mult Div, FloorDiv Mult, LShift RShift, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or"
NAMES = {"min": "max", "max": "min", "maximum": "minimum", "amax": "amin", "zeros_like": "ones_like"}
DROPPED = {
    "detach",
    "clamp",
    "to",
    "exp",
    "exp_",
    "log",
    "sub_",
    "mul_",
    "requires_grad_",
    "squeeze",
    "unbind",
    "stack",
}
NOT_CODE = {"annotation", "returns", "decorator_list", "type_params"}
SWAPS: dict[str, str] = {}
for _pair in PAIRS.split(", "):
    _a, _b = _pair.split()
    SWAPS |= {_a: _b} | ({} if _b in SWAPS else {_b: _a})

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Mutant:
    """One change: its line, a text that says what it is, and the whole source after it."""

    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a source, in the order of its syntax tree, no two alike."""
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for path, line, node in _places(tree, (), 0):
        for new in _replacements(node):
            changed = ast.unparse(ast.fix_missing_locations(_replaced(tree, path, new)))
            if changed not in seen:
                seen.add(changed)
                yield Mutant(line, f"{_short(node)}  ->  {_short(new)}", changed)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of this node."""
    new: Any = copy.deepcopy(node)
    kind = type(node).__name__
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop() if kind in SWAPS:
            yield getattr(ast, SWAPS[kind])()
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
            yield ast.Constant(node.value - 1)
        case ast.BinOp():
            yield node.left
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Compare):  # comparisons: see SWAPS
            new.test = ast.UnaryOp(ast.Not(), node.test)
            yield new
        case ast.Attribute() if node.attr in NAMES:
            new.attr = NAMES[node.attr]
            yield new
        case ast.Name() if node.id in NAMES:
            yield ast.Name(NAMES[node.id], node.ctx)
        case ast.Call():
            if isinstance(node.func, ast.Name) and node.func.id == "reversed":
                yield node.args[0]
            if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
                yield node.func.value
            for i in range(len(node.keywords)):
                fewer = copy.deepcopy(node)
                del fewer.keywords[i]
                yield fewer
        case ast.AugAssign():
            yield ast.Assign([node.target], node.value)
    if isinstance(node, ast.stmt) and _may_go(node):
        yield ast.Pass()


def _may_go(node: ast.stmt) -> bool:
    """Whether the file makes sense without the statement: no docstring, no name that is used later."""
    match node:
        case ast.Expr():
            return not isinstance(node.value, ast.Constant)
        case ast.Assign():
            return not any(isinstance(target, ast.Name | ast.Tuple) for target in node.targets)
        case ast.If():
            return not node.orelse
        case _:
            return isinstance(node, ast.AugAssign | ast.Raise)


def _places(node: Any, path: Path, line: int) -> Iterator[tuple[Path, int, ast.AST]]:
    if isinstance(node, ast.AST):
        line = getattr(node, "lineno", line)
        yield path, line, node
        inside: Any = [(name, value) for name, value in ast.iter_fields(node) if name not in NOT_CODE]
    else:
        inside = enumerate(node)
    for step, value in inside:
        if isinstance(value, ast.AST | list):
            yield from _places(value, (*path, step), line)


def _replaced(tree: ast.Module, path: Path, new: ast.AST) -> ast.Module:
    changed: Any = copy.deepcopy(tree)
    parent: Any = changed
    for step in path[:-1]:
        parent = parent[step] if isinstance(step, int) else getattr(parent, step)
    if isinstance(path[-1], int):
        parent[path[-1]] = new
    else:
        setattr(parent, path[-1], new)
    return changed  # type: ignore[no-any-return]


def _short(node: ast.AST) -> str:
    text = (ast.unparse(ast.fix_missing_locations(node)) or type(node).__name__).split("\n")[0]
    return text if len(text) <= 90 else text[:87] + "..."
