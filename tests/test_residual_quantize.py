"""Residual quantization: each step against exact arithmetic, all of it against the reference, and the layer against a call of each step."""

import copy

import pytest
import torch
from _helpers import (
    LAYOUTS,
    TOLERANCES,
    Recorder,
    Source,
    compiled_places,
    each_place,
    each_place_and_dtype,
    lay_out,
    leaf,
    places,
    threads,
)
from _quantizers import assert_same_state, batches, spoil, state_of
from test_codebook import DATA, DIMS_AROUND_VECTORS, NOT_FINITE, assert_nearest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import functional as FV
from fastvae.functional.codebook import residual_steps
from fastvae.nn import ResidualVectorQuantizer, residual_quantizer
from fastvae.ops._results import accumulation_dtype
from fastvae.reference import codebook as reference

OPERATORS = ("codebook_residual_quantize", "codebook_residual_quantize_backward")
# Rows, dim, codes, steps.
SIZES = [(0, 7, 5, 3), (1, 1, 1, 1), (33, 8, 5, 8), (1, 64, 1000, 2), (200, 7, 65, 4), (33, 128, 40, 3), (97, 1, 5, 32)]


def of_sizes(source: Source, rows: int, dim: int, codes: int, steps: int) -> tuple[Tensor, Tensor]:
    """Vectors, and codebooks of which each is half as long as the one before."""
    return source.normal(rows, dim), source.normal(steps, codes, dim) * 0.5 ** torch.arange(steps, device=source.device)[:, None, None]


