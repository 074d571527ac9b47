"""The twins against the libraries they stand in for."""

import pytest
import torch

from fastvae.compat import ResidualVQ, VectorQuantize

OPTIONS = [
    {},
    {"rotation_trick": False, "decay": 0.95, "commitment_weight": 0.3},
    {"channel_last": False},
    {"heads": 2, "codebook_dim": 3},
    {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    {"use_cosine_sim": True},
]


@pytest.fixture
def library():
    return pytest.importorskip("vector_quantize_pytorch", reason="a comparison, not a dependency")


def copy_state(ours, theirs):
    state = theirs._codebook
    ours.codebook = theirs.codebook
    ours.layer.ema_sum.copy_(state.embed_avg.view_as(ours.layer.ema_sum))
    ours.layer.ema_count.copy_(state.cluster_size.view_as(ours.layer.ema_count))


def compare_step(ours, theirs, x):
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [quantizer(leaf) for quantizer, leaf in zip((ours, theirs), leaves, strict=True)]
    for quantized, _, loss in results:
        (loss.sum() + (quantized**3).mean()).backward()
    assert torch.equal(results[0][1], results[1][1])
    for a, b in ((results[0][0], results[1][0]), (results[0][2], results[1][2]), (leaves[0].grad, leaves[1].grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vector_quantize(library, options):
    torch.manual_seed(0)
    ours, theirs = VectorQuantize(6, 20, **options), library.VectorQuantize(6, 20, **options)
    copy_state(ours, theirs)
    for _ in range(5):
        x = torch.randn(3, 40, 6) if options.get("channel_last", True) else torch.randn(3, 6, 40)
        compare_step(ours, theirs, x)
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-6)
    ours.eval(), theirs.eval()
    indices = ours(x)[1]
    codes = ours.get_codes_from_indices(indices)
    torch.testing.assert_close(codes, theirs.get_codes_from_indices(indices).view_as(codes), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}], ids=str)
def test_residual_vq(library, options):
    torch.manual_seed(0)
    arguments = {"dim": 6, "num_quantizers": 3, "codebook_size": 20, **options}
    ours, theirs = ResidualVQ(**arguments), library.ResidualVQ(**arguments)
    for pair in zip(ours.layers, theirs.layers, strict=True):
        copy_state(*pair)
    for _ in range(5):
        compare_step(ours, theirs, torch.randn(3, 40, 6))
    torch.testing.assert_close(ours.codebooks, theirs.codebooks, rtol=1e-4, atol=1e-6)
    indices = theirs.eval()(torch.randn(3, 40, 6))[1]
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices), rtol=1e-4, atol=1e-6)


LAYOUTS = [
    {},
    {"channel_last": False},
    {"accept_image_fmap": True},
    {"heads": 2, "codebook_dim": 4},
    {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "accept_image_fmap": True},
    {"heads": 2, "codebook_dim": 4, "channel_last": False},
]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_what_is_contiguous_there_is_contiguous_here(library, options, training, permuted):
    ours, theirs = VectorQuantize(8, 20, **options).train(training), library.VectorQuantize(8, 20, **options).train(training)
    shape = (3, 8, 5, 6) if "accept_image_fmap" in options else (3, 40, 8) if options.get("channel_last", True) else (3, 8, 40)
    x = torch.randn(shape)
    x = (x.transpose(1, 2).contiguous().transpose(1, 2) if permuted else x).requires_grad_()
    results = [quantizer(x) for quantizer in (ours, theirs)]
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert actual.is_contiguous() or not expected.is_contiguous()
    if "heads" not in options:
        codes = [quantizer.get_codes_from_indices(results[1][1]) for quantizer in (ours, theirs)]
        assert codes[0].shape == codes[1].shape
        assert codes[0].is_contiguous() or not codes[1].is_contiguous()


@pytest.mark.parametrize("training", [False, True])
def test_residual_vq_returns_the_shapes_and_layouts_of_the_original(library, training):
    arguments = {"dim": 8, "num_quantizers": 3, "codebook_size": 20}
    ours, theirs = ResidualVQ(**arguments).train(training), library.ResidualVQ(**arguments).train(training)
    x = torch.randn(3, 40, 8, requires_grad=True)
    for actual, expected in zip(ours(x), theirs(x), strict=True):
        assert actual.shape == expected.shape
        assert actual.is_contiguous() or not expected.is_contiguous()


def test_residual_vq_leaves_steps_out():
    torch.manual_seed(0)
    quantizer = ResidualVQ(dim=4, num_quantizers=4, codebook_size=8, quantize_dropout=True, quantize_dropout_cutoff_index=1)
    steps = set()
    for _ in range(30):
        quantized, indices, losses = quantizer(torch.randn(2, 10, 4))
        steps.add(int((indices >= 0).all(0).all(0).sum()))
        assert quantized.shape == (2, 10, 4)
        assert losses.shape == (4,)
    assert steps == {2, 3, 4}


def test_arguments_without_a_counterpart():
    with pytest.raises(NotImplementedError, match="stochastic_sample_codes: got True"):
        VectorQuantize(4, 8, stochastic_sample_codes=True)
    with pytest.raises(NotImplementedError, match="codebook_dim: got 3"):
        VectorQuantize(4, 8, codebook_dim=3)
    with pytest.raises(NotImplementedError, match="beam_size: got 2"):
        ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, beam_size=2)
    VectorQuantize(4, 8, stochastic_sample_codes=False, sync_codebook=None)
