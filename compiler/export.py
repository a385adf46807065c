"""Leaving the backend: a plain module with W.M folded in, and the same as a safetensors file.

A mask keeps two of four along both dimensions of a weight, so that W.M is 2:4 along the dimension that the product
reduces over (1 for [out, in] weights, 0 for the [in, out] weights of torch.addmm) and along the other one too.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from .errors import StateError
from .inference import PrunedWeight
from .session import Session, session
from .verify import METADATA_KEY, measure, verify
from .weights import SparseWeight


def prune(model: nn.Module, masks: str = "current") -> nn.Module:
    """A copy of the model, or of the model inside a compiled wrapper, whose sparse weights hold W.M (or, with recipe
    "s-ste", beta * soft24(W)).

    The copy is an ordinary module of the model's own class, of the same dtypes, on the same devices, with the same
    parameter names but for `_orig_mod.` of compiled parts; tied parameters stay tied. Nothing of it is compiled, and no
    mask is attached: training it on fills the zeros again.

    masks: "current" takes the masks that are in force; "last" takes, for layers in the dense phase, the masks they had
    when it began. Weights trained on without masks lose what they learned there: the result is worse than a model
    whose training ended sparse.

    Raises StateError (a ValueError) where there is nothing sparse to export: a layer in its dense phase (but for
    masks="last"), no layer that was ever sparse, no mask yet; ValueError for another value of `masks`; TypeError for
    what is not an nn.Module.
    """
    return pruned(session(model), masks)[0]


def save_safetensors(model: nn.Module, path: str | os.PathLike[str], masks: str = "current") -> None:
    """Write what `prune(model, masks)` returns as a safetensors file, under the names of its state_dict.

    Of tied tensors one is written, as `safetensors.torch.save_model` does; `load_model` there reads the file. The
    metadata entry "sparse24" is JSON: {"format": 1, "two_four": {name: [dimension, ...]}}, where the dimension is the
    one that the layer reduces over, or both where that is not known (see docs/export.md).

    The file is read back before it gets its name: each listed tensor is 2:4 along its dimensions. Raises as `prune`
    does, StateError where the file read back is not 2:4, and ImportError where safetensors is not installed.
    """
    from safetensors.torch import save_model

    plain, dims = pruned(session(model), masks)
    entry = json.dumps({"format": 1, "two_four": {name: list(d) for name, d in dims.items()}})

    def write(temporary: str) -> None:
        save_model(plain, temporary, metadata={"format": "pt", METADATA_KEY: entry})
        broken = verify(temporary).broken
        if broken:
            raise StateError(f"sparse24: {broken[0]} is not 2:4 in the file read back; {path} was not written")

    replace(path, write, ".safetensors")


def replace(path: str | os.PathLike[str], write: Callable[[str], None], suffix: str) -> None:
    """Have `write` fill a temporary file beside `path`, and rename it: a failure leaves what was there before."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, f"written{suffix}")
        temporary.touch()
        mode = temporary.stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # safetensors leaves files that their owner alone may read
        os.replace(temporary, path)


def pruned(held: Session, masks: str) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """The pruned copy, and of each weight that was made 2:4 its name in the copy and the dimensions to list."""
    if masks not in ("current", "last"):
        raise ValueError(f'sparse24: found masks={masks!r}, need "current" or "last"')
    chosen = _chosen(held.weights, masks)
    memo: dict[int, Any] = {}
    plain = plain_copy(held.model, memo)
    owners = {id(p): m for m in plain.modules() for p in m.parameters(recurse=False)}
    names = {id(p): name for name, p in plain.named_parameters()}
    dims = {}
    with torch.no_grad():
        for weight, mask in chosen:
            param: Tensor = memo[id(weight.param)]
            if weight.soft:
                param.copy_(weight.masked())
            else:
                param.masked_fill_(~mask.to(param.device), 0)
            dims[names[id(param)]] = _reduction(weight, owners[id(param)])
    return plain, dims


def finished(model: nn.Module, masks: str) -> tuple[nn.Module, Collection[str]]:
    """What a deployed model is: a pruned copy in evaluation mode, and the names of its 2:4 weights.

    model: one trained sparse, pruned here as `prune(model, masks)` does; or what `prune` returned, or such a model
    loaded again. Raises StateError as `prune` does, and for a plain model without a 2:4 weight.
    """
    held = session(model)
    names: Collection[str]
    if any(w.reason_skipped is None for w in held.weights.values()):
        plain, names = pruned(held, masks)
        return plain.eval(), names
    plain = plain_copy(held.model, {})
    names = _two_four(plain)
    if not names and held.weights:
        return pruned(held, masks)  # which says why
    if not names:
        raise StateError(
            "sparse24: found no 2:4 weight in this model, need one trained with torch.compile(model, "
            "backend='sparse24') or what sparse24.prune made of it"
        )
    return plain.eval(), names


def _two_four(model: nn.Module) -> list[str]:
    """The names of the matrices that are 2:4 and not all zero; embeddings have no product to be sparse in."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = []
    for name, param in model.named_parameters():
        if param.dim() == 2 and id(param) not in embeddings:
            matrix = measure(name, param.detach() != 0)
            if matrix.dims and matrix.nonzero > 0:
                names.append(name)
    return names


def _chosen(weights: dict[str, SparseWeight], masks: str) -> list[tuple[SparseWeight, Tensor]]:
    """The weights to prune, with their masks; raises StateError where they cannot be."""
    sparse = [w for w in weights.values() if w.reason_skipped is None]
    if not sparse:
        why = [f"{w.name} stays dense: {w.reason_skipped}" for w in weights.values()][:3]
        found = "; ".join(why) if why else "it never ran under torch.compile(model, backend='sparse24')"
        raise StateError(
            f"sparse24: found no sparse weight in this model ({found}), need at least one; train it sparse, or, with a "
            "loaded session state, run one forward of the compiled model first"
        )
    dense = [w for w in sparse if not w.sparse]
    if dense and masks != "last":
        raise StateError(
            f"sparse24: found {len(dense)} of {len(sparse)} sparse layers in the dense phase ({dense[0].name} and so "
            "on), need the sparse phase: their weights have no zeros. Train with dense_after=None, call "
            'session.to_sparse() and train on, or accept a loss of quality with masks="last"'
        )
    chosen = []
    for weight in sparse:
        weight.follow()  # as the next forward would: a checkpoint loaded before the first step changes the mask
        try:
            chosen.append((weight, weight.mask()))
        except ValueError:
            raise StateError(
                f"sparse24: {weight.name} has no mask yet, need one; run one forward of the compiled model in its "
                "sparse phase"
            ) from None
    return chosen


def plain_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without compiled wrappers; `memo` maps id(original) to its copy."""
    for module in reversed(list(model.modules())):  # children first: a wrapper is replaced by a copy of what it wraps
        if isinstance(module, OptimizedModule):
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        module.__dict__.pop("_compiled_call_impl", None)  # set by module.compile()
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            del module.__dict__["forward"]  # module.forward = torch.compile(module.forward): bound to the original
    return plain


def _reduction(weight: SparseWeight, owner: nn.Module) -> tuple[int, ...]:
    """The dimension that the product reduces over; both where neither the graphs nor the layer's class tell."""
    if isinstance(weight, PrunedWeight) or weight.soft:
        return (0,) if weight.transposed else (1,)
    for operand in weight.operands.values():
        return (0,) if operand.transposed else (1,)
    if isinstance(owner, (nn.Linear, nn.MultiheadAttention)):
        return (1,)
    return (0,) if type(owner).__name__ == "Conv1D" else (0, 1)
