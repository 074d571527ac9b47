"""Differential fuzzing: a number decides a case, which is one call, forward and backward, held against the reference in float64.

``tests/_fuzz_families.py`` draws the cases; ``tests/test_fuzz.py`` runs some thousands of them, ``tools/fuzz.py`` as many as one likes.

An element of a result passes where it is within its bound of the oracle, or is the number that the oracle rounds to: NaN where the oracle
has NaN, infinite where the oracle is beyond the dtype, finite elsewhere. The bound is that of the tests of each family (rtol and
atol of ``tests/_helpers.py``), with the size of the numbers that an element is summed from in place of 1:

    rtol * (roundings * |oracle| + rounded) + atol * sums + some of the smallest number of the dtype

Where values are extreme (denormal, huge, infinite), an element that fails that may be as far from the oracle as the definition in its own
arithmetic: the reference on the same tensors, in float32. There intermediate results leave the range of float32, where the documentation
promises nothing else. Such cases are counted. Cases of ordinary values have no such excuse.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from _helpers import TOLERANCES, lay_out
from torch import Tensor

import fastvae
from fastvae import functional as FV
from fastvae import reference
from fastvae.ops._results import accumulation_dtype

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the vectors of each instruction set, which hold 4, 8 or 16 floats, and around blocks of them.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
LAYOUTS = ("contiguous", "contiguous", "contiguous", "chunked", "permuted", "sliced", "offset", "expanded", "channels_last")
# "ordinary" is a standard normal; the others are for what arithmetic does at its limits.
EXTREMES = ("special", "special", "spread", "huge", "denormal", "zero", "saturated")
# An element of an extreme case may be so many times as far from the oracle as the definition in float32: both round each step, and add in
# another order.
SLACK = 8.0
# A product of a few factors may be so much larger than the whole, and as many times more as a mean has elements.
MARGIN = 64.0
# Each product of a formula may round in the last place of a denormal number.
DENORMALS = 4


def instruction_sets() -> tuple[str, ...]:
    extension = sys.modules.get("fastvae._C")
    return extension.instruction_sets() if extension else ()


INSTRUCTION_SETS = instruction_sets()
BACKENDS = ("cpp", "cpp", "cpp", "fallback") if INSTRUCTION_SETS else ("fallback",)


class Draw:
    """The choices of a case: a pure function of the name of the family and the number of the case."""

    def __init__(self, family: str, number: int):
        self.random = random.Random(f"{family}:{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.dtype = self.choice(DTYPES)
        self.extreme = self.chance(0.3)

    def choice(self, options: Sequence):
        return options[int(self.random.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def length(self) -> int:
        return self.choice(LENGTHS)

    def sizes(self, count: int, limit: int) -> tuple[int, ...]:
        """Sizes of ``count`` dimensions with ``limit`` elements at most; one of them is now and then 0."""
        sizes = [1] * count
        order = self.random.sample(range(count), count)
        for d in order:
            length = 0 if self.chance(0.02) else self.length()
            sizes[d] = min(length, max(limit // max(_product(sizes), 1), 1))
        return tuple(sizes)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, layout: bool = True) -> Tensor:
        """Standard normals, in some layout."""
        return self._place(torch.randn(shape, generator=self.generator), dtype, layout)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None, layout: bool = True) -> Tensor:
        return self._place(torch.rand(shape, generator=self.generator), dtype, layout)

    def image(self, *shape: int) -> Tensor:
        """8 bits, of which many are 0 or 255."""
        levels = torch.randint(-60, 316, shape, generator=self.generator).clamp_(0, 255).to(torch.uint8)
        return lay_out(levels, self.choice(LAYOUTS))

    def values(self, *shape: int, dtype: torch.dtype | None = None, layout: bool = True) -> Tensor:
        """Normals; in an extreme case some of its tensors hold other numbers."""
        if not self.extreme or self.chance(0.3):
            return self.normal(*shape, dtype=dtype, layout=layout)
        kind, dtype = self.choice(EXTREMES), dtype or self.dtype
        return self._place(self._extreme(kind, torch.randn(shape, generator=self.generator, dtype=torch.float64), dtype), dtype, layout)

    def _extreme(self, kind: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        # The oracle has no more than float64: at the limits of that nothing is known.
        limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
        if kind == "spread":
            exponents = torch.rand(values.shape, generator=self.generator, dtype=torch.float64).mul_(8.0).sub_(4.0)
            return values * 10.0**exponents
        if kind == "zero":
            return torch.zeros_like(values)
        if kind == "saturated":
            return values.sign() * self.choice((30.0, 100.0, 1000.0))
        if kind == "huge":
            return values * limits.max**0.6
        if kind == "denormal":
            return values * limits.tiny * 0.5
        special = (0.0, -0.0, limits.tiny, -limits.tiny * limits.eps, limits.max, limits.min, limits.eps, 1.0, -1.0)
        numbers = (*special, float("inf"), -float("inf"), float("nan")) if self.chance(0.7) else special
        chosen = torch.rand(values.shape, generator=self.generator) < self.choice((0.01, 0.1, 0.5))
        index = torch.randint(len(numbers), values.shape, generator=self.generator)
        return torch.where(chosen, torch.tensor(numbers, dtype=torch.float64)[index], values)

    def _place(self, values: Tensor, dtype: torch.dtype | None, layout: bool) -> Tensor:
        values = values.to(dtype or self.dtype)
        return lay_out(values, self.choice(LAYOUTS)) if layout else values

    def incoming(self, output: Tensor) -> Tensor:
        """The gradient that flows into an output."""
        if output.ndim == 0:
            # A loss that overflows is infinite; times 0 it is NaN in one order of the factors and 0 in another.
            return torch.full_like(output, self.choice((1.0, 1.0, 0.25, -3.0, 1.0 if self.extreme else 0.0)))
        return self.normal(*output.shape, dtype=output.dtype)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


@dataclass
class Size:
    """The sizes that make the bound of a result.

    Args:
        sums: the sum of the absolute values of the numbers that an element is computed from, where sums and products are rounded in the
            dtype of sums.
        rounded: the same of the numbers that are rounded to the dtype of the result before they are added.
        roundings: how often the result was rounded to its dtype.
    """

    sums: Tensor | float
    rounded: Tensor | float = 0.0
    roundings: int = 1


@dataclass
class Trial:
    """A case.

    Args:
        call: calls the function of a module, :mod:`fastvae.functional` or the reference, with tensors by name; gives its outputs.
        tensors: the arguments.
        leaves: those whose gradients are taken.
        sizes: the :class:`Size` of each result by its name, "output 0" or "gradient of mu", from the tensors in float64, the results in
            float64 and the incoming gradients; a name without one is compared as it stands.
        extreme: whether values are extreme.
        skip: results that are not compared, such as a decision that rounding makes.
        oracle: the tensors for the reference where they are not the same ones in float64.
        backends: those that serve the call, each as often as it is to be drawn.
        by_operator: whether the oracle's gradients are the formulas of the reference's operator, and not autograd's, where a formula
            differs from the derivative by design, or a derivative has no limit.
        check: compares what needs more than a bound; it takes the tensors and the results.
    """

    call: Callable
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    sizes: Callable[[dict[str, Tensor], dict[str, Tensor], list[Tensor]], dict[str, Size]]
    extreme: bool
    skip: tuple[str, ...] = ()
    oracle: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda tensors: widened(tensors))
    backends: tuple[str, ...] = BACKENDS
    by_operator: bool = False
    check: Callable[[dict[str, Tensor], dict[str, Tensor]], str | None] | None = None


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: t.detach().double() if t.is_floating_point() else t for name, t in tensors.items()}


def results(trial: Trial, module, tensors: dict[str, Tensor], incoming: Callable[[int, Tensor], Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by their names; ``incoming`` gives the gradient that flows into an output."""
    given = {name: t.detach().requires_grad_() if name in trial.leaves else t.detach() for name, t in tensors.items()}
    outputs = trial.call(module, given)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    learned = {i: output for i, output in enumerate(outputs) if output.requires_grad}
    if learned and trial.leaves:
        leaves, flowing = [given[name] for name in trial.leaves], [incoming(i, output) for i, output in learned.items()]
        gradients = torch.autograd.grad(list(learned.values()), leaves, flowing, materialize_grads=True)
        found |= {f"gradient of {name}": gradient for name, gradient in zip(trial.leaves, gradients, strict=True)}
    return found


