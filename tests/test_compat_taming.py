"""The quantizer of taming-transformers against its formula, and the patch of models that hold the original."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastvae import compat
from fastvae.compat import patch_taming

CODES, DIM, BETA = 12, 4, 0.25
USED = [7, 2, 9, 4, 0]
REMAPS = [None, "random", "extra", 3]
# In bfloat16 the formula rounds each of the two gradients of z, of about 0.03, before it adds them.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2**-13},
    torch.int64: {"rtol": 0, "atol": 0},
}


class VectorQuantizer2(nn.Module):
    """The formula in float64, with the matrix of all distances, under the original's name and attributes."""

    def __init__(self, used=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy, self.sane_index_shape = CODES, DIM, BETA, legacy, sane_index_shape
        self.embedding = nn.Embedding(CODES, DIM)
        self.remap, self.re_embed = used, CODES
        if used is not None:
            self.register_buffer("used", torch.tensor(used))
            self.unknown_index, self.re_embed = unknown_index, len(used)
            if unknown_index == "extra":
                self.unknown_index, self.re_embed = len(used), len(used) + 1

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        pixels = z.movedim(1, -1)
        rows, weight = pixels.reshape(-1, DIM).double(), self.embedding.weight.double()
        indices = (rows.square().sum(1, keepdim=True) + weight.square().sum(1) - 2 * rows @ weight.T).argmin(1)
        codes = self.embedding(indices)
        weights = (1.0, BETA) if self.legacy else (BETA, 1.0)
        loss = weights[0] * (rows - codes.detach()).square().mean() + weights[1] * (rows.detach() - codes).square().mean()
        z_q = (pixels + (codes.view(pixels.shape) - pixels).detach()).movedim(-1, 1).contiguous()
        shape = (len(z), *z.shape[2:]) if self.sane_index_shape else (-1,) if self.remap is None else (-1, 1)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        return z_q, loss.to(z_q.dtype), (None, None, indices.view(shape))

    def remap_to_used(self, inds):
        indices = inds.flatten().tolist()
        count = sum(index not in self.remap for index in indices)
        others = torch.randint(self.re_embed, (count,)).tolist() if self.unknown_index == "random" else [self.unknown_index] * count
        unknown = iter(others)
        return torch.tensor([self.remap.index(index) if index in self.remap else next(unknown) for index in indices]).view(inds.shape)


@pytest.fixture
def used_file(tmp_path):
    np.save(tmp_path / "used.npy", np.array(USED))
    return str(tmp_path / "used.npy")


def pair(used_file, remap=None, **options):
    """The twin and the formula, with one codebook."""
    torch.manual_seed(0)
    unknown = {} if remap is None else {"unknown_index": remap}
    ours = compat.VectorQuantizer2(CODES, DIM, BETA, None if remap is None else used_file, **unknown, **options)
    formula = VectorQuantizer2(None if remap is None else USED, **unknown, **options)
    formula.load_state_dict(ours.state_dict())
    return ours, formula


def images(*shape, **options):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / CODES).to(**options)


def results(quantizer, z):
    z = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(2)
    z_q, loss, (perplexity, encodings, indices) = quantizer(z)
    assert perplexity is None
    assert encodings is None
    gradients = torch.autograd.grad(loss + z_q.float().pow(3).sum(), [z, quantizer.embedding.weight])
    return [z_q.detach(), loss.detach(), indices, *gradients]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, **TOLERANCES[ours.dtype])


