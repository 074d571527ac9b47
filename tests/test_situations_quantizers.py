"""What users do with quantizers: meet a NaN, train in 16 bits, copy buffers, read, export, give generators."""

import copy
import io

import pytest
import torch
from _helpers import each_place
from _quantizers import DIM, assert_same_state, batches, models, quantizer, spoil, started_layer, state_of
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import functional as FV
from fastvae.models import VAE

# Non-finite vectors

CODEBOOK_OPERATORS = ("codebook_quantize", "codebook_nearest", "codebook_sums", "codebook_ema_")
STATISTICS = [
    {},
    {"cosine": True},
    {"heads": 2},
    {"heads": 2, "share_codebook": True},
    {"revive_below": 0.9},
    {"update": "gradient", "revive_below": 0.9},
    {"kmeans_iters": 2},
    {"residual": 2},
    {"commitment_cost": 0.0},
]


@each_place(*CODEBOOK_OPERATORS)
@pytest.mark.parametrize("options", STATISTICS, ids=str)
def test_one_batch_with_nan_destroys_no_code(place, options):
    torch.manual_seed(0)
    layer = quantizer(**options)
    for i, x in enumerate(batches(6, 60, DIM)):
        layer(spoil(x, range(0, 60, 4)) if i % 2 == 0 else x)
        layer(torch.full_like(x, float("nan")))
    assert all(torch.isfinite(tensor).all() for tensor in layer.state_dict().values())
    output = layer(x)
    assert torch.isfinite(output.quantized).all()
    assert torch.isfinite(output.loss)


@each_place(*CODEBOOK_OPERATORS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"cosine": True}, {"update": "gradient"}, {"kmeans_iters": 2}], ids=str)
def test_vectors_that_are_not_finite_count_as_masked(place, training, options):
    torch.manual_seed(0)
    layer = quantizer(**options).train(training)
    other = copy.deepcopy(layer)
    x, rows = batches(1, 60, DIM)[0], list(range(0, 60, 4))
    mask = torch.ones(60, dtype=torch.bool)
    mask[rows] = False
    torch.manual_seed(1)
    spoiled = layer(spoil(x, rows))
    torch.manual_seed(1)
    masked = other(x, mask)
    assert_same_state(state_of(layer), state_of(other))
    torch.testing.assert_close(spoiled.perplexity, masked.perplexity)
    torch.testing.assert_close(spoiled.usage, masked.usage)
    assert torch.equal(spoiled.indices[mask], masked.indices[mask])


@pytest.mark.parametrize("first", [torch.full((30, DIM), float("nan")), torch.zeros(0, DIM)], ids=["nan", "empty"])
def test_kmeans_waits_for_a_batch_that_has_vectors(first):
    torch.manual_seed(0)
    layer = quantizer(kmeans_iters=3, revive_below=0.0)
    layer(first)
    assert not layer.started
    layer(batches(1, 30, DIM)[0] + 5.0)
    assert layer.started
    assert (layer.codebook.mean(-1) > 3).all()


# 16-bit modules

KINDS = {"plain": {}, "cosine": {"cosine": True}, "heads": {"heads": 2}, "residual": {"residual": 2}}


