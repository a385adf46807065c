"""Report.html: one page without network access, of what explain found."""

import base64
import logging
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from ..passes.graph import copy_of
from .session import Session

if TYPE_CHECKING:
    from .report import Report, Row

log = logging.getLogger("sparse24")

_PICTURE = 128  # rows and columns of a mask that are shown
_STAGES = ("captured", "forward", "backward")

_STYLE = """
:root{color-scheme:light dark;--text:#222;--page:#fff;--line:#ccc;--sparse:#bfe5bf;--slower:#ffe0a3;--dense:#e6e6e6;
--new:#d6f5d6;--gone:#f7dcdc;--on:#2560c0}
@media(prefers-color-scheme:dark){:root{--text:#ddd;--page:#161618;--line:#555;--sparse:#1f4d27;--slower:#5c4510;
--dense:#3a3a3c;--new:#1a3a20;--gone:#4a2222;--on:#7aa7ff}}
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:var(--text);background:var(--page);overflow-wrap:anywhere}
table{border-collapse:collapse}td,th{padding:2px 8px 2px 0;text-align:left;vertical-align:top}
th{font-weight:normal;overflow-wrap:normal}
.key span{padding:1px 6px;border-radius:4px}
.blocks{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20em),1fr));gap:6px;align-items:start}
.block{border:1px solid var(--line);border-radius:6px;padding:5px;min-width:0}
.layer{border-radius:4px;padding:1px 6px;margin:2px 0}
summary{cursor:pointer}
.sparse{background:var(--sparse)}.slower{background:var(--slower)}.dense{background:var(--dense)}
.pair{display:flex;gap:8px}.pair>div{flex:1;min-width:0}
pre{max-height:32em;overflow:auto;border:1px solid var(--line);margin:0;font-size:12px}
pre span{display:block;cursor:pointer;white-space:pre-wrap;padding:0 4px 0 2em;text-indent:-1.5em}
pre .new{background:var(--new)}pre .gone{background:var(--gone)}pre .on{outline:2px solid var(--on);outline-offset:-2px}
pre .off{display:none}
img{image-rendering:pixelated;width:256px;max-width:100%;border:1px solid var(--line)}
input{font:inherit;width:24em;max-width:100%;box-sizing:border-box}
svg{width:600px;max-width:100%;border:1px solid var(--line)}
polyline{fill:none;stroke:var(--text);stroke-width:.7;opacity:.6}polyline.all{stroke:var(--on);stroke-width:3;opacity:1}
@media(max-width:700px){body{margin:.8em}.pair{flex-direction:column}pre{max-height:20em}input{font-size:16px}}
"""

_SCRIPT = """
const nodes = [...document.querySelectorAll("pre span")], found = document.getElementById("found");
document.addEventListener("click", event => {
  const node = event.target.closest("pre span");
  if (!node) return;
  nodes.forEach(other => other.classList.toggle("on", other.dataset.key === node.dataset.key));
  document.querySelectorAll("pre").forEach(pre => {
    const first = pre.querySelector(".on");
    if (first && pre !== node.parentNode) pre.scrollTop = first.offsetTop - pre.offsetTop - 40;
  });
});
document.getElementById("search").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  nodes.forEach(node => node.classList.toggle("off",
    !(node.textContent + node.dataset.key).toLowerCase().includes(wanted)));
  found.value = wanted && `${nodes.filter(node => !node.classList.contains("off")).length} of ${nodes.length} nodes`;
  if (wanted) document.querySelectorAll(".graph").forEach(graph => {
    graph.open = graph.querySelector("span:not(.off)") !== null;
  });
});
"""


