"""The stacked autoencoder (Bengio et al., *Greedy Layer-Wise Training of Deep Networks*, 2007)."""

import functools
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fastvae._types import ReconLoss
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models.autoencoder import AE
from fastvae.models.denoising_ae import DenoisingAE


class StackedAE(AE):
    """An autoencoder that can be trained one stage at a time (Bengio et al., *Greedy Layer-Wise Training of Deep Networks*, 2007).

    :meth:`pretrain` does so, each stage as an autoencoder of the codes below it; training the model itself afterwards is the fine-tuning.

    Args:
        encoder: a sequence of stages, from the data up; the ready-made networks are such sequences.
        decoder: as many stages, from the code down: each undoes its counterpart.
        recon_loss: see :class:`~fastvae.models.AE`.
    """

    def __init__(self, encoder: nn.Sequential, decoder: nn.Sequential, *, recon_loss: ReconLoss = "mse"):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        for name, coder in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(coder, nn.Sequential):
                raise TypeError(f"{name}: got {type(coder).__name__}, takes an nn.Sequential of stages")
        if len(encoder) != len(decoder):
            raise ValueError(f"decoder: got {len(decoder)} stages, takes one for each of the encoder's {len(encoder)}")

    def stage(self, level: int) -> AE:
        """The autoencoder of one stage, counted from 0; its modules are this model's own."""
        # Codes are real numbers, whatever the data are.
        encoder, decoder = cast("nn.Sequential", self.encoder), cast("nn.Sequential", self.decoder)
        return AE(encoder[level], decoder[-1 - level], recon_loss=self.recon_loss if level == 0 else "mse")

    @reading
    def stage_input(self, x: Tensor, level: int) -> Tensor:
        """The data that the stage ``level`` learns to reconstruct: the codes of the stages below it."""
        return cast("nn.Sequential", self.encoder)[:level](as_float(x, self.encoder))

    def pretrain(
        self,
        batches: Iterable[Tensor],
        epochs: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[float]]:
        """Trains the stages in turn, from the input up.

        Args:
            batches: what can be iterated over once an epoch, such as a ``DataLoader`` of images alone.
            epochs: passes over ``batches`` for each stage.
            optimizer: from parameters to an optimizer; Adam with a learning rate of 1e-3 by default.
            corruption: of what each stage encodes, which makes this a stacked denoising autoencoder.

        Returns:
            The mean loss of each epoch, a list for each stage.
        """
        make = functools.partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
        return [self._pretrain_stage(level, batches, epochs, make, corruption) for level in range(len(cast("nn.Sequential", self.encoder)))]

    def _pretrain_stage(self, level, batches, epochs, make_optimizer, corruption) -> list[float]:
        stage = self.stage(level)
        if corruption is not None:
            stage = DenoisingAE(stage.encoder, stage.decoder, corruption=corruption, recon_loss=stage.recon_loss)
        optimizer = make_optimizer(stage.parameters())
        history = []
        for _ in range(epochs):
            losses = []
            for batch in batches:
                optimizer.zero_grad()
                loss = stage(self.stage_input(batch, level)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            if not losses:
                raise ValueError("batches: got none, takes what can be iterated over once an epoch")
            history.append(torch.stack(losses).mean().item())
        return history
