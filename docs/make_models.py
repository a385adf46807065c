"""Write docs/models.md: what sparse24 finds in each family of tests/models/families.py, counted by compiling it.

    python docs/make_models.py [--out FILE] [--families NAME ...]

Needs transformers and timm; downloads nothing. About two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections import Counter
from pathlib import Path

import torch

import sparse24

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "models"), str(ROOT / "examples")]

from families import FAMILIES, Family, loss_of  # noqa: E402

HEAD = """# Models

What is found in models as their libraries define them, tiny and with random weights. *Feed-forward*: linears that are
sparse by default / that the model has. *With attention*: the same under `layers="all"`, attention projections included.
*One graph*: whether the model compiles under `fullgraph=True`; those that do not, do not with `backend="eager"` either.
*Left dense*: all other linears under `layers="all"`, with the reason that `session.weights[name].reason_skipped` gives.

Made by `python docs/make_models.py` ({versions}).
`tests/models` checks each row, and that the rewritten model has the loss and the gradients of the eager model with
masked weights. Of GPT-2 the loss alone is no part of one graph: it logs a warning.

| model | class | feed-forward | with attention | one graph | left dense |
|---|---|---|---|---|---|
"""


def reasons(family: Family, layers: str) -> tuple[dict[str, str | None], list[str], list[str]]:
    """({weight: why it is dense, None if sparse}, feed-forward weights there are, attention projections there are)."""
    torch._dynamo.reset()
    model, inputs = family.build()
    options = {"inner": "eager", "layers": layers}
    run = torch.compile(model, backend="sparse24", options=options, fullgraph=family.fullgraph)
    loss_of(run(**inputs)).backward()
    found = {name: weight.reason_skipped for name, weight in sparse24.session(model).weights.items()}
    return found, family.feed_forward(model), family.projections(model)


def row(family: Family) -> str:
    ffn, there, _ = reasons(family, "ffn")
    both, _, projections = reasons(family, "all")
    left = Counter(reason for reason in both.values() if reason)
    sparse = sum(reason is None for reason in ffn.values())
    with_attention = sum(reason is None for reason in both.values())
    cells = [
        family.name,
        f"`{family.cls}`" + ("" if family.library in ("torch", "examples") else f" ({family.library})"),
        f"{sparse} / {len(there)}",
        f"{with_attention} / {len(there) + len(projections)}",
        "yes" if family.fullgraph else "no",
        "; ".join(f"{count}: {reason}" for reason, count in left.items()),
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    p.add_argument("--families", nargs="+", default=[family.name for family in FAMILIES])
    args = p.parse_args()
    logging.getLogger("sparse24").setLevel(logging.ERROR)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "timm"))
    rows = [row(family) for family in FAMILIES if family.name in args.families]
    args.out.write_text(HEAD.format(versions=versions) + "".join(rows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
