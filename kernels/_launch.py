"""How kernels are launched: pure functions of sizes, dtype widths and the machine."""

from dataclasses import dataclass

# The sums of a program end in barriers among its warps: few warps, and several programs a multiprocessor instead.
WARPS = 4

# Accesses of 16 bytes are the widest a thread has. Two of each operand are under way at once, or one of a uint8 image: 16 pixels, beside
# which the same elements of a float32 operand are four. More would hold more registers than eight programs a multiprocessor leave.
ACCESS_BYTES, ACCESSES, MAX_ELEMENTS = 16, 2, 16

# For every kernel. Fusing a product and a sum into one rounding is Triton's default up to 3.9 and no longer from 3.10 on.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

# At 128 threads and up to 64 registers each, 8 programs fill the register file (65,536) of a multiprocessor, and a persistent grid of so
# many starts once. The kernels that draw 16-bit noise hold up to 128, which makes two even waves.
PROGRAMS_PER_MULTIPROCESSOR = 8

NOISE_TILE, NOISE_LANES = 512, 128

# A program that adds up matrices takes at least so many: the sum, which it writes, is then a quarter of what it read.
MATRICES_PER_PROGRAM = 4

# A column sum reads so many adjacent columns: 512 bytes of float32, which is what a warp loads at once.
COLUMNS_PER_PROGRAM = 128


@dataclass(frozen=True)
class Machine:
    """``architecture`` is "sm_90", "gfx942", ...; or "interpreter"."""

    architecture: str
    multiprocessors: int

    @property
    def warp_size(self) -> int:
        # The data-centre line of AMD runs wavefronts of 64.
        return 64 if self.architecture.startswith("gfx9") else 32

    @property
    def threads(self) -> int:
        """Of a program."""
        return WARPS * self.warp_size

    @property
    def programs(self) -> int:
        """That run at the same time."""
        return PROGRAMS_PER_MULTIPROCESSOR * self.multiprocessors


@dataclass(frozen=True)
class Stream:
    """Elementwise over contiguous memory: ``programs`` of them take blocks of ``block`` elements in turn, then chunks of ``chunk`` of what
    is left, so that a small tensor goes to many programs."""

    block: int
    chunk: int
    programs: int


@dataclass(frozen=True)
class Tiles:
    """Over the noise's tiles of 512 elements, ``tiles`` at once, then one by one what is left."""

    tiles: int
    programs: int


@dataclass(frozen=True)
class Matrix:
    """A reduction over one dimension of a matrix: programs take blocks of (rows, columns), ``groups`` along the dimension that stays,
    and ``splits`` along the one that is summed."""

    rows: int
    columns: int
    groups: int
    splits: int


@dataclass(frozen=True)
class Matrices:
    """Over matrices of one size: programs take a block of (rows, columns), of which a matrix has ``row_groups`` times ``column_groups``,
    from every ``splits``-th matrix."""

    rows: int
    columns: int
    row_groups: int
    column_groups: int
    splits: int