@pytest.mark.parametrize("remap", REMAPS)
@pytest.mark.parametrize("sane_index_shape", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_as_the_formula(used_file, remap, sane_index_shape, legacy):
    ours, formula = pair(used_file, remap, sane_index_shape=sane_index_shape, legacy=legacy)
    assert ours.state_dict().keys() == formula.state_dict().keys()
    assert ours.re_embed == formula.re_embed
    assert_same(results(ours, images(2, DIM, 3, 5)), results(formula, images(2, DIM, 3, 5)))


@pytest.mark.parametrize(
    "z",
    [
        images(2, DIM, 6, 5).contiguous(memory_format=torch.channels_last),
        images(2, 5, 6, DIM).transpose(1, 3),
        images(2, DIM, 1, 1),
        images(2, 2 * DIM, 3, 5),
        images(2, DIM, 3, 5, dtype=torch.bfloat16),
    ],
    ids=["channels_last", "transposed", "one pixel", "two codes a pixel", "bfloat16"],
)
def test_layouts_and_dtypes(used_file, z):
    ours, formula = pair(used_file)
    assert_same(results(ours, z), results(formula, z))


def test_in_float64(used_file):
    ours, formula = (quantizer.double() for quantizer in pair(used_file))
    z = images(2, DIM, 3, 5, dtype=torch.float64)
    for a, b in zip(results(ours, z), results(formula, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("remap", [None, "extra"])
def test_codes_of_indices(used_file, remap):
    quantizer, _ = pair(used_file, remap)
    with torch.no_grad():
        if remap:
            # All other codes are far, so that every index is in use.
            quantizer.embedding.weight[[i for i in range(CODES) if i not in USED]] += 100
        z_q, _, (_, _, indices) = quantizer(images(2, DIM, 3, 5))
    shape = (2, 3, 5, DIM)
    entry = quantizer.get_codebook_entry(indices.flatten(), shape)
    torch.testing.assert_close(entry, z_q)
    assert entry.is_contiguous()
    if remap:
        with pytest.raises(ValueError, match="shape: got None, takes"):
            quantizer.get_codebook_entry(indices, None)
    else:
        assert torch.equal(quantizer.get_codebook_entry(indices, None), quantizer.embedding(indices))


def test_places_and_indices(used_file):
    quantizer, _ = pair(used_file, "extra")
    indices = torch.tensor([[[7, 2], [9, 1]], [[4, 0], [11, 7]]])
    places = quantizer.remap_to_used(indices)
    assert places.tolist() == [[[0, 1], [2, 5]], [[3, 4], [5, 0]]]
    assert quantizer.unmap_to_all(places).tolist() == [[[7, 2], [9, 7]], [[4, 0], [7, 7]]]
    # They are read alone.
    assert indices.tolist() == [[[7, 2], [9, 1]], [[4, 0], [11, 7]]]
    assert places.max() == 5
    for method in (quantizer.remap_to_used, quantizer.unmap_to_all):
        with pytest.raises(ValueError, match=r"inds: got shape \(3,\), takes \(batch, \.\.\.\)"):
            method(torch.arange(3))


def test_errors(used_file):
    quantizer, _ = pair(used_file)
    z = images(2, DIM, 3, 5)
    quantizer(z, temp=1.0)
    with pytest.raises(ValueError, match=r"temp: got 0\.5, takes None or 1\.0"):
        quantizer(z, temp=0.5)
    with pytest.raises(ValueError, match="rescale_logits: got True, takes False"):
        quantizer(z, rescale_logits=True)
    with pytest.raises(ValueError, match="return_logits: got True, takes False"):
        quantizer(z, return_logits=True)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 3, 4, 5\), takes .* a multiple of 4 channels"):
        quantizer(images(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"z: got shape \(4, 3, 5\)"):
        quantizer(z[0])
    with pytest.raises(ValueError, match="unknown_index: got 'none', takes 'random', 'extra' or an integer"):
        compat.VectorQuantizer2(CODES, DIM, BETA, used_file, unknown_index="none")


# The patch


class Model(nn.Module):
    """As latent-diffusion has it."""

    def __init__(self, quantizer):
        super().__init__()
        self.quant_conv, self.quantize = nn.Conv2d(3, DIM, 1), quantizer

    def forward(self, x):
        return self.quantize(self.quant_conv(x))


def patched_pair(**options):
    torch.manual_seed(0)
    original = Model(VectorQuantizer2(**options))
    return patch_taming(copy.deepcopy(original)), original


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"used": USED, "unknown_index": "random", "sane_index_shape": True}], ids=str)
def test_a_patched_model_gives_the_same(options):
    patched, original = patched_pair(**options)
    assert patched.state_dict().keys() == original.state_dict().keys()
    z = images(2, DIM, 3, 5)
    assert_same(results(patched.quantize, z), results(original.quantize, z))
    with pytest.raises(ValueError, match="temp: got 2"):
        patched.quantize(z, temp=2)


def test_a_patched_quantizer_stays_what_it_is():
    model, calls = Model(VectorQuantizer2()), []
    quantizer, weight = model.quantize, model.quantize.embedding.weight
    quantizer.register_forward_hook(lambda *_: calls.append(1))
    lines = []
    assert patch_taming(model, report=lines.append) is model
    assert lines == ["quantize runs on vector_quantize"]
    assert model.quantize is quantizer
    assert quantizer.embedding.weight is weight
    assert isinstance(quantizer, VectorQuantizer2)
    assert type(quantizer).__name__ == "VectorQuantizer2"
    x = torch.randn(2, 3, 4, 4)
    model(x)
    assert calls == [1]
    before = type(quantizer)
    patch_taming(model, report=lines.append)
    assert (type(quantizer), len(lines)) == (before, 1)
    quantizer._forward_hooks.clear()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.quantize) is before
        assert torch.equal(copied(x)[0], model(x)[0])


def test_a_twin_needs_no_patch():
    lines, twin = [], compat.VectorQuantizer2(CODES, DIM, BETA)
    assert patch_taming(Model(twin), report=lines.append).quantize is twin
    assert (lines, type(twin)) == ([], compat.VectorQuantizer2)


def test_a_quantizer_with_more_to_it_is_left_alone():
    model = Model(VectorQuantizer2())
    model.quantize.l2_norm = True
    lines = []
    patch_taming(model, report=lines.append)
    assert lines == ["left quantize: it has l2_norm, which VectorQuantizer2 has not"]
    assert type(model.quantize) is VectorQuantizer2


@pytest.mark.parametrize("before", [False, True])
def test_an_embedding_with_hooks_is_called(before):
    model, calls, lines = Model(VectorQuantizer2()), [], []
    if not before:
        patch_taming(model)
    model.quantize.embedding.register_forward_hook(lambda *_: calls.append(1))
    if before:
        patch_taming(model, report=lines.append)
        assert lines == ["left quantize: it has an embedding that has hooks"]
    model(torch.randn(2, 3, 4, 4))
    assert calls == [1]


def test_a_model_without_a_quantizer():
    with pytest.raises(ValueError, match="module: got a Linear without a VectorQuantizer2, takes a model of taming-transformers"):
        patch_taming(nn.Linear(2, 2))


def test_both_compile_whole():
    torch.compiler.reset()
    z = images(2, DIM, 3, 5)
    for quantizer in (compat.VectorQuantizer2(CODES, DIM, BETA), patch_taming(VectorQuantizer2())):
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(z), quantizer(z))
