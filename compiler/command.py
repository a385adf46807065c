"""python -m sparse24: explain a model, check this machine, or ask whether a layer would gain."""

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.gain import Layer
from ..kernels.providers import why_slow
from .doctor import checks
from .errors import OptionError
from .explain import explain
from .recipe import Recipe

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int64", "int32", "bool")}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to each help text that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, [], argparse.SUPPRESS) or isinstance(action.default, bool)
        return action.help if told else f"{action.help} (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 where doctor finds something wrong. 2: a bad argument."""
    parser = argparse.ArgumentParser(prog="python -m sparse24", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_explain, _add_doctor, _add_bench):
        add(commands)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


# -------------------------------------------------------------------------------------------------------------- explain

_EXPLAIN = """What the backend would do to a model: each linear layer, sparse or why not, and its times.

    python -m sparse24 explain my_models:make_gpt --input 8x2048
    python -m sparse24 explain my_models:Block --args d=4096 --input 8x2048x4096:bfloat16 --options layers=all
    python -m sparse24 explain my_models:make_llama --input input_ids=8x2048 --input labels=8x2048

The model is made without data, so that one of any size can be explained on any machine. Where no GPU can measure its
layers, times are predicted.
"""


def _add_explain(commands: Any) -> None:
    p = commands.add_parser("explain", help="what would be sparse in a model, and what it gains", description=_EXPLAIN,
                            formatter_class=_Help)  # fmt: skip
    p.add_argument("model", metavar="MODULE:FACTORY", help="a function or class that returns the model when called")
    p.add_argument("--args", nargs="+", default=[], type=_option, metavar="NAME=VALUE", help="what it is called with")
    p.add_argument("--input", action="append", default=[], type=_input, metavar="[NAME=]SHAPE[:DTYPE]",
                   help="an input of zeros, such as 8x2048; again for each input. DTYPE is int64 for one or two "
                   "dimensions and float32 for more, unless given")  # fmt: skip
    p.add_argument("--options", nargs="+", default=[], type=_option, metavar="NAME=VALUE",
                   help="options of the backend, such as layers=all when=always")  # fmt: skip
    p.add_argument("--gpu", default="H200", choices=sorted(cost.GPUS), help="GPU that times are predicted for")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "meta",
                   help="where the model is made: meta holds no data, cpu or cuda do")  # fmt: skip
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="what the model is cast to")
    p.set_defaults(run=_explain, fail=p.error)


def _input(text: str) -> tuple[str, torch.Size, torch.dtype]:
    name, _, rest = text.rpartition("=")
    shape, _, dtype = rest.partition(":")
    try:
        sizes = torch.Size(int(size) for size in shape.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, need a shape such as 8x2048 or x=8x2048x64:float32"
        ) from None
    if dtype and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"found dtype {dtype!r}, need one of {', '.join(DTYPES)}")
    return name, sizes, DTYPES[dtype] if dtype else torch.int64 if len(sizes) < 3 else torch.float32


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, need NAME=VALUE such as layers=all")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _explain(args: argparse.Namespace) -> int:
    factory = _factory(args)
    try:
        device = torch.device(args.device)
        with device:
            model = factory(**dict(args.args))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        args.fail(f"{args.model} failed with --device {args.device}: {type(error).__name__}: {error}")
    if not isinstance(model, nn.Module):
        args.fail(f"{args.model} returned a {type(model).__name__}, need an nn.Module")
    model = model.to(DTYPES[args.dtype]) if args.dtype else model
    inputs = [(name, torch.zeros(shape, dtype=dtype, device=device)) for name, shape, dtype in args.input]
    positional, named = [x for name, x in inputs if not name], {name: x for name, x in inputs if name}
    try:
        print(explain(model, *positional, options=dict(args.options), gpu=args.gpu, **named))
    except OptionError as error:
        args.fail(f"--options: {error}")
    except Exception as error:
        hint = "; if it needs data, --device cpu gives it some" if device.type == "meta" else ""
        given = (
            ", ".join(f"{name or 'input'} {'x'.join(map(str, x.shape))} {x.dtype}" for name, x in inputs)
            or "no --input"
        )
        print(f"the model's forward failed with {given}: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def _factory(args: argparse.Namespace) -> Any:
    module, colon, name = args.model.partition(":")
    if not colon or not name:
        args.fail(f"found {args.model!r}, need MODULE:FACTORY such as my_models:make_gpt")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        args.fail(f"{args.model}: {error}")
    return found


# --------------------------------------------------------------------------------------------------------------- doctor

_DOCTOR = """Check this machine: versions, GPU, cuSPARSELt, the packed format, a small product of each provider against
float64, and the cache of measured choices. The exit status is 0 where all is well and 1 where something is not.
"""


def _add_doctor(commands: Any) -> None:
    p = commands.add_parser("doctor", help="check this machine", description=_DOCTOR, formatter_class=_Help)
    p.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    good = True
    for check in checks():
        print(check, flush=True)
        good = good and check.ok
    return 0 if good else 1


# ---------------------------------------------------------------------------------------------------------------- bench

_BENCH = """Would my layer gain? Times of one training step of a feed-forward layer, dense and sparse: measured on this
GPU, as when="faster" measures them, or predicted where there is none.

    python -m sparse24 bench --d 4096 --ff 14336 --tokens 16384 --gated
"""


def _add_bench(commands: Any) -> None:
    p = commands.add_parser("bench", help="would my layer gain?", description=_BENCH, formatter_class=_Help)
    p.add_argument("--d", type=_multiple, required=True, metavar="N", help="width of the model")
    p.add_argument("--ff", type=_multiple, required=True, metavar="N", help="width inside the layer")
    p.add_argument("--tokens", type=_positive, required=True, metavar="N", help="tokens of one micro-step")
    p.add_argument("--gated", action="store_true", help="gate and up, as in SwiGLU, and not up alone")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="what it computes in")
    p.add_argument(
        "--master", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the weights"
    )
    p.add_argument("--wgrad", default="mvue", choices=["mvue", "dense", "mixed"], help="as the option of the backend")
    p.add_argument("--gpu", default="H200", choices=sorted(cost.GPUS), help="GPU that times are predicted for")
    p.set_defaults(run=_bench)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, need a whole number of at least 1")
    return int(text)


