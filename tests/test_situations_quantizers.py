"""What users do with quantizers: checkpoint activations, evaluate on one rank, copy buffers, train in 16 bits, meet a NaN, read."""

import copy
import io
from functools import partial

import pytest
import torch
from _helpers import each_place
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastvae import functional as FV
from fastvae.compat import ResidualVQ, VectorQuantize
from fastvae.models import AE, VAE, VQVAE, VQVAE2, DenoisingAE, SparseAE
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer

DIM = 8


def batches(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def state_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def quantizer(residual=0, **options):
    options = {"decay": 0.7, **options}
    return ResidualVectorQuantizer(residual, 8, DIM, **options) if residual else VectorQuantizer(8, DIM, **options)


class Bottleneck(nn.Module):
    """A linear encoder, a quantizer, dropout and a decoder, whose gradients show what code the decoder saw."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Linear(6, DIM)
        self.quantizer = quantizer(**options)
        self.dropout = nn.Dropout(0.3)
        self.decoder = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, 6))

    def forward(self, x):
        output = self.quantizer(self.encoder(x))
        return self.decoder(self.dropout(output.quantized)), output.loss, output.perplexity.mean()


SAVED = [torch.ops.aten.addmm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.where.self, torch.ops.fastvae.codebook_quantize.cpp]
SELECTIVE = partial(create_selective_checkpoint_contexts, SAVED)
CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}
LEARNING = [
    {},
    {"update": "gradient"},
    {"revive_below": 0.9},
    {"revive_below": 0.9, "update": "gradient"},
    {"kmeans_iters": 2, "update": "gradient"},
    {"kmeans_iters": 2, "revive_below": 1.0, "cosine": True},
    {"heads": 2, "revive_below": 0.5},
    {"residual": 3, "quantizer_dropout": True, "revive_below": 0.5},
    {"residual": 3, "quantizer_dropout": True, "update": "gradient"},
]


def train(model, steps, call, calls_a_step=2):
    """Gradients of every step; with several calls a step all forward passes come before the backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(steps * calls_a_step, 40, 6)
    torch.manual_seed(1)
    gradients = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = 0.0
        for x in data[step * calls_a_step : (step + 1) * calls_a_step]:
            recon, vq_loss, _ = call(model, x.requires_grad_())
            loss = loss + recon.square().mean() + vq_loss.sum()
        loss.backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return gradients


@pytest.mark.parametrize("options", LEARNING, ids=str)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_activation_checkpointing_changes_no_gradient_and_no_codebook(kind, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 3, lambda model, x: model(x))
    actual = train(checkpointed, 3, lambda model, x: checkpoint(model, x, **CHECKPOINTS[kind]))
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(state_of(checkpointed), state_of(plain))


@pytest.mark.parametrize("options", [{"revive_below": 0.5}, {"residual": 3, "quantizer_dropout": True}], ids=str)
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoints_inside_checkpoints(kind, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    once = partial(checkpoint, checkpointed, **CHECKPOINTS[kind])
    expected = train(plain, 3, lambda model, x: model(x))
    actual = train(checkpointed, 3, lambda model, x: checkpoint(once, x, **CHECKPOINTS[kind]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(state_of(checkpointed), state_of(plain))


def test_a_backward_pass_that_is_run_twice_recomputes_the_same():
    torch.manual_seed(0)
    model = Bottleneck(revive_below=0.5)
    x = batches(1, 40, 6)[0].requires_grad_()
    recon, loss, _ = checkpoint(model, x, use_reentrant=False)
    total = recon.square().mean() + loss
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_checkpointing_without_the_random_state():
    torch.manual_seed(0)
    plain = Bottleneck()
    plain.dropout.p = 0.0
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x))
    actual = train(checkpointed, 2, lambda model, x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("total", [lambda losses: losses[0], sum], ids=["the first", "all"])
def test_too_many_passes_before_their_backward_are_an_error(total):
    layer = quantizer()
    losses = [checkpoint(layer, x.requires_grad_(), use_reentrant=False).loss for x in batches(20, 30, DIM)]
    with pytest.raises(RuntimeError, match="remembers 16 passes"):
        total(losses).backward()


def test_passes_that_no_backward_pass_followed_are_forgotten():
    torch.manual_seed(0)
    plain = Bottleneck()
    checkpointed = copy.deepcopy(plain)
    for model in (plain, checkpointed):
        with torch.no_grad():
            for x in batches(5, 40, 6, seed=1):
                model(x)
    expected = train(plain, 10, lambda model, x: model(x))
    actual = train(checkpointed, 10, lambda model, x: checkpoint(model, x, use_reentrant=True))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(checkpointed.quantizer._passes) == 0


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_inputs_that_are_equal_zero_or_not_finite_under_checkpointing(kind):
    torch.manual_seed(0)
    plain = quantizer(revive_below=0.5)
    checkpointed = copy.deepcopy(plain)
    x = batches(1, 30, DIM)[0]
    inputs = [x, torch.zeros_like(x), x, spoil(x, range(0, 30, 3)), torch.zeros(0, DIM)]
    gradients = []
    for layer, call in ((plain, lambda layer, x: layer(x)), (checkpointed, lambda layer, x: checkpoint(layer, x, **CHECKPOINTS[kind]))):
        torch.manual_seed(1)
        leaves = [each.clone().requires_grad_() for each in inputs]
        outputs = [call(layer, leaf) for leaf in leaves]
        # A reentrant checkpoint takes the gradient of an output that nobody used as 0, which times NaN is NaN; so all are used.
        sum(output[0].square().sum() + output[2] for output in outputs).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert_same_state(state_of(checkpointed), state_of(plain))


def test_training_mode_without_gradients_and_copies_of_the_layer():
    """Passes that no backward pass follows leave a bounded memory, which is no part of a copy or a file."""
    layer = quantizer()
    with torch.no_grad():
        for x in batches(40, 30, DIM):
            layer(x)
    assert len(layer._passes) == 16
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert len(other._passes) == 0
        assert_same_state(state_of(other), state_of(layer))


def test_torch_compile_around_a_checkpoint_leaves_it_to_eager_mode():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = Bottleneck()
    plain.dropout.p = 0.0
    compiled = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x))
    step = torch.compile(lambda model, x: checkpoint(model, x, use_reentrant=False), backend="aot_eager")
    actual = train(compiled, 2, step)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_around_compiled_code_is_an_error():
    torch.compiler.reset()
    layer, x = quantizer(), torch.randn(30, DIM, requires_grad=True)
    output = checkpoint(torch.compile(layer, backend="aot_eager"), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"compile the code around torch\.utils\.checkpoint"):
        output.loss.backward()


def test_inductor_saves_the_codebook_of_before_the_update():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = quantizer()
    compiled = copy.deepcopy(plain)

    def step(layer, x):
        output = layer(x)
        return output.quantized.square().mean() + output.loss

    for x in batches(2, 30, DIM):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        step(plain, leaves[0]).backward()
        torch.compile(step)(compiled, leaves[1]).backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


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
BAD = [float("nan"), float("inf"), -float("inf")]


def spoil(x, rows):
    x = x.clone()
    for i, row in enumerate(rows):
        x[row, i % x.shape[1]] = BAD[i % 3]
    return x


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


def started_layer():
    torch.manual_seed(0)
    layer = quantizer(kmeans_iters=2)
    for x in batches(2, 30, DIM):
        layer(x + 5.0)
    return layer


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


class Normalised(nn.Sequential):
    """A coder whose batch norm moves and whose dropout draws in training mode."""

    def __init__(self, channels_in, channels_out):
        super().__init__(nn.Conv2d(channels_in, channels_out, 1), nn.BatchNorm2d(channels_out), nn.Dropout(0.5))


def models():
    torch.manual_seed(0)
    vq = {"num_codes": 16, "dim": DIM, "channels": 16, "hidden": 8, "decay": 0.5, "kmeans_iters": 1, "revive_below": 1.0}
    coders = lambda: (Normalised(3, 4), Normalised(4, 3))  # noqa: E731
    residual = ResidualVectorQuantizer(3, 16, 4, channels_first=True, decay=0.5, quantizer_dropout=True)
    return {
        "VQVAE": VQVAE.conv(3, **vq),
        "VQVAE of coders": VQVAE(*coders(), residual),
        "VQVAE2": VQVAE2.conv(3, **vq),
        "VAE": VAE(Normalised(3, 8), Normalised(4, 3), (4, 16, 16)),
        "AE": AE(*coders()),
        "SparseAE": SparseAE(*coders(), penalty="l1"),
        "DenoisingAE": DenoisingAE(*coders()),
    }


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


# Two processes


class Counted:
    """Counts the collective calls that run inside it."""

    NAMES = ("all_reduce", "broadcast")

    def __enter__(self):
        self.calls = 0
        self.originals = {name: getattr(distributed, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(distributed, name, partial(self.call, original))
        return self

    def call(self, original, *args, **kwargs):
        self.calls += 1
        return original(*args, **kwargs)

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(distributed, name, original)


QUANTIZERS = {
    "ema": lambda: quantizer(),
    "gradient": lambda: quantizer(update="gradient"),
    "revival": lambda: quantizer(revive_below=0.5, heads=2),
    "revival by gradient": lambda: quantizer(revive_below=0.5, update="gradient"),
    "kmeans": lambda: quantizer(kmeans_iters=2),
    "residual": lambda: quantizer(residual=3, quantizer_dropout=True, revive_below=0.5),
    "VectorQuantize": lambda: VectorQuantize(DIM, 8, kmeans_init=True, kmeans_iters=2, threshold_ema_dead_code=1),
    "ResidualVQ": lambda: ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=8, quantize_dropout=True),
}


def _one_rank_reads(rank, kind):
    """Rank 0 evaluates, checkpoints and reads; then both train, which fails where their collective calls are out of step."""
    torch.manual_seed(0)
    layer = QUANTIZERS[kind]()
    x = batches(2, 24, DIM)[rank]
    layer(x)
    with Counted() as counted:
        if rank == 0:
            layer.eval()(x)
            checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)[0].sum().backward()
            with torch.inference_mode():
                layer(x)
            layer.train()
    assert counted.calls == 0
    torch.manual_seed(rank)
    for y in batches(3, 24, DIM, seed=rank):
        layer(y)
    return state_of(layer)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_rank_evaluates_alone(ranks, kind):
    assert_same_state(*ranks.run(_one_rank_reads, kind))


def _read_a_model_in_training_mode(rank):
    model = models()["VQVAE"]
    x = torch.rand(2, 3, 16, 16)
    model(x)
    with Counted() as counted:
        if rank == 1:
            model.encode(x), model.reconstruct(x), model.decode(model.encode(x))
    model(x)
    return counted.calls, state_of(model.quantizer)


def test_one_rank_reads_a_model_in_training_mode(ranks):
    (first_calls, first), (second_calls, second) = ranks.run(_read_a_model_in_training_mode)
    assert first_calls == second_calls == 0
    assert_same_state(first, second)


def _calls_a_step(rank, kind):
    torch.manual_seed(rank)
    layer, calls = QUANTIZERS[kind](), []
    for x in batches(2, 24, DIM, seed=rank):
        with Counted() as counted:
            layer(x)
        calls.append(counted.calls)
    return calls


# As docs/vector_quantization.md has them.
CALLS = {"ema": [2, 2], "gradient": [1, 1], "revival": [3, 3], "revival by gradient": [3, 3], "kmeans": [2 + 2 + 2 * 2, 2]}


@pytest.mark.parametrize("kind", CALLS)
def test_the_collective_calls_of_a_training_step(ranks, kind):
    assert ranks.run(_calls_a_step, kind) == [CALLS[kind]] * 2


AWKWARD = {
    "empty": lambda x: x[:0],
    "NaN": lambda x: torch.full_like(x, float("nan")),
    "one row": lambda x: x[:1],
    "other size": lambda x: torch.cat([x, x]),
}


def _train_on_unequal_data(rank, kind, awkward, which):
    torch.manual_seed(0)
    layer = QUANTIZERS[kind]()
    torch.manual_seed(rank)
    calls = []
    for x in batches(4, 24, DIM, seed=rank):
        with Counted() as counted:
            layer(AWKWARD[awkward](x) if rank == which else x)
        calls.append(counted.calls)
    return calls, state_of(layer)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_ranks_with_unequal_data_make_the_same_collective_calls(ranks, kind):
    for awkward in AWKWARD:
        for which in (0, 1):
            (first_calls, first), (second_calls, second) = ranks.run(_train_on_unequal_data, kind, awkward, which)
            assert first_calls == second_calls
            assert all(torch.isfinite(tensor).all() for tensor in first.values())
            if "gradient" not in kind:
                assert_same_state(first, second)


def _checkpointed_training(rank, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x + rank))
    results = []
    for kind in ("reentrant", "not reentrant"):
        model = copy.deepcopy(checkpointed)
        actual = train(model, 2, lambda model, x, kind=kind: checkpoint(model, x + rank, **CHECKPOINTS[kind]))
        results.append(len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)))
        assert_same_state(state_of(model), state_of(plain))
    return results


