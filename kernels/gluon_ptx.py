"""The Hopper kernel's inline PTX, for what Gluon has no words or too many: its matrix instruction, mbarriers, and loads
by TMA for all programs of a cluster.
"""

# mypy: disable-error-code="no-redef"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_common import BY_THREAD, constexpr_function

SLOT_BYTES = 8192  # of shared memory: 64 x 64 entries of 16 bits
SLOT = gl.constexpr(SLOT_BYTES)


@constexpr_function
def mma_asm(MB, BN, half, transposed, dtype, addresses):
    """PTX of one warpgroup for 64 columns of the packed operand: 2 * MB instructions, and behind those of the second
    half of a step the wait for those of the first.

    Operands, registers of a thread: the results (32 for each 64 columns of a row block); where x is; where the packed
    operand is; metadata of MB blocks; the sums so far, tied to the results. half: which 64 of a slot's 128 columns.
    addresses: places are addresses of shared memory, else byte offsets in it, and each of places and metadata comes 32
    times.
    """
    n, times = MB * BN // 2, 1 if addresses else 32
    b, a, meta = n, n + times, n + 2 * times
    high = 1 << 30 | 1024 >> 4  # 128 byte swizzle, 1024 bytes from one block of eight rows to the next
    lines = ["{", ".reg .b32 a, b, base;", ".reg .b64 da, db;", f"mov.u32 base, {'0' if addresses else 'global_smem'};"]
    for name, operand in (("b", b), ("a", a)):
        address = f"add.u32 {name}, base, ${operand};", f"shr.u32 {name}, {name}, 4;"
        lines += [*address, f"and.b32 {name}, {name}, 0x3FFF;"]
    if transposed:  # x [inner, outer]: blocks of 64 columns are a slot apart
        lines += [f"or.b32 b, b, {SLOT_BYTES >> 4 << 16};"]
    lines += ["wgmma.fence.sync.aligned;"]
    for k in range(2):
        lines += [f"mov.b64 db, {{b, {high}}};"]
        for m in range(MB):
            sums = ", ".join(f"${i}" for i in range(m * BN // 2, (m + 1) * BN // 2))
            lines += [
                f"add.u32 base, a, {m * (SLOT_BYTES >> 4) + 4 * half + 2 * k};",
                f"mov.b64 da, {{base, {high}}};",
            ]
            operands = f"{{{sums}}}, da, db, ${meta + times * m}, {k}, 1, 1, 1, 0, {int(transposed)}"
            lines += [f"wgmma.mma_async.sp.sync.aligned.m64n{BN}k32.f32.{dtype}.{dtype} {operands};"]
        lines += [f"add.u32 b, b, {256 if transposed else 4};"]
    lines += ["wgmma.commit_group.sync.aligned;"]
    if half == 1:
        lines += ["wgmma.wait_group.sync.aligned 1;"]
    return "\n".join([*lines, "}"])


@constexpr_function
def sums_constraints(MB, BN, operands, by_thread):
    """Of PTX on the sums, tied to its results, with so many operands; see `mma_asm`."""
    n = MB * BN // 2
    return ",".join(["=f"] * n + ["r"] * (operands if by_thread else 32 * operands) + [str(i) for i in range(n)])


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
def init_asm(counts):
    """mbarriers from an address on, of so many arrivals each, by the first thread."""
    inits = [f"@p mbarrier.init.shared::cta.b64 [$1 + {8 * i}], {count};" for i, count in enumerate(counts)]
    head = ["{ .reg .pred p; .reg .b32 t;", "mov.u32 t, %tid.x;", "setp.eq.u32 p, t, 0;"]
    return "\n".join([*head, *inits, "fence.mbarrier_init.release.cluster;", "mov.b32 $0, 0; }"])


@constexpr_function
def until_asm():
    """Until an mbarrier has completed its phase of that parity."""
    return """{
        .reg .pred p;
    again:
        mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;
        @!p bra again;
        mov.b32 $0, 0;
    }"""


@constexpr_function
def give_back_asm(cluster):
    """The first lanes of a warpgroup arrive at an mbarrier, each in one program of the cluster.

    An instruction is done for the whole warpgroup, so one warp that waited speaks for all. Not with .release.cluster,
    which would wait for all loads of the thread: what was read, tensor cores read.
    """
    lines = ["{ .reg .pred p; .reg .b32 i, there;", "mov.u32 i, %tid.x;", "and.b32 i, i, 127;"]
    lines += [f"setp.lt.u32 p, i, {cluster};"]
    if cluster == 1:
        lines += ["@p mbarrier.arrive.shared::cta.b64 _, [$1];"]
    else:
        lines += [f"and.b32 i, i, {cluster - 1};", "mapa.shared::cluster.u32 there, $1, i;"]
        lines += ["@p mbarrier.arrive.shared::cluster.b64 _, [there];"]
    return "\n".join([*lines, "mov.b32 $0, 0; }"])


@constexpr_function
def bring_asm(slots, stage, parameter, cluster):
    """A warp expects `stage` slots at the mbarrier $1, and brings `slots` of them by TMA, from $2 on, to all programs
    of the cluster. Then follow the coordinates of each slot, the inner one first. parameter: of the kernel, that is the
    descriptor.
    """
    lines = ["{ .reg .pred p; .reg .b64 d; .reg .b32 to; .reg .b16 all;", f"mov.b16 all, {(1 << cluster) - 1};"]
    lines += ["elect.sync _|p, 0xffffffff;", f"mov.b64 d, kernel_param_{parameter};", "cvta.param.u64 d, d;"]
    lines += [f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {stage * SLOT_BYTES};"]
    kind = "shared::cluster.global.mbarrier::complete_tx::bytes" + ".multicast::cluster" * (cluster > 1)
    for r in range(slots):
        lines += [f"add.u32 to, $2, {r * SLOT_BYTES};"]
        where = f"[d, {{${3 + 2 * r}, ${4 + 2 * r}}}], [$1]" + ", all" * (cluster > 1)
        lines += [f"@p cp.async.bulk.tensor.2d.{kind} [to], {where};"]
    return "\n".join([*lines, "mov.b32 $0, 0; }"])


@constexpr_function
def bring_constraints(slots):
    return ",".join(["=r", "r", "r"] + ["r"] * (2 * slots))


@constexpr_function
def meet_asm():
    """All threads of a cluster meet. mbarriers are made visible by their own fence."""
    return "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire; mov.b32 $0, 0;"


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
def on_sums(ASM: gl.constexpr, operands, acc, OPERANDS: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr):
    CONSTRAINTS: gl.constexpr = sums_constraints(MB, BN, OPERANDS, BY_THREAD)
    if BY_THREAD:
        return gl.inline_asm(ASM, CONSTRAINTS, operands + acc, repeated(acc[0].type, MB * BN // 64), False)
    else:
        return gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, operands + acc, repeated(gl.float32, MB * BN // 64), False, 32
        )


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
    DTYPE: gl.constexpr,
):
    ASM: gl.constexpr = mma_asm(MB, BN, HALF, TRANSPOSED, DTYPE, BY_THREAD)
    return on_sums(ASM, (b, a) + meta, acc, 2 + MB, MB, BN)


@gluon.jit
def drained(acc, meta, MB: gl.constexpr, BN: gl.constexpr):
    """acc when nothing is in flight. meta: of both halves of a step, which stay in their registers till then."""
    return on_sums("wgmma.wait_group.sync.aligned 0;", meta, acc, 2 * MB, MB, BN)


@gluon.jit
def whereabouts(arena, slot, LAYOUT: gl.constexpr):
    """Where a slot of shared memory is, for `mma`."""
    if BY_THREAD:
        return arena.index(slot)
    else:
        return gl.full([1, 1, 1, 1], slot * SLOT, gl.int32, LAYOUT)


@gluon.jit
def address_of(arena):
    """Where the arena begins in shared memory."""
    if BY_THREAD:
        return gl.inline_asm("mov.u32 $0, $1;", "=r,r", (arena.index(0),), gl.int32, False)
    else:
        ASM: gl.constexpr = "{ .reg .b32 t; mov.u32 t, global_smem; add.u32 $0, t, $1; }"
        return gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(0)], gl.int32, True, 1)


@gluon.jit
def threads(n: gl.constexpr):
    """0..n-1, an element a thread; inline PTX on it runs once a thread."""
    return gl.arange(0, n, layout=gl.BlockedLayout([1], [32], [n // 32], [0]))


@gluon.jit
def until(bar, phase):
    gl.inline_asm_elementwise(until_asm(), "=r,r,r", [bar, phase], gl.int32, False, 1)


@gluon.jit
def give_back(bar, CLUSTER: gl.constexpr):
    gl.inline_asm_elementwise(give_back_asm(CLUSTER), "=r,r", [bar], gl.int32, False, 1)


@gluon.jit
def bring(full, slot, where, SLOTS: gl.constexpr, STAGE: gl.constexpr, PARAMETER: gl.constexpr, CLUSTER: gl.constexpr):
    """See `bring_asm`; where: the coordinates."""
    ASM: gl.constexpr = bring_asm(SLOTS, STAGE, PARAMETER, CLUSTER)
    CONSTRAINTS: gl.constexpr = bring_constraints(SLOTS)
    gl.inline_asm_elementwise(ASM, CONSTRAINTS, (full, slot) + where, gl.int32, False, 1)


@gluon.jit
def rank_of(CLUSTER: gl.constexpr):
    """Which program of its cluster this is."""
    if CLUSTER == 1:
        return gl.to_tensor(0)
    else:
        return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r,r", [gl.to_tensor(0)], gl.int32, True, 1)


@gluon.jit
def meet(THREADS: gl.constexpr, CLUSTER: gl.constexpr):
    if CLUSTER > 1:
        gl.inline_asm_elementwise(meet_asm(), "=r,r", [threads(THREADS)], gl.int32, False, 1)
