"""The change of one module by optimize()."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """The change of a module whose norms take over the activations behind them.

    Args:
        pairs: the names of the norms, each with that of its activation.
        apply: makes the change.
        left: the names of norms that stay, each with the reason.
    """

    pairs: dict[str, str]
    apply: Callable[[], None]
    left: dict[str, str] = field(default_factory=dict)
