"""The pages that say which line takes the place of which: both have the same value, and weights convert as the tables say."""

import math
import re
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvae import distributions, models, nn
from fastvae import functional as FV
from fastvae.compat import VectorQuantizer2
from fastvae.distributions import LaplaceLikelihood

DOCS = Path(__file__).resolve().parent.parent / "docs"
B, LATENT = 8, 20


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of the rows of all tables with so many columns, without headings."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns]


def names() -> dict:
    """The names of the lines on the page From plain PyTorch."""
    torch.manual_seed(0)
    shape = (B, 1, 28, 28)
    decoder = torch.nn.Sequential(torch.nn.Linear(LATENT, 784), torch.nn.Unflatten(1, shape[1:]))
    return {
        **{"torch": torch, "F": F, "FV": FV, "decoder": decoder},
        **{"x": torch.rand(shape), "recon": torch.rand(shape), "logits": torch.randn(shape), "variance": torch.randn(shape)},
        **{"mu": torch.randn(B, LATENT), "logvar": torch.randn(B, LATENT), "image": torch.randint(256, shape, dtype=torch.uint8)},
        **{"vectors": torch.randn(100, 16), "codebook": torch.randn(40, 16), "hidden": torch.rand(B, 30), "weight": torch.randn(30, 50)},
        **{"features": torch.randn(2, 16, 5, 7), "gamma": torch.randn(16), "beta": torch.randn(16)},
    }


@pytest.fixture
def one_noise(monkeypatch) -> torch.Tensor:
    """What torch draws and what fastvae draws is the same noise."""
    noise = torch.randn(B, LATENT)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    for name in ("reparameterize", "reparameterize_kl"):
        monkeypatch.setattr(FV, name, partial(getattr(FV, name), eps=noise))
    return noise


LINES = [(row[0].strip("`"), row[1].strip("`")) for row in rows("from_pytorch.md", 2) if row[0].startswith("`")]


@pytest.mark.parametrize(("old", "new"), LINES)
@pytest.mark.usefixtures("one_noise")
def test_both_lines_have_the_same_value(old, new):
    scope = names()
    actual, expected = eval(new, scope), eval(old, scope)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_the_lines_were_found():
    assert len(LINES) == 14


@pytest.mark.usefixtures("one_noise")
def test_the_training_loops_have_the_same_loss():
    before, after = blocks("from_pytorch.md")
    scope = names()
    exec(before, scope)
    expected = scope.pop("loss")
    exec(after, scope)
    torch.testing.assert_close(scope["loss"], expected, rtol=1e-5, atol=0)


def sides(diff: str) -> tuple[str, str]:
    """The function of a diff as it was, and as it is."""
    old, new = ([line[1:] for line in diff.splitlines() if line[0] in (" ", sign)] for sign in "-+")
    return textwrap.dedent("\n".join(old)), textwrap.dedent("\n".join(new))


@pytest.mark.usefixtures("one_noise")
def test_the_functions_of_pytorch_examples_give_the_same():
    written = blocks("from_pytorch_examples.md")[0]
    old, new = names(), names()
    exec(written, new)
    for diff in blocks("from_pytorch_examples.md", "diff"):
        before, after = sides(diff)
        assert after in written
        exec(before, old)
    mu, logvar, x, recon = (old[name] for name in ("mu", "logvar", "x", "recon"))
    torch.testing.assert_close(new["reparameterize"](None, mu, logvar), old["reparameterize"](None, mu, logvar))
    arguments = recon.flatten(1), x, mu, logvar
    torch.testing.assert_close(new["loss_function"](*arguments), old["loss_function"](*arguments), rtol=1e-5, atol=0)


def test_the_model_of_pythae_and_ours_have_the_same_loss(monkeypatch):
    pytest.importorskip("pythae", reason="pythae is not installed")
    scope = {}
    exec("\n".join(blocks("from_pythae.md")), scope)
    monkeypatch.setattr(torch, "randn_like", lambda like: scope["noise"])
    torch.testing.assert_close(scope["loss"], scope["model"]({"data": scope["x"]}).loss, rtol=1e-5, atol=0)


