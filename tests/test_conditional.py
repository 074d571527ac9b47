"""The conditional VAE: every way in which a condition enters, against the formula, and bad conditions by name."""

import json

import pytest
import torch
from _helpers import brief
from torch import nn

from fastvae.distributions import ConditionalPrior, VampPrior
from fastvae.models import CVAE, VAE, networks, registry
from fastvae.nn import (
    ClassCondition,
    Concatenation,
    Condition,
    ConditionalBatchNorm,
    ConditionedSequential,
    CrossAttention,
    FiLM,
    SequenceCondition,
    VectorCondition,
    conditioned,
)
from fastvae.nn.conditioning import CONDITIONINGS
from fastvae.reference import latent, reconstruction

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, DIM, LATENT = 6, 8, 2
each_conditioning = pytest.mark.parametrize("conditioning", CONDITIONINGS)
CONDITIONS = {
    "class": lambda: ClassCondition(3, DIM),
    "vector": lambda: VectorCondition(5, DIM),
    "sequence": lambda: SequenceCondition(5, DIM),
    "masked": lambda: SequenceCondition(5, DIM),
}
each_condition = pytest.mark.parametrize("kind", CONDITIONS)


def condition_of(kind: str, count: int = BATCH, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "class":
        return torch.randint(3, (count,), generator=generator)
    if kind == "vector":
        return torch.randn(count, 5, generator=generator)
    sequence = torch.randn(count, 4, 5, generator=generator)
    return sequence if kind == "sequence" else (sequence, torch.arange(4) < torch.arange(count)[:, None] % 4 + 1)


def make(kind: str = "class", conditioning: str = "film", **options) -> CVAE:
    torch.manual_seed(0)
    pair = networks.mlp((1, 4, 4), (12,), LATENT, code_dim=2 * LATENT)
    return CVAE(*(conditioned(network, conditioning, DIM) for network in pair), CONDITIONS[kind](), LATENT, **options)


def images(count: int = BATCH) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@each_conditioning
@each_condition
def test_every_condition_enters_in_every_way(kind, conditioning):
    model, x, y = make(kind, conditioning, drop_condition=0.5), images(), condition_of(kind)
    output = model(x, y)
    output.loss.backward()
    assert output.recon.shape == x.shape
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.condition.parameters())
    model.eval()
    other, eps = condition_of(kind, seed=1), torch.randn(BATCH, LATENT)
    assert not torch.equal(model.encode(x, y).mean, model.encode(x, other).mean)
    assert not torch.equal(model.decode(eps, y), model.decode(eps, other))
    assert model.sample(2 * BATCH, y).shape == (2 * BATCH, 1, 4, 4)
    assert model.interpolate(x, x.flip(0), 3, y=y).shape == (BATCH, 3, 1, 4, 4)
    assert model.log_prob_bound(x, 4, y=y, samples_at_once=2).shape == model.anomaly_score(x, 2, y=y).shape == (BATCH,)
    output = model.to(torch.bfloat16)(x.to(torch.bfloat16), y)
    assert output.recon.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, model.float()(x, y).loss, rtol=0.2, atol=0)


@pytest.mark.parametrize("case", brief({case[0]: case for case in zip(CONDITIONS, CONDITIONINGS, strict=True)}, ["class"]))
def test_compiles_as_one_graph(case):
    torch.compiler.reset()
    kind, conditioning = case
    model, x, y = make(kind, conditioning, drop_condition=0.3), images(), condition_of(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, y).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    seed = torch.tensor(3)
    torch.testing.assert_close(compiled(x, y, seed=seed).loss, model(x, y, seed=seed).loss)


@pytest.mark.parametrize("options", [{}, {"beta": 3.0, "num_samples": 2}], ids=str)
def test_loss_is_its_formula(options):
    model = make(prior=ConditionalPrior(LATENT, DIM), **options).double()
    nn.init.normal_(model.prior.network[-1].weight)
    x, y = images().double(), condition_of("class")
    samples = options.get("num_samples", 1)
    eps = torch.randn(samples, BATCH, LATENT, dtype=torch.float64)
    output = model(x, y, eps=eps if "num_samples" in options else eps[0])

    condition = model.condition(y)
    mu, logvar = model.encoder(x, condition).chunk(2, 1)
    prior = model.prior(condition)
    recons = [model.decoder(mu + torch.exp(logvar / 2) * noise, condition) for noise in eps]
    losses = [reconstruction.binary_cross_entropy_with_logits(recon, x, reduction="batchmean") for recon in recons]
    kl = latent.kl_normal(mu, logvar, prior.mu, prior.logvar)
    torch.testing.assert_close(output.recon_loss, sum(losses) / samples)
    torch.testing.assert_close(output.kl, kl)
    torch.testing.assert_close(output.loss, sum(losses) / samples + options.get("beta", 1.0) * kl)


