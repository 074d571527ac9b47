"""What the latents hold: of a VAE, of a VQ-VAE, and where the data have labels or known factors."""

from typing import Any

from torch import Tensor, nn

from fastvae.distributions import DiagonalPosterior, StandardPrior
from fastvae.metrics.active_units import ActiveUnits
from fastvae.metrics.codebook_usage import CodebookUsage
from fastvae.metrics.information import PosteriorDecomposition
from fastvae.models import VQVAE, VQVAE2
from fastvae.nn import ResidualVectorQuantizer
from fastvae.training.metric_groups.base import MetricGroup, Options, Seen


class Latents(MetricGroup):
    """What the latents of a VAE with N(0, I) and a diagonal posterior hold."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        network: Any = seen.lit.network
        standard = isinstance(getattr(network, "prior", None), StandardPrior | None)
        diagonal = isinstance(getattr(network, "posterior", None), DiagonalPosterior)
        return standard and diagonal and isinstance(seen.output.get("mu"), Tensor) and isinstance(seen.output.get("logvar"), Tensor)

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.active = ActiveUnits(seen.output["mu"][0].numel())
        self.terms = PosteriorDecomposition(seed=options.seed)
        self.metrics = {"active": self.active, "terms": self.terms}

    def update(self, seen: Seen) -> None:
        self.active.update(seen.output["mu"])
        self.terms.update(seen.output["mu"], seen.output["logvar"])

    def results(self) -> dict[str, float]:
        terms = self.terms.compute()
        names = {
            "mutual_information": "I(x; z)",
            "aggregate_kl": "KL of q(z)",
            "total_correlation": "TC(z)",
            "dimension_kl": "KL of q(z_j)",
        }
        named = {f"{name} [nats]": float(getattr(terms, field)) for field, name in names.items()}
        return {"active units": float(self.active.compute().num_active), **named}


class Codebooks(MetricGroup):
    """How evenly a VQ-VAE uses its codes over all test data."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return isinstance(seen.lit.network, VQVAE | VQVAE2)

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        network: Any = seen.lit.network
        quantizers = (
            {"top ": network.top_quantizer, "bottom ": network.bottom_quantizer} if isinstance(network, VQVAE2) else {"": network.quantizer}
        )
        self.metrics = {level: _usage_of(quantizer) for level, quantizer in quantizers.items()}

    def update(self, seen: Seen) -> None:
        indices = seen.output["indices"]
        for metric, level in zip(self.metrics.values(), indices if isinstance(indices, tuple) else (indices,), strict=True):
            metric.update(level)

    def results(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for level, metric in self.metrics.items():
            perplexity, usage, _ = metric.compute()
            figures |= {f"{level}codebook perplexity": float(perplexity.mean()), f"{level}codes used": float(usage.mean())}
        return figures


def _usage_of(quantizer: nn.Module) -> CodebookUsage:
    if isinstance(quantizer, ResidualVectorQuantizer):
        first: Any = quantizer.layers[0]
        return CodebookUsage(first.num_codes, len(quantizer.layers))
    single: Any = quantizer
    return CodebookUsage(single.num_codes, single.heads if single.heads > 1 else None)
