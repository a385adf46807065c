"""The Gluon kernels, variant by variant: whether they are right on this GPU, and how fast they are.

Each variant is compared with float64 in a process of its own, so that a crash or a hang costs that variant only. Then
dense, cuSPARSELt's best algorithm and the variants that passed are timed in turns after two warm seconds, the most
important shapes first, until --seconds are over: the GPU's time, by CUDA graphs, and the host's of a call. Of the first
shape also: cold (as in gemm.py), and clocks under load. The file is written after every step. "bound" is what shared
memory allows in docs/kernels.md, of the dense peak. Needs a GPU; SPARSE24_GLUON need not be set.
"""

import argparse
import faulthandler
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import clocks, environment, in_turns, parser, percentiles, save, timed
from gemm import PEAK, SHAPES, cold, host_us
from torch import Tensor

#: The arguments of gluon_wgmma.Variant and gluon_mma.Variant; what each is for stands in docs/kernels.md.
WGMMA: dict[str, dict[str, Any]] = {
    "128x256": dict(MB=1, BN=256, NA=2, NB=4, NE=3),
    "128x256-cluster": dict(MB=1, BN=256, NA=2, NB=4, NE=3, GROUP=8, CLUSTER=2),
    "256x192": dict(MB=2, BN=192, NA=2, NB=4, NE=3),
}
MMA: dict[str, dict[str, Any]] = {"mma-128x128": dict(STAGES=4), "mma-128x64": dict(STAGES=3, NI=4)}
#: Also checked with fp16 and with a bias, which are kernels of their own.
THOROUGH = (*WGMMA, "mma-128x128")
DEVICE = torch.device("cuda", 0)
FIRST = [(4096, 14336), (2048, 8192), (1024, 4096)]
_BF, _FP = "bfloat16", "float16"
CASES = [  # blocks of rows, inner, outer, transposed, dtype, biased, repeats, tokens
    (2, 128, 256, False, _BF, False, 2, 0),
    (1, 64, 8, False, _BF, False, 2, 0),
    (3, 192, 77, False, _BF, True, 2, 0),
    (1, 320, 1, False, _FP, False, 2, 0),
    (5, 448, 1000, False, _FP, True, 3, 0),
    (32, 512, 16384, False, _BF, False, 4, 0),
    (64, 4096, 8192, False, _BF, False, 10, 0),
    (12, 8192, 3000, False, _BF, True, 10, 0),
    (2, 128, 256, True, _BF, False, 2, 128),
    (1, 64, 64, True, _BF, False, 2, 1),
    (3, 192, 320, True, _FP, True, 2, 131),
    (32, 8192, 1024, True, _BF, False, 4, 8150),
    (64, 4096, 8192, True, _BF, False, 10, 4096),
]
STEP_S = 60  # a child that takes longer for one step is taken to hang, and ends

# What bounds the kernel: the same without a part of its work, by changes of its source. The numbers are wrong.
_LOADS = (
    "            bring(full, at + a * SA * SLOT, where, SA, SA, PARAMETER, 1)",
    "            bring(full, slot, where, MINE, SB, PARAMETER, CLUSTER)",
)
_FIRST = "            if u == 0:\n    {0}\n            else:\n                give_back(full, 1)"
NO_LOADS = {load: _FIRST.format(load) for load in _LOADS}  # behind the first tile of a program
NO_LOADS |= {"    bring,\n": "    bring,\n    give_back,\n"}
SAME_TILE = {  # every program loads the same tile: L2 always has it
    "rank, r, rows, MB, GATED) * 64": "rank, r, rows, MB, GATED) * 0 + r * 64",
    "n = tn * BN + (rank * MINE + r) * 64": "n = tn * 0 + (rank * MINE + r) * 64",
}
_STORES = "for s in gl.static_range(SB):\n                    part"
NO_STORES = {_STORES: _STORES.replace("range(SB)", "range(1)")}  # 64 columns of each tile are written
NO_METADATA = {  # loaded once a tile
    "next0 = load_metadata(meta, at, 2 * i + 2, last, MB, inner)": "next0 = next0",
    "next1 = load_metadata(meta, at, 2 * i + 3, last, MB, inner)": "next1 = next1",
}
ABLATIONS: dict[str, dict[str, str]] = {
    "no-loads": NO_LOADS,
    "same-tile": SAME_TILE,
    "no-stores": NO_STORES,
    "no-metadata": NO_METADATA,
    "bare": NO_LOADS | NO_STORES | NO_METADATA,
}
ABLATED = ("128x256", "256x192")
#: Modules of the kernel that ablations change, each before those that import it.
HOPPER = ("gluon_loads", "gluon_wgmma_kernel", "gluon_wgmma")