def page(report: "Report", session: Session | None, history: Sequence[Mapping[str, float]]) -> str:
    """The page's text; arguments as `Report.html` takes them."""
    points = list(history) or ([session.metrics()] if session is not None else [])
    parts = [
        "<h1>sparse24</h1>",
        *(f"<p>{escape(line)}</p>" for line in report.summary()),
        "<h2>Model</h2>",
        '<p class="key"><span class="sparse">sparse</span> <span class="slower">sparse here, dense is faster on '
        f'{escape(report.gpu)}</span> <span class="dense">dense</span></p><p>A click on a layer shows what is known of '
        "it.</p>",
        '<div class="blocks">',
        *_blocks(report, _masks(session) if session is not None else {}, points[-1] if points else {}),
        "</div>",
        "<h2>Layers</h2>",
        f"<pre>{escape(report.table().split(chr(10) * 2)[0])}</pre>",
        "<h2>Graphs</h2>",
        "<p>First as the model is, then as it is rewritten: red lines are gone, green ones new. A click marks what "
        "comes from the same line of the same module.</p>",
        '<p><input id="search" type="search" placeholder="search nodes and modules" '
        'aria-label="search nodes and modules"> <output id="found"></output></p>',
        *_graphs(report),
        *_kernels(session),
        *_curves(points),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>sparse24</title><style>{_STYLE}</style></head>'
        f"<body>{chr(10).join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _blocks(report: "Report", masks: Mapping[str, str], last: Mapping[str, float]) -> Iterator[str]:
    """Parameters by the module two levels up (a block's attention or feed-forward), in the model's order."""
    blocks: dict[str, list[Row]] = {}
    for row in report.rows:
        blocks.setdefault(".".join(row.name.split(".")[:-2]), []).append(row)
    for name, rows in blocks.items():
        yield f'<div class="block"><b>{escape(name or "model")}</b>'
        for row in rows:
            kind = "dense" if not row.sparse else "sparse" if report.gains(row) else "slower"
            leaf = ".".join(row.name.split(".")[-2:])
            yield (
                f'<details class="layer {kind}" data-name="{escape(row.name)}"><summary>{escape(leaf)} '
                f"{' x '.join(map(str, row.shape))} <i>{escape(row.role)}</i></summary>"
                f"{_panel(report, row, masks.get(row.name), last.get(f'flip_rate/{row.name}'))}</details>"
            )
        yield "</div>"


def _panel(report: "Report", row: "Row", mask: str | None, flip_rate: float | None) -> str:
    """What is known of one layer; the mask as a picture."""
    shown = {**report.described(row), "flip rate": "" if flip_rate is None else f"{flip_rate:.4f}"}
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in shown.items() if text)
    table = f"<table>{lines}</table>"
    if mask is None:
        return table
    caption = f"the mask's first {_PICTURE} rows and columns, white where a weight is kept"
    return f'{table}<p>{caption}:</p><img alt="mask" src="{mask}">'


# --------------------------------------------------------------------------------------------------------------- graphs


def _graphs(report: "Report") -> Iterator[str]:
    for i, (original, sparse) in enumerate(zip(report.graphs["original"], report.graphs["sparse"], strict=True)):
        before, after = stages(original), stages(sparse)
        for stage in _STAGES:
            if stage not in before and stage not in after:
                continue
            old, new = (_nodes(found[stage]) if stage in found else [] for found in (before, after))
            opened = " open" if stage == "captured" and i == 0 else ""
            yield f'<details class="graph"{opened}><summary>graph {i}, {stage}</summary>'
            yield '<div class="pair">'
            yield f"<div><pre>{_lines(old, new, 'gone')}</pre></div>"
            yield f"<div><pre>{_lines(new, old, 'new')}</pre></div></div></details>"


def stages(gm: GraphModule) -> dict[str, GraphModule]:
    """A captured graph, and the forward and backward graphs that AOTAutograd makes of it, without data.

    One that it cannot trace has no forward and backward here.
    """
    found = {"captured": gm}

    def keep(stage: str) -> Any:
        def compiler(graph: GraphModule, _: Sequence[Any]) -> GraphModule:
            found[stage] = graph
            return graph

        return compiler

    try:
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True), FakeTensorMode() as fake:
            on_cpu = _on_cpu(gm)
            inputs = [_input(n.meta["example_value"], fake) for n in on_cpu.graph.find_nodes(op="placeholder")]
            aot_module_simplified(on_cpu, inputs, fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    except Exception as error:
        log.warning("sparse24: a graph could not be differentiated, the page shows it as captured: %s", error)
        return {"captured": gm}
    return found


def _on_cpu(gm: GraphModule) -> GraphModule:
    """A copy for the CPU: some of PyTorch's ops have no derivative on "meta"."""
    copied = copy_of(gm)
    meta, cpu = torch.device("meta"), torch.device("cpu")
    for module in copied.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = tree_map(lambda x: cpu if x in (meta, "meta") else x, (node.args, node.kwargs))
            module.recompile()
    return copied


def _input(example: Any, fake: FakeTensorMode) -> Any:
    if not isinstance(example, Tensor):
        return example
    with fake:
        t = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype)
    return t.requires_grad_(example.requires_grad)


