"""A network with a discriminator, whose weights have a loss of their own, against two optimizers and two backward passes in plain torch."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

for package in ("lightning", "jsonargparse", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from test_training_ranks import as_it_comes, join, trainer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fastvae.models._adversarial import with_fixed_weights  # noqa: E402
from fastvae.training.errors import TrainingError  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402
from fastvae.training.optimizers import learning_rate_factor  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

RATE, DISCRIMINATOR_RATE, BETAS = 0.01, 0.003, (0.5, 0.9)
BATCHES = 6


class Output(NamedTuple):
    loss: torch.Tensor
    recon_loss: torch.Tensor
    discriminator_loss: torch.Tensor
    recon: torch.Tensor


class Adversarial(nn.Module):
    """Its codes are to look to the discriminator like those of which each dimension comes from another sample.

    A batch that begins with 2 has an infinite loss of the discriminator.
    """

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.discriminator = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(3, 1)

    def parameter_groups(self):
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        return [{"params": autoencoder}, {"params": self.discriminator.parameters(), "lr": DISCRIMINATOR_RATE, "betas": BETAS}]

    def forward(self, x):
        z = self.encoder(x)
        recon = self.decoder(z)
        recon_loss = F.mse_loss(recon, x)
        loss = recon_loss + 0.5 * with_fixed_weights(self.discriminator, z).mean()
        permuted = z.detach().gather(0, torch.rand_like(z).argsort(0))
        judged, other = self.discriminator(z.detach()), self.discriminator(permuted)
        discriminator_loss = F.softplus(-judged).mean() + F.softplus(other).mean() + torch.where(x[0, 0] == 2, math.inf, 0.0)
        return Output(loss, recon_loss, discriminator_loss, recon)


def make() -> LitAutoencoder:
    torch.manual_seed(0)
    lit = LitAutoencoder(Adversarial(), learning_rate=RATE, schedule="cosine", warmup_steps=2)
    lit._noise_seed = 0
    return lit


def batches() -> torch.Tensor:
    return torch.rand(BATCHES, 8, 4, generator=torch.Generator().manual_seed(0))


def fit(data: torch.Tensor, ckpt_path=None, **options):
    lit = make()
    fitted = quiet_trainer(**{"enable_checkpointing": "callbacks" in options, "max_epochs": 1, **options})
    fitted.fit(lit, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return lit, fitted


def two_optimizers(data: torch.Tensor, clip: float = math.inf, parts: int = 1) -> nn.Module:
    """The same training in plain torch: an optimizer and a backward pass for each loss."""
    lit = make()
    network = lit.network
    groups = [list(group["params"]) for group in network.parameter_groups()]
    optimizers = [torch.optim.Adam(groups[0], lr=RATE), torch.optim.Adam(groups[1], lr=DISCRIMINATOR_RATE, betas=BETAS)]
    factor = learning_rate_factor("cosine", 2, len(data) // parts)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    lit._trainer = quiet_trainer()
    for number, x in enumerate(data):
        lit._seed_noise(0, 0, number)
        output = network(x)
        for loss, weights in ((output.loss, groups[0]), (output.discriminator_loss, groups[1])):
            (loss / parts).backward(inputs=weights, retain_graph=True)
        if (number + 1) % parts:
            continue
        for optimizer, schedule, weights in zip(optimizers, schedules, groups, strict=True):
            nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return network


def scaled() -> dict:
    """A loss scale without autocast, so that results can be compared."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    return {"plugins": [plugin]}


