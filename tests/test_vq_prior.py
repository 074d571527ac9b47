"""The prior of VQ-VAEs: its probabilities, its draws with and without the cache, and that it learns beside a frozen VQ-VAE."""

import itertools
import math

import pytest
import torch
from _helpers import brief
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvae.models import VAE, VQVAE, VQVAE2, IndexPrior
from fastvae.models._drawing import draw
from fastvae.models.networks import KeyValueCache
from fastvae.nn import ResidualVectorQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"num_codes": 8, "dim": 4, "channels": 8, "hidden": 4, "blocks": 1}
TINY = {"width": 16, "depth": 2, "heads": 2}
LABEL = torch.tensor([0, 2, 1, 2])


def one_level(**options) -> IndexPrior:
    torch.manual_seed(0)
    return IndexPrior(VQVAE.conv(1, **SMALL), (2, 3), **TINY, **options)


def two_levels(**options) -> IndexPrior:
    torch.manual_seed(0)
    return IndexPrior(VQVAE2.conv(1, **SMALL), ((1, 2), (2, 4)), **TINY, **options)


def residual(**options) -> IndexPrior:
    torch.manual_seed(0)
    model = VQVAE.conv(1, **SMALL)
    quantizer = ResidualVectorQuantizer(3, 8, 4, channels_first=True)
    return IndexPrior(VQVAE(model.encoder, model.decoder, quantizer), (2, 3, 3), **TINY, **options)


KINDS = {"one_level": (one_level, (8, 12)), "two_levels": (two_levels, (8, 16)), "residual": (residual, (8, 12))}
EACH_KIND = pytest.mark.parametrize(("make", "size"), KINDS.values(), ids=KINDS)


def images(size, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(1))


def drawn_indices(prior: IndexPrior, count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(8, (count, *shape), generator=generator) for shape in prior.index_shapes)


def train(prior: IndexPrior, loss, steps: int, learning_rate: float) -> float:
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item()


@EACH_KIND
def test_the_loss_is_the_negative_log_likelihood_of_the_indices(make, size):
    prior, x = make(), images(size)
    output = prior(x)
    expected = 0.0
    for logits, indices in zip(output.logits, output.indices, strict=True):
        expected -= logits.log_softmax(-1).gather(2, indices.unsqueeze(2)).sum() / len(x)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(sum(output.level_loss), expected)
    torch.testing.assert_close(prior.log_prob(prior.vqvae.encode(x)).mean(), -expected)
    # The last position's vector is the only one that no other position sees.
    output.loss.backward()
    trained = {name for name, p in prior.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in prior.named_parameters() if not name.startswith("vqvae.")}


