"""LitAutoencoder: steps that are skipped, resuming, schedules, logs, two processes."""

import math

import pytest
import torch
from torch import nn

for package in ("lightning", "jsonargparse"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fastvae.models import AE, VAE, VQVAE, AEOutput  # noqa: E402
from fastvae.nn import CapacitySchedule, LinearSchedule  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.errors import CheckpointError  # noqa: E402
from fastvae.training.module import LitAutoencoder, data_of, scalars, step_seed  # noqa: E402
from fastvae.training.optimizers import learning_rate_factor  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


def trainer(**options) -> Trainer:
    return quiet_trainer(**{"enable_checkpointing": "callbacks" in options, **options})


def tiny(**options) -> LitAutoencoder:
    torch.manual_seed(0)
    return LitAutoencoder(VAE.mlp((1, 8, 8), (16,), 3, beta=LinearSchedule(15)), **options)


def weights(lit: LitAutoencoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lit.network.parameters()]


def optimizer_state(fitted: Trainer) -> list[torch.Tensor]:
    return [value.clone() for state in fitted.optimizers[0].state.values() for value in state.values()]


def same(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


class Overflow(nn.Module):
    """Its loss is infinite for a batch that begins with a negative number, and its gradient is finite."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        recon = self.linear(x)
        loss = recon.square().mean() + torch.where(x[0, 0] < 0, math.inf, 0.0)
        return AEOutput(loss, loss, loss, recon, recon)


BATCHES = 4


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_with_a_non_finite_loss_changes_nothing(optimizer, options, bad):
    """The first step of SGD matters by itself: torch allocates the momentum in it."""
    good = [torch.rand(4, 4) for _ in range(BATCHES - 1)]
    results = []
    for stream in (good, [*good[:bad], -torch.ones(4, 4), *good[bad:]]):
        torch.manual_seed(0)
        lit = LitAutoencoder(Overflow(), optimizer=optimizer, weight_decay=0.1)
        fitted = trainer(max_epochs=1, **options)
        fitted.fit(lit, DataLoader(stream, batch_size=None))
        results.append((lit, fitted))
    (plain, plain_fitted), (lit, fitted) = results
    assert plain.skipped_steps == 0
    assert lit.skipped_steps == 1
    assert same(weights(lit), weights(plain))
    assert same(optimizer_state(fitted), optimizer_state(plain_fitted))
    assert all(value.isfinite().all() for value in optimizer_state(fitted))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_grad_scaler_skips_the_same_steps(optimizer, clip):
    """An infinite loss whose gradient is finite is no overflow to a GradScaler."""
    good = [torch.rand(4, 4) for _ in range(BATCHES)]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    lit = LitAutoencoder(Overflow(), optimizer=optimizer)
    fitted = trainer(max_epochs=1, plugins=[plugin], gradient_clip_val=clip)
    fitted.fit(lit, DataLoader([*good, -torch.ones(4, 4)], batch_size=None))
    assert lit.skipped_steps == 1
    assert all(p.isfinite().all() for p in lit.parameters())
    assert plugin.scaler.get_scale() == 2.0**7
    if optimizer == "adam":
        assert {float(state["step"]) for state in fitted.optimizers[0].state.values()} == {BATCHES}


def test_a_bad_part_of_an_accumulated_batch_skips_the_step():
    x = torch.rand(4, 4, 4)
    x[1] = -1
    lit = LitAutoencoder(Overflow())
    before = weights(lit)
    trainer(max_steps=1, accumulate_grad_batches=2).fit(lit, DataLoader(x, batch_size=None))
    assert lit.skipped_steps == 1
    assert same(weights(lit), before)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, results = torch.rand(16, 4), []
    for size, parts in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        lit = LitAutoencoder(AE.mlp(4, (8,), 2), optimizer="sgd", learning_rate=0.1)
        trainer(max_epochs=1, accumulate_grad_batches=parts).fit(lit, DataLoader(x, batch_size=size))
        results.append(weights(lit))
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(whole, accumulated)


@pytest.mark.parametrize("steps", [10, 12])
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path, steps):
    """10 is the end of an epoch of 5 batches, 12 is inside one."""

    def run(**options):
        lit = tiny(schedule="cosine", warmup_steps=3)
        fitted = trainer(max_steps=20, **options.pop("trainer", {}))
        fitted.fit(lit, SklearnDigits(batch_size=256, binarize="dynamic", scaling="none"), weights_only=True, **options)
        return lit, fitted

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    whole, whole_fitted = run(trainer={"callbacks": [keep]})
    torch.manual_seed(1)
    resumed, resumed_fitted = run(ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert resumed_fitted.global_step == 20
    assert same(list(whole.state_dict().values()), list(resumed.state_dict().values()))
    assert same(optimizer_state(whole_fitted), optimizer_state(resumed_fitted))
    assert whole.network.kl_penalty.num_steps == resumed.network.kl_penalty.num_steps == 20


def test_a_checkpoint_of_another_network_says_which(tmp_path):
    data = SklearnDigits(batch_size=256)
    first = trainer(max_steps=1, callbacks=[ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=1)])
    first.fit(tiny(), data)
    for other, message in ((VAE.conv(), "holds the weights of VAE.mlp, this training is of VAE.conv"), (VAE.mlp(), "has shape")):
        with pytest.raises(CheckpointError, match=message):
            trainer(max_steps=1).fit(LitAutoencoder(other), data, ckpt_path=tmp_path / "kept.ckpt")


def test_schedules_advance_by_epoch():
    lit = tiny(advance_kl="epoch")
    trainer(max_epochs=2).fit(lit, SklearnDigits(batch_size=512))
    assert lit.network.kl_penalty.num_steps == 2


def test_logs_have_the_names_of_the_output():
    lit = LitAutoencoder(VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1))
    fitted = trainer(max_epochs=1, limit_train_batches=1, log_every_n_steps=1)
    fitted.fit(lit, SklearnDigits(batch_size=64))
    names = {"loss", "recon_loss", "vq_loss", "perplexity", "usage"}
    expected = {"skipped_steps", *(f"train/{name}" for name in names), *(f"val/{name}" for name in names)}
    assert expected <= fitted.callback_metrics.keys()
    tested = trainer().test(lit, SklearnDigits(batch_size=64), verbose=False)[0]
    assert {f"test/{name}" for name in names} <= tested.keys()


def test_weights_are_averaged_by_lightning(tmp_path):
    lit = tiny()
    keep = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=2)
    trainer(max_steps=2, callbacks=[EMAWeightAveraging(decay=0.5), keep]).fit(lit, SklearnDigits(batch_size=256))
    content = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    average, last = (content[entry]["network.encoder.0.1.weight"] for entry in ("state_dict", "current_model_state"))
    assert not torch.equal(average, last)
    assert checkpoints.load(tmp_path / "kept.ckpt").network.encoder[0][1].weight.equal(average)


def test_batches_of_each_kind():
    x = torch.rand(2, 3)
    for batch in (x, (x, torch.zeros(2)), [x, torch.zeros(2)], {"x": x, "label": torch.zeros(2)}):
        assert data_of(batch) is x
    with pytest.raises(ValueError, match=r"^batch: got a mapping of image, takes one with x$"):
        data_of({"image": x})


def test_scalars_of_two_levels_are_numbered():
    output = AEOutput(torch.zeros(()), (torch.ones(()), torch.ones(())), torch.zeros(3), torch.zeros(2, 2), torch.zeros(2))
    assert list(scalars(output)) == ["loss", "recon_loss_0", "recon_loss_1"]


def test_seeds_differ_and_repeat():
    assert step_seed(0, 1, 2) == step_seed(0, 1, 2)
    assert len({step_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


def test_learning_rate_factors():
    cosine, linear = (learning_rate_factor(name, 4, 14) for name in ("cosine", "linear"))
    assert [cosine(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [cosine(4), cosine(9), cosine(14)] == pytest.approx([1, 0.5, 0])
    assert [linear(4), linear(9), linear(14)] == pytest.approx([1, 0.5, 0])
    with pytest.raises(ValueError, match=r"^schedule: got 'cosine' for a training without an end"):
        learning_rate_factor("cosine", 0, math.inf)


@pytest.mark.parametrize(("option", "value"), [("optimizer", "adm"), ("schedule", "cos"), ("advance_kl", "batch")])
def test_unknown_options(option, value):
    with pytest.raises(ValueError, match=f"^{option}: got '{value}', takes one of"):
        LitAutoencoder(VAE.mlp(), **{option: value})


def test_capacity_is_in_the_checkpoint():
    lit = LitAutoencoder(VAE.mlp(capacity=CapacitySchedule(10)))
    assert "network.kl_penalty.num_steps" in lit.state_dict()