def test_a_model_given_a_condition_is_a_vae():
    model, x, y = make(prior=ConditionalPrior(LATENT, DIM)).eval(), images(), condition_of("class")
    given, eps = model.given(y), torch.randn(BATCH, LATENT)
    assert type(given) is VAE
    assert torch.equal(given(x, eps).loss, model(x, y, eps).loss)
    assert torch.equal(given.reconstruct(x), model.decode_mean(model.encode(x, y).mean, y))
    assert {id(p) for p in given.parameters()} <= {id(p) for p in model.parameters()}
    drawn = given.sample(BATCH, torch.Generator().manual_seed(2))
    assert torch.equal(drawn, model.sample(BATCH, y, torch.Generator().manual_seed(2)))


def test_interpolation_runs_from_one_reconstruction_to_the_other_at_the_condition():
    model, x, y = make(), images(), condition_of("class")
    path = model.interpolate(x, x.flip(0), 5, y=y)
    torch.testing.assert_close(path[:, 0], model.reconstruct(x, y))
    torch.testing.assert_close(path[:, -1], model.reconstruct(x.flip(0), y))


def test_concatenation_is_a_layer_of_input_and_condition():
    layer, entry = nn.Linear(5, 7), Concatenation(7, DIM)
    x, c = torch.randn(3, 5), torch.randn(3, DIM)
    both = nn.Linear(5 + DIM, 7)
    both.load_state_dict({"weight": torch.cat([layer.weight, entry.linear.weight], 1), "bias": layer.bias})
    torch.testing.assert_close(entry(layer(x), Condition.of_vector(c)), both(torch.cat([x, c], 1)))


def test_layers_take_vectors_and_maps_alike():
    c = Condition.of_vector(torch.randn(3, DIM))
    for layer in (make_layer(4, DIM) for make_layer in CONDITIONINGS.values()):
        layer.eval()
        maps = torch.randn(3, 4, 2, 5)
        by_place = torch.stack([layer(place, c) for place in maps.flatten(2).unbind(2)], 2).view_as(maps)
        torch.testing.assert_close(layer(maps, c), by_place)
        channels_last = maps.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(channels_last, c), by_place)


def test_batch_norm_and_film():
    h, c = torch.randn(50, 4), Condition.of_vector(torch.randn(50, DIM))
    layer = ConditionalBatchNorm(4, DIM)
    scale, shift = layer.film.linear(c.vector).chunk(2, 1)
    normalised = (h - h.mean(0)) / (h.var(0, correction=0) + layer.norm.eps).sqrt()
    torch.testing.assert_close(layer(h, c), normalised * (1 + scale) + shift, rtol=1e-4, atol=1e-5)
    assert layer.norm.num_batches_tracked == 1
    film = FiLM(4, DIM)
    scale, shift = film.linear(c.vector).chunk(2, 1)
    torch.testing.assert_close(film(h, c), h * (1 + scale) + shift)


def test_what_is_masked_does_not_count_and_order_does():
    embedding, attention = SequenceCondition(5, DIM), CrossAttention(4, DIM)
    sequence, h = torch.randn(3, 6, 5), torch.randn(3, 4)
    mask = (torch.arange(6) < 4).expand(3, 6)
    padded = sequence.masked_fill(~mask[..., None], 9.0)
    short, long = embedding(sequence[:, :4]), embedding((padded, mask))
    torch.testing.assert_close(short.vector, long.vector)
    torch.testing.assert_close(attention(h, short), attention(h, long))
    assert not torch.allclose(short.vector, embedding(sequence[:, :4].flip(1)).vector)
    nothing = embedding((sequence, torch.zeros_like(mask)))
    assert torch.equal(nothing.vector, torch.zeros(3, DIM))
    assert attention(h, nothing).isfinite().all()


