"""Pre-train a GPT with 2:4 sparse feed-forward layers, then the same GPT dense, and compare the two.

    python examples/train_gpt.py                 a GPU if there is one, else a small model on the CPU (about 4 minutes)
    python examples/train_gpt.py --steps 100     a short one; --help lists every setting
    python examples/train_gpt.py --resume        go on after Ctrl-C

Nothing in the model or in the loop knows of sparsity. Two lines do, both in `Trainer.__init__`: torch.compile with the
sparse24 backend, and `sparse24.session`, from which the flip rate is read and whose state goes into the checkpoint.
The text is the source of Python's standard library, byte by byte, split by file into a training and a held-out part.
The output folder receives report.md, report.json, curves.svg, and a checkpoint of each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparse24
from _corpus import VOCABULARY, Corpus, standard_library
from _report import write_report
from _settings import comparable, parse, recipe

HEAD_DIM = 64
EVALUATION_BATCHES = 32


# The model: a plain decoder. Every width is a multiple of 64, which is what sparse tensor cores want.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions. x [batch, heads, context, HEAD_DIM]; cos, sin [context, HEAD_DIM / 2], fp32."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = self.qkv(x).view(batch, context, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, context, width))


class FeedForward(nn.Module):
    """SwiGLU. These three weights are what sparse24 makes 2:4 sparse."""

    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ff, bias=False)
        self.up = nn.Linear(width, ff, bias=False)
        self.down = nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(width), FeedForward(width, ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    def __init__(self, *, width: int, depth: int, ff: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, ff) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(context).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: int64 [batch, context] -> mean loss in nats per byte, fp32."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# The training.


@dataclasses.dataclass(slots=True)
class Record:
    """What one run did so far. Plain data: it goes into the checkpoint and into report.json as it is."""

    name: str  # "sparse24" or "dense"
    step: int = 0
    seconds: float = 0.0  # wall time, with compilation and evaluation
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # step, phase, loss, tokens_per_second
    flips: list[list[float]] = dataclasses.field(default_factory=list)  # [step, flip rate] of each refresh
    weights: dict[str, str | None] = dataclasses.field(default_factory=dict)  # name -> reason why dense, None if sparse
    held_out: float | None = None


class Trainer:
    """One model in training, with all that a checkpoint has to hold."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, record: Record) -> None:
        self.args, self.corpus, self.record = args, corpus, record
        torch.manual_seed(args.seed)
        model = GPT(width=args.width, depth=args.depth, ff=args.ff, context=args.context)
        self.model = model.to(args.device)
        self.session: sparse24.Session | None = None
        if record.name == "sparse24":
            self.compiled = torch.compile(self.model, backend="sparse24", options=recipe(args))
            self.session = sparse24.session(self.model)
        else:
            self.compiled = torch.compile(self.model, backend=args.inner)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    @property
    def phase(self) -> str:
        return self.session.phase if self.session else "dense"

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        device = self.args.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self.compiled(tokens, targets)

    def step(self) -> Tensor:
        """One optimizer step; returns its loss without waiting for the GPU."""
        args, step = self.args, self.record.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        loss = self.loss(*self.corpus.batch(step, seed=args.seed, batch=args.batch, context=args.context))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.record.step += 1
        if self.session and self.session.phase == "sparse" and self.session.step % args.refresh_every == 0:
            self.record.flips.append([self.record.step, self.session.flip_rate()])
        return loss.detach()

    def evaluate(self) -> float:
        """Held-out loss. Gradients stay on, though unused: under no_grad a second graph would have to be compiled."""
        args, total = self.args, torch.zeros((), device=self.args.device)
        for tokens, targets in self.corpus.held_out_batches(EVALUATION_BATCHES, batch=args.batch, context=args.context):
            total += self.loss(tokens, targets).detach()
        return total.item() / EVALUATION_BATCHES

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": comparable(self.args),
            "record": dataclasses.asdict(self.record),
            "step": self.record.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state_dict() if self.session else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.session:
            self.session.load_state_dict(state["session"])


