"""Training of one arm: a step, the options in force, evaluation and what a checkpoint holds."""

import argparse
import contextlib
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from arms import Arm
from corpora import HELD_OUT_SEED
from families import Family
from torch import nn

import sparse24
from sparse24.compiler import weights
from sparse24.compiler.operands import check_stats, pack
from sparse24.compiler.recipe import Recipe
from sparse24.kernels import layout
from sparse24.kernels.reference import best_mask


@dataclass(slots=True)
class Record:
    """What one arm did so far; plain data, part of the checkpoint and of the result."""

    step: int = 0
    seconds: float = 0.0  # of training, without evaluation; a step that `Run.apart` names costs as the others
    compile_seconds: float = 0.0  # of the steps that compile a graph
    losses: list[list[float]] = field(default_factory=list)  # [step, mean training loss since the one before]
    held_out: list[list[float | None]] = field(default_factory=list)  # [step, seconds, loss, accuracy]
    flips: list[list[float]] = field(default_factory=list)  # [step, rate] of each refresh; virtual of dense arms


class Run:
    """One arm in training, with all that a checkpoint has to hold."""

    def __init__(self, family: Family, args: argparse.Namespace, arm: Arm) -> None:
        self.family, self.args, self.arm, self.record = family, args, arm, Record()
        weights._layers = 0  # it tells weights' draws apart: those of an arm are the same whichever ran before it
        torch.manual_seed(args.seed)
        self.model = family.model(arm.half)
        self.session = sparse24.session(self.model)
        self.optimizer = optimizer_of(self.model, args.lr, args.size.hidden_factor, arm.feed_forward_lr)
        self.options: dict[str, Any] = {}
        self.apart: list[float] = []  # seconds of steps that compile, or count flips that training has no use for
        self.prepare()

    def prepare(self) -> None:
        """Bring the options of the coming step into force; the graph is compiled anew where it is another one.

        In another phase too, which the backend would compile by itself: traced anew, the graph comes from Inductor's
        cache, where the dense arm has left it.
        """
        step, before = self.record.step, self.options
        self.options = self.arm.options_at(step)
        if self.arm.decay_follows_lr:
            self.options["decay"] *= lr_factor(self.args, step)
        if self.arm.saliency:
            self.options["refresh_every"] = self.args.steps + 1  # never: `search_masks` is in its place
        if self.options != before:
            recipe = Recipe.from_options(self.options)
            for weight in self.session.weights.values():
                if weight.reason_skipped is None:
                    weight.recipe = recipe
                    weight.wgrad = weight.wgrad if recipe.wgrad == "mixed" else recipe.wgrad
        another_phase = step in (self.options.get("sparse_after"), self.options.get("dense_after"))
        if not before or another_phase or before.get("wgrad") != self.options.get("wgrad"):
            torch._dynamo.reset()
            self.compiled: Any = torch.compile(self.model, backend="sparse24", options=self.options)
            self.compiles_next = True

    def step(self) -> torch.Tensor:
        record, options, device = self.record, self.options, self.family.device
        refreshes = (record.step + 1) % self.arm.options_at(record.step)["refresh_every"] == 0
        counts = refreshes and (options.get("virtual_flips") or options.get("recipe") == "s-ste")
        apart = self.compiles_next or counts
        if apart:
            wait(device)
        began = time.perf_counter()
        loss = train_step(self.family, self.args, self.compiled, self.optimizer, record.step)
        if apart:
            wait(device)
            self.apart.append(time.perf_counter() - began)
            record.compile_seconds += self.apart[-1] if self.compiles_next else 0.0
        record.step += 1
        if refreshes:
            if self.arm.saliency:
                search_masks(self.session, self.optimizer, self.arm.saliency)
            counted = any(weight.flips is not None for weight in self.session.weights.values())
            if counted and (options.get("virtual_flips") or self.session.phase == "sparse"):
                record.flips.append([record.step, self.session.flip_rate()])
        self.compiles_next = False
        self.prepare()
        return loss

    def evaluate(self) -> None:
        """Held-out loss. Gradients stay on, though unused: under no_grad another graph would have to be compiled."""
        n, record = self.args.held_out_batches, self.record
        sums, hits = torch.zeros(2, device=self.family.device)
        for i in range(n):
            with autocast(self.family.device):
                loss, accuracy = self.compiled(*self.family.batch(0, HELD_OUT_SEED + i))
            sums += loss.detach()
            hits += math.nan if accuracy is None else accuracy.detach()
        share = hits.item() / n
        record.held_out.append([record.step, record.seconds, sums.item() / n, None if math.isnan(share) else share])

    def state_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "settings": settings,
            "record": asdict(self.record),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": self.session.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record = Record(**state["record"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"], strict=False)  # the options may change on the way, as here
        self.options = {}
        self.prepare()


def search_masks(session: sparse24.Session, optimizer: torch.optim.Optimizer, power: float) -> None:
    """Masks that keep the largest |w| * v^power, in place of the product's."""
    sparse = [weight for weight in session.weights.values() if weight.sparse]
    for weight in sparse:
        v = optimizer.state[weight.param]["exp_avg_sq"]
        mask = best_mask(weight.param.detach() * v**power)
        weight.flips = int((mask ^ weight.mask()).sum())
        for operand in weight.operands.values():
            operand.put_mask(weight, layout.nibbles_from_mask(mask))
    if sparse:
        check_stats(sparse, pack(sparse, search=False).tolist())


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def optimizer_of(
    model: nn.Module, lr: float, hidden_factor: float = 1.0, feed_forward_lr: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW. hidden_factor: `Size.hidden_factor`, of the learning rate of the matrices in blocks. feed_forward_lr: the
    same of those of feed-forward layers.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        decay, factor = 0.0, 1.0
        if p.dim() > 1:
            decay = 0.1
            factor *= hidden_factor if name.startswith("blocks.") else 1.0
            factor *= feed_forward_lr if "feed_forward" in name else 1.0
        groups.setdefault((decay, factor), []).append(p)
    made = [{"params": ps, "weight_decay": decay, "factor": factor} for (decay, factor), ps in groups.items()]
    return torch.optim.AdamW(made, lr=lr, betas=(0.9, 0.95), fused=True)


def lr_factor(args: argparse.Namespace, step: int) -> float:
    """Learning rate / peak learning rate: linear warm-up, then a cosine to a twentieth."""
    cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps))
    return float(min(1.0, (step + 1) / args.warm_up) * cosine)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_step(
    family: Family, args: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer, step: int
) -> torch.Tensor:
    """One optimizer step, norm clipped at 1. Waits for no GPU."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * group["factor"] * lr_factor(args, step)
    with autocast(family.device):
        loss, _ = model(*family.batch(args.seed, step))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