@pytest.mark.parametrize("options", LEARNING[2:6] + LEARNING[7:8], ids=str)
def test_a_recomputation_makes_no_collective_call(ranks, options):
    assert ranks.run(_checkpointed_training, options) == [[True, True]] * 2


def _global_evaluation(rank):
    torch.manual_seed(0)
    layer = quantizer(update="gradient", global_evaluation=True).eval()
    x = batches(2, 24, DIM)
    output = layer(x[rank])
    layer.global_evaluation = False
    joined = layer(torch.cat(x))
    return [(o.perplexity, o.usage) for o in (output, joined)]


def test_global_statistics_in_evaluation_on_request(ranks):
    for output, joined in ranks.run(_global_evaluation):
        torch.testing.assert_close(output, joined)


def _resume(rank, way, state):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(DIM, DIM), quantizer(kmeans_iters=2))
    if rank == 0:
        model[1].load_state_dict(state)
    trained = DistributedDataParallel(model) if way == "DDP" else model
    for x in batches(3, 24, DIM, seed=rank):
        output = trained(x)
        (output.loss + output.quantized.square().mean()).backward()
    return state_of(model[1])


@pytest.mark.parametrize("way", ["DDP", "alone"])
def test_rank_0_loads_a_checkpoint_and_nobody_starts_kmeans_again(ranks, way):
    loaded = state_of(started_layer())
    first, second = ranks.run(_resume, way, loaded)
    assert_same_state(first, second)
    # The averages have moved three steps from those of the file, where k-means would have replaced them.
    expected = 0.7**3 * loaded["ema_sum"].sum()
    assert abs(first["ema_sum"].sum() - expected) < 0.2 * abs(expected)


