"""to_semi_structured where it cannot run, and which layers it takes. What it computes: tests/gpu/test_export.py."""

import pytest
import torch
from torch import nn

import sparse24
from sparse24.compiler.semi_structured import _linears

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled, sparse_names


def pruned(model: nn.Module) -> nn.Module:
    compiled(model)(torch.randn(2, 4, 64)).sum().backward()
    return sparse24.prune(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the refusal without one is NOT tested")
def test_without_a_gpu_it_says_what_is_needed():
    with pytest.raises(RuntimeError, match=r"found no CUDA GPU, need .* cuSPARSELt; .*sparse24\.prune"):
        sparse24.to_semi_structured(pruned(Stack(MLP())))


def test_layers_that_are_2_4_and_have_a_weight_of_their_own_are_taken():
    model = Stack(MLP(), SwiGLU(), GPT2MLP(), MLP())
    plain = pruned(model)
    assert [f"{name}.weight" for name, _, _ in _linears(plain)] == sparse_names(model)
    assert [name for name, _, transposed in _linears(plain) if transposed] == ["blocks.2.c_fc", "blocks.2.c_proj"]
    with torch.no_grad():
        plain.blocks[0].up.weight[5, :3] = 1.0  # three of four
        plain.blocks[1].down = nn.Linear(120, 64)  # not a multiple of 16
        plain.blocks[3].up.weight = plain.blocks[1].up.weight  # two layers, one weight
    taken = {name for name, _, _ in _linears(plain)}
    gone = {"blocks.0.up", "blocks.1.down", "blocks.1.up", "blocks.3.up"}
    assert taken == {name.removesuffix(".weight") for name in sparse_names(model)} - gone
