"""SparseWeight: what is known of one dense master parameter, and the registry of them.

The registry has weak keys: parameters stay ordinary, carry no attribute of ours, and are forgotten when they die.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..kernels import layout, ops
from ..kernels import soft as soft24
from ..passes.parallel import is_dtensor
from . import fsdp, shards
from .errors import OptionError, StateError
from .operands import check_stats, pack
from .recipe import Recipe

log = logging.getLogger("sparse24")

#: How the reason begins of a layer that is dense because that was measured to be faster: a choice, not a defect.
SLOWER = "dense is faster here"

_registry: Any = WeakTensorKeyDictionary()  # parameter -> SparseWeight
_pending: Any = WeakTensorKeyDictionary()  # parameter -> state that waits for its SparseWeight
_layers = 0  # weights made so far: gives each its own stream of random draws


class SparseWeight:
    """One dense master parameter and its 2:4 forms.

    name: the parameter's name as its graph spells it. reason_skipped: None, or why the weight stays dense. step:
    optimizer steps that changed it while it was registered. phase: "sparse" or "dense". flips: mask bits that changed
    at the last refresh (None before the first). wgrad: "mvue" or "dense", what its weight gradient is taken from.
    pruned: it came 2:4 and is only multiplied, never trained (`inference.PrunedWeight`). scale: beta of recipe "s-ste"
    (None before the first forward).
    """

    pruned = False

    def __init__(self, param: Tensor, name: str, recipe: Recipe, reason_skipped: str | None = None) -> None:
        global _layers
        self._param = TensorWeakRef(param)
        self.name, self.recipe, self.reason_skipped = name, recipe, reason_skipped
        self.split = is_dtensor(param)  # by tensor parallelism: this rank multiplies by a part of it
        self.shape: tuple[int, ...] = tuple(shards.local(param).shape)  # of that part
        self.wgrad = "dense"
        self.step = 0
        self.calls = 0  # forwards with gradients since the last optimizer step: the micro-step, part of every seed
        self.flips: int | None = None
        self.layer = 0
        self.phase = "dense"
        self.operands: dict[object, Any] = {}  # of `operands`; of `inference.Rows` where it is pruned
        self._packed_from: tuple[int, int] | None = None
        self._last_mask: Tensor | None = None  # nibbles, two a byte, while no operand holds them
        self._counted: Tensor | None = None  # likewise, the mask of the last count where flips are counted apart
        self.scale: float | None = None
        self.transposed = False  # of "s-ste": the parameter is stored [in, out]
        self.shard = fsdp.shard_of(param)  # of FSDP: what the optimizer holds in the parameter's place
        self.search_due = False  # of FSDP: the next forward, which gathers the weight, searches its mask
        if reason_skipped is None:
            self.layer, _layers = _layers, _layers + 1
            self.phase = "dense" if recipe.dense_after == 0 or recipe.sparse_after else "sparse"

    @property
    def param(self) -> Tensor:
        """The dense master."""
        param = self._param()
        if param is None:
            raise ReferenceError(f"sparse24: the parameter {self.name} no longer exists")
        return param

    @property
    def master(self) -> Tensor:
        """What the optimizer holds: the parameter itself or, under FSDP, the DTensor of its shards."""
        return self.param if self.shard is None else self.shard.param

    @property
    def held(self) -> Tensor:
        """What this rank multiplies by, dense and detached: the parameter or, of a DTensor, its part."""
        return shards.local(self.param)

    @property
    def sparse(self) -> bool:
        return self.phase == "sparse"

    @property
    def decided(self) -> bool:
        """Whether sparse or dense was a choice by speed, or is in force already, and so is not to be made again."""
        return self.reason_skipped is None or self.reason_skipped.startswith(SLOWER)

    @property
    def soft(self) -> bool:
        """Whether it is multiplied as beta * soft24(W) and not as W.M."""
        return self.recipe.recipe == "s-ste" and not self.pruned

    def rows(self) -> Tensor:
        """The master as [out_features, in_features]; of "s-ste"."""
        return self.held.t() if self.transposed else self.held

    def mask(self) -> Tensor:
        """bool of the parameter's shape ([out, in] for nn.Linear), True where kept. In the dense phase: the last mask.
        With recipe "s-ste" what soft24 keeps of the weight as it is now, in either phase. Of a DTensor: a DTensor.

        Raises ValueError where the weight was never sparse.
        """
        if self.scale is not None:
            mask = self._found_mask()
            return mask.t() if self.transposed else mask
        nibbles = self._nibbles()
        if nibbles is None:
            raise ValueError(f"sparse24: {self.name} has no mask: {self.reason_skipped or 'it was never sparse'}")
        return shards.like(layout.mask_from_nibbles(nibbles), self.param)

    def masked(self) -> Tensor:
        """W.M, of the parameter's shape and dtype; with recipe "s-ste" beta * soft24(W). Raises as `mask` does, and
        ValueError under FSDP: no rank has all of W between forwards.
        """
        if self.shard is not None:
            raise ValueError(
                f"sparse24: {self.name} is sharded by FSDP, need it whole: multiply its full_tensor() with mask()"
            )
        if self.scale is None:
            return self.param.detach() * self.mask()
        soft = (soft24.soft24(self.rows())[0] * self.scale).to(self.param.dtype)
        return soft.t() if self.transposed else soft

    def _found_mask(self) -> Tensor:
        """bool of the shape of `rows`: the mask that a search finds now, whatever is in force."""
        return soft24.mask_of(self.rows()) if self.soft else ops.best_mask(self.held)

    @property
    def counts_apart(self) -> bool:
        """Whether flips are counted on masks that no operand holds: S-STE's, and virtual ones in the dense phase."""
        return self.soft if self.sparse else self.recipe.virtual_flips and self.reason_skipped is None

    def count_flips(self) -> Tensor | None:
        """Search a mask and count what changed since the last count, int64 []; None where it is the first."""
        before = self._counted if self._counted is not None else self._last_mask
        self._counted = _pair(layout.nibbles_from_mask(self._found_mask()))
        if before is None:
            return None
        now, last = (layout.mask_from_nibbles(_unpair(m.to(self.param.device))) for m in (self._counted, before))
        return (now ^ last).sum()

    @property
    def counted(self) -> bool:
        """Whether there is a mask to count flips from."""
        return self._counted is not None or self._last_mask is not None

    # ------------------------------------------------------------------------------------------------- its packed forms

    def _nibbles(self) -> Tensor | None:
        """uint8 [rows, cols / 4] of the mask in force, None before the first search."""
        if self.soft:
            return None  # a function of the weight, not a state
        for operand in self.operands.values():
            return operand.nibbles(self)
        return None if self._last_mask is None else _unpair(self._last_mask)

    def note_packed(self) -> None:
        self._packed_from = self._stamp()

    def follow(self) -> None:
        """Repack where the master was changed by something other than an optimizer step, such as a loaded checkpoint;
        under FSDP by an optimizer step too, since only a forward has the whole weight.

        Before the first step the mask is searched anew; after it the mask in force is kept.
        """
        param = self.param
        if not self.operands or self._packed_from == self._stamp():
            return
        if any(operand.packed.device != param.device for operand in self.operands.values()):
            self._keep_mask()
            return
        stats = pack([self], search=self.step == 0 or self.search_due).tolist()
        check_stats([self], stats)
        self.note_search(stats[0][0])

    def note_search(self, flips: int) -> None:
        """A forward has packed the weight, and searched its mask where that was due."""
        if self.search_due:
            self.flips, self.search_due = flips, False

    def _stamp(self) -> tuple[int, int]:
        """What changes when the master does: what FSDP gathers shows nothing of it."""
        if self.shard is None and not self.split:
            return stamp(self.param)
        held = self.held if self.shard is None else self.shard.local
        return (self.master._version + held._version, held.data_ptr())

    def advance(self) -> None:
        """Count an optimizer step that changed the master; the last one of the sparse phase drops the packed forms."""
        self.step, self.calls = self.step + 1, 0
        if self.step == self.recipe.sparse_after and self.recipe.dense_after != 0:
            self.to_sparse()
        if self.step == self.recipe.dense_after:
            self.to_dense()

    @property
    def refresh_due(self) -> bool:
        """Whether the mask is to be searched anew after the step just counted."""
        return self.step % self.recipe.refresh_every == 0

    def _keep_mask(self) -> None:
        """Drop the packed forms and keep the mask, in 1/8 byte an entry."""
        nibbles = self._nibbles()
        if nibbles is not None:
            self._last_mask = _pair(nibbles)
        for key, operand in list(self.operands.items()):
            for weight in operand.weights:
                if weight is not self and weight.operands.get(key) is operand:
                    del weight.operands[key]
                    if not weight.operands and weight.sparse and not weight.soft:
                        weight._last_mask = _pair(operand.nibbles(weight))
        self.operands = {}

    def forget(self) -> None:
        """Drop packed forms, masks and counts: another kind of recipe makes its own."""
        self._keep_mask()
        self._last_mask, self._counted, self.scale, self.flips = None, None, None, None

    def to_dense(self) -> None:
        self._keep_mask()
        self.phase, self.flips, self._counted = "dense", None, None

    def to_sparse(self) -> None:
        """Back to 2:4, with a mask searched anew at the next forward."""
        if self.reason_skipped is None and not self.sparse:
            self.phase, self._last_mask, self._counted, self.flips = "sparse", None, None, None

    # ----------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on. Masks are whole; where the parameter is a DTensor, this is a collective of the
        ranks that hold it.
        """

        def whole(pairs: Tensor | None) -> Tensor | None:
            return None if pairs is None else shards.gather(pairs, self.param).cpu()

        nibbles = self._nibbles()
        return {
            "shape": list(self.param.shape),
            "step": self.step,
            "calls": self.calls,
            "layer": self.layer,
            "wgrad": self.wgrad,
            "phase": self.phase,
            "flips": None if self.flips is None else self.flips * self._parts,
            "mask": whole(None if nibbles is None else _pair(nibbles)),
            "counted": whole(self._counted),
            "scale": self.scale,
            "transposed": self.transposed,
            "search_due": self.search_due,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state of `state()`; a state may be partial."""
        if self.reason_skipped is not None:
            raise StateError(
                f"sparse24: the loaded state holds {self.name} as sparse, but here it stays dense: "
                f"{self.reason_skipped}"
            )
        for key in ("step", "calls", "layer", "wgrad", "phase", "flips", "scale", "transposed", "search_due"):
            setattr(self, key, state.get(key, getattr(self, key)))
        counted, mask = state.get("counted"), state.get("mask")
        if counted is not None:
            self._counted = shards.part_of(counted, self.param).to(self.param.device)
        if state.get("flips") is not None:
            # as if every rank had seen as many; the next refresh counts its own
            self.flips = state["flips"] // self._parts
        if mask is not None:
            self._keep_mask()
            self._last_mask = shards.part_of(mask, self.param).to(self.param.device)
        elif not self.sparse or self.soft:
            self._keep_mask()

    @property
    def _parts(self) -> int:
        """How many parts as large as this rank's make the parameter."""
        return self.param.numel() // max(math.prod(self.shape), 1)