def _depths(rank, kind):
    torch.manual_seed(10 + rank)
    layer = QUANTIZERS[kind]()
    depths = []
    for x in batches(12, 10, DIM, seed=rank):
        indices = layer(x)[1]
        depths.append(int((indices >= 0).all(0).sum()))
    return depths


@pytest.mark.parametrize("kind", ["residual", "ResidualVQ"])
def test_depth_dropout_takes_the_same_steps_on_all_ranks(ranks, kind):
    first, second = ranks.run(_depths, kind)
    assert first == second
    assert len(set(first)) > 1


def _ddp_with_depth_dropout(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), quantizer(residual=3, quantizer_dropout=True, update="gradient"))
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(rank)
    for x in batches(8, 10, DIM, seed=rank):
        optimizer.zero_grad()
        output = trained(x)
        (output.loss + output.quantized.square().mean()).backward()
        optimizer.step()
    return state_of(model), [p.grad is not None for p in model.parameters()]


def test_codebooks_that_a_step_leaves_out_have_a_gradient_of_0(ranks):
    (first, gradients), (second, _) = ranks.run(_ddp_with_depth_dropout)
    assert all(gradients)
    # Each rank's moving counts follow both ranks; the parameters are those of DistributedDataParallel.
    assert_same_state(first, second)


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
