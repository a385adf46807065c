"""The tables of the README and of docs/, and a picture, from the saved results.

A table stands between `<!-- made by benchmarks/tables.py: NAME -->` and `<!-- end -->`, NAME one of TABLES; without a
name it is that of step.py. Each GPU has a folder of results, and each folder that holds a result gets a table of its
own, the fullest first, so that no row stands under another GPU's name. What has no saved result says so.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("results", "kernels", "export"))]
BLOCK = re.compile(r"(<!-- made by benchmarks/tables\.py(?:: (\w+))? -->\n).*?(<!-- end -->\n)", re.DOTALL)
NAMES = {
    "llama3-8b-width": "Llama-3-8B width, 4 layers, 8 x 2048 tokens",
    "llama-1b-width": "Llama-1B width, 8 layers, 16 x 2048 tokens",
    "gpt2-xl-width": "GPT-2 XL width, 12 layers, 16 x 1024 tokens",
    "gpt2-large-width": "GPT-2 large width, 12 layers, 32 x 1024 tokens",
    "gpt2-medium-width": "GPT-2 medium width, 12 layers, 32 x 1024 tokens",
    "gpt2-small": "GPT-2 small, 12 layers, 32 x 1024 tokens",
    "vit-l": "ViT-L width, 12 layers, 64 x 256 tokens",
    "bert-base": "BERT-base, 12 layers, 64 x 512 tokens",
}
LAYERS = {"ffn": "feed-forward", "all": "and attention"}
STEPS = "step*.json"  # step.py may be run for a few models at a time

# What the kernels of a profile are, by a part of their names.
KINDS = {
    "sparse matmuls": ("sparse_gemm",),
    "dense matmuls": ("nvjet", "gemm", "cutlass"),
    "attention": ("sdpa", "flash"),
    "optimizer": ("multi_tensor_apply",),
    "packing, pruning, fused activations": ("glu_", "pack_", "masked_decay"),
}
OTHER, ALL = "the rest", "all kernels"

Row = dict[str, Any]


def saved_in(results: Path, name: str) -> dict[Path, list[Row]]:
    """What each folder of `results` holds in the files `name` (a pattern), by rows, of as many the newest first.

    Raises SystemExit where they are of several GPUs: one table is made of them.
    """
    found: dict[Path, list[Row]] = {}
    for path in sorted(results.glob(f"*/{name}")):
        found.setdefault(path.parent, []).append(json.loads(path.read_text()))
    for folder, files in found.items():
        if len(gpus := {file["environment"]["gpu"] for file in files}) > 1:
            raise SystemExit(f"{name} in {folder} are of {' and '.join(sorted(gpus))}: each needs a folder of its own")

    def fullest(folder: Path) -> tuple[int, str]:
        files = found[folder]
        return sum(len(file["rows"]) for file in files), max(file["environment"]["date"] for file in files)

    return {folder: found[folder] for folder in sorted(found, key=fullest, reverse=True)}


def rows_of(files: Iterable[Row]) -> list[Row]:
    """The rows of a folder's step*.json in the order of NAMES, each with the "environment" that it was taken in.

    Of the same model and layers the row of the last file by name counts, so a part of a run can be taken again.
    """
    rows = [{**row, "environment": file["environment"]} for file in files for row in file["rows"]]
    last = {(row["model"], row["layers"]): row for row in rows}.values()
    return sorted(last, key=lambda row: (list(NAMES).index(row["model"]), row["layers"] == "all"))


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table. header: the names of the columns with " | " between."""
    lines = [f"| {header} |", "|" + "---|" * len(header.split(" | "))]
    return "".join(f"{line}\n" for line in lines + [f"| {' | '.join(row)} |" for row in rows])


def where(*environments: Row) -> str:
    """GPU, versions and dates of a table's rows: a line for each set of versions."""
    dates: dict[str, set[str]] = {}
    for environment in environments:
        versions = [environment["gpu"], f"torch {environment['torch']}", f"triton {environment['triton']}"]
        versions += [f"cuSPARSELt {environment['cusparselt']}"] if environment["cusparselt"] else []
        dates.setdefault(", ".join(versions), set()).add(environment["date"])
    return "".join(f"\n{versions}, {' and '.join(sorted(found))}.\n" for versions, found in dates.items())


def made_by(environment: Row) -> str:
    return where(environment) + f"\nMade by `{environment['command']}`.\n"


