"""The autoencoders against their formulas, what they reach, and what is fitted and stored with them."""

import math

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source
from torch import nn

from fastvae import functional as FV
from fastvae.models import AE, AEOutput, ContractiveAE, DenoisingAE, SparseAE, StackedAE
from fastvae.nn.corruption import GaussianNoise, Masking, SaltAndPepper
from fastvae.nn.preprocessing import MinMaxScaler, StandardScaler


def tiny(kind: type[AE] = AE, *, output: str = "sigmoid", code: str = "sigmoid", hidden=(), **options) -> AE:
    torch.manual_seed(0)
    return kind.mlp((1, 4, 4), hidden, 5, output=output, code=code, **options)


def layers_of(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if not list(part.children())]


def images(count: int = 7) -> torch.Tensor:
    return Source("cpu").uniform(count, 1, 4, 4)


def train(model: AE, x: torch.Tensor, steps: int, learning_rate: float = 1e-2) -> AE:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    return model


def check_output(model: AE, x: torch.Tensor) -> AEOutput:
    output = model(x)
    assert output.recon.shape == x.shape
    assert output.z.shape == (len(x), 5)
    output.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    return output


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "bce"])
def test_loss_is_its_formula(loss):
    model, x = tiny(output="identity" if loss == "bce_with_logits" else "sigmoid", recon_loss=loss), images()
    output = check_output(model, x)
    torch_loss = {"mse": F.mse_loss, "bce_with_logits": F.binary_cross_entropy_with_logits, "bce": F.binary_cross_entropy}[loss]
    torch.testing.assert_close(output.loss, torch_loss(output.recon, x, reduction="sum") / len(x))
    assert output.penalty == 0
    recon = model.reconstruct(x)
    assert ((recon >= 0) & (recon <= 1)).all()
    torch.testing.assert_close(recon, output.recon.sigmoid() if loss == "bce_with_logits" else output.recon)
    torch.testing.assert_close(model.anomaly_score(x), (recon - x).square().sum((1, 2, 3)))


def test_8_bit_images():
    model, x = tiny(), Source("cpu").image(6, 1, 4, 4)
    scaled = x.float() / 255
    for ours, theirs in zip(model(x), model(scaled), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.anomaly_score(x), model.anomaly_score(scaled))


@pytest.mark.parametrize("jacobian", [{}, {"method": "autograd"}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("hidden", [(), (6,)], ids=["one layer", "two layers"])
def test_contractive_loss(hidden, jacobian):
    model, x = tiny(ContractiveAE, hidden=hidden, weight=0.3, **jacobian), images()
    output = check_output(model, x)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: model.encoder(s[None])[0]))(x)
    torch.testing.assert_close(output.penalty, jacobians.square().sum() / len(x))
    torch.testing.assert_close(output.loss, (output.recon - x).square().sum() / len(x) + 0.3 * output.penalty)
    torch.testing.assert_close(output.z, model.encode(x))


def test_a_contractive_convolutional_autoencoder_trains():
    torch.manual_seed(0)
    model, x = ContractiveAE.conv(3, weight=0.1, num_projections=2), Source("cpu").uniform(4, 1, 28, 28)
    first = model(x)
    first.penalty.backward()
    assert first.penalty > 0
    assert model.encoder[0][0].weight.grad.abs().sum() > 0
    train(model, x, 10, 1e-3)
    assert model(x).loss < first.loss


def test_a_contractive_penalty_contracts():
    x = images(60)
    norms = []
    for weight in (0.0, 3.0):
        model = train(tiny(ContractiveAE, weight=weight), x, 150)
        norms.append(FV.jacobian_frobenius(model.encoder, x).item())
    assert norms[1] < 0.5 * norms[0]


def test_sparse_losses():
    x, rho = images(), 0.1
    for penalty in ("kl", "l1"):
        model = tiny(SparseAE, penalty=penalty, weight=0.2, rho=rho)
        output = check_output(model, x)
        rho_hat = output.z.mean(0)
        kl = (rho * torch.log(rho / rho_hat) + (1 - rho) * torch.log((1 - rho) / (1 - rho_hat))).sum()
        expected = kl if penalty == "kl" else output.z.abs().sum(1).mean()
        torch.testing.assert_close(output.penalty, expected)
        torch.testing.assert_close(output.loss, output.recon_loss + 0.2 * expected)
        torch.testing.assert_close(model.mean_activation(x), rho_hat)


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_near_rho_the_divergence_is_accurate_and_never_negative(rho):
    model = tiny(SparseAE, penalty="kl", rho=rho)
    activations = (rho + torch.linspace(-0.3, 0.3, 401).pow(3) * min(rho, 1 - rho)).requires_grad_()
    divergences = torch.stack([model._divergence(a) for a in activations])
    wide, exact = activations.detach().double(), float(torch.tensor(rho))
    excess = wide - exact
    expected = exact * (excess / exact - torch.log1p(excess / exact)) + (1 - exact) * (
        -excess / (1 - exact) - torch.log1p(-excess / (1 - exact))
    )
    assert (divergences >= 0).all()
    torch.testing.assert_close(divergences.double(), expected, rtol=1e-6, atol=1e-15)
    (gradient,) = torch.autograd.grad(divergences.sum(), activations)
    torch.testing.assert_close(gradient.double(), excess / (wide * (1 - wide)), rtol=1e-6, atol=1e-12)


