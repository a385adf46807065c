"""The packed 2:4 form of a matrix: the closed forms of its bytes, in one place.

A matrix [rows, cols] that keeps two of every four entries along cols is one flat buffer of its own dtype:

    values    [rows, cols / 2], row-major; the two kept entries of each group in increasing column order
    metadata  rows * cols / 8 bytes right behind; a nibble a group: i0 | i1 << 2 for the kept lanes i0 < i1

so the nibbles are 4, 8, 12, 9, 13, 14 for the pairs 01, 02, 03, 12, 13, 23. Only the order of the nibbles depends on
the architecture:

    sm_90   the order cuSPARSELt 0.8 writes on Hopper for 16-bit types; checked against `torch._cslt_compress` on an
            H200 at seven sizes from 64x64 to 1024x4096, byte for byte.
    sm_80   the order cuSPARSELt writes on Ampere and Ada, as `torch._sparse_semi_structured_tile` documents it; not run
            on such a GPU by us. rows must be a multiple of 128.

The CPU holds the sm_90 form, so a test on the CPU checks the bytes that a Hopper GPU reads. A 32-bit matrix has the
same form (twice the bytes for values); no tensor core reads it, the reference does.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Kept lanes (i0, i1) of the six pairs, in the order the mask search enumerates them. complement(p) = 5 - p.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
#: Nibble of each pair.
NIBBLES = tuple(i | j << 2 for i, j in PAIRS)
#: Packed rows and columns come in tiles of this many.
TILE = 64
#: Rows come in blocks of this many in each order of the metadata.
ROW_BLOCK = {"sm_90": 64, "sm_80": 128}
#: The metadata have room behind them for whole tiles of this many rows and columns. cuSPARSELt's kernels read whole
#: tiles, also where the matrix ends within one, and take no notice of what is behind: compute-sanitizer found a read of
#: 512 bytes behind the buffer of a matrix of 64 columns (cuSPARSELt 0.8.0 on an H200, tiles of 128). 256 is the largest
#: tile of its kernels' names.
ROOM_TILE = 256

_NOWHERE_ELSE = nullcontext()


class Block(NamedTuple):
    """A weight w [r, c] and where it stands: at (row, col) of a [rows, cols] matrix with these packed forms.

    packed is that of the matrix, packed_t that of its transpose. r, c, row and col are multiples of 64; w has any
    strides.
    """

    w: Tensor
    packed: Tensor
    packed_t: Tensor
    row: int
    col: int
    rows: int
    cols: int


@lru_cache(maxsize=64)
def arch(device: torch.device) -> str | None:
    """The metadata order that sparse tensor cores of `device` read: "sm_90" (also for the CPU), "sm_80", or None."""
    if device.type != "cuda":
        return "sm_90"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm_80", 9: "sm_90"}.get(major)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one, as both Triton and cuSPARSELt want it; nothing is done where it is already."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _NOWHERE_ELSE


def metadata_order(device: torch.device) -> str:
    """`arch(device)`, with "sm_90" for GPUs whose order is unknown: there only our own kernels read the bytes."""
    return arch(device) or "sm_90"


def numel(rows: int, cols: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` in the packed form of a [rows, cols] matrix (9/16 of the dense count for 16-bit types)."""
    return rows * cols // 2 + rows * cols // 8 // dtype.itemsize


