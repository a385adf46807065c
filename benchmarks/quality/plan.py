"""Run the quality experiments on the GPUs of one machine within a time, the most important first.

    python benchmarks/quality/plan.py --seconds 590                          the small scale
    python benchmarks/quality/plan.py --seconds 590 --scale base             dense and FST of GPT and BERT, a GPU each
    python benchmarks/quality/plan.py --seconds 590 -- --out DIR --work DIR  options of run.py

Given again, it goes on: what has its result is left out, and what was stopped goes on from its checkpoint. The order is
the text's tokens (without a GPU, beside all else), the searches of lambda, dense and FST of all families, the trials,
the other ablations; then the same of the next seed. Arms of one family and seed share a process of run.py. Where a GPU
has several processes, the results say so (--shared), and nobody compares their times. Logs are in the folder `logs` of
run.py's --work.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from arms import ABLATIONS, TRIALS, named, needs_decay
from corpora import text_path
from families import SCALES, SIZES
from run import known_decay, parse

GRACE_S = 20.0  # for the checkpoints of what is stopped
ALWAYS = ("dense", "fst", "fst-lr", "lr-mixed-wgrad", "lr-dense-wgrad")
TEXT, SEARCH = "text", "search"


@dataclass(frozen=True, slots=True)
class Job:
    """An arm of a family and a seed, or TEXT or SEARCH in its place. tier: jobs of one may share a process."""

    family: str
    seed: int
    what: str
    tier: int = 0

    def __str__(self) -> str:
        return f"{self.family} {self.what}" if self.what in (TEXT, SEARCH) else f"{self.family} {self.seed} {self.what}"


class Plan:
    """All jobs of an invocation in their order, and which of them are done or can begin."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        of_seed = [(args.families, ALWAYS), (args.trial_families, TRIALS), (args.families, ABLATIONS)]
        tiers = [(seed, *tier) for seed in args.seeds for tier in of_seed]
        wanted = {
            (family, seed, what): Job(family, seed, what, tier)
            for tier, (seed, families, names) in reversed([*enumerate(tiers)])  # an arm is of its first tier
            for family in families
            for what in names
            if what in args.arms
        }
        self.arms = sorted(wanted.values(), key=lambda job: job.tier)
        texts = {SIZES[f][args.scale].classes: Job(f, 0, TEXT) for f in reversed(args.families) if f in ("gpt", "bert")}
        searches = {job.family: Job(job.family, 0, SEARCH) for job in self.arms if needs_decay(job.what)}
        self.jobs = [*texts.values(), *searches.values(), *self.arms]

    def command(self, job: Job) -> list[str]:
        """Of run.py, but for what it is to do."""
        shared = ["--shared"] * (self.args.per_gpu > 1)
        family = ["--family", job.family, "--scale", self.args.scale, "--seed", str(job.seed)]
        return [*family, *shared, *self.args.options]

    def of_run(self, job: Job) -> argparse.Namespace:
        return parse(self.command(job))

    def _has_text(self, job: Job) -> bool:
        of = self.of_run(job)
        path = text_path(of.work, of.size.classes, of.text_mb * 1_000_000)
        return job.family not in ("gpt", "bert") or path.exists()

    def done(self, job: Job) -> bool:
        if job.what == TEXT:
            return self._has_text(job)
        of = self.of_run(job)
        if job.what == SEARCH:
            return known_decay(of) is not None
        return bool((of.out / f"{of.name}_{job.what}.json").exists())

    def ready(self, job: Job) -> bool:
        if job.what == TEXT:
            return True
        searched = job.what == SEARCH or not needs_decay(job.what) or known_decay(self.of_run(job)) is not None
        return self._has_text(job) and searched


