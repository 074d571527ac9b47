"""What the kernels are made of, each by itself: noise words, index arithmetic, scalar functions, sums over programs."""

import math
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from _helpers import NOISE_TOLERANCE

from fastvae import functional as FV
from fastvae.kernels import _device
from fastvae.kernels._index import divide, first_chunk
from fastvae.kernels._math import expm1, log1p_unit, log_positive, logistic, sincos_turn, standard_normal
from fastvae.kernels._philox import LANES, STREAMS, TILE, box_muller, draw_words, normal, philox4x32
from fastvae.kernels._reduce import is_last, sum_programs, sum_slots
from fastvae.reference import latent as reference


@triton.jit
def words_of_counters(key, counter, out, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    words = philox4x32(tl.load(key), tl.load(counter + offset))
    for j in tl.static_range(4):
        tl.store(out + j * COUNT + offset, words[j].to(tl.int64))


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, 0x0123456789ABCDEF])
def test_philox_words(key):
    counters = torch.tensor([0, 1, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5])
    key, out = torch.tensor(key), torch.empty((4, counters.numel()), dtype=torch.int64)
    words_of_counters[(1,)](key, counters, out, COUNT=counters.numel())
    assert torch.equal(out, torch.stack(reference.philox4x32(counters, key)))


@triton.jit
def noise_from(key, first, out, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    position = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, LANES)[None, :]
    words = draw_words(tl.load(key), tl.load(first), tl.zeros([TILES, LANES], tl.int64), ALIGNED, TILES)
    for j in tl.static_range(STREAMS):
        tl.store(out + position + j * LANES, normal(words, j, ALIGNED))


