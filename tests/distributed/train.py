"""One data-parallel rank: trains a small model through the backend and saves what a test compares.

    torchrun --nproc_per_node N train.py FOLDER WHAT

WHAT: "ddp" (each block compiled, then DDP), "ddp_outside" (DDP, then compiled), "ddp_split" (the same, as Dynamo splits
it by default), "fsdp" (fully_shard, each block compiled), "fsdp_kept" (the same, nothing resharded after the forward),
"fsdp_resumed" (begun again from its state after six steps), "mvue" (DDP); and with DDP what is wrong: "weights" (rank 1
starts from others), "mask" (rank 1 has other masks), "options" (rank 1 has another decay).
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import sparse24

STEPS, GLOBAL_BATCH, D = 10, 8, 256  # 64 rows on each of 4 ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def distribute(model: nn.Sequential, what: str, options: dict[str, Any]) -> nn.Module:
    """The model, compiled and spread over the ranks in the way that `what` names."""
    if what == "alone":
        return torch.compile(model, backend="sparse24", options=options)
    if what in ("ddp_outside", "ddp_split"):
        return torch.compile(DDP(model), backend="sparse24", options=options)
    for block in model:
        block.compile(backend="sparse24", options=options)
    if not what.startswith("fsdp"):
        return DDP(model, init_sync=what != "weights")
    for part in (*model, model):
        fully_shard(part, reshard_after_forward=what != "fsdp_kept")
    return model


def train(folder: Path, what: str) -> None:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(1 if (what, rank) == ("weights", 1) else 0)
    options = {"inner": "aot_eager", "refresh_every": 3, "wgrad": "mvue" if what == "mvue" else "dense", "decay": 0.1}
    if (what, rank) == ("options", 1):
        options["decay"] = 0.2
    torch._dynamo.config.optimize_ddp = what == "ddp_split"
    model = nn.Sequential(Block(), Block())
    run = distribute(model, what, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    session = sparse24.session(model)
    losses = []
    mine = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
    for step in range(STEPS):
        x = torch.randn(GLOBAL_BATCH, 5, D, generator=torch.Generator().manual_seed(step))
        loss = (run(x[mine]) - x[mine].roll(1, -1)).square().mean()
        if step == 0:
            session.check_ranks()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
        if (what, rank, step) == ("mask", 1, 5):
            weight = next(w for name, w in session.weights.items() if name.endswith("0.up.weight"))
            operand = next(iter(weight.operands.values()))
            operand.put_mask(weight, operand.nibbles(weight).flip(0))
        if step in (5, STEPS - 1):
            session.check_ranks()
        if (what, step) == ("fsdp_resumed", 5):  # a search of the masks is due, in a forward that has not come
            saved = model.state_dict(), optimizer.state_dict(), session.state_dict()
            torch._dynamo.reset()
            model = nn.Sequential(Block(), Block())
            run = distribute(model, what, options)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            session = sparse24.session(model)
            for part, state in zip((model, optimizer, session), saved, strict=True):
                part.load_state_dict(state)
    masks = {name: w.mask() for name, w in session.weights.items() if w.reason_skipped is None}
    state = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}
    torch.save({"losses": losses, "masks": masks, "model": state, "step": session.step}, folder / f"{rank}.pt")


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what != "alone":
        dist.init_process_group("gloo")
    train(folder, what)
    if what != "alone":
        dist.destroy_process_group()
