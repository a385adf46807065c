"""The packed form: its bytes against loops written from the description of the hardware's format."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse24.kernels import layout, reference

SIZES = [(64, 64), (128, 64), (64, 128), (192, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_mask(rows, cols):
    """Two of every four, row by row."""
    return torch.rand(rows, cols // 4, 4).argsort(-1).lt(2).view(rows, cols)


def metadata_by_loops(mask, order):
    """Word by word: eight nibbles of rows m and m + 8 in every int32 (sm_80), sixteen in every int64 (sm_90)."""
    rows, cols = mask.shape
    nibbles = np.zeros((rows, cols // 4), np.uint64)
    for m in range(rows):
        for c in range(cols // 4):
            i, j = np.flatnonzero(mask[m, 4 * c : 4 * c + 4].numpy())
            nibbles[m, c] = i | j << 2
    sm_90 = order == "sm_90"
    words = np.zeros(rows * cols // (64 if sm_90 else 32), "<u8" if sm_90 else "<u4")
    for m in range(rows):
        for c in range(cols // 4):
            m16, g, high = m // 16 * 16, m % 8, m % 16 // 8
            k32, half, lane = c // 8 * 32, c % 8 // 4, c % 4
            if sm_90:
                word = m16 // 64 * cols + k32 // 32 * 32 + m16 % 64 // 16 * 8 + g
                bit = 8 * (2 * lane + half) + 4 * high
            else:
                word = k32 // 64 * (256 * (rows // 128)) + m16 // 128 * 256 + k32 % 64 // 32 * 128
                word += m16 % 128 // 32 * 32 + g * 4 + m16 % 32 // 16 * 2 + half
                bit = 4 * lane + 16 * high
            words[word] |= words.dtype.type(int(nibbles[m, c]) << bit)
    return torch.from_numpy(words.view(np.uint8))


@pytest.mark.parametrize(
    ("order", "rows", "cols"),
    [("sm_90", *size) for size in SIZES] + [("sm_80", 128, 64), ("sm_80", 256, 192)],
)
def test_the_bytes_are_those_of_the_format(order, rows, cols):
    dense, mask = torch.randn(rows, cols).to(torch.bfloat16), random_mask(rows, cols)
    values, metadata = layout.split(layout.pack(dense, mask, order), rows, cols)
    assert torch.equal(metadata, metadata_by_loops(mask, order))
    for m in range(0, rows, 17):
        assert torch.equal(values[m], dense[m][mask[m]])


@pytest.mark.parametrize("order", ["sm_90", "sm_80"])
def test_every_half_byte_of_the_metadata_belongs_to_one_group(order):
    rows, cols = 256, 192
    m, c = torch.arange(rows)[:, None], torch.arange(cols // 4)[None]
    byte, shift = layout.nibble_address(m, c, rows, cols, order)
    at = (2 * byte + shift // 4).flatten()
    assert torch.equal(at.sort().values, torch.arange(rows * cols // 4))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from([64, 128, 192]),
    cols=st.sampled_from([32, 64, 96, 256]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(rows, cols, dtype, seed):
    torch.manual_seed(seed)
    dense, mask = torch.randn(rows, cols).to(dtype), random_mask(rows, cols)
    packed = layout.pack(dense, mask, "sm_90")
    assert packed.shape == (layout.numel(rows, cols, dtype),)
    assert packed.nbytes == rows * cols // 2 * dtype.itemsize + rows * cols // 8
    assert torch.equal(layout.read_mask(packed, rows, cols, "sm_90"), mask)
    assert torch.equal(layout.unpack(packed, rows, cols, "sm_90"), dense * mask)


@pytest.mark.parametrize("order", ["sm_90", "sm_80"])
def test_a_matrix_and_its_transpose_agree(order):
    w = torch.randn(128, 256)
    mask = reference.best_mask(w)
    packed = layout.pack(w, mask, order)
    packed_t = layout.pack(w.t().contiguous(), mask.t().contiguous(), order)
    assert torch.equal(layout.unpack(packed, 128, 256, order), layout.unpack(packed_t, 256, 128, order).t())


def test_nibbles_name_two_lanes_in_increasing_order():
    mask = torch.tensor([[i in pair for i in range(4)] for pair in layout.PAIRS])
    assert layout.NIBBLES == (4, 8, 12, 9, 13, 14)
    assert layout.nibbles_from_mask(mask).flatten().tolist() == list(layout.NIBBLES)
    nibbles = layout.nibbles_from_mask(random_mask(64, 256))
    assert set(nibbles.unique().tolist()) == set(layout.NIBBLES)
    assert torch.equal(layout.nibbles_from_mask(layout.mask_from_nibbles(nibbles)), nibbles)


@pytest.mark.parametrize("order", ["sm_90", "sm_80"])
def test_blocks_of_nibbles_add_up_to_the_whole_and_touch_nothing_else(order):
    rows, cols = 128, 192
    nibbles = layout.nibbles_from_mask(random_mask(rows, cols))
    whole = torch.zeros(rows * cols // 8, dtype=torch.uint8)
    layout.write_nibbles(whole, nibbles, 0, 0, rows, cols, order)
    poison = torch.full_like(whole, 0xFF)
    parts = poison.clone()
    for row, col, r, c in [(64, 0, 64, 128), (0, 128, 128, 64), (0, 0, 64, 128)]:
        before = parts.clone()
        layout.write_nibbles(parts, nibbles[row : row + r, col // 4 : (col + c) // 4], row, col, rows, cols, order)
        assert int((parts != before).sum()) <= r * c // 8
        back = layout.read_nibbles(parts, rows, cols, order)[row : row + r, col // 4 : (col + c) // 4]
        assert torch.equal(back, nibbles[row : row + r, col // 4 : (col + c) // 4])
    assert torch.equal(parts, whole)


def test_an_empty_matrix_has_an_empty_packed_form():
    packed = torch.empty(0)
    values, metadata = layout.split(packed, 64, 0)
    assert values.shape == (64, 0) and metadata.shape == (0,)
    assert layout.unpack(packed, 64, 0, "sm_90").shape == (64, 0)


def test_errors_say_what_was_found_and_what_is_needed():
    with pytest.raises(
        ValueError, match=r"packed buffer of shape \(10,\).*need one contiguous dimension of 2304 elements"
    ):
        layout.split(torch.empty(10, dtype=torch.bfloat16), 64, 64)
    with pytest.raises(ValueError, match="need one contiguous dimension"):
        layout.split(torch.empty(2 * 2304, dtype=torch.bfloat16)[::2], 64, 64)
    with pytest.raises(ValueError, match="found a 32x64 matrix, need rows in multiples of 64 and columns of 32"):
        layout.pack(torch.zeros(32, 64), random_mask(32, 64), "sm_90")
    with pytest.raises(ValueError, match="found a 64x64 matrix, need rows in multiples of 128"):
        layout.pack(torch.zeros(64, 64), random_mask(64, 64), "sm_80")
    with pytest.raises(ValueError, match="mask that is not 2:4"):
        layout.nibbles_from_mask(torch.ones(64, 64, dtype=torch.bool))


def test_the_cpu_holds_the_form_that_hopper_reads():
    assert layout.arch(torch.device("cpu")) == layout.metadata_order(torch.device("cpu")) == "sm_90"


def bytes_behind(packed):
    return packed.untyped_storage().nbytes() - packed.storage_offset() * packed.itemsize - packed.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "room"), [(256, 512, 0), (256, 64, 6144), (64, 256, 6144), (192, 320, 8704)])
def test_whole_tiles_of_metadata_can_be_read(rows, cols, room, dtype):
    packed = layout.empty(rows, cols, dtype, torch.device("cpu"))
    assert packed.shape == (layout.numel(rows, cols, dtype),) and packed.is_contiguous() and packed._base is None
    assert bytes_behind(packed) == room
    assert layout.with_room(packed, rows, cols) is packed


def test_a_packed_form_without_room_is_copied_into_one():
    packed = torch.randn(layout.numel(192, 320, torch.bfloat16)).bfloat16()
    moved = layout.with_room(packed, 192, 320)
    assert torch.equal(moved, packed) and bytes_behind(packed) == 0 and bytes_behind(moved) == 8704
    enough = torch.randn(packed.numel() + 5000).bfloat16()[: packed.numel()]  # what is behind a view is its own
    assert layout.with_room(enough, 192, 320) is enough
    late = torch.randn(packed.numel() + 5000).bfloat16()[5000:]
    assert bytes_behind(layout.with_room(late, 192, 320)) == 8704
