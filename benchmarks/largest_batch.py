"""The largest batch whose training step fits a given memory: ``python -m benchmarks.largest_batch``, some minutes.

The networks and steps are those of :mod:`benchmarks.bench_conv_vae`. A batch fits where torch's allocator holds at most ``MEMORY`` beside
parameters, optimizer and data at any time of a step.
"""

import argparse
import functools
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import registry, results, tables
from benchmarks.bench_conv_vae import CASES
from benchmarks.devices import Cpu

OUT = Path(__file__).parent / "results" / "largest_batch.json"
MEMORY = 512 * 2**20
PROVIDERS = {"eager-channels-last": "eager", "fastvae": "fastvae", "fastvae-lean": 'fastvae, `memory="lean"`'}
NETWORKS = ("residual_vae_step", "autoencoder_kl_step")


def largest_batch(peak_memory: Callable[[int], int], memory: int) -> int:
    """The largest batch whose peak is at most ``memory``, where peaks grow with the batch."""
    peak = functools.cache(peak_memory)
    above = next(2**power for power in count() if peak(2**power) > memory)
    most = above // 2
    while above - most > 1:
        # Large batches take nearly as much more memory as they are larger.
        share = (memory - peak(most)) / (peak(above) - peak(most))
        between = min(max(most + int(share * (above - most)), most + 1), above - 1)
        most, above = (between, above) if peak(between) <= memory else (most, between)
    return most


def peak_memory(provider: registry.Provider, case: registry.Case, batch: int) -> int:
    """Bytes, of a step."""
    torch.manual_seed(0)
    size = (batch, *case.size[1:])
    operation = provider(case.setup(size, case.dtype, torch.device("cpu")))
    # The first step makes the state of the optimizer.
    operation()
    return Cpu().peak_memory(operation)


def measure() -> list[dict]:
    cases = [case for case in CASES if case.name in NETWORKS]
    return [{"case": case.name, "images": case.size[1:], "dtype": case.dtype_name, "batches": batches(case)} for case in tqdm(cases)]


def batches(case: registry.Case) -> dict[str, int]:
    """The largest batch of each provider."""
    return {name: largest_batch(functools.partial(peak_memory, case.providers[name], case), MEMORY) for name in PROVIDERS}


def page() -> str:
    """The table of the documentation."""
    if not OUT.is_file():
        return f"{tables.NOT_MEASURED.capitalize()}."
    stored = json.loads(OUT.read_text())
    rows = [[_title(row), *(str(row["batches"][name]) for name in PROVIDERS)] for row in stored["cases"]]
    memory = f"{stored['memory'] // 2**20} MiB beside parameters, optimizer and data, on {stored['processor']}"
    return f"The largest batch whose step takes at most {memory}:\n\n" + tables.markdown(["step", *PROVIDERS.values()], rows)


def _title(row: dict) -> str:
    return f"{row['case']} {tuple(row['images'])} {row['dtype']}"


def main() -> None:
    argparse.ArgumentParser("python -m benchmarks.largest_batch", description=__doc__).parse_args()
    processor = tables.describe_processor(results.describe_run(Cpu()))
    OUT.write_text(json.dumps({"processor": processor, "memory": MEMORY, "cases": measure()}, indent=1) + "\n")
    print(page())


if __name__ == "__main__":
    main()
