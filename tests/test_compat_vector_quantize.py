"""patch_vector_quantize: a patched module against an unpatched copy of it, step by step, with the same random numbers."""

import copy
import inspect
import io
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvae import functional as FV
from fastvae.compat import patch_vector_quantize

library = pytest.importorskip("vector_quantize_pytorch", reason="a comparison, not a dependency")
from vector_quantize_pytorch import vector_quantize_pytorch as internals  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DIM, CODES, STEPS = 6, 20, 20
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# The original's rotation cancels digits where a vector points away from its code, or is short.
CLOSE_GRADIENTS = {"rtol": 1e-3, "atol": 1e-3}


def sequence(dtype=torch.float32, dim=DIM):
    return torch.randn(3, 40, dim, dtype=dtype)


def image():
    return torch.randn(3, DIM, 5, 8)


def volume():
    return torch.randn(3, DIM, 2, 4, 5)


def mask_of(x):
    return torch.arange(x.shape[1]) < torch.tensor([[40], [13], [27]])


class Original:
    """Counts the calls that run the original's code."""

    def __init__(self, monkeypatch):
        self.calls = 0
        original = internals.VectorQuantize.forward

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        # The patched class calls it by super(), which looks it up at each call.
        counted.__signature__ = inspect.signature(original)
        monkeypatch.setattr(internals.VectorQuantize, "forward", counted)


@pytest.fixture
def original(monkeypatch):
    return Original(monkeypatch)


def pair(make):
    """An unpatched module, and a patched copy of it."""
    torch.manual_seed(0)
    theirs = make()
    lines = []
    ours = patch_vector_quantize(copy.deepcopy(theirs), report=lines.append)
    assert lines
    assert all(line.startswith("patched ") for line in lines)
    return ours, theirs


def assert_equal(actual, expected, **tolerances):
    assert type(actual) is type(expected)
    if isinstance(actual, tuple | list):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b, **tolerances)
        return
    assert (actual.shape, actual.dtype, actual.requires_grad) == (expected.shape, expected.dtype, expected.requires_grad)
    assert actual.is_contiguous() or not expected.is_contiguous()
    if actual.is_floating_point():
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerances)
    else:
        assert torch.equal(actual, expected)


