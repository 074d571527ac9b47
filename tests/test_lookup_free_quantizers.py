"""Quantizers without a codebook that learns, LFQ, BSQ and FSQ: vector-quantize-pytorch's classes are the oracle."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from fastvae import nn as fnn

SHAPES = {"sequence": (3, 40), "image": (3, 5, 8), "video": (2, 3, 4, 5)}


@pytest.fixture
def library(monkeypatch):
    """The original, whose logarithm of a probability begins at 1e-5; here at the smallest number, so that its entropies are exact too."""
    package = pytest.importorskip("vector_quantize_pytorch", reason="a comparison, not a dependency")
    tiny = torch.finfo(torch.float32).tiny
    monkeypatch.setattr(package.lookup_free_quantization, "log", lambda t: t.clamp(min=tiny).log())
    return package


def pair(ours, theirs, *arguments, **options) -> tuple[nn.Module, nn.Module]:
    """Both made from the same seed, and with the same state, which either loads from the other."""
    made = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        made.append(kind(*arguments, **options))
    states = [module.state_dict() for module in made]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    for module, state in zip(made, reversed(states), strict=True):
        module.load_state_dict(state)
    return tuple(made)


def vectors(shape: tuple[int, ...], dim: int, channels_first: bool, seed: int = 1) -> torch.Tensor:
    x = torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed))
    return x.movedim(-1, 1) if channels_first else x


# The original multiplies by an inverse temperature of 100 before its softmax: its logits are thousands, and rounded to a part in 10^7.
OF_LARGE_LOGITS = {"rtol": 1e-3, "atol": 1e-4}


def assert_same_call(modules, x: torch.Tensor, rtol: float = 2e-5, atol: float = 2e-6, **options) -> None:
    """Quantized vectors and indices to the last bit, losses and gradients to rounding."""
    gradients, results = [], []
    for module in modules:
        module.zero_grad()
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        (quantized, indices, *aux), losses = with_losses(module(leaf, **options))
        objective = quantized.pow(3).mean() + sum(loss.sum() for loss in aux)
        if objective.requires_grad:
            objective.backward()
        results.append((quantized, indices, *aux, *losses))
        gradients.append([leaf.grad, *(p.grad for p in module.parameters())])
    ours, theirs = results
    assert (ours[0].shape, ours[0].dtype) == (theirs[0].shape, theirs[0].dtype)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].dtype == theirs[1].dtype
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip((*ours[2:], *gradients[0]), (*theirs[2:], *gradients[1]), strict=True):
        if not a is b is None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def with_losses(results):
    """The results of a call, and the losses where it returns those too."""
    return results if isinstance(results[0], tuple) else (results, ())


LFQ_OPTIONS = [
    {"dim": 6},
    {"codebook_size": 32},
    {"dim": 10, "codebook_size": 64},
    {"dim": 10, "codebook_size": 64, "projection_has_bias": False},
    {"dim": 6, "has_projections": True},
    {"dim": 12, "codebook_size": 16, "num_codebooks": 3},
    {"dim": 7, "codebook_size": 16, "num_codebooks": 2, "commitment_loss_weight": 0.25},
    {"dim": 6, "keep_num_codebooks_dim": True},
    {"dim": 5, "entropy_loss_weight": 0.3, "diversity_gamma": 2.5, "commitment_loss_weight": 0.7},
    {"dim": 5, "codebook_scale": 0.5, "commitment_loss_weight": 0.1},
    {"dim": 5, "soft_clamp_input_value": 1.5},
    {"dim": 5, "straight_through_activation": nn.Tanh()},
    {"dim": 6, "orthogonal_rotation": True, "commitment_loss_weight": 0.2},
    {"dim": 6, "spherical": True, "commitment_loss_weight": 0.2},
    {"dim": 8, "codebook_size": 16, "num_codebooks": 2, "spherical": True, "codebook_scale": 2.0, "orthogonal_rotation": True},
]
each_lfq = pytest.mark.parametrize("options", LFQ_OPTIONS, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES)


@each_lfq
@each_shape
@pytest.mark.parametrize("training", [True, False])
def test_lfq_is_the_original(library, options, shape, training):
    ours, theirs = (module.train(training) for module in pair(fnn.LFQ, library.LFQ, **options))
    x = vectors(SHAPES[shape], ours.dim, channels_first=len(SHAPES[shape]) > 2)
    assert_same_call((ours, theirs), x, inv_temperature=3.0, return_loss_breakdown=True)
    assert_same_call((ours, theirs), x, **OF_LARGE_LOGITS)
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=0, atol=0)
    assert (ours.codebook_size, ours.codebook_dim) == (theirs.codebook_size, theirs.codebook_dim)


@each_lfq
@each_shape
def test_codes_of_indices_are_those_of_the_original(library, options, shape):
    ours, theirs = (module.eval() for module in pair(fnn.LFQ, library.LFQ, **options))
    x = vectors(SHAPES[shape], ours.dim, channels_first=len(SHAPES[shape]) > 2)
    quantized, indices, _ = ours(x)
    for project_out in (True, False):
        torch.testing.assert_close(ours.indices_to_codes(indices, project_out), theirs.indices_to_codes(indices, project_out))
    torch.testing.assert_close(ours.indices_to_codes(indices), quantized)


@pytest.mark.parametrize("channel_first", [True, False])
def test_where_the_channels_are_can_be_said(library, channel_first):
    modules = pair(fnn.LFQ, library.LFQ, dim=6, channel_first=channel_first)
    assert_same_call(modules, vectors((3, 9), 6, channel_first), inv_temperature=3.0)
    torch.testing.assert_close(*(m.indices_to_codes(torch.arange(18).view(2, 9)) for m in modules))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("codebooks", [1, 2])
def test_masked_vectors_are_absent_from_the_losses(library, spherical, codebooks):
    """The losses are the original's of the vectors that are left; the original's own mask mixes up vectors and codebooks."""
    options = {"dim": 8, "codebook_size": 16, "num_codebooks": codebooks, "commitment_loss_weight": 0.3, "spherical": spherical}
    ours, theirs = pair(fnn.LFQ, library.LFQ, **options)
    mask, x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6, vectors((3, 40), 8, False)
    leaves = [x.clone().requires_grad_(), x[mask][None].requires_grad_()]
    (all_of_them, losses), (kept, expected) = (
        module(leaf, inv_temperature=2.0, return_loss_breakdown=True, mask=m)
        for module, leaf, m in zip((ours, theirs), leaves, (mask, None), strict=True)
    )
    torch.testing.assert_close(tuple(losses), tuple(expected))
    for output in (all_of_them, kept):
        output.entropy_aux_loss.backward()
    torch.testing.assert_close(leaves[0].grad[mask], leaves[1].grad[0], rtol=2e-5, atol=2e-6)
    assert not leaves[0].grad[~mask].any()
    assert torch.equal(all_of_them.indices, ours(x).indices)


def test_a_mask_of_images_has_their_positions():
    layer, x, mask = fnn.LFQ(dim=4), vectors((3, 5, 8), 4, True), torch.rand(3, 5, 8) < 0.5
    losses = [layer(x, return_loss_breakdown=True, mask=m)[1] for m in (mask, mask.flatten(1))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    sequence = layer(x.flatten(2).transpose(1, 2), return_loss_breakdown=True, mask=mask.flatten(1))[1]
    torch.testing.assert_close(losses[0], sequence)


def test_the_original_as_it_is_differs_by_its_logarithm():
    """No probability below 1e-5 adds more than its p log(1e-5 / p), at most 1e-5 / e."""
    package = pytest.importorskip("vector_quantize_pytorch", reason="a comparison, not a dependency")
    modules = pair(fnn.LFQ, package.LFQ, dim=7)
    x = vectors((3, 40), 7, False)
    (_, ours), (_, theirs) = (module(x, inv_temperature=2.0, return_loss_breakdown=True) for module in modules)
    for a, b in zip(ours, theirs, strict=True):
        assert 0 <= a - b + 1e-6 <= 2**7 * 1e-5 / math.e
    assert not torch.equal(ours.per_sample_entropy, theirs.per_sample_entropy)


def test_bsq_is_the_spherical_lfq(library):
    modules = pair(fnn.BSQ, lambda **options: library.LFQ(spherical=True, **options), dim=9, commitment_loss_weight=0.2)
    assert_same_call(modules, vectors((3, 40), 9, False), inv_temperature=3.0, return_loss_breakdown=True)
    quantized = modules[0].eval()(vectors((3, 40), 9, False)).quantized
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(3, 40))
    with pytest.raises(TypeError, match="spherical: not an option of BSQ"):
        fnn.BSQ(dim=4, spherical=False)


FSQ_OPTIONS = [
    {"levels": [8, 5, 5]},
    {"levels": (7, 3)},
    {"levels": [5, 4, 3], "dim": 8},
    {"levels": [5, 4, 3], "dim": 8, "projection_has_bias": False},
    {"levels": [5, 4], "num_codebooks": 3},
    {"levels": [5, 4], "num_codebooks": 2, "dim": 7},
    {"levels": [5, 4], "keep_num_codebooks_dim": True},
    {"levels": [8, 5, 2], "preserve_symmetry": True},
    {"levels": [5, 5], "preserve_symmetry": True, "noise_dropout": 0.5},
    {"levels": [8, 5], "bound_hard_clamp": True},
    {"levels": [8, 5], "bound_hard_clamp": True, "preserve_symmetry": True},
    {"levels": [5, 5, 5], "orthogonal_rotation": True},
    {"levels": [1000, 9]},
]
each_fsq = pytest.mark.parametrize("options", FSQ_OPTIONS, ids=str)


@each_fsq
@each_shape
@pytest.mark.parametrize("training", [True, False])
def test_fsq_is_the_original(library, options, shape, training):
    ours, theirs = (module.train(training) for module in pair(fnn.FSQ, library.FSQ, **options))
    x = 3 * vectors(SHAPES[shape], ours.dim, channels_first=len(SHAPES[shape]) > 2)
    assert_same_call((ours, theirs), x)
    assert torch.equal(ours.implicit_codebook, theirs.implicit_codebook)
    indices = ours(x)[1]
    torch.testing.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    assert torch.equal(ours.indices_to_level_indices(indices), theirs.indices_to_level_indices(indices))
    if not training:
        torch.testing.assert_close(ours.indices_to_codes(indices), ours(x)[0])


def test_fsq_with_channels_first_and_without_indices(library):
    modules = pair(fnn.FSQ, library.FSQ, [5, 4], channel_first=True, return_indices=False)
    x = vectors((3, 9), 2, True)
    (ours, none), (theirs, _) = (module(x) for module in modules)
    assert torch.equal(ours, theirs)
    assert none is None


def test_fsq_numbers_codes_exactly_beyond_what_float32_counts():
    layer = fnn.FSQ([999, 999, 999, 2], preserve_symmetry=True)
    levels = torch.stack([torch.randint(0, n, (1000,), generator=torch.Generator().manual_seed(n)) for n in (999, 998, 997, 2)], -1)
    indices = (levels * torch.tensor([1, 999, 999**2, 999**3])).sum(-1)
    codes = levels * (2.0 / (torch.tensor(layer.levels) - 1)) - 1.0
    assert torch.equal(layer.codes_to_indices(codes).long(), indices)
    assert torch.equal(layer.indices_to_level_indices(indices), levels)


@pytest.mark.parametrize("autocast", [False, True])
def test_fsq_uses_all_codes_for_16_bit_vectors(autocast):
    layer = fnn.FSQ([8, 5, 5, 5])
    x = 2 * vectors((1, 40_000), 4, False).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        quantized, indices = layer(x)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(indices, layer(x.float())[1])
    assert len(indices.unique()) == layer.codebook_size
    # The numbers of the codes in bfloat16, which counts to 256.
    steps = layer.indices_to_level_indices(indices).bfloat16()
    assert len((steps * torch.tensor([1, 8, 40, 200])).sum(-1).unique()) < layer.codebook_size


KINDS = {
    "LFQ": lambda **options: fnn.LFQ(dim=6, codebook_size=16, commitment_loss_weight=0.2, **options),
    "BSQ": lambda **options: fnn.BSQ(dim=6, codebook_size=16, commitment_loss_weight=0.2, **options),
    "FSQ": lambda **options: fnn.FSQ([5, 4, 3], dim=6, **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_modules_in_other_dtypes_train(kind, dtype):
    torch.manual_seed(0)
    layer = KINDS[kind](orthogonal_rotation=True).to(dtype)
    x = torch.randn(4, 30, 6, dtype=dtype, requires_grad=True)
    quantized, indices, *loss = layer(x)
    sum([quantized.float().square().mean(), *loss]).backward()
    assert quantized.dtype == x.grad.dtype == dtype
    assert all(value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for value in loss)
    assert x.grad.isfinite().all()
    layer.eval()
    quantized, indices, *_ = layer(x)
    codes = layer.indices_to_codes(indices)
    assert codes.dtype == dtype
    torch.testing.assert_close(codes, quantized, rtol=2e-2, atol=2e-2)


@each_kind
def test_under_autocast_entropies_are_those_of_float32(kind):
    torch.manual_seed(0)
    layer = KINDS[kind]()
    x = torch.randn(4, 30, 6)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices, *loss = layer(x)
    projected = layer.project_in.bfloat16()(x.bfloat16())
    layer.project_in, layer.dim = nn.Identity(), projected.shape[-1]
    expected = layer(projected.float())
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(loss, list(expected[2:]))
    assert quantized.dtype == torch.bfloat16


@each_kind
def test_a_compiled_layer_gives_the_same(kind):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer, x = KINDS[kind](), torch.randn(4, 30, 6)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call, module in ((compiled, layer), (other, other)):
        leaf = x.clone().requires_grad_()
        quantized, indices, *loss = call(leaf)
        sum([quantized.pow(3).mean(), *loss]).backward()
        results.append([quantized, indices, *loss, leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[0], results[1])


@each_kind
def test_a_checkpointed_layer_has_the_gradients(kind):
    torch.manual_seed(0)
    layer, x = KINDS[kind](), torch.randn(4, 30, 6)
    twin = copy.deepcopy(layer)

    def loss(module, x):
        quantized, _, *aux = module(x)
        return sum([quantized.pow(3).mean(), *aux])

    loss(layer, x).backward()
    torch.utils.checkpoint.checkpoint(loss, twin, x, use_reentrant=False).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


@each_kind
def test_a_layer_is_exported_and_saved(kind):
    layer, x = KINDS[kind]().eval(), torch.randn(4, 30, 6)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(tuple(torch.export.load(file).module()(x)), tuple(layer(x)))


def test_nan_is_left_out_by_a_mask_and_seen_without():
    layer, x = fnn.LFQ(dim=5, commitment_loss_weight=0.5), vectors((2, 20), 5, False)
    spoiled, mask = x.clone(), torch.ones(2, 20, dtype=torch.bool)
    spoiled[0, 3, 2], mask[0, 3] = math.nan, False
    spoiled.requires_grad_()
    output, losses = layer(spoiled, return_loss_breakdown=True, mask=mask)
    torch.testing.assert_close(losses, layer(x, return_loss_breakdown=True, mask=mask)[1])
    output.entropy_aux_loss.backward()
    assert spoiled.grad.isfinite().all()
    assert not spoiled.grad[0, 3].any()
    assert layer(spoiled).entropy_aux_loss.isnan()
    indices = layer.eval()(spoiled).indices
    assert indices[0, 3] == layer(spoiled.nan_to_num(-1.0)).indices[0, 3]


def test_fsq_counts_nan_as_the_lowest_level():
    layer, z = fnn.FSQ([5, 4, 3]), torch.zeros(1, 1, 3)
    z[..., 1] = math.nan
    quantized, indices = layer(z)
    assert quantized.isnan().tolist() == [[[False, True, False]]]
    assert layer.indices_to_level_indices(indices).tolist() == [[[2, 0, 1]]]
    extremes = torch.tensor([[[-math.inf] * 3, [math.inf] * 3]])
    assert layer.indices_to_level_indices(layer(extremes)[1]).tolist() == [[[0, 0, 0], [4, 3, 2]]]


@pytest.mark.parametrize("positions", [0, 20], ids=["no vectors", "an empty mask"])
def test_no_vectors_have_no_loss(positions):
    layer, x = fnn.LFQ(dim=5, commitment_loss_weight=0.5), torch.randn(2, positions, 5, requires_grad=True)
    output, losses = layer(x, return_loss_breakdown=True, mask=torch.zeros(2, positions, dtype=torch.bool))
    assert all(loss == 0 for loss in (output.entropy_aux_loss, *losses))
    output.entropy_aux_loss.backward()
    assert not x.grad.any()


def step_in_rank(rank, options, x):
    """Losses and gradients of a step on a rank's share of the batch, averaged as DistributedDataParallel does."""
    torch.manual_seed(0)
    layer = fnn.LFQ(**options)
    output, losses = layer(x[rank], return_loss_breakdown=True)
    (output.entropy_aux_loss + output.quantized.pow(3).mean()).backward()
    layer.eval()(x[rank][: rank + 1])
    return [loss.detach() for loss in losses], [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("spherical", [False, True])
def test_two_ranks_learn_as_one(ranks, spherical):
    options = {"dim": 6, "codebook_size": 16, "num_codebooks": 2, "spherical": spherical, "diversity_gamma": 2.0}
    x = vectors((2, 3, 20), 6, False)
    results = ranks.run(step_in_rank, options, x)
    losses, gradients = step_in_rank(0, options, [x.flatten(0, 1)])
    per_sample, batch, _ = (torch.stack(parts) for parts in zip(*(result[0] for result in results), strict=True))
    torch.testing.assert_close(per_sample.mean(), losses[0])
    torch.testing.assert_close(batch, losses[1].expand(2))
    for one, *both in zip(gradients, *(result[1] for result in results), strict=True):
        torch.testing.assert_close(torch.stack(both).mean(0), one)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fnn.LFQ(), ValueError, "codebook_size: got None, takes a power of 2 where dim is not given"),
        (lambda: fnn.LFQ(codebook_size=100), ValueError, "codebook_size: got 100, takes a power of 2"),
        (lambda: fnn.LFQ(dim=25), ValueError, "dim: got 25, takes 1 to 24 bits a code; several codebooks"),
        (lambda: fnn.LFQ(codebook_size=2**25), ValueError, "codebook_size: got 33554432, takes 1 to 24 bits a code"),
        (lambda: fnn.LFQ(dim=4, codebook_scale=0), ValueError, "codebook_scale: got 0, takes a finite number > 0"),
        (lambda: fnn.LFQ(dim=4, commitment_loss_weight=-1.0), ValueError, "commitment_loss_weight: got -1.0, takes a number >= 0"),
        (lambda: fnn.LFQ(dim=4, soft_clamp_input_value=0.5), ValueError, "soft_clamp_input_value: got 0.5, takes at least codebook_scale"),
        (lambda: fnn.LFQ(dim=4, num_codebooks=0), ValueError, "num_codebooks: got 0, takes at least 1"),
        (lambda: fnn.LFQ(dim=5, codebook_size=16, has_projections=False), ValueError, "has_projections: got False for dim 5"),
        (lambda: fnn.LFQ(codebook_size=16, num_codebooks=2, keep_num_codebooks_dim=False), ValueError, "keep_num_codebooks_dim: got False"),
        (lambda: fnn.LFQ(dim=4, frac_per_sample_entropy=0.5), NotImplementedError, "frac_per_sample_entropy: got 0.5, LFQ takes 1.0"),
        (lambda: fnn.BSQ(dim=4, cosine_sim_project_in=True), NotImplementedError, "cosine_sim_project_in: got True, BSQ takes False"),
        (lambda: fnn.LFQ(dim=4, codebook=3), TypeError, "LFQ got an unexpected keyword argument 'codebook'"),
        (lambda: fnn.LFQ(dim=4)(torch.zeros(2, 3, 5)), ValueError, "x: got 5 channels, takes dim, 4"),
        (lambda: fnn.LFQ(dim=4)(torch.zeros(4)), ValueError, r"x: got shape \(4,\), takes at least two dimensions"),
        (lambda: fnn.LFQ(dim=4)(torch.zeros(2, 3, 4), mask=torch.ones(2, 4).bool()), ValueError, r"mask: got torch.bool of shape \(2, 4\)"),
        (lambda: fnn.LFQ(dim=4)(torch.zeros(2, 3, 4), mask=torch.ones(2, 3)), ValueError, "mask: got torch.float32 of shape"),
        (lambda: fnn.FSQ([]), ValueError, r"levels: got \[\], takes one or more of 3 to 1000"),
        (lambda: fnn.FSQ([5, 2]), ValueError, r"levels: got \[5, 2\], takes one or more of 3 to 1000; with preserve_symmetry any from 2"),
        (lambda: fnn.FSQ([1001]), ValueError, r"levels: got \[1001\], takes one or more of 3 to 1000"),
        (lambda: fnn.FSQ([1000] * 4), ValueError, r"levels: got .*, 1000000000000 codes, takes at most 2147483647"),
        (lambda: fnn.FSQ([5], noise_dropout=0.5), ValueError, "noise_dropout: got 0.5, takes a number in .*, and 0 without"),
        (lambda: fnn.FSQ([5], scale=2.0), NotImplementedError, "scale: got 2.0, FSQ takes None"),
        (lambda: fnn.FSQ([5, 5]).codes_to_indices(torch.zeros(3)), ValueError, "zhat: got 3 values a code, takes 2"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_options_that_are_switched_off_are_taken():
    fnn.LFQ(dim=4, frac_per_sample_entropy=1.0, force_quantization_f32=True)
    fnn.FSQ([5], scale=None, allowed_dtypes=(torch.float32, torch.float64))
    assert "dim=4, codebook_size=16, entropy_loss_weight=0.1" in repr(fnn.LFQ(dim=4))
    assert "levels=(5,), dim=1" in repr(fnn.FSQ([5]))
