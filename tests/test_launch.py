"""How Triton kernels are launched and what is read without copying: functions of numbers and strides, tested without Triton."""

import runpy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _helpers import LAYOUTS, lay_out

KERNELS = Path(__file__).parents[1] / "kernels"
launch = SimpleNamespace(**runpy.run_path(str(KERNELS / "_launch.py")))
layout = SimpleNamespace(**runpy.run_path(str(KERNELS / "_layout.py")))

MACHINES = [
    launch.Machine("sm_80", 108),
    launch.Machine("sm_90", 132),
    launch.Machine("gfx942", 304),
    launch.Machine("interpreter", 2, programs=16),
]
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.architecture)
SIZES = (1, 2, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049, 2560, 100_352, 1_000_001, 12_582_912, 2**31 - 1, 2**31, 2**33 + 7)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def test_warp_sizes():
    assert [machine.warp_size for machine in MACHINES] == [32, 32, 64, 32]
    assert launch.Machine("gfx1100", 96).warp_size == 32


@pytest.mark.parametrize(("itemsize", "expected"), [(1, 16), (2, 16), (4, 8), (8, 4)])
def test_elements_per_thread(itemsize, expected):
    """At least one access of 16 bytes of the narrowest operand."""
    assert launch.elements_per_thread(itemsize) == expected
    assert expected * itemsize >= 16


