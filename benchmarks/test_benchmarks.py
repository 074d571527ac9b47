"""The registry as pytest-benchmark tests, a group a case: ``pytest benchmarks/ -k latent``. Every result is checked before it is timed."""

import pytest
import torch

from benchmarks import devices, registry
from benchmarks.runner import checked_contenders

CASES = [pytest.param(case, name, id=f"{case.family}-{case.id}-{name}") for case in registry.all_cases() for name in case.providers]


@pytest.mark.parametrize("device", devices.available(), ids=lambda device: device.kind)
@pytest.mark.parametrize(("case", "provider"), CASES)
def test_forward_and_backward(benchmark, case, provider, device):
    torch.compiler.reset()
    benchmark.group = f"{case.family}: {case.id} on {device.kind}"
    first = next(iter(case.providers))
    contenders, absent = checked_contenders(case, device, dict.fromkeys((first, provider)))
    if provider in absent:
        pytest.skip(absent[provider])
    benchmark(device.synchronised(contenders[provider].operations[0]))
