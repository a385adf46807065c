"""README and docs: their code runs, their options are the recipe's, and they build into a site."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparse24

from .blocks import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page, block) for page in PAGES for block in blocks(page.read_text())]
RUN = [page for page in PAGES if any(p == page and b.language != "text" and not b.skip for p, b in BLOCKS)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "stand_ins", tmp_path, dirs_exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "blocks.py", page, tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


SKIPPED = [pytest.param(b.skip, id=f"{name(page)}:{b.line}") for page, b in BLOCKS if b.skip]


@pytest.mark.parametrize("reason", SKIPPED)
def test_a_block_that_is_not_run(reason: str) -> None:
    pytest.skip(reason)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_one_that_can_be_run(page: Path) -> None:
    text = page.read_text()
    assert {block.language for block in blocks(text)} <= {"python", "console", "text"}
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    assert not re.search(r"(?m)^\n {4,}\S", prose), "an indented block is not run"


def test_comments_belong_to_the_next_block() -> None:
    text = "<!-- setup: a -->\n<!-- setup: b -->\n```python\nc\n```\n<!-- skip: no -->\n\n```console\nd\n```\n"
    assert blocks(text) == [
        Block("python", "c", 4, ("a", "b"), None),
        Block("console", "d", 9),
    ]
    for wrong in ("<!-- setup: a -->\ntext\n", "```python\na\n"):
        with pytest.raises(ValueError, match="line"):
            blocks(wrong)


def test_a_block_that_fails_fails_the_page(tmp_path: Path) -> None:
    for i, code in enumerate(
        ("```python\na = 1\n```\n\n```python\n\nassert a == 2\n```\n", "```console\nfalse\n```\n")
    ):
        page = tmp_path / f"{i}.md"
        page.write_text(code)
        command = [sys.executable, Path(__file__).parent / "blocks.py", page, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0
        assert i or f'{page}", line 7' in done.stderr


def test_the_options_are_those_of_the_recipe(tmp_path: Path) -> None:
    made = tmp_path / "options.md"
    subprocess.run([sys.executable, ROOT / "docs" / "make_options.py", "--out", made], check=True)
    assert made.read_text() == (ROOT / "docs" / "options.md").read_text(), "run python docs/make_options.py"
    fields = [field.name for field in dataclasses.fields(sparse24.Recipe)]
    rows = re.findall(r"(?m)^\| (`\w+`(?:, `\w+`)*) \| (\S.*?) \| \S", (ROOT / "README.md").read_text())
    named = [option for options, _ in rows for option in re.findall(r"`(\w+)`", options)]
    assert sorted(set(named) & set(fields)) == sorted(fields), "of the README's table"
    recipe = sparse24.Recipe()
    for options, defaults in rows:
        for option, default in zip(re.findall(r"\w+", options), defaults.split(", "), strict=False):
            if option in fields:
                value = getattr(recipe, option)
                found = eval(default.strip("`"))
                assert found == (list(value) if isinstance(value, tuple) else value), option


def test_the_tables_of_the_plan_are_its_arithmetic(tmp_path: Path) -> None:
    made = tmp_path / "scaling.md"
    subprocess.run([sys.executable, ROOT / "docs" / "make_scaling.py", "--out", made], check=True)
    assert made.read_text() == (ROOT / "docs" / "scaling.md").read_text(), "run python docs/make_scaling.py"
    assert made.read_text().count("| 1024 GPUs: ") == 4 == made.read_text().count("<!-- end -->") - 1


def test_links_lead_to_files() -> None:
    """Those of the README; MkDocs checks those between the pages of docs/."""
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links and all((ROOT / link).exists() for link in links)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs pip install 'sparse24[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.name for page in tmp_path.glob("*.html")}
    assert {"index.html", *(p.with_suffix(".html").name for p in PAGES[1:])} <= pages
    pictures = re.findall(r'<img[^>]*src="([^"]+)"', (tmp_path / "results.html").read_text())
    assert pictures and all((tmp_path / picture).is_file() for picture in pictures)
    index = (tmp_path / "index.html").read_text()
    assert 'href="export.html"' in index and "docs/export" not in index and "<!-- setup" not in index
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)', index), "the page fetches from a network"
