"""Dynamo's graphs of a model, got from a copy without data, so that nothing of the model or of Dynamo changes."""

import copy
import logging
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo import pgo
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..passes.find import Linear
from .decide import read
from .export import plain_copy
from .recipe import Recipe

log = logging.getLogger("sparse24")

Inputs = tuple[Sequence[Any], Mapping[str, Any]]  # args, kwargs


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph of Dynamo's, tidied, its linears, and names and tensors of the placeholders that are parameters."""

    original: GraphModule
    tidied: GraphModule
    linears: list[Linear]
    inputs: dict[str, tuple[str, Tensor]]


class Capture:
    """A copy of a model, and what Dynamo makes of it."""

    def __init__(self, model: nn.Module, inputs: Inputs, recipe: Recipe, data: bool) -> None:
        self.recipe, self.flops = recipe, 0
        self.inputs = inputs if data else tree_map_only(Tensor, _meta, inputs)
        self.graphs: list[Graph] = []
        devices = {p.device for p in model.parameters() if p.device.type != "meta"}
        here = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.device = next(iter(devices), here)
        kind = self.device.type  # autocast does not reach "meta"
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        memo: dict[int, Any] = {} if data else _without_data(model)
        self.copy = plain_copy(model, memo)
        self._originals = {
            id(memo[id(p)]): (name, _stand_in(p, self.device) if p.device.type == "meta" else p)
            for name, p in model.named_parameters()
            if id(p) in memo
        }

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What torch.compile is given: notes the graph and runs it as it is."""
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        given = dict(zip(names, example_inputs, strict=True))
        inputs = {n: self._originals[id(x)] for n, x in given.items() if id(x) in self._originals}

        def weight_of(name: str) -> Any:
            return inputs[name][1] if name in inputs else given[name]

        tidied, linears, _ = read(gm, weight_of, self.recipe, self.autocast)
        self.graphs.append(Graph(gm, tidied, linears, inputs))

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = gm(*args)
            self.flops += counter.get_total_flops()
            return result

        return run

    def run(self) -> None:
        args, kwargs = self.inputs
        with _no_traces_left(self.backend):
            torch.compile(self.copy, backend=self.backend, dynamic=False)(*args, **kwargs)

    def called(self) -> set[str]:
        """Names of the parameters that a forward computes with, seen in a run without torch.compile."""
        with _Seen() as seen:
            self.copy(*self.inputs[0], **self.inputs[1])
        return {name for i, (name, _) in self._originals.items() if i in seen.ids}

    def close(self) -> None:
        """Let go of everything: Dynamo keeps a backend for as long as the process runs."""
        vars(self).clear()


class _Seen(TorchFunctionMode):
    """Notes the parameters that functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading .dtype or .shape computes nothing
            self.ids |= {id(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, nn.Parameter)}
        return func(*args, **(kwargs or {}))


@contextmanager
def captured(model: nn.Module, inputs: Inputs, recipe: Recipe) -> Iterator[Capture]:
    """A trace without data; where the forward needs data and the model has it, one with a copy of them."""
    capture = Capture(model, inputs, recipe, data=False)
    try:
        try:
            capture.run()
        except Exception as error:
            if any(p.device.type == "meta" for p in model.parameters()):
                raise
            log.info("sparse24: the forward does not run without data, a copy is made: %s", error)
            capture.close()
            capture = Capture(model, inputs, recipe, data=True)
            capture.run()
        yield capture
    finally:
        capture.close()


def _meta(t: Tensor) -> Tensor:
    new = torch.empty_like(t.detach(), device="meta")
    if isinstance(t, nn.Parameter):
        return nn.Parameter(new, requires_grad=t.requires_grad)
    return new.requires_grad_(t.requires_grad)


def _without_data(model: nn.Module) -> dict[int, Any]:
    """{id: its twin on "meta"} of a model's tensors, plain attributes included: what copy.deepcopy takes as memo."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _meta(t)
    return memo


def _stand_in(param: Tensor, device: torch.device) -> Tensor:
    """A parameter of the same shape on `device`, in the memory of one entry."""
    return nn.Parameter(torch.zeros((), dtype=param.dtype, device=device).expand(param.shape), param.requires_grad)


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Put the random generators back: those of the devices that the model is on and those of the CPU."""
    state = random.getstate()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield
    random.setstate(state)


@contextmanager
def _no_traces_left(backend: Callable[..., Any]) -> Iterator[None]:
    """Strike what Dynamo compiles inside from its caches.

    A struck entry stays in the list of its code object; one that is of other objects than any frame's is not counted
    as a recompilation.
    """
    struck: Any = DeletedGuardManagerWrapper("sparse24.explain")
    struck.id_matched_objs = {"": weakref.ref(Capture)}
    codes: set[CodeType] = set()
    limits = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
    hook = register_bytecode_hook(lambda code, _: codes.add(code))
    sizes = copy.deepcopy(pgo.get_code_state())
    try:
        with torch._dynamo.config.patch(limits):
            yield
    finally:
        pgo._CODE_STATE = sizes  # the sizes seen: another one would make the user's graph dynamic
        hook.remove()
        for code in codes:
            for entry in _debug_get_cache_entry_list(code):
                if getattr(entry.backend, "compiler_fn", entry.backend) == backend:
                    extra: Any = entry.guard_manager.extra_state
                    extra.invalidate(entry, struck)
