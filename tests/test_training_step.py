"""How a step of LitAutoencoder is run: accumulated, compiled, in channels_last, with checkpointed activations, with averaged weights."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from _helpers import Recorder, kept_bytes
from torch import nn

for package in ("lightning", "jsonargparse", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from lightning.pytorch import Callback, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import AE, VAE, VQVAE, VQVAE2, AEOutput, ContractiveAE, DeepVAE, ImageVAE, registry  # noqa: E402
from fastvae.nn import LinearSchedule  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.callbacks import AveragedWeights, Pictures, draw_pictures  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


def fit(lit: LitAutoencoder, data, ckpt_path=None, **options) -> Trainer:
    fitted = quiet_trainer(**{"enable_checkpointing": "callbacks" in options, **options})
    fitted.fit(lit, data, ckpt_path=ckpt_path, weights_only=True)
    return fitted


def state(lit: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in lit.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


class Normalized(nn.Module):
    """BatchNorm, dropout and power iteration: what a second pass over the encoder would move, or draw anew."""

    def __init__(self):
        super().__init__()
        layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3), layer, nn.SiLU()))
        self.decoder = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        z = self.encoder(x)
        recon = self.decoder(z)
        loss = (recon - x).square().mean()
        return AEOutput(loss, loss, loss, recon, z)


SMALL = {"num_codes": 8, "dim": 4, "channels": 8, "hidden": 4, "blocks": 1}
NETWORKS = {
    "Normalized": Normalized,
    "VAE": lambda: VAE.mlp((1, 8, 8), (16,), 3),
    "ContractiveAE": lambda: ContractiveAE.mlp((1, 8, 8), (16,), 3),
    "ImageVAE": lambda: ImageVAE.residual(1, channels=(8, 16), blocks=1, groups=4, latent_channels=2, precision="float32"),
    "DeepVAE": lambda: DeepVAE.residual(8, 1, (8, 8), 1, 2, groups=4),
    "VQVAE": lambda: VQVAE.conv(1, kmeans_iters=2, revive_below=0.5, **SMALL),
    "VQVAE2": lambda: VQVAE2.conv(1, **SMALL),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_activations_change_no_weight_and_no_buffer(name):
    x, results = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for gradient_checkpointing in (False, True):
        network = make(name)
        lit = LitAutoencoder(network, optimizer="sgd", gradient_checkpointing=gradient_checkpointing)
        lit._noise_seed = 0
        fit(lit, DataLoader(x, batch_size=4), max_epochs=1)
        results.append(state(lit))
    assert_same(*results)


@pytest.mark.parametrize("name", ["ImageVAE", "DeepVAE"])
def test_checkpointed_activations_take_less_memory(name):
    x = torch.rand(2, 1, 32, 32) if name == "ImageVAE" else torch.rand(32, 1, 8, 8)
    plain = make(name)
    checkpointed = LitAutoencoder(copy.deepcopy(plain), gradient_checkpointing=True).network
    of_plain, of_checkpointed = (kept_bytes(lambda n=n: n(x).loss, *n.parameters()) for n in (plain, checkpointed))
    assert of_checkpointed < of_plain / 2


def test_a_backward_pass_that_is_run_twice_recomputes_the_same():
    network = LitAutoencoder(make("Normalized"), gradient_checkpointing=True).network
    loss = network(torch.rand(4, 1, 8, 8)).loss
    before = state(network)
    first, second = (torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert_same(state(network), before)


def test_checkpointing_takes_a_network_with_an_encoder_or_a_decoder():
    message = r"^gradient_checkpointing: got Linear, takes a network with an encoder or a decoder$"
    with pytest.raises(ValueError, match=message):
        LitAutoencoder(nn.Linear(2, 2), gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["VQVAE", "VAE"])
def test_channels_last_is_a_layout_of_weights_and_images_alone(name):
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, moved = (LitAutoencoder(make(name), optimizer="sgd", channels_last=channels_last) for channels_last in (False, True))
    seen = []
    moved.network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for lit in (plain, moved):
        lit._noise_seed = 0
        fit(lit, DataLoader(x, batch_size=4), max_epochs=1)
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen)
    convolutions = [m.weight for m in moved.network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[name], tensor)


def test_channels_last_leaves_vectors_as_they_are():
    lit = LitAutoencoder(AE.mlp(6, (4,), 2), channels_last=True)
    assert lit(torch.rand(3, 6)).recon.shape == (3, 6)


class Overflow(nn.Module):
    """Its loss is NaN for a batch that has one, and its gradient is finite."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)

    def forward(self, x):
        recon = self.encoder(x.nan_to_num())
        loss = recon.square().mean() + x.sum().detach() * 0
        return AEOutput(loss, loss, loss, recon, recon)


