"""The operand of recipe "s-ste": S(W) = beta * soft24(W) of one or several weights that are multiplied as one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import layout, soft

if TYPE_CHECKING:
    from .weights import SparseWeight


class SoftOperand:
    """packed [out, in], S(W) in its 2:4 form for the forward; dense [out, in], the same with its zeros for dgrad.

    Both are written anew, in place, at every optimizer step. The weights' rows (out_features) stand in order.
    """

    def __init__(self, weights: Sequence["SparseWeight"], dtype: torch.dtype, transposed: bool) -> None:
        self.weights, self.transposed = tuple(weights), transposed
        self._row: dict[int, int] = {}
        rows = 0
        for weight in weights:
            weight.transposed = transposed
            w = weight.rows()
            self._row[id(weight)] = rows
            rows += w.shape[0]
        self.dense = w.new_zeros(rows, w.shape[1], dtype=dtype)
        self.packed = layout.empty(rows, w.shape[1], dtype, w.device).zero_()

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """(packed S(W), dense S(W)): what the rewritten graph takes."""
        return self.packed, self.dense

    @property
    def forward_inputs(self) -> tuple[Tensor, Tensor]:
        """The same without the dense form, [0], for a graph that computes no gradient."""
        return self.packed, self.packed.new_empty(0)

    def renew(self, weight: "SparseWeight") -> Tensor:
        """Bring the rows of one weight up to its master. Returns its NaN count, int64 []."""
        assert weight.scale is not None
        return soft.pack_(weight.rows(), weight.scale, self.packed, self.dense, self._row[id(weight)])


def pack(weights: Sequence["SparseWeight"]) -> Tensor:
    """Bring all S(W) of weights on one device up to their masters: int64 [weights, 2], zero and the NaN count of each.

    beta is taken from the weights as they are before the first step, and is fixed from there on.
    """
    stats = []
    for weight in weights:
        if weight.scale is None or weight.step == 0:
            weight.scale = soft.best_scale(weight.rows())
        nans = [operand.renew(weight) for operand in weight.operands.values()]
        stats.append(torch.stack((torch.zeros_like(nans[0]), nans[0])))
        weight.note_packed()
    return torch.stack(stats)
