"""What PyTorch's own tools show of a graph: TORCH_LOGS="+sparse24" a line for each linear, tlparse each stage.

`TORCH_TRACE=folder python train.py; tlparse folder`: beside Dynamo's and Inductor's stages stand sparse24_original,
sparse24_tidied, sparse24_linears and sparse24_rewritten.
"""

import json
import logging
from collections.abc import Callable, Sequence

from torch._guards import CompileContext, CompileId
from torch._logging import trace_structured
from torch.fx import GraphModule

from ..passes.find import Linear

log = logging.getLogger("sparse24")


class Trace:
    """The artifacts of one Dynamo graph, under its compile id also where a variant is compiled later."""

    def __init__(self) -> None:
        self._id: CompileId | None = CompileContext.current_compile_id()

    def graph(self, stage: str, gm: GraphModule) -> None:
        self._artifact(stage, "string", lambda: gm.print_readable(print_output=False))

    def linears(self, linears: Sequence[Linear]) -> None:
        """Of each linear what it is and whether it is sparse: an artifact, and a line of the log."""
        self._artifact("linears", "json", lambda: json.dumps([_described(x) for x in linears]))
        sparse = sum(x.reason is None for x in linears)
        log.info("sparse24: graph %s: %d of %d linears are sparse", self._id, sparse, len(linears))
        for x in linears:
            shape, dtype = f"{x.out_features}x{x.in_features}", str(x.dtype).removeprefix("torch.")
            verdict = f"sparse, wgrad {x.wgrad}" if x.reason is None else f"dense: {x.reason}"
            log.debug("sparse24: %s (%s, %s, %d tokens, %s): %s", x.name, x.role, shape, x.tokens, dtype, verdict)

    def _artifact(self, stage: str, encoding: str, payload: Callable[[], str]) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"sparse24_{stage}", "encoding": encoding},
            payload_fn=payload,
            expect_trace_id=False,
            compile_id=self._id,
        )


def _described(x: Linear) -> dict[str, object]:
    return {
        "name": x.name,
        "role": x.role,
        "out_features": x.out_features,
        "in_features": x.in_features,
        "tokens": x.tokens,
        "dtype": str(x.dtype),
        "wgrad": x.wgrad,
        "reason": x.reason,
    }