def labels(row: Row) -> list[str]:
    return [NAMES[row["model"]], LAYERS[row["layers"]]]


def of_steps(header: str, cells: list[list[str]], rows: list[Row]) -> str:
    """The table of a folder's step*.json and where its `rows` were taken; nothing where it has none."""
    return markdown(header, cells) + where(*(row["environment"] for row in rows)) if rows else ""


def steps(*files: Row) -> str:
    rows = rows_of(files)
    header = "model | sparse layers | weights | dense | sparse24 | speed-up | steady micro-step"
    cells = []
    for row in rows:
        times = [f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms"]
        cells.append([*labels(row), str(row["sparse_weights"]), *times, f"{row['ratio']:.2f}"])
        cells[-1].append(f"{row['micro_ratio']:.2f}")
    return of_steps(header, cells, rows)


def first_steps(*files: Row) -> str:
    """Memory and the first step, whose time is mostly compilation."""
    rows = rows_of(files)
    header = "model | sparse layers | masters | packed | peak above, dense | peak above, sparse24"
    header += " | first step, dense | first step, sparse24"
    cells = []
    for row in rows:
        held, peak, first = row["resident_gib"], row["peak_gib_above_resident"], row["first_step_s"]
        held = {kind: n / 2**30 if isinstance(n, int) else n for kind, n in held.items()}  # older files hold bytes
        sizes = [held["masters"], held["packed"] + held["packed_t"], peak["dense"], peak["sparse"]]
        times = [f"{first['dense']:.1f} s", f"{first['sparse']:.1f} s"]
        cells.append([*labels(row), *(f"{size:.2f} GiB" for size in sizes), *times])
    return of_steps(header, cells, rows)


def profile(*files: Row) -> str:
    """ms of a step by kind of kernel, dense > sparse24, where step.py took a profile."""
    rows = [row for row in rows_of(files) if "profile_sparse" in row]
    kinds = [*KINDS, OTHER, ALL]
    cells = []
    for row in rows:
        dense, sparse = (_by_kind(row[f"profile_{way}"]) for way in ("dense", "sparse"))
        cells.append([*labels(row), *(f"{dense[kind]:.1f} > {sparse[kind]:.1f}" for kind in kinds)])
    return of_steps(" | ".join(["model", "sparse layers", *kinds]), cells, rows)


def _by_kind(kernels: dict[str, float]) -> dict[str, float]:
    kinds = dict.fromkeys([*KINDS, OTHER, ALL], 0.0)
    for name, ms in kernels.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)
        kinds[ALL if name == ALL else kind] += ms
    listed = sum(ms for kind, ms in kinds.items() if kind != ALL)
    kinds[OTHER] += kinds[ALL] - listed  # a profile lists its longest kernels only
    return kinds


def p50(times: dict[str, float] | float) -> float:
    """The median; older files hold it alone."""
    return times["p50"] if isinstance(times, dict) else times


def loss(results: Path) -> str:
    """The held-out loss of each saved run of examples/train_gpt.py."""
    cells = []
    for path in sorted(results.glob("*/train_gpt/report.json")):
        saved = json.loads(path.read_text())
        machine, settings = saved["machine"], saved["settings"]
        sparse, dense = (saved["runs"][name]["held_out"] for name in ("sparse24", "dense"))
        flips = saved["flip_rate"]
        what = f"{settings['depth']} blocks, width {settings['width']}, {settings['steps']} steps"
        device = f"{machine['device']}, torch {machine['torch']}, {machine['date'][:10]}"
        rate = " / ".join(f"{flips[at]:.3f}" for at in ("start", "peak", "end"))
        speed = saved["tokens_per_second"]["sparse24"] / saved["tokens_per_second"]["dense"]
        over = f"{saved['held_out_over_dense_percent']:+.1f}%"
        cells.append([device, what, f"{dense:.4f}", f"{sparse:.4f}", over, rate, f"{speed:.2f}"])
    header = "machine | model | dense | sparse24 | over dense | flip rate, start / peak / end | speed while sparse"
    return markdown(header, cells)


def kernels(saved: Row) -> str:
    cells = []
    for row in saved["rows"]:
        cells.append([f"{row['kernel']}", row["of"].removeprefix("torch."), f"{row['ms']:.4f}"])
        cells[-1] += [f"{row['gb_per_s']:.0f}", f"{row['of_a_copy']:.2f}"]
    shape = {name: n for name, n in saved["shape"].items() if name != "out"}
    said = ", ".join(f"{name} {n}" for name, n in shape.items())
    table = markdown("kernel | of | ms | GB/s | of a copy's rate", cells)
    return f"{table}\n{said}.\n{made_by(saved['environment'])}"


