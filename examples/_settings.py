"""The settings of train_gpt.py: the command line, and what follows from it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Help(argparse.HelpFormatter):
    """Adds the default to each help text, unless it has none or the text tells it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        return action.help if told else f"{action.help} (default: %(default)s)"


# What --help promises where the default depends on the device: name -> (on a GPU, on a CPU).
SIZES = {
    "width": (768, 192),
    "depth": (12, 3),
    "ff": (2048, 512),
    "context": (1024, 256),
    "batch": (16, 8),
    "steps": (1500, 300),
    "lr": (1e-3, 2e-3),
}


def parser() -> argparse.ArgumentParser:
    about = "Pre-train a GPT with 2:4 sparse feed-forward layers, then the same GPT dense, and compare the two."
    p = argparse.ArgumentParser(description=about, formatter_class=Help)

    def sized(name: str, text: str) -> None:
        gpu, cpu = SIZES[name]
        text += f" (default: {gpu} on a GPU, {cpu} on a CPU)"
        p.add_argument(f"--{name}", type=type(gpu), metavar="N", help=text)

    sized("steps", "optimizer steps of each run")
    sized("lr", "peak learning rate of AdamW")
    p.add_argument("--warm-up", type=int, metavar="N", help="steps of linear warm-up (default: a fifteenth of --steps)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and gradient pruning")
    p.add_argument("--device", type=torch.device, metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if present)")

    sized("width", "model width, a multiple of 64")
    sized("depth", "number of blocks")
    sized("ff", "width of the feed-forward layers, a multiple of 64")
    sized("context", "bytes of one sequence")
    sized("batch", "sequences of one step")

    p.add_argument(
        "--decay", type=float, default=2e-4, metavar="X", help="decay of the pruned weights, on the gradients"
    )
    p.add_argument(
        "--lr-scale",
        type=float,
        default=2.0,
        metavar="X",
        help="learning rate of sparse weights over that of the others",
    )
    p.add_argument("--refresh-every", type=int, default=40, metavar="N", help="steps between two searches of the masks")
    p.add_argument(
        "--dense-steps", type=int, metavar="N", help="last steps, trained dense (default: a sixth of --steps)"
    )
    p.add_argument(
        "--wgrad",
        choices=["mvue", "dense", "mixed"],
        default="mvue",
        help="weight gradients by output gradients pruned to 2:4 without bias, by all of them, or pruned in up alone",
    )
    p.add_argument("--layers", default="ffn", metavar="WHICH", help="ffn, all, or patterns of names: *.up.*,*.down.*")
    p.add_argument(
        "--when",
        choices=["faster", "always"],
        default="always",
        help="always: every feed-forward layer is sparse, as the comparison wants it; faster: only where that is "
        "faster on this GPU, which small layers are not",
    )
    p.add_argument(
        "--inner",
        choices=["auto", "inductor", "aot_eager", "eager"],
        default="auto",
        help="what compiles the rewritten graph, and the dense run; auto: inductor where it can work",
    )

    p.add_argument("--out", type=Path, default=Path("runs/train_gpt"), metavar="FOLDER", help="output folder")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    p.add_argument("--no-dense-run", action="store_true", help="leave out the dense run to compare with")
    p.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between two points of the loss curve")
    p.add_argument("--save-every", type=int, default=250, metavar="N", help="steps between two checkpoints")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings, with every default that depends on something filled in."""
    p = parser()
    args = p.parse_args(argv)
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (gpu, cpu) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if args.device.type == "cuda" else cpu)
    if args.warm_up is None:
        args.warm_up = args.steps // 15
    if args.dense_steps is None:
        args.dense_steps = args.steps // 6
    if args.inner == "auto":
        args.inner = "inductor" if args.device.type == "cuda" or can_compile_cpp() else "aot_eager"
    for name in ("width", "ff"):
        if getattr(args, name) % 64:
            p.error(f"--{name} is {getattr(args, name)}, need a multiple of 64")
    return args


def can_compile_cpp() -> bool:
    """Inductor writes C++ for the CPU: it needs a compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def comparable(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that change a result: a checkpoint goes on under the same ones only."""
    free = ("out", "resume", "no_dense_run", "log_every", "save_every")
    return {name: value for name, value in vars(args).items() if name not in free} | {"device": args.device.type}


def dense_after(args: argparse.Namespace) -> int | None:
    return args.steps - args.dense_steps if args.dense_steps else None


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the backend: fields of sparse24.Recipe."""
    return {
        "decay": args.decay,
        "lr_scale": args.lr_scale,
        "refresh_every": args.refresh_every,
        "dense_after": dense_after(args),
        "wgrad": args.wgrad,
        "layers": args.layers if args.layers in ("ffn", "all") else args.layers.split(","),
        "when": args.when,
        "seed": args.seed,
        "inner": args.inner,
    }
