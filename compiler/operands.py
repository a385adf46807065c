"""Operand: the packed forms of weights that are multiplied as one, which graphs take as inputs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import layout, ops
from . import soft
from .errors import NotFiniteError

if TYPE_CHECKING:
    from .weights import SparseWeight


class Operand:
    """The packed forms of one or several weights that are multiplied as one: their rows (out_features) stand in order.

    packed [rows, cols] and packed_t [cols, rows] are of the matrix as stored; where `transposed` (weights [in, out])
    the weights stand side by side along the columns, and packed_t is what the forward multiplies.
    """

    def __init__(self, weights: Sequence["SparseWeight"], dtype: torch.dtype, transposed: bool) -> None:
        self.weights, self.transposed = tuple(weights), transposed
        shapes = [w.shape for w in weights]
        along, self.rows, self.cols = 1 if transposed else 0, shapes[0][0], shapes[0][1]
        total = sum(shape[along] for shape in shapes)
        self.rows, self.cols = (self.rows, total) if transposed else (total, self.cols)
        self._origin: dict[int, tuple[int, int]] = {}
        offset = 0
        for weight, shape in zip(weights, shapes, strict=True):
            self._origin[id(weight)] = (0, offset) if transposed else (offset, 0)
            offset += shape[along]
        device = weights[0].param.device
        self.packed = layout.empty(self.rows, self.cols, dtype, device).zero_()
        self.packed_t = layout.empty(self.cols, self.rows, dtype, device).zero_()
        self._nothing = self.packed.new_empty(0)

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """(packed W [out, in], packed W^T [in, out]): what the rewritten graph takes."""
        return (self.packed_t, self.packed) if self.transposed else (self.packed, self.packed_t)

    @property
    def forward_inputs(self) -> tuple[Tensor, Tensor]:
        """The same without W^T, [0], for a graph that computes no gradient."""
        return self.inputs[0], self._nothing

    def where(self, weight: "SparseWeight") -> tuple[int, int, int, int]:
        """row, col, rows, cols: where the weight's block stands."""
        return (*self._origin[id(weight)], self.rows, self.cols)

    def block(self, weight: "SparseWeight") -> layout.Block:
        return layout.Block(weight.held, self.packed, self.packed_t, *self.where(weight))

    def trained_block(self, weight: "SparseWeight") -> layout.Block:
        """The block of what this rank trains: of the weight, or of its rows of it."""
        if weight.shard is None:
            return self.block(weight)
        row, col, rows, cols = self.where(weight)
        local, first = weight.shard.local, weight.shard.first
        return layout.Block(local, self.packed, self.packed_t, row + first, col, rows, cols)

    def nibbles(self, weight: "SparseWeight") -> Tensor:
        row, col, rows, cols = self.where(weight)
        metadata = layout.split(self.packed, rows, cols)[1]
        nibbles = layout.read_nibbles(metadata, rows, cols, layout.metadata_order(self.packed.device))
        return nibbles[row : row + weight.shape[0], col // 4 : (col + weight.shape[1]) // 4].contiguous()

    def put_mask(self, weight: "SparseWeight", nibbles: Tensor) -> None:
        row, col, rows, cols = self.where(weight)
        order = layout.metadata_order(self.packed.device)
        across = layout.nibbles_from_mask(layout.mask_from_nibbles(nibbles).t().contiguous())
        layout.write_nibbles(layout.split(self.packed, rows, cols)[1], nibbles, row, col, rows, cols, order)
        layout.write_nibbles(layout.split(self.packed_t, cols, rows)[1], across, col, row, cols, rows, order)


def operand_of(weights: tuple["SparseWeight", ...], dtype: torch.dtype, transposed: bool) -> Operand | soft.SoftOperand:
    """The operand of these weights, made where there is none: with the masks in force, searched where there are
    none.
    """
    key = (dtype, transposed, *(w.layer for w in weights))
    operand = weights[0].operands.get(key)
    if operand is None and weights[0].soft:
        operand = soft.SoftOperand(weights, dtype, transposed)
        for weight in weights:
            weight.operands[key] = operand
        check_stats(weights, soft.pack(weights).tolist())
    elif operand is None:
        operand = Operand(weights, dtype, transposed)
        for weight in weights:
            nibbles = weight._nibbles()
            if nibbles is not None:
                operand.put_mask(weight, nibbles.to(operand.packed.device))
            search = nibbles is None or weight.search_due
            stats = ops.pack_weights_([operand.block(weight)], search).tolist()
            check_stats([weight], stats)
            weight.note_search(stats[0][0])
        for weight in weights:
            weight.operands[key] = operand
            weight._last_mask = None
            weight.note_packed()
    return operand


def pack(weights: Sequence["SparseWeight"], search: bool) -> Tensor:
    """Bring all packed forms of weights on one device up to their masters, with the masks in force or with new ones.

    Each weight has at least one operand, and all are of one recipe. Returns `ops.pack_weights_`'s statistics, int64
    [weights, 2].
    """
    if weights[0].soft:
        return soft.pack(weights)
    blocks = [[operand.block(weight) for operand in weight.operands.values()] for weight in weights]
    stats = ops.pack_weights_([block for own in blocks for block in own], search)
    for weight in weights:
        weight.note_packed()
    if len(stats) > len(weights):  # some weight is multiplied in two dtypes: its forms tell the same
        first = [sum(len(own) for own in blocks[:i]) for i in range(len(weights))]
        stats = stats[first]
    return stats


def check_stats(weights: Sequence["SparseWeight"], stats: Sequence[Sequence[int]], step: int | None = None) -> None:
    """Raise NotFiniteError that names the first weight whose packing met NaN."""
    for weight, (_, nans) in zip(weights, stats, strict=True):
        if nans:
            entries = weight.shape[0] * weight.shape[1]
            raise NotFiniteError(
                f"sparse24: {weight.name} has {nans} NaN of {entries} entries after optimizer step "
                f"{weight.step if step is None else step}; need finite weights (look at the learning rate and the loss "
                "of the steps before, and continue from the last checkpoint)"
            )
