"""Report.html: one page without network access, of what explain found."""

import base64
import json
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
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222}
table{border-collapse:collapse}td,th{padding:2px 8px;text-align:left;border-bottom:1px solid #ddd}
.block{display:inline-block;vertical-align:top;border:1px solid #ccc;border-radius:6px;margin:3px;padding:5px}
.layer{display:block;border-radius:4px;padding:1px 6px;margin:2px 0}
.sparse{background:#bfe5bf}.slower{background:#ffe0a3}.dense{background:#e6e6e6}
.pair{display:flex;gap:8px}.pair>div{flex:1;min-width:0}
pre{height:32em;overflow:auto;border:1px solid #ccc;margin:0;font-size:12px}
pre span{display:block;cursor:pointer;white-space:pre;padding:0 4px}
pre .new{background:#d6f5d6}pre .gone{background:#f7dcdc}pre .on{outline:2px solid #2560c0}pre .off{display:none}
img{image-rendering:pixelated;width:384px;border:1px solid #ccc}
"""

_SCRIPT = """
const nodes = () => document.querySelectorAll("pre span");
document.addEventListener("click", event => {
  const node = event.target.closest("pre span");
  if (!node) return;
  nodes().forEach(other => other.classList.toggle("on", other.dataset.key === node.dataset.key));
  document.querySelectorAll("pre").forEach(pre => {
    const first = pre.querySelector(".on");
    if (first && pre !== node.parentNode) pre.scrollTop = first.offsetTop - pre.offsetTop - 40;
  });
});
document.getElementById("search").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  nodes().forEach(node => node.classList.toggle("off",
    !(node.textContent + node.dataset.key).toLowerCase().includes(wanted)));
});
const masks = JSON.parse(document.getElementById("masks").textContent), pick = document.getElementById("pick");
if (pick) pick.addEventListener("change", () => { document.getElementById("mask").src = masks[pick.value]; });
"""


def page(report: "Report", session: Session | None, history: Sequence[Mapping[str, float]]) -> str:
    """The page's text; arguments as `Report.html` takes them."""
    masks = _masks(session) if session is not None else {}
    parts = [
        "<h1>sparse24</h1>",
        *(f"<p>{escape(line)}</p>" for line in report.summary()),
        "<h2>Model</h2>",
        '<p><span class="sparse">sparse</span> <span class="slower">sparse here, dense is faster on '
        f'{escape(report.gpu)}</span> <span class="dense">dense</span></p>',
        *_blocks(report),
        "<h2>Layers</h2>",
        f"<pre>{escape(report.table())}</pre>",
        "<h2>Graphs</h2>",
        "<p>Left as the model is, right as it is rewritten: red lines are gone, green ones new. A click marks what "
        "comes from the same line of the same module.</p>",
        '<p><input id="search" placeholder="search nodes and modules" size="40"></p>',
        *_graphs(report),
        *_kernels(session),
        *_flips(session, history),
        *_mask_picture(masks),
    ]
    data = json.dumps(masks).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sparse24</title><style>{_STYLE}</style>'
        f'</head><body>{chr(10).join(parts)}<script type="application/json" id="masks">{data}</script>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _blocks(report: "Report") -> Iterator[str]:
    """Parameters by the module two levels up (a block's attention or feed-forward), in the model's order."""
    blocks: dict[str, list[Row]] = {}
    for row in report.rows:
        blocks.setdefault(".".join(row.name.split(".")[:-2]), []).append(row)
    for name, rows in blocks.items():
        yield f'<div class="block"><b>{escape(name or "model")}</b>'
        for row in rows:
            kind = "dense" if not row.sparse else "sparse" if report.gains(row) else "slower"
            leaf, why = ".".join(row.name.split(".")[-2:]), row.reason or ""
            yield (
                f'<span class="layer {kind}" title="{escape(row.name + (": " + why if why else ""))}">{escape(leaf)} '
                f"{' x '.join(map(str, row.shape))} <i>{escape(row.role)}</i></span>"
            )
        yield "</div>"


# --------------------------------------------------------------------------------------------------------------- graphs


def _graphs(report: "Report") -> Iterator[str]:
    for i, (original, sparse) in enumerate(zip(report.graphs["original"], report.graphs["sparse"], strict=True)):
        before, after = stages(original), stages(sparse)
        for stage in _STAGES:
            if stage not in before and stage not in after:
                continue
            old, new = (_nodes(found[stage]) if stage in found else [] for found in (before, after))
            yield f"<details{' open' if stage == 'captured' and i == 0 else ''}><summary>graph {i}, {stage}</summary>"
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


def _mask_picture(masks: Mapping[str, str]) -> Iterator[str]:
    if masks:
        options = "".join(f"<option>{escape(name)}</option>" for name in masks)
        yield f"<h2>Masks</h2><p>the first {_PICTURE} rows and columns, white where a weight is kept: "
        yield f'<select id="pick">{options}</select></p><img id="mask" alt="mask" src="{next(iter(masks.values()))}">'


def _flips(session: Session | None, history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """A curve of the flip rate over the steps, a thin one for each layer; without a history the last rates."""
    points = list(history) or ([session.metrics()] if session is not None else [])
    if not points:
        return
    yield "<h2>Flip rates</h2>"
    if len(points) > 1:
        names = [name for name in points[-1] if name == "flip_rate" or name.startswith("flip_rate/")]
        top = max((p.get(name, 0.0) for p in points for name in names), default=0.0) or 1.0
        first, last = points[0].get("step", 0.0), points[-1].get("step", 0.0)
        yield f"<p>steps {first:.0f} to {last:.0f}, up to {top:.4f}; thick: of the model, thin: of each layer</p>"
        yield '<svg viewBox="0 0 600 200" width="600" style="border:1px solid #ccc">'
        for name in sorted(names, reverse=True):
            at = [
                f"{600 * (p.get('step', 0.0) - first) / max(last - first, 1):.1f},"
                f"{200 - 195 * p.get(name, 0.0) / top:.1f}"
                for p in points
            ]
            color, width = ("#2560c0", 3) if name == "flip_rate" else ("#888", 0.7)
            yield f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{" ".join(at)}">'
            yield f"<title>{escape(name)}</title></polyline>"
        yield "</svg>"
    last_rates = {n.removeprefix("flip_rate/"): v for n, v in points[-1].items() if n.startswith("flip_rate/")}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{rate:.4f}</td></tr>" for name, rate in last_rates.items())
    yield f"<details><summary>of each layer, last</summary><table>{rows}</table></details>"
