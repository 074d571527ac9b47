"""What optimize() says about a normalisation or an upsampling."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A normalisation in a module, or an upsampling.

    Args:
        name: its name in the module.
        followed_by: the activation, or the convolution, that becomes one with it; ``None`` where it is left alone.
        reason: why it is left alone.
        lean: whether the two keep one input, by ``memory="lean"``.
    """

    name: str
    followed_by: str | None = None
    reason: str | None = None
    lean: bool = False

    def __str__(self) -> str:
        if self.followed_by is None:
            return f"left {self.name}: {self.reason}"
        if self.lean:
            return f"{self.name} and {self.followed_by} keep one input"
        return f"fused {self.name} with {self.followed_by}"
