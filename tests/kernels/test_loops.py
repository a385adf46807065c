"""What Triton compiles wrongly without a word, looked for in the kernels' sources (docs/limits.md)."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted(Path(__file__).parents[2].glob("kernels/*.py"))
WRONG = """
@triton.jit
def kernel(out, n):
    a = n * 2
    r, s = a, n
    for i in range(n):
        tl.store(out + i, r)
        if i > 1:
            r = a
        a = a + 1
"""


def handed_on(statement: ast.AST) -> set[tuple[str, str]]:
    """(x, y) of what an assignment x = y hands on by name, be it in a tuple."""
    if not isinstance(statement, ast.Assign):
        return set()
    found = set()
    for target in statement.targets:
        both = [(target, statement.value)]
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            both = list(zip(target.elts, statement.value.elts, strict=True))
        found |= {(x.id, y.id) for x, y in both if isinstance(x, ast.Name) and isinstance(y, ast.Name)}
    return found


def taken_for_constant(source: str) -> list[str]:
    """Variables that are another's value before a loop and are assigned that other in it."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        before: set[tuple[str, str]] = set()
        for statement in ast.walk(function):  # outer statements first
            if isinstance(statement, ast.For | ast.While):
                within = {pair for inner in statement.body for s in ast.walk(inner) for pair in handed_on(s)}
                found += [f"{function.name}: {x} = {y}, line {statement.lineno}" for x, y in sorted(within & before)]
            else:
                before |= handed_on(statement)
    return found


def test_the_fault_is_found() -> None:
    assert taken_for_constant(WRONG) == ["kernel: r = a, line 6"]
    assert taken_for_constant(WRONG.replace("r, s = a, n", "r, s = a + 0, n")) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_has_it(path: Path) -> None:
    assert taken_for_constant(path.read_text()) == []
