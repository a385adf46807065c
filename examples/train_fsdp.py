"""FSDP2 with 2:4 sparse feed-forward layers, on the GPUs of one machine or several; on CPUs where there is none.

    torchrun --nproc_per_node 8 examples/train_fsdp.py --out runs/fsdp --width 4096 --ff 14336 --depth 32 --batch 64
    torchrun --nproc_per_node 2 --max-restarts 3 examples/train_fsdp.py --out runs/fsdp        a tiny model, on CPUs too

It goes on from the last checkpoint in --out, where there is one, on any number of ranks that divides --batch: after
Ctrl-C, and where torchrun starts it again because a rank was lost. Two lines know of sparsity: `block.compile`, and
`sparse24.session`, whose state goes into the checkpoint beside the model's and the optimizer's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse24
from _tiny import VOCABULARY, Bytes
from blocks import Titan


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints, one that all ranks see")
    p.add_argument("--steps", type=int, default=120, help="optimizer steps at which the run ends; the last sixth dense")
    p.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints and checks of ranks")
    p.add_argument("--batch", type=int, default=8, help="sequences of one step, of all ranks together")
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--ff", type=int, default=512, help="width of the feed-forward layers")
    p.add_argument("--depth", type=int, default=2)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--refresh-every", type=int, default=40, help="steps between two searches of the masks")
    p.add_argument("--keep", action="store_true", help="keep what was gathered until the backward")
    p.add_argument("--inner", default="inductor" if gpu else "aot_eager", help="inductor, aot_eager or eager")
    return p.parse_args(argv)


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step = args, 0
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        torch.manual_seed(0)
        with self.device:
            self.model = Titan(vocab=VOCABULARY, width=args.width, depth=args.depth, heads=args.width // 64, ff=args.ff)
        options = {"dense_after": 5 * args.steps // 6, "refresh_every": args.refresh_every, "inner": args.inner}
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if gpu else MixedPrecisionPolicy()
        for block in self.model.layers.values():
            block.compile(backend="sparse24", options=options)
            fully_shard(block, mp_policy=policy, reshard_after_forward=not args.keep)
        fully_shard(self.model, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.session = sparse24.session(self.model)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "session": self.session.state_dict(), "step": self.step}

    def save(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.args.out / f"step-{self.step}")

    def load_last(self) -> None:
        done = [path.parent for path in self.args.out.glob("step-*/.metadata")]  # which is written when all else is
        if not done:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=max(done, key=lambda path: int(path.name.removeprefix("step-"))))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.session.load_state_dict(state["session"])
        self.step = state["step"]

    def train_step(self, tokens: torch.Tensor) -> float:
        """tokens, int64 [sequences of this rank, context]. Returns the mean loss of all ranks."""
        loss = self.model(tokens.to(self.device))[0]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        return float(mean)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains, and returns the losses of the steps of this life. The process group is the caller's."""
    run = Run(parse(argv))
    run.load_last()
    args, data, losses = run.args, Bytes(), []
    rank, each = dist.get_rank(), args.batch // dist.get_world_size()
    while run.step < args.steps:
        picks = torch.randint(len(data), (args.batch,), generator=torch.Generator().manual_seed(run.step))
        mine = [data[int(i)] for i in picks[rank * each : (rank + 1) * each]]
        losses.append(run.train_step(torch.stack(mine)))
        if rank == 0:
            told = {"step": run.step, "loss": losses[-1], "flip_rate": run.session.flip_rate()}
            print(json.dumps(told | {"sparse": run.session.phase == "sparse"}), flush=True)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.session.check_ranks()
            run.save()
    return losses


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()
