"""Train one model family under several arms of the method and save what each loses against dense.

    python benchmarks/quality/run.py --family gpt --scale small              all arms, some 20M parameters
    python benchmarks/quality/run.py --family bert --scale base --arms dense,fst
    python benchmarks/quality/run.py --family vit --tiny                     seconds, on a CPU too

Every arm starts from the same weights and sees the same batches. lambda is searched first (sparse24.find_decay, in the
warm-up), unless --decay gives it. A run that was killed goes on from its checkpoint in --work when the same command is
given again; a finished arm is not run again. Each arm's result is one JSON file in --out; report.py draws them.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
sys.path.insert(1, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from common import RESULTS, save  # noqa: E402
from corpora import HELD_OUT_SEED, save_tensors  # noqa: E402
from families import SIZES, Family, Size  # noqa: E402
from torch import nn  # noqa: E402

import sparse24  # noqa: E402

REFRESH_EVERY = 40
#: The decay on weights of the original SR-STE.
SR_DECAY = 2e-4
TOO_LARGE = 50
DENSE = {"dense_after": 0, "virtual_flips": True}


def arms(decay: float, steps: int) -> dict[str, dict[str, Any]]:
    """name -> options of the backend; "half" has feed-forward layers of half the width beside them."""
    fst = {"decay": decay, "dense_after": steps - steps // 6}
    sparse_end = {"dense_after": None}
    return {
        "dense": DENSE,
        "fst": fst,
        "fst-sparse-end": {**fst, **sparse_end},
        "fst-dense-wgrad": {**fst, "wgrad": "dense"},
        "decay-too-large": {**fst, "decay": TOO_LARGE * decay},
        "sr-ste": {**fst, "decay": SR_DECAY, "decay_on": "weight"},
        "ste": {**sparse_end, "decay": 0.0, "wgrad": "dense"},
        "s-ste": {**sparse_end, "recipe": "s-ste"},
        "half": DENSE,
    }


ARMS = tuple(arms(1.0, 6))


@dataclass(slots=True)
class Record:
    """What one arm did so far; plain data, part of the checkpoint and of the result."""

    step: int = 0
    seconds: float = 0.0  # of training, compilation included, evaluation not
    losses: list[list[float]] = field(default_factory=list)  # [step, mean training loss since the one before]
    held_out: list[list[float | None]] = field(default_factory=list)  # [step, seconds, loss, accuracy]
    flips: list[list[float]] = field(default_factory=list)  # [step, rate] of each refresh; virtual of dense arms


class Run:
    """One arm in training, with all that a checkpoint has to hold."""

    def __init__(self, family: Family, args: argparse.Namespace, half: bool, options: dict[str, Any]) -> None:
        self.family, self.args, self.record = family, args, Record()
        self.virtual = bool(options.get("virtual_flips"))
        torch.manual_seed(args.seed)
        self.model = family.model(half)
        self.compiled: Any = torch.compile(self.model, backend="sparse24", options=options)
        self.session = sparse24.session(self.model)
        self.optimizer = optimizer_of(self.model, args.lr)

    def step(self) -> torch.Tensor:
        record, before = self.record, self.session.step
        loss = train_step(self.family, self.args, self.compiled, self.optimizer, record.step)
        record.step += 1
        refreshed = self.session.step != before and self.session.step % self.args.refresh_every == 0
        if refreshed and (self.virtual or self.session.phase == "sparse"):
            record.flips.append([record.step, self.session.flip_rate()])
        return loss

    def evaluate(self) -> None:
        """Held-out loss. Gradients stay on, though unused: under no_grad another graph would have to be compiled."""
        sums, hits = 0.0, 0.0
        for i in range(self.args.held_out_batches):
            with autocast(self.family.device):
                loss, accuracy = self.compiled(*self.family.batch(0, HELD_OUT_SEED + i))
            sums += loss.item()
            hits = math.nan if accuracy is None else hits + accuracy.item()
        n = self.args.held_out_batches
        record = self.record
        record.held_out.append([record.step, record.seconds, sums / n, None if math.isnan(hits) else hits / n])

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
        self.session.load_state_dict(state["session"])


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train_step(
    family: Family, args: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer, step: int
) -> torch.Tensor:
    """One optimizer step: linear warm-up, then a cosine to a twentieth; norm clipped at 1. Waits for no GPU."""
    factor = min(1.0, (step + 1) / args.warm_up) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor
    with autocast(family.device):
        loss, _ = model(*family.batch(args.seed, step))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def search_decay(family: Family, args: argparse.Namespace, common: dict[str, Any]) -> float:
    """lambda by find_decay in the warm-up; its evidence is saved beside the results, and a killed search goes on."""
    args.out.mkdir(parents=True, exist_ok=True)
    evidence = args.out / f"{args.name}_decay.json"

    def step_fn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        train_step(family, args, model, optimizer, step)

    try:
        found = sparse24.find_decay(
            family.model,
            lambda model: optimizer_of(model, args.lr),
            step_fn,
            steps=max(args.warm_up, 3 * args.refresh_every),
            options=common,
            feasible=tuple(args.feasible),
            high=args.highest_decay,
            evidence=evidence,
            seed=args.seed,
        )
    except ValueError as error:
        raise SystemExit(f"{error}\nGive --decay, or another --highest-decay.") from error
    return found.decay


def train(arm: str, options: dict[str, Any], family: Family, args: argparse.Namespace) -> None:
    settings = {**args.settings, "arm": arm, "options": options}
    result, checkpoint = args.out / f"{args.name}_{arm}.json", args.work / f"{args.name}_{arm}.pt"
    if result.exists():
        expect_same(json.loads(result.read_text())["settings"], settings, result)
        print(f"{result} is finished")
        return
    torch._dynamo.reset()
    run = Run(family, args, arm == "half", options)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=family.device, weights_only=True)
        expect_same(state["settings"], settings, checkpoint)
        run.load_state_dict(state)
        print(f"{arm}: goes on from step {run.record.step}")
    record, error = run.record, None
    try:
        train_on(run, arm, checkpoint, settings)
    except sparse24.NotFiniteError as found:  # a result too: the other arms go on
        error = str(found)
        print(f"{args.name} {arm}: {error}")
    known = run.session.weights.values()
    payload = {
        "settings": settings,
        "data": family.facts,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "sparse_weights": 0 if options.get("dense_after") == 0 else sum(w.reason_skipped is None for w in known),
        "error": error,
        **asdict(record),
    }
    save(result, payload)
    checkpoint.unlink(missing_ok=True)  # last: its run is in the result now


def train_on(run: Run, arm: str, checkpoint: Path, settings: dict[str, Any]) -> None:
    """To the last step, with evaluations and checkpoints on the way."""
    args, record = run.args, run.record
    while record.step < args.steps:
        began, first, losses = time.perf_counter(), record.step, torch.zeros((), device=run.family.device)
        while True:  # one interval of the log; nothing in it waits for the GPU
            losses += run.step()
            if record.step % args.log_every == 0 or record.step == args.steps:
                break
        record.losses.append([record.step, losses.item() / (record.step - first)])
        record.seconds += time.perf_counter() - began
        if record.step // args.evaluate_every > first // args.evaluate_every or record.step == args.steps:
            run.evaluate()
            _, _, loss, accuracy = record.held_out[-1]
            hits = "" if accuracy is None else f", accuracy {accuracy:.4f}"
            print(f"{args.name} {arm} step {record.step}: held-out loss {loss:.4f}{hits}, {record.seconds:.0f} s")
        if record.step // args.save_every > first // args.save_every:
            save_tensors(checkpoint, run.state_dict(settings))


def expect_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    changed = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if before.get(k) != now[k]]
    if changed:
        raise SystemExit(
            f"{path} was made with other settings ({'; '.join(changed)}); give the same ones, or another --out and "
            "--work, or move it away"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--family", choices=list(SIZES), required=True)
    p.add_argument(
        "--scale", choices=["small", "base"], default="small", help="20M parameters, or GPT-2's / BERT-base's"
    )
    p.add_argument("--tiny", action="store_true", help="a model of two layers and few steps, to try the script")
    p.add_argument("--arms", default=",".join(ARMS), help=f"some of {','.join(ARMS)} (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of weights, batches and gradient pruning")
    p.add_argument("--steps", type=int, help="optimizer steps (default: by scale)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: by scale)")
    p.add_argument("--decay", type=float, help="lambda (default: searched)")
    p.add_argument("--feasible", type=float, nargs=2, default=(0.60, 0.95), help="range of mu in the search of lambda")
    p.add_argument("--highest-decay", type=float, default=1e-2, help="largest lambda that is searched")
    p.add_argument("--text-mb", type=int, default=300, help="most text to read, in MB")
    p.add_argument(
        "--inner", choices=["inductor", "aot_eager", "eager"], default="inductor", help="the compiler behind"
    )
    p.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    p.add_argument("--out", type=Path, default=RESULTS / "quality", help="folder of results")
    p.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of checkpoints and tokenized text")
    args = p.parse_args(argv)
    unknown = [arm for arm in args.arms.split(",") if arm not in ARMS]
    if unknown:
        p.error(f"--arms: found {', '.join(unknown)}, need some of {', '.join(ARMS)}")
    args.scale = "tiny" if args.tiny else args.scale
    args.size = SIZES[args.family][args.scale]
    args.name = f"{args.family}_{args.scale}_{args.seed}"
    for name in ("steps", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.size, name))
    args.warm_up = max(1, args.steps // 10)
    args.refresh_every = 3 if args.tiny else REFRESH_EVERY
    args.text_mb = 1 if args.tiny else args.text_mb
    args.held_out_batches = 2 if args.tiny else 32
    args.log_every = max(1, args.steps // 100)
    args.evaluate_every = max(1, args.steps // 20)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size: Size = args.size
    family = Family(args.family, size, args.work, args.text_mb * 1_000_000, device)
    common = {"refresh_every": args.refresh_every, "when": "always", "seed": args.seed, "inner": args.inner}
    args.settings = {
        **{k: getattr(args, k) for k in ("family", "scale", "seed", "steps", "lr", "warm_up", "inner")},
        "size": asdict(size),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "data_sha256": family.facts.get("sha256"),
    }
    wanted = args.arms.split(",")
    needs_decay = [arm for arm in wanted if arms(1.0, 6)[arm] != arms(2.0, 6)[arm]]
    decay = args.decay
    if needs_decay and decay is None:
        decay = search_decay(family, args, common)
    for arm in wanted:
        train(arm, {**common, **arms(decay or 0.0, args.steps)[arm]}, family, args)


if __name__ == "__main__":
    main()
