"""The kernels that pack rows and codes for the screen of the exact search, see :mod:`fastvae.kernels._codebook_search`.

==========================  ========================  ======================================  ==========================================
kernel                      grid                      reads                                   writes
==========================  ========================  ======================================  ==========================================
codebook_measure_kernel     (blocks of codes, heads)  codebook, mean                          hashes, max_quarter
codebook_pack_codes_kernel  (blocks of codes, heads)  codebook, mean, hashes, max_quarter     packed codes, half_norm, error_weight
codebook_pack_rows_kernel   (blocks of rows, heads)   x, mean, max_quarter                    packed rows, product_scale, row_error
==========================  ========================  ======================================  ==========================================

Packed vectors are minus the mean of the codes, which changes no distance and makes the norms small, times a power of two that puts them
into the range of float16, one for all codes of a head and one for each row, and rounded to float16 (HALF) or float32.
"""

import triton
import triton.language as tl

# The half norm of codes that are never the nearest: padding, codes that are equal to an earlier one, and codes that are not finite. It is
# above every score.
NEVER_NEAREST = tl.constexpr(2.0**100)
# The product_scale of a row that the screen does not decide: an element is not finite, or too large for the products beside the codes.
NOT_FINITE, TOO_LARGE = tl.constexpr(-1.0), tl.constexpr(0.0)
# Bounds what underflow takes from a norm, for vectors whose largest element is near 2^14.
NORM_SLACK = tl.constexpr(2.0**-40)
# Added to the error of a row. Times the error_weight of a code, which is NORM_SLACK or more, it bounds what underflow takes from a score,
# and what the number of the tile in the low bits of a score near 0 adds: 2^-120.
ROW_ERROR_SLACK = tl.constexpr(2.0**-80)
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
MAX_HALF, SMALLEST_NORMAL_HALF = tl.constexpr(65504.0), tl.constexpr(2.0**-14)
INFINITY = tl.constexpr(float("inf"))
NO_TWIN = tl.constexpr(2**31 - 1)


@triton.jit
def scale_exponent(max_element):
    """The biased exponent of the power of two that takes ``max_element`` to [2^13, 2^14), limited to those of normal float32."""
    exponent = 267 - (max_element.to(tl.int32, bitcast=True) >> 23)
    return tl.minimum(tl.maximum(exponent, 1), 253)


@triton.jit
def power_of_two(exponent):
    """The float32 with a biased exponent."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_scale_exponent(max_quarter):
    """The biased exponent of the scale of the codes. ``max_quarter`` points to a quarter of their largest element, because the element
    minus the mean may overflow. Where it is 0, the scale is 1."""
    quarter = tl.load(max_quarter)
    return tl.where(quarter == 0, 127, tl.maximum(scale_exponent(quarter.to(tl.float32, bitcast=True)) - 2, 1))


@triton.jit
def load_mean(mean, column, mask):
    """The mean of the codes, and 0 where it is not finite: subtracting any vector from rows and codes leaves the distances as they are."""
    values = tl.load(mean + column, mask=mask, other=0.0)
    return tl.where(tl.abs(values) <= MAX_FLOAT, values, 0.0)


@triton.jit
def load_tile(pointer, row, row_stride, column, mask):
    """Elements ``column`` of the rows that begin at ``row * row_stride``, in float32; 0 outside the mask."""
    return tl.load(pointer + (row[:, None] * row_stride + column[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def round_off(value, HALF: tl.constexpr):
    """``value`` (float32) in the dtype of the screen. Values that would be subnormal are 0, because not every device multiplies subnormal
    numbers."""
    if HALF:
        return tl.where(tl.abs(value) < SMALLEST_NORMAL_HALF, 0.0, value).to(tl.float16)
    else:
        return value


@triton.jit
def lower_bound(product, half_norm, error_weight, minus_scale, minus_error):
    """A lower bound of a score, from the product of a packed row and a packed code, the code's half_norm and error_weight, and minus the
    row's product_scale and row_error."""
    score = minus_scale * product + half_norm
    return minus_error * error_weight + score


@triton.jit
def upper_bound(lower, half_norm, error_weight, row_error, half_norm_rounding):
    """The upper bound of a score, which is twice its error above the lower bound. The factor is a little more, for the rounding of this
    sum."""
    return lower + 2.01 * (row_error * error_weight + half_norm_rounding * half_norm)