def test_the_classes_of_the_pythae_page_exist():
    pythae = pytest.importorskip("pythae.models", reason="pythae is not installed")
    for theirs, ours in rows("from_pythae.md", 2)[1:]:
        assert all(hasattr(pythae, name) for name in re.findall(r"\b[A-Z]\w+", theirs))
        assert all(any(hasattr(module, name) for module in (models, distributions, nn)) for name in re.findall(r"\b[A-Z]\w+", ours))


def test_the_quantizers_have_the_same_codes_gradients_and_loss():
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    scope = {"VectorQuantize": library.VectorQuantize, "VectorQuantizer": nn.VectorQuantizer}
    (old, new), *_ = [row for row in rows("from_vector_quantize_pytorch.md", 2) if row[0].startswith("`VectorQuantize(")]
    torch.manual_seed(0)
    theirs, ours = eval(old.strip("`"), scope), eval(new.strip("`"), scope)
    with torch.no_grad():
        ours.codebook.copy_(theirs._codebook.embed[0])
    vectors = torch.randn(1, 200, 64)
    results = []
    for layer in (theirs, ours):
        x = vectors.clone().requires_grad_()
        output = layer(x)
        quantized, indices, loss = (output.quantized, output.indices, output.loss) if layer is ours else output
        (quantized.square().sum() + loss.sum()).backward()
        results.append((quantized, indices, loss.reshape(()), x.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# The objectives of other libraries with a weight w on the KL.

SCALE = 0.3  # the learned scale of latent-diffusion's loss


def plain_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).flatten(1).sum(1)


def fastvae_loss(recon, x, mu, logvar, w):
    return FV.elbo_loss(recon, x, mu, logvar, likelihood="bernoulli", beta=w).loss


def pytorch_examples_loss(recon, x, mu, logvar, w):
    return F.binary_cross_entropy(recon, x, reduction="sum") + plain_kl(mu, logvar).sum()


def pythae_loss(reconstruction, recon, x, mu, logvar, w):
    library = pytest.importorskip("pythae.models", reason="pythae is not installed")
    model = library.BetaVAE(library.BetaVAEConfig(input_dim=(3, 8, 8), latent_dim=64, beta=w, reconstruction_loss=reconstruction))
    return model.loss_function(recon, x, mu.flatten(1), logvar.flatten(1), None)[0]


def diffusers_loss(recon, x, mu, logvar, w):
    library = pytest.importorskip("diffusers.models.autoencoders.vae", reason="diffusers is not installed")
    kl = library.DiagonalGaussianDistribution(torch.cat((mu, logvar), 1)).kl()
    return (recon - x).square().sum() / len(x) + w * kl.sum() / len(x)


def latent_diffusion_loss(recon, x, mu, logvar, w):
    return ((recon - x).abs() / SCALE + math.log(SCALE)).sum() / len(x) + w * plain_kl(mu, logvar).sum() / len(x)


def pytorch_vae_loss(recon, x, mu, logvar, w):
    return F.mse_loss(recon, x) + w * plain_kl(mu, logvar).mean()


OBJECTIVES = {
    "fastvae": fastvae_loss,
    "pytorch/examples": pytorch_examples_loss,
    'pythae, `reconstruction_loss="bce"`': partial(pythae_loss, "bce"),
    'pythae, `reconstruction_loss="mse"`': partial(pythae_loss, "mse"),
    "diffusers, training of `AutoencoderKL`, `l2`": diffusers_loss,
    "latent-diffusion": latent_diffusion_loss,
    "PyTorch-VAE": pytorch_vae_loss,
}
WEIGHT_ROWS = {row[0]: row for row in rows("kl_weights.md", 5)[1:]}


def test_every_row_of_weights_has_its_objective():
    assert WEIGHT_ROWS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("library", OBJECTIVES)
def test_weights_convert_as_the_table_says(library):
    """The two objectives differ by a factor and a constant: so their changes differ by the factor, whatever changes."""
    *_, formula = WEIGHT_ROWS[library]
    expression, _, likelihood = formula.partition(",")
    torch.manual_seed(0)
    recon, x = torch.rand(2, B, 3, 8, 8, dtype=torch.float64)
    mu, logvar = torch.randn(2, B, 4, 4, 4, dtype=torch.float64)
    w = 0.7
    beta = eval(expression.strip("`"), dict.fromkeys(("beta", "kl_scale", "kl_weight", "kld_weight"), w) | {"D": x[0].numel()})

    def ours(recon, mu, logvar):
        if likelihood.strip() == "Laplace":
            return LaplaceLikelihood(SCALE).double()(recon, x) + beta * FV.kl_normal(mu, logvar)
        kind = "gaussian" if likelihood.strip() == "Gaussian" else "bernoulli"
        return FV.elbo_loss(recon, x, mu, logvar, likelihood=kind, beta=beta).loss

    states = [(recon, mu, logvar), (0.5 * recon + 0.2, mu, logvar), (recon, 0.5 * mu, logvar), (recon, mu, 0.5 * logvar)]
    theirs = torch.stack([OBJECTIVES[library](state[0], x, *state[1:], w) for state in states])
    mine = torch.stack([ours(*state) for state in states])
    factors = (theirs[1:] - theirs[0]) / (mine[1:] - mine[0])
    torch.testing.assert_close(factors, factors[:1].expand(3), rtol=1e-6, atol=0)


def test_the_two_models_of_pythae_that_differ():
    library = pytest.importorskip("pythae.models", reason="pythae is not installed")
    config = library.DisentangledBetaVAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    assert (config.beta, config.C) == (10, 50)
    scope = names()
    recon, x, mu, logvar = (scope[name] for name in ("recon", "x", "mu", "logvar"))
    theirs = library.DisentangledBetaVAE(config).loss_function(recon, x, mu, logvar, None, epoch=1000)[0]
    options = {"likelihood": "bernoulli", "beta": config.beta, "capacity": config.C, "reduction": "sample"}
    torch.testing.assert_close(FV.elbo_loss(recon, x, mu, logvar, **options).loss.mean(), theirs, rtol=1e-5, atol=0)

    info = library.INFOVAE_MMD_Config(input_dim=(1, 28, 28), latent_dim=LATENT)
    assert info.alpha + info.lbd - 1 < 0
    with pytest.raises(ValueError, match="weight"):
        models.InfoVAE.mlp(alpha=info.alpha, weight=info.lbd)


def test_codebook_weights_convert_as_the_table_says():
    table = {row[0]: row[3].strip("`") for row in rows("kl_weights.md", 4)[1:]}
    torch.manual_seed(0)
    vectors, codebook = torch.randn(1, 50, 8), torch.randn(20, 8)

    def ours(library):
        return FV.vector_quantize(vectors, codebook, **eval(f"dict({table[library]})")).loss

    quantize = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed").VectorQuantize(8, 20)
    quantize._codebook.embed.copy_(codebook[None])
    torch.testing.assert_close(ours("vector-quantize-pytorch"), quantize(vectors)[2].reshape(()), rtol=1e-5, atol=0)

    pythae = pytest.importorskip("pythae.models.vq_vae.vq_vae_utils", reason="pythae is not installed")
    from pythae.models import VQVAEConfig

    config = VQVAEConfig(input_dim=(1, 28, 28), latent_dim=8, num_embeddings=20)
    config.embedding_dim = 8  # as the model sets it
    quantizer = pythae.Quantizer(config)
    quantizer.embeddings.weight.data.copy_(codebook)
    torch.testing.assert_close(ours("pythae, `VQVAE`"), quantizer(vectors[None]).loss.mean(), rtol=1e-5, atol=0)

    for legacy in (False, True):
        twin = VectorQuantizer2(20, 8, beta=0.25, legacy=legacy)
        twin.embedding.weight.data.copy_(codebook)
        image = vectors.reshape(1, 5, 10, 8).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(f"taming-transformers, `legacy={legacy}`"), twin(image)[1], rtol=1e-5, atol=0)