def step(module, optimizer, x, seed, arguments, backward):
    """The results, and the gradients of the input and of the parameters."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_() if backward else x.clone()
    results = module(x, **arguments(x) if callable(arguments) else arguments)
    terms = [t for t in (results[0], results[2]) if t.requires_grad]
    optimizer.zero_grad()
    if terms:
        sum((term.float() ** 2).sum() for term in terms).backward()
    gradients = [None if t.grad is None else t.grad.clone() for t in (x, *module.parameters())]
    optimizer.step()
    return results, gradients, torch.get_rng_state()


def compare(ours, theirs, make_x, arguments=None, backward=True, steps=STEPS, close=CLOSE, close_gradients=CLOSE_GRADIENTS):
    parameters = [list(module.parameters()) or [nn.Parameter(torch.zeros(()))] for module in (ours, theirs)]
    optimizers = [torch.optim.SGD(each, lr=1e-3) for each in parameters]
    for number in range(steps):
        torch.manual_seed(1000 + number)
        x = make_x()
        first, second = (
            step(module, optimizer, x, number, arguments or {}, backward)
            for module, optimizer in zip((ours, theirs), optimizers, strict=True)
        )
        assert_equal(first[0], second[0], **close)
        for a, b in zip(first[1], second[1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **close_gradients)
        # As many random numbers were drawn.
        assert torch.equal(first[2], second[2])
        assert_same_state(ours, theirs, **close)


def assert_same_state(ours, theirs, **tolerances):
    first, second = ours.state_dict(), theirs.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **tolerances)


HEADS = {"heads": 2, "codebook_dim": 3}
SEPARATE = {**HEADS, "separate_codebook_per_head": True}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
QUANTIZERS = {
    "euclidean": {},
    "straight through": {"rotation_trick": False, "decay": 0.95, "commitment_weight": 0.3},
    "cosine": {"use_cosine_sim": True},
    "cosine, straight through": {"use_cosine_sim": True, "rotation_trick": False},
    "no commitment": {"commitment_weight": 0.0},
    "shared heads": HEADS,
    "separate heads": SEPARATE,
    "cosine heads": {**SEPARATE, "use_cosine_sim": True},
    "shared cosine heads": {**HEADS, "use_cosine_sim": True},
    "k-means": {"kmeans_init": True, "kmeans_iters": 4},
    "k-means of heads": {"kmeans_init": True, "kmeans_iters": 4, **SEPARATE},
    "k-means by cosine": {"kmeans_init": True, "kmeans_iters": 4, "use_cosine_sim": True},
    "revival": {"threshold_ema_dead_code": 2},
    "revival of heads": {"threshold_ema_dead_code": 2, **SEPARATE},
    "revival by cosine": {"threshold_ema_dead_code": 2, "use_cosine_sim": True, "kmeans_init": True},
    "learnable": LEARNABLE,
    "learnable, straight through": {**LEARNABLE, "rotation_trick": False},
    "learnable heads": {**LEARNABLE, **SEPARATE},
    "learnable with revival": {**LEARNABLE, "threshold_ema_dead_code": 2},
    "synchronous update": {**LEARNABLE, "sync_update_v": 0.3, "route_gradients_to_input": False},
    "no route to the input": {**LEARNABLE, "route_gradients_to_input": False},
    "projection": {"codebook_dim": 3},
    "normalised projection": {"codebook_dim": 5, "layernorm_after_project_in": True, "use_cosine_sim": True},
    "frozen": {"freeze_codebook": True},
    "frozen and learnable": {"freeze_codebook": True, **LEARNABLE},
    "averages by hand": {"manual_ema_update": True},
    "orthogonal": {"orthogonal_reg_weight": 0.1},
    "orthogonal sample": {"orthogonal_reg_weight": 0.1, "orthogonal_reg_max_codes": 7, "orthogonal_reg_active_codes_only": True},
}


@pytest.mark.parametrize("backward", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_training(name, backward):
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, **QUANTIZERS[name]))
    compare(ours, theirs, sequence, backward=backward, steps=STEPS if backward else 3)
    ours.eval(), theirs.eval()
    compare(ours, theirs, sequence, backward=backward, steps=2)


LAYOUTS = {
    "channels first": ({"channel_last": False}, lambda: torch.randn(3, DIM, 40)),
    "images": ({"accept_image_fmap": True}, image),
    "images with heads": ({"accept_image_fmap": True, **SEPARATE}, image),
    "images with shared heads": ({"accept_image_fmap": True, **HEADS}, image),
    "channels-last images": ({"accept_image_fmap": True}, lambda: image().to(memory_format=torch.channels_last)),
    "volumes": ({"accept_3d_fmap": True}, volume),
    "one vector": ({}, lambda: torch.randn(30, DIM)),
    "one vector with heads": (HEADS, lambda: torch.randn(30, DIM)),
    "channels first with heads": ({"channel_last": False, **SEPARATE}, lambda: torch.randn(3, DIM, 40)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    options, make_x = LAYOUTS[name]
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, threshold_ema_dead_code=1, **options))
    compare(ours, theirs, make_x, steps=5)
    ours.eval(), theirs.eval()
    compare(ours, theirs, make_x, steps=1)
    indices = theirs(make_x())[1]
    assert_equal(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices), **CLOSE)


CALLS = {
    "mask": ({}, lambda x: {"mask": mask_of(x)}),
    "mask of padding": ({"return_zeros_for_masked_padding": False}, lambda x: {"mask": mask_of(x)}),
    "lens": ({}, lambda x: {"lens": torch.tensor([40, 13, 27])}),
    "mask and cosine": ({"use_cosine_sim": True}, lambda x: {"mask": mask_of(x)}),
    "mask, learnable": (LEARNABLE, lambda x: {"mask": mask_of(x)}),
    "mask, heads, no commitment": ({**SEPARATE, "commitment_weight": 0.0}, lambda x: {"mask": mask_of(x)}),
    "mask, shared heads, no commitment": ({**HEADS, "commitment_weight": 0.0}, lambda x: {"mask": mask_of(x)}),
    "mask and k-means": ({"kmeans_init": True}, lambda x: {"mask": mask_of(x)}),
    "mask and revival": ({"threshold_ema_dead_code": 2}, lambda x: {"mask": mask_of(x)}),
    "frozen": ({"kmeans_init": True}, {"freeze_codebook": True}),
    "loss breakdown": ({"orthogonal_reg_weight": 0.2}, {"return_loss_breakdown": True}),
    "no averages": ({}, {"ema_update": False}),
    "no averages with revival": ({"threshold_ema_dead_code": 2}, {"ema_update": False}),
    "weighted averages": ({}, {"ema_update_weight": torch.linspace(0, 1, CODES)}),
    "averages by a function": ({}, {"ema_update_weight": lambda total, count: (count > 3).float()}),
    "temperature": ({}, {"sample_codebook_temp": 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_a_call(name, original):
    options, arguments = CALLS[name]
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, **options))
    compare(ours, theirs, sequence, arguments, steps=5)
    assert original.calls == 5
    ours.eval(), theirs.eval()
    compare(ours, theirs, sequence, arguments, steps=2)


def test_accumulated_averages():
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES))
    for arguments in ({"accum_ema_update": True}, {"accum_ema_update": True}, {}):
        compare(ours, theirs, sequence, arguments, steps=1)
    ours._codebook.update_ema(), theirs._codebook.update_ema()
    assert_same_state(ours, theirs, **CLOSE)


# The original's update_indices raises for images and for single vectors with heads.
@pytest.mark.parametrize("name", ["channels first", "channels first with heads", "images", "channels-last images", "volumes", "one vector"])
def test_averages_by_given_indices(name):
    options, make_x = LAYOUTS[name]
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, threshold_ema_dead_code=1, **options))
    x = make_x()
    indices = theirs.eval()(x)[1]
    for quantizer in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        quantizer.update_ema_indices(x, indices)
    assert_same_state(ours, theirs, **CLOSE)


def test_averages_by_given_indices_of_masked_vectors():
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES))
    x = sequence()
    indices = theirs.eval()(x, mask=mask_of(x))[1]
    for quantizer in (ours.train(), theirs.train()):
        quantizer.update_indices(x, indices, mask=mask_of(x))
    assert_same_state(ours, theirs, **CLOSE)
    copied = copy.deepcopy(ours)
    torch.manual_seed(0)
    x = sequence()
    copied.update_indices(x, ours(x)[1])
    assert_same_state(copied, ours, rtol=0, atol=0)


ORIGINAL_CALLS = {
    "cross entropy of given indices": ({}, lambda x: {"indices": torch.arange(120).view(3, 40) % CODES}),
    "topk": ({}, {"topk": 3}),
    "codes of each vector": ({}, {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(1, 3, 40, *codes.shape[1:]) * 2}),
}


@pytest.mark.parametrize("name", ORIGINAL_CALLS)
def test_arguments_that_need_the_original_code(name, original):
    options, arguments = ORIGINAL_CALLS[name]
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, **options))
    torch.manual_seed(0)
    x = sequence()
    expected = theirs(x, **arguments(x) if callable(arguments) else arguments)
    actual = ours(x, **arguments(x) if callable(arguments) else arguments)
    assert original.calls == 2
    assert_equal(actual, expected, rtol=0, atol=0)
    assert_same_state(ours, theirs, rtol=0, atol=0)


def test_options_that_change_later_need_the_original_code(original):
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES))
    for quantizer in (ours, theirs):
        quantizer._codebook.gumbel_sample = partial(internals.gumbel_sample, stochastic=True, straight_through=False)
    compare(ours, theirs, sequence, steps=2)
    assert original.calls == 4
    for quantizer in (ours, theirs):
        quantizer._codebook.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 2, *outputs[1:]))
        quantizer._codebook.gumbel_sample = partial(internals.gumbel_sample, stochastic=False, straight_through=False)
    compare(ours, theirs, sequence, steps=2)
    assert original.calls == 8


@pytest.mark.parametrize("lengths", [0.0, 0.5, 3.0])
def test_cosine_codes_that_are_not_of_length_1(lengths):
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, use_cosine_sim=True))
    for quantizer in (ours, theirs):
        quantizer._codebook.embed[:, ::3] *= lengths
    compare(ours, theirs, sequence, steps=2)


def test_errors_are_those_of_the_original():
    calls = [
        ({}, {"mask": torch.ones(3, 40, dtype=torch.bool), "lens": torch.tensor([1, 2, 3])}),
        ({}, {"mask": torch.ones(3, 7, dtype=torch.bool)}),
        (HEADS, {"mask": torch.ones(3, 40, dtype=torch.bool)}),
        ({"codebook_dim": 4}, {"mask": torch.ones(3, 40, dtype=torch.bool)}),
        ({"accept_image_fmap": True}, {}),
    ]
    for options, arguments in calls:
        ours, theirs = pair(lambda options=options: library.VectorQuantize(DIM, CODES, **options))
        errors = []
        for quantizer in (ours, theirs):
            with pytest.raises(Exception) as raised:  # noqa: PT011  (whatever the original raises)
                quantizer(sequence(), **arguments)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


CLOSE_16_BITS = {"close": {"rtol": 3e-2, "atol": 3e-2}, "close_gradients": {"rtol": 0.1, "atol": 0.2}}


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"use_cosine_sim": True}, LEARNABLE, HEADS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(options, dtype):
    """The original rounds losses and gradients to 16 bits at every operation."""
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, **options))
    compare(ours, theirs, lambda: sequence(dtype), steps=5, **CLOSE_16_BITS)


def test_a_16_bit_module():
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, codebook_dim=4).bfloat16())
    compare(ours, theirs, lambda: sequence(torch.bfloat16), steps=3, **CLOSE_16_BITS)


def test_float64_inputs_run_the_original_code(original):
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES))
    compare(ours, theirs, lambda: sequence(torch.float64), steps=3, close={"rtol": 0, "atol": 0})
    assert original.calls == 6


def test_autocast():
    """The projection gives bfloat16 vectors, and the original multiplies by its one-hot matrix in bfloat16."""
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, codebook_dim=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        x = sequence().requires_grad_()
        actual, expected = ours(x), theirs(x)
    assert actual[0].dtype == expected[0].dtype
    torch.testing.assert_close(actual[2], expected[2], rtol=3e-2, atol=3e-2)
    assert (actual[1] == expected[1]).float().mean() > 0.8


RESIDUAL = {
    "residual": ({}, {}),
    "straight through": ({"rotation_trick": False}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "quantize dropout": ({"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}, {}),
    "quantize dropout in multiples": ({"quantize_dropout": True, "quantize_dropout_multiple_of": 2}, {}),
    "quantize dropout by a seed": ({"quantize_dropout": True}, {"rand_quantize_dropout_fixed_seed": 7}),
    "shared codebook": ({"shared_codebook": True, "threshold_ema_dead_code": 2}, {}),
    # Without rotation: a code that is a vector of the batch leaves a residual of rounding errors, of which the original's has no direction.
    "k-means and revival": ({"kmeans_init": True, "kmeans_iters": 3, "threshold_ema_dead_code": 2, "rotation_trick": False}, {}),
    "all codes": ({}, {"return_all_codes": True}),
    "projection": ({"codebook_dim": 4}, {}),
    "codebooks of several sizes": ({"codebook_size": (5, 20, 9, 11)}, {}),
    "gradients between layers": ({"quant_grad_frac": 0.3}, {}),
    "frozen": ({}, {"freeze_codebook": True}),
    "mask": ({}, lambda x: {"mask": mask_of(x)}),
    "directional reparameterization of the sum": ({"diveq": True}, {}),
    "learnable": (LEARNABLE, {}),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual(name):
    options, arguments = RESIDUAL[name]
    ours, theirs = pair(lambda: library.ResidualVQ(**{"dim": DIM, "num_quantizers": 4, "codebook_size": CODES, **options}))
    compare(ours, theirs, sequence, arguments)
    ours.eval(), theirs.eval()
    arguments = {} if name.startswith("quantize dropout") else arguments
    compare(ours, theirs, sequence, arguments, steps=2)


def test_residual_of_images():
    ours, theirs = pair(lambda: library.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=CODES, accept_image_fmap=True))
    with pytest.raises(Exception, match=r"Sizes of tensors|shape") as first:
        theirs(image())
    with pytest.raises(first.type, match=r"Sizes of tensors|shape"):
        ours(image())


def test_grouped_residual():
    ours, theirs = pair(lambda: library.GroupedResidualVQ(dim=DIM, groups=2, num_quantizers=3, codebook_size=CODES, quantize_dropout=True))
    compare(ours, theirs, sequence)
    ours.eval(), theirs.eval()
    compare(ours, theirs, sequence, steps=2)
    indices = theirs(sequence())[1]
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices), **CLOSE)


def test_hierarchical():
    def make():
        return library.HierarchicalVQ(dim=DIM, codebook_size=CODES, accept_image_fmap=True, scales=(1, 2, 4, 8))

    ours, theirs = pair(make)
    for number in range(5):
        x = torch.randn(3, DIM, 8, 8)
        results = []
        for module in (ours, theirs):
            torch.manual_seed(number)
            quantized, indices, loss = module(x)
            results.append((quantized.detach(), *indices, loss.detach()))
        assert_equal(*results, **CLOSE)


def test_random_projection():
    ours, theirs = pair(lambda: library.RandomProjectionQuantizer(dim=8, num_codebooks=3, codebook_dim=4, codebook_size=CODES))
    x = torch.randn(2, 50, 8)
    assert torch.equal(ours(x), theirs(x))


class Bridge(nn.Linear):
    """A network that makes the codes."""


def test_bridge():
    def make():
        return library.VectorQuantize(DIM, CODES, vq_bridge=Bridge(DIM, DIM))

    ours, theirs = pair(make)
    compare(ours, theirs, sequence)


# What stays with the original, and why.

LEFT = {
    "stochastic_sample_codes": lambda: library.VectorQuantize(DIM, CODES, stochastic_sample_codes=True),
    "straight_through": lambda: library.VectorQuantize(DIM, CODES, straight_through=True, rotation_trick=False),
    "affine_param": lambda: library.VectorQuantize(DIM, CODES, affine_param=True),
    "commitment_use_cross_entropy_loss": lambda: library.VectorQuantize(DIM, CODES, commitment_use_cross_entropy_loss=True),
    "codebook_diversity_loss_weight": lambda: library.VectorQuantize(DIM, CODES, codebook_diversity_loss_weight=0.1),
    "in_place_codebook_optimizer": lambda: library.VectorQuantize(DIM, CODES, **LEARNABLE, in_place_codebook_optimizer=torch.optim.SGD),
    "directional_reparam": lambda: library.VectorQuantize(DIM, CODES, directional_reparam=True, threshold_ema_dead_code=2),
    "orthogonal_reg_active_codes_only": lambda: library.VectorQuantize(
        DIM, CODES, orthogonal_reg_weight=0.1, orthogonal_reg_active_codes_only=True, **SEPARATE
    ),
    "beam_size": lambda: library.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, beam_size=2),
    "gumbel_sample": lambda: with_codebook(gumbel_sample=lambda logits, **_: (logits.argmax(-1), logits)),
    "a Mine and not a VectorQuantize": lambda: type("Mine", (library.VectorQuantize,), {})(DIM, CODES),
    "its codebook is a Mine and not a Codebook": lambda: with_codebook(__class__=type("Mine", (internals.Codebook,), {})),
    "its codebook has a forward of its own": lambda: with_codebook(forward=lambda x, **_: x),
    "it has a forward of its own": lambda: with_forward(),
    "it has no num_codebooks, which that of version 1.32 has": lambda: without("num_codebooks"),
}


def with_codebook(**attributes):
    quantizer = library.VectorQuantize(DIM, CODES)
    for name, value in attributes.items():
        setattr(quantizer._codebook, name, value)
    return quantizer


def with_forward():
    quantizer = library.VectorQuantize(DIM, CODES)
    quantizer.forward = lambda x: x
    return quantizer


def without(name):
    quantizer = library.VectorQuantize(DIM, CODES)
    delattr(quantizer._codebook, name)
    return quantizer


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left(reason):
    lines = []
    module = LEFT[reason]()
    classes = [type(each) for each in module.modules()]
    assert patch_vector_quantize(module, report=lines.append) is module
    assert lines
    assert all(line.startswith("left ") and reason in line for line in lines)
    assert [type(each) for each in module.modules()] == classes


def test_layers_of_an_implicit_codebook():
    lines = []
    module = library.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=CODES, implicit_neural_codebook=True)
    theirs = copy.deepcopy(module)
    patch_vector_quantize(module, report=lines.append)
    assert lines[0] == "patched layers.0"
    assert [line.split(":")[0] for line in lines[1:]] == ["left layers.1", "left layers.2"]
    assert all("implicit_neural_codebook" in line for line in lines[1:])
    compare(module, theirs, sequence, steps=3)


@pytest.mark.parametrize("function", ["kmeans", "gumbel_sample", "VectorQuantize.forward", "Codebook.update_codebook"])
def test_another_version_is_left(monkeypatch, function):
    quantizer, lines = library.VectorQuantize(DIM, CODES), []
    *owner, name = function.split(".")
    monkeypatch.setattr(getattr(internals, owner[0]) if owner else internals, name, lambda self, other: None)
    patch_vector_quantize(quantizer, report=lines.append)
    assert lines == [f"left VectorQuantize: this version of vector-quantize-pytorch has another {function} than 1.32"]
    assert type(quantizer) is library.VectorQuantize


def test_a_version_without_the_codebook_is_left(monkeypatch):
    quantizer, lines = library.VectorQuantize(DIM, CODES), []
    monkeypatch.delattr(internals, "Codebook")
    patch_vector_quantize(quantizer, report=lines.append)
    assert lines == ["left VectorQuantize: this version of vector-quantize-pytorch has another Codebook.forward than 1.32"]


def test_nothing_to_patch():
    with pytest.raises(ValueError, match="module: got a Linear without a VectorQuantize of vector-quantize-pytorch"):
        patch_vector_quantize(nn.Linear(2, 2))


def test_without_the_library():
    code = (
        "import sys; sys.modules['vector_quantize_pytorch'] = None\n"
        "from fastvae.compat import patch_vector_quantize\n"
        "from torch import nn\n"
        "try: patch_vector_quantize(nn.Linear(2, 2))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("patch_vector_quantize() needs vector-quantize-pytorch")


def test_the_import_brings_no_library():
    code = "import sys, fastvae.compat; print('vector_quantize_pytorch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# A patched module is still the module.


def test_twice():
    module = library.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES)
    first, second = [], []
    patch_vector_quantize(module, report=first.append)
    classes = [type(each) for each in module.modules()]
    patch_vector_quantize(module, report=second.append)
    assert first == second == ["patched layers.0", "patched layers.1"]
    assert [type(each) for each in module.modules()] == classes


def test_copies():
    ours, theirs = pair(lambda: library.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, threshold_ema_dead_code=1))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for module in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert all(isinstance(layer, library.VectorQuantize) for layer in module.layers)
        assert type(module.layers[0]) is type(ours.layers[0])
        compare(module, copy.deepcopy(theirs), sequence, steps=2)
    assert repr(ours) == repr(theirs)


def test_states_are_those_of_the_original():
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, kmeans_init=True))
    for _ in range(3):
        theirs(sequence())
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    compare(ours, theirs, sequence, steps=2)
    other = library.VectorQuantize(DIM, CODES)
    other.load_state_dict(ours.state_dict())
    assert_same_state(other, ours, rtol=0, atol=0)


def test_without_a_matrix_of_distances():
    """No tensor has as many elements as there are pairs of a vector and a code."""
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, 512, threshold_ema_dead_code=1, kmeans_init=True))
    x = torch.randn(4, 300, DIM)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, torch.Tensor):
                    self.elements = max(self.elements, each.numel())
            return result

    largest = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with Largest() as mode:
            quantized, _, loss = module(leaf)
            (quantized.sum() + loss).backward()
        largest.append(mode.elements)
    assert largest[0] < 4 * 300 * 512 // 8
    assert largest[1] >= 4 * 300 * 512


def test_indices_are_exact():
    ours, _ = pair(lambda: library.VectorQuantize(DIM, CODES).eval())
    x = sequence()
    assert torch.equal(ours(x)[1], FV.vq_nearest(x, ours.codebook))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    ours, theirs = pair(lambda: library.VectorQuantize(DIM, CODES, threshold_ema_dead_code=1).train(training))
    compiled = torch.compile(ours, backend="aot_eager")
    for number in range(3):
        x = sequence()
        results = []
        for module in (compiled, theirs):
            torch.manual_seed(number)
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            results.append((quantized, indices, loss))
        assert_equal(*results, **CLOSE)
    assert_same_state(ours, theirs, **CLOSE)


# Two processes.


def _distributed(rank, kind, wrapped):
    torch.manual_seed(0)
    make = {
        "euclidean": lambda: library.VectorQuantize(DIM, CODES, kmeans_init=True, threshold_ema_dead_code=2, sync_codebook=True),
        "cosine": lambda: library.VectorQuantize(DIM, CODES, use_cosine_sim=True, threshold_ema_dead_code=2, sync_codebook=True),
        "heads": lambda: library.VectorQuantize(DIM, CODES, **SEPARATE, sync_codebook=True),
        "learnable": lambda: library.VectorQuantize(DIM, CODES, **LEARNABLE),
        "residual": lambda: library.ResidualVQ(
            dim=DIM, num_quantizers=3, codebook_size=CODES, quantize_dropout=True, kmeans_init=True, sync_codebook=True
        ),
    }[kind]
    internals.is_distributed.cache_clear()
    theirs = nn.Sequential(nn.Linear(DIM, DIM), make())
    modules = [patch_vector_quantize(copy.deepcopy(theirs)), theirs]
    states = []
    for module in modules:
        trained = DistributedDataParallel(module, find_unused_parameters=True) if wrapped else module
        outputs = []
        for number in range(5):
            torch.manual_seed(10 * number + rank)
            x = sequence()
            quantized, indices, loss = trained(x)
            (quantized.square().mean() + loss.sum()).backward()
            outputs.append((quantized.detach(), indices, loss.detach()))
        states.append((outputs, module.state_dict(), [p.grad for p in module.parameters()]))
    return states


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "DistributedDataParallel"])
@pytest.mark.parametrize("kind", ["euclidean", "cosine", "heads", "learnable", "residual"])
def test_two_processes(ranks, kind, wrapped):
    for ours, theirs in ranks.run(_distributed, kind, wrapped):
        assert_equal(ours[0], theirs[0], **CLOSE)
        assert list(ours[1]) == list(theirs[1])
        for name, value in ours[1].items():
            torch.testing.assert_close(value, theirs[1][name], **CLOSE, msg=name)
        for a, b in zip(ours[2], theirs[2], strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
