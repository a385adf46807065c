"""One rank: trains a small model through the backend, once for each scenario, and saves what a test compares.

    torchrun --nproc_per_node N train.py FOLDER SCENARIO,SCENARIO,... [cuda]

Of a scenario FOLDER gets SCENARIO-RANK.pt. One launch for several: importing torch takes longer than they do.
A scenario is how the model is spread over the ranks (in each, blocks are compiled one by one but where said):

    alone         one process, compiled as a whole
    ddp           DistributedDataParallel; ddp_outside: compiled as a whole; ddp_split: as Dynamo does by default
    fsdp          fully_shard; fsdp_kept: nothing resharded after the forward; fsdp_bf16: mixed precision
    hsdp          fully_shard on a mesh of two replicas of two shards
    tp            ColwiseParallel and RowwiseParallel; ddp_tp, fsdp_tp: with two data-parallel ranks beside

and, behind a +, what else: `scenario` reads best.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from torch.nn.parallel import DistributedDataParallel as DDP

import sparse24
from sparse24.compiler import ranks, weights
from sparse24.compiler.errors import RankError
from sparse24.compiler.seeds import draw_seed

DEVICE = sys.argv[3] if len(sys.argv) > 3 else "cpu"  # on a GPU weights are bf16, and Inductor compiles
STEPS, LONG, SAVED, BATCH, D, FF = 10, 100, 5, 8, 256, 512  # D: 64 rows on each of 4 ranks


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.w1, self.w3, self.w2 = (nn.Linear(*size, bias=False) for size in ((D, FF), (D, FF), (FF, D)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, 64)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.w2(silu(self.w1(h)) * self.w3(h))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(x)))


def spread(model: nn.Sequential, how: str, options: dict[str, Any]) -> tuple[nn.Module, int, int]:
    """(the model compiled and spread, this rank's place among those that share a batch, their number)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch._dynamo.config.optimize_ddp = how == "ddp_split"
    if how == "alone":
        return torch.compile(model, backend="sparse24", options=options), 0, 1
    if how in ("ddp_outside", "ddp_split"):
        return torch.compile(DDP(model), backend="sparse24", options=options), rank, world
    mesh = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("dp", "tp"))
    if "tp" in how:
        column, row = ("wq", "wk", "wv", "w1", "w3", "up"), ("wo", "w2", "down")
        for block in model:
            plan = {n: (ColwiseParallel if n in column else RowwiseParallel)() for n in dict(block.named_children())}
            parallelize_module(block, mesh["tp"], {n: style for n, style in plan.items() if n in column + row})
    for block in model:
        block.compile(backend="sparse24", options=options)
    if how == "tp":
        return model, 0, 1
    if how == "ddp_tp":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        for part in (*model, model):
            replicate(part, mesh=mesh["dp"])
        return model, rank // 2, world // 2
    if how.startswith(("fsdp", "hsdp")):
        kind = {"fsdp_tp": mesh["dp"], "hsdp": mesh}.get(how) or init_device_mesh(DEVICE, (world,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if how == "fsdp_bf16" else MixedPrecisionPolicy()
        for part in (*model, model):
            fully_shard(part, mesh=kind, mp_policy=policy, reshard_after_forward=how != "fsdp_kept")
        return (model, rank // 2, world // 2) if how == "fsdp_tp" else (model, rank, world)
    return DDP(model, init_sync=False), rank, world


class Run:
    """options: of the backend. seed: of the model."""

    def __init__(self, how: str, seed: int = 0, **options: Any) -> None:
        torch._dynamo.reset()
        weights._layers = 0  # as in a new process
        torch.manual_seed(seed)
        self.model, self.step = nn.Sequential(Llama(), MLP()), 0
        defaults = {"inner": "aot_eager", "layers": "all", "wgrad": "dense"}
        defaults |= {"refresh_every": 3, "decay": 0.1, "lr_scale": 1.5}
        if DEVICE == "cuda":
            self.model.to("cuda", torch.bfloat16)
            defaults |= {"inner": "inductor", "when": "always"}
        self.run, self.rank, self.ranks = spread(self.model, how, defaults | options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, foreach=False)
        self.session = sparse24.session(self.model)

    def loss(self) -> Tensor:
        x = torch.randn(BATCH, 5, D, generator=torch.Generator().manual_seed(self.step))
        x = x.to(DEVICE, next(self.model.parameters()).dtype)
        mine = x[self.rank * BATCH // self.ranks : (self.rank + 1) * BATCH // self.ranks]
        return (self.run(mine) - mine.roll(1, -1)).square().mean()

    def train(self, steps: int) -> list[float]:
        losses = []
        while self.step < steps:
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            mean = loss.detach().float()
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            losses.append(mean.item())
        return losses

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "session": self.session.state_dict(), "step": self.step}

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.session.load_state_dict(state["session"])
        self.step = state["step"]

    def seen(self) -> dict[str, Any]:
        """What a test compares."""
        sparse = {name: w for name, w in self.session.weights.items() if w.reason_skipped is None}
        return {
            "reasons": {name: w.reason_skipped for name, w in self.session.weights.items()},
            "masks": {name: whole(w.mask()) for name, w in sparse.items()},
            "model": {name: whole(v) for name, v in self.model.state_dict().items()},
            "step": self.session.step,
            "memory": self.session.memory(),
            "seeds": {name: draw_seed(w) for name, w in sparse.items()},
        }


def whole(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
    return found.cpu()


def scenario(what: str, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    how, _, extra = what.partition("+")
    if extra == "weights":
        return error(lambda run: run.session.check_ranks(), Run(how, seed=rank))
    if extra == "options":  # as where nothing was compiled before: compared at once
        ranks._compared = lambda: None
        return error(lambda run: None, Run(how, decay=0.1 + 0.1 * rank))
    if extra == "later_options":  # a second recipe
        return error(lambda run: run.session.check_ranks(), Run(how, decay=0.1 + 0.1 * rank))
    if extra == "mask":

        def flip(run: Run) -> None:
            weight = run.session.weights["1.up.weight"]
            operand = next(iter(weight.operands.values()))
            if rank == 1:
                operand.put_mask(weight, operand.nibbles(weight).flip(0))
            run.session.check_ranks()

        return error(flip, Run(how))
    run = Run(how, wgrad="mvue" if extra == "mvue" else "dense")
    if extra == "zero":  # each rank's optimizer steps a part of the parameters and sends it to the others
        run.optimizer = ZeroRedundancyOptimizer(run.model.parameters(), torch.optim.AdamW, lr=3e-3, foreach=False)
    if extra.startswith("from_"):
        run.load(folder / extra.removeprefix("from_"))
    losses = run.train(SAVED)
    if extra == "resumed":  # a search of the masks may be due, in a forward that has not come
        old, run = run, Run(how)
        for part in ("model", "optimizer", "session"):
            getattr(run, part).load_state_dict(getattr(old, part).state_dict())
        run.step = old.step
    if extra == "saved":
        dcp.save(run.state(), checkpoint_id=folder / how)
    losses += run.train(STEPS)
    run.session.check_ranks()
    found = {"losses": losses, **run.seen()}
    if extra == "long":
        run.train(LONG)
        run.session.check_ranks()
        found["late"] = run.seen()
    return found


def error(act: Any, run: Run) -> dict[str, Any]:
    """What a first forward, and `act` after it, raise."""
    try:
        run.loss()
        act(run)
    except RankError as raised:
        return {"error": str(raised)}
    return {"error": None}


if __name__ == "__main__":
    folder, scenarios = Path(sys.argv[1]), sys.argv[2].split(",")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if scenarios[0] != "alone":
        dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    for what in scenarios:
        found = scenario(what, folder)
        if dist.is_initialized():
            dist.barrier()
        torch.save(found, folder / f"{what}-{dist.get_rank() if dist.is_initialized() else 0}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