def test_probabilities_sum_to_one():
    torch.manual_seed(0)
    model = VQVAE.conv(1, **{**SMALL, "num_codes": 3})
    prior = IndexPrior(model, (2, 2), **TINY).double()
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    assert float(prior.log_prob(every).exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("label", [None, LABEL], ids=["unconditional", "conditional"])
@EACH_KIND
def test_steps_with_the_cache_give_the_logits_of_the_whole_sequence(make, size, label):
    prior = make(num_classes=None if label is None else 3).eval()
    indices = drawn_indices(prior, 4)
    flat = tuple(level.flatten(1) for level in indices)
    with torch.no_grad():
        whole = prior.logits(flat, label)
        caches = [KeyValueCache(len(prior.positions)) for _ in prior.blocks]
        embedded = prior.start_of(4, label)
        for level, embedding, output, expected in zip(flat, prior.embeddings, prior.outputs, whole, strict=True):
            for position in range(level.shape[1]):
                logits = output(prior._next(embedded, caches))
                torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
                embedded = embedding(level[:, position]).unsqueeze(1)


@EACH_KIND
def test_a_position_is_given_only_those_before_it(make, size):
    prior = make().eval()
    flat = [level.flatten(1) for level in drawn_indices(prior, 1)]
    whole = torch.cat(prior.logits(tuple(flat), None), dim=1)
    changed = [level.clone() for level in flat]
    changed[-1][:, 2] = (changed[-1][:, 2] + 1) % 8
    position = sum(prior.lengths[:-1]) + 2
    other = torch.cat(prior.logits(tuple(changed), None), dim=1)
    assert torch.equal(whole[:, : position + 1], other[:, : position + 1])
    assert not torch.allclose(whole[:, position + 1 :], other[:, position + 1 :])


@pytest.mark.parametrize("make", [one_level, two_levels])
def test_it_learns_a_few_index_maps_and_draws_them(make):
    prior = make()
    maps = drawn_indices(prior, 3)
    loss = train(prior, lambda: -prior.log_prob(maps).mean(), 150, 1e-2)
    # No distribution gives three maps more than a third each.
    assert math.log(3) - 1e-3 < loss < math.log(3) + 0.1
    drawn = prior.sample_indices(30, generator=torch.Generator().manual_seed(0))
    known = {tuple(torch.cat([level[i].flatten() for level in maps]).tolist()) for i in range(3)}
    found = [tuple(torch.cat([level[i].flatten() for level in drawn]).tolist()) for i in range(30)]
    assert sum(indices in known for indices in found) >= 25
    assert known <= set(found)


def test_it_learns_which_map_is_of_which_class():
    prior = one_level(num_classes=3)
    maps, label = drawn_indices(prior, 3)[0], torch.arange(3)
    assert train(prior, lambda: -prior.log_prob(maps, label).mean(), 120, 1e-2) < 0.1
    drawn = prior.sample_indices(4, LABEL, temperature=0)[0]
    assert torch.equal(drawn, maps[LABEL])


@EACH_KIND
def test_it_overfits_64_images_and_leaves_the_vqvae_alone(make, size):
    prior, x = make(), images(size, 4).repeat(16, 1, 1, 1)
    frozen = {name: tensor.clone() for name, tensor in prior.vqvae.state_dict().items()}
    prior.train()
    first = prior(x).loss.item()
    assert train(prior, lambda: prior(x).loss, 40, 1e-2) < 0.7 * first
    assert not prior.vqvae.training
    assert not [name for name, p in prior.vqvae.named_parameters() if p.requires_grad or p.grad is not None]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in prior.vqvae.state_dict().items())


@EACH_KIND
def test_samples_are_images_that_the_generator_decides(make, size):
    prior = make().train()
    drawn = [prior.sample(4, generator=torch.Generator().manual_seed(3), top_k=4) for _ in range(2)]
    assert drawn[0].shape == (4, 1, *size)
    assert torch.equal(*drawn)
    assert prior.training
    assert not drawn[0].requires_grad


def test_draws_have_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2)):
        scaled = logits[0] / temperature
        expected = scaled.masked_fill(scaled < scaled.topk(top_k or 4).values[-1], -torch.inf).softmax(0)
        counts = torch.bincount(draw(logits, generator, temperature, top_k), minlength=4) / len(logits)
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.01)
    assert (draw(logits, None, 0.0) == 2).all()


@EACH_KIND
def test_the_state_holds_the_vqvae_too(make, size):
    prior, other, x = make(), make(), images(size)
    train(prior, lambda: prior(x).loss, 2, 1e-2)
    with torch.no_grad():
        next(prior.vqvae.parameters()).add_(0.1)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.eval()(x).loss, prior.eval()(x).loss)