def stamp(param: Tensor) -> tuple[int, int]:
    """What changes when a parameter's entries do. A tensor made in inference mode counts no versions."""
    return (0 if param.is_inference() else param._version, param.data_ptr())


def _pair(nibbles: Tensor) -> Tensor:
    pairs = nibbles.view(nibbles.shape[0], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpair(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), -1).view(pairs.shape[0], -1)


# ------------------------------------------------------------------------------------------------------------- registry


def get(param: Tensor) -> SparseWeight | None:
    """The SparseWeight of a parameter, None where no compiled graph has met it."""
    found: SparseWeight | None = _registry.get(param)
    return found


def register(param: Tensor, weight: SparseWeight) -> None:
    """Make `weight` what is known of a parameter, and of the shards that FSDP gathers it from."""
    if weight.reason_skipped is None:
        how = "FSDP" if weight.shard is not None else "tensor parallelism" if weight.split else None
        for name, needed in (("recipe", "fst"), ("virtual_flips", False)):
            found = getattr(weight.recipe, name)
            if how is not None and found != needed:
                raise OptionError(f"sparse24: found option {name}={found!r} with {how}, need {needed!r} there")
    _registry[param] = weight
    if weight.shard is not None:
        _registry[weight.shard.param] = weight


def attach(param: Tensor, name: str, recipe: Recipe, wgrad: str) -> SparseWeight:
    """The SparseWeight of a parameter that a graph wants sparse, whose weight gradient it takes by `wgrad`. The recipe
    of the last compilation is in force.
    """
    weight = get(param)
    state = waiting(param)
    if state:
        check_recipe(state.get("recipe"), recipe)
        del _pending[_held(param)]
    if weight is None or weight.reason_skipped is not None or weight.pruned:
        weight = SparseWeight(param, name, recipe)
        register(param, weight)
    elif weight.recipe != recipe:
        if weight.recipe.method() != recipe.method():
            log.warning("sparse24: %s was compiled with another recipe before; the new one is in force from here", name)
        if weight.recipe.recipe != recipe.recipe:
            weight.forget()
        weight.recipe = recipe
    if state:
        weight.load(state)
    weight.wgrad = wgrad
    return weight