class Process:
    """run.py at work on jobs of one family and seed. gpu: "" where it needs none."""

    def __init__(self, plan: Plan, jobs: list[Job], gpu: str) -> None:
        self.jobs, self.gpu, self.began = jobs, gpu, time.monotonic()
        self.where = f"gpu {gpu}" if gpu else "no gpu"
        first, whats = jobs[0], ",".join(job.what for job in jobs)
        self.name = f"{first.family} {first.seed} {whats}"
        action = {TEXT: ["--prepare"], SEARCH: ["--search-only"]}.get(first.what, ["--arms", whats])
        folder = plan.of_run(first).work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{first.family}_{plan.args.scale}_{first.seed}_{first.what}.log"
        threads = str(max(1, (os.cpu_count() or 1) // (len(plan.args.devices) * plan.args.per_gpu)))
        limits = {} if first.what == TEXT else {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("run.py"), *plan.command(first), *action],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its compiler's processes can be ended with it
                env={**os.environ, **limits, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"},
            )

    def stop(self, now: bool = False) -> None:
        if self.process.poll() is None:
            if now:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.terminate()

    def __str__(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        code = self.process.returncode
        how = "done" if code == 0 else f"FAILED with exit code {code}, see {self.log}"
        return f"{self.where}: {self.name}: {how} after {time.monotonic() - self.began:.0f} s: {last}"


class Schedule:
    """Processes on the GPUs until all is done or the time is over."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.args, self.began = plan, plan.args, time.monotonic()
        self.running: list[Process] = []
        self.failed: set[Job] = set()

    @property
    def left_s(self) -> float:
        return float(self.args.seconds - GRACE_S - (time.monotonic() - self.began))

    def next(self) -> list[Job]:
        """Jobs for one process: the first that is ready, and those that go with it."""
        taken = {job for process in self.running for job in process.jobs} | self.failed
        open_jobs = [job for job in self.plan.jobs if job not in taken and not self.plan.done(job)]
        first = next((job for job in open_jobs if self.plan.ready(job)), None)
        if first is None or first.what in (TEXT, SEARCH):
            return [first] if first else []
        alike = [j for j in open_jobs if (j.family, j.seed, j.tier) == (first.family, first.seed, first.tier)]
        return [job for job in alike if job.what != SEARCH and self.plan.ready(job)][: self.args.batch]

    def fill(self) -> None:
        """Start what can be: texts without a GPU and beside all else, the others on the GPU with the fewest of them."""
        while self.left_s > self.args.worth_starting:
            jobs = self.next()
            load = {gpu: sum(process.gpu == gpu for process in self.running) for gpu in self.args.devices}
            least = min(load, key=lambda gpu: load[gpu])
            if jobs and jobs[0].what == TEXT:
                least = ""
            elif not jobs or load[least] >= self.args.per_gpu:
                return
            self.running.append(Process(self.plan, jobs, least))

    def collect(self) -> int:
        """Say which processes ended, and how many. Of one that failed the first unfinished job is not tried again."""
        ended = [process for process in self.running if process.process.poll() is not None]
        for process in ended:
            self.running.remove(process)
            unfinished = [job for job in process.jobs if not self.plan.done(job)]
            if unfinished:
                self.failed.add(unfinished[0])
            print(f"[{time.monotonic() - self.began:4.0f} s] {process}", flush=True)
        return len(ended)

    def run(self) -> None:
        try:
            self.fill()
            while self.running and self.left_s > 0:
                if not self.collect():
                    time.sleep(0.2)
                self.fill()
        finally:
            self.stop()

    def stop(self) -> None:
        """End what runs: checkpoints are written within GRACE_S, or are those of before."""
        stopped = list(self.running)
        for process in stopped:
            process.stop()
        until = time.monotonic() + 0.8 * GRACE_S
        while time.monotonic() < until and any(process.process.poll() is None for process in stopped):
            time.sleep(0.1)
        for process in stopped:
            process.stop(now=True)
            process.process.wait()
            print(f"[{time.monotonic() - self.began:4.0f} s] {process.where}: {process.name}: stopped", flush=True)

    def summary(self) -> str:
        missing = [job for job in self.plan.jobs if not self.plan.done(job)]
        lines = [f"{len(self.plan.jobs) - len(missing)} of {len(self.plan.jobs)} are done"]
        for what, jobs in (
            ("failed", [job for job in missing if job in self.failed]),
            ("missing", [job for job in missing if job not in self.failed]),
        ):
            if jobs:
                lines.append(f"{what}: {'; '.join(map(str, jobs))}")
        return "\n".join(lines)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=int, default=2, help="GPUs to use; where CUDA_VISIBLE_DEVICES is set, its first ones")
    p.add_argument("--per-gpu", type=int, help="processes that share a GPU (default: 5 at the small scale, else 1)")
    p.add_argument(
        "--seconds", type=float, required=True, help="time for all of it, the writing of checkpoints included"
    )
    p.add_argument(
        "--worth-starting",
        type=float,
        metavar="SECONDS",
        default=45.0,
        help="nothing begins when less time is left (default: %(default).0f; a run's time where checkpoints are lost)",
    )
    p.add_argument("--scale", choices=SCALES, default="small")
    p.add_argument("--families", nargs="+", choices=list(SIZES), help="(default: all; of big scales gpt and bert)")
    p.add_argument("--trial-families", nargs="*", choices=list(SIZES), default=["gpt"], help="that meet the trials")
    p.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2, of big scales 0)")
    p.add_argument("--arms", help="as run.py has them (default: all, of big scales dense,fst-lr)")
    p.add_argument("--batch", type=int, default=3, help="arms that share a process at most")
    p.add_argument("options", nargs="*", metavar="-- OPTION", help="options of run.py, for all runs")
    args = p.parse_args(argv)
    big = args.scale in ("base", "wide")
    args.per_gpu = args.per_gpu or (1 if big else 5)  # while one compiles, others keep the GPU busy
    families = [family for family, sizes in SIZES.items() if args.scale in sizes]
    args.families = args.families or ([f for f in families if f in ("gpt", "bert")] if big else families)
    args.seeds = args.seeds or ([0] if big else [0, 1, 2])
    try:
        args.arms = named(args.arms or ("dense,fst-lr" if big else "all"))
    except ValueError as error:
        p.error(f"--arms: {error}")
    there = torch.cuda.device_count()
    if 0 < there < args.gpus:
        p.error(f"--gpus: found {there} here, need at most as many")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
    args.devices = visible.split(",")[: args.gpus]
    args.trial_families = [family for family in args.trial_families if family in args.families]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    schedule = Schedule(Plan(read(argv)))
    try:
        schedule.run()
    finally:
        print(schedule.summary())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
