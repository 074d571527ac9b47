"""What only a CUDA device shows: graphs, streams, synchronisation, memory, determinism and more than 2^31 elements."""

from contextlib import contextmanager

import pytest
import torch
from _calls import Call, calls_on
from _helpers import NOISE_TOLERANCE, assert_close, places

import fastvae
from fastvae import functional as FV
from fastvae._backend import ON_EVERY_DEVICE
from fastvae.reference import latent as reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

# Families without a kernel for CUDA are not among them, and come in with it.
each_call = pytest.mark.parametrize(("call", "place"), calls_on("cuda", compiled=True), ids=str)
# More than a block of any kernel, and more than one program of it.
ROWS = 300


def compiled(*operators: str):
    found = [place for place in places(*operators) if place.device == "cuda" and place.backend not in ON_EVERY_DEVICE]
    return pytest.mark.parametrize("place", found, ids=str)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], call: Call) -> None:
    """Bit by bit, where the order of all sums is ours."""
    for name, tensor in expected.items():
        if call.by_library:
            torch.testing.assert_close(actual[name], tensor)
        else:
            assert torch.equal(actual[name], tensor), name


def overwrite(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(others[name])


def captured(function):
    """A graph of ``function()`` and what it writes on a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@each_call
def test_same_results_again(call, place):
    tensors = call.tensors("cuda", ROWS)
    assert_same(call.results(tensors), call.results(tensors), call)


@each_call
def test_results_are_those_of_the_reference_on_the_cpu(call, place):
    """With the same seed: the same noise."""
    results = call.results(call.tensors("cuda", ROWS))
    with fastvae.use_backend("reference"):
        expected = call.results(call.tensors("cpu", ROWS))
    for name, tensor in expected.items():
        size = 1.0 + float(tensor.double().abs().max())
        torch.testing.assert_close(results[name].cpu(), tensor, rtol=1e-4, atol=1e-5 * size)


@each_call
def test_replays_of_a_graph_are_the_call_itself(call, place):
    """With other values in its tensors each time, the seed's too."""
    tensors = call.tensors("cuda", ROWS)
    graph, results = captured(lambda: call.results(tensors))
    for seed in (1, 2, 3):
        others = call.tensors("cuda", ROWS, seed)
        overwrite(tensors, others)
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in results.items()}
        assert_same(replayed, call.results(others), call)


@compiled("latent_forward")
def test_a_replay_draws_anew(place):
    """Where no seed is given torch's generator draws one, in the graph as well."""
    mu = torch.zeros(ROWS, 20, device="cuda")
    graph, z = captured(lambda: FV.reparameterize(mu, mu))
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(z.clone())
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert abs(float(torch.stack(draws).mean())) < 0.05
    assert abs(float(torch.stack(draws).std()) - 1) < 0.05