def test_sparse_activations_approach_rho():
    x = images(100)
    model = tiny(SparseAE, penalty="kl", weight=5.0, rho=0.1)
    assert (model.mean_activation(x) > 0.3).all()
    train(model, x, 400, 2e-2)
    torch.testing.assert_close(model.mean_activation(x), torch.full((5,), 0.1), rtol=0, atol=0.02)


def test_l1_makes_codes_small():
    x = images(60)
    sizes = [
        train(tiny(SparseAE, code="identity", penalty="l1", weight=weight), x, 150).mean_activation(x).sum().item() for weight in (0, 0.5)
    ]
    assert sizes[1] < 0.5 * sizes[0]


def test_a_unit_that_is_never_active_has_a_finite_gradient():
    model = SparseAE(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4))))
    nn.init.constant_(model.encoder[1].bias, -100.0)
    output = model(images())
    assert output.loss.isfinite()
    output.loss.backward()
    assert model.encoder[1].weight.grad.isfinite().all()


def test_a_linear_autoencoder_reaches_the_error_of_pca():
    datasets, decomposition = (pytest.importorskip(f"sklearn.{part}", reason="a comparison") for part in ("datasets", "decomposition"))
    digits = datasets.load_digits().data[:500] / 16
    pca = decomposition.PCA(8).fit(digits)
    least = ((pca.inverse_transform(pca.transform(digits)) - digits) ** 2).mean()
    torch.manual_seed(0)
    model, x = AE.linear(64, 8).double(), torch.from_numpy(digits)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=600, history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    error = (model.reconstruct(x) - x).square().mean().item()
    assert least * (1 - 1e-9) <= error < 1.01 * least


@pytest.mark.parametrize("corruption", [GaussianNoise(0.5), Masking(0.5), SaltAndPepper(0.5)], ids=lambda c: type(c).__name__)
def test_denoising(corruption):
    """Encodes the corrupted input, is judged by the clean one, and comes nearer to it than the corrupted one is."""
    x = images(1).repeat(300, 1, 1, 1)
    model = tiny(DenoisingAE, corruption=corruption)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    corrupted = corruption(x)
    torch.testing.assert_close(output.z, model.encode(corrupted))
    torch.testing.assert_close(output.loss, (model.decoder(model.encoder(corrupted)) - x).square().sum() / len(x))
    train(model, x, 60)
    noisy = corruption(x)
    assert (model.denoise(noisy) - x).square().mean() < 0.2 * (noisy - x).square().mean()


def test_corruptions():
    x, generator = torch.full((200, 100), 0.5), torch.Generator().manual_seed(0)
    noise = GaussianNoise(0.3)(x, generator) - x
    assert abs(noise.mean()) < 5 * 0.3 / 20_000**0.5
    torch.testing.assert_close(noise.std(), torch.tensor(0.3), rtol=0.03, atol=0)
    for corruption, values in ((Masking(0.3), {0.0: 0.3, 0.5: 0.7}), (SaltAndPepper(0.4, low=-1.0), {-1.0: 0.2, 0.5: 0.6, 1.0: 0.2})):
        corrupted = corruption(x, generator)
        found, counts = corrupted.unique(return_counts=True)
        assert found.tolist() == list(values)
        for count, share in zip(counts / x.numel(), values.values(), strict=True):
            assert abs(count - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
        generator.manual_seed(5)
        first = corruption(x, generator)
        generator.manual_seed(5)
        assert torch.equal(corruption(x, generator), first)
    assert torch.equal(Masking(0.0)(x), x)
    assert (SaltAndPepper(1.0)(x) != x).all()


def test_stacked():
    """Pretraining lowers each layer's loss and changes no other layer; fine-tuning trains them all."""
    torch.manual_seed(0)
    model, x = StackedAE.mlp((1, 4, 4), (12, 8), 5, activation="sigmoid", code="sigmoid"), images(64)
    before = [p.clone() for p in model.stage(2).parameters()]
    model._pretrain_stage(0, [x], 1, lambda parameters: torch.optim.SGD(parameters, lr=0.1), None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.stage(2).parameters(), strict=True))
    history = model.pretrain([x[:32], x[32:]], epochs=30)
    assert [len(losses) for losses in history] == [30, 30, 30]
    assert all(losses[-1] < losses[0] for losses in history)
    pretrained = model(x).loss
    train(model, x, 50)
    output = model(x)
    assert output.loss < pretrained
    assert output.z.shape == (64, 5)
    assert output.recon.shape == x.shape
    assert {id(p) for level in range(3) for p in model.stage(level).parameters()} == {id(p) for p in model.parameters()}