@triton.jit(do_not_specialize=["codes"])
def codebook_measure_kernel(
    codebook, mean, max_quarter, hashes, code_head_stride, code_stride, codes, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Computes a hash of each code, and the maximum over all elements of a quarter of the code minus the mean. Grid: (blocks of codes,
    heads).

    Pointers: codebook (heads, codes, dim); mean (heads, dim) float32; max_quarter (heads,) int32, the bits of a float32, which
    are ordered like it; hashes (heads, codes) int64.
    """
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    max_size, hashed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int64)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        values = load_tile(codebook + head * code_head_stride, code, code_stride, column, mask)
        centred = values.to(tl.float64) - load_mean(mean + head * dim, column, column < dim).to(tl.float64)[None, :]
        size = (tl.abs(centred) * 0.25).to(tl.float32)
        max_size = tl.maximum(max_size, tl.max(tl.where(mask & (size <= MAX_FLOAT), size, 0.0), axis=1))
        # -0 has the hash of 0.
        bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True).to(tl.int64)
        factor = (2 * column + 1).to(tl.int64) * 0x1E3779B97F4A7C15
        hashed += tl.sum(tl.where(mask, (bits ^ (bits << 27)) * factor[None, :], 0), axis=1)
    tl.store(hashes + head * codes + code, hashed ^ (hashed >> 31), mask=code < codes)
    tl.atomic_max(max_quarter + head, tl.max(max_size, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def find_repeated(codebook, hashes, code, code_stride, codes, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether each code of a block is equal to the first code with the same hash. Such codes are left out of the search, because every row
    would have to decide between them exactly, which would make an untrained codebook of equal codes slow.

    A code is not found where a different code has the same hash and comes first. It stays in the search, which is right, only slower.
    """
    block_hashes = tl.load(hashes + code, mask=code < codes, other=0)
    twin = tl.full([ROWS], NO_TWIN, tl.int32)
    for start in range(0, tl.minimum(tl.max(code, axis=0), codes), COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        other_hashes = tl.load(hashes + other, mask=other < codes, other=0)
        same = (block_hashes[:, None] == other_hashes[None, :]) & (other[None, :] < code[:, None])
        twin = tl.minimum(twin, tl.min(tl.where(same, other[None, :].to(tl.int32), NO_TWIN), axis=1))
    differs = tl.where((twin == NO_TWIN) | (code >= codes), 1, 0)
    if tl.min(differs, axis=0) == 0:
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (differs == 0)[:, None] & (column < dim)[None, :]
            values = load_tile(codebook, code, code_stride, column, mask)
            twin_values = load_tile(codebook, twin.to(tl.int64), code_stride, column, mask)
            differs = tl.maximum(differs, tl.max(tl.where(values == twin_values, 0, 1), axis=1))
    return differs == 0


@triton.jit(do_not_specialize=["codes"])
def codebook_pack_codes_kernel(
    codebook, mean, max_quarter, hashes, packed, half_norm, error_weight, code_head_stride, code_stride,
    codes, dim, padded_codes, padded_dim, unit, half_norm_rounding,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packs the codes. The error of a score is at most row_error * error_weight + half_norm_rounding * half_norm; the half norm that is
    stored is less by the second term. Grid: (blocks of codes, heads).

    Pointers: codebook, mean, max_quarter and hashes as above; packed (heads, padded_codes, padded_dim), float16 with HALF, otherwise
    float32; half_norm and error_weight (heads, padded_codes) float32.
    """
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = codebook + head * code_head_stride
    scale = power_of_two(code_scale_exponent(max_quarter + head)).to(tl.float64)
    used = (code < codes) & ~find_repeated(base, hashes + head * codes, code, code_stride, codes, dim, ROWS, COLUMNS)
    square, square_residual = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for first in range(0, padded_dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        values = load_tile(base, code, code_stride, column, mask)
        used = used & (tl.min(tl.where(tl.abs(values) <= MAX_FLOAT, 1, 0), axis=1) == 1)
        centre = load_mean(mean + head * dim, column, column < dim).to(tl.float64)
        centred = tl.where(mask, (values.to(tl.float64) - centre[None, :]) * scale, 0.0)
        # Only elements of codes that are not used are beyond float16.
        centred = tl.where(tl.abs(centred) <= MAX_HALF, centred, 0.0)
        rounded = round_off(centred.to(tl.float32), HALF)
        rest = centred - rounded.to(tl.float64)
        square += tl.sum(centred * centred, axis=1)
        square_residual += tl.sum(rest * rest, axis=1)
        at = packed + ((head * padded_codes + code)[:, None] * padded_dim + column[None, :])
        tl.store(at, rounded, mask=(code < padded_codes)[:, None] & (column < padded_dim)[None, :])
    norm = tl.sqrt(square) * (1.0 + 1e-6) + NORM_SLACK
    residual_norm = tl.sqrt(square_residual) * (1.0 + 1e-6) + NORM_SLACK
    lowered = 0.5 * square * (1.0 - half_norm_rounding)
    slot = head * padded_codes + code
    tl.store(half_norm + slot, tl.where(used, lowered, NEVER_NEAREST), mask=code < padded_codes)
    tl.store(error_weight + slot, tl.where(used, tl.maximum(norm + residual_norm, residual_norm / unit), 0.0), mask=code < padded_codes)


@triton.jit(do_not_specialize=["rows"])
def codebook_pack_rows_kernel(
    x, mean, max_quarter, packed, product_scale, row_error, x_head_stride, x_stride, rows, dim, padded_rows, padded_dim, rounding,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packs the rows. ``product_scale`` is the power of two that takes products of packed rows and codes to the scale of the half norms, or
    NOT_FINITE or TOO_LARGE. Grid: (blocks of rows, heads).

    Pointers: x (heads, rows, dim); mean and max_quarter as above; packed (heads, padded_rows, padded_dim), float16 with HALF, otherwise
    float32; product_scale and row_error (heads, padded_rows) float32.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = x + head * x_head_stride
    max_element, not_finite = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < dim)[None, :]
        values = load_tile(base, row, x_stride, column, mask)
        size = tl.abs(values - load_mean(mean + head * dim, column, column < dim)[None, :])
        max_element = tl.maximum(max_element, tl.max(tl.where(mask, tl.where(size <= MAX_FLOAT, size, INFINITY), 0.0), axis=1))
        not_finite = tl.maximum(not_finite, tl.max(tl.where(tl.abs(values) <= MAX_FLOAT, 0, 1), axis=1))
    code_exponent = code_scale_exponent(max_quarter + head)
    exponent = tl.minimum(scale_exponent(max_element), code_exponent + 100)
    screened = (not_finite == 0) & (max_element <= MAX_FLOAT) & (code_exponent - exponent <= 40)
    scale = tl.where(screened, power_of_two(exponent), 0.0)
    square, square_residual = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, padded_dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = screened[:, None] & (row < rows)[:, None] & (column < dim)[None, :]
        values = load_tile(base, row, x_stride, column, mask)
        centre = load_mean(mean + head * dim, column, column < dim)[None, :]
        scaled = tl.where(mask, (values - centre) * scale[:, None], 0.0)
        rounded = round_off(scaled, HALF)
        single = rounded.to(tl.float32)
        square += tl.sum(single * single, axis=1)
        square_residual += tl.sum((scaled - single) * (scaled - single), axis=1)
        at = packed + ((head * padded_rows + row)[:, None] * padded_dim + column[None, :])
        tl.store(at, rounded, mask=(row < padded_rows)[:, None] & (column < padded_dim)[None, :])
    inflation = 1.0 + tl.cast(padded_dim + 16, tl.float32) * (2.0**-22)
    norm = tl.sqrt(square) * inflation + NORM_SLACK
    # The last term bounds the rounding of the difference from the mean to float32.
    residual_norm = tl.sqrt(square_residual) * inflation + NORM_SLACK + norm * (2.0**-22)
    scale_to_codes = power_of_two(tl.where(screened, code_exponent - exponent + 127, 127))
    slot = head * padded_rows + row
    mark = tl.where(not_finite == 0, tl.where(screened, scale_to_codes, TOO_LARGE), NOT_FINITE)
    tl.store(product_scale + slot, mark, mask=row < padded_rows)
    error = scale_to_codes * (residual_norm + rounding * norm) * (1.0 + 2.0**-12) + ROW_ERROR_SLACK
    tl.store(row_error + slot, error, mask=row < padded_rows)
