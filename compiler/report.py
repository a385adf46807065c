"""What explain found: a row for each linear layer, totals, and the graphs; as a table and as a page."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import GraphModule

from ..kernels import cost
from ..kernels.cost import Cost
from .export import replace
from .page import page
from .recipe import Recipe
from .session import Session

_DIRECTIONS = ("forward", "dgrad", "wgrad", "packing")


@dataclass(frozen=True, slots=True)
class Row:
    """One linear layer, or another parameter of a product (a stack of experts).

    name: of the parameter. shape: (out_features, in_features), the last two dimensions of a stack. role: up, gate,
    down, gate_up; q, k, v (kv, qkv), o; experts; head (the last of the model); linear for any other. reason: None for a
    sparse one, else why it stays dense. tokens: rows of its input, 0 where it has none. dtype: what it computes in,
    autocast included. together: the parameters that it is multiplied with as one, itself included. cost: its part of
    their ms a step; None where its tokens are not known. dense_bytes,
    packed_bytes: of the parameter, and of the packed W and W^T beside it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str | None
    tokens: int
    dtype: torch.dtype
    together: tuple[str, ...]
    cost: Cost | None
    dense_bytes: int
    packed_bytes: int

    @property
    def sparse(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Report:
    """What `explain` found. str() is a table; graphs: {"original": Dynamo's graphs, "sparse": the same, rewritten}.

    gpu: whose rates the predicted times rest on. other_ms: predicted ms a step of what is neither linear nor
    elementwise: attention's products and a fused AdamW.
    """

    rows: tuple[Row, ...]
    recipe: Recipe
    device: torch.device
    gpu: str
    other_ms: float
    graphs: dict[str, list[GraphModule]]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def gains(self, row: Row) -> bool:
        """Whether a row's layer would be sparse on `gpu`: it can be, and is faster so or wanted so."""
        return row.sparse and row.cost is not None and (row.cost.faster or self.recipe.when == "always")

    @property
    def dense_ms(self) -> float:
        """ms a step of all linears, dense."""
        return sum(row.cost.dense.total for row in self.rows if row.cost)

    @property
    def sparse_ms(self) -> float:
        """The same with the layers that gain sparse."""
        return sum((row.cost.sparse if self.gains(row) else row.cost.dense).total for row in self.rows if row.cost)

    @property
    def step_gain(self) -> float:
        """How many times faster a training step becomes. Norms, activations, embeddings and the loss are left out, so
        that it is a little too high; 1.0 where nothing is known.
        """
        sparse = self.sparse_ms + self.other_ms
        return (self.dense_ms + self.other_ms) / sparse if sparse else 1.0

    def table(self) -> str:
        return str(self)

    def html(
        self,
        path: str | os.PathLike[str],
        session: Session | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Write one page that needs no network: the model with what changed, the table, and the graphs as captured,
        forward and backward, side by side, searchable, with what comes from the same line of code linked.

        session: of the model in training; adds pictures of its masks and its last flip rates. history: what
        `session.metrics()` gave at some steps; adds their curves. The file is written whole or not at all.
        """
        text = page(self, session, history)
        replace(path, lambda temporary: _write(temporary, text), ".html")

    def __str__(self) -> str:
        header = ("parameter", "out x in", "role", "by", *_DIRECTIONS, "sum", "dense MB", "packed MB", "")
        body = [self._cells(row) for row in self.rows]
        widths = [max(len(cells[i]) for cells in (header, *body)) for i in range(len(header))]

        def line(cells: Sequence[str]) -> str:
            right = range(4, 11)
            padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths)))  # noqa: B905
            return "  ".join(padded).rstrip()

        return "\n".join([line(header), *map(line, body), "", *self.summary()])

    def _cells(self, row: Row) -> tuple[str, ...]:
        by, times, note = "dense", [""] * 5, row.reason or ""
        if row.cost is not None:
            dense, sparse = row.cost.dense, row.cost.sparse
            pairs = [(getattr(dense, name), getattr(sparse, name)) for name in _DIRECTIONS]
            pairs.append((dense.total, sparse.total))
            times = [f"{d:.3f} > {s:.3f}" if row.sparse else f"{d:.3f}" if d else "" for d, s in pairs]
            times[3] = f"{sparse.packing:.3f}" if row.sparse else ""
        if row.sparse:
            by = " ".join(dict.fromkeys(row.cost.providers)) if row.cost else ""
            if row.cost is not None and not row.cost.faster:
                so = ", so it would stay dense" if self.recipe.when == "faster" else ""
                note = f"dense is faster on {self.gpu}{so}"
        size = f"{row.dense_bytes / 1e6:.2f}", f"{row.packed_bytes / 1e6:.2f}" if row.packed_bytes else ""
        return (row.name, " x ".join(map(str, row.shape)), row.role, by, *times, *size, note)

    def described(self, row: Row) -> dict[str, str]:
        """What is known of one row, in words; empty where there is nothing to say."""
        names = ("parameter", "out x in", "role", "by", *(f"{name} ms" for name in _DIRECTIONS), "sum ms")
        cells = dict(zip((*names, "dense MB", "packed MB", "note"), self._cells(row), strict=True))
        tokens = str(row.tokens) if row.tokens else ""
        together = ", ".join(name for name in row.together if name != row.name)
        return {**cells, "tokens": tokens, "in": str(row.dtype).removeprefix("torch."), "in one product with": together}

    def summary(self) -> list[str]:
        """The lines below the table: what is sparse, totals, and what they rest on."""
        sparse = [row for row in self.rows if row.sparse]
        measured = [row for row in self.rows if row.cost and row.cost.measured]
        how = f"measured for {len(measured)} layers, else predicted" if measured else "predicted"
        lines = [
            f"{len(sparse)} of {len(self.rows)} are sparse; a > b: ms a training step dense > sparse, {how} for "
            f"{self.gpu} in 16-bit types",
            f"linear layers {self.dense_ms:.2f} > {self.sparse_ms:.2f} ms, attention and optimizer "
            f"{self.other_ms:.2f} ms: the step gains {self.step_gain:.2f}x, a little less with all that is elementwise",
            f"bytes: {sum(r.dense_bytes for r in self.rows) / 1e6:.1f} MB dense, "
            f"{sum(r.packed_bytes for r in sparse) / 1e6:.1f} MB packed beside them",
        ]
        if any(r.sparse and r.cost and not r.cost.measured and min(r.shape) < cost.LARGE for r in self.rows):
            lines.append(f"predictions are for widths from {cost.LARGE} on: narrower layers gain less than they say")
        if self.device.type == "cpu":
            lines.append("on this CPU every sparse layer runs by masked dense matmuls: right, and slower than dense")
        return lines


def _write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")