def assert_near(network: nn.Module, expected: nn.Module) -> None:
    for (name, ours), wanted in zip(network.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def state(lit: LitAutoencoder, fitted) -> list[torch.Tensor]:
    moments = [value for entry in fitted.optimizers[0].state.values() for value in entry.values()]
    return [tensor.clone() for tensor in (*lit.state_dict().values(), *moments)]


def test_each_loss_keeps_off_the_weights_of_the_other():
    network = Adversarial()
    output = network(torch.rand(8, 4))
    autoencoder, discriminator = ([*group["params"]] for group in network.parameter_groups())
    for loss, others in ((output.loss, discriminator), (output.discriminator_loss, autoencoder)):
        assert torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True) == (None,) * len(others)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"accumulate_grad_batches": 2}, {"parts": 2}),
        ({"loss_scale": True}, {}),
        ({"loss_scale": True, "gradient_clip_val": 0.05, "accumulate_grad_batches": 2}, {"clip": 0.05, "parts": 2}),
    ],
    ids=str,
)
def test_a_step_is_that_of_two_optimizers(options, reference):
    """The loss scale grows every second step."""
    scale = scaled() if options.get("loss_scale") else {}
    lit, fitted = fit(batches(), **{name: value for name, value in options.items() if name != "loss_scale"}, **scale)
    assert_near(lit.network, two_optimizers(batches(), **reference))
    assert fitted.global_step == BATCHES // options.get("accumulate_grad_batches", 1)
    assert [group["initial_lr"] for group in fitted.optimizers[0].param_groups] == [RATE, DISCRIMINATOR_RATE]


def test_gradients_are_clipped_by_value():
    lit, fitted = fit(batches()[:1], gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    moments = [
        entry["exp_avg"] / (1 - beta)
        for beta, group in zip((0.9, 0.5), fitted.optimizers[0].param_groups, strict=True)
        for entry in (fitted.optimizers[0].state[parameter] for parameter in group["params"])
    ]
    assert max(float(moment.abs().max()) for moment in moments) == pytest.approx(1e-4)
    assert lit.skipped_steps == 0


@pytest.mark.parametrize("bad", [0, 3])
def test_a_discriminator_that_overflows_skips_the_step_of_both(bad):
    data = batches()
    data[bad, 0, 0] = 2
    lit, fitted = fit(data[bad : bad + 1])
    assert lit.skipped_steps == 1
    assert_near(lit.network, make().network)
    lit, fitted = fit(data)
    assert lit.skipped_steps == 1
    assert all(tensor.isfinite().all() for tensor in state(lit, fitted))


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=BATCHES, save_top_k=-1, filename="{step}")
    whole = fit(batches(), max_epochs=2, callbacks=[keep])
    resumed = fit(batches(), max_epochs=2, ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
    for first, second in zip(state(*whole), state(*resumed), strict=True):
        assert torch.equal(first, second)


def test_the_compiled_network_trains_alike():
    torch.compiler.reset()
    lit = make()
    compiled = torch.compile(lit.network, fullgraph=True, dynamic=False)
    x = batches()[0]
    losses = [(output.loss, output.recon_loss) for output in (lit.network(x), compiled(x))]
    gradients = [torch.autograd.grad(loss, list(lit.network.encoder.parameters())) for loss, _ in losses]
    for first, second in (losses, gradients):
        torch.testing.assert_close(first, second)
    torch.compiler.reset()


def train(rank: int) -> dict[str, torch.Tensor]:
    join(rank)
    lit = make()
    data = batches()[:, 4 * rank : 4 * rank + 4].flatten(0, 1)
    if rank == 1:
        data[4 * 3] = 2
    trainer(2, max_steps=BATCHES, strategy=DDPStrategy(process_group_backend="gloo")).fit(lit, as_it_comes(data, 4))
    return {name: tensor.clone() for name, tensor in lit.state_dict().items()}


def test_two_processes_take_the_same_steps(ranks):
    """One of them meets a loss that is infinite."""
    first, second = ranks.run(train)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    assert first["skipped_steps"] == 1


def test_the_losses_are_curves():
    _, fitted = fit(batches(), log_every_n_steps=1)
    assert {"train/loss", "train/recon_loss", "train/discriminator_loss"} <= fitted.callback_metrics.keys()


def test_weights_that_no_group_holds_are_named():
    lit = make()
    lit.network.extra = nn.Linear(2, 2)
    with pytest.raises(
        TrainingError, match=r"^parameter_groups: of Adversarial leave out extra.weight, extra.bias, take each weight once$"
    ):
        quiet_trainer(max_steps=1).fit(lit, DataLoader(batches(), batch_size=None))