def matmuls(saved: Row) -> str:
    cells = []
    for row in saved["rows"]:
        by = row["with"] + (f" ({row['provider']} {row['algorithm']})" if row.get("provider") else "")
        cells.append([f"{row['k']} x {row['f']}", str(row["tokens"]), row["matmul"], by, f"{row['ms']['p50']:.4f}"])
        cells[-1] += [f"{row['ratio']:.2f}", f"{row['of_peak']:.2f}", f"{row['cold_ms']:.4f}"]
        kept = f" ({p50(row['kept_us']):.0f})" if "kept_us" in row else ""
        cells[-1].append(f"{p50(row['host_us']):.0f}{kept}")
    header = "in x out | tokens | matmul | with | ms | over dense | of the dense peak | cold, ms | host (library), us"
    return markdown(header, cells) + made_by(saved["environment"])


def ffn(*files: Row) -> str:
    """Forward and backward of one feed-forward layer over its width."""
    cells = []
    for row in sorted((row for file in files for row in file["rows"]), key=lambda row: row["d"]):
        times = [f"{row['ms'][way]['p50']:.2f}" for way in ("dense", "sparse")]
        cells.append([str(row["d"]), row["kind"], *times, f"{row['ratio']:.2f}", f"{row['bound_ms']:.2f}"])
    header = "d | kind | dense, ms | sparse24, ms | speed-up | bound, ms"
    return markdown(header, cells) + "".join(made_by(file["environment"]) for file in files)


def memory(saved: Row) -> str:
    """GiB on the GPU between steps and at most, of one model alone."""
    cells = []
    for row in saved["rows"]:
        parts = [f"{row[kind]:.2f}" if kind in row else "" for kind in ("masters_gib", "packed_gib", "packed_t_gib")]
        cells.append([NAMES.get(row["model"], row["model"]), row["kind"], f"{row['resident_gib']:.2f}"])
        cells[-1] += [f"{row['peak_gib']:.2f}", *parts]
    header = "model | way | between steps, GiB | at most, GiB | masters of sparse layers | packed W | packed W^T"
    return markdown(header, cells) + made_by(saved["environment"])


def compile_time(saved: Row) -> str:
    """s to the end of the first step with empty caches, and its parts."""
    names = list(dict.fromkeys(part for row in saved["rows"] for part in row["parts"]))
    cells = []
    for row in saved["rows"]:
        cells.append([NAMES.get(row["model"], row["model"]), row["kind"], f"{row['first_step_s']:.1f}"])
        cells[-1] += [f"{row['of_dense']:.2f}", *(f"{row['parts'][n]:.1f}" if n in row["parts"] else "" for n in names)]
    return markdown(" | ".join(["model", "way", "first step, s", "of dense", *names]), cells) + made_by(
        saved["environment"]
    )


def _p50(row: Row) -> float:
    return float(row["ms"]["p50"])


