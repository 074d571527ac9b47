"""VQ-VAE and VQ-VAE-2: shapes, the loss, round trips through indices, and that they learn."""

import pytest
import torch
import torch.nn.functional as F
from _helpers import Recorder
from torch import nn

from fastvae.models import VQVAE, VQVAE2
from fastvae.nn import ResidualVectorQuantizer


class Returns(nn.Module):
    """A decoder that gives a tensor, whatever it is asked."""

    def __init__(self, recon: torch.Tensor):
        super().__init__()
        self.recon = recon

    def forward(self, z):
        return self.recon


SMALL = {"num_codes": 16, "dim": 8, "channels": 16, "hidden": 8}


def make(kind, **options):
    torch.manual_seed(0)
    return VQVAE.conv(3, **SMALL, **options) if kind == "vqvae" else VQVAE2.conv(3, **SMALL, **options)


@pytest.mark.parametrize("kind", ["vqvae", "vqvae2"])
def test_loss_and_round_trip(kind):
    model, x = make(kind, data_variance=0.5).eval(), torch.rand(2, 3, 16, 24)
    output = model(x)
    assert output.recon.shape == x.shape
    torch.testing.assert_close(output.loss, F.mse_loss(output.recon, x) / 0.5 + output.vq_loss)
    indices = model.encode(x)
    assert [tuple(i.shape) for i in (indices if kind == "vqvae2" else [indices])] == [(2, 2, 3), (2, 4, 6)][-1 if kind == "vqvae" else 0 :]
    torch.testing.assert_close(model.decode(indices), output.recon, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.reconstruct(x), output.recon)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("kind", ["vqvae", "vqvae2"])
def test_a_variance_is_positive(kind, variance):
    with pytest.raises(ValueError, match=r"^data_variance: got .*, takes a number > 0$"):
        make(kind, data_variance=variance)


@pytest.mark.parametrize("kind", ["vqvae", "vqvae2"])
def test_the_gradient_is_written_in_units_of_the_variance(kind):
    """The backward pass hands it out without another pass over it."""
    recon = torch.rand(2, 3, 16, 24).requires_grad_()
    model, x = make(kind, data_variance=0.3), torch.rand(2, 3, 16, 24)
    model.decoder = Returns(recon)
    with Recorder() as ran:
        model(x).recon_loss.backward()
    assert not [func for func in ran.operators if func._schema.name == "aten::mul_"]
    torch.testing.assert_close(recon.grad, 2 * (recon.detach() - x) / x.numel() / 0.3)


@pytest.mark.parametrize("kind", ["vqvae", "vqvae2"])
def test_learns_8_bit_images(kind):
    model = make(kind, decay=0.9, kmeans_iters=2)
    x = torch.randint(0, 2, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = (x * 255).to(torch.uint8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        output = model(x)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.recon_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_any_quantizer():
    plain = make("vqvae")
    model = VQVAE(plain.encoder, plain.decoder, ResidualVectorQuantizer(3, 16, 8, channels_first=True)).eval()
    x = torch.rand(2, 3, 8, 8)
    assert model.encode(x).shape == (2, 2, 2, 3)
    torch.testing.assert_close(model.decode(model.encode(x)), model(x).recon, rtol=1e-4, atol=1e-5)
