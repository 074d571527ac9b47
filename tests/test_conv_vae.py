"""The residual convolutional VAE: its architecture, its loss, its precision and its training."""

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source, each_place
from torch import nn

from fastvae.models import ImageVAE
from fastvae.models.image_vae import bfloat16_pays
from fastvae.models.networks import Attention, ResidualBlock
from fastvae.nn import GroupNormSiLU

SMALL = {"channels": (8, 16), "blocks": 1, "groups": 4, "latent_channels": 2}


def small(**options):
    torch.manual_seed(0)
    return ImageVAE.residual(**{**SMALL, "precision": "float32", **options})


def images(count=3, size=16):
    return Source("cpu").uniform(count, 3, size, size)


def test_the_default_network():
    model = ImageVAE.residual()
    mu, logvar = model.encode(images(1, 32))
    assert mu.shape == logvar.shape == (1, 4, 8, 8)
    assert model.decode(mu).shape == (1, 3, 32, 32)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 2 * 3 * 2
    assert [b.conv2.out_channels for b in model.encoder if isinstance(b, ResidualBlock)] == [32, 32, 64, 64, 128, 128]
    assert [b.conv2.out_channels for b in model.decoder if isinstance(b, ResidualBlock)] == [128, 128, 64, 64, 32, 32]
    assert sum(isinstance(m, GroupNormSiLU) for m in model.modules()) == 2 * len(blocks) + 2
    assert not [m for m in model.modules() if isinstance(m, Attention)]


def test_a_residual_block_is_its_formula():
    block, x = ResidualBlock(8, 16, 4), Source("cpu").normal(2, 8, 6, 6)
    norms = [lambda t, n=n: F.silu(F.group_norm(t, 4, n.weight, n.bias)) for n in (block.norm1, block.norm2)]
    expected = block.shortcut(x) + block.conv2(norms[1](block.conv1(norms[0](x))))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(ResidualBlock(8, 8, 4).shortcut, nn.Identity)


def test_attention_is_its_formula():
    module, x = Attention(8, 4), Source("cpu").normal(2, 8, 3, 5)
    query, key, value = module.qkv(F.group_norm(x, 4)).flatten(2).chunk(3, 1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) / 8**0.5, 2)
    attended = torch.einsum("bij,bcj->bci", weights, value).view(x.shape)
    torch.testing.assert_close(module(x), x + module.out(attended), rtol=1e-5, atol=1e-5)


@each_place("group_norm_forward")
@pytest.mark.parametrize("attention", [False, True])
def test_the_loss_is_its_formula(place, attention):
    model, x = small(attention=attention).to(place.device), images().to(place.device)
    eps = Source(place.device).normal(3, 2, 8, 8)
    out = model(x, eps)
    mu, logvar = model.encode(x)
    recon = model.decode(mu + torch.exp(0.5 * logvar) * eps)
    bce = F.binary_cross_entropy_with_logits(recon, x, reduction="sum") / 3
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum() / 3
    torch.testing.assert_close(out.loss, bce + kl)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("attention", [False, True])
def test_activations_have_the_channels_last_and_weights_are_contiguous(channels, attention):
    model, layouts = small(in_channels=channels, attention=attention), []
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_hook(lambda m, i, o: layouts.append(o.is_contiguous(memory_format=torch.channels_last)))
    model(images()[:, :channels])
    assert layouts
    assert all(layouts)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_bfloat16_agrees_with_float32_and_keeps_the_posterior_in_float32():
    x, eps = images(), Source("cpu").normal(3, 2, 8, 8)
    exact, rounded = small(), small(precision="bfloat16")
    expected, out = exact(x, eps), rounded(x, eps)
    assert all(tensor.dtype == torch.float32 for tensor in out)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-2, atol=0)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in rounded.parameters())


def test_precision_follows_the_device_and_the_callers_autocast():
    cpu, dtypes = torch.device("cpu"), []
    model = small(precision="auto")
    model.decoder.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    model(images())
    assert dtypes == [torch.bfloat16 if bfloat16_pays(cpu) else torch.float32]
    assert not bfloat16_pays(torch.device("meta"))
    with torch.autocast("cpu", torch.float16):
        assert small(precision="bfloat16")(images()).recon.dtype == torch.float16


def test_sample_and_reconstruct():
    model = small(image_size=(16, 24))
    assert model.latent_shape == (2, 8, 12)
    assert model.sample(2).shape == (2, 3, 16, 24)
    x = images()
    recon = model.reconstruct((x * 255).to(torch.uint8))
    assert recon.shape == x.shape
    assert ((recon >= 0) & (recon <= 1)).all()


def test_training_lowers_the_loss_alike_in_both_layouts():
    """The loss curves with the channels last and with contiguous weights agree."""
    x, eps, curves = images(), Source("cpu").normal(3, 2, 8, 8), []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model = small(likelihood="gaussian").to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        curves.append([])
        for _ in range(12):
            loss = model(x, eps).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < curves[0][0]


def test_compiled_as_one_graph():
    torch.compiler.reset()
    model, x, eps = small(attention=True), images(), Source("cpu").normal(3, 2, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, eps).loss, model(x, eps).loss)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="groups: got 32 for 40 channels"):
        ImageVAE.residual(channels=(32, 40))
    with pytest.raises(ValueError, match="precision: got 'half', takes one of 'auto', 'bfloat16', 'float32'"):
        ImageVAE.residual(precision="half")
