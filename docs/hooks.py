"""MkDocs' hook: README.md is the site's first page, pictures of results are in the site, and the comments that tests
read are not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    text = (root / "README.md").read_text(encoding="utf-8")
    for picture in sorted((root / RESULTS).rglob("*.svg")):
        at = picture.relative_to(root / RESULTS).as_posix()
        files.append(File.generated(config, f"results/{at}", abs_src_path=str(picture)))
    files.append(File.generated(config, "index.md", content=re.sub(r"\[docs/(\S+?)\]\(docs/", r"[\1](", text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = markdown.replace(f"](../{RESULTS}", "](results/")
    return re.sub(r"(?m)^<!-- (?:setup|skip|made by|end).*? ?-->\n", "", markdown)
