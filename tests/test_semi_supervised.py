"""The semi-supervised VAE: its bound against the explicit sum over classes, and labels by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from _helpers import brief

from fastvae.distributions import CholeskyPosterior, MixturePrior
from fastvae.models import SemiSupervisedVAE, registry
from fastvae.nn import VectorCondition
from fastvae.nn.conditioning import CONDITIONINGS
from fastvae.reference import latent, reconstruction

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LATENT, CLASSES = 5, 2, 3


def make(**options) -> SemiSupervisedVAE:
    torch.manual_seed(0)
    return SemiSupervisedVAE.mlp((1, 4, 4), (8,), LATENT, num_classes=CLASSES, **options)


def images(count: int = BATCH) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([2, -1, 0, -1, -1])


def explicit_terms(model, x, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """The reconstruction loss and the KL of each sample at each class, one class after the other: two tensors (batch, classes)."""
    recon_losses, kls = [], []
    for label in range(CLASSES):
        condition = model.condition(torch.full((len(x),), label))
        mu, logvar = model.encoder(x, condition).chunk(2, 1)
        recon = model.decoder(mu + torch.exp(logvar / 2) * eps[label], condition)
        recon_losses.append(reconstruction.binary_cross_entropy_with_logits(recon, x, reduction="sample"))
        kls.append(latent.kl_normal(mu, logvar, reduction="sample"))
    return torch.stack(recon_losses, 1), torch.stack(kls, 1)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_loss_is_the_explicit_sum_over_classes(beta):
    model, x = make(alpha=7.0, beta=beta, conditioning="concatenation").double(), images().double()
    eps = torch.randn(CLASSES, BATCH, LATENT, dtype=torch.float64)
    recon_loss, kl = explicit_terms(model, x, eps)
    bound = recon_loss + beta * kl + math.log(CLASSES)
    log_q = model.class_logits(x).log_softmax(1)
    unlabelled = (log_q.exp() * bound).sum(1) + (log_q.exp() * log_q).sum(1)
    torch.testing.assert_close(model(x, eps=eps).loss, unlabelled.mean())

    known = LABELS >= 0
    labelled = bound.gather(1, LABELS.clamp_min(0)[:, None])[:, 0] - 7.0 * log_q.gather(1, LABELS.clamp_min(0)[:, None])[:, 0]
    output = model(x, LABELS, eps)
    expected = torch.where(known, labelled, unlabelled).mean()
    torch.testing.assert_close(output.loss, expected)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(*gradients)


def test_terms_of_the_loss():
    model, x = make(alpha=7.0), images()
    output = model(x, LABELS)
    whole = output.recon_loss + output.kl + output.class_kl + 7.0 * output.classification_loss
    torch.testing.assert_close(output.loss, whole)
    cross_entropy = F.cross_entropy(output.logits, LABELS, ignore_index=-1, reduction="sum") / BATCH
    torch.testing.assert_close(output.classification_loss, cross_entropy)
    assert output.accuracy == ((output.logits.argmax(1) == LABELS).sum() / 2)
    nothing = model(x)
    assert nothing.classification_loss == 0
    assert nothing.accuracy == 0
    assert torch.equal(model(x, torch.full((BATCH,), -1), seed=2).loss, model(x, seed=2).loss)


def test_tensors_are_those_of_the_label_or_of_the_most_probable_class():
    model, x = make(), images()
    eps = torch.randn(CLASSES, BATCH, LATENT)
    output = model(x, LABELS, eps)
    chosen = model.completed(x, LABELS)
    assert torch.equal(chosen[LABELS >= 0], LABELS[LABELS >= 0])
    assert torch.equal(chosen[LABELS < 0], model.classify(x)[LABELS < 0])
    torch.testing.assert_close(output.mu, model.encode(x, chosen).mean)
    torch.testing.assert_close(output.z, output.mu + torch.exp(output.logvar / 2) * eps[chosen, torch.arange(BATCH)])
    torch.testing.assert_close(output.recon, model.decode(output.z, chosen))


def test_what_has_no_label_is_read_at_the_classifier_s_class():
    model, x = make(), images()
    classes = model.classify(x)
    assert torch.equal(classes, model.class_logits(x).argmax(1))
    for method in (model.reconstruct, lambda x, y=None: model.interpolate(x, x.flip(0), 3, y=y)):
        assert torch.equal(method(x), method(x, classes))
    assert model.anomaly_score(x).shape == (BATCH,)
    assert model.sample(7).shape == (7, 1, 4, 4)
    assert model.sample(6, torch.tensor([1])).shape == (6, 1, 4, 4)
    drawn = [model.sample(7, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_the_bound_without_a_class_is_the_mean_over_classes_of_the_likelihoods():
    model, x = make(), images()
    at = [model.log_prob_bound(x, 20_000, y=torch.full((BATCH,), label)) for label in range(CLASSES)]
    expected = torch.logsumexp(torch.stack(at), 0) - math.log(CLASSES)
    torch.testing.assert_close(model.log_prob_bound(x, 20_000), expected, rtol=0, atol=0.02)
    assert (model.log_prob_bound(x, 2000) > -model(x).loss - 5).all()


def test_a_condition_without_classes_is_named():
    with pytest.raises(TypeError, match=r"^condition: got VectorCondition, takes a ClassCondition"):
        SemiSupervisedVAE.mlp((1, 4, 4), (8,), LATENT, condition=VectorCondition(3, 4))


PARTS = {
    "as it is": {},
    "conditional prior": {"conditional_prior": True},
    "full covariance": {"posterior": CholeskyPosterior()},
    "mixture prior": {"prior": MixturePrior(LATENT, 3)},
}
COMPILED = {name: (parts, conditioning) for (name, parts), conditioning in zip(PARTS.items(), CONDITIONINGS, strict=True)}


@pytest.mark.parametrize("case", brief(COMPILED, ["conditional prior"]))
def test_compiles_as_one_graph_and_runs_in_16_bits(case):
    torch.compiler.reset()
    parts, conditioning = case
    model, x = make(conditioning=conditioning, **parts), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, LABELS).loss.backward()
    # Beside a single token attention has no choice, and a conditional prior starts without a slope.
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not {"attention", "norm", "prior"} & {*name.split(".")})
    model.eval()
    seed = torch.tensor(3)
    torch.testing.assert_close(compiled(x, LABELS, seed=seed).loss, model(x, LABELS, seed=seed).loss)
    if "posterior" not in parts:
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16), LABELS).loss.isfinite()


def test_learns_64_digits_from_20_labels_saves_and_loads():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed: pip install fastvae-kernels[train]")
    loaded = datasets.load_digits()
    x, y = torch.tensor(loaded.images[:64] / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(loaded.target[:64])
    labels = torch.where(torch.arange(64) < 20, y, -1)
    torch.manual_seed(0)
    model = SemiSupervisedVAE.mlp((1, 8, 8), (64,), 3, conditioning="concatenation", alpha=20.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        output = model(x, labels)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert output.accuracy == 1
    assert (model.classify(x)[20:] == y[20:]).float().mean() > 0.6

    again = registry.build(registry.describe(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.classify(x), model.classify(x))
    assert torch.equal(again(x, labels, seed=1).loss, model(x, labels, seed=1).loss)


def test_ready_made_classifiers_have_the_architecture_of_the_encoder():
    model = SemiSupervisedVAE.conv(4)
    sizes = [(layer.weight.shape, type(layer)) for layer in model.classifier.modules() if hasattr(layer, "weight")]
    assert [size for size, _ in sizes] == [(32, 1, 3, 3), (64, 32, 3, 3), (256, 3136), (10, 256)]
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    output = model(x, torch.tensor([4, -1]))
    assert output.recon.shape == (2, 1, 28, 28)
    assert output.logits.shape == (2, 10)


BAD_LABELS = [
    (torch.zeros(BATCH), TypeError, r"^y: got torch.float32, takes torch.int64"),
    (torch.full((BATCH,), 3), ValueError, r"^y: got 5 of 5 values outside \[-1, 2\]"),
    (torch.full((BATCH,), -2), ValueError, r"^y: got 5 of 5 values outside \[-1, 2\]"),
    (torch.zeros(BATCH, CLASSES, dtype=torch.int64), ValueError, r"^y: got shape \(5, 3\)"),
    (torch.zeros(2, dtype=torch.int64), ValueError, r"^y: got 2 labels, takes one for each of 5 samples"),
]


@pytest.mark.parametrize(("y", "error", "message"), BAD_LABELS)
def test_bad_labels_are_named(y, error, message):
    with pytest.raises(error, match=message):
        make()(images(), y)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"^alpha: got -1"):
        make(alpha=-1)
