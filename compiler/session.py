"""Session: what the user holds of a run. A view of the registry for one model; it keeps no state of its own."""

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import weights
from .errors import StateError
from .ranks import check_ranks
from .weights import SparseWeight

_FORMAT = 2


def session(model: Any) -> "Session":
    """The session of a model or of its compiled wrapper. May be asked for at any time, before the first forward too."""
    return Session(model)


def contents(state: Any) -> dict[str, Any]:
    """What a `Session.state_dict` holds, by weight: "recipe", "weights" (`SparseWeight.state`), "dense" (reasons)."""
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found == 1:
        return dict(state)  # the contents themselves: as states were written before
    if found != _FORMAT:
        raise StateError(f"sparse24: found session state of format {found!r}, need format {_FORMAT}")
    read: dict[str, Any] = torch.load(io.BytesIO(state["state"]), weights_only=True)
    return read


class Session:
    """The sparse training of one model.

    Layers become known when torch.compile first runs them; before that `weights` is empty, and `load_state_dict`,
    `to_dense` and `to_sparse` are kept for them.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"sparse24: found {type(model).__name__}, need an nn.Module or its compiled wrapper")
        self.model: nn.Module = getattr(model, "_orig_mod", model)

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """{parameter name: SparseWeight} of every linear met so far; those left dense say why in `reason_skipped`."""
        found = {}
        for name, param in self.model.named_parameters():
            weight = weights.get(param)
            if weight is not None:
                weight.name = name
                found[name] = weight
        return found

    def _sparse(self) -> Iterator[SparseWeight]:
        """The weights that take part, in either phase."""
        return (w for w in self.weights.values() if w.reason_skipped is None)

    @property
    def phase(self) -> str:
        """ "sparse" while any layer is, else "dense"."""
        return "sparse" if any(w.sparse for w in self._sparse()) else "dense"

    @property
    def step(self) -> int:
        """Optimizer steps taken with sparse layers known."""
        return max((w.step for w in self._sparse()), default=0)

    def flip_rate(self) -> float:
        """Share of mask bits that changed at the last refresh, pooled over the sparse layers (the paper's flip rate).

        Over `refresh_every` optimizer steps, in [0, 1]; 0.0 before the first refresh. In the dense phase, with
        virtual_flips=True: the virtual flip rate, of masks that a search would find and nothing is multiplied by.
        """
        refreshed = [w for w in self._sparse() if w.flips is not None]
        total = sum(w.shape[0] * w.shape[1] for w in refreshed)
        return sum(w.flips or 0 for w in refreshed) / total if total else 0.0

    def metrics(self, per_layer: bool = True) -> dict[str, float]:
        """Numbers to log: step, sparse (1.0 or 0.0), flip_rate, refresh_every, sparse_weights, dense_weights,
        memory/KIND (bytes, as `memory` names them) and, with per_layer, flip_rate/NAME of each sparse weight.
        """
        everything = self.weights
        sparse = {name: w for name, w in everything.items() if w.reason_skipped is None}
        numbers = {
            "step": float(self.step),
            "sparse": float(self.phase == "sparse"),
            "flip_rate": self.flip_rate(),
            "refresh_every": float(next(iter(sparse.values())).recipe.refresh_every if sparse else 0),
            "sparse_weights": float(len(sparse)),
            "dense_weights": float(len(everything) - len(sparse)),
        }
        numbers |= {f"memory/{kind}": float(size) for kind, size in self.memory().items()}
        if per_layer:
            numbers |= {f"flip_rate/{name}": (w.flips or 0) / (w.shape[0] * w.shape[1]) for name, w in sparse.items()}
        return numbers

    def memory(self) -> dict[str, int]:
        """Bytes on this rank by kind: dense masters of the sparse layers, their packed forms (W and W^T; with recipe
        "s-ste" S(W), packed and dense), masks kept without them.
        """
        known = list(self._sparse())
        operands = {id(o): o for w in known for o in w.operands.values()}.values()
        kept = [mask for w in known for mask in (w._last_mask, w._counted) if mask is not None]
        return {
            "masters": sum((w.held if w.shard is None else w.shard.local).nbytes for w in known),
            "packed": sum(o.inputs[0].nbytes for o in operands),
            "packed_t": sum(o.inputs[1].nbytes for o in operands),
            "masks": sum(m.nbytes for m in kept),
        }

    def check_ranks(self, group: Any = None) -> None:
        """Raise RankError where data-parallel ranks hold other weights, masks or options; it names the first parameter.

        A collective of `group` (by default all ranks), to be called between steps by all of them, every 100 steps for
        instance; nothing where torch.distributed is not initialized.
        """
        check_ranks(self.weights, group)

    def to_dense(self) -> None:
        """From the next forward on all layers are dense, without decay: the last phase of training."""
        self._expect_phase("dense")
        for weight in self._sparse():
            weight.to_dense()

    def to_sparse(self) -> None:
        """From the next forward on the layers are 2:4 again, with masks searched anew."""
        self._expect_phase("sparse")
        for weight in self._sparse():
            weight.to_sparse()

    def _expect_phase(self, phase: str) -> None:
        for param in self.model.parameters():
            if weights.get(param) is None:
                weights.expect(param, {"phase": phase})

    def state_dict(self) -> dict[str, Any]:
        """Everything beside model and optimizer that the next step depends on: masks, counters, phase, recipe, choices
        by speed.

        Restored in a new process with `load_state_dict`, a run goes on with the same numbers, on any number of ranks:
        masks are whole, and every rank gets all of them. A collective where weights are DTensors. {"format": int,
        "state": bytes}: torch.distributed.checkpoint reads into the keys that a session has before the first forward
        too, when no layer is known.
        """
        everything = self.weights
        known = {name: w for name, w in everything.items() if w.reason_skipped is None and not w.pruned}
        contents = {
            "recipe": {name: w.recipe.method() for name, w in known.items()},
            "weights": {name: w.state() for name, w in known.items()},
            "dense": {name: w.reason_skipped for name, w in everything.items() if w.reason_skipped and w.decided},
        }
        written = io.BytesIO()
        torch.save(contents, written)
        return {"format": _FORMAT, "state": written.getvalue()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over a `state_dict`, before or after the first forward, once the model holds its own weights.

        Raises StateError (a ValueError) that names the difference where the state is another model's or another
        recipe's; where layers are not known yet, a difference of recipe raises at the first forward. strict=False
        accepts another recipe and goes on under it.
        """
        state = contents(state)
        params = dict(self.model.named_parameters())
        for name, saved in state["weights"].items():
            if name not in params:
                raise StateError(f"sparse24: the state holds {name}, which this model does not have")
            if list(params[name].shape) != list(saved["shape"]):
                raise StateError(
                    f"sparse24: the state holds {name} with shape {tuple(saved['shape'])}, this model's is "
                    f"{tuple(params[name].shape)}"
                )
        for name, weight in self.weights.items():
            if weight.pruned:
                continue
            if weight.reason_skipped is None and name not in state["weights"]:
                raise StateError(f"sparse24: this model trains {name} sparse, which the state does not hold")
            if weight.reason_skipped is None and strict:
                weights.check_recipe(state["recipe"][name], weight.recipe)
        for name, reason in state["dense"].items():
            if name in params and weights.get(params[name]) is None:
                weights.expect(params[name], {"reason": reason, "wgrad": "dense"})
        for name, saved in state["weights"].items():
            recipe = {"recipe": state["recipe"][name]} if strict else {}
            weights.expect(params[name], {**saved, **recipe})
