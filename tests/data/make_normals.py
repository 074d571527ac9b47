"""Writes normals.csv: the first normals of some seeds by the randomness contract (docs/randomness.md), in float64 from plain integers.

Shares no code with the package. ``python tests/data/make_normals.py`` writes the table again.
"""

import csv
import math
from pathlib import Path

import numpy as np

SEEDS = (0, 1, 0x0123456789ABCDEF, 2**63 - 1, -1)
COUNT = 1024
PATH = Path(__file__).with_name("normals.csv")


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def box_muller(even: int, odd: int) -> tuple[float, float]:
    """The contract rounds ``u`` to float32; everything after it is exact."""
    u = np.float32(np.float32(even) * np.float32(2.0**-32)) + np.float32(2.0**-33)
    radius, angle = math.sqrt(-2.0 * math.log(float(u))), 2.0 * math.pi * odd / 2.0**32
    return radius * math.cos(angle), radius * math.sin(angle)


def normal(seed: int, element: int) -> float:
    tile, stream, lane = element // 512, element % 512 // 128, element % 128
    counter = 128 * tile + lane
    words = philox4x32((counter % 2**32, counter >> 32, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))
    pair = words[:2] if stream < 2 else words[2:]
    return box_muller(*pair)[stream % 2]


def rows() -> list[list[str]]:
    return [[f"{normal(seed, element):.9f}" for seed in SEEDS] for element in range(COUNT)]


if __name__ == "__main__":
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SEEDS)
        writer.writerows(rows())