def _problems(rows: list[Row], needed: str = "cusparselt") -> dict[tuple[int, int, str], dict[str, Row]]:
    """The rows of each product that `needed` took part in, by who multiplied, without the number of its algorithm."""
    problems: dict[tuple[int, int, str], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault((row["k"], row["f"], row.get("matmul", row.get("kind"))), {})[row["with"].split()[0]] = row
    return {problem: of for problem, of in problems.items() if needed in of and len(of) > 1}


def gluon(saved: Row) -> str:
    """The fastest variant on all shapes, then with the activation behind it, beside cuSPARSELt's best algorithm."""
    cells: dict[str, list[list[str]]] = {"rows": [], "fused": []}
    for key, found in cells.items():
        for (k, f, kind), of in _problems(saved.get(key, [])).items():
            ours = (name for name in of if name not in ("dense", "cusparselt"))
            best = min(ours, key=lambda name: _p50(of[name]))
            found.append([f"{k} x {f}", kind, f"{_p50(of['cusparselt']):.4f}", f"{_p50(of[best]):.4f}", f"`{best}`"])
            found[-1].append(f"{_p50(of['cusparselt']) / _p50(of[best]):.2f}")
            if key == "rows":
                found[-1] += [f"{_p50(of['dense']) / _p50(of[best]):.2f}", f"{of[best]['of_peak']:.2f}"]
                host = [f"{p50(of[name]['host_us']):.0f}" for name in ("cusparselt", best) if "host_us" in of[name]]
                found[-1].append(" > ".join(host))
    header = "in x out | matmul | cuSPARSELt, ms | fastest variant, ms | which | of cuSPARSELt's speed"
    made = markdown(f"{header} | over dense | of the dense peak | host, us of a call", cells["rows"])
    if cells["fused"]:
        header = "in x out | activation | cuSPARSELt and a second kernel, ms | one kernel, ms | which | of their speed"
        made += "\n" + markdown(header, cells["fused"])
    return made + made_by(saved["environment"])


def gluon_matmuls(saved: Row) -> str:
    """gemm.py with the Gluon kernels among the candidates: what was chosen, and the fastest right one of them."""
    cells = []
    for (k, f, matmul), of in _problems(saved["rows"], "gluon").items():
        chosen = of["sparse24"]
        cells.append([f"{k} x {f}", matmul, f"{chosen['provider']} {chosen['algorithm']}"])
        cells[-1] += [f"{_p50(of[way]):.4f}" for way in ("dense", "sparse24", "gluon")]
        cells[-1] += [f"{chosen['ratio']:.2f}", f"{p50(chosen['host_us']):.0f}"]
    header = "in x out | matmul | chosen | dense, ms | sparse24, ms | fastest Gluon kernel, ms | over dense | host, us"
    return markdown(header, cells) + made_by(saved["environment"])


def gluon_profile(results: Path) -> str:
    """What ncu says of the variants that gluon_profile.py launches."""
    metrics = ("Elapsed Cycles", "SM Frequency", "SM Busy", "L2 Cache Throughput", "L1/TEX Cache Throughput")
    made = []
    for path in sorted(results.glob("*/ncu_gluon.txt")):
        head, *variants = path.read_text().split("\nvariant ")
        command, where = head.splitlines()[:2]
        cells = []
        for text in variants:
            first = [re.search(rf"{re.escape(metric)} +\S+ +([\d.,]+)", text) for metric in metrics]
            clocks, ghz, *busy = (float(found[1].replace(",", "")) for found in first if found)
            cells.append([f"`{text.partition(':')[0]}`", f"{clocks / 1e6:.2f}", f"{ghz:.2f}"])
            cells[-1] += [f"{percent:.0f}%" for percent in busy]
        header = "variant | million clocks | GHz | tensor cores busy | L2 | shared memory"
        made.append(f"{markdown(header, cells)}\n{where}\n\nMade by `{command}`.\n")
    return "\n".join(made) or "No saved results yet.\n"


def gluon_backward(saved: Row) -> str:
    """A dgrad with the activation's backward and the pruning of its result behind it: ms of two kernels and of one."""
    cells = []
    for row in saved["rows"]:
        if "ms" in row:
            times = [row["ms"][way]["p50"] for way in ("two", "128x256 all", "128x256 no pruning")]
            cells.append([f"{row['d']} x {row['f']}", *(f"{ms:.2f}" for ms in times)])
    header = "in x out | cuSPARSELt, then `glu_backward_pack` | one kernel | one kernel, without the pruning"
    return markdown(header, cells) + where(saved["environment"])


def gluon_variants(saved: Row) -> str:
    """Each variant on the first shape, and what leaving out a part of the work saves there."""
    problems = _problems(saved["rows"])
    k, f, _ = next(iter(problems))
    kinds = [matmul for *shape, matmul in problems if shape == [k, f]]
    cells = []
    for name, check in saved["checks"].items():
        found = [problems[k, f, kind] for kind in kinds]
        cells.append([f"`{name}`", "yes" if check["right"] else "no"])
        cells[-1] += [f"{_p50(of['cusparselt']) / _p50(of[name]):.2f}" if name in of else "" for of in found]
    header = " | ".join(["variant", "right", *(f"{kind}, of cuSPARSELt's speed" for kind in kinds)])
    made = f"{k} x {f}:\n\n{markdown(header, cells)}"
    if ablated := _problems(saved["ablations"]):
        names = [name for name in next(iter(ablated.values())) if ":" in name]
        cells = []
        for name in names:
            variant, without = name.split(":")
            cells.append([f"`{variant}`", without])
            cells[-1] += [f"{_p50(of[name]) / _p50(of[variant]):.2f}" for of in ablated.values()]
        header = " | ".join(["variant", "without", *(f"{kind}, of its time" for *_, kind in ablated)])
        made += "\n" + markdown(header, cells)
    return made + made_by(saved["environment"])


def inference(saved: Row) -> str:
    """A pruned block's forward over the number of tokens: time and memory of each way to run it."""
    cells = []
    for row in saved["rows"]:
        for name, ms in row["ms"].items():
            cells.append([str(row["tokens"]), name, f"{ms['p50']:.3f}", f"{row['ratios'][name]:.2f}"])
            cells[-1] += [f"{row[of][name]:.0f}" for of in ("weights_mib", "peak_mib_above_weights")]
    header = "tokens | with | ms | over dense | weights, MiB | peak above, MiB"
    return markdown(header, cells) + made_by(saved["environment"])


def families(*files: Row) -> str:
    """One step of each model family at a real width; models.py may be run for a few at a time."""
    cells = []
    rows = {row["model"]: row for file in files for row in file["rows"] if "error" not in row}  # the last file's counts
    for row in rows.values():
        times = [f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms", f"{row['ratio']:.2f}"]
        cells.append([row["model"], f"{row['parameters'] / 1e6:.0f}M", str(row["sparse_weights"]), *times])
        cells[-1].append(f"{row['relative_loss_difference']:.0e}")
    header = "family | parameters | sparse weights | dense | sparse24 | speed-up | first loss differs by"
    return markdown(header, cells) + where(*(file["environment"] for file in files))


def _of(script: str, table: Callable[..., str], name: str = "", options: str = "") -> Callable[[Path], str]:
    """The tables of what benchmarks/`script`.py, run with `options`, saved in each folder in the files `name`."""

    def made(results: Path) -> str:
        tables = [table(*files) for files in saved_in(results, name or f"{script}.json").values()]
        none = f"No saved results yet: `python benchmarks/{script}.py{options}` on a GPU writes them.\n"
        return "\n".join(filter(None, tables)) or none

    return made


TABLES: dict[str, Callable[[Path], str]] = {
    "steps": _of("step", steps, STEPS),
    "graph_steps": _of("step", steps, "graph_steps.json", " --cudagraphs"),
    "mixed_steps": _of("step", steps, "mixed_steps.json", " --wgrad mixed"),
    "wgrad_steps": _of("step", steps, "wgrad_steps.json", " --wgrad dense"),
    "first_steps": _of("step", first_steps, STEPS),
    "profile": _of("step", profile, STEPS, " --profile"),
    "loss": loss,
    "kernels": _of("pack", kernels),
    "matmuls": _of("gemm", matmuls),
    "ffn": _of("ffn", ffn, "ffn*.json"),
    "inference": _of("inference", inference),
    "memory": _of("memory", memory),
    "compile_time": _of("compile_time", compile_time),
    "gluon": _of("gluon", gluon),
    "gluon_profile": gluon_profile,
    "gluon_backward": _of("gluon", gluon_backward, "gluon_backward.json"),
    "gluon_steps": _of("step", steps, "gluon_step.json"),
    "gluon_matmuls": _of("gemm", gluon_matmuls, "gluon_gemm.json"),
    "gluon_variants": _of("gluon", gluon_variants, "gluon_variants.json", " --ablations"),
    "families": _of("models", families, "models*.json"),
}


def filled(text: str, results: Path) -> str:
    """A page's text with its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2] or "steps"](results) + found[3], text)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sparse24"  # the same results give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    names = [f"{NAMES[row['model']].split(',')[0]}, {LAYERS[row['layers']]}" for row in rows][::-1]
    bars = axes.barh(names, [row["ratio"] for row in rows][::-1], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed of a whole training step over dense")
    axes.set_xlim(0.9, None)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".svg", delete=False) as file:
        figure.savefig(file.name, format="svg", metadata={"Date": None})
    os.replace(file.name, path)
    path.chmod(0o644)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS, help="folder that holds a folder of results for each GPU")
    p.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="files whose tables are replaced")
    args = p.parse_args()
    measured = saved_in(args.results, STEPS)
    if not measured:
        raise SystemExit(f"found no {STEPS} in the folders of {args.results}: run benchmarks/step.py first")
    for page in args.pages:
        page.write_text(filled(page.read_text(), args.results))
    for folder, files in measured.items():
        draw(rows_of(files), folder / "steps.svg")


if __name__ == "__main__":
    main()