def skip(param: Tensor, name: str, recipe: Recipe, reason: str) -> None:
    """Record that a graph leaves a parameter dense. One that another graph of the same recipe has made sparse stays
    so.
    """
    state = waiting(param)
    if state.get("reason") == reason:
        del _pending[_held(param)]
    elif "step" in state:
        raise StateError(f"sparse24: the loaded state holds {name} as sparse, but here it stays dense: {reason}")
    weight = get(param)
    if weight is None or weight.reason_skipped is not None or weight.recipe.method() != recipe.method():
        if weight is not None:
            weight.to_dense()
        register(param, SparseWeight(param, name, recipe, reason))


def expect(param: Tensor, state: dict[str, Any]) -> None:
    """Give a parameter its state now, or when a graph meets it."""
    weight = get(param)
    if weight is not None and not weight.pruned:
        check_recipe(state.get("recipe"), weight.recipe)
        weight.load(state)
    else:
        _pending[param] = state if "step" in state else {**_pending.get(param, {}), **state}


def waiting(param: Tensor) -> dict[str, Any]:
    """The state that waits for a parameter; empty where none does."""
    if not _pending:
        return {}
    state: dict[str, Any] = _pending.get(_held(param), {})
    return state


def _held(param: Tensor) -> Tensor:
    """What a user's model and optimizer hold of a parameter: itself or, under FSDP, the DTensor of its shards."""
    shard = fsdp.shard_of(param)
    return param if shard is None else shard.param


def check_recipe(saved: dict[str, Any] | None, recipe: Recipe) -> None:
    """Raise StateError that names what differs between a saved recipe and the one in force."""
    if saved is None:
        return
    now = recipe.method()
    saved = {**Recipe().method(), **saved}  # a state of before an option existed was trained with its default
    differences = [f"{k}={saved.get(k)!r} (now {now[k]!r})" for k in now if saved.get(k) != now[k]]
    if differences:
        raise StateError(
            f"sparse24: the loaded state was trained with {', '.join(differences)}; compile with the same options, or "
            "load with strict=False to go on under the new ones"
        )
