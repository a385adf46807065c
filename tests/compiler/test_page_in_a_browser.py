"""Report.html in Chromium, as a reader has it: wide and on a phone, light and dark.

Playwright drives Debian's chromium, or what `playwright install chromium` has fetched, or the file that CHROMIUM names.
"""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse24

from .models import MLP, Stack, SwiGLU, compiled, train

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install 'sparse24[test]' for Playwright")

VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]

# Text that ends outside of the window or of a box that does not scroll, and text that its background swallows: WCAG's
# contrast below 4.5. Text in boxes that scroll is read by scrolling.
UNREADABLE = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = el => {
    for (; el; el = el.parentElement) {
      const color = getComputedStyle(el).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const wrong = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = new Range();
  while (walker.nextNode()) {
    const node = walker.currentNode, el = node.parentElement;
    if (!node.data.trim() || !el.checkVisibility()) continue;
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), text = node.data.trim().slice(0, 60);
    if (!el.closest("pre") && (box.left < 0 || box.right > innerWidth)) wrong.push(`outside: ${text}`);
    for (let up = el; up; up = up.parentElement)
      if (["hidden", "clip"].includes(getComputedStyle(up).overflowX) && up.scrollWidth > up.clientWidth)
        wrong.push(`cut: ${text}`);
    const [a, b] = [light(getComputedStyle(el).color), light(behind(el))].sort((a, b) => b - a);
    if ((a + 0.05) / (b + 0.05) < 4.5) wrong.push(`pale: ${text}`);
  }
  return wrong;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    given = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with playwright.sync_playwright() as p:
        if not given and not Path(p.chromium.executable_path).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install --with-deps chromium")
        # --no-sandbox: as root, in a container, there is none. The page is our own.
        launched = p.chromium.launch(executable_path=given, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model with sparse and dense layers and two blocks, after some steps."""
    model = Stack(SwiGLU(), MLP())
    report = sparse24.explain(model, torch.randn(4, 64), options={"when": "always"})
    run, session, history = compiled(model, refresh_every=1), sparse24.session(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    for seed in range(3):
        train(run, optimizer, 1, seed)
        history.append(copy.copy(session.metrics()))
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.html(path, session, history)
    return path


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def opened(request: pytest.FixtureRequest, browser: Any, written: Path) -> Iterator[Any]:
    """The open page; afterwards nothing may have been asked of a network, logged or thrown."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 700, has_touch=width < 700
    )
    page, trouble = context.new_page(), []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda asked: trouble.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(written.as_uri())
    yield page
    context.close()
    assert not trouble


def test_all_of_it_is_readable(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert opened.evaluate("innerWidth") == opened.viewport_size["width"], "the page is zoomed out"
    assert opened.evaluate(UNREADABLE) == []
    dark = "dark" in opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'")
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 80) == dark


def test_the_search_finds_nodes_and_opens_their_graph(opened: Any) -> None:
    assert opened.locator(".graph[open]").count() == 1
    opened.locator("#search").fill("= WGRAD")
    visible = opened.locator("pre span:visible")
    assert visible.count() == 4, "a weight gradient for gate and up together, and for each other sparse matrix"
    assert all("= wgrad" in text for text in visible.all_text_contents())
    assert opened.locator("#found").text_content().startswith("4 of ")
    assert [s.strip() for s in opened.locator(".graph[open] summary").all_text_contents()] == ["graph 0, backward"]
    opened.locator("#search").fill("")
    assert visible.count() > 4 and not opened.locator("#found").text_content()


def test_the_panel_of_a_layer_opens(opened: Any) -> None:
    layer = opened.locator('.layer[data-name="blocks.0.gate.weight"]')
    assert not layer.locator("table").is_visible() and not layer.locator("img").is_visible()
    layer.locator("summary").click()
    assert layer.locator("table").is_visible()
    assert re.search(r"role\s*gate.*tokens\s*4", layer.inner_text(), re.DOTALL)
    assert layer.locator("img").evaluate("img => [img.naturalWidth, img.naturalHeight]") == [64, 128]
    head = opened.locator('.layer[data-name="head.weight"]')
    head.locator("summary").click()
    assert "not part of a feed-forward layer" in head.inner_text()


def test_a_click_on_a_node_marks_what_comes_from_the_same_line(opened: Any) -> None:
    opened.locator("pre span.new:visible", has_text="= sparse_linear").first.click()
    marked = opened.locator("pre span.on").evaluate_all(
        "nodes => nodes.map(node => [node.dataset.key, node.className])"
    )
    assert len({key for key, _ in marked}) == 1
    assert any("gone" in names for _, names in marked) and any("new" in names for _, names in marked)
    seen = opened.locator(".graph[open] .pair > div:first-child span.on").first.evaluate(
        "node => { const a = node.getBoundingClientRect(), b = node.parentNode.getBoundingClientRect(); "
        "return a.bottom > b.top && a.top < b.bottom }"
    )
    assert seen, "the other side has not scrolled to it"


def test_the_script_parses(written: Path, tmp_path: Path) -> None:
    """Without a browser too: Playwright brings Node along."""
    from playwright._impl._driver import compute_driver_executable

    script = tmp_path / "script.js"
    script.write_text(re.findall(r"<script>(.*)</script>", written.read_text(), re.DOTALL)[-1])
    node = compute_driver_executable()[0]
    done = subprocess.run([node, "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
