"""Every Triton kernel compiles for Hopper and Ampere without a GPU: no spilled registers, no contracted products.

The interpreter of the other tests is chosen when Triton is imported, so the compiler runs in a process of its own: this
file as a program prints what it found.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ORDERS = {90: "sm_90", 80: "sm_80"}
TABLE = {"T": 64, "FIELDS": 10}
TOKENS = {"BT": 64, "BF": 64, "STRIP": 4}
SWIGLU = {"KIND": "silu", "GATED": True, "HAS_BIAS": True}
POINTERS = {"sums": "fp32", "stats": "i64", "seeds": "i64", "table": "i64", "strips": "i32"}
TENSORS = ("packed", "dy", "dh", "z", "bias", "d", "h", *POINTERS)
FP32, BF16 = "fp32", "bf16"
ELEMENTWISE = ("glu_kernel", "glu_backward_kernel")
UNALIGNED = ("tokens", "index", "decay")


def limit(kernel, constants):
    """Registers as they are launched: more programs then fit at a time."""
    if kernel == "pack_weights_kernel" and constants["UNIT"]:
        by_word = constants["MASTER"] == constants["DTYPE"]
        return {"maxnreg": 80 if not constants["SEARCH"] else 96 if by_word else 128}
    return {"pack_gradient_kernel": {"maxnreg": 72}, "glu_backward_pack_kernel": {"maxnreg": 128}}.get(kernel, {})


def cases(arch):
    """(module, kernel, constants, warps) of every launch worth compiling."""
    order = {"ORDER": ORDERS[arch]}
    for unit in (True, False):
        constants = {"MASTER": FP32, "DTYPE": BF16, "UNIT": unit, **order, **TABLE}
        yield "triton_pack", "pack_weights_kernel", {"SEARCH": True, **constants}, 4
        yield "triton_pack", "pack_weights_kernel", {"SEARCH": False, **constants}, 4
        yield "triton_pack", "masked_decay_kernel", {"GRAD": FP32, "UNIT_GRAD": unit, **constants, "FIELDS": 11}, 8
    for search in (True, False):
        constants = {"SEARCH": search, "MASTER": BF16, "DTYPE": BF16, "UNIT": True, **order, **TABLE}
        yield "triton_pack", "pack_weights_kernel", constants, 4
    yield "triton_glu", "pack_gradient_kernel", {**order, **TOKENS}, 4
    yield "triton_glu", "glu_backward_pack_kernel", {**SWIGLU, **order, **TOKENS}, 4
    if arch == 90:  # the order of the metadata is all that differs
        for kind in ("silu", "gelu", "gelu_tanh"):
            constants = {**SWIGLU, "KIND": kind, "BT": 16, "BF": 128}
            yield "triton_glu", "glu_kernel", constants, 4
            yield "triton_glu", "glu_backward_kernel", {**constants, "HAS_BIAS": False, "STRIP": 1}, 4


def compile_all(folder):
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    def argument(name):
        if name in TENSORS:
            return "*" + POINTERS.get(name, "bf16")
        return "fp32" if name == "decay" else "i32"

    DTYPES = {FP32: tl.float32, BF16: tl.bfloat16}
    for arch in ORDERS:
        for module, name, constants, warps in cases(arch):
            kernel = getattr(importlib.import_module(f"sparse24.kernels.{module}"), name)
            constants = {k: DTYPES.get(v, v) for k, v in constants.items()}
            signature = {n: "constexpr" if n in constants else argument(n) for n in kernel.arg_names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(kernel.arg_names)
                if n not in constants and n not in UNALIGNED
            }
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": warps, "enable_fp_fusion": False, **limit(name, constants)},
            )
            ptx = Path(folder, "kernel.ptx")
            ptx.write_text(compiled.asm["ptx"])
            target = "sm_90a" if arch == 90 else f"sm_{arch}"
            command = [get_ptxas(arch).path, "-v", f"-arch={target}", "--fmad=false", ptx, "-o", ptx.with_suffix(".o")]
            log = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
            ).stdout
            found = {
                "arch": arch,
                "kernel": name,
                "kind": constants.get("KIND"),
                "cubin": len(compiled.asm["cubin"]),
                "fma": len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])),
                "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
                "shared": compiled.metadata.shared,
            }
            print(json.dumps(found), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of Triton brings no ptxas")
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    run = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles_to_what_was_meant(compiled):
    """One test, so that one worker compiles."""
    assert len(compiled) == sum(1 for arch in ORDERS for _ in cases(arch))
    assert all(found["cubin"] > 0 for found in compiled)
    allowed = {"glu_backward_pack_kernel": 256, "pack_weights_kernel": 64}  # bytes; none where registers are free
    assert not [found for found in compiled if found["spills"] > allowed.get(found["kernel"], 0)]
    # u * c + c rounded once would choose other lanes than the twin; the activations have fma of their own
    assert not [found for found in compiled if found["fma"] and found["kind"] is None]
    silu = {found["kernel"]: found["fma"] for found in compiled if found["kind"] == "silu" and found["arch"] == 90}
    assert (
        silu["glu_backward_kernel"] == 16 and silu["glu_backward_pack_kernel"] == 32
    )  # one for each entry of a thread
    # an elementwise kernel needs no exchange between threads
    assert not [found for found in compiled if found["kernel"] in ELEMENTWISE and found["shared"]]


if __name__ == "__main__":
    compile_all(sys.argv[1])