def outside(actual: Tensor, oracle: Tensor, size: Size) -> Tensor | None:
    """Which elements are outside their bounds; None where none is."""
    tolerance, limits = TOLERANCES[actual.dtype], torch.finfo(actual.dtype)
    value = actual.double()
    sums = torch.as_tensor(size.sums, dtype=torch.float64)
    bound = (
        tolerance["rtol"] * (size.roundings * oracle.abs() + size.rounded) + tolerance["atol"] * sums + DENORMALS * limits.tiny * limits.eps
    )
    # Absolute values may overflow where the sums do not; next to infinity there is nothing.
    bound = torch.where(bound < float("inf"), bound, tolerance["rtol"] * torch.where(oracle.isfinite(), oracle.abs(), 0.0))
    passed = (value - oracle).abs() <= bound
    if passed.all():
        return None
    # The ends of the interval round to infinity beyond the largest number of the dtype.
    rounded, low, high = (t.to(actual.dtype).double() for t in (oracle, oracle - bound, oracle + bound))
    passed |= (value == rounded) | (value.isinf() & ((value == low) | (value == high))) | (value.isnan() & oracle.isnan())
    # The terms of a sum that are rounded may leave the range of the dtype.
    passed |= ~value.isfinite() & (torch.as_tensor(size.rounded, dtype=torch.float64) > limits.max)
    return None if passed.all() else ~passed


