"""Report.html: one page that holds what it promises, and needs nothing but itself."""

import base64
import html
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparse24

from .models import MLP, Stack, SwiGLU, compiled, train

VOID = {"meta", "input", "img"}


class Page(HTMLParser):
    """Its text, its nodes as (text, key, class) by panel, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.panels: list[list[tuple[str, str, str]]] = []
        self.classes: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self._node: dict[str, Any] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "pre":
            self.panels.append([])
        self._node = {"text": "", **given} if "data-key" in given else None
        if "data-name" in given:
            self.classes[str(given["data-name"])] = str(given["class"]).split()[1]

    def handle_data(self, data: str) -> None:
        if self._node is not None:
            self._node["text"] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "span" and self._node is not None:
            node = self._node
            self.panels[-1].append((node["text"], node["data-key"], node.get("class") or ""))
        self._node = None


def written(path: Path, report: sparse24.Report, *args: Any) -> tuple[Page, str]:
    report.html(path, *args)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    text = path.read_text()
    return Page(text), text


def test_a_layer_s_panel_says_what_the_table_says(tmp_path: Path) -> None:
    report = sparse24.explain(Stack(SwiGLU()), torch.randn(4, 64))
    _, text = written(tmp_path / "page.html", report)
    panels = dict(re.findall(r'data-name="([^"]*)".*?<table>(.*?)</table>', text, re.DOTALL))
    assert list(panels) == [row.name for row in report.rows]
    for row in report.rows:
        said = dict(re.findall(r"<th>(.*?)</th><td>(.*?)</td>", panels[row.name]))
        assert said["parameter"] == row.name and said["out x in"] == " x ".join(map(str, row.shape))
        assert said["tokens"] == "4" and said["in"] == "float32" and "flip rate" not in said
        assert row.reason is None or said["note"] == html.escape(row.reason)
        line = next(line for line in report.table().splitlines() if line.startswith(row.name))
        assert all(html.unescape(said[name]) in line for name in ("by", "forward ms", "dense MB", "sum ms"))
    assert "<th>in one product with</th><td>blocks.0.up.weight</td>" in panels["blocks.0.gate.weight"]


def test_the_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    blocks = nn.ModuleDict({"<b>&": MLP()})

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = blocks, nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks["<b>&"](x))

    path = tmp_path / "page.html"
    path.write_text("an older one")
    report = sparse24.explain(Odd(), torch.randn(4, 64), options={"when": "always"})
    page, text = written(path, report)
    assert page.classes == {
        "blocks.<b>&.up.weight": "sparse",
        "blocks.<b>&.down.weight": "sparse",
        "head.weight": "dense",
    }
    assert not any(name in ("src", "href") for name, _ in page.attributes) and "@import" not in text
    assert not re.search(r"https?://|url\(", text)


def test_graphs_stand_side_by_side_and_what_belongs_together_is_linked(tmp_path: Path) -> None:
    report = sparse24.explain(Stack(SwiGLU(), MLP()), torch.randn(4, 64))
    page, _ = written(tmp_path / "page.html", report)
    panels = [panel for panel in page.panels if panel]
    assert len(panels) == 6  # captured, forward and backward, before and after
    for before, after, op in zip(panels[::2], panels[1::2], ("sparse_linear", "spmm", "wgrad"), strict=True):
        new = [(text, key) for text, key, cls in after if cls == "new" and f"= {op}" in text]
        assert new and not any(f"= {op}" in text for text, _, _ in before)
        for _, key in new:
            assert any(k == key for _, k, _ in before), key
        assert any(cls == "gone" for _, _, cls in before) and any(not cls for _, _, cls in after)
    backward = [text for text, _, _ in panels[5]]
    assert any("glu_backward_pack" in text for text in backward) and any("pack_gradient" in text for text in backward)


def test_bodies_of_activation_checkpoints_are_shown(tmp_path: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    page, _ = written(tmp_path / "page.html", sparse24.explain(Checkpointed(), torch.randn(4, 64, requires_grad=True)))
    panels = [panel for panel in page.panels if panel]
    assert len(panels) == 6 and any("= sparse_linear" in text for text, _, _ in panels[1])


def test_of_a_session_it_shows_masks_and_flip_rates(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model = Stack(SwiGLU())
    report = sparse24.explain(model, torch.randn(4, 64))
    run, session, history = compiled(model, refresh_every=1), sparse24.session(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    for seed in range(4):
        train(run, optimizer, 1, seed)
        history.append(session.metrics())
    _, text = written(tmp_path / "page.html", report, session, history)
    masks = dict(re.findall(r'data-name="([^"]*)"(?:(?!</details>).)*<img alt="mask" src="([^"]*)"', text, re.DOTALL))
    assert set(masks) == {f"blocks.0.{name}.weight" for name in ("gate", "up", "down")}
    for name, uri in masks.items():
        picture = image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        white = torch.tensor(list(picture.tobytes())).view(picture.height, picture.width) == 255
        assert torch.equal(white, session.weights[name].mask()[:128, :128])
    curves = re.findall(r'points="([^"]*)"', text)
    assert len(curves) == 4 and all(len(curve.split()) == 4 for curve in curves)
    assert f"{history[-1]['flip_rate/blocks.0.up.weight']:.4f}" in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_of_a_session_it_shows_the_code_that_inductor_wrote(tmp_path: Path) -> None:
    model, x = MLP(), torch.randn(4, 64)
    report = sparse24.explain(model, x)
    torch.compile(model, backend="sparse24")(x).sum().backward()
    _, text = written(tmp_path / "page.html", report, sparse24.session(model))
    assert "Generated code" in text and "torch.ops.sparse24.spmm.default(" in text