class _Line(NamedTuple):
    """What is shown of a node, what it calls, and its key: module and line of the user's code."""

    text: str
    target: str
    key: str


def _nodes(gm: GraphModule) -> list[_Line]:
    """Of each node, checkpoint bodies included."""
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    return [_line(node) for module in modules for node in module.graph.nodes]


def _line(node: Node) -> _Line:
    target = node.op if node.op in ("placeholder", "output") else getattr(node.target, "__name__", str(node.target))
    arguments = ", ".join(map(str, node.args)) if node.op != "placeholder" else ""
    value = node.meta.get("val", node.meta.get("example_value"))
    shape = f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
    return _Line(f"{node.name} = {target}({arguments}){shape}", target, _key(node))


def _key(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    module = [str(path) for path, *_ in stack.values()][-1:]
    code = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in code if line and not set(line) <= set("^~ ")]
    return f"{module[0] if module else ''}: {code[-1]}" if code else node.name


def _lines(nodes: Sequence[_Line], others: Sequence[_Line], kind: str) -> str:
    there = {(other.target, other.key) for other in others}
    lines = []
    for node in nodes:
        cls = "" if (node.target, node.key) in there else f' class="{kind}"'
        lines.append(f'<span data-key="{escape(node.key)}"{cls}>{escape(node.text)}</span>')
    return "".join(lines)


def _kernels(session: Session | None) -> Iterator[str]:
    """What Inductor wrote in this process and calls the sparse ops of: the kernels around them."""
    if session is None:
        return
    from torch._inductor.codecache import PyCodeCache

    files = dict.fromkeys(str(module.__file__) for module in PyCodeCache.modules)
    sources = [Path(file).read_text() for file in files if Path(file).exists()]
    sources = [source for source in sources if "ops.sparse24." in source]
    if sources:
        yield "<h2>Generated code</h2><p>of all graphs with sparse layers that Inductor compiled in this process</p>"
    for i, source in enumerate(sources):
        yield f"<details><summary>code {i}</summary><pre>{escape(source)}</pre></details>"


# ---------------------------------------------------------------------------------------------------- masks, flip rates


def _masks(session: Session) -> dict[str, str]:
    """{name: a picture} of the upper left corner of each mask in force."""
    return {name: png(w.mask()[:_PICTURE, :_PICTURE]) for name, w in session.weights.items() if w.operands}


def png(mask: Tensor) -> str:
    """A data URI of a bool [rows, cols] mask, white where True. 8 bits, grey."""
    rows, cols = mask.shape
    pixels = (mask.cpu().to(torch.uint8) * 255).tolist()
    raw = b"".join(b"\0" + bytes(row) for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", cols, rows, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


def _curves(points: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """The flip rate over the steps, a thin curve for each layer."""
    if len(points) < 2:
        return
    names = [name for name in points[-1] if name == "flip_rate" or name.startswith("flip_rate/")]
    top = max((p.get(name, 0.0) for p in points for name in names), default=0.0) or 1.0
    first, last = points[0].get("step", 0.0), points[-1].get("step", 0.0)
    yield "<h2>Flip rates</h2>"
    yield f"<p>steps {first:.0f} to {last:.0f}, up to {top:.4f}; thick: of the model, thin: of each layer</p>"
    yield '<svg viewBox="0 0 600 200">'
    for name in sorted(names, reverse=True):
        at = [
            f"{600 * (p.get('step', 0.0) - first) / max(last - first, 1):.1f},{200 - 195 * p.get(name, 0.0) / top:.1f}"
            for p in points
        ]
        cls = ' class="all"' if name == "flip_rate" else ""
        yield f'<polyline{cls} points="{" ".join(at)}"><title>{escape(name)}</title></polyline>'
    yield "</svg>"
