"""The noise of the package, see docs/randomness.md: each Philox counter gives four normals, one in each stream of a noise tile."""

import triton
import triton.language as tl

from fastvae.kernels._launch import NOISE_LANES, NOISE_TILE
from fastvae.kernels._math import log_positive, sincos_turn

TILE, LANES = tl.constexpr(NOISE_TILE), tl.constexpr(NOISE_LANES)
STREAMS = tl.constexpr(NOISE_TILE // NOISE_LANES)


@triton.jit
def philox4x32(key, counter):
    """Philox4x32-10 (Salmon et al. 2011): four random words for each 64-bit counter; the upper two words of the counter are 0.

    ``tl.randint4x`` computes a product with two 32-bit multiplications. Here it is one 64-bit multiplication, which takes a third of the
    instructions.
    """
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(even, odd):
    """Two normals from two words (Box and Muller 1958)."""
    u = tl.fma(even.to(tl.float32), 2.0**-32, 2.0**-33)
    radius = tl.sqrt(-2.0 * log_positive(u))
    sine, cosine = sincos_turn(odd)
    return radius * cosine, radius * sine


@triton.jit
def draw_words(key, first, zero, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """The random words for elements ``first + 512 r + l + 128 j`` of tiles r, lanes l and streams j, which :func:`normal` turns into noise.

    ALIGNED says that ``first`` is a multiple of 512. Otherwise the four elements of a lane belong to one counter of the noise tile that
    contains ``first`` and to the same lane of the next tile, in rotated streams. So two counters a lane suffice, and no value moves between
    threads. ``zero`` determines the layout, see :func:`zero_laid_out_like`.
    """
    tile = zero + first // TILE + tl.arange(0, TILES)[:, None]
    if ALIGNED:
        return philox4x32(key, tile * LANES + tl.arange(0, LANES)[None, :])
    else:
        lane = zero.to(tl.int32) + tl.arange(0, LANES)[None, :] + (first % LANES).to(tl.int32)
        counter = tile * LANES + lane % LANES
        stream = ((first // LANES) % STREAMS).to(tl.int32) + lane // LANES
        return philox4x32(key, counter), philox4x32(key, counter + LANES), stream


@triton.jit
def normal(words, STREAM: tl.constexpr, ALIGNED: tl.constexpr):
    """The noise of stream STREAM from the words of :func:`draw_words`."""
    if ALIGNED:
        pair = box_muller(words[STREAM // 2 * 2], words[STREAM // 2 * 2 + 1])
        return pair[STREAM % 2]
    else:
        here, there, stream = words
        return rotated_normal(here, there, stream + STREAM)


@triton.jit
def rotated_normal(here, there, stream):
    """The normal of stream ``stream % 4``: of the words ``here`` for streams 0 to 3, of the next tile's words ``there`` from 4 on."""
    next_tile, second_pair = stream >= 4, (stream & 2) != 0
    even = tl.where(second_pair, tl.where(next_tile, there[2], here[2]), tl.where(next_tile, there[0], here[0]))
    odd = tl.where(second_pair, tl.where(next_tile, there[3], here[3]), tl.where(next_tile, there[1], here[1]))
    cosine, sine = box_muller(even, odd)
    return tl.where((stream & 1) != 0, sine, cosine)


@triton.jit
def zero_laid_out_like(x):
    """int64 zeros in the layout of ``x``. The compiler finds out that they are zeros only after it has fixed the layouts.

    Without them it would give counters a layout of its own choice, and move every normal through shared memory to the thread that has the
    loaded element.
    """
    return ((x != x) & (x == x)).to(tl.int64)
