"""The Hopper kernel's matrix instruction as inline PTX, for which Gluon has no words, and what it takes."""

# mypy: disable-error-code="no-redef"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_common import BY_THREAD, constexpr_function

SLOT_BYTES = 8192  # of shared memory: 64 x 64 entries of 16 bits
SLOT = gl.constexpr(SLOT_BYTES)


@constexpr_function
def mma_asm(MB, BN, half, transposed, registers, dtype, addresses):
    """PTX of one warpgroup for 64 columns of the packed operand: 2 * MB instructions, and the wait for them.

    Operands, registers of a thread: the results (32 for each 64 columns of a row block); where x is; the packed
    operand, for each of MB blocks 16 registers of fragments or, if not `registers`, where it is; metadata of MB blocks;
    the sums so far, tied to the results. half: which 64 of a slot's 128 columns. addresses: places are addresses of
    shared memory, else byte offsets in it, and each of places and metadata comes 32 times.
    """
    n, times = MB * BN // 2, 1 if addresses else 32
    b, a = n, n + times
    meta = a + (16 * MB if registers else times)
    high = 1 << 30 | 1024 >> 4  # 128 byte swizzle, 1024 bytes from one block of eight rows to the next
    lines = ["{", ".reg .b32 a, b, base;", ".reg .b64 da, db;", f"mov.u32 base, {'0' if addresses else 'global_smem'};"]
    for name, operand in (("b", b),) if registers else (("b", b), ("a", a)):
        address = f"add.u32 {name}, base, ${operand};", f"shr.u32 {name}, {name}, 4;"
        lines += [*address, f"and.b32 {name}, {name}, 0x3FFF;"]
    if transposed:  # x [inner, outer]: blocks of 64 columns are a slot apart
        lines += [f"or.b32 b, b, {SLOT_BYTES >> 4 << 16};"]
    lines += ["wgmma.fence.sync.aligned;"]
    for k in range(2):
        lines += [f"mov.b64 db, {{b, {high}}};"]
        for m in range(MB):
            sums = ", ".join(f"${i}" for i in range(m * BN // 2, (m + 1) * BN // 2))
            if registers:
                first = a + 16 * m + 8 * half + 4 * k
                packed = "{" + ", ".join(f"${i}" for i in range(first, first + 4)) + "}"
            else:
                packed = "da"
                lines += [
                    f"add.u32 base, a, {m * (SLOT_BYTES >> 4) + 4 * half + 2 * k};",
                    f"mov.b64 da, {{base, {high}}};",
                ]
            operands = f"{{{sums}}}, {packed}, db, ${meta + times * m}, {k}, 1, 1, 1"
            operands += f", {int(transposed)}" if registers else f", 0, {int(transposed)}"
            lines += [f"wgmma.mma_async.sp.sync.aligned.m64n{BN}k32.f32.{dtype}.{dtype} {operands};"]
        lines += [f"add.u32 b, b, {256 if transposed else 4};"]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    return "\n".join(lines)


@constexpr_function
def mma_constraints(MB, BN, registers, addresses):
    n, times = MB * BN // 2, 1 if addresses else 32
    inputs = times + (16 * MB if registers else times) + times * MB
    return ",".join(["=f"] * n + ["r"] * inputs + [str(i) for i in range(n)])


@constexpr_function
def repeated(kind, n):
    return (kind,) * n


@constexpr_function
def nibbles_asm():
    """Metadata of 16 columns of two rows, for `mma`, from eight bytes as `layout` has them for 32 columns.

    The bytes alternate between two blocks of 16 columns; each has a nibble of row g below one of row g + 8. The
    instruction wants the four nibbles of row g and then those of row g + 8.
    """
    return """{
        .reg .b32 lo, hi, x, s, t;
        mov.b64 {lo, hi}, $1;
        prmt.b32 x, lo, hi, $2;
        shr.u32 s, x, 4;
        xor.b32 t, s, x;
        and.b32 t, t, 0x00F000F0;
        shl.b32 s, t, 4;
        xor.b32 x, x, t;
        xor.b32 x, x, s;
        prmt.b32 $0, x, 0, 0x3120;
    }"""


@constexpr_function
def arrive_asm():
    """Each warp counts itself in after the stores of all its lanes."""
    return """{
        .reg .pred p;
        bar.warp.sync 0xffffffff;
        elect.sync _|p, 0xffffffff;
        @p red.release.gpu.global.add.s32 [$1], 1;
        mov.b32 $0, 0;
    }"""


@constexpr_function
def await_asm():
    """Until all four warps are counted in."""
    return """{
        .reg .pred p;
        .reg .b32 v;
    again:
        ld.acquire.gpu.global.b32 v, [$1];
        setp.ne.s32 p, v, 4;
        @p bra again;
        mov.b32 $0, v;
    }"""


@gluon.jit
def mma(
    acc,
    a,
    b,
    meta,
    HALF: gl.constexpr,
    MB: gl.constexpr,
    BN: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    REGISTER_A: gl.constexpr,
    DTYPE: gl.constexpr,
):
    ADDRESSES: gl.constexpr = BY_THREAD and not REGISTER_A
    ASM: gl.constexpr = mma_asm(MB, BN, HALF, TRANSPOSED, REGISTER_A, DTYPE, ADDRESSES)
    CONSTRAINTS: gl.constexpr = mma_constraints(MB, BN, REGISTER_A, ADDRESSES)
    if ADDRESSES:
        return gl.inline_asm(ASM, CONSTRAINTS, (b,) + a + meta + acc, repeated(acc[0].type, MB * BN // 64), False)
    else:
        return gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, (b,) + a + meta + acc, repeated(gl.float32, MB * BN // 64), False, 32
        )


@gluon.jit
def whereabouts(arena, slot, REGISTER_A: gl.constexpr, LAYOUT: gl.constexpr):
    """Where a slot of shared memory is, for `mma`."""
    if BY_THREAD and not REGISTER_A:
        return arena.index(slot)
    else:
        return gl.full([1, 1, 1, 1], slot * SLOT, gl.int32, LAYOUT)


@gluon.jit
def fragments(slot, LAYOUT: gl.constexpr):
    """A slot of the packed operand as the registers that the instruction takes: 16 a thread, 4 for each 32 columns."""
    ROWS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 16], [0, 32]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
    v = slot.load(ROWS).reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([8, 4, 32, 4])
    return gl.convert_layout(v, LAYOUT, assert_trivial=True)