@pytest.mark.parametrize("kind", [VQVAE, VQVAE2])
def test_it_is_stored_with_its_vqvae(kind, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    shape, x = ((2, 4) if kind is VQVAE else ((1, 2), (2, 4))), images((8, 16))
    prior = IndexPrior.transformer(kind.conv(1, **SMALL), shape, **TINY, dropout=0.1)
    prior.save_pretrained(tmp_path)
    loaded = IndexPrior.from_pretrained(tmp_path)
    assert type(loaded.vqvae) is kind
    assert loaded.latent_shape == shape
    assert torch.equal(loaded(x).loss, prior.eval()(x).loss)
    assert torch.equal(loaded.sample(2, temperature=0), prior.sample(2, temperature=0))


def test_a_prior_that_was_trained_on_a_checkpoint_needs_its_own_alone(tmp_path):
    for package in ("lightning", "jsonargparse", "sklearn", "PIL"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")
    from _training import quiet_trainer

    from fastvae.training import checkpoints, latents, networks
    from fastvae.training.datasets import PhotographPatches
    from fastvae.training.module import LitAutoencoder

    def fit(network: nn.Module, name: str):
        data, lit = PhotographPatches(size=16, batch_size=4), LitAutoencoder(network)
        trainer = quiet_trainer(max_steps=2, limit_val_batches=1, enable_checkpointing=False, default_root_dir=tmp_path)
        trainer.fit(lit, datamodule=data)
        trainer.save_checkpoint(tmp_path / name)
        return lit, data

    fit(VQVAE.conv(3, **SMALL), "vqvae.ckpt")
    _, data = fit(networks.index_prior(tmp_path / "vqvae.ckpt", [4, 4], **TINY), "prior.ckpt")
    (tmp_path / "vqvae.ckpt").unlink()
    lit = checkpoints.load(tmp_path / "prior.ckpt")
    x = data.samples("test", 3)["x"]
    assert latents.sample(lit, 2, seed=0).shape == (2, 3, 16, 16)
    assert latents.encode(lit, x)[0].shape == (3, 4, 4)
    assert torch.equal(latents.reconstruct(lit, x), lit.network.vqvae.reconstruct(x))
    assert latents.can_sample(lit.network)
    assert not latents.is_continuous(lit.network)


# A compiler takes half a minute for a kind, and this one has what the others have.
OFTEN = "two_levels"


@pytest.mark.parametrize("kind", brief(KINDS, [OFTEN]))
def test_the_loss_compiles(kind):
    torch.compiler.reset()
    make, size = kind
    prior, x = make(num_classes=3), images(size)
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    output = compiled(x, LABEL)
    torch.testing.assert_close(output.loss, prior(x, LABEL).loss)
    output.loss.backward()
    assert prior.positions.grad.abs().sum() > 0


@EACH_KIND
def test_bfloat16(make, size):
    prior = make(dropout=0.1)
    indices = drawn_indices(prior, 4)
    expected = prior.eval().log_prob(indices)
    prior = prior.bfloat16()
    log_prob = prior.log_prob(indices)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, expected, rtol=2e-2, atol=0)
    prior.train()(images(size).bfloat16()).loss.backward()
    assert prior.sample(2).dtype == torch.bfloat16


def test_it_runs_without_data():
    with FakeTensorMode():
        prior = one_level()
        output = prior(torch.rand(5, 1, 8, 12))
        output.loss.backward()
    assert output.logits[0].shape == (5, 6, 8)


BAD = {
    "vqvae": (lambda: IndexPrior(VAE.conv(), (2, 2)), TypeError, "vqvae: got VAE, takes a VQVAE or a VQVAE2"),
    "quantizer": (
        lambda: IndexPrior(VQVAE(nn.Identity(), nn.Identity(), nn.Identity()), (2, 2)),
        TypeError,
        "quantizer: got Identity, takes a VectorQuantizer or",
    ),
    "depth": (lambda: IndexPrior(VQVAE.conv(1, **SMALL), (2, 2), depth=0), ValueError, "depth: got 0, takes an integer >= 1"),
    "one shape": (lambda: IndexPrior(VQVAE.conv(1, **SMALL), ((2, 2), (4, 4))), ValueError, "index_shape: got .* takes a shape"),
    "two shapes": (lambda: IndexPrior(VQVAE2.conv(1, **SMALL), (2, 2)), ValueError, "index_shape: got .* the shapes of top and bottom"),
    "size": (lambda: IndexPrior(VQVAE.conv(1, **SMALL), (2, 0)), ValueError, r"index_shape: got \(2, 0\), takes a shape of integers >= 1"),
    "heads": (lambda: IndexPrior(VQVAE.conv(1, **SMALL), (2, 2), heads=3), ValueError, "heads: got 3, takes a divisor of width, 128"),
    "classes": (lambda: one_level(num_classes=0), ValueError, "num_classes: got 0, takes"),
    "image": (lambda: one_level()(images((8, 8))), ValueError, r"index_shape: got \(2, 3\) for indices of shape \(2, 2\)"),
    "no label": (lambda: one_level(num_classes=3)(images((8, 12))), ValueError, "label: got None, takes 4 integers below num_classes, 3"),
    "label": (lambda: one_level().sample(4, LABEL), ValueError, "label: got one, takes None for a prior without num_classes"),
    "label dtype": (lambda: one_level(num_classes=3)(images((8, 12)), LABEL.float()), ValueError, "label: got torch.float32 of shape"),
    "label shape": (lambda: one_level(num_classes=3).sample(2, LABEL), ValueError, "label: got torch.int64 of shape"),
    "temperature": (lambda: one_level().sample(1, temperature=-1.0), ValueError, "temperature: got -1.0, takes a number >= 0"),
    "top_k": (lambda: one_level().sample(1, top_k=0), ValueError, "top_k: got 0, takes an integer >= 1 or None"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