class Interrupt:
    """Ctrl-C, or a cluster's SIGTERM, ends the training after the step under way; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(trainer: Trainer, checkpoint: Path, interrupt: Interrupt) -> bool:
    """Trains to the last step and evaluates. False: it was interrupted. The checkpoint holds the state either way."""
    args, record = trainer.args, trainer.record
    began = time.perf_counter() - record.seconds
    bar = tqdm(total=args.steps, initial=record.step, desc=record.name, unit="step")
    while record.step < args.steps and not interrupt.asked:
        first, since, losses = record.step, time.perf_counter(), torch.zeros((), device=args.device)
        # One interval of the log. Nothing in it waits for the GPU.
        while True:
            losses += trainer.step()
            bar.update()
            if record.step % args.log_every == 0 or record.step == args.steps or interrupt.asked:
                break
        steps = record.step - first
        loss = losses.item() / steps
        speed = steps * args.batch * args.context / (time.perf_counter() - since)
        record.log.append({"step": record.step, "phase": trainer.phase, "loss": loss, "tokens_per_second": speed})
        flips = f", flip rate {record.flips[-1][1]:.4f}" if record.flips else ""
        bar.set_postfix_str(f"{trainer.phase}, loss {loss:.4f}{flips}, {speed:,.0f} tokens/s")
        if record.step // args.save_every > first // args.save_every:
            record.seconds = time.perf_counter() - began
            save(checkpoint, trainer.state_dict())
    bar.close()
    if record.step == args.steps:
        record.held_out = trainer.evaluate()
    if trainer.session:
        record.weights = {name: weight.reason_skipped for name, weight in trainer.session.weights.items()}
    record.seconds = time.perf_counter() - began
    save(checkpoint, trainer.state_dict())
    return record.held_out is not None


def save(path: Path, state: dict[str, Any]) -> None:
    """Written beside it and renamed: an interrupted or failed write leaves the checkpoint before it whole."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk by the latter
        temporary.unlink(missing_ok=True)
        kept = f"{path} still holds the one before" if path.exists() else "there is none before it"
        raise SystemExit(f"the checkpoint of step {state['step']} could not be written ({error}); {kept}") from error


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm_up = min(1.0, (step + 1) / max(1, args.warm_up))
    return args.lr * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))


def load(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=args.device, weights_only=True)
    except Exception as error:  # what torch.load raises depends on where the file is damaged
        raise SystemExit(
            f"--resume: {path} cannot be read ({type(error).__name__}: {error}); put a whole one in its place, or "
            "begin anew without --resume, which keeps this file as .old.pt"
        ) from error
    now = comparable(args)
    changed = [f"{name} was {value}, is {now[name]}" for name, value in state["settings"].items() if now[name] != value]
    if changed:
        raise SystemExit(f"--resume: {path} was made with other settings: {'; '.join(changed)}")
    return state


def run(name: str, args: argparse.Namespace, corpus: Corpus, checkpoint: Path) -> Record | None:
    """Trains the model named, from its checkpoint if there is one. None: interrupted."""
    state = load(checkpoint, args) if checkpoint.exists() else None
    record = Record(**state["record"]) if state else Record(name)
    if record.held_out is not None:
        return record
    torch._dynamo.reset()
    trainer = Trainer(args, corpus, record)
    if state:
        trainer.load_state_dict(state)
    with Interrupt() as interrupt:
        if train(trainer, checkpoint, interrupt):
            return record
    print(f"interrupted at step {record.step} of {args.steps}; --resume goes on from {checkpoint}")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    corpus = standard_library(args.device)
    checkpoints = {"sparse24": args.out / "checkpoint.pt", "dense": args.out / "checkpoint_dense.pt"}
    if not args.resume:
        for checkpoint in filter(Path.exists, checkpoints.values()):
            checkpoint.replace(checkpoint.with_suffix(".old.pt"))
    elif not checkpoints["sparse24"].exists():
        raise SystemExit(f"--resume: there is no {checkpoints['sparse24']}")
    if args.no_dense_run:
        del checkpoints["dense"]
    records = {}
    for name, checkpoint in checkpoints.items():
        record = run(name, args, corpus, checkpoint)
        if record is None:
            return 130
        records[name] = record
    print(write_report(args, corpus, [dataclasses.asdict(record) for record in records.values()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
