"""Launch configurations: grids and block sizes as pure functions of sizes, dtype widths and the machine, so that they are tested without
Triton and never depend on data."""

from dataclasses import dataclass

from fastvae._gpu import MIN_TENSOR_CORE_DIM

# A sum over a program ends in barriers among its warps. Few warps wait less; several programs on each multiprocessor make up for them.
WARPS = 4

# The widest access of a thread is 16 bytes. Two accesses to each operand are in flight at a time, but never more than 16 elements: those
# are one access to a uint8 image, and four to a float32 operand beside it. More elements would need more registers than eight programs on a
# multiprocessor leave to a thread.
ACCESS_BYTES, ACCESSES, MAX_ELEMENTS = 16, 2, 16

# Options of every kernel. enable_fp_fusion, which fuses a product and a sum into one rounding, is Triton's default up to 3.9 only.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

# The most programs that share a tensor. Each adds its elements in a sum of its own, so their number decides the order of additions. It is
# the same for every GPU, so that sums do not depend on the number of multiprocessors. Eight programs of 128 threads with 64 registers each
# fill the register file of a multiprocessor, which has 65,536, and all run in one wave on the 132 of an H200. The kernels that draw 16-bit
# noise need up to 128 registers a thread, so that their grids run in two equal waves.
PROGRAMS = 8 * 132

NOISE_TILE, NOISE_LANES = 512, 128

# A program that sums matrices reads at least so many, so that the partial sum that it writes is at most a quarter of what it read.
MATRICES_PER_PROGRAM = 4

# Adjacent columns that a program reads for column sums: 512 bytes of float32, which is what a warp loads with one 16-byte access a thread.
COLUMNS_PER_PROGRAM = 128


@dataclass(frozen=True)
class Machine:
    """A GPU, or Triton's interpreter. ``architecture`` is "sm_90", "gfx942", ... or "interpreter"; ``programs`` is the most programs of a
    launch whose programs share a tensor."""

    architecture: str
    multiprocessors: int
    programs: int = PROGRAMS

    @property
    def warp_size(self) -> int:
        # AMD's data-centre GPUs (gfx9) run wavefronts of 64 threads.
        return 64 if self.architecture.startswith("gfx9") else 32

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return WARPS * self.warp_size


@dataclass(frozen=True)
class Stream:
    """An elementwise launch over contiguous memory. The programs handle blocks of ``block`` elements in turn, then the rest in chunks of
    ``chunk`` elements in turn, so that a small tensor is shared among many programs."""

    block: int
    chunk: int
    programs: int


@dataclass(frozen=True)
class Tiles:
    """An elementwise launch over noise tiles of 512 elements. The programs handle blocks of ``tiles`` tiles in turn, then the rest one tile
    at a time."""

    tiles: int
    programs: int


@dataclass(frozen=True)
class Matrix:
    """A reduction over one dimension of a matrix, with the grid (groups, splits). Programs load blocks of (``rows``, ``columns``);
    ``groups`` cut the dimension that stays, ``splits`` the one that is summed."""

    rows: int
    columns: int
    groups: int
    splits: int


@dataclass(frozen=True)
class Matrices:
    """A launch over many matrices of one size, with the grid (row_groups, column_groups, splits). A program handles one block of (``rows``,
    ``columns``) of every ``splits``-th matrix."""

    rows: int
    columns: int
    row_groups: int
    column_groups: int
    splits: int


