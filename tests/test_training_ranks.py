"""Two processes train as one does on the joined batch."""

import os

import pytest
import torch
from torch import nn

for package in ("lightning", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from lightning.pytorch import Callback, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

from fastvae.models import AE, VQVAE, AEOutput  # noqa: E402
from fastvae.models.networks.vq_convolutional import conv_decoder, conv_encoder  # noqa: E402
from fastvae.nn import ResidualVectorQuantizer  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.callbacks import AveragedWeights, Pictures  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.errors import TrainingError  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402
from fastvae.training.splits import ResumableSampler  # noqa: E402

BATCH = 128
STEPS = 3


class NoNumber(nn.Module):
    """Its loss is NaN for a batch of zeros."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        recon = self.linear(x)
        loss = (recon - x).square().mean() * (x.sum() / x.sum())
        return AEOutput(loss, loss, loss, recon, recon)


class Unused(nn.Module):
    """Its loss does not depend on one of its layers."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        recon = self.linear(x)
        loss = (recon - x).square().mean()
        return AEOutput(loss, loss, loss, recon, recon)


def residual_vqvae() -> VQVAE:
    """A random number of steps is taken, and the codebooks of the others get no gradient of the data."""
    quantizer = ResidualVectorQuantizer(4, 8, 4, quantizer_dropout=True, update="gradient", channels_first=True)
    return VQVAE(conv_encoder(1, 4, hidden=4, blocks=1), conv_decoder(4, 1, 4, hidden=4, blocks=1), quantizer)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "AE": lambda: AE.mlp((1, 8, 8), (16,), 4),
        # Without k-means, which starts from vectors of the first process alone.
        "VQVAE": lambda: VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1),
        "NoNumber": NoNumber,
        "Unused": Unused,
        "residual": residual_vqvae,
    }[name]()


def ddp(**options) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def sharding() -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")


def trainer(processes: int, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    defaults = {"strategy": ddp() if processes > 1 else "auto", "max_steps": STEPS, "enable_checkpointing": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "num_nodes": processes, **quiet, **defaults, **options})


def as_it_comes(x: torch.Tensor, batch_size: int) -> DataLoader:
    """Batches of one process's own data: Lightning leaves a sampler for distributed data as it is."""
    return DataLoader(x, batch_size=batch_size, sampler=DistributedSampler(x, 1, 0, shuffle=False))