@each_call
def test_streams_do_not_disturb_each_other(call, place):
    """Each stream has its own values and all run at once, some times over: what they share (tickets, workspaces) shows here."""
    inputs = [call.tensors("cuda", ROWS, seed) for seed in range(4)]
    expected = [call.results(tensors) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, tensors in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(call.results(tensors))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_same(result, expected[i % len(inputs)], call)


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_would_show():
    number = torch.ones((), device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@each_call
def test_the_host_does_not_wait(call, place):
    tensors = call.tensors("cuda", ROWS)
    call.results(tensors)  # compiles and allocates
    with no_synchronisation():
        call.results(tensors)


@compiled("latent_forward")
@pytest.mark.parametrize("seed", [None, 5], ids=["drawn", "given"])
def test_a_seed_does_not_wait(place, seed):
    mu = torch.zeros(ROWS, 20, device="cuda")
    FV.reparameterize(mu, mu, seed=seed)
    with no_synchronisation():
        FV.reparameterize(mu, mu, seed=seed)


@each_call
def test_peak_memory_is_what_is_returned(call, place):
    """Outputs, gradients and the gradients that come in, and little else (see :class:`Call`)."""
    rows = ROWS * 2**22 // max(tensor.numel() for tensor in call.tensors("cuda", ROWS).values())
    tensors = call.tensors("cuda", rows)
    call.results(tensors)  # compiles; tickets and workspaces that stay are allocated
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call.results(tensors)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    read = sum(tensor.nbytes for tensor in tensors.values())
    returned = sum(tensor.nbytes for tensor in results.values())
    # The gradient of an output is as large as the output, and made of int32 numbers.
    incoming = sum(3 * tensor.numel() * 4 for name, tensor in results.items() if name.startswith("output") and call.leaves)
    assert peak <= returned + incoming + call.workspace * read + 2**22


@compiled("latent_forward")
@pytest.mark.parametrize(("shape", "samples"), [((1,), None), ((3, 171), None), ((1_000_001,), None), ((7, 73), 5)], ids=str)
def test_noise_is_that_of_the_cpu(place, shape, samples):
    zeros = torch.zeros(shape)
    with fastvae.use_backend(None):
        expected = FV.reparameterize(zeros, zeros, seed=11, num_samples=samples)
    drawn = FV.reparameterize(zeros.cuda(), zeros.cuda(), seed=11, num_samples=samples)
    torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=NOISE_TOLERANCE)


# More than 2^31 elements. The few that are looked at lie at the start, around 2^31 and at the end.

GIBIBYTE = 2**30


@pytest.fixture(autouse=True)
def freed_memory():
    yield
    torch.cuda.empty_cache()


def needs(gibibytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIBIBYTE:
        pytest.skip(f"takes {gibibytes} GiB of GPU memory, {free / GIBIBYTE:.0f} are free")


def filled(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normals, drawn on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)


def windows(count: int) -> list[slice]:
    return [slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(count - 1000, count)]


@compiled("latent_forward", "latent_backward")
def test_latent_beyond_two_to_the_31(place):
    needs(40)
    count = 2**31 + 1537
    mu, logvar = (filled(count, seed=seed).requires_grad_() for seed in (0, 1))
    z = FV.reparameterize(mu, logvar, seed=5)
    with torch.no_grad():
        drawn = FV.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu), seed=5)
    incoming = filled(count, seed=2)
    grad_mu, grad_logvar = torch.autograd.grad(z, (mu, logvar), incoming)
    for part in windows(count):
        noise = normals(5, part)
        assert_close(drawn[part], noise, torch.bfloat16, scale=2.0)
        sigma = (0.5 * logvar.detach()[part].double()).exp()
        assert_close(z.detach()[part], mu.detach()[part].double() + sigma * noise, torch.bfloat16, magnitude=1.0)
        assert torch.equal(grad_mu[part], incoming[part])
        assert_close(grad_logvar[part], 0.5 * sigma * noise * incoming[part].double(), torch.bfloat16, scale=30.0)


