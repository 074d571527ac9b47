"""Models of pythae after patch_pythae beside themselves before it: outputs, gradients and buffers over training steps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvae.compat import patch_pythae

pythae = pytest.importorskip("pythae.models", reason="pythae is not installed")

SHAPE, DIM, BATCH = (1, 6, 6), 4, 8
VECTOR_QUANTIZED = [{}, {"use_ema": True, "decay": 0.9}, {"commitment_loss_factor": 0.5, "quantization_loss_factor": 2.0}]
BOTH, SQUARED_ERROR = ["binary_cross_entropy", "mse_loss"], ["mse_loss"]
WITH_KL = ["binary_cross_entropy", "kl_normal", "mse_loss"]
# The operators that the loss of each model runs on; those of HVAE and RHVAE take the densities from another method.
OPERATORS = {
    "VAE": WITH_KL,
    "BetaVAE": WITH_KL,
    "DisentangledBetaVAE": WITH_KL,
    "FactorVAE": WITH_KL,
    "INFOVAE_MMD": WITH_KL,
    "VAEGAN": ["kl_normal", "mse_loss"],
    "MSSSIM_VAE": ["kl_normal"],
    **dict.fromkeys(("BetaTCVAE", "VAMP", "IWAE", "CIWAE", "MIWAE", "PIWAE", "VAE_LinNF", "VAE_IAF"), BOTH),
    **dict.fromkeys(("PoincareVAE", "SVAE", "Adversarial_AE"), BOTH),
    **dict.fromkeys(("AE", "WAE_MMD", "RAE_L2", "RAE_GP", "VQVAE"), SQUARED_ERROR),
    "HVAE": [],
    "RHVAE": [],
}


def make(name, **options):
    torch.manual_seed(0)
    config = getattr(pythae, f"{name}{'_' if hasattr(pythae, f'{name}_Config') else ''}Config")
    return getattr(pythae, name)(config(input_dim=SHAPE, latent_dim=DIM, **options))


def batch(dtype=torch.float32):
    return {"data": torch.rand(BATCH, *SHAPE, dtype=dtype)}


def patched(model):
    """A patched copy, and what was reported."""
    lines = []
    return patch_pythae(copy.deepcopy(model), report=lines.append), lines


def train(model, steps):
    """The outputs of training steps."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=1e-3), []
    torch.manual_seed(1)
    for _ in range(steps):
        output = model(batch())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        outputs.append({name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in output.items()})
    return outputs


def assert_same_outputs(ours, theirs):
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        if not isinstance(expected, torch.Tensor):
            assert ours[name] == expected
            continue
        assert (ours[name].dtype, ours[name].stride()) == (expected.dtype, expected.stride()), name
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_training(ours, theirs, steps=20):
    for one, other in zip(train(ours, steps), train(theirs, steps), strict=True):
        assert_same_outputs(one, other)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-4)


def test_every_model_is_listed():
    models = {name for name in pythae.__all__ if isinstance(getattr(pythae, name), type) and issubclass(getattr(pythae, name), nn.Module)}
    assert models - {"AutoModel", "BaseAE"} == OPERATORS.keys()


CASES = [
    (name, loss)
    for name, operators in OPERATORS.items()
    for loss in (("mse", "bce") if "binary_cross_entropy" in operators else (None,))
    if operators
]
# Of the others, whose default networks are large, few steps say as much.
FULLY_REPLACED = ("VAE", "BetaVAE", "DisentangledBetaVAE")


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_trains_as_before(name, loss):
    model = make(name, **({} if loss is None else {"reconstruction_loss": loss}))
    ours, lines = patched(model)
    assert lines[0].startswith(f"loss_function runs on {', '.join(OPERATORS[name])}")
    assert_same_training(ours, model, steps=20 if name in FULLY_REPLACED else 4)


@pytest.mark.parametrize("name", [name for name, operators in OPERATORS.items() if not operators])
def test_a_loss_without_such_terms_stays(name):
    model = make(name)
    ours, lines = patched(model)
    assert lines[0] == "left loss_function: it has no sum of squared errors, no cross-entropy and no KL in closed form"
    assert type(ours) is type(model)