def accumulated(parts: list[torch.Tensor], count: int) -> tuple[LitAutoencoder, Trainer]:
    torch.manual_seed(0)
    lit = LitAutoencoder(Overflow(), optimizer="sgd", momentum=0.0, learning_rate=0.1)
    return lit, fit(lit, DataLoader(parts, batch_size=None), max_epochs=1, accumulate_grad_batches=count)


def test_the_last_group_of_an_epoch_counts_by_its_batches():
    """5 batches in groups of 2: Lightning divides the fifth by 2 as well, so its step is that of half a learning rate."""
    parts = list(torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)))
    lit, fitted = accumulated(parts, 2)
    assert fitted.global_step == 3
    torch.manual_seed(0)
    expected = Overflow()
    for group in (parts[:2], parts[2:4], parts[4:]):
        loss = sum(expected(x).loss for x in group) / 2
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for ours, wanted in zip(lit.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_losses_write_the_gradient_of_an_accumulated_batch():
    """The loss kernel is told what Lightning divides the loss by, so nothing computes its gradient again."""
    network = AE.mlp((1, 8, 8), (16,), 3)
    for precision in ("32-true", "bf16-mixed"):
        with Recorder() as ran:
            fit(
                LitAutoencoder(network),
                DataLoader(torch.rand(6, 1, 8, 8), batch_size=1),
                max_steps=2,
                precision=precision,
                accumulate_grad_batches=3,
            )
        names = [func._schema.name for func in ran.operators]
        assert names.count("fastvae::reconstruction_forward") == 6
        assert "fastvae::reconstruction_backward" not in names


@pytest.mark.parametrize("bad", range(5))
def test_a_bad_batch_takes_its_group_alone_along(bad):
    parts = list(torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)))
    group = bad // 2
    good = [parts[:2], parts[2:4], parts[4:]]
    del good[group]
    plain, _ = accumulated([x for part in good for x in part], 2)
    parts[bad] = parts[bad].clone().fill_(torch.nan)
    lit, _ = accumulated(parts, 2)
    assert lit.skipped_steps == 1
    assert all(map(torch.equal, lit.network.parameters(), plain.network.parameters()))


def test_skipped_steps_are_a_curve():
    parts = [torch.rand(3, 4) for _ in range(3)]
    parts[1].fill_(torch.nan)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["skipped_steps"]))

    options = {"callbacks": [Watch()], "enable_checkpointing": False, "log_every_n_steps": 1}
    fit(LitAutoencoder(Overflow()), DataLoader(parts, batch_size=None), max_epochs=1, **options)
    assert seen == [0, 0, 1], "a step's figure is of the steps before it"


def run_digits(max_steps: int, compile: bool = True, **options) -> LitAutoencoder:
    torch.manual_seed(0)
    lit = LitAutoencoder(VAE.mlp((1, 8, 8), (16,), 3, beta=LinearSchedule(4)), compile=compile, gradient_checkpointing=True)
    lit._noise_seed = 0
    fit(lit, SklearnDigits(batch_size=512, binarize="dynamic"), max_steps=max_steps, limit_train_batches=2, limit_val_batches=0, **options)
    return lit


def test_a_compiled_training_resumes_to_the_bit_and_leaves_an_ordinary_checkpoint(tmp_path):
    """The compiler draws noise of its own, so a compiled training is another sample of the same training."""
    torch.compiler.reset()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = run_digits(4, callbacks=[keep])
    resumed = run_digits(4, ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(state(whole), state(resumed))
    plain = run_digits(4, compile=False)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert registry.describe(whole.network) == registry.describe(plain.network)
    for name, tensor in plain.network.named_parameters():
        torch.testing.assert_close(whole.network.get_parameter(name), tensor, rtol=0, atol=0.02)
    assert_same(state(whole), state(checkpoints.load(tmp_path / "step=4.ckpt")))
    torch.compiler.reset()


def averaged(steps: int, folder, **options) -> LitAutoencoder:
    torch.manual_seed(0)
    lit = LitAutoencoder(VAE.mlp((1, 8, 8), (16,), 3, beta=LinearSchedule(4), likelihood="gaussian"), learning_rate=0.01)
    lit._noise_seed = 0
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    data = SklearnDigits(batch_size=512, scaling="z_score")
    fit(lit, data, max_steps=steps, limit_val_batches=1, callbacks=[AveragedWeights(decay=0.5), keep], **options)
    return lit


def test_averaged_weights_are_stored_and_what_counts_is_not_averaged(tmp_path):
    lit = averaged(6, tmp_path)
    content = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    average, last = content["state_dict"], content["current_model_state"]
    assert average.keys() == last.keys()
    weights = dict(lit.named_parameters())
    for name in average:
        assert torch.equal(average[name], last[name]) == (name not in weights), name
        assert torch.equal(average[name], lit.state_dict()[name]), name
    assert average["network.kl_penalty.num_steps"] == 6
    assert "preprocessing.scaler.offset" in average
    assert_same(average, state(checkpoints.load(tmp_path / "step=6.ckpt")))


def test_the_average_is_exponential(tmp_path):
    averaged(4, tmp_path)
    first, second = (torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True) for steps in (2, 4))
    assert first["averaging_state"]["n_averaged"] == 2
    assert second["averaging_state"]["n_averaged"] == 4