def normals(seed: int, part: slice) -> torch.Tensor:
    """The noise of some elements, in float64, by the reference's Philox."""
    element = torch.arange(part.start, part.stop, device="cuda")
    counter = element // reference.TILE * reference.LANES + element % reference.LANES
    words = reference.philox4x32(counter, torch.tensor(seed, device="cuda"))
    streams = torch.stack([*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])])
    return streams.gather(0, (element % reference.TILE // reference.LANES)[None])[0].double()


@compiled("reconstruction_forward", "reconstruction_backward")
def test_reconstruction_beyond_two_to_the_31(place):
    needs(30)
    rows, columns = 3, 2**30 + 7
    logits = filled(rows, columns, seed=0).requires_grad_()
    target = torch.empty(rows, columns, dtype=torch.uint8, device="cuda").random_(256, generator=torch.Generator("cuda").manual_seed(1))
    loss = FV.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        by_sample = FV.binary_cross_entropy_with_logits(logits, target, reduction="sample")
    torch.testing.assert_close(by_sample.double().sum(), loss.detach().double(), rtol=1e-4, atol=0)
    x, t = logits.detach().view(-1), target.view(-1)
    for part in windows(rows * columns):
        assert_close(gradient.view(-1)[part], x[part].double().sigmoid() - t[part].double() / 255, torch.bfloat16, scale=10.0)


@compiled("group_norm_forward", "group_norm_backward")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_group_norm_beyond_two_to_the_31(place, layout):
    """In one sample, whose last group is looked at."""
    needs(45)
    channels, positions = 272, 2**23
    # One group of channels is 16 x 2^23: 2^27 elements, of 2^31 + 2^27.
    x = filled(1, channels, positions, seed=0) if layout == "contiguous" else filled(1, positions, channels, seed=0).movedim(-1, 1)
    x.requires_grad_()
    y = FV.group_norm_silu(x, 17)
    incoming = x.detach()
    (gradient,) = torch.autograd.grad(y, x, incoming)
    last = x.detach()[:, -16:].float().requires_grad_()
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(last, 1))
    (expected_gradient,) = torch.autograd.grad(expected, last, last.detach())
    for part in (slice(0, 1000), slice(positions - 1000, positions)):
        assert_close(y.detach()[:, -16:, part], expected.detach()[..., part].double(), torch.bfloat16, magnitude=0.1)
        assert_close(gradient[:, -16:, part], expected_gradient[..., part].double(), torch.bfloat16, magnitude=0.1)


@compiled("rms_norm_forward", "rms_norm_backward")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_rms_norm_beyond_two_to_the_31(place, layout):
    """In one sample, whose first and last positions are looked at."""
    needs(45)
    channels, positions = 264, 2**23 + 4
    x = filled(1, channels, positions, seed=0) if layout == "contiguous" else filled(1, positions, channels, seed=0).movedim(-1, 1)
    x.requires_grad_()
    weight = filled(channels, seed=1).requires_grad_()
    y = FV.rms_norm_silu(x, weight)
    incoming = x.detach()
    gradient, grad_weight = torch.autograd.grad(y, (x, weight), incoming)
    for part in (slice(0, 1000), slice(positions - 1000, positions)):
        some = x.detach()[..., part].double().requires_grad_()
        normal = some * (some.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        expected = torch.nn.functional.silu(normal * weight.detach().double()[:, None])
        (expected_gradient,) = torch.autograd.grad(expected, some, some.detach())
        assert_close(y.detach()[..., part], expected.detach(), torch.bfloat16, magnitude=0.1)
        assert_close(gradient[..., part], expected_gradient, torch.bfloat16, magnitude=0.1)
    assert grad_weight.isfinite().all()


@compiled("jacobian_forward", "jacobian_backward")
def test_jacobian_beyond_two_to_the_31(place):
    needs(30)
    rows, units = 2**17 + 3, 2**14
    hidden = torch.empty(rows, units, dtype=torch.bfloat16, device="cuda").uniform_(generator=torch.Generator("cuda").manual_seed(0))
    hidden.requires_grad_()
    weight = filled(units, 8, seed=1)
    penalty = FV.contractive_penalty(hidden, weight, reduction="sample")
    (gradient,) = torch.autograd.grad(penalty.sum(), hidden)
    norms = weight.double().square().sum(1)
    for part in (slice(0, 2), slice(rows - 2, rows)):
        h = hidden.detach()[part].double()
        slope = h * (1 - h)
        torch.testing.assert_close(penalty.detach()[part].double(), (slope.square() * norms).sum(1), rtol=1e-5, atol=0)
        assert_close(gradient[part], 2 * slope * (1 - 2 * h) * norms, torch.bfloat16, scale=10.0)


@compiled("codebook_quantize", "codebook_quantize_backward")
def test_codebook_beyond_two_to_the_31(place):
    needs(45)
    rows, dim = 2**25 + 3, 64
    x = filled(rows, dim, seed=0).requires_grad_()
    codebook = filled(64, dim, seed=1, dtype=torch.float32)
    quantized, indices, _ = FV.vector_quantize(x, codebook, codebook_cost=0.0)
    (gradient,) = torch.autograd.grad(quantized, x, x.detach())
    for part in (slice(0, 50), slice(2**25 - 25, 2**25 + 3)):
        distances = (x.detach()[part].double()[:, None] - codebook.double()).square().sum(2)
        assert torch.equal(indices[part], distances.argmin(1))
        assert torch.equal(quantized.detach()[part], codebook[indices[part]].bfloat16())
        assert torch.equal(gradient[part], x.detach()[part])