def elements_per_thread(itemsize: int) -> int:
    """``itemsize`` is that of the narrowest operand."""
    return min(ACCESSES * ACCESS_BYTES // itemsize, MAX_ELEMENTS)


def stream(n: int, itemsize: int, machine: Machine) -> Stream:
    block, chunk = elements_per_thread(itemsize) * machine.threads, machine.threads
    return Stream(block, chunk, min(_pieces(n, block, chunk), machine.programs))


def tiles(n: int, samples: int, itemsize: int, machine: Machine) -> Tiles:
    """A thread takes as many adjacent lanes as fill an access; each has four elements, one a stream."""
    count = machine.threads * (ACCESS_BYTES // itemsize) // NOISE_LANES
    # Each sample has programs of its own; together they fill the machine.
    pieces = _pieces(n, count * NOISE_TILE, NOISE_TILE)
    programs = min(pieces, _ceil_div(machine.programs, samples))
    return Tiles(count, programs)


def row_sums(rows: int, columns: int, itemsize: int, machine: Machine) -> Matrix:
    """Several short rows a program, or one long row over as many programs as are idle."""
    block = elements_per_thread(itemsize) * machine.threads
    columns_block = min(_power_of_two(columns), block)
    rows_block = min(_power_of_two(rows), block // columns_block)
    groups = _ceil_div(rows, rows_block)
    splits = min(_ceil_div(columns, columns_block), max(machine.programs // groups, 1))
    return Matrix(rows_block, columns_block, groups, splits)


def column_sums(rows: int, columns: int, itemsize: int, machine: Machine) -> Matrix:
    columns_block = min(_power_of_two(columns), COLUMNS_PER_PROGRAM)
    rows_block = min(_power_of_two(rows), elements_per_thread(itemsize) * machine.threads // columns_block)
    groups = _ceil_div(columns, columns_block)
    splits = min(_ceil_div(rows, rows_block), max(machine.programs // groups, 1))
    return Matrix(rows_block, columns_block, groups, splits)


# A screen's tile of scores is 64 rows by 64 codes: with the two least of each slot beside it, 96 registers of a thread of 128. Fewer rows
# where they would leave multiprocessors idle; tensor cores take no less than 16. Products without them hold their factors in registers
# too, and take half the rows.
SCREEN_ROWS, MIN_SCREEN_ROWS, SCREEN_CODES = {True: 64, False: 32}, 16, 64
# Below, padding a vector to the 16 elements that tensor cores take at once costs more than they gain.
MIN_TENSOR_CORE_DIM = 16
# How many low bits of a score the number of its tile may take, in half precision and in single precision: what they take from its
# precision has to stay small beside what rounding took. More tiles go in rounds, each of which ends in reductions over the slots.
MAX_TILE_BITS = {True: 8, False: 6}
# Codes, and elements of each, that a program has in float64 at once: four a thread.
RECHECK_CODES, RECHECK_COLUMNS = 32, 16
RECHECK_REGISTERS = 128

# The rows of a code are summed in parts of so many, so that one code that has them all does not leave the machine idle.
PART_ROWS = 128


@dataclass(frozen=True)
class RowBlocks:
    """``programs`` take blocks of ``rows`` whole rows in turn, ``columns`` of their elements at once."""

    rows: int
    columns: int
    programs: int


@dataclass(frozen=True)
class Screen:
    """The search for the nearest of ``codes`` codes: what it pads them to, the blocks of its kernels and the bounds of its errors.

    ``unit`` is the relative error of rounding an element; ``rounding`` is that of a product of norms, without what rounding takes from the
    rows, which is measured, and ``half_norm_rounding`` that of half a squared norm.
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
    recheck_codes: int
    recheck_columns: int

    @property
    def known_dim(self) -> int:
        """A dimension that the kernel is compiled for: where one block holds it, or there are no blocks; else 0."""
        return self.dim if not self.half or self.dim == self.columns else 0

    @property
    def unit(self) -> float:
        return 2.0**-11 if self.half else 2.0**-22

    @property
    def rounding(self) -> float:
        # A tensor core cuts sums off instead of rounding them: 2^-22 for each of them is more than that, also of float32.
        return self.unit + (self.dim + 16) * 2.0**-22 + self.half_norm_rounding

    @property
    def half_norm_rounding(self) -> float:
        # The bits that the tile's number takes, and the two products and sums of a score.
        return 2.0 ** (self.tile_bits - 22) + 2.0**-20


def screen(heads: int, rows: int, codes: int, dim: int, machine: Machine) -> Screen:
    half = dim >= MIN_TENSOR_CORE_DIM
    columns = _columns_of_products(dim) if half else dim
    block_rows = SCREEN_ROWS[half]
    while block_rows > MIN_SCREEN_ROWS and heads * _ceil_div(rows, block_rows) < machine.multiprocessors:
        block_rows //= 2
    tiles = _ceil_div(codes, SCREEN_CODES)
    pack_columns = min(max(_power_of_two(dim), 16), 128)
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
        recheck_codes=RECHECK_CODES,
        recheck_columns=RECHECK_COLUMNS,
    )


def recheck_options(machine: Machine) -> dict:
    """NVIDIA's assembler makes room for more programs than there are rows to recheck, and spills registers for it unless it is told not to;
    AMD's takes no such number."""
    return OPTIONS | {"maxnreg": RECHECK_REGISTERS} if machine.architecture.startswith("sm_") else OPTIONS


def _columns_of_products(dim: int) -> int:
    """How much of a vector is multiplied at once: all of it up to 128 elements, else 64; or 32 where that pads less."""
    if dim <= 64:
        return _power_of_two(dim)
    return min((128 if dim <= 128 else 64, 32), key=lambda columns: _ceil_div(dim, columns) * columns)


def row_blocks(heads: int, rows: int, dim: int, itemsize: int, machine: Machine) -> RowBlocks:
    columns = min(_power_of_two(dim), COLUMNS_PER_PROGRAM)
    block = elements_per_thread(itemsize) * machine.threads // columns
    return RowBlocks(block, columns, min(heads * _ceil_div(rows, block), machine.programs))


def matrices(count: int, rows: int, columns: int, itemsize: int, machine: Machine) -> Matrices:
    """Blocks as wide as the matrices, as far as a program reaches: then the sum of a row is the program's own."""
    block = elements_per_thread(itemsize) * machine.threads
    columns_block = min(_power_of_two(columns), block)
    rows_block = min(_power_of_two(rows), block // columns_block)
    row_groups, column_groups = _ceil_div(rows, rows_block), _ceil_div(columns, columns_block)
    splits = min(_ceil_div(count, MATRICES_PER_PROGRAM), max(machine.programs // (row_groups * column_groups), 1))
    return Matrices(rows_block, columns_block, row_groups, column_groups, splits)


def _pieces(n: int, block: int, chunk: int) -> int:
    """Full blocks, and chunks of what is left."""
    return n // block + _ceil_div(n % block, chunk)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
