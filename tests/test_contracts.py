"""Every public function meets every contract of torch: a row of tests/_calls.py is a function, a column here is a contract."""

import contextlib
import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from _calls import CALLS, Call, calls_on, first_of_each_function
from _helpers import DEVICES, Place, Source, leaf, places
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import _backend
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS, widest_dtype
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.reconstruction import LIKELIHOODS

ROWS = 4
Contract = Callable[[Call, Place], None]
CONTRACTS: dict[str, Contract] = {}


def contract(test: Contract) -> Contract:
    """Adds a column."""
    CONTRACTS[test.__name__] = test
    return test


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerances) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda message, name=name: f"{name}: {message}", **tolerances)


def shapes(results: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype, tensor.stride()) for name, tensor in results.items()}


def of_positions(call: Call, names, function=None) -> Callable[..., tuple[Tensor, ...]]:
    """``call.function`` of tensors by position, as torch's transformations take them."""

    def positional(*tensors):
        return (function or call.function)(**dict(zip(names, tensors, strict=True)))

    return positional


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


# Compilers and exporters.


def check_compiled(call: Call, place: Place, dynamic: bool) -> None:
    """Forward and backward are one graph each, which serves other values, an incoming gradient that is not 1, and no other shape unless
    shapes are dynamic."""
    torch.compiler.reset()
    tensors = call.tensors(place.device, ROWS)
    compiled = torch.compile(of_positions(call, tensors), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(call.results_of(compiled(*tensors.values()), tensors), call.results(tensors))
    others = call.tensors(place.device, ROWS + 3 if dynamic else ROWS, seed=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = call.results_of(compiled(*others.values()), others, 2.0)
    expected = call.results(others, 2.0)
    assert_same(actual, expected)
    assert shapes(actual) == shapes(expected)


@contract
def compiles_in_one_graph(call, place):
    check_compiled(call, place, dynamic=False)


@contract
def compiles_with_dynamic_shapes(call, place):
    check_compiled(call, place, dynamic=True)


class Exported(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@contract
def is_exported_saved_and_loaded(call, place):
    """The program holds the overload that served, and gives the same results where it is loaded."""
    tensors = detached(call.tensors(place.device, ROWS))
    program = torch.export.export(Exported(of_positions(call, tensors)), tuple(tensors.values()))
    # torch.no_grad() within the function is a module of its own.
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    assert {node.target._overloadname for node in nodes if getattr(node.target, "namespace", None) == "fastvae"} == {place.backend}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    actual, expected = loaded(*tensors.values()), call.function(**tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@contract
def is_decomposed_into_torch_operators(call, place):
    """A program runs without the package, and gives the same results."""
    tensors = detached(call.tensors(place.device, ROWS))
    program = torch.export.export(Exported(of_positions(call, tensors)), tuple(tensors.values()))
    program = program.run_decompositions(fastvae.export.decompositions())
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    assert [node.name for node in nodes if getattr(node.target, "namespace", None) == "fastvae"] == []
    for ours, theirs in zip(program.module()(*tensors.values()), call.function(**tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


# Function transformations.


def check_vmap(call: Call, place: Place, function: Callable[..., tuple[Tensor, ...]], shared: tuple[str, ...]) -> None:
    """``function`` mapped over three sets of tensors, of which ``shared`` are the first set's, gives what three calls give."""
    sets = [detached(call.tensors(place.device, ROWS, seed)) for seed in range(3)]
    for tensors in sets[1:]:
        tensors.update({name: sets[0][name] for name in shared})
    dims = tuple(None if name in shared else 0 for name in sets[0])
    arguments = [sets[0][name] if name in shared else torch.stack([tensors[name] for tensors in sets]) for name in sets[0]]
    mapped = torch.func.vmap(of_positions(call, sets[0], function), in_dims=dims)(*arguments)
    singles = zip(*(function(**tensors) for tensors in sets), strict=True)
    for ours, expected in zip(mapped, singles, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


@contract
def is_mapped_by_vmap(call, place):
    """All but what writes in place (see docs/vector_quantization.md), which torch refuses, naming the operator."""
    refused = pytest.raises(RuntimeError, match=r"Batching rule not implemented for fastvae::codebook_ema_\.")
    with refused if call.public.endswith("_") else contextlib.nullcontext():
        check_vmap(call, place, call.function, ())


def total(call: Call, tensors: dict[str, Tensor]) -> Tensor:
    """A number whose gradient with respect to each output differs from element to element; that of a loss of some hundreds does not depend
    on its last digit."""
    return torch.stack([(o / 16).sin().sum() for o in call.function(**tensors) if o.is_floating_point()]).sum()


def functional_gradients(call: Call, **tensors) -> tuple[Tensor, ...]:
    """The gradients of :func:`total` by ``torch.func.grad``."""
    names = tuple(tensors)
    return torch.func.grad(lambda *t: total(call, dict(zip(names, t, strict=True))), tuple(map(names.index, call.leaves)))(
        *tensors.values()
    )


@contract
def gives_gradients_per_sample(call, place):
    """By vmap of grad, over samples and with weights that all share; those of one sample are those of autograd."""
    if not call.leaves:
        return has_no_gradient(call, place)
    tensors = call.tensors(place.device, ROWS)
    expected = torch.autograd.grad(total(call, tensors), [tensors[name] for name in call.leaves])
    for ours, theirs in zip(functional_gradients(call, **detached(tensors)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for shared in {(), call.shared}:
        check_vmap(call, place, lambda **tensors: functional_gradients(call, **tensors), shared)


def has_no_gradient(call: Call, place: Place) -> None:
    tensors = {name: leaf(t) if t.is_floating_point() else t for name, t in call.tensors(place.device, ROWS).items()}
    assert not any(output.requires_grad for output in call.function(**tensors))


# Derivatives.


@contract
def has_the_gradient_of_its_values(call, place):
    """Against finite differences in float64. What is no derivative by design is held against the reference, by autograd."""
    if not call.leaves:
        return has_no_gradient(call, place)
    if place not in places(*call.operators, dtype=torch.float64):
        return refuses_float64(call, place)
    tensors = call.tensors(place.device, 3, dtype=torch.float64)
    if not call.is_derivative:
        with fastvae.use_backend("reference"):
            expected = call.results(tensors)
        return assert_same(call.results(tensors), expected)
    leaves = [tensors[name] for name in call.leaves]

    def function(*values):
        return call.function(**tensors | dict(zip(call.leaves, values, strict=True)))

    # One random direction a check: a feature map has too many elements for one difference each.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def refuses_float64(call: Call, place: Place) -> None:
    with pytest.raises(fastvae.BackendError, match=rf"{place.backend}.*float64.*Backends that can: .*reference"):
        call.function(**call.tensors(place.device, 3, dtype=torch.float64))


@contract
def refuses_a_second_derivative(call, place):
    """The error names the reference; ``create_graph=True`` alone does no harm."""
    if not call.leaves:
        return has_no_gradient(call, place)
    tensors = call.tensors(place.device, ROWS)
    leaves = [tensors[name] for name in call.leaves]
    plain, graphed = (torch.autograd.grad(total(call, tensors), leaves, create_graph=graph) for graph in (False, True))
    for ours, expected in zip(graphed, plain, strict=True):
        torch.testing.assert_close(ours, expected)

    def penalty(*values):
        gradients = functional_gradients(call, **detached(tensors) | dict(zip(call.leaves, values, strict=True)))
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    refusal = r"use fastvae\.reference\.\w+, which is plain PyTorch"
    with pytest.raises(RuntimeError, match=refusal):
        torch.stack([gradient.square().sum() for gradient in graphed]).sum().backward()
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.grad(penalty)(*(t.detach() for t in leaves))


@contract
def gives_the_same_without_gradients(call, place):
    tensors = call.tensors(place.device, ROWS)
    expected = [output.detach() for output in call.function(**tensors)]
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            outputs = call.function(**tensors)
            assert not any(output.requires_grad for output in outputs)
            for ours, theirs in zip(outputs, expected, strict=True):
                torch.testing.assert_close(ours, theirs)


# Dtypes.


def in_16_bits(call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as autocast leaves them: the activations are bfloat16."""
    return {name: t.detach().bfloat16().requires_grad_(t.requires_grad) if name in call.activations else t for name, t in tensors.items()}


@contract
def serves_autocast(call, place):
    """16-bit activations beside float32 weights and targets. Sums are float32, and a gradient has the dtype of its tensor."""
    tensors = call.tensors(place.device, ROWS)
    expected = call.results(tensors)
    with torch.autocast(place.device, torch.bfloat16):
        results = call.results(in_16_bits(call, tensors))
    assert results.keys() == expected.keys()
    for name, exact in expected.items():
        half = name in call.activations or name.removeprefix("gradient of ") in call.activations
        assert results[name].dtype == (torch.bfloat16 if half else exact.dtype), name
        assert (results[name].double() - exact.double()).norm() <= 0.05 * exact.double().norm(), name


# Operators.


class Operands(TorchDispatchMode):
    """Notes each of the package's operators that runs inside it, with copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvae":
            # Autograd hands in what it has saved; a copy keeps the strides.
            self.calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def operators_behind(call: Call, tensors: dict[str, Tensor]) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The operators that the forward and backward pass run, with each shape of the result."""
    with Operands() as operands:
        call.results(tensors)
        for reduction in call.reductions:
            call.results(tensors, 2.0, reduction=reduction)
    return operands.calls


QUICK_CHECKS = ("test_schema", "test_faketensor")
CHECKS = (*QUICK_CHECKS, "test_autograd_registration", "test_aot_dispatch_dynamic")


@contract
def runs_operators_that_pass_opcheck(call, place, checks=CHECKS):
    """Schema, shape function and tracing of every overload that runs; sums of 16-bit numbers have another dtype than they."""
    tensors = call.tensors(place.device, ROWS)
    cases = [(checks, tensors), (QUICK_CHECKS, in_16_bits(call, tensors))]
    if place in places(*call.operators, dtype=torch.float64):
        cases.append((QUICK_CHECKS, call.tensors(place.device, ROWS, dtype=torch.float64)))
    for chosen, given in cases:
        operators = operators_behind(call, given)
        assert {func._opname for func, _ in operators} <= set(call.operators)
        assert {func._overloadname for func, _ in operators} == {place.backend}
        for func, arguments in operators:
            assert set(opcheck(func, arguments, test_utils=chosen).values()) == {"SUCCESS"}


# Tensors without data.


@contract
def takes_a_step_of_fake_tensors(call, place):
    tensors = call.tensors(place.device, ROWS)
    with FakeTensorMode() as mode:
        fake = call.results({name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
    assert shapes(fake) == shapes(call.results(tensors))


@contract
def takes_a_step_on_the_meta_device(call, place):
    """The backends in plain PyTorch are registered for it. A kernel is not, and says so."""
    tensors = call.tensors(place.device, ROWS)
    meta = {name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    if place.backend not in _backend.ON_EVERY_DEVICE:
        with pytest.raises(fastvae.BackendError, match=rf"{place.backend}.* on meta"):
            call.function(**meta)
    with fastvae.use_backend(place.backend if place.backend in _backend.ON_EVERY_DEVICE else "auto"):
        results = call.results(meta)
    assert all(tensor.is_meta for tensor in results.values())
    assert shapes(results) == shapes(call.results(tensors))


# Programs.


@contract
def serves_several_threads_at_once(call, place):
    """Each thread has values of its own, and gets the bits that it would get alone."""
    inputs = [call.tensors(place.device, ROWS, seed) for seed in range(4)]
    expected = [call.results(tensors) for tensors in inputs]
    start, results = threading.Barrier(len(inputs)), {}

    def work(index: int) -> None:
        with fastvae.use_backend(place.backend):
            start.wait()
            results[index] = [call.results(inputs[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, alone in enumerate(expected):
        for result in results[index]:
            assert_same(result, alone, rtol=0, atol=0, equal_nan=True)


def train(module: nn.Module, arguments: list[Tensor]) -> list[Tensor]:
    """The outputs of a call, and the gradients of its parameters."""
    torch.manual_seed(0)
    outputs = module(*arguments)
    tensors = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    learned = [output for output in tensors if output.requires_grad]
    if not parameters or not learned:
        return tensors
    return [*tensors, *torch.autograd.grad([o.sum() for o in learned], parameters, allow_unused=True, materialize_grads=True)]


@contract
def is_copied_and_pickled(call, place):
    """The function, and the module that wraps it: a copy gives the same results and gradients, and learns by itself."""
    function = getattr(FV, call.public)
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    if call.module is None:
        return
    tensors = detached(call.tensors(place.device, ROWS))
    arguments = [tensors[name] for name in call.module_takes]
    module = call.module().to(place.device)
    duplicates = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    expected = train(module, arguments)
    for duplicate in duplicates:
        torch.testing.assert_close(train(duplicate, arguments), expected)
        assert not {t.data_ptr() for t in duplicate.parameters()} & {t.data_ptr() for t in module.parameters()}


# The table.


PAIRS = [pair for device in DEVICES for pair in calls_on(device)]
# Checks that trace a function take seconds. So one backend has each of them here, for the first row of a function.
TRACED_ON = {
    "compiles_in_one_graph": "fallback",
    "compiles_with_dynamic_shapes": "cpp",
    "is_decomposed_into_torch_operators": "fallback",
    "runs_operators_that_pass_opcheck": "cpp",
}
FIRST_CALLS = first_of_each_function(CALLS)


def takes_long(name: str, call: Call, place: Place) -> bool:
    """The reference computes in float64 what takes the others a tenth of its time."""
    if place.backend == "reference":
        return True
    return name in TRACED_ON and ((place.device == "cpu" and place.backend != TRACED_ON[name]) or call not in FIRST_CALLS)


CASES = [pytest.param(name, *pair, marks=pytest.mark.prove if takes_long(name, *pair) else ()) for name in CONTRACTS for pair in PAIRS]


@pytest.mark.parametrize(("name", "call", "place"), CASES, ids=str)
def test_contract(name, call, place):
    CONTRACTS[name](call, place)


# It says in words what jacobian_frobenius would do, and takes no gradient of anything.
WITHOUT_TENSORS = {"explain_jacobian_method"}
# nn.ELBOLoss stands for it.
WITHOUT_MODULE = {"vae_loss"}


def test_every_public_function_has_a_row():
    functions = {name for name in FV.__all__ if inspect.isfunction(getattr(FV, name))}
    assert {call.public for call in CALLS} == functions - WITHOUT_TENSORS
    assert {call.public for call in CALLS if call.module} == functions - WITHOUT_TENSORS - WITHOUT_MODULE
    at_the_top = {name for name in fastvae.__all__ if inspect.isfunction(getattr(fastvae, name))}
    assert at_the_top - {"optimize", "tiled", "use_backend"} <= functions


def test_every_row_has_every_contract():
    """These the package promises for each public function, on every backend that serves it."""
    assert list(CONTRACTS) == [
        "compiles_in_one_graph",
        "compiles_with_dynamic_shapes",
        "is_exported_saved_and_loaded",
        "is_decomposed_into_torch_operators",
        "is_mapped_by_vmap",
        "gives_gradients_per_sample",
        "has_the_gradient_of_its_values",
        "refuses_a_second_derivative",
        "gives_the_same_without_gradients",
        "serves_autocast",
        "runs_operators_that_pass_opcheck",
        "takes_a_step_of_fake_tensors",
        "takes_a_step_on_the_meta_device",
        "serves_several_threads_at_once",
        "is_copied_and_pickled",
    ]
    tested = {tuple(map(str, case.values)) for case in CASES}
    assert tested == {(name, str(call), str(place)) for name in CONTRACTS for call in CALLS for place in places(*call.operators)}


# The operators that no call on a CPU runs through the dispatcher: three that the backward pass calls on a GPU, and two of which a backend
# makes jacobian_gram.


def samples_of_the_others(source: Source):
    operands = source.normal(5, 6), source.uniform(5, 6), None, None, source.normal(5, 1)
    numbers = LIKELIHOODS["gaussian"], REDUCTIONS["mean"]
    for incoming in (1.0, 2.0):
        grad_output = torch.tensor(incoming, device=source.device)
        yield "reconstruction_rescale_", (source.normal(5, 6), grad_output, 2.0)
        yield "reconstruction_backward_", (source.normal(5, 6), source.normal(5, 1), grad_output, 2.0, *operands, *numbers)
        parameters, image = source.normal(2, 20, 6), source.image(2, 3, 6)
        yield "logistic_mixture_backward_", (source.normal(2, 20, 6), grad_output, 2.0, parameters, image, 2, REDUCTIONS["mean"])
    mean, rstd = (source.uniform(2, 3, dtype=widest_dtype(torch.device(source.device))) for _ in range(2))
    parameters = source.normal(6), source.normal(6)
    for activation in NORM_ACTIVATIONS.values():
        yield "group_norm_recompute", (source.normal(1), source.normal(2, 6, 5), mean, rstd, *parameters, 3, 1e-5, activation)
    inner, outer = source.uniform(5, 7), source.uniform(5, 6)
    for left in (source.normal(6, 7), source.normal(5, 6, 7)):
        yield "jacobian_gram_scale", (left, inner, outer)
        for with_grad in (True, False):
            yield "jacobian_gram_reduce", (left, inner, outer, source.normal(30, 7), with_grad)


def check_the_other_operators(place: Place, checks: tuple[str, ...] = CHECKS) -> None:
    for operator, arguments in samples_of_the_others(Source(place.device)):
        if place in places(operator):
            assert set(opcheck(OPERATORS[operator].overloads[place.backend], arguments, test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("place", places("reconstruction_forward"), ids=str)
def test_operators_that_no_call_runs(place):
    check_the_other_operators(place)


def test_every_operator_is_checked():
    behind = {func._opname for call in FIRST_CALLS for func, _ in operators_behind(call, call.tensors("cpu", ROWS))}
    others = {operator for operator, _ in samples_of_the_others(Source("cpu"))}
    assert behind | others == set(OPERATORS)