def join(rank: int) -> None:
    """Says to Lightning which of the two processes this is; they have a process group already."""
    os.environ.update({"NODE_RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})


def state(lit: LitAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lit.state_dict().items()}


def train(rank: int, name: str, processes: int, **options) -> dict[str, torch.Tensor]:
    if processes > 1:
        join(rank)
    lit = LitAutoencoder(make(name), **{"optimizer": "sgd", "learning_rate": 0.01, **options})
    trainer(processes).fit(lit, SklearnDigits(batch_size=BATCH // processes))
    return state(lit)


def whole_state(lit: LitAutoencoder) -> dict[str, torch.Tensor]:
    """The state with the parts of all processes joined."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state(lit).items()}


def train_with_a_bad_batch(rank: int, sharded: bool) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    join(rank)
    x = torch.rand(STEPS, 2, 4, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        x[1] = 0
    lit, seen = LitAutoencoder(make("NoNumber")), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["skipped_steps"]))

    options = {"strategy": sharding()} if sharded else {}
    fitted = trainer(2, callbacks=[Watch()], log_every_n_steps=1, **options)
    fitted.fit(lit, as_it_comes(x.flatten(0, 1), 2))
    return seen, int(lit.skipped_steps), whole_state(lit)


def train_unevenly(rank: int) -> dict[str, torch.Tensor]:
    """One step on 3 samples in one process and 1 in the other."""
    join(rank)
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    lit = LitAutoencoder(make("NoNumber"), optimizer="sgd", momentum=0.0, learning_rate=0.1)
    trainer(2, max_steps=1).fit(lit, as_it_comes(x[:3] if rank == 0 else x[3:], 3))
    return state(lit.network)


def train_with_unused(rank: int) -> dict[str, torch.Tensor]:
    join(rank)
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(rank))
    lit = LitAutoencoder(make("Unused"))
    trainer(2, strategy=ddp(find_unused_parameters=True)).fit(lit, as_it_comes(x, 2))
    return state(lit)


def train_with_depth_dropout(rank: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    join(rank)
    lit, depths = LitAutoencoder(make("residual")), []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            depths.append(0)

    def count(*_):
        depths[-1] += 1

    for layer in lit.network.quantizer.layers:
        layer.register_forward_hook(count)
    trainer(2, max_steps=8, limit_val_batches=0, callbacks=[Watch()]).fit(lit, SklearnDigits(batch_size=32))
    return depths, state(lit)


def train_sharded(rank: int, folder: str) -> tuple[int, float]:
    """The number of elements of this process, and the loss of the validation."""
    join(rank)
    lit = LitAutoencoder(make("AE"), optimizer="adamw", learning_rate=1e-3)
    keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=STEPS)
    options = {"strategy": sharding(), "callbacks": [keep, Pictures()], "enable_checkpointing": True, "default_root_dir": folder}
    fitted = trainer(2, limit_train_batches=STEPS, **options)
    fitted.fit(lit, SklearnDigits(batch_size=BATCH // 2))
    # A forward pass without a backward pass leaves the weights whole.
    lit.network.reshard()
    return sum(p.to_local().numel() for p in lit.network.parameters()), float(fitted.callback_metrics["val/loss"])


def refusals_of_sharding(rank: int) -> list[str]:
    join(rank)
    messages = []
    for options, callbacks in (({"optimizer": "sgd"}, []), ({}, [AveragedWeights()])):
        with pytest.raises(TrainingError) as raised:
            trainer(2, strategy=sharding(), callbacks=callbacks).fit(LitAutoencoder(make("AE"), **options), SklearnDigits(batch_size=64))
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize("name", ["AE", "VQVAE"])
def test_two_processes_train_as_one(ranks, name):
    one = train(0, name, 1)
    for both in ranks.run(train, name, 2):
        assert both.keys() == one.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(both[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_loss_that_is_no_number_in_one_process_skips_the_step_in_both(ranks, sharded):
    (first_curve, first_count, first), (second_curve, second_count, second) = ranks.run(train_with_a_bad_batch, sharded)
    assert first_count == second_count == 1
    assert first_curve == second_curve == [0, 0, 1]
    assert all(torch.equal(first[key], second[key]) and first[key].isfinite().all() for key in first)


def test_the_data_modules_give_all_processes_equally_many_samples():
    samplers = [ResumableSampler(7, 0, num_replicas=2, rank=rank) for rank in range(2)]
    first, second = map(list, samplers)
    assert len(first) == len(second) == 4
    assert set(first) | set(second) == set(range(7))


def test_processes_with_different_numbers_of_samples_count_alike(ranks):
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    network = make("NoNumber")
    ((network(x[:3]).loss + network(x[3:]).loss) / 2).backward()
    expected = {name: parameter.detach() - 0.1 * parameter.grad for name, parameter in network.named_parameters()}
    for both in ranks.run(train_unevenly):
        for name, tensor in expected.items():
            torch.testing.assert_close(both[name], tensor)


def test_weights_that_the_loss_does_not_depend_on_stay(ranks):
    first, second = ranks.run(train_with_unused)
    start = make("Unused").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(first["network.unused.weight"], start["unused.weight"])
    assert not torch.equal(first["network.linear.weight"], start["linear.weight"])


def test_processes_draw_the_same_depth_of_a_residual_quantizer(ranks):
    (first_depths, first), (second_depths, second) = ranks.run(train_with_depth_dropout)
    assert first_depths == second_depths
    assert len(set(first_depths)) > 1
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_sharded_network_trains_as_a_whole_one(ranks, tmp_path):
    one = train(0, "AE", 1, optimizer="adamw", learning_rate=1e-3)
    (first_count, first_loss), (second_count, second_loss) = ranks.run(train_sharded, str(tmp_path))
    loaded = checkpoints.load(tmp_path / "kept.ckpt")
    assert first_count + second_count == sum(p.numel() for p in loaded.parameters())
    assert 0 < first_count < first_count + second_count
    assert first_loss == pytest.approx(second_loss)
    for key, tensor in state(loaded).items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert not (tmp_path / "pictures").exists()


def test_what_sharded_weights_do_not_do_is_an_error(ranks):
    expected = [
        "optimizer: got 'sgd' for a network that is sharded, takes 'adam' or 'adamw'",
        "callbacks: got AveragedWeights with ModelParallelStrategy, takes a strategy with whole weights",
    ]
    assert ranks.run(refusals_of_sharding) == [expected, expected]