def elements_per_thread(itemsize: int) -> int:
    """Elements that a thread handles at a time, where the narrowest operand has elements of ``itemsize`` bytes."""
    return min(ACCESSES * ACCESS_BYTES // itemsize, MAX_ELEMENTS)


def stream(n: int, itemsize: int, machine: Machine) -> Stream:
    """The configuration for ``n`` elements."""
    block, chunk = elements_per_thread(itemsize) * machine.threads, machine.threads
    return Stream(block, chunk, min(_pieces(n, block, chunk), machine.programs))


def tiles(n: int, samples: int, itemsize: int, machine: Machine) -> Tiles:
    """A thread draws as many adjacent lanes of a noise tile as fill one access; each lane has four elements, one in each stream."""
    count = machine.threads * (ACCESS_BYTES // itemsize) // NOISE_LANES
    # Each of the ``samples`` draws has programs of its own, and all of them together fill the machine.
    pieces = _pieces(n, count * NOISE_TILE, NOISE_TILE)
    programs = min(pieces, _ceil_div(machine.programs, samples))
    return Tiles(count, programs)


def row_sums(rows: int, columns: int, itemsize: int, machine: Machine) -> Matrix:
    """The configuration for the sum of each row: several short rows for each program, or long rows split among the programs that would be
    idle otherwise."""
    block = elements_per_thread(itemsize) * machine.threads
    columns_block = min(_power_of_two(columns), block)
    rows_block = min(_power_of_two(rows), block // columns_block)
    groups = _ceil_div(rows, rows_block)
    splits = min(_ceil_div(columns, columns_block), max(machine.programs // groups, 1))
    return Matrix(rows_block, columns_block, groups, splits)


def column_sums(rows: int, columns: int, itemsize: int, machine: Machine) -> Matrix:
    """The configuration for the sum of each column."""
    columns_block = min(_power_of_two(columns), COLUMNS_PER_PROGRAM)
    rows_block = min(_power_of_two(rows), elements_per_thread(itemsize) * machine.threads // columns_block)
    groups = _ceil_div(columns, columns_block)
    splits = min(_ceil_div(rows, rows_block), max(machine.programs // groups, 1))
    return Matrix(rows_block, columns_block, groups, splits)


# The screening kernel computes scores in tiles of 64 rows by 64 codes. A tile and the two smallest scores of each slot are 96 values for
# each of 128 threads; with addresses, factors and the final reduction these take up to 250 registers, so that two programs share a
# multiprocessor. With few rows the tiles are shorter, so that no multiprocessor is idle, but not below the 16 rows that a tensor core
# takes. A product without tensor cores (False) keeps its factors in registers too, and has half the rows.
SCREEN_ROWS, MIN_SCREEN_ROWS, SCREEN_CODES = {True: 64, False: 32}, 16, 64
# A score carries the number of its tile in its low bits: at most so many, with half precision products (True) and with single precision
# ones, because the precision that they take from the score has to stay small beside the rounding error of the product. More tiles are
# screened in rounds, each of which ends with a reduction over the slots.
MAX_TILE_BITS = {True: 8, False: 6}
# Codes, and elements of each, that a program of the rechecking kernel loads in float64 at a time: four elements a thread.
RECHECK_CODES, RECHECK_COLUMNS = 16, 32
# Triton 3.6 needs up to 215 registers a thread for the rechecking kernel, 3.9 up to 176.
RECHECK_REGISTERS = 255
# The codes of a row that the screen leaves open are split among several programs, each of which screens so many tiles again or more: fewer
# would take less time than the programs take to find the nearest of their splits. One block of codes has the nearest of every split.
RECHECK_TILES, MAX_RECHECK_SPLITS = 4, RECHECK_CODES

# Triton 3.9 needs up to 96 registers a thread for the logistic mixture kernel. With 128 four programs share a multiprocessor.
MIXTURE_REGISTERS = 128

# The rows of a code are summed in parts of so many rows, so that one code that has all rows does not leave the machine idle.
PART_ROWS = 128


@dataclass(frozen=True)
class RowBlocks:
    """A launch over whole rows. The programs handle blocks of ``rows`` rows in turn, and load ``columns`` elements of each at a time."""

    rows: int
    columns: int
    programs: int


@dataclass(frozen=True)
class Screen:
    """The configuration of the search for nearest codes: padded sizes (``rows``, ``codes``, ``dim``), the blocks of its kernels, and bounds
    of its rounding errors.

    ``half`` chooses products of float16 on tensor cores over float32 products without them. ``unit`` bounds the relative error of rounding
    an element. ``rounding`` bounds the error of a score relative to the product of the norms of row and code, without the rounding of the
    row's elements, whose error the kernels measure. ``half_norm_rounding`` bounds the error of a score relative to half the squared norm of
    the code.
    """

    half: bool
    rows: int
    codes: int
    dim: int
    columns: int
    block_rows: int
    block_codes: int
    tile_bits: int
    pack_rows: int
    pack_columns: int
    recheck_groups: int
    recheck_splits: int

    @property
    def known_dim(self) -> int:
        """The dimension as a compile-time constant of the kernel, where one block contains all of it; otherwise 0."""
        return self.dim if not self.half or self.dim == self.columns else 0

    @property
    def unit(self) -> float:
        return 2.0**-11 if self.half else 2.0**-22

    @property
    def rounding(self) -> float:
        # A tensor core truncates its float32 sums instead of rounding them; 2^-22 bounds the error of each addition with and without it.
        return self.unit + (self.dim + 16) * 2.0**-22 + self.half_norm_rounding

    @property
    def half_norm_rounding(self) -> float:
        # The first term is for the low bits that hold the number of the tile, the second for the two products and sums of a score.
        return 2.0 ** (self.tile_bits - 22) + 2.0**-20


def screen(heads: int, rows: int, codes: int, dim: int, machine: Machine) -> Screen:
    """The configuration for ``rows`` vectors of ``dim`` elements in each of ``heads`` codebooks of ``codes`` codes."""
    half = dim >= MIN_TENSOR_CORE_DIM
    columns = _columns_of_products(dim) if half else dim
    block_rows = SCREEN_ROWS[half]
    while block_rows > MIN_SCREEN_ROWS and heads * _ceil_div(rows, block_rows) < machine.multiprocessors:
        block_rows //= 2
    tiles = _ceil_div(codes, SCREEN_CODES)
    pack_columns = min(max(_power_of_two(dim), 16), 128)
    splits = max(1, min(tiles // RECHECK_TILES, MAX_RECHECK_SPLITS))
    return Screen(
        half=half,
        rows=_ceil_div(rows, block_rows) * block_rows,
        codes=tiles * SCREEN_CODES,
        dim=_ceil_div(dim, columns) * columns,
        columns=columns,
        block_rows=block_rows,
        block_codes=SCREEN_CODES,
        tile_bits=min((tiles - 1).bit_length(), MAX_TILE_BITS[half]),
        pack_rows=8 * machine.threads // pack_columns,
        pack_columns=pack_columns,
        recheck_groups=min(heads * rows, max(machine.programs // splits, 1)),
        recheck_splits=splits,
    )


def screen_options(machine: Machine) -> dict:
    """The options of the screening kernel. On AMD's GPUs it has to leave room for two wavefronts on each SIMD: Triton 3.6 takes more than
    the 256 registers of a thread that do, unless it is told to."""
    return OPTIONS | {"waves_per_eu": 2} if machine.architecture.startswith("gfx") else OPTIONS


def recheck_options(machine: Machine) -> dict:
    """The options of the rechecking kernel."""
    return _with_registers(RECHECK_REGISTERS, machine)


def mixture_options(machine: Machine) -> dict:
    """The options of the logistic mixture kernel."""
    return _with_registers(MIXTURE_REGISTERS, machine)


def _with_registers(registers: int, machine: Machine) -> dict:
    """The options of a kernel with up to so many registers a thread. Without a number NVIDIA's assembler spills some to make room for more
    programs than the kernel has; AMD's takes no such number."""
    return OPTIONS | {"maxnreg": registers} if machine.architecture.startswith("sm_") else OPTIONS


def _columns_of_products(dim: int) -> int:
    """The elements of a vector that are multiplied at a time: all of up to 128 elements, 64 of longer ones, or 32 where that pads less."""
    if dim <= 64:
        return _power_of_two(dim)
    return min((128 if dim <= 128 else 64, 32), key=lambda columns: _ceil_div(dim, columns) * columns)


def row_blocks(heads: int, rows: int, dim: int, itemsize: int, machine: Machine) -> RowBlocks:
    """The configuration for kernels that handle each row of (heads, rows, dim) by itself."""
    columns = min(_power_of_two(dim), COLUMNS_PER_PROGRAM)
    block = elements_per_thread(itemsize) * machine.threads // columns
    return RowBlocks(block, columns, min(heads * _ceil_div(rows, block), machine.programs))


def positions(rows: int, columns: int, machine: Machine) -> Matrix:
    """The configuration for kernels that compute a long formula for each entry of a matrix and may sum the rows: one entry for each thread,
    and long rows split among the programs that would be idle otherwise."""
    splits = min(_ceil_div(columns, machine.threads), max(machine.programs // rows, 1))
    return Matrix(1, machine.threads, rows, splits)


def matrices(count: int, rows: int, columns: int, itemsize: int, machine: Machine) -> Matrices:
    """The configuration for ``count`` matrices. Blocks are as wide as the matrices if a program can load that much, so that the sum of a
    row needs no second step."""
    block = elements_per_thread(itemsize) * machine.threads
    columns_block = min(_power_of_two(columns), block)
    rows_block = min(_power_of_two(rows), block // columns_block)
    row_groups, column_groups = _ceil_div(rows, rows_block), _ceil_div(columns, columns_block)
    splits = min(_ceil_div(count, MATRICES_PER_PROGRAM), max(machine.programs // (row_groups * column_groups), 1))
    return Matrices(rows_block, columns_block, row_groups, column_groups, splits)


def _pieces(n: int, block: int, chunk: int) -> int:
    """The number of full blocks and of chunks of the rest."""
    return n // block + _ceil_div(n % block, chunk)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
