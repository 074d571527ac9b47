"""The quantizer of taming-transformers."""

import torch
from torch import Tensor, nn

from fastvae import functional as FV


class VectorQuantizer(nn.Module):
    """taming-transformers' ``VectorQuantizer2``: ``(z_q, loss, (perplexity, min_encodings, indices)) = quantizer(z)`` for images.

    ``perplexity`` is given; the one-hot ``min_encodings`` is ``None`` as there.

    Args:
        n_e: number of codes.
        e_dim: channels of ``z``, ``(batch, e_dim, height, width)``.
        beta: weight of the commitment loss.
        legacy: puts ``beta`` on the codebook's term in place of the commitment's, as the original's default does by mistake.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float, legacy: bool = True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def extra_repr(self) -> str:
        return f"{self.n_e}, {self.e_dim}, beta={self.beta}, legacy={self.legacy}"

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        commitment, codebook = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        output = FV.vector_quantize(z.movedim(1, -1), self.embedding.weight, commitment_cost=commitment, codebook_cost=codebook)
        indices = output.indices.flatten()
        counts = torch.zeros(self.n_e, device=z.device).scatter_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
        share = counts / max(indices.numel(), 1)
        perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
        return output.quantized.movedim(-1, 1).contiguous(), output.loss, (perplexity, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """The codes at ``indices``; with ``shape`` (batch, height, width, channels) as images."""
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(shape).movedim(-1, 1).contiguous()
