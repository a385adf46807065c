"""Linears on DTensors, read in one process that plays a rank of two: nothing is sent."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx import GraphModule

from sparse24.passes import graph as g
from sparse24.passes.find import Linear, find_linears
from sparse24.passes.graph import copy_of
from sparse24.passes.parallel import from_local, is_dtensor, to_local
from sparse24.passes.tidy import tidy


class SwiGLU(nn.Module):
    def __init__(self, ff: int = 256, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(128, ff, bias=bias), nn.Linear(128, ff, bias=bias)
        self.down = nn.Linear(ff, 128, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()
    torch._dynamo.reset()


def plan(**row: Any) -> dict[str, Any]:
    return {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel(), **row}


def read(model: nn.Module, *inputs: Any) -> tuple[GraphModule, list[Linear]]:
    """(the tidied graph, its linears)."""
    found: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        found.append(tidy(copy_of(gm)))
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*inputs)
    (gm,) = found
    return gm, find_linears(gm)


def count(gm: GraphModule) -> Counter[Any]:
    return Counter(node.target for node in gm.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("bias", [False, True])
def test_each_rank_multiplies_what_it_holds(mesh: DeviceMesh, bias: bool) -> None:
    model = parallelize_module(SwiGLU(bias=bias), mesh, plan())
    gm, linears = read(model, torch.randn(2, 4, 128))
    assert [(x.role, x.name, x.out_features, x.in_features, x.reason) for x in linears] == [
        ("gate", "gate.weight", 128, 128, None),
        ("up", "up.weight", 128, 128, None),
        ("down", "down.weight", 128, 128, None),
    ]
    nodes = [n for n in gm.graph.nodes if g.linear_args(n) is not None]
    assert len(nodes) == 3 and not any(is_dtensor(g.value(a)) for n in nodes for a in n.args if hasattr(a, "op"))
    # of what is wrapped only the sum of the output stays: gate and up read one x, down what the activation gives
    assert linears[0].x == linears[1].x and count(gm)[from_local] == 1
    assert count(gm)[to_local] == 1 + 3 + 3 * bias


def test_the_localized_graph_computes_the_same(mesh: DeviceMesh) -> None:
    """On this rank; a fake group sums nothing, in either."""
    model, x = parallelize_module(SwiGLU(bias=True), mesh, plan()), torch.randn(2, 4, 128)
    results = []
    for change in (lambda gm: gm, lambda gm: tidy(copy_of(gm))):
        torch._dynamo.reset()
        model.zero_grad()
        out = torch.compile(model, backend=lambda gm, _, change=change: change(gm))(x)
        out.square().mean().backward()
        results.append([out, *(p.grad._local_tensor for p in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_stays_dense_says_why(mesh: DeviceMesh) -> None:
    x = torch.randn(2, 4, 128)
    _, linears = read(parallelize_module(SwiGLU(ff=192), mesh, plan()), x)
    assert [linear.reason for linear in linears] == [
        "it has out_features=96, need a multiple of 64 on each rank",
        "it has out_features=96, need a multiple of 64 on each rank",
        "it has in_features=96, need a multiple of 64 on each rank",
    ]
    replicated = parallelize_module(SwiGLU(), mesh, {})
    for name, param in list(replicated.named_parameters()):
        placed = DTensor.from_local(param.detach(), mesh, [Replicate()], run_check=False)
        replicated.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(placed)
    _, linears = read(replicated, DTensor.from_local(x, mesh, [Shard(0)], run_check=False))
    assert all("need them as ColwiseParallel or RowwiseParallel place them" in (x.reason or "") for x in linears)
    assert len(linears) == 3


def test_outputs_that_stay_dtensors_are_followed(mesh: DeviceMesh) -> None:
    """use_local_output=False: the activation works on DTensors; roles are found all the same."""
    wrapped = {name: ColwiseParallel(use_local_output=False) for name in ("gate", "up")}
    _, linears = read(parallelize_module(SwiGLU(), mesh, plan(**wrapped)), torch.randn(2, 4, 128))
    assert [(x.role, x.reason) for x in linears] == [("gate", None), ("up", None), ("down", None)]
