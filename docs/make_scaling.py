"""Write the tables of docs/scaling.md, from the arithmetic below: python docs/make_scaling.py [--out FILE].

Nothing here is measured but the rates of one H200, which `sparse24.kernels.cost` holds.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from sparse24.kernels.cost import GPUS

PAGE = Path(__file__).with_name("scaling.md")
BLOCK = re.compile(r"(<!-- made by docs/make_scaling\.py: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
H200 = GPUS["H200"]
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, each way: data sheets of the H200 and of a 400 Gb/s adapter
TOKENS = 16384  # of one data-parallel rank in a step
PACKED = 9 / 8  # bytes an entry of W's packed form in a 16-bit type, 9/16 of two; W^T's are as many


@dataclass(frozen=True)
class Plan:
    name: str
    width: int
    ff: int
    layers: int
    shards: int  # ranks that FSDP shards over
    parts: int  # ranks of tensor parallelism, in one machine

    @property
    def gpus(self) -> int:
        return self.shards * self.parts

    @property
    def layer_ffn(self) -> int:
        """Entries of one layer's gate, up and down projections."""
        return 3 * self.width * self.ff

    @property
    def layer(self) -> int:
        """Entries of one layer, with 8 key and value heads of 128."""
        return self.layer_ffn + 2 * self.width * self.width + 2 * self.width * 1024

    @property
    def ffn(self) -> int:
        return self.layers * self.layer_ffn

    @property
    def params(self) -> int:
        return self.layers * self.layer + 2 * 128256 * self.width

    @property
    def link(self) -> float:
        return NVLINK if self.parts == 1 else NETWORK

    def sent(self, entries: float, size: float) -> float:
        """Bytes that one GPU receives when FSDP gathers entries, or sends when it scatters their sums."""
        return entries / self.parts * size * (self.shards - 1) / self.shards

    def gathers(self, forward: float, backward: float) -> float:
        """Bytes of a step's gathers, the feed-forward weights with so many bytes an entry in the two of them."""
        return self.sent(2 * (self.params - self.ffn), 2) + self.sent(self.ffn, forward + backward)

    def tensor_parallel(self) -> float:
        """Bytes of a step's all-reduces: two a layer forward, two backward."""
        return 4 * self.layers * TOKENS * self.width * 2 * 2 * (self.parts - 1) / self.parts

    def matmuls(self, sparse: bool) -> float:
        """Seconds of a step's products with weights, on one GPU."""
        rate = H200.sparse if sparse else H200.dense
        each = 6 * TOKENS / self.parts / 1e12
        return each * (self.ffn / rate + (self.params - self.ffn) / H200.dense)

    def packing(self, entries: float) -> float:
        """Seconds to pack: two bytes an entry read, W and W^T written."""
        return entries / self.parts * (2 + 2 * PACKED) / (H200.packing * 1e12)


PLANS = (
    Plan("Llama-3-8B", 4096, 14336, 32, shards=8, parts=1),
    Plan("Llama-3-70B", 8192, 28672, 80, shards=8, parts=8),
    Plan("Llama-3-405B", 16384, 53248, 126, shards=128, parts=8),
)


def table(head: str, rows: list[tuple[str, list[str]]]) -> str:
    lines = [f"| {head} | " + " | ".join(f"{p.gpus} GPUs: {p.name}" for p in PLANS) + " |"]
    lines.append("|" + "---|" * (len(PLANS) + 1))
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]) + "\n"


def gb(values: list[float]) -> list[str]:
    return [f"{v / 1e9:.1f} GB" if v < 1e11 else f"{v / 1e9:.0f} GB" for v in values]


def ms(values: list[float]) -> list[str]:
    return [f"{v * 1e3:,.0f} ms" if v >= 0.01 else f"{v * 1e3:.1f} ms" for v in values]


def model() -> str:
    return table(
        "",
        [
            ("FSDP x tensor parallel", [f"{p.shards} x {p.parts}" for p in PLANS]),
            ("parameters", [f"{p.params / 1e9:.1f} billion" for p in PLANS]),
            ("of them feed-forward", [f"{p.ffn / p.params:.0%}" for p in PLANS]),
        ],
    )


def rates() -> str:
    return (
        "| dense products | sparse products | packing |\n|---|---|---|\n"
        f"| {H200.dense:g} TFLOP/s | {H200.sparse:g} TFLOP/s | {H200.packing:g} TB/s |\n"
    )


def memory() -> str:
    return table(
        "bytes on each GPU",
        [
            ("master, gradient, Adam (16 an entry)", gb([16 * p.params / p.gpus for p in PLANS])),
            ("packed W and W^T, as they are kept now", gb([2 * PACKED * p.ffn / p.parts for p in PLANS])),
            ("packed W and W^T, if each rank kept its shard", gb([2 * PACKED * p.ffn / p.gpus for p in PLANS])),
            ("masks in a checkpoint, all of them", gb([p.ffn / 8 for p in PLANS])),
        ],
    )


def moved() -> str:
    now = [p.gathers(2, 2) for p in PLANS]
    packed = [p.gathers(PACKED, PACKED) for p in PLANS]
    once = [p.gathers(2, 0) for p in PLANS]
    return table(
        "bytes that one GPU receives in a step",
        [
            ("FSDP, gathers for forward and backward", gb(now)),
            ("FSDP, sums of gradients in fp32", gb([p.sent(p.params, 4) for p in PLANS])),
            ("tensor parallelism", gb([p.tensor_parallel() for p in PLANS])),
            ("gathers if feed-forward weights were sent packed", gb(packed)),
            ("... saved", [f"{1 - a / b:.0%}" for a, b in zip(packed, now, strict=True)]),
            ("gathers if no backward gathered feed-forward weights", gb(once)),
            ("... saved", [f"{1 - a / b:.0%}" for a, b in zip(once, now, strict=True)]),
        ],
    )


def time() -> str:
    return table(
        "time in a step",
        [
            ("products with weights, dense", ms([p.matmuls(False) for p in PLANS])),
            ("the same, feed-forward layers sparse", ms([p.matmuls(True) for p in PLANS])),
            ("FSDP's gathers now", ms([p.gathers(2, 2) / p.link for p in PLANS])),
            ("FSDP's gathers, packed", ms([p.gathers(PACKED, PACKED) / p.link for p in PLANS])),
            ("FSDP's sums", ms([p.sent(p.params, 4) / p.link for p in PLANS])),
            ("tensor parallelism", ms([p.tensor_parallel() / NVLINK for p in PLANS])),
            ("packing, all layers, as now", ms([p.packing(p.ffn) for p in PLANS])),
            ("packing, each rank its shard", ms([p.packing(p.ffn / p.shards) for p in PLANS])),
            ("one layer: gather of the next", ms([p.sent(p.layer, 2) / p.link for p in PLANS])),
            ("one layer: packing of this", ms([p.packing(p.layer_ffn) for p in PLANS])),
        ],
    )


TABLES = {"model": model, "rates": rates, "memory": memory, "moved": moved, "time": time}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=PAGE)
    made = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], PAGE.read_text())
    p.parse_args().out.write_text(made)
