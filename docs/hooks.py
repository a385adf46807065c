"""MkDocs' hook: README.md is the site's first page, and the comments that tests read are no part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    text = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\[docs/(\S+?)\]\(docs/", r"[\1](", text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"(?m)^<!-- (?:setup|skip|made by|end).*? ?-->\n", "", markdown)
