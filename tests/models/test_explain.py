"""explain on models of the table: every linear has a row, every dense one a reason, and compiling agrees."""

import pytest
import torch
from torch import nn

import sparse24
from sparse24.compiler.explain import NOT_CALLED

from .families import BY_NAME, loss_of
from .test_families import build

#: Projections stored [in, out] and two graphs; three matrices in one; stacks of experts; both sides of a translation
#: model with tied embeddings; opaque attention.
NAMES = ["GPT-2", "Phi-3", "Qwen3-MoE", "T5", "nn.Transformer"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", ["ffn", "all"])
def test_rows_are_complete_and_agree_with_a_compiled_step(name: str, layers: str) -> None:
    torch._dynamo.reset()
    family = BY_NAME[name]
    model, inputs = build(family)
    options = {"inner": "eager", "layers": layers}
    report = sparse24.explain(model, options=options, **inputs)
    rows = {row.name: row for row in report.rows}

    names = {id(p): name for name, p in model.named_parameters()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert linears and all(names[id(m.weight)] in rows for m in linears)
    assert {*family.feed_forward(model), *family.projections(model)} <= rows.keys()
    assert all(row.sparse or row.reason for row in report.rows)

    run = torch.compile(model, backend="sparse24", options=options, fullgraph=family.fullgraph)
    loss_of(run(**inputs)).backward()
    torch.optim.AdamW(model.parameters()).step()
    weights = sparse24.session(model).weights
    assert {n: w.reason_skipped for n, w in weights.items()} == {
        n: row.reason for n, row in rows.items() if row.reason != NOT_CALLED
    }