def test_a_stage_sees_the_codes_below_it():
    torch.manual_seed(0)
    model, x = StackedAE.mlp((1, 4, 4), (12, 8), 5, output="tanh"), images()
    assert [tuple(model.stage_input(x, level).shape) for level in range(3)] == [(7, 1, 4, 4), (7, 12), (7, 8)]
    value = x
    for level in range(3):
        torch.testing.assert_close(model.stage_input(x, level), value)
        value = model.stage(level).encode(value)
    torch.testing.assert_close(model.encode(x), value)
    for level in (2, 1, 0):
        value = model.stage(level).decode(value)
    torch.testing.assert_close(model.reconstruct(x), value)


def test_stacked_denoising_pretraining():
    torch.manual_seed(0)
    model, calls = StackedAE.mlp(16, (8,), 5), []

    def corruption(x):
        calls.append(tuple(x.shape))
        return x

    model.pretrain([images().flatten(1)], epochs=2, corruption=corruption)
    assert calls == [(7, 16)] * 2 + [(7, 8)] * 2


def test_interpolation_runs_from_one_reconstruction_to_the_other():
    model, start, end = tiny(output="identity").train(), images(3), images(3).flip(0)
    path = model.interpolate(start, end, 5)
    assert path.shape == (3, 5, *start.shape[1:])
    torch.testing.assert_close(path[:, 0], model.reconstruct(start))
    torch.testing.assert_close(path[:, -1], model.reconstruct(end))
    # The decoder is one linear layer.
    torch.testing.assert_close(path[:, 2], (path[:, 0] + path[:, -1]) / 2)
    assert model.training


def test_threshold(tmp_path):
    """Fitted on validation data, stored with the model."""
    model, x = tiny(), images(200)
    with pytest.raises(RuntimeError, match="threshold: has not been fitted"):
        model.is_anomaly(x)
    scores = model.anomaly_score(x)
    threshold = model.fit_threshold(x.split(30), quantile=0.9)
    torch.testing.assert_close(threshold, torch.quantile(scores, 0.9))
    assert model.is_anomaly(x).sum() == 20
    assert model.is_anomaly(x + 10).all()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = tiny()
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other.is_anomaly(x), model.is_anomaly(x))


def test_networks():
    widths = [layer.out_features for layer in layers_of(AE.mlp()) if isinstance(layer, nn.Linear)]
    assert widths == [512, 256, 32, 256, 512, 784]
    x = Source("cpu").uniform(3, 1, 28, 28)
    for model in (AE.mlp(), AE.conv(7), AE.linear((1, 28, 28), 4)):
        assert model(x).recon.shape == x.shape
    assert isinstance(layers_of(AE.mlp(output="tanh"))[-2], nn.Tanh)
    assert isinstance(layers_of(AE.conv(output="tanh"))[-1], nn.Tanh)
    assert isinstance(layers_of(AE.conv(output="identity"))[-1], nn.ConvTranspose2d)


@pytest.mark.parametrize("make", [StackedAE.mlp, StackedAE.conv], ids=["mlp", "conv"])
def test_each_stage_of_a_network_is_an_autoencoder(make):
    model, x = make(latent_dim=3), Source("cpu").uniform(2, 1, 28, 28)
    for level in range(len(model.encoder)):
        value = model.stage_input(x, level)
        assert model.stage(level)(value).recon.shape == value.shape


@pytest.mark.parametrize("model", [AE, DenoisingAE, SparseAE, ContractiveAE])
def test_state_and_autocast(model):
    torch.manual_seed(0)
    first, x = tiny(model), images()
    second = tiny(model, hidden=())
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.reconstruct(x), first.reconstruct(x))
    with torch.autocast("cpu", torch.bfloat16):
        output = first(x)
    assert output.loss.dtype == torch.float32
    output.loss.backward()