def _multiple(text: str) -> int:
    if _positive(text) % 64:
        raise argparse.ArgumentTypeError(f"found {text}, need a multiple of 64")
    return int(text)


def _bench(args: argparse.Namespace) -> int:
    up = "gate and up" if args.gated else "up"
    shapes = {up: (args.ff * (2 if args.gated else 1), args.d), "down": (args.d, args.ff)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, master = DTYPES[args.dtype], DTYPES[args.master]
    wgrad = {name: Recipe(wgrad=args.wgrad).wgrad_of(role) for name, role in ((up, "up"), ("down", "down"))}
    reasons = {why_slow(*shape, dtype, device) for shape in shapes.values()} - {None}
    if device.type == "cuda" and not reasons:
        where = f"measured on {torch.cuda.get_device_name(device)}"
        kinds = {up: "swiglu" if args.gated else "gelu", "down": None}
        costs = {
            n: cost.measured(Layer(rows, cols, args.tokens, dtype, master, device, wgrad[n], kinds[n]))
            for n, (rows, cols) in shapes.items()
        }
    else:
        rates = cost.gpu_named(args.gpu)
        where = f"predicted for {args.gpu} ({'; '.join(map(str, reasons)) or 'there is no GPU here'})"
        costs = {n: cost.predicted(*s, args.tokens, master, rates, wgrad[n]) for n, s in shapes.items()}
    print(f"ms a training step of {args.tokens} tokens in {args.dtype}, dense > sparse, {where}")
    print(f"{'':12}{'out x in':>16}{'forward':>18}{'dgrad':>18}{'wgrad':>18}{'packing':>9}{'sum':>18}{'gain':>6}")
    for name, spent in costs.items():
        print(_line(name, shapes[name], spent))
    dense = sum(c.dense.total for c in costs.values())
    best = sum(min(c.dense.total, c.sparse.total) for c in costs.values())
    faster = [name for name, spent in costs.items() if spent.faster]
    if not costs[up].measured and min(args.d, args.ff) < cost.LARGE:
        print(f"the rates are those of widths from {cost.LARGE} on: this layer gains less")
    print(f"sparse is faster for: {', '.join(faster) or 'nothing'}; the layer gains {dense / best:.2f}x")
    return 0


def _line(name: str, shape: tuple[int, int], spent: Cost) -> str:
    dense, sparse = spent.dense, spent.sparse
    pairs = [(dense.forward, sparse.forward), (dense.dgrad, sparse.dgrad), (dense.wgrad, sparse.wgrad)]
    cells = [f"{d:.3f} > {s:.3f}".rjust(18) for d, s in (*pairs, (dense.total, sparse.total))]
    cells.insert(3, f"{sparse.packing:9.3f}")
    return f"{name:12}{'x'.join(map(str, shape)):>16}{''.join(cells)}{dense.total / sparse.total:6.2f}"