@each_machine
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_stream(machine, n, itemsize):
    config = launch.stream(n, itemsize, machine)
    assert is_power_of_two(config.block)
    assert config.block == launch.elements_per_thread(itemsize) * config.chunk
    assert 1 <= config.programs <= machine.programs
    full = n // config.block
    pieces = full + -(-(n - full * config.block) // config.chunk)
    assert config.programs == min(pieces, machine.programs)


@each_machine
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("samples", [1, 3, 50, 5000])
def test_tiles(machine, n, itemsize, samples):
    config = launch.tiles(n, samples, itemsize, machine)
    assert is_power_of_two(config.tiles)
    # Four streams of 128 lanes; a thread has as many lanes as fill 16 bytes.
    assert config.tiles * 128 // machine.threads * itemsize == 16
    assert config.programs >= 1
    assert config.programs == 1 or config.programs * samples < machine.programs + samples


@each_machine
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("shape", list(product((1, 3, 128, 4096, 2**31 + 1), (1, 20, 64, 784, 12_288, 1_000_001, 2**32))), ids=str)
@pytest.mark.parametrize("name", ["row_sums", "column_sums"])
def test_sums_of_a_matrix(machine, name, shape, itemsize):
    rows, columns = shape
    config = getattr(launch, name)(rows, columns, itemsize, machine)
    block = launch.elements_per_thread(itemsize) * machine.threads
    assert is_power_of_two(config.rows)
    assert is_power_of_two(config.columns)
    assert config.rows * config.columns <= block
    stays, summed, stays_block, summed_block = (
        (rows, columns, config.rows, config.columns) if name == "row_sums" else (columns, rows, config.columns, config.rows)
    )
    assert (config.groups - 1) * stays_block < stays <= config.groups * stays_block
    assert 1 <= config.splits <= -(-summed // summed_block)
    assert config.splits == 1 or config.groups * config.splits <= machine.programs
    # Rows share a program only where each fits into its block.
    assert name == "column_sums" or config.rows == 1 or columns <= config.columns


@each_machine
@pytest.mark.parametrize("count", [1, 4, 5, 128, 100_000])
@pytest.mark.parametrize("shape", list(product((1, 3, 64, 1000), (1, 20, 256, 5000))), ids=str)
def test_matrices(machine, count, shape):
    rows, columns = shape
    config = launch.matrices(count, rows, columns, 4, machine)
    assert is_power_of_two(config.rows)
    assert is_power_of_two(config.columns)
    assert config.rows * config.columns <= launch.elements_per_thread(4) * machine.threads
    assert (config.row_groups - 1) * config.rows < rows <= config.row_groups * config.rows
    assert (config.column_groups - 1) * config.columns < columns <= config.column_groups * config.columns
    # Whole rows, as far as a program reaches; several matrices each, but where there are fewer.
    assert config.column_groups == 1 or config.rows == 1
    assert 1 <= config.splits <= -(-count // 4)
    assert config.splits == 1 or config.row_groups * config.column_groups * config.splits <= machine.programs


def test_one_long_row_takes_the_whole_machine():
    machine = launch.Machine("sm_90", 132)
    assert launch.row_sums(1, 50_000_000, 4, machine).splits == machine.programs
    assert launch.row_sums(4, 50_000_000, 4, machine).splits == machine.programs // 4
    assert launch.row_sums(100_000, 784, 4, machine).splits == 1


def test_a_layer_fills_the_machine_or_is_under_way_at_once():
    """Programs for a layer's hidden values, one block each, and for its weight, one row each, in float32."""
    machine = launch.Machine("sm_90", 132)
    for (batch, inputs, units), programs in (((512, 3072, 1024), (512, 1024)), ((128, 784, 256), (32, 256))):
        hidden, weight = launch.column_sums(batch, units, 4, machine), launch.row_sums(units, inputs, 4, machine)
        assert (hidden.groups * hidden.splits, weight.groups * weight.splits) == programs
        assert programs[0] * hidden.rows * hidden.columns == batch * units
        assert max(programs) <= machine.programs


def test_several_short_rows_share_a_program():
    config = launch.row_sums(10_000, 20, 4, launch.Machine("sm_90", 132))
    assert (config.rows, config.columns) == (32, 32)


def test_configurations_are_frozen():
    config = launch.stream(1000, 4, MACHINES[0])
    with pytest.raises(AttributeError):
        config.block = 1


def read(tensor: torch.Tensor, inner: int | None, stride: int | None) -> torch.Tensor:
    """The elements in row-major order, as the kernels address them."""
    if inner is None:
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.as_strided((tensor.numel() // inner, inner), (stride, 1)).reshape(-1)


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 6), (2, 3, 4, 5), (1, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("names", list(product(LAYOUTS, repeat=2)), ids="-".join)
def test_shared_rows_reads_every_layout(shape, names):
    tensors = (*(lay_out(torch.randn(shape), name) for name in names), None)
    read_from, inner, strides = layout.shared_rows(tensors)
    for tensor, source, stride in zip(tensors[:2], read_from[:2], strides[:2], strict=True):
        assert torch.equal(read(source, inner, stride), tensor.reshape(-1))
    assert read_from[2] is None
    assert strides[2] is None


def test_shared_rows_copies_no_chunks_and_no_operand_expanded_over_the_batch():
    mu, logvar = torch.randn(5, 2 * 3, 4).chunk(2, 1)
    prior = torch.randn(3, 4).expand(5, 3, 4)
    read_from, inner, strides = layout.shared_rows((mu, logvar, prior, None))
    assert [a is b for a, b in zip(read_from, (mu, logvar, prior, None), strict=True)] == [True] * 4
    assert (inner, strides) == (12, (24, 24, 0, None))


def test_shared_rows_of_a_slice_of_the_last_dimension():
    mu, logvar = torch.randn(5, 7, 2 * 6).chunk(2, 2)
    _, inner, strides = layout.shared_rows((mu, logvar))
    assert (inner, strides) == (6, (12, 12))


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 6), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_rows_reads_every_layout(shape, name):
    tensor = lay_out(torch.randn(shape), name)
    (source, absent), (stride, _), rows, columns = layout.matrix_rows((tensor, None))
    assert absent is None
    assert rows * columns == tensor.numel()
    assert torch.equal(source.as_strided((rows, columns), (stride, 1)).reshape(-1), tensor.reshape(-1))


SHAPE = (4, 3, 6, 5)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 3, 1, 1), (4, 1, 1, 1), (1, 3, 6, 5), (4, 3, 1, 1), (1, 1, 1, 5), (1, 1, 6, 1), SHAPE], ids=str
)
def test_shared_operands_are_read_by_element_number(shape):
    value = torch.randn(shape)
    source, inner, period = layout.shared_operand(value, torch.Size(SHAPE))
    numbers = torch.arange(360)
    if inner is None:
        index = numbers
    elif period is None:
        index = torch.zeros_like(numbers)
    else:
        index = numbers // inner % period
    assert torch.equal(source.reshape(-1)[index], value.expand(SHAPE).reshape(-1))


def test_a_shared_operand_may_be_absent():
    assert layout.shared_operand(None, torch.Size(SHAPE)) == (None, None, None)


@each_machine
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 33, 64, 80, 96, 100, 128, 130, 192, 256, 300, 4096])
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (64, 65), (8192, 512), (65_536, 1024), (2**31 + 1, 16_384), (5, 2**20)])
def test_screen(machine, dim, rows, codes):
    plan = launch.screen(1, rows, codes, dim, machine)
    assert plan.half == (dim >= 16)
    assert all(is_power_of_two(n) for n in (plan.block_rows, plan.block_codes, plan.pack_rows, plan.pack_columns))
    assert rows <= plan.rows < rows + plan.block_rows
    assert codes <= plan.codes < codes + plan.block_codes
    assert dim <= plan.dim
    assert plan.dim % plan.columns == 0
    assert plan.known_dim in (0, plan.dim)
    # Each split has a few tiles, and one block of codes has the nearest of all.
    assert plan.recheck_splits == 1 or plan.codes // plan.block_codes >= 4 * plan.recheck_splits
    assert plan.recheck_splits <= launch.RECHECK_CODES
    assert 1 <= plan.recheck_groups <= rows
    assert plan.recheck_groups == 1 or plan.recheck_groups * plan.recheck_splits <= machine.programs
    # Tensor cores take blocks of at least 16; padding adds at most a half, or what the last block of 16 lacks.
    if plan.half:
        assert is_power_of_two(plan.columns)
        assert min(plan.block_rows, plan.block_codes, plan.columns) >= 16
        assert plan.dim <= max(32, 1.5 * dim) or plan.dim == 64
    else:
        assert plan.dim == plan.columns == plan.known_dim == dim
    # A round's tiles have numbers of so many bits, which leave most of a float32's 23.
    assert plan.tile_bits <= 8
    assert 1 << plan.tile_bits >= min(plan.codes // plan.block_codes, 64)
    assert 2**-20 < plan.half_norm_rounding < plan.rounding < 2**-8 + plan.dim * 2**-22


def test_a_screen_of_few_rows_takes_smaller_blocks():
    machine = launch.Machine("sm_90", 132)
    blocks = [launch.screen(1, rows, 1024, 64, machine).block_rows for rows in (65_536, 8192, 3000, 100)]
    assert blocks == [64, 32, 16, 16]
    assert launch.screen(8, 8192, 1024, 64, machine).block_rows == 64


@each_machine
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [1, 3, 64, 100, 256, 4096])
@pytest.mark.parametrize("rows", [1, 100, 65_536, 2**31 + 1])
def test_row_blocks(machine, rows, dim, itemsize):
    config = launch.row_blocks(2, rows, dim, itemsize, machine)
    assert is_power_of_two(config.rows)
    assert is_power_of_two(config.columns)
    assert config.rows * config.columns == launch.elements_per_thread(itemsize) * machine.threads
    assert 1 <= config.programs <= min(machine.programs, 2 * -(-rows // config.rows))


def test_registers_are_asked_for_where_they_can_be():
    assert [launch.recheck_options(machine).get("maxnreg") for machine in MACHINES] == [255, 255, None, None]
    assert [launch.screen_options(machine).get("waves_per_eu") for machine in MACHINES] == [None, None, 2, None]


@pytest.mark.parametrize("n", SIZES)
def test_the_order_of_sums_does_not_depend_on_the_number_of_multiprocessors(n):
    """An H200, and a slice of one."""
    one, other = (launch.Machine("sm_90", multiprocessors) for multiprocessors in (132, 16))
    assert launch.stream(n, 4, one) == launch.stream(n, 4, other)
    assert launch.tiles(n, 3, 4, one) == launch.tiles(n, 3, 4, other)
    for rows, columns in ((1, n), (n, 1), (7, n), (n, 33)):
        assert launch.row_sums(rows, columns, 4, one) == launch.row_sums(rows, columns, 4, other)
        assert launch.column_sums(rows, columns, 4, one) == launch.column_sums(rows, columns, 4, other)
        assert launch.matrices(5, rows, columns, 4, one) == launch.matrices(5, rows, columns, 4, other)
    assert launch.row_blocks(2, n, 64, 4, one) == launch.row_blocks(2, n, 64, 4, other)
