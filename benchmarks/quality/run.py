"""Train one model family under several arms of the method and save what each loses against dense.

    python benchmarks/quality/run.py --family gpt --scale small              the ablations, some 20M parameters
    python benchmarks/quality/run.py --family gpt --arms dense,trials        ideas that may close the gap
    python benchmarks/quality/run.py --family bert --scale base --arms dense,fst
    python benchmarks/quality/run.py --family vit --tiny                     seconds, on a CPU too

Every arm (arms.py) starts from the same weights and sees the same batches. lambda is searched first by seed 0
(sparse24.find_decay, in the warm-up) and holds for all seeds, unless --decay gives it; only one process may search it.
A run that was killed goes on from its checkpoint in --work when the same command is given again; a finished arm is not
run again. SIGTERM has a checkpoint written first. Each arm's result is one JSON file in --out; report.py draws them,
and plan.py runs many of them on several GPUs.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
sys.path.insert(1, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from arms import ARMS, REFRESH_EVERY, Arm, arms, named, needs_decay  # noqa: E402
from common import RESULTS, save  # noqa: E402
from corpora import save_tensors  # noqa: E402
from families import SCALES, SIZES, Family, Size, kind  # noqa: E402
from torch import nn  # noqa: E402
from training import Run, optimizer_of, train_step  # noqa: E402

import sparse24  # noqa: E402

STOP = threading.Event()  # set by SIGTERM: save a checkpoint and end


def evidence_of(args: argparse.Namespace) -> Path:
    """The file of the search of lambda: of a family, a scale and a learning rate, and of all seeds."""
    return Path(args.out / f"{args.kind}_decay.json")


def known_decay(args: argparse.Namespace) -> float | None:
    """lambda as given or as searched before; None where neither is."""
    evidence = evidence_of(args)
    if args.decay is not None or not evidence.exists():
        return None if args.decay is None else float(args.decay)
    known = json.loads(evidence.read_text())
    if known["settings"]["steps"] != args.search_steps:
        raise SystemExit(
            f"found a search over {known['settings']['steps']} steps in {evidence}, need one over {args.search_steps}, "
            "as --steps has it: give the same --steps, or another --out, or move it away"
        )
    found: float | None = known["decay"]
    return found


def search_decay(family: Family, args: argparse.Namespace, common: dict[str, Any]) -> float:
    """lambda by find_decay in the warm-up. Seed 0 searches it for all seeds, and goes on where it was killed."""
    evidence, found = evidence_of(args), known_decay(args)
    if args.seed != 0:
        if found is None:
            raise SystemExit(
                f"found no decay in {evidence}, which seed 0 searches for all seeds: run `run.py --family "
                f"{args.family} --scale {args.scale} --search-only` first, or give --decay"
            )
        return found
    args.out.mkdir(parents=True, exist_ok=True)

    def step_fn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        train_step(family, args, model, optimizer, step)

    try:
        search = sparse24.find_decay(
            family.model,
            lambda model: optimizer_of(model, args.lr, args.size.hidden_factor),
            step_fn,
            steps=args.search_steps,
            options=common,
            feasible=tuple(args.feasible),
            high=args.highest_decay,
            evidence=evidence,
        )
    except ValueError as error:
        raise SystemExit(f"{error}\nGive --decay, or another --highest-decay.") from error
    return search.decay


def train(name: str, arm: Arm, family: Family, args: argparse.Namespace) -> None:
    steps = round(arm.share * args.steps)
    settings = {**args.settings, "arm": name, **json.loads(json.dumps(arm.settings())), "steps": steps}
    args = argparse.Namespace(**{**vars(args), "steps": steps, "warm_up": max(1, steps // 10)})
    result, checkpoint = args.out / f"{args.name}_{name}.json", args.work / f"{args.name}_{name}.pt"
    if result.exists():
        expect_same(json.loads(result.read_text())["settings"], settings, result)
        print(f"{result} is finished")
        return
    run = Run(family, args, arm)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=family.device, weights_only=True)
        expect_same(state["settings"], settings, checkpoint)
        run.load_state_dict(state)
        print(f"{name}: goes on from step {run.record.step}")
    record, error = run.record, None
    try:
        train_on(run, name, checkpoint, settings)
    except sparse24.NotFiniteError as found:  # a result too: the other arms go on
        error = str(found)
        print(f"{args.name} {name}: {error}")
    known = run.session.weights.values()
    payload = {
        "settings": settings,
        "data": family.facts,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "sparse_weights": 0 if arm.options.get("dense_after") == 0 else sum(w.reason_skipped is None for w in known),
        "error": error,
        **asdict(record),
    }
    save(result, payload)
    checkpoint.unlink(missing_ok=True)  # last: its run is in the result now


def train_on(run: Run, name: str, checkpoint: Path, settings: dict[str, Any]) -> None:
    """To the last step, with evaluations and checkpoints on the way."""
    args, record = run.args, run.record
    while record.step < args.steps:
        began, first, losses = time.perf_counter(), record.step, torch.zeros((), device=run.family.device)
        run.apart.clear()
        while True:  # one interval of the log; nothing in it waits for the GPU
            losses += run.step()
            if record.step % args.log_every == 0 or record.step == args.steps:
                break
        record.losses.append([record.step, losses.item() / (record.step - first)])
        elapsed, timed = time.perf_counter() - began - sum(run.apart), record.step - first - len(run.apart)
        record.seconds += elapsed * (record.step - first) / timed if timed else 0.0
        if record.step // args.evaluate_every > first // args.evaluate_every or record.step == args.steps:
            run.evaluate()
            _, _, loss, accuracy = record.held_out[-1]
            hits = "" if accuracy is None else f", accuracy {accuracy:.4f}"
            print(f"{args.name} {name} step {record.step}: held-out loss {loss:.4f}{hits}, {record.seconds:.0f} s")
        stopped = STOP.is_set() and record.step < args.steps
        if stopped or record.step // args.save_every > first // args.save_every:
            save_tensors(checkpoint, run.state_dict(settings))
        if stopped:
            raise SystemExit(f"{args.name} {name}: stopped after step {record.step}; the same command goes on from it")


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
        "--scale",
        choices=SCALES,
        default="small",
        help="one layer and few steps, to try the script; 20M parameters; GPT-2's / BERT-base's; GPT 4096 wide",
    )
    p.add_argument("--tiny", action="store_const", dest="scale", const="tiny", help="the same as --scale tiny")
    p.add_argument(
        "--arms", default="ablations", help=f"ablations, trials, all, or some of {','.join(ARMS)} (default: ablations)"
    )
    p.add_argument("--prepare", action="store_true", help="tokenize the text, once for all runs, and train nothing")
    p.add_argument("--search-only", action="store_true", help="search lambda and train no arm")
    p.add_argument("--shared", action="store_true", help="other processes use this GPU too: times say nothing")
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
    p.add_argument("--save-every", type=int, help="steps between two checkpoints (default: a quarter of the run)")
    p.add_argument("--out", type=Path, default=RESULTS / "quality", help="folder of results")
    p.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of checkpoints and tokenized text")
    args = p.parse_args(argv)
    try:
        args.arms = [] if args.prepare or args.search_only else named(args.arms)
    except ValueError as error:
        p.error(f"--arms: {error}")
    if args.scale not in SIZES[args.family]:
        p.error(f"--scale: found {args.scale} of {args.family}, need one of {', '.join(SIZES[args.family])}")
    tiny = args.scale == "tiny"
    args.size = SIZES[args.family][args.scale]
    for name in ("steps", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.size, name))
    args.kind = kind(args.family, args.scale, args.lr)
    args.name = f"{args.kind}_{args.seed}"
    args.warm_up = max(1, args.steps // 10)
    args.refresh_every = 3 if tiny else REFRESH_EVERY
    args.search_steps = max(3 * args.refresh_every, min(args.warm_up, 6 * args.refresh_every))
    args.text_mb = 1 if tiny else args.text_mb
    args.held_out_batches = 2 if tiny else 32
    args.save_every = args.save_every or max(1, args.steps // 4)
    args.log_every = max(1, args.steps // 100)
    args.evaluate_every = max(1, args.steps // (6 if tiny else 20))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.prepare else "cpu")
    size: Size = args.size
    family = Family(args.family, size, args.work, args.text_mb * 1_000_000, device)
    if args.prepare:
        return
    common = {"refresh_every": args.refresh_every, "when": "always", "seed": args.seed, "inner": args.inner}
    args.settings = {
        **{k: getattr(args, k) for k in ("family", "scale", "seed", "steps", "lr", "warm_up", "inner", "shared")},
        "size": {k: v for k, v in asdict(size).items() if v or k != "tuned_at"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "data_sha256": family.facts.get("sha256"),
    }
    decay = args.decay
    if decay is None and (args.search_only or any(map(needs_decay, args.arms))):
        decay = search_decay(family, args, common)
    every = arms(decay or 0.0, args.steps, args.refresh_every)
    for name in args.arms:
        train(name, replace(every[name], options={**common, **every[name].options}), family, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    main()
