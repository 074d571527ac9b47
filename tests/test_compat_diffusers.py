"""diffusers' own AutoencoderKL patched, and the twin of its distribution."""

import copy
from functools import partial

import pytest
import torch
from _helpers import Source, leaf
from torch import nn

from fastvae.compat import DiagonalGaussianDistribution, patch_diffusers
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.nn.optimize import examine

diffusers = pytest.importorskip("diffusers")
from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosResnetBlock3d  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoResnetBlock3d  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock  # noqa: E402
from diffusers.models.autoencoders.vae import Decoder  # noqa: E402
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Original  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock  # noqa: E402


def small_vae(**options) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        **options,
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_autoencoder_kl_gives_the_same(channels_last):
    vae = small_vae()
    patched = patch_diffusers(copy.deepcopy(vae), channels_last=channels_last)
    assert list(patched.state_dict()) == list(vae.state_dict())
    assert sum(isinstance(module, GroupNormSiLU) for module in patched.modules()) == 2 * 5 * 2 - 2 + 4
    assert sum(isinstance(module, UpsampleConv2d) for module in patched.modules()) == 1
    x = Source("cpu").uniform(2, 3, 16, 16)
    results = []
    for model in (vae, patched):
        posterior = model.encode(x).latent_dist
        recon = model.decode(posterior.mode()).sample
        loss = (recon - x).square().mean() + 1e-6 * posterior.kl().mean()
        loss.backward()
        results.append((recon, loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1])
    for ours, expected in zip(results[1][2], results[0][2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-5)


def test_a_checkpoint_of_the_original_loads():
    vae, patched = small_vae(), patch_diffusers(small_vae())
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.01)
    patched.load_state_dict(vae.state_dict())
    x = Source("cpu").uniform(1, 3, 16, 16)
    torch.testing.assert_close(patched(x).sample, vae(x).sample, rtol=1e-4, atol=1e-4)


def test_training_follows_the_original():
    x = Source("cpu").uniform(2, 3, 16, 16)
    losses = []
    for model in (small_vae(), patch_diffusers(small_vae(), channels_last=True)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(5):
            loss = (model(x).sample - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]


def test_bf16_autocast_and_gradient_checkpointing():
    model = patch_diffusers(small_vae(), channels_last=True)
    model.enable_gradient_checkpointing()
    model.train()
    x = Source("cpu").uniform(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sample.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_is_left_alone_and_why():
    lines = []
    patch_diffusers(small_vae(), report=lines.append)
    left = [line for line in lines if line.startswith("left")]
    assert [line.split()[1] for line in left] == [f"{part}.mid_block.attentions.0.group_norm:" for part in ("encoder", "decoder")]


@pytest.mark.parametrize("act_fn", ["silu", "mish"])
def test_patching_twice_changes_nothing(act_fn):
    vae = patch_diffusers(small_vae(act_fn=act_fn))
    text = repr(vae)
    assert repr(patch_diffusers(vae)) == text


def test_nothing_to_patch():
    with pytest.raises(ValueError, match="vae: got a Linear"):
        patch_diffusers(nn.Linear(2, 2))


def test_what_is_in_the_way_is_named():
    """Offloading gives every module a forward of its own, so it comes after."""
    vae = small_vae()
    for module in vae.modules():
        module.forward = module.forward
    with pytest.raises(ValueError, match=r"\(left encoder.* it has a forward of its own\)"):
        patch_diffusers(vae)


def test_hooks_and_replaced_forwards_keep_their_modules():
    vae = small_vae()
    vae.encoder.conv_norm_out.register_forward_hook(lambda *_: None)
    vae.decoder.up_blocks[0].upsamplers[0].forward = vae.decoder.up_blocks[0].upsamplers[0].forward
    lines = []
    patch_diffusers(vae, report=lines.append)
    assert type(vae.encoder.conv_norm_out) is nn.GroupNorm
    assert "left encoder.conv_norm_out: it has hooks" in lines
    assert not [module for module in vae.modules() if isinstance(module, UpsampleConv2d)]
    assert isinstance(vae.decoder.conv_norm_out, GroupNormSiLU)


def test_a_block_with_another_activation_stays():
    make = partial(ResnetBlock2D, in_channels=8, groups=2, temb_channels=None, non_linearity="mish")
    with pytest.raises(ValueError, match="without a norm that SiLU, ReLU or GELU follows"):
        patch_diffusers(make())
    assert [finding.reason for finding in examine(make())] == ["nonlinearity is not SiLU, ReLU or GELU alone"] * 2


SCALED = {"temb_channels": 8, "time_embedding_norm": "scale_shift"}
IMAGES, VIDEOS = (2, 8, 4, 4), (2, 8, 3, 4, 4)
# Blocks and the shapes of what they take, with the number of norms that are fused.
BLOCKS = {
    "no time embedding": (partial(ResnetBlock2D, in_channels=8, groups=2, temb_channels=None), [IMAGES], 2),
    "GELU": (partial(ResnetBlock2D, in_channels=8, groups=2, temb_channels=None, non_linearity="gelu"), [IMAGES], 2),
    "ReLU and a time embedding": (
        partial(ResnetBlock2D, in_channels=8, groups=2, temb_channels=8, non_linearity="relu"),
        [IMAGES, (2, 8)],
        2,
    ),
    "a time embedding": (partial(ResnetBlock2D, in_channels=8, groups=2, temb_channels=8), [IMAGES, (2, 8)], 2),
    "a scale and a shift": (partial(ResnetBlock2D, in_channels=8, groups=2, **SCALED), [IMAGES, (2, 8)], 1),
    "an embedding without activation": (partial(ResnetBlock2D, in_channels=8, groups=2, skip_time_act=True, **SCALED), [IMAGES, (2, 8)], 1),
    "frames": (partial(TemporalResnetBlock, 32, 64, temb_channels=None), [(2, 32, 3, 4, 4)], 2),
    "frames with a time embedding": (partial(TemporalResnetBlock, 32, temb_channels=8), [(2, 32, 3, 4, 4), (2, 3, 8)], 2),
    "frames, each normalised": (partial(CosmosResnetBlock3d, 8, 8), [VIDEOS], 2),
    "L2 norms": (partial(WanResidualBlock, 8, 4), [VIDEOS], 2),
    "RMS norms": (partial(LTXVideoResnetBlock3d, 8, 8, elementwise_affine=True), [VIDEOS], 2),
    "pixel norms": (partial(LTX2VideoResnetBlock3d, 8), [VIDEOS], 2),
}


def block_and_inputs(name: str) -> tuple[nn.Module, list[torch.Tensor], int]:
    make, shapes, fused = BLOCKS[name]
    torch.manual_seed(0)
    block, source = make(), Source("cpu")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = [source.normal(*shape) for shape in shapes]
    return block, [*inputs, *[None] * (isinstance(block, ResnetBlock2D | TemporalResnetBlock) and len(inputs) == 1)], fused


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_give_the_same(name, channels_last):
    block, inputs, fused = block_and_inputs(name)
    if channels_last:
        layout = torch.channels_last if inputs[0].ndim == 4 else torch.channels_last_3d
        inputs[0] = inputs[0].contiguous(memory_format=layout)
    lines = []
    optimized = patch_diffusers(copy.deepcopy(block), channels_last=channels_last, report=lines.append)
    assert sum(line.startswith("fused") for line in lines) == fused
    results = []
    for each in (optimized, block):
        leaves = [None if x is None else leaf(x) for x in inputs]
        output = each(*leaves)
        leaves = [x for x in (*leaves, *each.parameters()) if x is not None]
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), leaves)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for ours, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()) + 1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compile_whole(name):
    torch.compiler.reset()
    block, inputs, _ = block_and_inputs(name)
    compiled = torch.compile(patch_diffusers(block), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)


