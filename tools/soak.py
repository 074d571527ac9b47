"""Trains a tiny model of each class for many steps with batches of changing sizes: ``python tools/soak.py --steps 10000``.

Losses have to stay finite, and the memory of the process as large as it was after the first steps.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _soak import MAX_GROWTH, soak  # noqa: E402
from _tiny_models import TINY  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"which of {', '.join(TINY)}; all by default")
    parser.add_argument("--steps", type=int, default=10_000, help="of each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    grown = []
    for name in options.models or TINY:
        start = time.perf_counter()
        result = soak(name, options.steps)
        if result.growth > MAX_GROWTH:
            grown.append(name)
        print(
            f"{name:18} {result.steps} steps, loss {result.first:.4g} to {result.last:.4g}, memory {result.growth / 2**20:+.1f} MiB, "
            f"{result.objects:+} objects, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    print(f"memory grew in: {', '.join(grown) or 'none'}")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