def by_single_searches(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the codes, the indices and what each step searches for, by a search after the other."""
    residual, total, indices, residuals = x, torch.zeros_like(x), [], []
    for codebook in codebooks:
        residuals.append(residual)
        indices.append(FV.vq_nearest(residual, codebook))
        codes = codebook[indices[-1]].to(x.dtype)
        residual, total = residual - codes, total + codes
    return total, torch.stack(indices, -1), torch.stack(residuals)


def by_single_quantizers(x: Tensor, codebooks: Tensor, commitment_cost: float, codebook_cost: float) -> tuple[Tensor, Tensor]:
    """The sum of the codes and the losses, by a quantizer after the other, as :class:`ResidualVectorQuantizer` calls its layers."""
    residual, total, losses = x, torch.zeros_like(x), []
    for codebook in codebooks:
        step = FV.vector_quantize(residual, codebook, commitment_cost=commitment_cost, codebook_cost=codebook_cost)
        codes = step.quantized.detach()
        residual, total = residual - codes, total + codes
        losses.append(step.loss)
    return x + (total - x).detach(), torch.stack(losses)


def results(x: Tensor, codebooks: Tensor, mask: Tensor | None = None, function=FV.residual_quantize) -> list[Tensor]:
    """The outputs, and the gradients of both arguments where gradients that differ from element to element come in."""
    leaves = leaf(x), leaf(codebooks)
    quantized, indices, losses = function(*leaves, mask=mask, commitment_cost=0.3, codebook_cost=0.7)
    incoming = Source(x.device, quantized.dtype, seed=7).normal(*quantized.shape)
    weights = torch.arange(1.0, len(losses) + 1, dtype=losses.dtype, device=x.device)
    gradients = torch.autograd.grad((quantized, losses), leaves, (incoming, weights))
    return [quantized.detach(), indices, losses.detach(), *gradients]


def assert_close_to_reference(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> None:
    ours = results(x, codebooks, mask)
    with fastvae.use_backend("reference"):
        expected = results(x, codebooks, mask)
    assert torch.equal(ours[1], expected[1])
    assert ours[2].dtype == accumulation_dtype(x.dtype)
    for actual, oracle in zip(ours, expected, strict=True):
        assert actual.dtype == oracle.dtype
        if actual.is_floating_point():
            tolerance = TOLERANCES[actual.dtype]
            # Both round once, from sums in another order.
            magnitude = max(1.0, oracle.abs().max().item()) if oracle.numel() else 1.0
            torch.testing.assert_close(actual, oracle, rtol=2 * tolerance["rtol"], atol=2 * tolerance["atol"] * magnitude)


@each_place_and_dtype(*OPERATORS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(place, dtype, sizes):
    assert_close_to_reference(*of_sizes(Source(place.device, dtype), *sizes))


@each_place_and_dtype(*OPERATORS)
def test_rows_that_a_mask_leaves_out(place, dtype):
    """They may hold NaN, and the others are as without them."""
    x, codebooks = of_sizes(Source(place.device, dtype), 120, 9, 20, 4)
    mask = torch.arange(120, device=x.device) % 3 > 0
    x[~mask] = float("nan")
    assert_close_to_reference(x, codebooks, mask)
    quantized, indices, losses, grad_x, grad_codebooks = results(x, codebooks, mask)
    assert (indices[~mask] == -1).all()
    for left_out in (quantized[~mask], grad_x[~mask]):
        assert torch.count_nonzero(left_out) == 0
    alone = FV.residual_quantize(x[mask], codebooks, commitment_cost=0.3, codebook_cost=0.7)
    assert torch.equal(alone.indices, indices[mask])
    torch.testing.assert_close(alone.losses, losses, rtol=1e-5, atol=0.0)
    assert torch.isfinite(grad_codebooks).all()
    nothing = results(x, codebooks, torch.zeros_like(mask))
    assert (nothing[1] == -1).all()
    assert all(torch.count_nonzero(tensor) == 0 for tensor in (nothing[0], *nothing[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("code_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps_are_single_searches(instruction_set, dtype, code_dtype):
    """To the bit, in every pair of dtypes."""
    for sizes in ((150, 6, 70, 5), (33, 40, 100, 3)):
        x, codebooks = of_sizes(Source("cpu", dtype), *sizes)
        codebooks = codebooks.to(code_dtype)
        (quantized, indices, _), residuals = residual_steps(x, codebooks, None, codebook_cost=0.0, commitment_cost=1.0, with_residuals=True)
        total, single, left = by_single_searches(x, codebooks)
        assert torch.equal(indices, single)
        assert torch.equal(residuals, left)
        # The loop rounds its sum at each step.
        torch.testing.assert_close(quantized, total, rtol=4 * TOLERANCES[dtype]["rtol"], atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_each_step_is_exact(instruction_set, data):
    for rows, dim, codes in ((97, 4, 200), (130, 17, 129), (33, 64, 40)):
        x, first = data(Source("cpu"), rows, dim, codes)
        codebooks = torch.stack([first, 0.1 * first.flip(0), 0.01 * first])
        (_, indices, _), residuals = residual_steps(x, codebooks, None, codebook_cost=0.0, commitment_cost=0.0, with_residuals=True)
        assert torch.equal(residuals[0], x)
        for step in range(3):
            assert_nearest(residuals[step], codebooks[step], indices[:, step])
            if step:
                assert torch.equal(residuals[step], residuals[step - 1] - codebooks[step - 1][indices[:, step - 1]])


@each_place(*OPERATORS, dtype=torch.float64)
@pytest.mark.parametrize("costs", [(0.25, 0.0), (0.3, 0.7), (0.0, 1.0)], ids=str)
def test_gradients_are_those_of_single_quantizers(place, costs):
    x, codebooks = of_sizes(Source(place.device, torch.float64), 60, 5, 9, 4)
    gradients = []
    for function in (by_single_quantizers, lambda *a: FV.residual_quantize(*a[:2], commitment_cost=a[2], codebook_cost=a[3])[::2]):
        leaves = leaf(x), leaf(codebooks)
        quantized, losses = function(*leaves, *costs)
        gradients.append(torch.autograd.grad(quantized.sin().sum() + (losses * torch.arange(1.0, 5)).sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_place(*OPERATORS, dtype=torch.float64)
def test_losses_have_the_gradient_of_their_values(place):
    """The commitment losses, against finite differences."""
    x, codebooks = of_sizes(Source(place.device, torch.float64), 12, 3, 5, 3)
    assert torch.autograd.gradcheck(lambda x: FV.residual_quantize(x, codebooks, commitment_cost=0.4).losses, leaf(x))


def test_the_reference_agrees_with_its_operators():
    """By autograd in float64."""
    x, codebooks = of_sizes(Source("cpu", torch.float64), 40, 6, 9, 3)
    for mask in (None, torch.arange(40) % 4 > 0):
        with fastvae.use_backend("reference"):
            operators = results(x, codebooks, mask)
        for ours, theirs in zip(results(x, codebooks, mask, reference.residual_quantize), operators, strict=True):
            torch.testing.assert_close(ours, theirs)


@each_place(*OPERATORS)
def test_one_gradient_alone(place):
    x, codebooks = (leaf(t) for t in of_sizes(Source(place.device), 50, 6, 9, 3))
    incoming = torch.randn(50, 6, device=place.device)
    FV.residual_quantize(x, codebooks).quantized.backward(incoming)
    assert torch.equal(x.grad, incoming)
    assert torch.count_nonzero(codebooks.grad) == 0
    x.grad = None
    FV.residual_quantize(x, codebooks, commitment_cost=0.0).losses.sum().backward()
    assert torch.count_nonzero(x.grad) == 0


@each_place(*OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout):
    x, codebooks = of_sizes(Source(place.device), 60, 12, 30, 3)
    x, codebooks = x.view(5, 3, 4, 12), codebooks
    laid = lay_out(x, layout), lay_out(codebooks, layout)
    for ours, expected in zip(results(*laid), results(*(t.contiguous() for t in laid)), strict=True):
        assert torch.equal(ours, expected)
    assert results(*laid)[1].shape == (5, 3, 4, 3)


@each_place(*OPERATORS)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_vectors_that_are_not_finite(place, value):
    """They have the index 0 in all steps, and no other vector is another for them."""
    for dim in DIMS_AROUND_VECTORS:
        x, codebooks = of_sizes(Source(place.device), 40, dim, 9, 3)
        expected = FV.residual_quantize(x, codebooks)
        broken = x.clone()
        broken[::5, dim // 2] = value
        output = FV.residual_quantize(broken, codebooks)
        assert torch.count_nonzero(output.indices[::5]) == 0
        kept = torch.arange(40) % 5 > 0
        assert torch.equal(output.indices[kept], expected.indices[kept])
        assert torch.equal(output.quantized[kept], expected.quantized[kept])
        torch.testing.assert_close(output.quantized[::5], codebooks[:, 0].sum(0).expand(8, dim))
        assert not torch.isfinite(output.losses).any()


@pytest.mark.parametrize("place", [p for p in places(*OPERATORS) if p.device == "cpu"], ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_codebooks_that_are_not_finite(place, value):
    x, codebooks = of_sizes(Source(place.device), 4, 5, 6, 3)
    codebooks[2, 5, 4] = value
    with pytest.raises((ValueError, RuntimeError), match=r"codebooks?: got NaN or infinite"):
        FV.residual_quantize(x, codebooks)


@pytest.mark.parametrize("place", compiled_places(OPERATORS[0]), ids=str)
def test_bitwise_equal_with_any_number_of_threads(place):
    x, codebooks = of_sizes(Source(place.device), 1500, 24, 100, 4)
    mask = torch.arange(1500) % 7 > 0
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(results(x, codebooks, mask))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


WRONG = [
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.randn(5, 4)), ValueError, r"codebooks: got shape \(5, 4\), takes \(steps,"),
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.randn(0, 5, 4)), ValueError, "codebooks: .*at least one"),
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.randn(2, 5, 3)), ValueError, r"x: got shape \(3, 4\), takes \(\.\.\., 3\)"),
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.zeros(2, 5, 4).long()), TypeError, "codebooks: got torch.int64"),
    (lambda: FV.residual_quantize(torch.zeros(3, 4).int(), torch.randn(2, 5, 4)), TypeError, "x: got torch.int32"),
    (lambda: masked(torch.ones(3)), TypeError, "mask: got torch.float32"),
    (lambda: masked(torch.ones(4, dtype=torch.bool)), ValueError, r"mask: got shape \(4,\)"),
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.randn(2, 5, 4), commitment_cost=-1), ValueError, "commitment_cost: got -1"),
    (lambda: FV.residual_quantize(torch.randn(3, 4), torch.randn(2, 5, 4), codebook_cost="1"), ValueError, "codebook_cost: got '1'"),
]


def masked(mask: Tensor):
    return FV.residual_quantize(torch.randn(3, 4), torch.randn(2, 5, 4), mask=mask)


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The layer

DIM = 6
OPTIONS = [
    {},
    {"update": "gradient"},
    {"revive_below": 0.9},
    {"update": "gradient", "revive_below": 0.9},
    {"kmeans_iters": 2, "revive_below": 0.5},
    {"quantizer_dropout": True, "revive_below": 0.5},
    {"quantizer_dropout": True, "update": "gradient"},
    {"commitment_cost": 0.0, "channels_first": True},
]


def layer_of(**options) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    return ResidualVectorQuantizer(4, 8, DIM, decay=0.8, **options)


def inputs(channels_first: bool, count: int = 20) -> list[Tensor]:
    return [x.movedim(-1, 1) if channels_first else x for x in batches(count, 5, 9, DIM)]


def train(layer: ResidualVectorQuantizer, with_mask: bool) -> list[Tensor]:
    """The results and gradients of all steps."""
    optimizer = torch.optim.SGD(list(layer.parameters()) or [leaf(torch.zeros(1))], lr=0.1)
    torch.manual_seed(1)
    seen = []
    for number, x in enumerate(inputs(layer.channels_first)):
        x = leaf(x)
        mask = (torch.arange(45).view(5, 9) + number) % 4 > 0 if with_mask else None
        output = layer(x, mask)
        optimizer.zero_grad()
        (output.quantized.square().mean() + output.loss).backward()
        optimizer.step()
        seen += [*(tensor.detach() for tensor in output), x.grad]
    return seen


def operators_of(call) -> set[str]:
    with Recorder() as recorder:
        call()
    return {func._opname for func in recorder.operators if func.namespace == "fastvae"}


def makes_all_steps_at_once(call) -> bool:
    return OPERATORS[0] in operators_of(call)


@each_place(*OPERATORS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_steps_at_once_are_calls_of_the_layers(place, options, with_mask, monkeypatch):
    """Twenty training steps, and the state that they leave."""
    at_once = layer_of(**options)
    one_by_one = copy.deepcopy(at_once)
    ours = train(at_once, with_mask)
    x = inputs(at_once.channels_first)[0]
    assert makes_all_steps_at_once(lambda: at_once(x))
    one_by_one.train()
    with monkeypatch.context() as patch:
        patch.setattr(residual_quantizer, "_need_calls", lambda steps: True)
        theirs = train(one_by_one, with_mask)
        assert not makes_all_steps_at_once(lambda: one_by_one(x))
        torch.manual_seed(3)
        expected = one_by_one.eval()(x)
    for actual, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-5, atol=1e-6)
    # Gradients of codebooks are sums in another order; moving averages are the same to the bit.
    tolerance = 1e-5 if options.get("update") == "gradient" else 0.0
    for actual, oracle in zip(state_of(at_once).values(), state_of(one_by_one).values(), strict=True):
        torch.testing.assert_close(actual, oracle, rtol=tolerance, atol=tolerance)
    for actual, oracle in zip(at_once.eval()(x), expected, strict=True):
        torch.testing.assert_close(actual, oracle)


def test_a_batch_with_nan_is_that_of_calls_of_the_layers(monkeypatch):
    at_once = layer_of(revive_below=0.5)
    one_by_one = copy.deepcopy(at_once)
    data = [spoil(x.view(45, DIM), range(0, 45, 4)) for x in inputs(False, 4)]
    for layer in (at_once, one_by_one):
        if layer is one_by_one:
            monkeypatch.setattr(residual_quantizer, "_need_calls", lambda steps: True)
        torch.manual_seed(1)
        for x in data:
            layer(x)
    assert_same_state(state_of(at_once), state_of(one_by_one))
    assert all(torch.isfinite(tensor).all() for tensor in at_once.state_dict().values())


def test_the_calls_that_are_made_one_by_one():
    x = inputs(False)[0]
    assert makes_all_steps_at_once(lambda: layer_of()(x))
    assert makes_all_steps_at_once(lambda: layer_of().eval()(x))
    assert not makes_all_steps_at_once(lambda: layer_of(cosine=True)(x))
    hooked, seen = layer_of(), []
    hooked.layers[1].register_forward_hook(lambda *arguments: seen.append(arguments[2].loss))
    assert not makes_all_steps_at_once(lambda: hooked(x))
    assert len(seen) == 1
    other = layer_of()
    other.layers[1].commitment_cost = 1.0
    assert not makes_all_steps_at_once(lambda: other(x))
    started = layer_of(kmeans_iters=2)
    assert not makes_all_steps_at_once(lambda: started(x))
    assert makes_all_steps_at_once(lambda: started(x))
    part = layer_of()
    part.layers[1].eval()
    before = part.layers[1].codebook.clone()
    assert makes_all_steps_at_once(lambda: part(x))
    assert torch.equal(part.layers[1].codebook, before)
    assert not torch.equal(part.layers[0].codebook, layer_of().layers[0].codebook)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_pass_calls_the_layers(use_reentrant):
    layer, x = layer_of(), leaf(inputs(False)[0])

    def step():
        checkpoint(lambda x: layer(x).loss, x, use_reentrant=use_reentrant).backward()

    assert not makes_all_steps_at_once(step)


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"revive_below": 0.9}], ids=str)
def test_a_compiled_training_step(options):
    """In one graph; the backward pass sees the codebooks of the forward pass, which have moved since."""
    torch.compiler.reset()
    eager = layer_of(**options)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x in inputs(False, 3):
        gradients = []
        for module in (eager, call):
            x = leaf(x)
            torch.manual_seed(1)
            output = module(x)
            (output.loss + output.quantized.square().mean()).backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)
    assert_same_state(state_of(eager), state_of(compiled))


def test_replaced_layers_are_called():
    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls, self.update = inner, 0, inner.update

        def forward(self, x, mask=None):
            self.calls += 1
            return self.inner(x, mask)

    layer = layer_of()
    layer.layers[2] = Counted(layer.layers[2])
    layer(inputs(False)[0])
    assert layer.layers[2].calls == 1
