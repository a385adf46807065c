"""The eager twin of every op: the definition that the fast kernels are tested against, and the CPU implementation.

Arithmetic that decides something (which mask, which lane) is written so that a fast kernel can repeat it bit by bit in
fp32: the order of every addition is part of the definition.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .layout import Block

# ---------------------------------------------------------------------------------------------------------------- masks


def keys(w: Tensor) -> list[list[Tensor]]:
    """What a mask is chosen by: int32 [rows / 4, cols / 4] for each row and column of a tile of w [rows, cols].

    A key is |w| in steps of 2^-19 of the power of two above the largest entry of its tile, and below that nine bits
    that tell which entries a sum of keys is of: those of columns 1, 2 and 3 of rows 0, 1 and 2, from which the others
    follow. Less 2^27, so that eight of them add up within int32. In a tile with an entry that is no finite number, or
    of 2^121 and more, all count as 0.
    """
    rows, cols = w.shape
    a = w.detach().to(torch.float32).abs().view(rows // 4, 4, cols // 4, 4)
    exponent = a.amax((1, 3), keepdim=True).view(torch.int32) & 0x7F800000  # NaN is the largest
    scale = (0x7C000000 - exponent).clamp(min=0).view(torch.float32)
    steps = ((a * scale).nan_to_num(0.0) + 0.5).view(torch.int32) - 0x3F000000
    tags = torch.tensor([[0, 1, 2, 4], [0, 8, 16, 32], [0, 64, 128, 256], [0] * 4], dtype=torch.int32, device=w.device)
    key = (steps << 9) + (tags - 2**27)[:, None]
    return [[key[:, r, :, c] for c in range(4)] for r in range(4)]


def best_mask(w: Tensor) -> Tensor:
    """The transposable 2:4 mask that keeps the largest sum of |w| in every aligned 4x4 tile (exhaustive).

    w [rows, cols], any float dtype, rows % 4 == cols % 4 == 0  ->  bool [rows, cols].
    Entries are compared as `keys`, rounded to 2^-19 of the tile's largest; of equal sums the one with the largest bits
    wins. Two columns i, j of two rows are shared between them in the better of two ways. The 90 candidates are: what
    rows 0, 1 share of all columns, and rows 2, 3 likewise (36); what rows 0, 1 together share with rows 2, 3 together
    (6); rows 0, 1 sharing i, j, rows 2, 3 too, and the two pairs of rows the other columns (48). A tile with NaN gets
    the mask of zeros: the caller counts them (`pack_weights_`).
    """
    x = keys(w)

    def shared(y: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        """For each pair of columns the better way."""
        return [torch.maximum(y[i] + z[j], y[j] + z[i]) for i, j in layout.PAIRS]

    def all_four(ways: list[Tensor]) -> Tensor:
        return torch.maximum(ways[0] + ways[5], ways[1] + ways[4])  # 01 and 23, or 02 and 13: all six splits

    upper, lower = ([x[r][c] + x[r + 1][c] for c in range(4)] for r in (0, 2))
    top, bottom, pairs = shared(x[0], x[1]), shared(x[2], x[3]), shared(upper, lower)
    best = torch.maximum(all_four(top) + all_four(bottom), all_four(pairs))
    for p in range(6):
        best = torch.maximum(best, top[p] + bottom[p] + pairs[5 - p])
    lines = (best & 0o7) | (best & 0o70) << 1 | (best & 0o700) << 2
    lines |= ((lines ^ (lines >> 4) ^ (lines >> 8)) & 7) << 12  # an even number is kept in each column
    lines = lines << 1 | ((lines ^ (lines >> 1) ^ (lines >> 2)) & 0x1111)  # and in each row
    bit = torch.arange(16, device=w.device, dtype=torch.int32).view(1, 4, 1, 4)
    return (lines[:, None, :, None] >> bit & 1).bool().reshape(w.shape)


def pack_weights_(blocks: Sequence[Block], search: bool) -> Tensor:
    """Twin of `ops.pack_weights_`."""
    return torch.stack([_pack_weight_(*block, search) for block in blocks])


def _pack_weight_(
    w: Tensor, packed: Tensor, packed_t: Tensor, row: int, col: int, rows: int, cols: int, search: bool
) -> Tensor:
    order = layout.metadata_order(w.device)
    w = w.detach()
    r, c = w.shape
    values, metadata = layout.split(packed, rows, cols)
    values_t, metadata_t = layout.split(packed_t, cols, rows)
    old = layout.read_nibbles(metadata, rows, cols, order)[row : row + r, col // 4 : (col + c) // 4]
    mask = old_mask = layout.mask_from_nibbles(old)
    if search:
        mask = best_mask(w)
        layout.write_nibbles(metadata, layout.nibbles_from_mask(mask), row, col, rows, cols, order)
        layout.write_nibbles(metadata_t, layout.nibbles_from_mask(mask.t().contiguous()), col, row, cols, rows, order)
    values[row : row + r, col // 2 : (col + c) // 2] = w[mask].view(r, c // 2).to(packed.dtype)
    values_t[col : col + c, row // 2 : (row + r) // 2] = w.t()[mask.t()].view(c, r // 2).to(packed.dtype)
    return torch.stack(((mask ^ old_mask).sum(), w.isnan().sum()))


def masked_decay_(grads: Sequence[Tensor], blocks: Sequence[Block], decay: float) -> None:
    """Twin of `ops.masked_decay_`."""
    for grad, (w, packed, _, row, col, rows, cols) in zip(grads, blocks, strict=True):
        mask = layout.read_mask(packed, rows, cols, layout.metadata_order(w.device))
        mask = mask[row : row + w.shape[0], col : col + w.shape[1]]
        pruned = w.detach().to(torch.float32).masked_fill(mask, 0.0)
        grad.copy_(grad.to(torch.float32) + decay * pruned)


# -------------------------------------------------------------------------------------------------------------- matmuls


def spmm(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    """Twin of `ops.spmm`."""
    return x @ layout.unpack(packed, rows, x.shape[1], layout.metadata_order(x.device)).t()


def wgrad(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    """Twin of `ops.wgrad`."""
    tokens = padded(x.shape[0])
    return layout.unpack(packed, rows, tokens, layout.metadata_order(x.device))[:, : x.shape[0]] @ x


def padded(tokens: int) -> int:
    """Tokens of a packed gradient: the next multiple of 64."""
    return -(-tokens // layout.TILE) * layout.TILE


# ----------------------------------------------------------------------------------------------------- gradient pruning


def _mix32(h: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters close inputs (the "lowbias32" constants); int64 in, int64 out."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def uniform(seed: Tensor, n: int, first: int = 0) -> Tensor:
    """fp32 [n] in (0, 1), odd multiples of 2^-23: the stream of a 64-bit `seed` (int64 [1]) from entry `first` on."""
    counter = torch.arange(first, first + n, device=seed.device) & 0xFFFFFFFF
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    # Both keys depend on every bit of the seed: were they low and high, seeds 5 and 6 would permute the same numbers.
    key, other = _mix32(low ^ _mix32(high)), _mix32((_mix32(low) + high) & 0xFFFFFFFF)
    h = counter ^ key
    h = ((h ^ (h >> 16)) * 0x7FEB352D + other) & 0xFFFFFFFF  # `_mix32` with the other key inside
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (h >> 9 | 1).to(torch.float32) * 2.0**-23  # a last shift would change only the lowest of these bits


def mvue(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimum-variance unbiased 2:4 pruning by systematic sampling (the paper's MVUE, exactly).

    x fp32 [4, ...], u fp32 [...] from `uniform`  ->  kept lanes i < j (int64) and their values (fp32), all [...].
    E[pruned x] = x up to rounding; the variance is the least that any unbiased 2:4 pruning has. A lane larger than the
    other three together is always kept: with u between 2^-23 and 1 - 2^-23, t < c and t + c > c survive rounding, and
    so does every comparison that decides on that lane. A group that is not finite comes out not finite, so that a
    GradScaler sees it.
    """
    a = x.abs()
    h0, l0 = torch.maximum(a[0], a[1]), torch.minimum(a[0], a[1])
    h1, l1 = torch.maximum(a[2], a[3]), torch.minimum(a[2], a[3])
    mx = torch.maximum(h0, h1)
    rest = (torch.minimum(h0, h1) + l0) + l1  # the sum of the other three, without cancellation
    least = torch.minimum(rest, 0.5 * (mx + rest))  # rest where one lane is larger than the others together
    c = least.clamp(min=2.0**-126)  # above 0 where one lane is not empty
    s1 = torch.minimum(a[0], c)
    s2 = s1 + torch.minimum(a[1], c)
    s3 = s2 + torch.minimum(a[2], c)
    t = u * c
    i = (t >= s1).to(torch.int64) + (t >= s2).to(torch.int64)
    tc = t + c
    j = 1 + ((t >= s1) | (tc > s2)).to(torch.int64) + ((t >= s2) | (tc > s3)).to(torch.int64)

    def value(lane: Tensor) -> Tensor:
        v = x.gather(0, lane[None])[0]
        return torch.copysign(torch.maximum(v.abs(), least), v)

    return i, j, value(i), value(j)