def overflows(narrow: dict[str, Tensor], oracle: dict[str, Tensor], sizes: dict[str, Size]) -> bool:
    """Whether the definition leaves the range of its arithmetic somewhere in a case: it gives no number, or one that is off by half."""
    for name, same in narrow.items():
        if same.is_floating_point() and (wrong := outside(same, oracle[name].double(), size_of(name, sizes, oracle))) is not None:
            near = (same.double() - oracle[name]).abs() <= 0.5 * oracle[name].abs()
            if bool((wrong & ~near).any()):
                return True
    return False


def size_of(name: str, sizes: dict[str, Size], oracle: dict[str, Tensor]) -> Size:
    return sizes.get(name, Size(oracle[name].abs().double()))


def excused(actual: Tensor, oracle: Tensor, narrow: Tensor, wrong: Tensor, overflown: bool) -> bool:
    """Whether all ``wrong`` elements are at the limits of the arithmetic: as near to the oracle as those of the definition in the same
    arithmetic, what that has no number for, no numbers where that leaves its range, or next to an end of the range, where the order of
    factors decides whether a product overflows, and exponentials of kernels stop."""
    value, same, limits = actual.double(), narrow.double(), torch.finfo(accumulation_dtype(actual.dtype))
    near = (value - oracle).abs() <= torch.clamp(SLACK * (same - oracle).abs(), min=limits.tiny / limits.eps)
    overflows_on_the_way = ~value.isfinite() & (oracle.abs() > limits.max / MARGIN / max(value.numel(), 1))
    return bool((~wrong | near | ~same.isfinite() | (overflown & ~value.isfinite()) | overflows_on_the_way).all())


def poison_memory() -> None:
    """What nobody has written is NaN, as in the tests."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if extension := sys.modules.get("fastvae._C"):
        extension.set_poison(True)


@dataclass
class Verdict:
    failure: str | None = None
    excused: bool = False


def run(family: str, make: Callable[[Draw], Trial | None], number: int) -> Verdict | None:
    """Makes and runs a case; None where the draw gave no case, such as one that rounding would decide."""
    draw = Draw(family, number)
    trial = make(draw)
    if trial is None:
        return None
    backend = draw.choice(trial.backends)
    if backend == "cpp":
        sys.modules["fastvae._C"].set_instruction_set(draw.choice(INSTRUCTION_SETS))
    flowing: dict[int, Tensor] = {}

    def incoming(i: int, output: Tensor) -> Tensor:
        flowing[i] = draw.incoming(output)
        return flowing[i]

    with fastvae.use_backend(backend):
        actual = results(trial, FV, trial.tensors, incoming)
        wide = trial.oracle(trial.tensors)
    oracle = results_by_definition(trial, wide, flowing)
    verdict = compare(trial, actual, oracle, wide, flowing)
    if verdict.failure:
        verdict.failure = f"{family}:{number} ({backend}, {describe(trial)}): {verdict.failure}"
    return verdict


def results_by_definition(trial: Trial, tensors: dict[str, Tensor], flowing: dict[int, Tensor]) -> dict[str, Tensor]:
    """Those of the reference, by autograd or, ``by_operator``, by its own formulas for the gradients."""
    module = FV if trial.by_operator else reference
    with fastvae.use_backend("reference"):
        return results(trial, module, tensors, lambda i, output: flowing[i].to(output.dtype))


def compare(trial: Trial, actual: dict, oracle: dict, wide: dict, flowing: dict[int, Tensor]) -> Verdict:
    if actual.keys() != oracle.keys():
        return Verdict(f"results {sorted(actual)}, the reference has {sorted(oracle)}")
    if trial.check is not None and (failure := trial.check(trial.tensors, actual)):
        return Verdict(failure)
    sizes, narrow, verdict = trial.sizes(wide, oracle, list(flowing.values())), None, Verdict()
    for name, ours in actual.items():
        theirs = oracle[name]
        if ours.shape != theirs.shape:
            return Verdict(f"{name}: shape {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}")
        if name.startswith("gradient of ") and ours.dtype != trial.tensors[name.removeprefix("gradient of ")].dtype:
            return Verdict(f"{name}: {ours.dtype}")
        if name in trial.skip:
            continue
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return Verdict(f"{name}: {ours.tolist()}, the reference has {theirs.tolist()}")
            continue
        wrong = outside(ours, theirs.double(), size_of(name, sizes, oracle))
        if wrong is None:
            continue
        if trial.extreme:
            if narrow is None:
                narrow = results_by_definition(trial, trial.tensors, flowing)
            if excused(ours, theirs.double(), narrow[name], wrong, overflows(narrow, oracle, sizes)):
                verdict.excused = True
                continue
        return Verdict(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements: {ours[wrong][:4].tolist()}, not {theirs[wrong][:4].tolist()}"
        )
    return verdict


def describe(trial: Trial) -> str:
    parts = [f"{name} {str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}" for name, t in trial.tensors.items()]
    return ", ".join(parts) + (", extreme" if trial.extreme else "")
