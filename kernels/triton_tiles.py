"""4x4 tiles of weights in the registers of a thread: the search of the best transposable mask, and what a mask keeps.

A tile is four lines. A line is four values or, where entries have 16 bits, two words of two values each.
"""

import triton
import triton.language as tl

from .triton_common import INTERPRETED, larger, select_bytes


@triton.jit
def two_words(x):
    """A group of four 16-bit values in two uint32 (`words_of`), from a uint64."""
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _word(x0, x1, dtype: tl.constexpr):
    """Two values as 16-bit ones in a uint32, the first below."""
    if INTERPRETED or x0.dtype != tl.float32:
        x0, x1 = x0.to(dtype).to(tl.uint16, bitcast=True), x1.to(dtype).to(tl.uint16, bitcast=True)
        word = x0.to(tl.uint32) | (x1.to(tl.uint32) << 16)
    else:  # one conversion of both
        kind: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        word = tl.inline_asm_elementwise(
            f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f", [x0, x1], dtype=tl.uint32, is_pure=True, pack=1
        )
    return word


@triton.jit
def words_of(x, dtype: tl.constexpr):
    """Four values in two uint32."""
    return _word(x[0], x[1], dtype), _word(x[2], x[3], dtype)


@triton.jit
def to_fp32(x):
    return x[0].to(tl.float32), x[1].to(tl.float32), x[2].to(tl.float32), x[3].to(tl.float32)