def reference_noise(key, first: int, count: int) -> torch.Tensor:
    """Elements ``first`` and on, of any noise however long."""
    tile = first // 512
    counter = torch.arange(tile * 128, (tile + -(-count // 512) + 1) * 128)
    w0, w1, w2, w3 = reference.philox4x32(counter, key)
    streams = [stream.view(-1, 128) for stream in (*reference.box_muller(w0, w1), *reference.box_muller(w2, w3))]
    return torch.stack(streams, dim=1).reshape(-1)[first - 512 * tile :][:count]


@pytest.mark.parametrize("first", [0, 512, 2**33, 2**40 + 512])
@pytest.mark.parametrize("tiles", [1, 4])
def test_noise_of_aligned_tiles(first, tiles):
    key, out = torch.tensor(0x0123456789ABCDEF), torch.empty(tiles * 512)
    noise_from[(1,)](key, torch.tensor(first), out, ALIGNED=True, TILES=tiles)
    torch.testing.assert_close(out, reference_noise(key, first, tiles * 512), rtol=0, atol=NOISE_TOLERANCE)


@pytest.mark.parametrize("first", [0, 1, 63, 127, 128, 200, 300, 383, 384, 385, 500, 511, 512, 2**33 + 777, 2**40 - 1])
@pytest.mark.parametrize("tiles", [1, 4])
def test_noise_from_anywhere(first, tiles):
    key, out = torch.tensor(-5), torch.empty(tiles * 512)
    noise_from[(1,)](key, torch.tensor(first), out, ALIGNED=False, TILES=tiles)
    torch.testing.assert_close(out, reference_noise(key, first, tiles * 512), rtol=0, atol=NOISE_TOLERANCE)


@triton.jit
def normals_of_words(even, odd, first, second, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    a, b = box_muller(tl.load(even + offset).to(tl.uint32), tl.load(odd + offset).to(tl.uint32))
    tl.store(first + offset, a)
    tl.store(second + offset, b)


def test_box_muller_at_its_corners():
    """The smallest and the largest radius, and angles on both sides of each border between quadrants, against float64."""
    odd = [(q * 2**30 + half * 2**29 + step) % 2**32 for q in range(4) for half in range(2) for step in (-1, 0, 1)]
    even = [0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    words = torch.cartesian_prod(torch.tensor(even), torch.tensor(odd))
    padding = torch.zeros((256 - words.shape[0], 2), dtype=torch.int64)
    words = torch.cat([words, padding])
    first, second = torch.empty(256), torch.empty(256)
    normals_of_words[(1,)](words[:, 0].contiguous(), words[:, 1].contiguous(), first, second, COUNT=256)
    u = words[:, 0].float() * 2.0**-32 + 2.0**-33
    radius, angle = torch.sqrt(-2 * u.double().log()), words[:, 1].double() * (2 * math.pi * 2.0**-32)
    torch.testing.assert_close(first.double(), radius * angle.cos(), rtol=0, atol=NOISE_TOLERANCE)
    torch.testing.assert_close(second.double(), radius * angle.sin(), rtol=0, atol=NOISE_TOLERANCE)


@triton.jit
def functions(x, unit, turn, log, log1p, sine, cosine, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(log + offset, log_positive(tl.load(x + offset)))
    tl.store(log1p + offset, log1p_unit(tl.load(unit + offset)))
    s, c = sincos_turn(tl.load(turn + offset).to(tl.uint32))
    tl.store(sine + offset, s)
    tl.store(cosine + offset, c)


def test_functions_against_float64():
    count = 65_536
    generator = torch.Generator().manual_seed(1)
    mantissa = torch.rand(count, generator=generator)
    x = torch.cat([1 - mantissa[: count // 2] ** 4, torch.ldexp(1 + mantissa[count // 2 :], torch.arange(count // 2) % 252 - 126)])
    x = x.clamp(min=2.0**-126)
    unit = torch.cat([mantissa[: count // 2], torch.exp(-80 * mantissa[count // 2 :])])
    turn = torch.randint(2**32, (count,), generator=generator)
    log, log1p, sine, cosine = torch.empty((4, count))
    functions[(1,)](x, unit, turn, log, log1p, sine, cosine, COUNT=count)
    angle = turn.double() * (2 * math.pi * 2.0**-32)
    torch.testing.assert_close(log.double(), x.double().log(), rtol=3.5e-7, atol=0)
    torch.testing.assert_close(log1p.double(), unit.double().log1p(), rtol=2e-7, atol=1e-37)
    torch.testing.assert_close(sine.double(), angle.sin(), rtol=0, atol=2e-7)
    torch.testing.assert_close(cosine.double(), angle.cos(), rtol=0, atol=2e-7)


@triton.jit
def functions_of_any(x, out, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    value = tl.load(x + offset)
    logistics, normals = logistic(value), standard_normal(value)
    tl.store(out + offset, expm1(value))
    for j in tl.static_range(2):
        tl.store(out + (1 + j) * COUNT + offset, logistics[j])
        tl.store(out + (3 + j) * COUNT + offset, normals[j])


def test_functions_of_any_number_against_float64():
    x = torch.cat([torch.linspace(-12, 12, 8188), torch.tensor([0.0, math.inf, -math.inf, math.nan])])
    out = torch.empty((5, x.numel()))
    functions_of_any[(1,)](x, out, COUNT=x.numel())
    wide = x.double()
    for ours, wanted in zip(out, (wide.expm1(), wide.sigmoid(), (-wide).sigmoid()), strict=False):
        torch.testing.assert_close(ours.double(), wanted, rtol=6e-7, atol=1e-37, equal_nan=True)
    # Rounding -x^2 / 2 makes itself felt in its exponential.
    normals = (-0.5 * wide.square()).exp() / math.sqrt(2 * math.pi), 0.5 * torch.erfc(-wide * math.sqrt(0.5))
    for ours, wanted in zip(out[3:], normals, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=5e-6, atol=1e-37, equal_nan=True)


@triton.jit
def divided(start, divisor, quotient, remainder, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    first, added, rest = divide(tl.load(start), offset, divisor, COUNT)
    tl.store(quotient + offset, first + added)
    tl.store(remainder + offset, rest)


@pytest.mark.parametrize("divisor", [1, 2, 3, 20, 255, 256, 257, 784, 2**31 - 1, 2**31, 2**33 + 1])
@pytest.mark.parametrize("start", [0, 1, 255, 256 * 255, 2**31 - 128, 2**33 + 2, 5 * 2**33, 2**40 + 12_345])
def test_division_of_element_numbers(start, divisor):
    quotient, remainder = torch.empty((2, 256), dtype=torch.int64)
    divided[(1,)](torch.tensor(start), divisor, quotient, remainder, COUNT=256)
    numbers = start + torch.arange(256)
    assert torch.equal(quotient, numbers // divisor)
    assert torch.equal(remainder, numbers % divisor)


@triton.jit
def chunks_taken(taken, full, chunks):
    program, programs = tl.program_id(0), tl.num_programs(0)
    for chunk in range(first_chunk(full, program, programs), chunks, programs):
        tl.store(taken + chunk, tl.load(taken + chunk) + 1)


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
@pytest.mark.parametrize("full", [0, 1, 5, 7, 100])
def test_every_chunk_is_taken_once(full, programs):
    taken = torch.zeros(13, dtype=torch.int32)
    chunks_taken[(programs,)](taken, full, 13)
    assert torch.equal(taken, torch.ones_like(taken))


@triton.jit
def sums(slots, out, stride, count, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    tl.store(out + column, sum_slots(slots, column, column < stride, count, stride, ROWS, COLUMNS), mask=column < stride)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 5), (16, 16), (37, 13)])
def test_sums_of_slots(count, columns):
    slots = torch.randint(-8, 8, (count, columns)).float()
    out = torch.empty(columns)
    sums[(1,)](slots, out, columns, count, COLUMNS=16, ROWS=4)
    assert torch.equal(out, slots.sum(0))


@triton.jit
def total_of_programs(values, slots, ticket, out):
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(slots + program, tl.load(values + program))
    if is_last(ticket, programs):
        tl.store(out, sum_programs(slots, programs))


@pytest.mark.parametrize("programs", [1, 2, 1300])
def test_the_last_program_sums_and_resets_the_ticket(programs):
    values, out = torch.randint(-8, 8, (programs,)).float(), torch.empty(())
    ticket = _device.ticket(values.device)
    for _ in range(2):
        total_of_programs[(programs,)](values, torch.empty(programs), ticket, out)
        assert out == values.sum()
        assert ticket == 0


def losses():
    """Calls whose kernels count programs, of every family that does."""
    x, target, logvar = torch.randn(3, 20000), torch.rand(3, 20000), torch.randn(3, 20000).requires_grad_()
    shared = torch.zeros(()).requires_grad_()
    yield "codebook", lambda: FV.vector_quantize(torch.randn(20, 5), torch.randn(7, 5))
    yield "latent", lambda: FV.reparameterize_kl(x, logvar)
    yield "latent, samples", lambda: FV.kl_normal(x, logvar, reduction="sample")
    yield "latent, free bits", lambda: FV.kl_normal(x, logvar, free_bits=0.1)
    yield "reconstruction", lambda: FV.mse_loss(x, target)
    yield "reconstruction, samples", lambda: FV.mse_loss(x, target, reduction="sample")
    yield "reconstruction, backward", lambda: torch.autograd.grad(FV.gaussian_nll(x, target, shared, reduction="sample").sum(), shared)
    yield "jacobian", lambda: FV.contractive_penalty(torch.rand(4, 9), torch.randn(9, 5))
    yield "jacobian, samples", lambda: FV.contractive_penalty(torch.rand(2, 5000), torch.randn(5000, 3), reduction="sample")


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in losses()])
def test_tickets_are_taken_on_the_device_of_the_launch(monkeypatch, call):
    """A ticket is for the current device's stream, and new while that is captured."""
    depth, taken = [0], []
    ticket = _device.ticket

    @contextmanager
    def on(device):
        depth[0] += 1
        yield
        depth[0] -= 1

    def recorded(device):
        taken.append(depth[0])
        return ticket(device)

    monkeypatch.setattr(_device, "on", on)
    monkeypatch.setattr(_device, "ticket", recorded)
    call()
    assert taken
    assert all(taken)


class Stream:
    """A CUDA stream of which nobody asks more than its device: waiting for it is an error."""

    device = torch.device("cpu")


def test_the_first_ticket_of_a_stream_waits_for_nothing(monkeypatch):
    """The zero is written on the stream of the launches, by a thread whose memory is in no graph's pool."""
    stream, made = Stream(), []
    zeros, current = torch.zeros, threading.local()

    @contextmanager
    def on_stream(stream):
        current.stream = stream
        yield
        current.stream = None

    def recorded(*arguments, **options):
        made.append((current.stream, threading.get_ident()))
        return zeros(*arguments, **options)

    monkeypatch.setattr(_device, "_tickets", {})
    monkeypatch.setattr(torch, "zeros", recorded)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 5))
    monkeypatch.setattr(_device, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    device = torch.device("cuda", 0)
    ticket = _device.ticket(device)
    assert ticket == 0
    assert _device.ticket(device) is ticket
    assert [place for place, _ in made] == [stream]
    assert made[0][1] != threading.get_ident()
