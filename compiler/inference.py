"""Inference: weights that came 2:4 are packed once, for the forward alone, with the zeros they have as their mask.

Such a weight need be 2:4 along in_features only; no transpose of it is packed. A graph is one of inference where it
computes no gradient and some weight of it is 2:4 already: what is not 2:4 there stays dense, since nothing may change
the numbers of a finished model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..kernels import choice, layout, providers
from ..kernels.providers import Problem
from ..passes.find import Linear
from ..passes.parallel import is_dtensor
from . import operands, weights
from .fsdp import shard_of
from .recipe import Recipe
from .weights import SparseWeight, stamp

#: How the reason begins of a layer that is dense because its forward is faster so. Training decides for itself.
SLOWER = "dense is faster in the forward"
NOT_TWO_FOUR = "it is not 2:4 along in_features, and no gradient is computed that could train it so"


class PrunedWeight(SparseWeight):
    """A parameter that came 2:4 along in_features. It is followed: packed anew when its entries change, and dense,
    with the reason, while they are not 2:4.
    """

    pruned = True

    def __init__(self, param: Tensor, name: str, recipe: Recipe, transposed: bool) -> None:
        super().__init__(param, name, recipe)
        self.transposed, self.phase = transposed, "sparse"
        self.follow()

    def mask(self) -> Tensor:
        """bool of the parameter's shape: its nonzero entries, and zeros where a group of four has fewer than two.

        Raises ValueError where the weight is not 2:4.
        """
        mask = layout.mask_of(rows_of(self.param, self.transposed))
        if mask is None:
            raise ValueError(f"sparse24: {self.name} has no mask: {NOT_TWO_FOUR}")
        return mask.t() if self.transposed else mask

    def follow(self) -> None:
        """Look again where the parameter was changed, by a loaded checkpoint for instance."""
        now = stamp(self.param)
        if self._packed_from == now:
            return
        self._packed_from = now
        if not two_four(self.param, self.transposed):
            self.to_dense()
            self.reason_skipped = NOT_TWO_FOUR
        elif self.reason_skipped is not None:
            self.reason_skipped, self.phase = None, "sparse"

    def _keep_mask(self) -> None:
        for key, rows in list(self.operands.items()):
            for weight in rows.weights:
                weight.operands.pop(key, None)


class Rows:
    """The packed form of weights that are multiplied as one, without a transpose: their out_features stand in order."""

    def __init__(self, members: Sequence[SparseWeight], dtype: torch.dtype, transposed: bool) -> None:
        self.weights, self.transposed, self.dtype = tuple(members), transposed, dtype
        shapes = [rows_of(w.param, transposed).shape for w in members]
        rows = sum(shape[0] for shape in shapes)
        self.packed = layout.empty(rows, shapes[0][1], dtype, members[0].param.device)
        self._nothing = self.packed.new_empty(0)
        self._packed_from: list[tuple[int, int]] | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """(packed W [out, in], nothing [0]): what the rewritten graph takes."""
        return self.packed, self._nothing

    @property
    def forward_inputs(self) -> tuple[Tensor, Tensor]:
        return self.inputs

    @property
    def up_to_date(self) -> bool:
        return self._packed_from == [stamp(w.param) for w in self.weights]

    def follow(self) -> None:
        """Pack where the weights changed since, into the same memory: CUDA graphs know its address."""
        if not self.up_to_date:
            dense = torch.cat([rows_of(w.masked(), self.transposed) for w in self.weights])
            mask = torch.cat([rows_of(w.mask(), self.transposed) for w in self.weights])
            self.packed.copy_(layout.pack(dense.to(self.dtype), mask, layout.metadata_order(dense.device)))
            self._packed_from = [stamp(w.param) for w in self.weights]


def operand_of(members: tuple[SparseWeight, ...], dtype: torch.dtype, transposed: bool) -> Any:
    """The operand of these weights, pruned ones or ones in training, for a forward without a backward; up to date."""
    found = members[0].operands.get((dtype, transposed, *[w.layer for w in members]))
    alike = all(w.pruned == members[0].pruned for w in members)
    if found is not None and alike and (not members[0].pruned or found.up_to_date):
        return found
    return _make_operand(members, dtype, transposed)


@torch.inference_mode(False)  # a tensor made in inference mode could not be written again outside of it
@torch.no_grad()
def _make_operand(members: tuple[SparseWeight, ...], dtype: torch.dtype, transposed: bool) -> Any:
    """Make the operand, or bring it up to date."""
    holder = next((w for w in members if w.pruned), None)
    if holder is None:
        return operands.operand_of(members, dtype, transposed)
    for weight in members:
        if not weight.pruned:
            operands.operand_of((weight,), dtype, transposed)  # which gives it its mask
    key = (dtype, transposed, *(w.layer for w in members))
    rows = holder.operands.get(key)
    if rows is None or rows.packed.device != holder.param.device:
        rows = Rows(members, dtype, transposed)
        for weight in members:
            if weight.pruned:
                weight.operands[key] = rows
    rows.follow()
    return rows


# ------------------------------------------------------------------------------------------------------------- deciding


def forward_only(gm: GraphModule, args: Sequence[Any]) -> bool:
    """Whether a graph computes no gradient; Dynamo guards on what this rests on."""
    if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return True
    switches = (n for n in gm.graph.nodes if n.target is torch._C._set_grad_enabled)
    return not torch.is_grad_enabled() and not any(n.args[0] for n in switches)


def rows_of(w: Tensor, transposed: bool) -> Tensor:
    """A weight, or its mask, as [out_features, in_features]."""
    return w.detach().t() if transposed else w.detach()


def two_four(param: Tensor, transposed: bool) -> bool:
    """Whether a matrix is 2:4 along in_features, and not all zero: such a layer is not initialized, or switched off."""
    w = rows_of(param, transposed)
    if w.shape[1] % 4 or layout.mask_of(w[:64]) is None:  # most are not, and are told apart by a few rows
        return False
    return layout.mask_of(w) is not None and bool((w != 0).any())


def is_ready(param: Tensor, linear: Linear) -> bool:
    """Whether an eligible weight is to be multiplied as it is: 2:4, not in training, and whole on this rank."""
    whole = shard_of(param) is None and not is_dtensor(param)
    return whole and not in_training(param) and two_four(param, linear.transposed)


def in_training(param: Tensor) -> bool:
    """Whether a graph trains a parameter sparse, or is to."""
    known = weights.get(param)
    return "step" in weights.waiting(param) or (known is not None and known.reason_skipped is None and not known.pruned)


def why_dense(linear: Linear, together: int, recipe: Recipe, device: torch.device) -> str | None:
    """Why a weight that is ready stays dense, None where it does not: judged by the forward alone.

    together: out_features of the matmul that it and its neighbours become.
    """
    if recipe.when == "always":
        return None
    slow = providers.why_slow(linear.out_features, linear.in_features, linear.dtype, device)
    if slow is not None:
        return slow
    found = choice.choose(Problem("spmm", together, linear.in_features, linear.tokens, linear.dtype, device))
    if found.ms >= found.dense_ms:  # nan on a CPU: nothing was measured
        return f"{SLOWER}, {found.dense_ms:.2f} ms against {found.ms:.2f} ms"
    return None


def attach(param: Tensor, linear: Linear, recipe: Recipe) -> SparseWeight:
    """What is known of the weight of an inference graph, up to date; a PrunedWeight where it is not in training."""
    weight = weights.get(param)
    if weight is None or (weight.reason_skipped is not None and not weight.pruned):
        weight = PrunedWeight(param, linear.name, recipe, linear.transposed)
        weights.register(param, weight)
    if weight.pruned:
        weight.follow()
    return weight