@pytest.mark.parametrize("model", [AE, SparseAE, ContractiveAE])
def test_compiled(model):
    torch.compiler.reset()
    model, x = tiny(model), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(recon_loss="mae"), "recon_loss: got 'mae', takes one of 'mse', 'bce_with_logits', 'bce'"),
        (lambda: tiny(SparseAE, penalty="l2"), "penalty: got 'l2', takes one of 'kl', 'l1'"),
        (lambda: tiny(SparseAE, rho=1.0), r"rho: got 1.0, takes a number in \(0, 1\)"),
        (lambda: tiny(ContractiveAE, weight=-1), "weight: got -1, takes a number >= 0"),
        (lambda: StackedAE(nn.Sequential(nn.Identity()), nn.Sequential()), "decoder: got 0 stages, takes one for each of the encoder's 1"),
        (lambda: AE.mlp(activation="step"), "activation: got 'step', takes one of"),
        (lambda: StackedAE.mlp(output="step"), "output: got 'step', takes one of"),
        (lambda: StackedAE.mlp(4, (), 3).pretrain([], 1), "batches: got none"),
        (lambda: tiny().fit_threshold(images(), quantile=1.5), r"quantile: got 1.5, takes a number in \(0, 1\]"),
        (lambda: tiny().fit_threshold(images(0)), "batches: got no samples"),
        (lambda: tiny().interpolate(images(2), images(3)), r"end: got a batch whose latents have shape \(3, 5\), takes that of start"),
        (lambda: tiny().interpolate(images(), images(), 0), "steps: got 0, takes an integer of at least 1"),
        (lambda: Masking(1.5), r"fraction: got 1.5, takes a number in \[0, 1\]"),
        (lambda: GaussianNoise(-1), "sigma: got -1, takes a number >= 0"),
        (lambda: MinMaxScaler(1, 0), "low, high: got 1, 0, takes low < high"),
        (lambda: StandardScaler().fit(torch.zeros(0, 3)), r"x: got shape \(0, 3\), takes \(samples, features, ...\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SCALERS = {"unit": MinMaxScaler, "tanh": lambda: MinMaxScaler(-1, 1), "z": StandardScaler}


@pytest.mark.parametrize("name", SCALERS)
def test_scalers(name):
    """The formula for each feature, its inverse, and a feature that does not vary."""
    x = Source("cpu").normal(50, 3, 4) * 7 + 100
    x[:, 1, 2] = 100.1
    scaler = SCALERS[name]().fit(x)
    y = scaler(x)
    varies = torch.ones(3, 4, dtype=torch.bool)
    varies[1, 2] = False
    if name == "z":
        torch.testing.assert_close(y.mean(0), torch.zeros(3, 4), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(0, correction=0)[varies], torch.ones(11))
        assert (y[:, 1, 2] == 0).all()
    else:
        low, high = (0.0, 1.0) if name == "unit" else (-1.0, 1.0)
        torch.testing.assert_close(y.amin(0), torch.full((3, 4), low))
        torch.testing.assert_close(y.amax(0)[varies], torch.full((11,), high))
        assert (y[:, 1, 2] == low).all()
    torch.testing.assert_close(scaler.inverse(y), x)
    other = Source("cpu", seed=1).normal(5, 3, 4)
    torch.testing.assert_close(scaler.inverse(scaler(other)), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALERS)
def test_scalers_are_stored_with_the_model(name, tmp_path):
    x = Source("cpu").normal(20, 6)
    model = nn.Sequential(SCALERS[name]().fit(x), nn.Linear(6, 2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(SCALERS[name](), nn.Linear(6, 2))
    with pytest.raises(RuntimeError, match=r"Scaler: has not been fitted, call fit\(x\)"):
        fresh(x)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(fresh(x), model(x))
    assert fresh.double()(x.double()).dtype == torch.float64


def test_scalers_agree_with_scikit_learn():
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="a comparison")
    x = Source("cpu", torch.float64).normal(30, 5) * 3 + 2
    for ours, theirs in ((MinMaxScaler(-1, 1), preprocessing.MinMaxScaler((-1, 1))), (StandardScaler(), preprocessing.StandardScaler())):
        torch.testing.assert_close(ours.double().fit(x)(x), torch.from_numpy(theirs.fit_transform(x.numpy())))


def test_scalers_take_8_bit_images():
    x = Source("cpu").image(20, 1, 4, 4)
    scaler = MinMaxScaler().fit(x)
    torch.testing.assert_close(scaler(x), scaler(x.float() / 255))
    assert math.isclose(float(scaler(x).amax()), 1.0, rel_tol=1e-6)