def test_conditions_are_dropped_in_training_alone_at_their_rate():
    model, y = make(drop_condition=0.3), condition_of("class", 5000)
    dropped = (model._dropped(model.embed(y), None, None).vector == model.no_condition).all(1)
    assert 0.27 < dropped.float().mean() < 0.33
    x, eps = images(), torch.randn(BATCH, LATENT)
    y = condition_of("class")
    assert torch.equal(model(x, y, seed=5).loss, model(x, y, seed=5).loss)
    assert torch.equal(*(model(x, y, generator=torch.Generator().manual_seed(4)).loss for _ in range(2)))
    model.eval()
    assert torch.equal(model(x, y, eps).recon, model.decode(model(x, y, eps).z, y))
    assert not torch.equal(model(x, y, eps).loss, model(x, None, eps).loss)


def test_a_model_that_drops_conditions_does_without():
    model, x = make("masked", "cross_attention", drop_condition=0.5), images()
    assert model.sample(5).shape == (5, 1, 4, 4)
    assert model.reconstruct(x).shape == x.shape
    assert model.log_prob_bound(x, 3).shape == (BATCH,)
    assert "no_condition" in model.state_dict()
    assert "no_condition" not in make().state_dict()


def test_the_conditional_prior_is_standard_at_first_and_is_sampled_at_the_condition():
    model, y = make(prior=ConditionalPrior(LATENT, DIM)), torch.tensor([0, 2])
    prior = model.prior(model.embed(y))
    assert not prior.mu.any()
    assert not prior.logvar.any()
    with torch.no_grad():
        model.prior.network[-1].weight.normal_()
        prior = model.prior(model.embed(y))
        drawn = prior.sample(4000, torch.Generator().manual_seed(0)).view(2000, 2, LATENT)
    torch.testing.assert_close(drawn.mean(0), prior.mu, rtol=0, atol=0.15)
    torch.testing.assert_close(drawn.var(0).log(), prior.logvar, rtol=0, atol=0.2)


def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed: pip install fastvae-kernels[train]")
    loaded = datasets.load_digits()
    return torch.tensor(loaded.images[:64] / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(loaded.target[:64])


def test_overfits_64_digits_saves_loads_and_samples_at_a_class():
    x, y = digits()
    torch.manual_seed(0)
    model = CVAE.mlp((1, 8, 8), (64,), 4, conditional_prior=True, drop_condition=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(x, y).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]

    again = registry.build(registry.describe(model))
    again.load_state_dict(model.state_dict())
    classes = torch.arange(10)
    drawn = [m.sample(200, classes, torch.Generator().manual_seed(1)) for m in (model, again)]
    assert torch.equal(*drawn)
    # The mean image of what is drawn at a class is nearest to that class's own mean.
    means = torch.stack([x[y == label].mean(0) for label in classes]).flatten(1)
    nearest = torch.cdist(drawn[0].view(20, 10, -1).mean(0), means).argmin(1)
    assert (nearest == classes).sum() >= 9


@each_conditioning
def test_ready_made_networks_take_28x28_digits(conditioning):
    model, y = CVAE.conv(3, conditioning=conditioning), torch.tensor([3, 9])
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    output = model(x, y)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert output.recon.shape == (2, 1, 28, 28)
    assert [type(stage[-2]) for stage in model.encoder[:2]] == [CONDITIONINGS[conditioning]] * 2
    assert CVAE.mlp(20, hidden=(16, 8), latent_dim=2, conditioning=conditioning)(torch.rand(2, 20), y).recon.shape == (2, 20)


@each_condition
def test_a_ready_made_network_of_any_condition_is_stored_and_made_again(kind):
    model = CVAE.mlp((1, 4, 4), (8,), LATENT, condition=CONDITIONS[kind](), conditional_prior=True)
    again = registry.build(json.loads(json.dumps(registry.describe(model))))
    again.load_state_dict(model.state_dict())
    x, y, eps = images(), condition_of(kind), torch.randn(BATCH, LATENT)
    assert torch.equal(again(x, y, eps).loss, model(x, y, eps).loss)


BAD_CONDITIONS = [
    ("class", None, ValueError, r"^y: got None, takes int64 classes from 0 to 2, \(batch,\)"),
    ("class", [0, 1], TypeError, r"^y: got list"),
    ("class", torch.zeros(BATCH), TypeError, r"^y: got torch.float32, takes torch.int64"),
    ("class", torch.full((BATCH,), 3), ValueError, r"^y: got 6 of 6 values outside \[0, 2\]"),
    ("class", torch.full((BATCH,), -1), ValueError, r"^y: got 6 of 6 values outside \[0, 2\]"),
    ("class", torch.zeros(BATCH, 1, dtype=torch.int64), ValueError, r"^y: got shape \(6, 1\)"),
    ("class", torch.zeros(2, dtype=torch.int64), ValueError, r"^y: got 2 conditions, takes one for each of 6 samples"),
    ("vector", torch.zeros(BATCH, 4), ValueError, r"^y: got shape \(6, 4\), takes floating vectors of 5 numbers"),
    ("vector", torch.zeros(BATCH, dtype=torch.int64), TypeError, r"^y: got torch.int64"),
    ("sequence", None, ValueError, r"^y: got None, takes floating sequences"),
    ("sequence", torch.zeros(BATCH, 5), ValueError, r"^y: got shape \(6, 5\), takes floating sequences, \(batch, length, 5\)"),
    ("sequence", (torch.zeros(BATCH, 4, 5), torch.ones(BATCH, 4)), ValueError, r"^y: got a mask of torch.float32"),
    ("sequence", (torch.zeros(BATCH, 4, 5), torch.ones(BATCH, 3) > 0), ValueError, r"^y: got a mask of torch.bool and shape \(6, 3\)"),
]


@pytest.mark.parametrize(("kind", "y", "error", "message"), BAD_CONDITIONS)
def test_a_bad_condition_is_named(kind, y, error, message):
    with pytest.raises(error, match=message):
        make(kind)(images(), y)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"^y: got 4 conditions, takes a number of them that divides n, 6"):
        make().sample(6, torch.arange(4) % 3)
    with pytest.raises(ValueError, match=r"^y: got 4 conditions for 6 samples"):
        make().given(torch.arange(4) % 3).reconstruct(images())
    with pytest.raises(ValueError, match=r"^drop_condition: got 1.0, takes a number in \[0, 1\)"):
        make(drop_condition=1.0)
    with pytest.raises(ValueError, match=r"^conditioning: got 'adain', takes one of 'concatenation', 'film'"):
        CVAE.conv(conditioning="adain")
    with pytest.raises(ValueError, match=r"^network: got one stage"):
        CVAE.mlp(hidden=())
    with pytest.raises(ValueError, match=r"^prior: got a VampPrior"):
        make(prior=VampPrior(LATENT, (1, 4, 4)))
    with pytest.raises(ValueError, match=r"^heads: got 3, takes a divisor of the channels, 4"):
        CrossAttention(4, DIM, heads=3)
    with pytest.raises(ValueError, match=r"^num_classes: got 0"):
        ClassCondition(0, DIM)
    with pytest.raises(ValueError, match=r"^dim: got 3, takes an even number"):
        SequenceCondition(5, 3)


