"""A tiny model of each class that the registry has, and batches of any number of samples for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae import models
from fastvae.nn import LinearSchedule

SHAPE, CLASSES, TOKENS = (1, 4, 4), 3, 12
QUANTIZED = {"num_codes": 8, "dim": 4, "channels": 8, "hidden": 4, "blocks": 1}
SIZES = {"data_shape": SHAPE, "hidden": (8,), "latent_dim": 3}

TINY: dict[str, Callable[[], nn.Module]] = {
    "AE": lambda: models.AE.mlp(**SIZES),
    "DenoisingAE": lambda: models.DenoisingAE.mlp(**SIZES),
    "SparseAE": lambda: models.SparseAE.mlp(**SIZES, code="sigmoid"),
    "ContractiveAE": lambda: models.ContractiveAE.mlp(**SIZES, code="sigmoid"),
    "StackedAE": lambda: models.StackedAE.mlp(**SIZES),
    "WAE": lambda: models.WAE.mlp(**SIZES),
    "VAE": lambda: models.VAE.mlp(**SIZES, beta=LinearSchedule(100)),
    "ImageVAE": lambda: models.ImageVAE.residual(1, (8, 8), 1, 4, 2, image_size=4),
    "IWAE": lambda: models.IWAE.mlp(**SIZES, num_samples=3),
    "BetaTCVAE": lambda: models.BetaTCVAE.mlp(**SIZES, dataset_size=64),
    "DIPVAE": lambda: models.DIPVAE.mlp(**SIZES),
    "FactorVAE": lambda: models.FactorVAE.mlp(**SIZES, discriminator_units=8, discriminator_layers=2),
    "InfoVAE": lambda: models.InfoVAE.mlp(**SIZES),
    "CVAE": lambda: models.CVAE.mlp(**SIZES, num_classes=CLASSES),
    "SemiSupervisedVAE": lambda: models.SemiSupervisedVAE.mlp(**SIZES, num_classes=CLASSES),
    "LadderVAE": lambda: models.LadderVAE.mlp(SHAPE, (8, 6), (3, 2)),
    "DeepVAE": lambda: models.DeepVAE.residual(4, 1, (4, 8), 1, 2, groups=2),
    "VQVAE": lambda: models.VQVAE.conv(1, **QUANTIZED),
    "VQVAE2": lambda: models.VQVAE2.conv(1, **QUANTIZED),
    "IndexPrior": lambda: models.IndexPrior.transformer(models.VQVAE.conv(1, **QUANTIZED), (2, 2), width=8, depth=1, heads=2),
    "SequenceVAE": lambda: models.SequenceVAE.recurrent(TOKENS, 3, 4, 8),
}
# Those that halve an image more often, or fix its size with a prior.
IMAGES = {"VQVAE": (1, 8, 8), "VQVAE2": (1, 8, 8), "IndexPrior": (1, 8, 8)}


def make(name: str) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return TINY[name]()


def batch(name: str, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What the model is called with."""
    if name == "SequenceVAE":
        return (torch.randint(1, TOKENS, (rows, 3 + rows % 4), generator=generator),)
    x = torch.rand(rows, *IMAGES.get(name, SHAPE), generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    return (x, labels) if name in ("CVAE", "SemiSupervisedVAE") else (x,)


def total_loss(output) -> Tensor:
    """That of the model, and that of its discriminator where it has one."""
    return sum(getattr(output, name) for name in ("loss", "discriminator_loss") if hasattr(output, name))


def scrambled(name: str) -> nn.Module:
    """After two steps, so that running statistics, schedules and codebooks are no longer those of a new model; in evaluation mode."""
    model, generator = make(name).train(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        total_loss(model(*batch(name, 8, generator))).backward()
        optimizer.step()
    return model.eval()


def numbers(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The fields of an output that are numbers, for a batch that is always the same and with noise that is."""
    torch.manual_seed(3)
    with torch.no_grad():
        output = model(*batch(name, 5, torch.Generator().manual_seed(4)))
    return {key: value for key, value in output._asdict().items() if isinstance(value, Tensor) and value.ndim == 0}
