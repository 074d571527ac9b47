"""Two processes train as one does on the joined batch."""

import os

import pytest
import torch
from torch import nn

for package in ("lightning", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fastvae.models import AE, VQVAE, AEOutput  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402

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


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "AE": lambda: AE.mlp((1, 8, 8), (16,), 4),
        # Without k-means, which starts from vectors of the first process alone.
        "VQVAE": lambda: VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1),
        "NoNumber": NoNumber,
    }[name]()


def trainer(processes: int) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    return Trainer(accelerator="cpu", devices=1, num_nodes=processes, strategy=strategy, max_steps=STEPS, num_sanity_val_steps=0, **quiet)


def join(rank: int) -> None:
    """Says to Lightning which of the two processes this is; they have a process group already."""
    os.environ.update({"NODE_RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})


def state(lit: LitAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lit.state_dict().items()}


def train(rank: int, name: str, processes: int) -> dict[str, torch.Tensor]:
    if processes > 1:
        join(rank)
    lit = LitAutoencoder(make(name), optimizer="sgd", learning_rate=0.01)
    trainer(processes).fit(lit, SklearnDigits(batch_size=BATCH // processes))
    return state(lit)


def train_with_a_bad_batch(rank: int) -> tuple[int, dict[str, torch.Tensor]]:
    join(rank)
    x = torch.rand(STEPS, 2, 4, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        x[1] = 0
    lit = LitAutoencoder(make("NoNumber"))
    fitted = trainer(2)
    fitted.fit(lit, DataLoader(x.flatten(0, 1), batch_size=2, sampler=torch.utils.data.DistributedSampler(range(6), 1, 0, shuffle=False)))
    return int(lit.skipped_steps), state(lit)


@pytest.mark.parametrize("name", ["AE", "VQVAE"])
def test_two_processes_train_as_one(ranks, name):
    one = train(0, name, 1)
    for both in ranks.run(train, name, 2):
        assert both.keys() == one.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(both[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_a_loss_that_is_no_number_in_one_process_skips_the_step_in_both(ranks):
    (first_count, first), (second_count, second) = ranks.run(train_with_a_bad_batch)
    assert first_count == second_count == 1
    assert all(torch.equal(first[key], second[key]) and first[key].isfinite().all() for key in first)
