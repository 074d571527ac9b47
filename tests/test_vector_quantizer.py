"""The quantization layers: against vector-quantize-pytorch, across processes, through a save, and what each option promises."""

import io
import math

import pytest
import torch
from torch import nn

from benchmarks import devices
from fastvae import functional as FV
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer

OPTIONS = [
    {},
    {"update": "gradient"},
    {"gradient": "rotation"},
    {"cosine": True},
    {"cosine": True, "update": "gradient"},
    {"heads": 4},
    {"heads": 2, "share_codebook": True, "update": "gradient"},
    {"revive_below": 0.5},
    {"revive_below": 0.5, "update": "gradient", "heads": 2},
    {"kmeans_iters": 3},
    {"kmeans_iters": 3, "cosine": True, "heads": 2, "revive_below": 1.0},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def train(layer, batches, lr=0.5):
    """Steps of a small encoder and the layer; gives the outputs."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr) if list(layer.parameters()) else None
    outputs = []
    for x in batches:
        x = x.clone().requires_grad_()
        output = layer(x)
        (output.loss + output.quantized.square().mean()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        outputs.append((output, x.grad))
    return outputs


def batches(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@each_option
def test_shapes_and_decoding(options):
    layer = VectorQuantizer(16, 8, channels_first=True, **options)
    output, grad = train(layer, batches(1, 3, 8, 5, 6))[0]
    assert output.quantized.shape == (3, 8, 5, 6)
    assert output.indices.shape == ((3, 5, 6) if layer.heads == 1 else (3, 5, 6, layer.heads))
    assert output.loss.shape == output.perplexity.shape == output.usage.shape == ()
    assert 1 <= output.perplexity <= 16
    assert 0 < output.usage <= 1
    assert torch.isfinite(grad).all()
    layer.eval()
    output = layer(torch.randn(3, 8, 5, 6))
    torch.testing.assert_close(layer.decode(output.indices), output.quantized, rtol=1e-5, atol=1e-6)


@each_option
def test_state_survives_a_save_in_the_middle_of_training(options):
    data = batches(6, 40, 8)
    torch.manual_seed(0)
    layer, other = VectorQuantizer(12, 8, **options), VectorQuantizer(12, 8, **options)
    train(layer, data[:3])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    state = torch.get_rng_state()
    first = train(layer, data[3:])
    torch.set_rng_state(state)
    second = train(other, data[3:])
    for (a, grad_a), (b, grad_b) in zip(first, second, strict=True):
        for ours, theirs in zip((*a, grad_a), (*b, grad_b), strict=True):
            assert torch.equal(ours, theirs)
    for (name, ours), theirs in zip(layer.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("rotation", [False, True])
def test_as_vector_quantize_pytorch_after_20_steps(rotation):
    library = pytest.importorskip("vector_quantize_pytorch", reason="a comparison, not a dependency")
    theirs = library.VectorQuantize(dim=6, codebook_size=20, decay=0.9, commitment_weight=0.7, rotation_trick=rotation)
    ours = VectorQuantizer(20, 6, decay=0.9, commitment_cost=0.7, gradient="rotation" if rotation else "straight_through")
    ours.codebook.copy_(theirs.codebook)
    ours.ema_sum.copy_(theirs._codebook.embed_avg[0])
    for x in batches(20, 4, 50, 6):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        output = ours(leaves[0])
        quantized, indices, loss = theirs(leaves[1])
        (output.loss + output.quantized.square().mean()).backward()
        (loss.sum() + quantized.square().mean()).backward()
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.quantized, quantized)
        torch.testing.assert_close(output.loss, loss.squeeze(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-6)
    state = theirs._codebook
    for actual, expected in ((ours.codebook, state.embed), (ours.ema_count, state.cluster_size), (ours.ema_sum, state.embed_avg)):
        torch.testing.assert_close(actual, expected[0], rtol=1e-4, atol=1e-5)


def test_a_training_step_needs_no_matrix_of_all_distances():
    rows, dim, codes = 4096, 8, 2048
    layer, x = VectorQuantizer(codes, dim), torch.randn(rows, dim, requires_grad=True)
    peak = devices.Cpu().peak_memory(lambda: train(layer, [x.detach()]))
    assert x.nbytes < peak < rows * codes * 4 / 16


def test_evaluation_changes_nothing():
    layer = VectorQuantizer(10, 4, revive_below=1.0).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(30, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_are_revived_with_their_statistics(update):
    layer = VectorQuantizer(8, 4, update=update, revive_below=0.5, decay=0.9)
    with torch.no_grad():
        layer.codebook[3:] = 1e3 + torch.arange(5.0)[:, None]
        layer.ema_count[3:] = 0.5
    x = torch.randn(64, 4)
    layer(x)
    for k in range(3, 8):
        assert (layer.codebook[k] == x).all(-1).any()
        assert layer.ema_count[k] == 0.5
        if update == "ema":
            torch.testing.assert_close(layer.ema_sum[k], layer.codebook[k] * 0.5)
    assert len(layer.codebook[3:].unique(dim=0)) == 5
    # A revived code lies on a vector of the batch, so it is used at once and does not die again.
    assert layer(x).usage > 0.6
    assert (layer.ema_count >= 0.5).all()


def test_kmeans_start_finds_separated_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, 10.0], [0.0, -10.0]])
    x = (centres[:, None] + 0.1 * torch.randn(4, 50, 2)).reshape(-1, 2)
    layer = VectorQuantizer(4, 2, kmeans_iters=10, decay=0.5)
    output = layer(x)
    assert output.loss < 0.1
    torch.testing.assert_close(output.perplexity, torch.tensor(4.0))
    assert bool(layer.started)
    found = layer.codebook[torch.cdist(centres, layer.codebook).argmin(1)]
    torch.testing.assert_close(found, centres, rtol=0, atol=0.1)


@each_option
def test_masked_vectors_take_no_part(options):
    x, mask = batches(1, 6, 9, 8)[0], torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    torch.manual_seed(0)
    layer = VectorQuantizer(12, 8, **options)
    other = VectorQuantizer(12, 8, **options)
    other.load_state_dict(layer.state_dict())
    dirty = torch.where(mask[..., None], x, float("nan")).requires_grad_()
    torch.manual_seed(1)
    masked = layer(dirty, mask)
    torch.manual_seed(1)
    compact = other(x[mask])
    masked.loss.backward()
    torch.testing.assert_close(masked.loss, compact.loss)
    assert torch.equal(masked.indices[mask], compact.indices)
    assert (masked.indices[~mask] == -1).all()
    torch.testing.assert_close(masked.quantized[mask], compact.quantized)
    assert torch.count_nonzero(masked.quantized[~mask]) == 0
    assert torch.count_nonzero(torch.nan_to_num(dirty.grad[~mask])) == 0
    torch.testing.assert_close(masked.perplexity, compact.perplexity)
    for ours, theirs in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_heads_are_separate_quantizers():
    layer = VectorQuantizer(7, 6, heads=3).eval()
    x = torch.randn(11, 6)
    output = layer(x)
    for head in range(3):
        part = x[:, 2 * head : 2 * head + 2]
        assert torch.equal(output.indices[:, head], FV.vq_nearest(part, layer.codebook[head]))


def test_cosine_picks_the_code_of_the_largest_cosine():
    layer = VectorQuantizer(9, 5, cosine=True).eval()
    x = torch.randn(40, 5) * torch.rand(40, 1) * 100
    cosines = nn.functional.normalize(x, dim=1) @ layer.codebook.T
    assert torch.equal(layer(x).indices, cosines.argmax(1))


def test_perplexity_and_usage():
    layer = VectorQuantizer(4, 1, update="gradient").eval()
    with torch.no_grad():
        layer.codebook.copy_(torch.arange(4.0)[:, None])
    output = layer(torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None])
    assert output.perplexity == pytest.approx(2.0)
    assert output.usage == 0.5


def test_residual_steps():
    torch.manual_seed(0)
    layer = ResidualVectorQuantizer(4, 32, 6, kmeans_iters=5, channels_first=True)
    x = torch.randn(5, 6, 40, requires_grad=True)
    for _ in range(5):
        output = layer(x)
    assert output.indices.shape == (5, 40, 4)
    assert output.perplexity.shape == output.usage.shape == (4,)
    errors = [(layer.eval().decode(layer(x).indices[..., : i + 1]) - x).square().mean().item() for i in range(4)]
    assert errors == sorted(errors, reverse=True)
    output = layer(x)
    torch.testing.assert_close(layer.decode(output.indices), output.quantized)
    (grad,) = torch.autograd.grad(output.quantized.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_quantizer_dropout():
    torch.manual_seed(0)
    layer = ResidualVectorQuantizer(4, 8, 3, quantizer_dropout=True, min_quantizers=2)
    used = set()
    for x in batches(30, 20, 3):
        output = layer(x)
        steps = int((output.indices >= 0).any(0).sum())
        assert (output.indices[:, steps:] == -1).all()
        assert (output.usage[steps:] == 0).all()
        torch.testing.assert_close(output.quantized, x + (output.quantized - x))
        used.add(steps)
    assert used == {2, 3, 4}
    assert (layer.eval()(x).indices >= 0).all()


def _train_on_its_half(rank, options):
    torch.manual_seed(0)
    layer = VectorQuantizer(12, 4, **options)
    torch.manual_seed(rank)
    outputs = [layer(x[rank * 30 : (rank + 1) * 30]) for x in batches(5, 60, 4)]
    return layer.state_dict(), outputs[-1].perplexity, outputs[-1].usage


@pytest.mark.parametrize(
    ("options", "same_as_one"), [({"decay": 0.5}, True), ({"decay": 0.5, "kmeans_iters": 2, "revive_below": 2.0}, False)], ids=str
)
def test_two_processes_keep_one_codebook(options, same_as_one, ranks):
    """Both hold the same codebook; without random draws, that of one process on the joined batch."""
    states = ranks.run(_train_on_its_half, options)
    for ours, theirs in zip(states[0][0].values(), states[1][0].values(), strict=True):
        assert torch.equal(ours, theirs)
    if same_as_one:
        torch.manual_seed(0)
        layer = VectorQuantizer(12, 4, **options)
        outputs = [layer(x) for x in batches(5, 60, 4)]
        for ours, theirs in zip(layer.state_dict().values(), states[0][0].values(), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(outputs[-1].perplexity, states[0][1])
        torch.testing.assert_close(outputs[-1].usage, states[0][2])


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"revive_below": 0.5, "heads": 2}], ids=str)
def test_compiles_in_one_graph(options):
    x = torch.randn(20, 4)
    torch.manual_seed(0)
    layer, other = VectorQuantizer(6, 4, **options), VectorQuantizer(6, 4, **options)
    other.load_state_dict(layer.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(x).indices, compiled(x).indices)
    layer.eval(), other.eval()
    if "revive_below" not in options:
        torch.testing.assert_close(layer(x), compiled(x))


def test_training_lowers_the_error():
    torch.manual_seed(0)
    for update in ("ema", "gradient"):
        layer = VectorQuantizer(16, 2, update=update, decay=0.8, kmeans_iters=1)
        losses = [output.loss.item() for output, _ in train(layer, batches(60, 256, 2), lr=2.0)]
        scale = 1.25 if update == "gradient" else 0.25
        assert losses[-1] / scale < 0.12
        assert math.isfinite(sum(losses))


WRONG = [
    (lambda: VectorQuantizer(0, 4), ValueError, "num_codes: got 0"),
    (lambda: VectorQuantizer(4, 5, heads=2), ValueError, "heads: got 2"),
    (lambda: VectorQuantizer(4, 5, update="other"), ValueError, "update: got 'other'"),
    (lambda: VectorQuantizer(4, 5)(torch.randn(3, 4)), ValueError, "x: got 4 channels"),
    (lambda: VectorQuantizer(4, 5)(torch.randn(3, 5), torch.ones(3)), ValueError, "mask: got torch.float32"),
    (lambda: ResidualVectorQuantizer(2, 4, 5, heads=2), TypeError, "heads: not an option"),
    (lambda: ResidualVectorQuantizer(2, 4, 5, min_quantizers=3), ValueError, "min_quantizers: got 3"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