def test_networks_of_ones_own_layers():
    encoder = ConditionedSequential(nn.Conv2d(1, 4, 2, stride=2), FiLM(4, DIM), nn.ReLU(), nn.Conv2d(4, 6, 1))
    decoder = ConditionedSequential(nn.Conv2d(3, 4, 1), CrossAttention(4, DIM), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2, stride=2))
    model = CVAE(encoder, decoder, VectorCondition(5, DIM), (3, 2, 2))
    assert model(images(), condition_of("vector")).z.shape == (BATCH, 3, 2, 2)
    assert model.sample(4, condition_of("vector", 2)).shape == (4, 1, 4, 4)


@pytest.mark.parametrize("pooling", ["token", "mean"])
@each_conditioning
def test_a_transformer_takes_the_condition_at_each_position(conditioning, pooling):
    model = CVAE.transformer(8, 1, 4, 16, 2, 2, LATENT, pooling=pooling, num_classes=3, conditioning=conditioning)
    x, eps = torch.rand(2, 1, 8, 8), torch.zeros(2, LATENT)
    first, second = (model(x, torch.tensor(y), eps) for y in ([0, 1], [0, 2]))
    # Batch normalisation lets each sample see the batch, so only the sample whose class changed is sure to.
    assert not torch.equal(first.mu[1], second.mu[1])
    assert not torch.equal(first.recon[1], second.recon[1])
    if conditioning != "batch_norm":
        assert torch.equal(first.mu[0], second.mu[0])


def test_a_strided_network_takes_the_size_of_its_images():
    model = CVAE.strided_conv((6, 9), 2, (4,), (8,), LATENT, num_classes=3)
    assert model(torch.rand(2, 2, 6, 9), torch.tensor([0, 2])).recon.shape == (2, 2, 6, 9)