def test_validation_is_of_the_averaged_weights(tmp_path):
    """6 steps are 2 epochs, so the last validation follows the last step."""
    during = averaged(6, tmp_path).trainer.callback_metrics["val/loss"]
    loaded = checkpoints.load(tmp_path / "step=6.ckpt")
    loaded._noise_seed = 0
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "limit_val_batches": 1}
    afterwards = Trainer(**quiet).validate(loaded, SklearnDigits(batch_size=512), verbose=False)[0]["val/loss"]
    assert afterwards == pytest.approx(float(during), rel=1e-6)


def test_a_training_with_averaged_weights_resumes_to_the_bit(tmp_path):
    whole = averaged(6, tmp_path / "whole")
    torch.manual_seed(1)
    resumed = averaged(6, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert_same(state(whole), state(resumed))
    stored = [torch.load(tmp_path / run / "step=6.ckpt", weights_only=True)["current_model_state"] for run in ("whole", "resumed")]
    assert_same(*stored)


def test_pictures_are_of_the_averaged_weights(tmp_path):
    lit = LitAutoencoder(make("VAE"), learning_rate=0.1)
    data = SklearnDigits(batch_size=512)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="kept")
    callbacks = [Pictures(count=4), AveragedWeights(decay=0.9), keep]
    fit(lit, data, max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path)
    drawn = Image.open(tmp_path / "pictures/epoch_0000/reconstructions.png")
    x = data.samples("val", 4)["x"]
    average, last = checkpoints.load(tmp_path / "kept.ckpt"), lit
    last.load_state_dict(torch.load(tmp_path / "kept.ckpt", weights_only=True)["current_model_state"])
    of_average, of_last = (draw_pictures(network, x)["reconstructions"][0] for network in (average, last))
    assert torch.equal(torch.from_numpy(np.array(drawn)), of_average)
    assert not torch.equal(of_average, of_last)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}])
def test_averages_that_do_not_exist(options):
    with pytest.raises(ValueError, match=r"^decay, every_n_steps: got"):
        AveragedWeights(**options)


CONFIG = """
network: {class_path: VAE_mlp, init_args: {data_shape: [1, 8, 8], hidden: [16], latent_dim: 3}}
model: {channels_last: true, gradient_checkpointing: true}
data: {class_path: SklearnDigits, init_args: {batch_size: 512, scaling: min_max}}
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  accumulate_grad_batches: 2
  callbacks: [{class_path: AveragedWeights, init_args: {decay: 0.5}}]
"""


def test_the_command_line_takes_every_option_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("step.yaml").write_text(CONFIG)
    checkpoint = "--checkpoint.dirpath=kept"
    command_line.main(["fit", "--config=step.yaml", checkpoint, "--trainer.precision=bf16-true"])
    content = torch.load("kept/last.ckpt", weights_only=True)
    name = "network.encoder.0.1.weight"
    assert not torch.equal(content["state_dict"][name], content["current_model_state"][name])
    assert torch.equal(checkpoints.load(Path("kept/last.ckpt")).state_dict()[name], content["state_dict"][name].float())
    command_line.main(["validate", "kept/last.ckpt", "--trainer.logger=false", "--trainer.accelerator=cpu"])
    assert "val/loss" in capsys.readouterr().out
    command_line.main(["fit", "--config=step.yaml", checkpoint, "--trainer.max_steps=6", "--ckpt_path=kept/last.ckpt"])
    command_line.main(["sample", "kept/last.ckpt", "--out=made", "--count=4"])
    assert Path("made/samples.png").is_file()