@lru_cache(maxsize=1024)
def _room(rows: int, cols: int) -> int:
    """Bytes behind a packed buffer that may be read; see `ROOM_TILE`."""
    whole_rows, whole_cols = (-(-n // ROOM_TILE) * ROOM_TILE for n in (rows, cols))
    return (whole_rows * whole_cols - rows * cols) // 8


def empty(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized packed buffer of a [rows, cols] matrix, [numel], whose storage has room behind it."""
    n = numel(rows, cols, dtype)
    made = torch.empty(n + -(-_room(rows, cols) // dtype.itemsize), dtype=dtype, device=device)
    return made if made.numel() == n else made.resize_(n)  # which keeps the storage


def with_room(packed: Tensor, rows: int, cols: int) -> Tensor:
    """`packed` itself where its storage has room behind it, else a copy that has."""
    room = _room(rows, cols)
    if room and packed.untyped_storage().nbytes() - packed.storage_offset() * packed.itemsize - packed.nbytes < room:
        packed = empty(rows, cols, packed.dtype, packed.device).copy_(packed)
    return packed


def check(packed: Tensor, rows: int, cols: int) -> None:
    """Raise ValueError where a buffer is not the packed form of a [rows, cols] matrix."""
    expected = numel(rows, cols, packed.dtype)
    if packed.dim() != 1 or packed.numel() != expected or not packed.is_contiguous():
        raise ValueError(
            f"sparse24: found a packed buffer of shape {tuple(packed.shape)} ({packed.dtype}), need one contiguous "
            f"dimension of {expected} elements for a {rows}x{cols} matrix"
        )


def split(packed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Views of a packed buffer: values [rows, cols / 2] and metadata uint8 [rows * cols / 8].

    Raises ValueError where the buffer is not the packed form of such a matrix.
    """
    check(packed, rows, cols)
    values = packed[: rows * cols // 2].view(rows, cols // 2)
    return values, packed[rows * cols // 2 :].view(torch.uint8)


def nibble_address(m: Tensor, c: Tensor, rows: int, cols: int, order: str) -> tuple[Tensor, Tensor]:
    """Byte offset and bit shift (0 or 4) of the nibble of group `c` (columns 4c..4c+3) in row `m`; m and c
    broadcast.
    """
    if order == "sm_90":
        byte = (
            (m // 64) * (8 * cols) + (c // 8) * 256 + ((m % 64) // 16) * 64 + (m % 8) * 8 + (c % 4) * 2 + (c % 8) // 4
        )
        return byte, 4 * ((m % 16) // 8) + 0 * c
    word = (c // 16) * (256 * (rows // 128)) + (m // 128) * 256 + ((c % 16) // 8) * 128 + ((m % 128) // 32) * 32
    word = word + (m % 8) * 4 + ((m % 32) // 16) * 2 + (c % 8) // 4
    return 4 * word + 2 * ((m % 16) // 8) + (c % 4) // 2, 4 * (c % 2) + 0 * m


def _addresses(rows: int, cols: int, order: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nibble_address` of a whole matrix; kept on the CPU, where the ops run through it, made anew on a GPU's
    memory.
    """
    return (_kept_addresses if device.type == "cpu" else _make_addresses)(rows, cols, order, device)


def _make_addresses(rows: int, cols: int, order: str, device: torch.device) -> tuple[Tensor, Tensor]:
    if rows % ROW_BLOCK[order] or cols % 32:
        need = f"rows in multiples of {ROW_BLOCK[order]} and columns of 32 ({order})"
        raise ValueError(f"sparse24: found a {rows}x{cols} matrix, need {need}")
    m = torch.arange(rows, device=device)[:, None]
    c = torch.arange(cols // 4, device=device)[None]
    byte, shift = nibble_address(m, c, rows, cols, order)
    return byte, shift.to(torch.uint8)


_kept_addresses = lru_cache(maxsize=32)(_make_addresses)


def read_nibbles(metadata: Tensor, rows: int, cols: int, order: str) -> Tensor:
    """uint8 [rows, cols / 4]: the nibble of every group, in row-major order."""
    byte, shift = _addresses(rows, cols, order, metadata.device)
    return (metadata[byte] >> shift) & 15


def write_nibbles(metadata: Tensor, nibbles: Tensor, row: int, col: int, rows: int, cols: int, order: str) -> None:
    """Write uint8 [r, k / 4] nibbles into the metadata of a [rows, cols] matrix, their first entry at (row, col).

    The block must cover whole bytes: its origin and size are multiples of 64.
    """
    byte, shift = _addresses(rows, cols, order, metadata.device)
    block = (slice(row, row + nibbles.shape[0]), slice(col // 4, col // 4 + nibbles.shape[1]))
    at, by = byte[block].reshape(-1), shift[block].reshape(-1)
    metadata[at] = 0
    halves = (nibbles.reshape(-1) << by).to(torch.int32)
    full = torch.zeros(metadata.shape, dtype=torch.int32, device=metadata.device).index_add_(0, at, halves)
    metadata[at] = full[at].to(torch.uint8)


def nibbles_from_mask(mask: Tensor) -> Tensor:
    """uint8 [rows, cols / 4] nibbles of a bool [rows, cols] mask with exactly two kept in every aligned group of
    four.
    """
    groups = mask.view(mask.shape[0], -1, 4).to(torch.uint8)
    if not bool((groups.sum(-1) == 2).all()):
        raise ValueError("sparse24: found a mask that is not 2:4, need exactly two kept in every aligned group of four")
    lanes = torch.arange(4, device=mask.device, dtype=torch.uint8)
    last = (groups * lanes).amax(-1)
    return (groups * lanes).sum(-1, dtype=torch.uint8) - last | last << 2


def mask_of(w: Tensor) -> Tensor | None:
    """bool [rows, cols]: two kept in every aligned group of four along cols, all nonzero entries of w among them.

    w [rows, cols] of any dtype, cols % 4 == 0. None where some group has three or more nonzero entries.
    """
    nonzero = (w != 0).reshape(w.shape[0], -1, 4)
    count = nonzero.sum(-1, keepdim=True, dtype=torch.uint8)
    if bool((count > 2).any()):
        return None
    filled = (~nonzero).cumsum(-1, dtype=torch.uint8) <= 2 - count  # the first zeros of a group that has fewer than two
    return (nonzero | filled).view(w.shape)


def mask_from_nibbles(nibbles: Tensor) -> Tensor:
    """bool [rows, cols] mask of uint8 [rows, cols / 4] nibbles."""
    lanes = torch.arange(4, device=nibbles.device, dtype=torch.uint8)
    n = nibbles[..., None]
    return ((lanes == (n & 3)) | (lanes == (n >> 2))).view(nibbles.shape[0], -1)


def read_mask(packed: Tensor, rows: int, cols: int, order: str) -> Tensor:
    """bool [rows, cols]: what a packed buffer keeps."""
    return mask_from_nibbles(read_nibbles(split(packed, rows, cols)[1], rows, cols, order))


def pack(dense: Tensor, mask: Tensor, order: str) -> Tensor:
    """The packed buffer of dense * mask, both [rows, cols]."""
    rows, cols = dense.shape
    packed = empty(rows, cols, dense.dtype, dense.device)
    values, metadata = split(packed, rows, cols)
    values.copy_(dense[mask].view(rows, cols // 2))
    write_nibbles(metadata, nibbles_from_mask(mask), 0, 0, rows, cols, order)
    return packed


def unpack(packed: Tensor, rows: int, cols: int, order: str) -> Tensor:
    """The dense [rows, cols] matrix of a packed buffer, zeros where nothing is kept."""
    values, metadata = split(packed, rows, cols)
    nibbles = read_nibbles(metadata, rows, cols, order).to(torch.int64)
    lanes = torch.stack((nibbles & 3, nibbles >> 2), -1)
    dense = packed.new_zeros(rows, cols // 4, 4)
    return dense.scatter_(-1, lanes, values.view(rows, cols // 4, 2)).view(rows, cols)