def test_spatial_norm_stays():
    """The decoder of MoVQ."""
    decoder = Decoder(4, 3, ("UpDecoderBlock2D",), (32,), norm_num_groups=8, norm_type="spatial")
    before = repr(decoder.conv_norm_out)
    with pytest.raises(ValueError, match="without a norm"):
        patch_diffusers(decoder)
    assert repr(decoder.conv_norm_out) == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_twin_of_the_distribution(deterministic):
    source = Source("cpu")
    parameters, others = (leaf(source.normal(3, 8, 4, 4) * 9) for _ in range(2))
    sample = source.normal(3, 4, 4, 4)
    ours, theirs = (cls(parameters, deterministic) for cls in (DiagonalGaussianDistribution, Original))
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    other, other_theirs = (cls(others) for cls in (DiagonalGaussianDistribution, Original))
    torch.testing.assert_close(ours.mode(), theirs.mode())
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.kl(other), theirs.kl(other_theirs), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours.nll(sample), theirs.nll(sample))
    torch.testing.assert_close(ours.nll(sample, dims=[1, 2]), theirs.nll(sample, dims=[1, 2]))
    if not deterministic:
        gradients = [torch.autograd.grad(d.kl().sum(), parameters)[0] for d in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_one_generator_for_each_sample():
    """As pipelines call it, so that an image does not depend on its place in the batch."""
    parameters = leaf(Source("cpu").normal(3, 8, 4, 4))
    distribution = DiagonalGaussianDistribution(parameters)
    generators = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    sample = distribution.sample(generators(1, 2, 3))
    assert sample.shape == (3, 4, 4, 4)
    for i, seed in enumerate((1, 2, 3)):
        alone = DiagonalGaussianDistribution(parameters[i : i + 1])
        assert torch.equal(sample[i : i + 1], alone.sample(*generators(seed)))
        assert torch.equal(sample[i : i + 1], alone.sample(generators(seed)))
    (grad,) = torch.autograd.grad(sample.sum(), parameters)
    assert torch.equal(grad[:, :4], torch.ones_like(grad[:, :4]))
    assert torch.equal(distribution.sample(generators(5)), distribution.sample(*generators(5)))
    original = Original(parameters)
    assert original.sample(generators(1, 2, 3)).shape == sample.shape
    with pytest.raises(ValueError, match="generator: got a list of 2, takes one for each of 3 samples"):
        distribution.sample(generators(1, 2))


def test_samples_of_the_twin():
    parameters = Source("cpu").normal(2, 8, 64, 64)
    distribution = DiagonalGaussianDistribution(parameters)
    draws = [distribution.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    noise = (draws[0] - distribution.mean) / distribution.std
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert torch.equal(DiagonalGaussianDistribution(parameters, deterministic=True).sample(), distribution.mean)