@triton.jit
def _fp32_of_word(word, dtype: tl.constexpr):
    """The two values in a word, exactly."""
    if dtype == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif INTERPRETED:
        low = word.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    else:  # a conversion takes either half of a register; a shift before it would be one instruction more
        low, high = tl.inline_asm_elementwise(
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return low, high


@triton.jit
def fp32_of_words(words, dtype: tl.constexpr):
    """The four values in two words, exactly."""
    a, b = _fp32_of_word(words[0], dtype), _fp32_of_word(words[1], dtype)
    return a[0], a[1], b[0], b[1]


@triton.jit
def count_bits(x):
    if INTERPRETED:
        x = (x & 0x5555) + ((x >> 1) & 0x5555)
        x = (x & 0x3333) + ((x >> 2) & 0x3333)
        x = (x & 0x0F0F) + ((x >> 4) & 0x0F0F)
        x = (x & 0xFF) + (x >> 8)
    else:
        x = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return x


@triton.jit
def _line_max(x):
    """The largest magnitude of four values, NaN where one is."""
    return larger(larger(tl.abs(x[0]), tl.abs(x[1])), larger(tl.abs(x[2]), tl.abs(x[3])))


@triton.jit
def largest_of(x0, x1, x2, x3):
    """The largest magnitude in a tile of four lines, fp32; NaN where one is."""
    return larger(larger(_line_max(x0), _line_max(x1)), larger(_line_max(x2), _line_max(x3)))


@triton.jit
def _larger_word(a, b, dtype: tl.constexpr, ORDER: tl.constexpr):
    """Of two words with two values each the larger magnitudes, either sign; NaN where one is."""
    kind: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    at_once: tl.constexpr = f"max.NaN.xorsign.abs.{kind} $0, $1, $2;"
    by_and: tl.constexpr = (
        f"{{.reg .b32 a, b; and.b32 a, $1, 0x7FFF7FFF; and.b32 b, $2, 0x7FFF7FFF; max.NaN.{kind} $0, a, b;}}"
    )
    asm: tl.constexpr = at_once if ORDER == "sm_90" else by_and  # sm_80 has no xorsign
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def largest_in_words(y0, y1, y2, y3, dtype: tl.constexpr, ORDER: tl.constexpr):
    """`largest_of` of four lines of words: two values at once."""
    if INTERPRETED:
        x0, x1 = fp32_of_words(y0, dtype), fp32_of_words(y1, dtype)
        x2, x3 = fp32_of_words(y2, dtype), fp32_of_words(y3, dtype)
        largest = largest_of(x0, x1, x2, x3)
    else:
        a = _larger_word(
            _larger_word(y0[0], y0[1], dtype, ORDER), _larger_word(y1[0], y1[1], dtype, ORDER), dtype, ORDER
        )
        b = _larger_word(
            _larger_word(y2[0], y2[1], dtype, ORDER), _larger_word(y3[0], y3[1], dtype, ORDER), dtype, ORDER
        )
        low, high = _fp32_of_word(_larger_word(a, b, dtype, ORDER), dtype)
        largest = larger(tl.abs(low), tl.abs(high))
    return largest


@triton.jit
def _key(x, scale, TAG: tl.constexpr):
    """Twin of `reference.keys`, uint32: |x| * scale in steps of 2^-24, 0 for what is no number, above nine tag bits."""
    if INTERPRETED:
        share = tl.abs(x) * scale
        share = tl.where(share == share, share + 0.5, 0.0)
    else:  # .sat makes 0 of NaN
        share = tl.inline_asm_elementwise(
            "{.reg .f32 a; abs.f32 a, $1; fma.rn.sat.f32 $0, a, $2, 0f3F000000;}",
            "=f,f,f",
            [x, scale],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return (share.to(tl.uint32, bitcast=True) << 9) + TAG  # the shift leaves only the mantissa


@triton.jit
def _keys(x, scale, ROW: tl.constexpr):
    """Of the four entries in row ROW of a tile."""
    unit: tl.constexpr = (1 << 3 * ROW) & 0o777  # the last row follows from the others
    return _key(x[0], scale, 0), _key(x[1], scale, unit), _key(x[2], scale, 2 * unit), _key(x[3], scale, 4 * unit)


@triton.jit
def _share(y, z, C: tl.constexpr, D: tl.constexpr):
    """The better way of sharing columns C and D between rows y and z."""
    return tl.maximum(y[C] + z[D], y[D] + z[C])


@triton.jit
def _shared(y, z):
    """`_share` of each pair of columns, in the order of `layout.PAIRS`."""
    return (
        _share(y, z, 0, 1),
        _share(y, z, 0, 2),
        _share(y, z, 0, 3),
        _share(y, z, 1, 2),
        _share(y, z, 1, 3),
        _share(y, z, 2, 3),
    )


@triton.jit
def _all_four(ways):
    return tl.maximum(ways[0] + ways[5], ways[1] + ways[4])


@triton.jit
def _both(y, z):
    return y[0] + z[0], y[1] + z[1], y[2] + z[2], y[3] + z[3]


@triton.jit
def best_mask(x0, x1, x2, x3, exponent):
    """Twin of `reference.best_mask` of four lines, fp32: int32, bit 4 * row + column of what is kept.

    exponent: the bits of the exponent of `largest_of`, int32.
    """
    scale = tl.maximum(0x7C000000 - exponent, 0).to(tl.float32, bitcast=True)
    a, b, c, d = _keys(x0, scale, 0), _keys(x1, scale, 1), _keys(x2, scale, 2), _keys(x3, scale, 3)
    top, bottom, pairs = _shared(a, b), _shared(c, d), _shared(_both(a, b), _both(c, d))
    best = tl.maximum(_all_four(top) + _all_four(bottom), _all_four(pairs))
    for p in tl.static_range(6):
        best = tl.maximum(best, top[p] + bottom[p] + pairs[5 - p])
    # Bits of columns 1 to 3 in rows 0 to 2; an even number is kept in each column, and in each row.
    lines = (best & 0o7) | (best & 0o70) << 1 | (best & 0o700) << 2
    lines |= ((lines ^ (lines >> 4) ^ (lines >> 8)) & 7) << 12
    return lines << 1 | ((lines ^ (lines >> 1) ^ (lines >> 2)) & 0x1111)


@triton.jit
def transposed(mask):
    """Bit 4 * r + c goes to bit 4 * c + r."""
    swapped = (mask ^ (mask >> 3)) & 0x0A0A
    mask ^= swapped ^ (swapped << 3)
    swapped = (mask ^ (mask >> 6)) & 0x00CC
    return mask ^ swapped ^ (swapped << 6)


@triton.jit
def beside(mask, x):
    """mask, in the layout of x: where they meet first it is moved, and no later what is made of it eight times over."""
    if not INTERPRETED:
        mask = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [mask, x], dtype=tl.int32, is_pure=True, pack=1)
    return mask


@triton.jit
def _add_words(a, b, dtype: tl.constexpr):
    """A word that is not finite where a or b is not: the sums of their values."""
    if INTERPRETED:
        result = tl.where(_exponent_is_full(a, dtype) != 0, a, b)
    elif dtype == tl.bfloat16:  # fma.rn.bf16x2 by 1: an addition would need sm_90
        result = tl.inline_asm_elementwise(
            "{.reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2;}",
            "=r,r,r",
            [a, b],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        result = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _exponent_is_full(word, dtype: tl.constexpr):
    """Not zero where one of the two values is infinite or NaN."""
    lowest: tl.constexpr = 0x00800080 if dtype == tl.bfloat16 else 0x04000400  # bits of the exponents
    return ((word & 0x7FFF7FFF) + lowest) & 0x80008000


@triton.jit
def not_finite(x0, x1, x2, x3, dtype: tl.constexpr):
    """Not zero where one of the values in four lines of words is NaN; also for some infinite or huge ones."""
    low = _add_words(_add_words(x0[0], x1[0], dtype), _add_words(x2[0], x3[0], dtype), dtype)
    high = _add_words(_add_words(x0[1], x1[1], dtype), _add_words(x2[1], x3[1], dtype), dtype)
    return _exponent_is_full(_add_words(low, high, dtype), dtype)


@triton.jit
def nibbles_of(mask):
    """The nibbles of the four lines of a mask, byte i that of the line with bits 4 * i.. : uint32.

    Here and in `kept_words_of` a table is two words, whose byte b belongs to lines with b for their lowest three bits:
    these tell the six pairs apart.
    """
    lines = mask.to(tl.uint32) & 0x7777
    zero = lines & 0
    return select_bytes(zero | 0x040D0C00, zero | 0x0009080E, lines)


@triton.jit
def kept_words_of(x0, x1, x2, x3, mask):
    """What each line of a mask keeps of its two words: one word."""
    lines = mask.to(tl.uint32) & 0x7777
    zero = lines & 0
    first = select_bytes(zero | 0x10321000, zero | 0x00321054, lines)  # the bytes of the first kept value
    last = select_bytes(zero | 0x32767600, zero | 0x00545476, lines)
    return (
        select_bytes(x0[0], x0[1], select_bytes(first, last, 0x40)),
        select_bytes(x1[0], x1[1], select_bytes(first, last, 0x51)),
        select_bytes(x2[0], x2[1], select_bytes(first, last, 0x62)),
        select_bytes(x3[0], x3[1], select_bytes(first, last, 0x73)),
    )


@triton.jit
def columns_of(x0, x1, x2, x3):
    """The four columns of four lines of words, as lines of words."""
    return (
        (select_bytes(x0[0], x1[0], 0x5410), select_bytes(x2[0], x3[0], 0x5410)),
        (select_bytes(x0[0], x1[0], 0x7632), select_bytes(x2[0], x3[0], 0x7632)),
        (select_bytes(x0[1], x1[1], 0x5410), select_bytes(x2[1], x3[1], 0x5410)),
        (select_bytes(x0[1], x1[1], 0x7632), select_bytes(x2[1], x3[1], 0x7632)),
    )


@triton.jit
def kept_of(x, mask, LINE: tl.constexpr):
    """The two values that line LINE of a mask keeps of x, [..., 2]."""
    bits = mask >> (4 * LINE)
    first = tl.where((bits & 1) != 0, x[0], tl.where((bits & 2) != 0, x[1], x[2]))
    last = tl.where((bits & 8) != 0, x[3], tl.where((bits & 4) != 0, x[2], x[1]))
    return tl.join(first, last)


@triton.jit
def sum_of(x):
    return (x[0].to(tl.float32) + x[1].to(tl.float32)) + (x[2].to(tl.float32) + x[3].to(tl.float32))
