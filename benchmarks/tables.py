"""The README's table, and a picture of it, from the saved results of step.py."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h200"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/tables.py -->\n", "<!-- end -->\n"
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


def load(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of every step_*.json, in the order of NAMES, and where they were taken.

    Of the same model and layers the row of the last file by name counts, so a part of a run can be taken again.
    """
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("step*.json"))]
    if not files:
        raise SystemExit(f"found no step*.json in {folder}: run benchmarks/step.py first")
    rows = {(row["model"], row["layers"]): row for file in files for row in file["rows"]}.values()
    return sorted(rows, key=lambda row: (list(NAMES).index(row["model"]), row["layers"] == "all")), files[0][
        "environment"
    ]


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "| model | sparse layers | weights | dense | sparse24 | speed-up | steady micro-step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [NAMES[row["model"]], LAYERS[row["layers"]], str(row["sparse_weights"])]
        cells += [f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms"]
        lines.append("| " + " | ".join([*cells, f"{row['ratio']:.2f}", f"{row['micro_ratio']:.2f}"]) + " |")
    versions = f"torch {where['torch']}, triton {where['triton']}, cuSPARSELt {where['cusparselt']}"
    return "\n".join(lines) + f"\n\n{where['gpu']}, {versions}, {where['date']}.\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    labels = [f"{NAMES[row['model']].split(',')[0]}, {LAYERS[row['layers']]}" for row in rows][::-1]
    bars = axes.barh(labels, [row["ratio"] for row in rows][::-1], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed of a whole training step over dense")
    axes.set_xlim(0.9, None)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".svg", delete=False) as file:
        figure.savefig(file.name, format="svg", metadata={"Date": None})
    os.replace(file.name, path)
    path.chmod(0o644)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--readme", type=Path, default=README, help="file whose table is replaced")
    args = p.parse_args()
    rows, where = load(args.results)
    text = args.readme.read_text()
    before, rest = text.split(BEGIN)
    args.readme.write_text(before + BEGIN + table(rows, where) + END + rest.split(END, 1)[1])
    draw(rows, args.results / "steps.svg")


if __name__ == "__main__":
    main()
