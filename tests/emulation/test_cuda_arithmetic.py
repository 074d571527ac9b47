"""How launches are cut and where partial sums go (csrc/cuda/partition.h, group_norm_partition.h, rms_norm_partition.h), and the numbering
of the noise."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvae.reference import latent as reference

STEP, TILE, WARP, THREADS = 2048, 512, 32, 128


@pytest.fixture(scope="module")
def call(emulated):
    def function(name, *arguments, out=0):
        symbol = getattr(emulated, f"emulated_{name}")
        symbol.restype = ctypes.c_int64
        results = (ctypes.c_int64 * max(out, 1))()
        value = symbol(*(ctypes.c_int64(a) for a in arguments), *((results,) if out else ()))
        return list(results) if out else value

    return function


@given(divisor=st.integers(1, 2**62), n=st.integers(0, 2**63 - 1))
def test_division_by_a_product_is_exact(call, divisor, n):
    assert call("quotient", divisor, n) == n // divisor


@given(divisor=st.integers(1, 2**40), quotient=st.integers(1, 2**22))
def test_division_is_exact_at_its_steps(call, divisor, quotient):
    assert call("quotient", divisor, divisor * quotient) == quotient
    assert call("quotient", divisor, divisor * quotient - 1) == quotient - 1


def test_threads_cover_a_step_once_and_a_warp_has_one_noise_tile(call):
    offsets = {thread: [call("vector_offset", thread, run) for run in range(4)] for thread in range(THREADS)}
    elements = sorted(offset + k for vectors in offsets.values() for offset in vectors for k in range(4))
    assert elements == list(range(STEP))
    assert all(offset // TILE == thread // WARP for thread, vectors in offsets.items() for offset in vectors)
    # A thread's four vectors have the same lanes, one in each stream: their normals come of the same counters.
    assert all(len({offset % 128 for offset in vectors}) == 1 for vectors in offsets.values())


@given(numel=st.integers(1, 2**40), max_blocks=st.sampled_from((1, 512, 2048, 8192)))
def test_chunks_cover_all_elements_in_whole_steps(call, numel, max_blocks):
    elements, blocks = call("chunks", numel, max_blocks, out=2)
    assert elements % STEP == 0
    assert blocks <= max_blocks
    assert (blocks - 1) * elements < numel <= blocks * elements


@given(length=st.integers(1, 9000), rows=st.integers(1, 40), steps=st.integers(1, 3))
def test_each_row_that_crosses_chunks_has_one_owner(call, length, rows, steps):
    numel, chunk = length * rows, steps * STEP
    blocks = -(-numel // chunk)
    owned = {}
    for block in range(1, blocks):
        row = call("owned_row", length, numel, chunk, block)
        if row >= 0:
            assert row not in owned
            owned[row] = block
    expected = {row: row * length // chunk + 1 for row in range(rows) if row * length // chunk != ((row + 1) * length - 1) // chunk}
    assert owned == expected
    for row in owned:
        assert call("last_block", length, numel, chunk, row) == ((row + 1) * length - 1) // chunk


@pytest.mark.parametrize(("length", "group"), [(1, 1), (4, 1), (5, 2), (20, 8), (64, 16), (128, 32), (10**6, 32)])
def test_short_rows_share_a_warp(call, length, group):
    assert call("row_group", length) & 0xFFFFFFFF == group


@given(rows=st.integers(1, 20), columns=st.integers(1, 12), inner=st.sampled_from((1, 2, 5)))
def test_columns_cover_all_elements_once(call, rows, columns, inner):
    rows *= inner
    elements = [call("column_element", rows, columns, inner, row, column) for column in range(columns) for row in range(rows)]
    assert sorted(elements) == list(range(rows * columns))


@given(rows=st.integers(1, 2**30), columns=st.integers(1, 2**22), inner=st.sampled_from((1, 64)))
def test_column_blocks_fit_their_slots_and_tickets(call, rows, columns, inner):
    groups, splits, width, rows_per_split = call("columns", rows, columns, inner, out=4)
    assert groups * width >= columns
    assert splits * rows_per_split >= rows
    assert splits == 1 or groups * splits <= 1024
    assert splits == 1 or splits * columns <= 32768


@pytest.mark.parametrize("first", [0, 512, 1, 127, 128, 300, 511, 513, 5 * 512 + 400])
def test_normals_from_any_element_are_those_of_the_numbering(emulated, first):
    oracle = reference.normal(torch.tensor(7), (first + 1024,))
    out = (ctypes.c_float * 4)()
    for lane in (0, 1, 63, 127):
        emulated.emulated_normals(ctypes.c_int64(7), ctypes.c_int64(first), ctypes.c_int(lane), out)
        expected = oracle[[first + lane + 128 * j for j in range(4)]]
        torch.testing.assert_close(torch.tensor(list(out)), expected, rtol=0, atol=2e-6)


NORM_BLOCKS = ("tile_channels", "tiles", "split_positions", "splits", "threads", "threads_per_line", "whole_groups")
# Blocks of a launch, bytes of a group that one block handles, and groups with which it handles one of twice as many.
NORM_LIMITS = (2048, 65536, 256)
each_norm_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@each_norm_layout
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from((1, 2, 3, 8)),
    width=st.sampled_from((1, 2, 3, 4, 7, 16, 33, 130)),
    positions=st.sampled_from((1, 2, 3, 4, 15, 16, 49, 64, 100, 256, 529, 2500)),
    itemsize=st.sampled_from((2, 4)),
    max_blocks=st.sampled_from((1, 16, 2048)),
    group_bytes=st.sampled_from((0, 1000, 65536)),
)
def test_threads_read_each_element_of_a_group_once(call, channels_last, batch, groups, width, positions, itemsize, max_blocks, group_bytes):
    channels = groups * width
    numel = batch * channels * positions
    limits = max_blocks, group_bytes, 4
    sizes = batch, channels, positions, groups, channels_last, itemsize, *limits
    results = call("norm_visits", *sizes, out=2 * numel)
    assert results[:numel] == [1] * numel
    place = torch.arange(channels).view(1, 1, -1) if channels_last else torch.arange(channels).view(1, -1, 1)
    order = (batch, positions, channels) if channels_last else (batch, channels, positions)
    assert results[numel:] == place.expand(order).flatten().tolist()


@each_norm_layout
@given(
    batch=st.integers(1, 2**12),
    groups=st.integers(1, 64),
    width=st.integers(1, 300),
    positions=st.integers(1, 2**26),
    itemsize=st.sampled_from((2, 4)),
)
def test_blocks_of_group_norm(call, channels_last, batch, groups, width, positions, itemsize):
    sizes = batch, groups * width, positions, groups, channels_last, itemsize
    blocks = dict(zip(NORM_BLOCKS, call("norm_blocks", *sizes, *NORM_LIMITS, out=7), strict=True))
    assert blocks["threads_per_line"] & (blocks["threads_per_line"] - 1) == 0
    assert blocks["tiles"] * blocks["tile_channels"] >= groups * width > (blocks["tiles"] - 1) * blocks["tile_channels"]
    assert blocks["splits"] * blocks["split_positions"] >= positions > (blocks["splits"] - 1) * blocks["split_positions"]
    # Enough to fill a GPU, and no more than twice that but for the batch and the channels.
    assert blocks["splits"] == 1 or batch * blocks["tiles"] * blocks["splits"] <= 2 * 2048
    # Vectors of a split are aligned where those of the first are, and a warp shuffles only among its own threads.
    assert blocks["splits"] == 1 or blocks["split_positions"] % 4 == 0
    assert blocks["threads_per_line"] <= (32 if channels_last else blocks["threads"])
    if not blocks["whole_groups"]:
        assert blocks["threads"] == THREADS
        return
    assert (blocks["tile_channels"], blocks["tiles"], blocks["splits"]) == (width, groups, 1)
    assert blocks["threads"] in (128, 256, 512)
    # Every thread that there is room for has a line, and no line is left over.
    lines = blocks["threads"] // blocks["threads_per_line"]
    assert lines * 4 * blocks["threads_per_line"] >= width if channels_last else lines >= width
    assert width * positions * itemsize <= 65536 * (2 if batch * groups >= 256 else 1)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # One block handles a group of 64 KB, or of 128 KB where there are many groups; the more elements, the more threads.
        ((2, 512, 256, 32, False, 2), {"whole_groups": 1, "threads": 128, "threads_per_line": 8}),
        ((2, 512, 256, 32, True, 2), {"whole_groups": 1, "threads": 128, "threads_per_line": 4}),
        ((2, 512, 512, 32, False, 2), {"whole_groups": 1, "threads": 256, "threads_per_line": 16}),
        ((2, 512, 1024, 32, True, 4), {"whole_groups": 1, "threads": 512, "threads_per_line": 4}),
        ((2, 512, 1025, 32, True, 4), {"whole_groups": 0, "threads": 128, "threads_per_line": 32, "tile_channels": 128}),
        ((7, 512, 2048, 32, False, 2), {"whole_groups": 1, "threads": 512}),
        ((7, 512, 4096, 32, False, 2), {"whole_groups": 0, "threads_per_line": 128, "tile_channels": 1}),
        ((8, 512, 4096, 32, False, 2), {"whole_groups": 1, "threads": 512, "threads_per_line": 32}),
        # A group of many channels has a thread for each.
        ((2, 400, 4, 1, False, 4), {"whole_groups": 1, "threads": 512, "threads_per_line": 1}),
        # Narrow channels would waste sectors.
        ((2, 128, 64, 32, True, 2), {"whole_groups": 0}),
        ((2, 128, 64, 32, True, 4), {"whole_groups": 0}),
        ((2, 256, 64, 32, True, 4), {"whole_groups": 1}),
        # One position: the channels lie side by side, and a group is as wide as its bytes.
        ((64, 128, 1, 32, True, 2), {"whole_groups": 1, "threads_per_line": 1}),
        # A large image: its splits fill the GPU.
        ((1, 128, 2**20, 32, False, 2), {"whole_groups": 0, "threads_per_line": 128, "tile_channels": 1, "splits": 16}),
        ((1, 128, 2**20, 32, True, 2), {"whole_groups": 0, "tiles": 1, "splits": 2048}),
        ((64, 128, 2**14, 32, True, 2), {"whole_groups": 0, "splits": 32}),
    ],
    ids=str,
)
def test_known_blocks_of_group_norm(call, sizes, expected):
    blocks = dict(zip(NORM_BLOCKS, call("norm_blocks", *sizes, *NORM_LIMITS, out=7), strict=True))
    assert {name: blocks[name] for name in expected} == expected


# Bytes of dynamic shared memory with which two blocks share a multiprocessor: half of it, without what the system and the sums take.
SHARED_BYTES = [kibibytes * 1024 // 2 - 5120 for kibibytes in (164, 228, 100)]


@pytest.mark.parametrize(
    ("elements", "itemsize", "forward", "backward"),
    [
        # Elements, their bytes, and the parts of them that each pass keeps on sm_80, on sm_90 and sm_100, and on sm_86, sm_89 and sm_120.
        (4096, 2, (1, 1, 1), (1, 1, 1)),
        (4096, 4, (1, 1, 1), (1, 1, 1)),
        (8192, 2, (1, 1, 1), (1, 1, 0.75)),
        (8192, 4, (1, 1, 1), (1, 1, 0.5)),
        (16384, 2, (1, 1, 1), (0.75, 1, 0.25)),
        (16384, 4, (1, 1, 0.5), (0.5, 0.75, 0.25)),
        (32768, 2, (1, 1, 0.5), (0.375, 0.5, 0.125)),
        (32768, 4, (0.5, 0.75, 0.25), (0.25, 0.375, 0.125)),
        (65536, 2, (0.5, 0.75, 0.25), (0.1875, 0.25, 0.0625)),
    ],
)
def test_the_part_of_a_group_that_stays_in_shared_memory(call, elements, itemsize, forward, backward):
    """Of 256 groups of 16 channels; docs/conv_vaes.md has these parts. In channels-last memory the backward pass counts in shorter steps,
    so that it keeps as much or up to a step more."""
    width = 16
    for channels_last in (False, True):
        sizes = 8, 32 * width, elements // width, 32, channels_last, itemsize
        threads = dict(zip(NORM_BLOCKS, call("norm_blocks", *sizes, *NORM_LIMITS, out=7), strict=True))["threads"]
        vectors = elements // (4 * threads)
        for runs, vector_bytes, parts in ((4, 4 * itemsize, forward), (1 if channels_last else 2, 4 * itemsize + 16, backward)):
            kept = [call("kept_vectors", *sizes, runs, vector_bytes, shared) for shared in SHARED_BYTES]
            more = [count - int(part * vectors) for count, part in zip(kept, parts, strict=True)]
            assert set(more) <= ({0, 1} if runs == 1 else {0})


RMS_NORM_BLOCKS = ("split_positions", "splits", "step_positions", "threads", "threads_per_line")
# The largest and the smallest number of blocks, and bytes that a block keeps of a step.
RMS_NORM_LIMITS = (8192, 512, 98304)


@each_norm_layout
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from((1, 2, 3, 4, 7, 16, 33, 96, 130, 600)),
    positions=st.sampled_from((1, 2, 3, 4, 15, 16, 49, 64, 100, 256, 529)),
    itemsize=st.sampled_from((2, 4)),
    limits=st.sampled_from(((1, 1, 1000), (12, 3, 98304), (8192, 512, 16384))),
)
def test_threads_read_each_element_of_a_position_once(call, channels_last, backward, batch, channels, positions, itemsize, limits):
    numel = batch * channels * positions
    results = torch.tensor(call("rms_norm_visits", batch, channels, positions, channels_last, itemsize, backward, *limits, out=3 * numel))
    visits, found_channels, found_positions = results.view(3, -1)
    assert (visits == 1).all()
    element = (
        torch.arange(numel).view(batch, positions, channels) if channels_last else torch.arange(numel).view(batch, channels, positions)
    )
    ordered = element if channels_last else element.movedim(1, -1)
    assert torch.equal(found_channels[ordered], torch.arange(channels).expand(ordered.shape))
    assert torch.equal(found_positions[ordered], torch.arange(batch * positions).view(batch, positions, 1).expand(ordered.shape))


@each_norm_layout
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@given(
    batch=st.integers(1, 2**12),
    channels=st.integers(1, 5000),
    positions=st.integers(1, 2**40),
    itemsize=st.sampled_from((2, 4)),
)
def test_blocks_of_rms_norm(call, channels_last, backward, batch, channels, positions, itemsize):
    channels = min(channels, 2048) if channels_last else channels
    sizes = batch, channels, positions, channels_last, itemsize, backward
    blocks = dict(zip(RMS_NORM_BLOCKS, call("rms_norm_blocks", *sizes, *RMS_NORM_LIMITS, out=5), strict=True))
    threads, line = blocks["threads"], blocks["threads_per_line"]
    assert line & (line - 1) == 0
    assert blocks["splits"] * blocks["split_positions"] >= positions > (blocks["splits"] - 1) * blocks["split_positions"]
    assert blocks["split_positions"] % blocks["step_positions"] == 0
    assert batch * blocks["splits"] <= 8192 + batch
    if channels_last:
        # All channels of a position fit its threads, and would not fit half of them.
        assert threads == THREADS
        assert line * 16 >= channels
        assert line == 1 or line // 2 * 16 < channels
        assert blocks["step_positions"] == threads // line
    else:
        assert threads in (128, 256, 512)
        assert blocks["step_positions"] == 4 * line
        # The entries that a block has for its sums.
        assert line <= 32
        assert threads // 32 * line <= 256
        assert blocks["step_positions"] * itemsize <= 128 or channels <= 8
        assert line >= min(2 if itemsize == 4 else 4, -(-positions // 4))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # The norm of a video decoder: eight threads for each position of 96 channels, 8,192 blocks at most.
        ((1, 96, 17 * 240 * 416, True, 2, False), {"threads_per_line": 8, "step_positions": 16, "splits": 8160, "split_positions": 208}),
        ((1, 96, 17 * 240 * 416, True, 2, True), {"threads_per_line": 8, "step_positions": 16, "splits": 8160, "split_positions": 208}),
        ((1, 96, 17 * 240 * 416, False, 2, False), {"threads": 256, "threads_per_line": 16, "splits": 6630, "split_positions": 256}),
        ((1, 96, 17 * 240 * 416, False, 2, True), {"threads": 256, "threads_per_line": 16, "splits": 6630, "split_positions": 256}),
        # A warp for each position of 512 channels; blocks of the backward pass have more positions.
        ((1, 512, 8 * 64 * 64, True, 2, False), {"threads_per_line": 32, "splits": 2048, "split_positions": 16}),
        ((1, 512, 8 * 64 * 64, True, 2, True), {"threads_per_line": 32, "splits": 512, "split_positions": 64}),
        # 64 KB of 64 positions forward; backward 96 KB of 32.
        ((8, 512, 64 * 64, False, 2, False), {"threads": 512, "threads_per_line": 16, "splits": 64}),
        ((8, 512, 64 * 64, False, 2, True), {"threads": 512, "threads_per_line": 8, "splits": 64, "split_positions": 64}),
        # Lines of a sector at least.
        ((1, 4096, 4096, False, 4, True), {"threads": 512, "threads_per_line": 2}),
        # A small tensor: one step for each block.
        ((1, 128, 8 * 32 * 32, True, 2, True), {"threads_per_line": 8, "splits": 512, "split_positions": 16}),
        ((3, 2500, 1, False, 2, False), {"threads": 512, "threads_per_line": 1, "splits": 1}),
    ],
    ids=str,
)
def test_known_blocks_of_rms_norm(call, sizes, expected):
    blocks = dict(zip(RMS_NORM_BLOCKS, call("rms_norm_blocks", *sizes, *RMS_NORM_LIMITS, out=5), strict=True))
    assert {name: blocks[name] for name in expected} == expected
