"""What train_gpt.py leaves of its runs: report.json, report.md and curves.svg."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from _corpus import Corpus
from _settings import dense_after

COLOURS = {"sparse24": "#0072b2", "dense": "#d55e00"}


def write_report(args: argparse.Namespace, corpus: Corpus, runs: list[dict[str, Any]]) -> str:
    """Writes the three files into args.out; returns the text of report.md.

    runs: the records of the sparse24 run and, if there was one, of the dense run, as train_gpt.Record has them.
    """
    sparse, dense = runs[0], runs[1] if len(runs) > 1 else None
    report = {
        "machine": machine(args.device),
        "settings": {
            name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()
        },
        "corpus": {
            "files": corpus.files,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "sha256": corpus.sha256,
        },
        "held_out_over_dense_percent": 100 * (sparse["held_out"] / dense["held_out"] - 1) if dense else None,
        "tokens_per_second": {run["name"]: tokens_per_second(run) for run in runs},
        "flip_rate": flip_summary(sparse),
        "dense_after": dense_after(args),
        "runs": {run["name"]: run for run in runs},
    }
    text = markdown(report)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "report.md").write_text(text)
    curves(args.out / "curves.svg", report)
    return text


def tokens_per_second(run: dict[str, Any]) -> float:
    """Median over the intervals of the log, of the sparse phase alone in a run that has one; compilation drops out."""
    sparse = [row for row in run["log"] if row["phase"] == "sparse"]
    return statistics.median(row["tokens_per_second"] for row in sparse or run["log"])


def machine(device: torch.device) -> dict[str, str]:
    """The names and versions without which a number means nothing."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = {package: found[package] for package in ("sparse24", "triton") if package in found}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"device": name, "date": date, "python": platform.python_version(), "torch": torch.__version__} | versions


def flip_summary(run: dict[str, Any]) -> dict[str, float] | None:
    """Start, peak and end of a run's flip rates; None if no mask was ever searched anew."""
    rates = [rate for _, rate in run["flips"]]
    return {"start": rates[0], "peak": max(rates), "end": rates[-1]} if rates else None


def markdown(report: dict[str, Any]) -> str:
    settings, corpus = report["settings"], report["corpus"]
    sparse, over = report["runs"]["sparse24"], report["held_out_over_dense_percent"]
    lines = [
        "# train_gpt",
        "",
        f"{', '.join(f'{key} {value}' for key, value in report['machine'].items())}.",
        "",
        f"GPT of {settings['depth']} blocks, width {settings['width']}, feed-forward {settings['ff']}; "
        f"{settings['steps']} steps of {settings['batch']} x {settings['context']} bytes of Python source "
        f"({corpus['train_bytes'] / 1e6:.1f} MB, and {corpus['held_out_bytes'] / 1e6:.1f} MB held out).",
        "",
        "| run | held-out loss, nats per byte | over dense | tokens/s | wall time |",
        "|---|---|---|---|---|",
    ]
    for name, run in report["runs"].items():
        difference = f"{over:+.2f}%" if run is sparse and over is not None else ""
        speed = f"{report['tokens_per_second'][name]:,.0f}"
        lines.append(f"| {name} | {run['held_out']:.4f} | {difference} | {speed} | {run['seconds']:.0f} s |")
    lines += [
        "",
        "tokens/s is the median over the intervals of the log, in the sparse24 run over those of its sparse phase;",
        "wall time includes compilation and evaluation.",
        "",
    ]
    lines.append(f"Peak learning rate {settings['lr']:g}, of sparse weights {settings['lr_scale']:g} times that.")
    rates = report["flip_rate"] or {}
    told = ", ".join(f"{key} {value:.4f}" for key, value in rates.items()) or "no mask was searched anew"
    lines.append(f"Flip rate over {settings['refresh_every']} steps: {told}.")
    after = report["dense_after"]
    lines.append("The run ended in the sparse phase." if after is None else f"Trained dense from step {after} on.")
    lines += ["", "| weights | number | state |", "|---|---|---|"]
    lines += [f"| {name} | {number} | {state} |" for name, number, state in _weight_rows(sparse["weights"])]
    return "\n".join(lines) + "\n"


def curves(path: Path, report: dict[str, Any]) -> None:
    """Training loss of each run above, the flip rate of the sparse one below (SVG)."""
    with rc_context({"svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for name, run in report["runs"].items():
            steps, losses = [row["step"] for row in run["log"]], [row["loss"] for row in run["log"]]
            above.plot(steps, losses, color=COLOURS[name], label=f"{name} (held-out {run['held_out']:.4f})")
        above.set_ylabel("training loss, nats per byte")
        # The fall from ln 256 in the first steps would flatten the rest of the curves.
        later = [row["loss"] for run in report["runs"].values() for row in run["log"][len(run["log"]) // 10 :]]
        above.set_ylim(0.97 * min(later), 1.03 * max(later))

        flips = report["runs"]["sparse24"]["flips"]
        below.plot([step for step, _ in flips], [rate for _, rate in flips], color=COLOURS["sparse24"], marker=".")
        below.set_ylim(bottom=0)
        below.set_ylabel(f"flip rate over {report['settings']['refresh_every']} steps")
        below.set_xlabel("step")
        if report["dense_after"] is not None:
            for axes in (above, below):
                axes.axvline(report["dense_after"], color="black", linestyle=":", linewidth=1)
            above.plot([], [], color="black", linestyle=":", linewidth=1, label="sparse24 is dense from here on")
        above.legend()
        figure.savefig(path, metadata={"Date": None})


def _plain(value: object) -> object:
    return value if isinstance(value, int | float) else str(value)


def _weight_rows(weights: dict[str, str | None]) -> list[tuple[str, int, str]]:
    """One row for the same weight of all blocks: "blocks.*.feed_forward.up.weight", 12, "sparse"."""

    def over_blocks(text: str) -> str:
        return re.sub(r"\.\d+\.", ".*.", text)

    rows = Counter((over_blocks(name), over_blocks(reason or "sparse")) for name, reason in weights.items())
    return [(name, number, state) for (name, state), number in rows.items()]


def _cpu_name() -> str:
    try:
        return re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