@pytest.mark.parametrize("options", [{}, {"revive_below": 0.5, "kmeans_iters": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_modules_train(dtype, update, kind, options):
    torch.manual_seed(0)
    layer = quantizer(update=update, **KINDS[kind], **options).to(dtype)
    for x in batches(4, 50, DIM):
        x = x.to(dtype).requires_grad_()
        output = layer(x)
        (output.loss + output.quantized.float().square().mean()).backward()
        assert output.quantized.dtype == x.grad.dtype == dtype
        assert torch.isfinite(x.grad).all()
    for name, tensor in layer.state_dict().items():
        statistic = name.rpartition(".")[2] in ("ema_count", "ema_sum")
        assert tensor.dtype == (torch.float32 if statistic else torch.bool if name.endswith("started") else dtype)
    layer.eval()
    codes = layer.decode(layer(x).indices)
    assert codes.dtype == dtype
    torch.testing.assert_close(codes, layer(x).quantized, rtol=2e-2, atol=2e-2)


def test_16_bit_averages_are_those_of_float32():
    torch.manual_seed(0)
    layer = quantizer(decay=0.999)
    half = copy.deepcopy(layer).bfloat16()
    for name in ("ema_sum", "ema_count"):
        assert torch.equal(getattr(half, name), getattr(layer, name))
    with torch.no_grad():
        for x in batches(20, 50, DIM):
            half(x.bfloat16())
            layer(x.bfloat16().float())
    # In bfloat16 a step of 1/1000 would be rounded away.
    assert not (half.ema_count == 1).any()
    torch.testing.assert_close(half.ema_count.sum(), layer.ema_count.sum())
    assert half.float().codebook.dtype == torch.float32


def test_a_16_bit_default_dtype_and_16_bit_checkpoints_keep_float32_averages():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = quantizer()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (layer.codebook.dtype, layer.ema_sum.dtype, layer.ema_count.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assigned = quantizer()
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in assigned.state_dict().items()}
    assigned.load_state_dict(state, assign=True)
    for each in (layer, assigned):
        assert torch.isfinite(each(torch.randn(20, DIM, dtype=torch.bfloat16)).loss)


# State beside the buffers


def copy_buffers(source, target):
    for ours, theirs in zip(target.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)


def load_a_file(source, target):
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))


COPIES = {
    "buffers one by one": copy_buffers,
    "load_state_dict": load_a_file,
    "assign": lambda source, target: target.load_state_dict(state_of(source), assign=True),
    "setattr": lambda source, target: [setattr(target, name, tensor.clone()) for name, tensor in source.named_buffers()],
    "data": lambda source, target: [setattr(target.get_buffer(name), "data", t.clone()) for name, t in source.named_buffers()],
}


@pytest.mark.parametrize("way", COPIES)
def test_kmeans_does_not_start_again_over_a_copied_codebook(way):
    layer, x = started_layer(), batches(1, 30, DIM, seed=9)[0] - 5.0
    other = quantizer(kmeans_iters=2)
    COPIES[way](layer, other)
    expected = layer(x)
    assert torch.equal(other(x).indices, expected.indices)
    assert_same_state(state_of(other), state_of(layer))


def test_an_averaged_model_goes_on_from_the_codebook_it_copied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), quantizer(kmeans_iters=2))
    averaged = AveragedModel(model)
    model(batches(1, 30, DIM)[0])
    averaged.update_parameters(model)
    assert averaged.module[1].started
    x, other = batches(1, 30, DIM, seed=9)[0], copy.deepcopy(model)
    assert torch.equal(averaged.train()(x).indices, other(x).indices)
    assert_same_state(state_of(averaged.module), state_of(other))


def test_functional_call_and_deepcopy_go_by_the_buffer_too():
    layer, x = started_layer(), batches(1, 30, DIM, seed=9)[0]
    other = quantizer(kmeans_iters=2)
    state = state_of(layer)
    output = torch.func.functional_call(other, state, (x,))
    assert not other.started
    assert_same_state(state, state_of(copy.deepcopy(layer)) | state)
    assert torch.equal(output.indices, copy.deepcopy(layer)(x).indices)


@pytest.mark.parametrize("reset", [lambda layer: layer.started.fill_(False), lambda layer: setattr(layer, "started", torch.tensor(False))])
def test_a_buffer_set_back_starts_kmeans_again(reset):
    layer, x = started_layer(), batches(1, 30, DIM)[0] - 5.0
    reset(layer)
    layer(x)
    assert layer.started
    assert (layer.codebook.mean(-1) < -3).all()


