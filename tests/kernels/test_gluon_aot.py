"""The Gluon kernels compile without a GPU: sparse instructions, nothing spilled, shared memory laid out as meant.

As in test_triton_compiles.py, the compiler runs in a process of its own: this file as a program prints what it found.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 166912, 89: 101376, 90: 232448}  # bytes a program can have


def cases():
    """(module, architecture, variant, transposed, fp16, biased, activation): each constant takes each of its values."""
    for variant, transposed, biased, kind in (
        (0, True, True, ""),
        (1, False, False, ""),
        (1, True, True, ""),
        (2, False, False, "swiglu"),
        (2, False, True, "swiglu"),
        (2, False, False, "geglu"),
        (2, False, True, "geglu_tanh"),
        (2, True, True, ""),
    ):
        yield "gluon_wgmma", 90, variant, transposed, transposed, biased, kind
    for arch, variant, transposed in ((80, 0, False), (89, 1, True)):
        yield "gluon_mma", arch, variant, transposed, not transposed, transposed, ""


def compile_all(folder):
    import importlib

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    for module, arch, index, transposed, fp16, biased, kind in cases():
        kernels = importlib.import_module(f"sparse24.kernels.{module}")
        variant, kernel = kernels.VARIANTS[index], kernels.kernel
        dtype = "fp16" if fp16 else "bf16"
        behind = (kind,) if kind else ()
        constants = kernels.constants(variant, torch.float16 if fp16 else torch.bfloat16, transposed, biased, *behind)
        signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
        signature |= {"y": f"*{dtype}", "bias": f"*{dtype}"}
        if module == "gluon_wgmma":
            moved = f"tensordesc<{dtype}[64, 64],{kernels.tiling()!r}>"
            signature |= {"values": moved, "x": moved, "y": moved, "h": moved}
            signature |= {"meta": "*i64", "partials": "*fp32", "counts": "*i32"}
            aligned, warps = ("meta", "bias", "partials", "counts"), 4
        else:
            signature |= {"values": "*i32", "meta": "*i32", "x": f"*{dtype}" if transposed else "*i32"}
            aligned, warps = ("values", "meta", "x", "y", "bias", "rows", "inner"), variant.WM * variant.WN
            aligned += ("outer",) if transposed else ()
        names = list(signature)
        compiled = triton.compile(
            GluonASTSource(
                kernel,
                signature,
                {(names.index(name),): value for name, value in constants.items()},
                {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            ),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "enable_fp_fusion": False},
        )
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", ptx, "-o", ptx.with_suffix(".o")]
        log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
        text = compiled.asm["ptx"]
        found = {
            "case": (module, arch, index, transposed, fp16, biased, kind),
            "instructions": len(re.findall(r"\bwgmma\.mma_async\.sp\.|\bmma\.sp::ordered_metadata\.", text)),
            "types": sorted(set(re.findall(r"f32\.(\w+)\.\1[. ]", text))),
            "expected": 8 * variant.MB if module == "gluon_wgmma" else 2 * variant.NI * 8 // variant.WM,
            "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
            "warnings": [line for line in log.splitlines() if "arning" in line or "Potential Performance Loss" in line],
            "shared": compiled.metadata.shared,
            "arena": variant.slots * 8192 if module == "gluon_wgmma" else None,
            "barriers": barriers(text),
            "others": [int(offset) for offset in re.findall(r"\[global_smem\+(\d+)\]", text)],
            "descriptors": descriptors(text),
            "by_symbol": "base, global_smem" in text,
            "by_thread": hasattr(gl, "inline_asm"),
        }
        print(json.dumps(found), flush=True)


def barriers(ptx):
    """Offsets of the mbarriers in shared memory."""
    found = []
    for register, offset in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+) \+ (\d+)\]", ptx):
        first = re.search(rf"add\.s32 \t?{re.escape(register)}, %r\d+, (\d+);", ptx)
        found.append(int(first[1]) + int(offset))
    return found


def descriptors(ptx):
    """Of the kernel's parameters, those that are TMA descriptors, and those that inline PTX takes for one."""
    are = re.findall(r"\.param \.align 64 \.b8 (kernel_param_\d+)\[128\]", ptx)
    return are, re.findall(r"mov\.b64 d, (kernel_param_\d+);", ptx)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of Triton brings no ptxas")
    folder = tmp_path_factory.mktemp("gluon")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    run = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles_to_sparse_instructions(compiled):
    """One test, so that one worker compiles."""
    assert [tuple(found["case"]) for found in compiled] == list(cases())
    for found in compiled:
        module, arch, _, _, fp16, *_ = found["case"]
        assert found["instructions"] == found["expected"], found
        assert found["types"] == ["f16" if fp16 else "bf16"], found
        assert not found["warnings"], found  # a warning says that wgmma were serialized
        assert not found["spills"], found  # bytes
        assert found["shared"] <= SHARED[arch], found
        if module == "gluon_wgmma":  # the arena is first, with the barriers at its end
            assert min(found["barriers"]) == found["arena"] - 8192, found
            assert sorted(found["barriers"]) == list(range(min(found["barriers"]), max(found["barriers"]) + 8, 8))
            assert found["others"] and min(found["others"]) >= found["arena"], found
            assert found["by_symbol"] != found["by_thread"], found  # how the instructions find the arena
            are, taken = found["descriptors"]
            assert taken == [are[0], are[1]], found  # of the packed operand and of x


if __name__ == "__main__":
    compile_all(sys.argv[1])
