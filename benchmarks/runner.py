"""Checks the providers of a case against each other, then times them in interleaved rounds."""

import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.devices import Device, Sample
from benchmarks.registry import OURS, Case, Inputs, Operation, Results, Unavailable, WrongResult, forced

# Relative, and absolute in units of the largest magnitude.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# A round runs each provider for about so many seconds, so that neither the resolution of the clock nor one interruption decides.
SECONDS_PER_SAMPLE = 5e-3
ROOF = "roof"
WRONG = "wrong result"


@dataclass(frozen=True)
class Plan:
    """How long a case may be timed."""

    seconds: float
    fewest_rounds: int
    most_rounds: int

    def rounds(self, seconds_per_round: float) -> int:
        return min(max(int(self.seconds / seconds_per_round), self.fewest_rounds), self.most_rounds)


FULL = Plan(seconds=10.0, fewest_rounds=9, most_rounds=300)
QUICK = Plan(seconds=2.0, fewest_rounds=7, most_rounds=50)


@dataclass
class Contender:
    """A provider with its own inputs."""

    inputs: list[Inputs]
    operations: list[Operation]
    first_call: float = 0.0
    peak_memory: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one value a round, and what the provider does in them."""

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def percentiles(self) -> tuple[float, float]:
        """The 20th and the 80th."""
        low, *_, high = statistics.quantiles(self.seconds, n=5, method="inclusive")
        return low, high


@dataclass
class Measurement:
    """The measurements of a case."""

    case: Case
    work: float
    contenders: dict[str, Contender]
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    roof: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    remark: str = ""


def measure(case: Case, device: Device, plan: Plan, say: Callable[[str], None] = lambda stage: None) -> Measurement:
    """Checks and times a case. Raises :class:`WrongResult` before anything is timed where fastvae disagrees with the first provider."""
    torch.compiler.reset()
    on_backends = {f"{OURS}-{backend}": forced(case.providers[OURS], backend) for backend in device.backends}
    case = dataclasses.replace(case, providers={**case.providers, **on_backends})
    contenders, absent = checked_contenders(case, device, case.providers, say)
    measurement = Measurement(case, case.work(contenders[OURS].inputs[0]), contenders, absent=absent)
    if case.remark is not None:
        measurement.remark = case.remark(contenders[OURS].operations[0])
    for name, contender in contenders.items():
        say(f"memory of {name}")
        contender.inputs[0].clear_gradients()
        contender.peak_memory = device.peak_memory(contender.operations[0])
        _rotate(case, name, contender, device)
    for mode in device.modes:
        say(f"timing ({mode})")
        _time(measurement, device, mode, plan)
    return measurement


def checked_contenders(
    case: Case, device: Device, names: Iterable[str], say: Callable[[str], None] = lambda stage: None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The named providers that can run and agree with the first one, and the reasons why the others are left out."""
    contenders, absent, expected = {}, {}, None
    for name in names:
        say(f"checking {name}")
        try:
            contender, results = _first_call(case, name, device)
        except Unavailable as reason:
            if name == OURS:
                raise
            absent[name] = str(reason)
            continue
        expected = results if expected is None else expected
        try:
            _compare(case, name, results, expected)
        except WrongResult as difference:
            if name.startswith(OURS):
                raise
            absent[name] = f"{WRONG}: {' '.join(str(difference).split())}"
            continue
        contenders[name] = contender
    return contenders, absent


def _first_call(case: Case, name: str, device: Device) -> tuple[Contender, Results]:
    inputs = case.make_inputs(device.device)
    operation = case.providers[name](inputs)
    start = time.perf_counter()
    outputs = device.synchronised(operation)()
    seconds = time.perf_counter() - start
    results = case.compare(_name_results(case, inputs, outputs), inputs)
    return Contender([inputs], [operation], seconds), results


def _name_results(case: Case, inputs: Inputs, outputs) -> Results:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = {name: output.detach() for name, output in zip(case.outputs, outputs, strict=True)}
    return results | {f"grad {name}": leaf.grad for name, leaf in inputs.leaves.items()}


def _compare(case: Case, provider: str, results: Results, expected: Results) -> None:
    for name, want in expected.items():
        got = results[name]
        if got is None or want is None:
            if got is not want:
                raise WrongResult(f"{provider}: {name} is {'missing' if got is None else 'there and should not be'}")
            continue
        tolerance = TOLERANCES[case.dtype] if want.is_floating_point() else 0.0
        got, want = got.double(), want.double()
        scale = want.abs().max().item() if want.numel() else 0.0
        try:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale)
        except AssertionError as difference:
            raise WrongResult(f"{provider}: {name} is not that of the first provider: {difference}") from difference


def _rotate(case: Case, name: str, contender: Contender, device: Device) -> None:
    """Adds further sets of inputs where the device asks for them."""
    for seed in range(1, device.rotation(contender.inputs[0].nbytes)):
        inputs = case.make_inputs(device.device, seed)
        contender.inputs.append(inputs)
        contender.operations.append(case.providers[name](inputs))


def _time(measurement: Measurement, device: Device, mode: str, plan: Plan) -> None:
    samplers = {}
    for name, contender in measurement.contenders.items():
        try:
            samplers[name] = device.sampler(contender.operations, mode)
        except Unavailable as reason:
            if name == OURS:
                raise
            measurement.absent[f"{name} ({mode})"] = str(reason)
    operations, amount = _roof(measurement, device)
    samplers[ROOF] = device.sampler(operations, mode)
    timings = _interleave(samplers, plan)
    measurement.roof[mode] = amount / timings.pop(ROOF).median
    measurement.timings[mode] = timings


def _interleave(samplers: dict[str, Sample], plan: Plan) -> dict[str, Timing]:
    calls, per_round = {}, 0.0
    for name, sample in samplers.items():
        sample(3)
        seconds = min(sample(1) for _ in range(3))
        calls[name] = min(math.ceil(SECONDS_PER_SAMPLE / seconds), 1000)
        per_round += (calls[name] + 1) * seconds
    seconds = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    for _ in range(plan.rounds(per_round)):
        shuffle(order)
        for name in order:
            # One call before the clock runs: the other providers have taken the caches.
            samplers[name](1)
            seconds[name].append(samplers[name](calls[name]))
    return {name: Timing(seconds[name], calls[name]) for name in samplers}


def _roof(measurement: Measurement, device: Device) -> tuple[list[Operation], float]:
    """The best that the machine can do: a copy that moves as many bytes as the case, or a matrix product; and its work."""
    copies = len(measurement.contenders[OURS].inputs)
    if measurement.case.unit == "B":
        count = math.ceil(measurement.work / 8)
        pairs = [[torch.ones(count, device=device.device) for _ in range(2)] for _ in range(copies)]
        return [functools.partial(to.copy_, source) for to, source in pairs], 8 * count
    n = device.matmul_size
    a, b, out = (torch.ones(n, n, dtype=measurement.case.dtype, device=device.device) for _ in range(3))
    return [functools.partial(torch.mm, a, b, out=out)], 2 * n**3