def bound(name: str) -> float | None:
    """The rate that shared memory allows a wgmma variant, of the dense peak (docs/kernels.md); None for the others."""
    if name not in WGMMA:
        return None
    rows, columns = 128 * WGMMA[name]["MB"], WGMMA[name]["BN"]
    tensor_cores = rows * columns // 32  # clocks for 128 columns of the packed operand
    return 2 * tensor_cores / (tensor_cores + 2 * rows + 2 * columns)


def source(ablation: str) -> dict[str, str]:
    """The modules of the Hopper kernel without a part of its work, by new names."""
    texts = {}
    for name in HOPPER:
        found = importlib.util.find_spec(f"sparse24.kernels.{name}")
        assert found is not None and found.origin is not None
        texts[name] = Path(found.origin).read_text()
    for old, new in ABLATIONS[ablation].items():
        if not any(old in text for text in texts.values()):
            raise ValueError(f"{ablation}: none of {', '.join(HOPPER)} has {old!r} to change")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    renamed = {name: f"{name}_{ablation.replace('-', '_')}" for name in HOPPER}
    for name in HOPPER:
        texts = {n: text.replace(f"from .{name} import", f"from .{renamed[name]} import") for n, text in texts.items()}
    return {renamed[name]: text for name, text in texts.items()}


