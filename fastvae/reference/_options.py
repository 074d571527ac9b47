"""String options and their numbers in the operators."""

from collections.abc import Collection

from fastvae._ops import REDUCTIONS


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """``value``, where it is one of ``choices``.

    Raises:
        ValueError: where it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")
    return value


def reduction_number(reduction: str) -> int:
    return REDUCTIONS[check_choice("reduction", reduction, REDUCTIONS)]