def test_the_report():
    assert patched(make("VAE"))[1] == [
        "loss_function runs on binary_cross_entropy, kl_normal, mse_loss",
        "left _sample_gauss: it takes standard deviations, and reparameterize log variances",
    ]
    assert patched(make("DisentangledBetaVAE"))[1][0].endswith("mse_loss; no operator for torch.abs")
    assert patched(make("VQVAE"))[1] == ["loss_function runs on mse_loss", "quantizer runs on vector_quantize"]
    inside = nn.ModuleDict({"inner": make("VQVAE", use_ema=True)})
    assert patched(inside)[1] == [
        "inner.loss_function runs on mse_loss",
        "inner.quantizer runs on vector_quantize, codebook_ema_update_",
    ]


@pytest.mark.parametrize("options", VECTOR_QUANTIZED, ids=str)
def test_quantizers_train_as_before(options):
    model = make("VQVAE", num_embeddings=6, **options)
    assert_same_training(patched(model)[0], model)
    ours = patched(model.eval())[0]
    x = batch()
    assert_same_outputs(ours(x), model(x))
    for name, expected in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected)


@pytest.mark.parametrize("name", ["VAE", "BetaVAE", "DisentangledBetaVAE", "BetaTCVAE", "VAMP", "IWAE", "PIWAE"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_gradients_in_float64(name, loss):
    model = make(name, reconstruction_loss=loss).double()
    if name == "VAMP":
        # A tensor that is no buffer.
        model.idle_input = model.idle_input.double()
    data, results = batch(torch.float64), []
    for each in (patched(model)[0], model):
        x = data["data"].clone().requires_grad_()
        torch.manual_seed(1)
        output = each({"data": x})
        # The three are used by themselves too, each with a gradient of its own.
        total = 2 * output.loss + 3 * output.recon_loss.sum() + 5 * output.reg_loss.sum()
        results.append([output.loss, *torch.autograd.grad(total, [x, *each.parameters()], allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_other_dtypes_are_computed_as_before():
    model = make("VAE", reconstruction_loss="mse")
    ours = patched(model)[0]

    def outputs(each):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = each(batch())
        double = each.loss_function(torch.rand(BATCH, *SHAPE), batch(torch.float64)["data"], *torch.randn(3, BATCH, DIM))
        bytes_ = each.loss_function(
            torch.rand(BATCH, *SHAPE), torch.randint(256, (BATCH, *SHAPE), dtype=torch.uint8), *torch.randn(3, BATCH, DIM)
        )
        return [*autocast.values(), *double, *bytes_]

    for one, other in zip(outputs(ours), outputs(model), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [1.5, -0.5, float("nan")])
@pytest.mark.parametrize("which", [0, 1])
def test_torch_raises_for_the_same_values(value, which):
    """On the CPU, where it looks at them."""
    model = make("VAE", reconstruction_loss="bce")
    tensors = [torch.rand(BATCH, *SHAPE) for _ in range(2)]
    tensors[which][3, 0, 2, 1] = value
    messages = []
    for each in (patched(model)[0], model):
        with pytest.raises(RuntimeError, match="should be between 0 and 1") as error:
            each.loss_function(*tensors, *torch.randn(3, BATCH, DIM))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# Quantizers by themselves


def quantizer(kind, **options):
    from pythae.models.vq_vae import vq_vae_utils

    torch.manual_seed(0)
    config = pythae.VQVAEConfig(input_dim=SHAPE, latent_dim=DIM, num_embeddings=7, **options)
    config.embedding_dim = DIM
    return getattr(vq_vae_utils, kind)(config)


@pytest.mark.parametrize("kind", ["Quantizer", "QuantizerEMA"])
@pytest.mark.parametrize("layout", ["images", "channels_last", "contiguous"])
def test_quantizers_give_the_same(kind, layout):
    original = quantizer(kind)
    ours, lines = patched(original)
    assert lines == [f"{kind} runs on vector_quantize{', codebook_ema_update_' if kind == 'QuantizerEMA' else ''}"]
    images = torch.randn(3, DIM, 5, 6)
    images = images.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else images
    z = images.permute(0, 2, 3, 1)
    z = z.contiguous() if layout == "contiguous" else z
    results = []
    for each in (ours, original):
        leaf = z.clone(memory_format=torch.preserve_format).requires_grad_()
        output = each(leaf)
        total = output.loss + output.quantized_vector.pow(3).sum()
        results.append((output, torch.autograd.grad(total, [leaf, *each.parameters()])))
    assert_same_outputs(results[0][0], results[1][0])
    assert torch.equal(results[0][0].quantized_indices, results[1][0].quantized_indices)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other)


def _train_across_processes(rank):
    original = quantizer("QuantizerEMA")
    ours = patch_pythae(copy.deepcopy(original))
    torch.manual_seed(rank)
    for _ in range(5):
        z = torch.randn(3, 2, 2, DIM)
        for each in (ours, original):
            each(z, uses_ddp=True)
    return [each.state_dict() for each in (ours, original)]


def test_quantizers_learn_across_processes(ranks):
    (ours, theirs), (ours_elsewhere, _) = ranks.run(_train_across_processes)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours[name], ours_elsewhere[name])


# What stays


def test_a_patched_model_stays_what_it_is(tmp_path):
    model, calls, lines = make("VQVAE", use_ema=True), [], []
    modules, parameters, classes = list(model.modules()), list(model.parameters()), [type(each) for each in model.modules()]
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.quantizer.register_forward_hook(lambda *_: calls.append("quantizer"))
    assert patch_pythae(model, report=lines.append) is model
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for module, before in zip(model.modules(), classes, strict=True):
        assert isinstance(module, before)
        assert (type(module).__name__, type(module).__module__) == (before.__name__, before.__module__)
    model.eval()(batch())
    assert calls == ["quantizer", "model"]
    now = [type(each) for each in model.modules()]
    patch_pythae(model, report=lines.append)
    assert [type(each) for each in model.modules()] == now
    assert len(lines) == 2
    model.save(str(tmp_path))
    loaded = type(model).load_from_folder(str(tmp_path)).eval()
    x = batch()
    assert torch.equal(loaded(x).loss, model(x).loss)


@pytest.mark.parametrize("name", ["VAE", "VQVAE"])
def test_a_patched_model_is_copied_and_pickled(name):
    model = patch_pythae(make(name)).eval()
    x = batch()
    torch.manual_seed(1)
    expected = model(x).loss
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(each) for each in copied.modules()] == [type(each) for each in model.modules()]
        torch.manual_seed(1)
        assert torch.equal(copied(x).loss, expected)


class OwnLoss(pythae.VAE):
    def loss_function(self, recon_x, x, mu, log_var, z):
        return (recon_x - x).square().mean(), mu.mean(), log_var.mean()


class OwnQuantizer(type(quantizer("Quantizer"))):
    def forward(self, z, uses_ddp=False):
        return super().forward(z, uses_ddp)


def test_code_of_ones_own_is_left_alone():
    own = OwnLoss(pythae.VAEConfig(input_dim=SHAPE, latent_dim=DIM))
    replaced = make("VAE")
    replaced.loss_function = lambda *arguments: F.mse_loss(*arguments[:2])
    for model in (own, replaced):
        before = type(model)
        lines = patched(model)[1]
        assert lines[0] == "left loss_function: it is not pythae's"
        assert type(patch_pythae(model)) is before
    model = make("VQVAE")
    model.quantizer.__class__ = OwnQuantizer
    assert patched(model)[1][1] == "left quantizer: its forward is that of neither Quantizer nor QuantizerEMA"


def test_a_subclass_that_inherits_the_loss_is_patched():
    model = type("Mine", (pythae.VAE,), {})(pythae.VAEConfig(input_dim=SHAPE, latent_dim=DIM))
    lines = []
    patch_pythae(model, report=lines.append)
    assert lines[0] == "loss_function runs on binary_cross_entropy, kl_normal, mse_loss"
    assert type(model).__name__ == "Mine"


def test_a_model_of_another_library():
    with pytest.raises(ValueError, match="model: got a Linear, takes a model of pythae or a module that holds one"):
        patch_pythae(nn.Linear(2, 2))