class BooleansRead(TorchDispatchMode):
    """Notes the operators that bring a boolean to the host, which waits for an accelerator then."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default) and args[0].dtype == torch.bool:
            self.read.append(func)
        return func(*args, **(kwargs or {}))


def test_a_started_layer_reads_nothing_from_its_device():
    layer, x = started_layer(), batches(1, 30, DIM)[0]
    layer(x)
    with BooleansRead() as recorder:
        layer(x)
    assert not recorder.read
    layer.started.fill_(True)
    with BooleansRead() as recorder:
        layer(x)
    assert recorder.read == [torch.ops.aten._local_scalar_dense.default]


def test_a_compiled_layer_starts_once():
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = quantizer(kmeans_iters=2)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="aot_eager")
    for i, x in enumerate(batches(3, 30, DIM)):
        torch.manual_seed(i)
        expected = layer(x + 3 * i)
        torch.manual_seed(i)
        assert torch.equal(compiled(x + 3 * i).indices, expected.indices)
    torch.testing.assert_close(other.codebook, layer.codebook)


# Reading


READING = {
    **dict.fromkeys(("VQVAE", "VQVAE of coders", "VQVAE2"), ("encode", "reconstruct", "decode")),
    "VAE": ("reconstruct", "anomaly_score", "interpolate", "sample"),
    "AE": ("reconstruct", "anomaly_score", "fit_threshold", "is_anomaly"),
    "SparseAE": ("reconstruct", "mean_activation"),
    "DenoisingAE": ("reconstruct", "denoise"),
}


def read(model, method, x):
    torch.manual_seed(3)
    if method == "sample":
        return model.sample(3)
    if method == "interpolate":
        return model.interpolate(x, x.flip(0), 3)
    return getattr(model, method)(model.encode(x) if method == "decode" else x)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in READING for method in READING[name]])
def test_reading_a_model_in_training_mode_writes_nothing(name, method):
    model, x = models()[name], torch.rand(4, 3, 16, 16)
    model(x)
    if method == "is_anomaly":
        model.fit_threshold(x)
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    before = state_of(model)
    result = read(model, method, x)
    after = state_of(model)
    if method == "fit_threshold":
        assert "threshold" not in before
        assert after.pop("threshold") == model.threshold
    assert_same_state(after, before)
    assert [module.training for module in model.modules()] == modes
    expected = read(model.eval(), method, x)
    for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_an_error_while_reading_leaves_the_modes():
    model = models()["VQVAE"]
    with pytest.raises(RuntimeError):
        model.reconstruct(torch.rand(2, 5, 16, 16))
    assert all(module.training for module in model.modules())


# Export


class Method(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["encode", "reconstruct"])
@pytest.mark.parametrize("kind", ["VQVAE", "VQVAE2"])
def test_a_vqvae_is_exported_without_tracing_its_python(kind, name, training):
    model, x = models()[kind], torch.rand(2, 3, 16, 16)
    model(x)
    method = Method(model.train(training), name)
    program = torch.export.export(method, (x,), strict=False, dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    other = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(other), method(other))


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"cosine": True}, {"heads": 2}, {"residual": 2}, {"kmeans_iters": 2}])
def test_a_vq_encoder_is_exported_without_tracing_its_python(options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, DIM), quantizer(**options)).eval()
    x = torch.randn(10, 6)
    program = torch.export.export(encoder, (x,), strict=False)
    for ours, theirs in zip(program.module()(x), encoder(x), strict=True):
        torch.testing.assert_close(ours, theirs)


# Generators


@pytest.mark.parametrize("function", [FV.reparameterize, FV.reparameterize_kl])
def test_a_generator_on_the_cpu_serves_any_device(function):
    """The seed is drawn on the CPU; the tensors of the meta device have no data, so nothing can be copied back from there."""
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    mu = torch.zeros(2, 3, device="meta")
    result = function(mu, mu, generator=generators[0])
    assert (result[0] if isinstance(result, tuple) else result).device == mu.device
    torch.randint(2**63 - 1, (), generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_the_prior_is_sampled_on_the_device_of_the_generator():
    model = VAE(nn.Linear(4, 4), nn.Linear(2, 4), 2)
    generator = torch.Generator()
    expected = model.sample(5, generator.manual_seed(1))
    assert torch.equal(model.sample(5, generator.manual_seed(1)), expected)
    assert model.to("meta").sample(5, generator).device.type == "meta"
