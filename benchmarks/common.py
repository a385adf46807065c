"""What the benchmarks share: where a number was taken, and saving it."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def clocks() -> str:
    """Clocks and power of the GPU in use at this moment, "" where nobody can say."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit", "--format=csv,noheader"]
    if torch.cuda.is_available():
        query.append(f"--id=GPU-{torch.cuda.get_device_properties().uuid}")
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processor() -> str:
    """The model of the host's processor."""
    try:
        return re.findall(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor()


def code() -> str:
    """A digest of the package's sources: what was measured."""
    digest = hashlib.sha256()
    for folder in ("sparse24", "compiler", "passes", "kernels"):
        for source in sorted((RESULTS.parents[1] / folder).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def command() -> str:
    """As given in the repository's folder, wherever that is, with the variable that adds kernels."""
    switch = [f"SPARSE24_GLUON={value}"] if (value := os.environ.get("SPARSE24_GLUON")) else []
    return " ".join([*switch, "python", sys.argv[0].removeprefix(f"{RESULTS.parents[1]}/"), *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """GPU, clocks, processor, versions, sources, date and the command: every result carries them."""
    import triton

    from sparse24.kernels import cusparselt

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "clocks_and_power": clocks(),
        "processor": processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cusparselt": cusparselt.version() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "code": code(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
    }


def save(path: Path, payload: dict[str, Any]) -> None:
    """JSON, written to a temporary file and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({"environment": environment(), **payload}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
    print(f"wrote {path}")


class Rows:
    """The rows of a result, saved as each comes: a script that was cut has lost what it was measuring only.

    key: the fields that tell what a row is of. resume: begin with the rows of an earlier run in `path`, but for those
    that failed. head: the settings of all rows. Raises SystemExit where the earlier run was on another GPU, with other
    versions, sources or settings: its rows would not compare.
    """

    def __init__(self, path: Path, key: tuple[str, ...], resume: bool = False, **head: Any) -> None:
        self.path, self.key, self.head, self.rows = path, key, head, list[dict[str, Any]]()
        if resume and path.exists():
            saved = json.loads(path.read_text())
            here, before = {**environment(), **head}, {**saved["environment"], **saved}
            for name in ("gpu", "torch", "triton", "cusparselt", "code", *head):
                if before.get(name) != here[name]:
                    found = f"{name} {before.get(name)!r}, is {here[name]!r}"
                    raise SystemExit(f"{path} was measured with {found}; leave out --resume, or give another --out")
            self.rows = [row for row in saved["rows"] if "error" not in row]

    def __contains__(self, values: tuple[Any, ...]) -> bool:
        return any(tuple(row[name] for name in self.key) == values for row in self.rows)

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows += rows
        save(self.path, {**self.head, "rows": self.rows})


def timed(run: Callable[[], Any], n: int) -> float:
    """ms a call over n calls, by events on the GPU, or by the clock where there is none."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(n):
            run()
        return (time.perf_counter() - began) / n * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / n


def in_turns(runs: Mapping[str, Callable[[], Any]], turns: int, n: int, warm_s: float = 2.0) -> dict[str, list[float]]:
    """ms a call of each, `turns` times n calls in turns after `warm_s` seconds of load: the clock follows the load.

    Each turn has its own order: at the power limit a clock is also that of what ran before, and the same machine code
    in two places of one order was timed 5% apart (gluon_metadata_ahead.json).
    """
    shuffle = random.Random(0).shuffle
    began = time.perf_counter()
    while True:
        for run in runs.values():
            timed(run, 1)
        if time.perf_counter() - began > warm_s:
            break
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(turns):
        shuffle(order)
        for name in order:
            times[name].append(timed(runs[name], n))
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50, p80."""
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.5, 0.8)]
    return dict(zip(("p20", "p50", "p80"), at, strict=True))


def parser(description: str | None, default: str, resumable: bool = False) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULTS / default, help="file the result is written to")
    if resumable:
        p.add_argument("--resume", action="store_true", help="measure only what --out does not hold yet")
    return p
