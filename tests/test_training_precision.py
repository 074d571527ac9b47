"""Precisions of a training: losses and weights near those of float32, and the loss scale of float16."""

import math

import pytest
import torch
from torch import nn

for package in ("lightning", "jsonargparse", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fastvae.distributions import GaussianLikelihood  # noqa: E402
from fastvae.models import AE, VAE, VQVAE, AEOutput, ImageVAE  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.callbacks import LatentCurves, Pictures  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

LEARNING_RATE = 0.01


def scaled(scale: float) -> dict:
    """Options of a trainer with autocast to float16 and a loss scale; Lightning refuses ``precision="16-mixed"`` on a CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]}


def fit(lit: LitAutoencoder, data, **options) -> Trainer:
    lit._noise_seed = 0
    fitted = quiet_trainer(**{"enable_checkpointing": False, "log_every_n_steps": 1, **options})
    fitted.fit(lit, data)
    return fitted


NETWORKS = {
    "AE": lambda: AE.mlp((1, 8, 8), (16,), 4),
    "VAE": lambda: VAE.mlp((1, 8, 8), (16,), 4),
    "VAE with learned variance": lambda: VAE.mlp((1, 8, 8), (16,), 4, likelihood=GaussianLikelihood("global")),
    "ImageVAE": lambda: ImageVAE.residual(1, channels=(8, 16), blocks=1, groups=4, latent_channels=2),
    "VQVAE": lambda: VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1),
}


def images(count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    drawn = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


def train(name: str, dtype: torch.dtype = torch.uint8, **options) -> tuple[list[float], LitAutoencoder, Trainer]:
    """The losses of some steps of plain gradient descent, whose weights follow the gradients linearly."""
    torch.manual_seed(0)
    lit = LitAutoencoder(NETWORKS[name](), optimizer="sgd", momentum=0.0, learning_rate=1e-3)
    losses = []
    lit.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    return losses, lit, fit(lit, DataLoader(images(16, dtype), batch_size=4), max_epochs=1, **options)


def weights(lit: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().float() for parameter in lit.parameters()]


def assert_near(ours: list[torch.Tensor], expected: list[torch.Tensor], start: list[torch.Tensor], share: float) -> None:
    """The weights have moved as expected, but for a share of the way."""
    moved, wanted = (torch.cat([(a - b).flatten() for a, b in zip(each, start, strict=True)]) for each in (ours, expected))
    assert (moved - wanted).norm() <= share * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precisions_train_as_float32_does(name, dtype, precision):
    options, share = ({"precision": precision}, 0.1) if precision == "bf16-mixed" else (scaled(2.0**10), 0.02)
    torch.manual_seed(0)
    start = weights(NETWORKS[name]())
    expected, plain, _ = train(name, dtype)
    losses, lit, _ = train(name, dtype, **options)
    assert losses == pytest.approx(expected, rel=0.02)
    assert_near(weights(lit), weights(plain), start, share)
    assert all(parameter.dtype == torch.float32 for parameter in lit.parameters())
    assert lit.skipped_steps == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_in_bfloat16_train_near_float32(name):
    """A step may be less than a weight's rounding, so the losses are compared and not the weights."""
    expected, _, _ = train(name)
    losses, lit, _ = train(name, precision="bf16-true")
    assert losses == pytest.approx(expected, rel=0.05)
    assert all(parameter.dtype == torch.bfloat16 for parameter in lit.parameters())
    assert all(parameter.isfinite().all() for parameter in lit.parameters())


@pytest.mark.parametrize("scaling", ["none", "z_score"])
def test_a_checkpoint_of_bfloat16_weights_is_read(tmp_path, scaling):
    """Pictures and curves are made along the way."""
    torch.manual_seed(0)
    lit = LitAutoencoder(VAE.mlp((1, 8, 8), (16,), 3, likelihood="gaussian"), optimizer="adamw")
    keep = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=2)
    options = {"callbacks": [keep, Pictures(), LatentCurves()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(lit, SklearnDigits(batch_size=512, scaling=scaling), precision="bf16-true", max_steps=2, max_epochs=1, **options)
    loaded = checkpoints.load(tmp_path / "kept.ckpt")
    for ours, stored in zip(loaded.parameters(), lit.parameters(), strict=True):
        assert torch.equal(ours, stored.float())


class Tiny(nn.Module):
    """Its gradient, 1e-9 for each of the weights, is 0 in float16."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        recon = self.linear(x)
        loss = recon.float().mean() * 1.6e-8
        return AEOutput(loss, loss, loss, recon, recon)


def test_the_loss_scale_keeps_small_gradients():
    torch.manual_seed(0)
    lit = LitAutoencoder(Tiny(), optimizer="sgd", momentum=0.0, learning_rate=1e6)
    start = lit.network.linear.weight.detach().clone()
    fit(lit, DataLoader(torch.ones(4, 4), batch_size=4), max_epochs=1, **scaled(2.0**16))
    torch.testing.assert_close(start - lit.network.linear.weight, torch.full((4, 4), 1e6 * 1.6e-8 / 4), rtol=1e-3, atol=0)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    """A scale of 2 ** 40 takes every gradient in float16 to infinity."""
    options = scaled(2.0**40)
    torch.manual_seed(0)
    lit = LitAutoencoder(NETWORKS["AE"]())
    before = weights(lit)
    fit(lit, DataLoader(images(4), batch_size=4), max_epochs=1, **options)
    assert all(map(torch.equal, weights(lit), before))
    assert options["plugins"][0].scaler.get_scale() == 2.0**39
    assert lit.skipped_steps == 0, "the loss itself is finite"


def test_gradients_are_clipped_without_the_loss_scale():
    torch.manual_seed(0)
    start = weights(NETWORKS["AE"]())
    clip = 1e-3
    _, plain, _ = train("AE", gradient_clip_val=clip)
    _, lit, _ = train("AE", gradient_clip_val=clip, **scaled(2.0**16))
    assert_near(weights(lit), weights(plain), start, 0.05)
    way = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(weights(lit), start, strict=True)))
    assert way <= 4 * 1e-3 * clip * 1.001, "each of the 4 steps is clipped"


def test_the_loss_scale_goes_on_where_a_checkpoint_has_it(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=1)
    data = DataLoader(images(4), batch_size=4)
    fit(LitAutoencoder(NETWORKS["AE"]()), data, max_steps=1, callbacks=[keep], enable_checkpointing=True, **scaled(2.0**8))
    options = scaled(2.0**4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(accelerator="cpu", max_steps=2, **quiet, **options).fit(
        LitAutoencoder(NETWORKS["AE"]()), data, ckpt_path=tmp_path / "kept.ckpt"
    )
    assert options["plugins"][0].scaler.get_scale() == 2.0**8