def pack_gradient(dy: Tensor, seeds: Tensor, index: int) -> Tensor:
    """Twin of `ops.pack_gradient`."""
    tokens, features = dy.shape
    x = F.pad(dy.to(torch.float32), (0, 0, 0, padded(tokens) - tokens)).view(-1, 4, features)
    u = uniform(seeds[index : index + 1], x.shape[0] * features).view(-1, features)
    i, j, vi, vj = mvue(x.transpose(0, 1), u)
    packed = layout.empty(features, padded(tokens), dy.dtype, dy.device)
    values, metadata = layout.split(packed, features, padded(tokens))
    values.copy_(torch.stack((vi, vj), 1).view(-1, features).t().to(dy.dtype))
    nibbles = (i | j << 2).t().to(torch.uint8)
    layout.write_nibbles(metadata, nibbles, 0, 0, features, padded(tokens), layout.metadata_order(dy.device))
    return packed


# ---------------------------------------------------------------------------------------------------- gated activations


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
#: Kinds of `ops.glu`: gated ones halve the features, the others keep them.
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
KINDS = (*GATED, *ACTIVATIONS)


def glu(gate_up: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Twin of `ops.glu`. Arithmetic in fp32 (float64 stays)."""
    z = gate_up if gate_up.dtype == torch.float64 else gate_up.to(torch.float32)
    if bias is not None:
        z = z + bias.to(z.dtype)
    if kind in GATED:
        gate, up = z.chunk(2, -1)
        return (ACTIVATIONS[GATED[kind]](gate) * up).to(gate_up.dtype)
    return ACTIVATIONS[kind](z).to(gate_up.dtype)


def _derivative(z: Tensor, kind: str) -> Tensor:
    """ACTIVATIONS[kind]'(z). Not through autograd: under a dispatch mode nothing records inside an op."""
    one = torch.ones_like(z)
    if kind == "silu":
        return torch.ops.aten.silu_backward(one, z)
    if kind in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(one, z, approximate="tanh" if kind == "gelu_tanh" else "none")
    return torch.ops.aten.threshold_backward(one if kind == "relu" else 2.0 * F.relu(z), z, 0)


def glu_backward(dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Twin of `ops.glu_backward`."""
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    z, d = gate_up.to(wide), dh.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    if kind in GATED:
        gate, up = z.chunk(2, -1)
        activation = GATED[kind]
        out = torch.cat((d * up * _derivative(gate, activation), d * ACTIVATIONS[activation](gate)), -1)
    else:
        out = d * _derivative(z, kind)
    out = out.to(gate_up.dtype)
    return out, _sums(out, bias)


def glu_backward_pack(
    dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str, seeds: Tensor, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `ops.glu_backward_pack`."""
    d, sums = glu_backward(dh, gate_up, bias, kind)
    return d, pack_gradient(d, seeds, index), sums


def _sums(d: Tensor, bias: Tensor | None) -> Tensor:
    return d.new_empty(0, dtype=torch.float32) if bias is None else d.sum(0, dtype=torch.float32)