@functools.cache
def ablated(ablation: str) -> ModuleType:
    folder = tempfile.TemporaryDirectory()
    for name, text in source(ablation).items():
        path = Path(folder.name, f"{name}.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"sparse24.kernels.{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    module.__dict__["folder"] = folder  # kept as long as the module
    return module


def load(name: str) -> tuple[Callable[..., Tensor], str]:
    """multiply(packed, x, rows, inner, transposed, bias=None) of "variant" or "variant:ablation", and the order of the
    metadata that it reads.
    """
    from sparse24.kernels import gluon_mma, gluon_wgmma

    name, _, ablation = name.partition(":")
    if name in MMA:
        return functools.partial(gluon_mma.multiply, gluon_mma.Variant(**MMA[name])), "sm_80"
    module = ablated(ablation) if ablation else gluon_wgmma
    return functools.partial(module.multiply, gluon_wgmma.Variant(**WGMMA[name])), "sm_90"


def two_of_four(rows: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A matrix with two of each four entries at random, and its mask."""
    g = torch.Generator(DEVICE).manual_seed(rows + inner)
    mask = torch.rand(rows, inner // 4, 4, generator=g, device=DEVICE).argsort(-1) < 2
    a = torch.randn(rows, inner, generator=g, device=DEVICE).to(dtype)
    return a * mask.view(rows, inner), mask.view(rows, inner)


# ---------------------------------------------------------------------------------------- in a process of its own


def emit(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)
    faulthandler.dump_traceback_later(STEP_S, exit=True)


def compare(
    name: str,
    blocks: int,
    inner: int,
    outer: int,
    transposed: bool,
    dtype: str,
    biased: bool,
    repeats: int,
    tokens: int,
) -> dict[str, Any]:
    """A product of `blocks` blocks of rows against float64, and with itself, `repeats` times."""
    from sparse24.kernels import layout

    multiply, order = load(name)
    rows, kind = blocks * layout.ROW_BLOCK[order], getattr(torch, dtype)
    a, mask = two_of_four(rows, inner, kind)
    packed = layout.pack(a, mask, order)
    x = torch.randn((tokens, outer) if transposed else (outer, inner), device=DEVICE).to(kind)
    bias = torch.randn(rows, device=DEVICE).to(kind) if biased else None
    exact = a[:, :tokens].double() @ x.double() if transposed else x.double() @ a.double().t()
    if bias is not None:
        exact = exact + (bias.double()[:, None] if transposed else bias.double())
    results = []
    for _ in range(repeats):
        torch.full(exact.shape, float("nan"), device=DEVICE, dtype=kind)  # its memory is what the result gets
        y = multiply(packed, x, rows, inner, transposed, bias)
        results = [*results[:1], y]
        if not torch.equal(results[0].view(torch.int16), y.view(torch.int16)):
            return {"good": False, "note": "differs between runs"}
    off = (y.double() - exact).abs()
    wrong = ~(off <= torch.finfo(kind).eps * (exact.abs() + 0.05 * exact.square().mean().sqrt()))
    error = float(off.norm() / exact.norm())
    found: dict[str, Any] = {"good": error < 1e-2 and not bool(wrong.any()), "error": error}
    if bool(wrong.any()):
        where = wrong.nonzero()
        found["note"] = f"{len(where)} of {wrong.numel()} off, from {where[0].tolist()} to {where[-1].tolist()}"
    return found


def diagnose(name: str, transposed: bool) -> dict[str, Any]:
    """Where the product with the identity differs from the matrix: entries by row and column within their blocks."""
    from sparse24.kernels import layout

    multiply, order = load(name)
    size = 256
    a, mask = two_of_four(size, size)
    eye = torch.eye(size, device=DEVICE, dtype=torch.bfloat16)
    y = multiply(layout.pack(a, mask, order), eye, size, size, transposed)
    y = y if transposed else y.t()
    bad = y != a
    return {
        "identity, transposed": transposed,
        "wrong": int(bad.sum()),
        "by m % 64 // 8": bad.view(4, 8, 8, size).sum((0, 2, 3)).tolist(),
        "by m // 64": bad.view(4, 64, size).sum((1, 2)).tolist(),
        "by k // 32": bad.view(size, 8, 32).sum((0, 2)).tolist(),
        "by k % 32 // 4": bad.view(size, 8, 8, 4).sum((0, 1, 3)).tolist(),
        "row 0": y[0, :32].tolist(),
        "should be": a[0, :32].tolist(),
    }


def check(name: str) -> None:
    """Emit what each case finds; where one is wrong, what the identity shows."""
    diagnosed, broken = False, set()
    for case in CASES:
        kernel = case[3:6]
        if (name not in THOROUGH and (case[4] == _FP or case[5])) or kernel in broken:
            continue
        began = time.time()
        try:
            found = compare(name, *case)
        except torch.AcceleratorError as error:  # nothing more runs in this process
            emit({"case": case, "good": False, "note": f"GPU error: {error}"[:500]})
            return
        except Exception as error:
            broken.add(kernel)
            emit({"case": case, "good": False, "note": f"{type(error).__name__}: {str(error).strip()[:2000]}"})
            continue
        emit({"case": case, **found, "seconds": time.time() - began})
        if not found["good"] and not diagnosed:
            diagnosed = True
            for transposed in (False, True):
                emit({"diagnosis": diagnose(name, transposed)})
    emit({"done": True})


def compile_(name: str) -> None:
    """Both kernels, so that the process that times finds them in Triton's cache."""
    from sparse24.kernels import layout

    multiply, order = load(name)
    a, mask = two_of_four(256, 256)
    for transposed in (False, True):
        multiply(layout.pack(a, mask, order), a.clone(), 256, 256, transposed)
        torch.cuda.synchronize()
        emit({"compiled": name})


def replayed(runs: dict[str, Callable[[], Any]], n: int) -> dict[str, list[float]]:
    """`in_turns` of the GPU's time alone, ms a call: a CUDA graph holds n calls, and none waits for the host."""
    graphs: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(n):
                run()
        graphs[name] = graph.replay
    return {name: [ms / n for ms in times] for name, times in in_turns(graphs, 20, 1).items()}


def time_(names: list[str], problems: list[list[Any]], tokens: int, until: float) -> None:
    """Emit the rows of each problem [matmul, in_features, out_features, whether it is the first shape]."""
    from sparse24.kernels import choice, layout
    from sparse24.kernels.providers import CusparseLt, Problem

    library = CusparseLt()
    native = layout.metadata_order(DEVICE)
    for matmul, k, f, first in problems:
        if time.time() > until:
            return
        transposed = matmul == "wgrad"
        rows, inner = (f, tokens) if transposed else ((k, f) if matmul == "dgrad" else (f, k))
        outer = k if transposed else tokens
        if rows % layout.ROW_BLOCK[native]:  # there is no packed form
            emit({"rows": []})
            continue
        problem = Problem("wgrad" if transposed else "spmm", rows, inner, outer, torch.bfloat16, DEVICE)
        best = choice.measure(problem, [library])
        a, mask = two_of_four(rows, inner)
        x = torch.randn((inner, outer) if transposed else (outer, inner), device=DEVICE).bfloat16()
        packed = {native: layout.pack(a, mask, native)}
        runs: dict[str, Callable[[], Any]] = {
            "dense": functools.partial(torch.mm, *((a, x) if transposed else (x, a.t())))
        }
        if best.provider == library.name:
            runs[library.name] = functools.partial(library.run, problem, packed[native], x, best.algorithm)
        for name in names:
            multiply, order = load(name)
            if order != native and not (first and matmul != "dgrad"):
                continue  # Ampere's instruction on Hopper: one look is enough
            if order not in packed:
                packed[order] = layout.pack(a, mask, order)
            runs[name] = functools.partial(multiply, packed[order], x, rows, inner, transposed)
        del mask
        for name, run in runs.items():
            emit({"running": name})
            run()
            torch.cuda.synchronize()
        emit({"running": ""})
        times = replayed(runs, max(1, round(8 / timed(runs["dense"], 3))))
        dense = percentiles(times["dense"])["p50"]
        found = []
        for name, run in runs.items():
            ms = percentiles(times[name])
            row: dict[str, Any] = {"k": k, "f": f, "tokens": tokens, "matmul": matmul, "with": name, "ms": ms}
            row |= {"ratio": dense / ms["p50"], "of_peak": 2e3 * rows * inner * outer / ms["p50"] / PEAK}
            row["bound"] = bound(name)
            if name == library.name:
                row["algorithm"] = best.algorithm
            row["host_us"] = host_us(run, 5)
            if first:
                row["cold_ms"] = cold(run)
            if first and matmul == "forward" and name in ("dense", library.name, *THOROUGH):
                for _ in range(round(600 / ms["p50"])):
                    run()
                time.sleep(0.3)
                row["clocks"] = clocks()
                torch.cuda.synchronize()
            found.append(row)
        emit({"rows": found})


def fused(problems: list[list[Any]], tokens: int, until: float) -> None:
    """Emit the rows of products [activation, in_features, out_features] with the activation behind them: by one of our
    kernels, and by cuSPARSELt's best algorithm and a second kernel.
    """
    from sparse24.kernels import choice, gluon_wgmma, layout, ops
    from sparse24.kernels.providers import CusparseLt, Problem

    library = CusparseLt()
    variants = {name: gluon_wgmma.Variant(**arguments) for name, arguments in WGMMA.items()}
    variants = {name: variant for name, variant in variants.items() if variant in gluon_wgmma.VARIANTS}

    def apart(problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None, *behind: Any) -> Tensor:
        return ops.glu(library.run(problem, packed, x, algorithm), *behind)

    for kind, inner, rows in problems:
        if time.time() > until:
            return
        problem = Problem("spmm", rows, inner, tokens, torch.bfloat16, DEVICE)
        best = choice.measure(problem, [library])
        a, mask = two_of_four(rows, inner)
        x, packed = torch.randn(tokens, inner, device=DEVICE).bfloat16(), layout.pack(a, mask, "sm_90")
        runs: dict[str, Callable[[], Any]] = {
            library.name: functools.partial(apart, problem, packed, x, best.algorithm, None, kind)
        }
        for name, variant in variants.items():
            if gluon_wgmma.can_fuse(variant, rows, kind):
                runs[name] = functools.partial(gluon_wgmma.multiply_glu, variant, packed, x, rows, inner, None, kind)
                emit({"running": name})
                runs[name]()
                torch.cuda.synchronize()
        emit({"running": ""})
        times = replayed(runs, max(1, round(8 / timed(runs[library.name], 3))))
        found = []
        for name, run in runs.items():
            ms = percentiles(times[name])
            row = {"k": inner, "f": rows, "tokens": tokens, "kind": kind, "with": name, "ms": ms}
            row["host_us"] = host_us(run, 5)
            found.append(row | {"ratio": percentiles(times[library.name])["p50"] / ms["p50"]})
        emit({"rows": found})


def child(job: dict[str, Any]) -> None:
    os.environ.pop("SPARSE24_GLUON", None)
    faulthandler.dump_traceback_later(STEP_S, exit=True)
    with torch.no_grad():
        {"check": check, "compile": compile_, "time": time_, "fused": fused}[job.pop("do")](**job)
    faulthandler.cancel_dump_traceback_later()


# ------------------------------------------------------------------------------------------------------------ parent


def ask(**job: Any) -> Iterator[dict[str, Any]]:
    """What a process of its own emits, as it comes; in the end its exit status and what else it said."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                yield found
            else:
                said.append(line)
    yield {"exit": process.returncode, "said": "".join(said)[-3000:]}


def checked(name: str) -> dict[str, Any]:
    """Whether a variant is right, and all that its process found."""
    began = time.time()
    *found, end = ask(do="check", name=name)
    right = end["exit"] == 0 and {"done": True} in found and all(case.get("good", True) for case in found)
    print(f"{'right' if right else 'WRONG'}  {name} ({time.time() - began:.0f} s)", flush=True)
    for line in [] if right else [*(case for case in found if not case.get("good")), end]:
        print(f"    {line}", flush=True)
    return {"right": right, "found": found, **end}


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        numbers = f"{row['ms']['p50']:8.4f} {row['ratio']:6.2f} {row['of_peak']:8.2f} {row['bound'] or 0:6.2f}"
        extra = f" host {row['host_us']['p50']:.0f}" + (f" cold {row['cold_ms']:.4f}" if "cold_ms" in row else "")
        where = f"{row['k']:6d} {row['f']:6d} {row['matmul']:8s} {row['with']:28s}"
        print(f"{where} {numbers}{extra} {row.get('clocks', '')}", flush=True)


def main() -> None:
    p = parser(__doc__, "gluon.json")
    p.add_argument("--seconds", type=float, default=300, help="no new problem is begun after these")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the inputs, a multiple of 64")
    every = [*WGMMA, *MMA]
    p.add_argument("--variants", nargs="+", choices=every, default=every, metavar="NAME", help="which of them")
    p.add_argument(
        "--ablations", action="store_true", help=f"also time {', '.join(ABLATED)} without parts of their work"
    )
    p.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args()
    began = time.time()
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if major not in (8, 9):
        raise SystemExit("benchmarks/gluon.py needs an NVIDIA GPU of compute capability 8 or 9; there is none here")
    if args.child is not None:
        child(args.child)
        return
    names = [name for name in args.variants if name in MMA or major == 9]
    result: dict[str, Any] = {"checks": {}, "rows": [], "fused": [], "ablations": [], "failed": []}
    print(environment(), flush=True)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        result["checks"] = dict(zip(names, pool.map(checked, names), strict=True))
        right = [name for name in names if result["checks"][name]["right"]]
        parts = [f"{n}:{part}" for n in ABLATED if n in right for part in ABLATIONS] if args.ablations else []
        ends = list(pool.map(lambda name: {"compiling": name, **[*ask(do="compile", name=name)][-1]}, parts))
        result["failed"] += [end for end in ends if end["exit"]]
        parts = [end["compiling"] for end in ends if not end["exit"]]
    save(args.out, result)
    shapes = [*FIRST, *(shape for shape in SHAPES if shape not in FIRST)]
    problems = [[m, *shape, shape == FIRST[0]] for shape in shapes for m in ("forward", "wgrad", "dgrad")]
    print(f"{'K':>6s} {'F':>6s} {'matmul':8s} {'with':28s} {'ms':>8s} {'ratio':>6s} {'of peak':>8s} {'bound':>6s}")

    def timing(key: str, names: list[str], problems: list[list[Any]]) -> None:
        """Rows of the problems into result[key]. A variant that ends its process is left out of the next one."""
        while problems:
            running = ""
            for found in ask(do="time", names=names, problems=problems, tokens=args.tokens, until=until):
                running = found.get("running", running)
                if "rows" in found:
                    result[key] += found["rows"]
                    problems = problems[1:]
                    show(found["rows"])
                    save(args.out, result)
            if found["exit"] == 0:
                return
            result["failed"].append({"running": running, **found})
            print(f"the process that timed ended at {running or 'the timing itself'}: {found}", flush=True)
            if running not in names:
                return
            names = [name for name in names if name != running]

    def timing_fused(problems: list[list[Any]]) -> None:
        for found in ask(do="fused", problems=problems, tokens=args.tokens, until=until):
            for row in found.get("rows", ()):
                result["fused"].append(row)
                where = f"{row['k']:6d} {row['f']:6d} {row['kind']:12s} {row['with']:28s}"
                print(f"{where} {row['ms']['p50']:8.4f} {row['ratio']:6.2f}", flush=True)
            save(args.out, result)
        result["failed"] += [found] if found["exit"] else []

    until = began + args.seconds - 12  # what one problem takes
    if major == 9:
        timing_fused([*(["swiglu", k, 2 * f] for k, f in (*FIRST, SHAPES[0])), ["geglu", 1024, 8192]])
    if parts:
        timing("ablations", [*(n for n in ABLATED if n in right), *parts], problems[:2])
    timing("rows", right, problems)
    save(args.out, result)
    print(f"{len(right)} of {len(names)} variants are right, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
