"""The fenced code blocks of a page, and a program that runs them: python blocks.py PAGE FOLDER.

FOLDER is where it runs, with the stand-ins. docs/contributing.md describes the comments `setup` and `skip`.
"""

import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

_COMMENT = re.compile(r"<!-- (setup|skip): (.+?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """line: of its first line of code. skip: why it is not run."""

    language: str
    code: str
    line: int
    setup: tuple[str, ...] = ()
    skip: str | None = None


def blocks(text: str) -> list[Block]:
    """In the page's order. Comments count for the next block if nothing else stands between."""
    found = []
    setup: list[str] = []
    skip: str | None = None
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        comment = _COMMENT.fullmatch(line)
        fence = re.fullmatch(r"```(\w*)", line)
        if comment and comment[1] == "setup":
            setup.append(comment[2])
        elif comment:
            skip = comment[2]
        elif fence:
            code = []
            for _, inner in lines:
                if inner == "```":
                    break
                code.append(inner)
            else:
                raise ValueError(f"line {number}: this block does not end")
            found.append(Block(fence[1], "\n".join(code), number + 1, tuple(setup), skip))
        if not comment:
            if setup and not fence:
                raise ValueError(f"line {number}: no block follows the setup")
            setup, skip = [], None
    return found


def run(page: Path, folder: Path) -> None:
    """Its blocks in one namespace; an error's traceback names the page's line."""
    sys.path.insert(0, str(folder))
    sys.modules["__main__"] = types.ModuleType("__main__")  # Dynamo looks a function's names up there
    names = sys.modules["__main__"].__dict__
    for block in blocks(page.read_text()):
        if block.skip or block.language not in ("python", "console"):
            continue
        for line in block.setup:
            exec(line, names)
        print(f"--- {page.name}:{block.line}", flush=True)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True), names)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True, cwd=folder)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
