"""Figures as text: three significant digits and a unit that fits, never an exponent."""

import math

# The size of each unit, the largest first.
TIMES = {"s": 1e3, "ms": 1.0, "µs": 1e-3}
MEMORY = {"GiB": 2.0**10, "MiB": 1.0, "KiB": 2.0**-10, "B": 2.0**-20}
PREFIXES = {"T": 1e3, "G": 1.0, "M": 1e-3}


def number(value: float) -> str:
    """Three significant digits, or all digits of a whole part that has more."""
    rounded = float(f"{value:.3g}")
    magnitude = math.floor(math.log10(abs(rounded))) if rounded else 2
    return f"{value:.{max(2 - magnitude, 0)}f}"


def time(milliseconds: float) -> str:
    return _in_unit(milliseconds, TIMES)


def memory(mebibytes: float) -> str:
    return _in_unit(mebibytes, MEMORY)


def rate(value: float, unit: str) -> str:
    """``unit`` has the prefix G: ``"GB/s"`` or ``"GFLOP/s"``."""
    return _in_unit(value, {f"{prefix}{unit.removeprefix('G')}": size for prefix, size in PREFIXES.items()})


def ratio(value: float) -> str:
    return f"{number(value)}x"


def share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.005 else "under 1%"


def _in_unit(value: float, units: dict[str, float]) -> str:
    rounded = float(f"{value:.3g}")
    smallest = list(units)[-1]
    unit = next((unit for unit, size in units.items() if rounded >= size), smallest)
    return f"{number(value / units[unit])} {unit}"
