"""What users do with quantizers under activation checkpointing: the recomputation sees the codebook of the first pass and moves nothing."""

import copy
import io
from functools import partial

import pytest
import torch
from _quantizers import CHECKPOINTS, DIM, LEARNING, Bottleneck, assert_same_state, batches, quantizer, spoil, state_of, train
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("options", LEARNING, ids=str)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_activation_checkpointing_changes_no_gradient_and_no_codebook(kind, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 3, lambda model, x: model(x))
    actual = train(checkpointed, 3, lambda model, x: checkpoint(model, x, **CHECKPOINTS[kind]))
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(state_of(checkpointed), state_of(plain))


@pytest.mark.parametrize("options", [{"revive_below": 0.5}, {"residual": 3, "quantizer_dropout": True}], ids=str)
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoints_inside_checkpoints(kind, options):
    torch.manual_seed(0)
    plain = Bottleneck(**options)
    checkpointed = copy.deepcopy(plain)
    once = partial(checkpoint, checkpointed, **CHECKPOINTS[kind])
    expected = train(plain, 3, lambda model, x: model(x))
    actual = train(checkpointed, 3, lambda model, x: checkpoint(once, x, **CHECKPOINTS[kind]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(state_of(checkpointed), state_of(plain))


def test_a_backward_pass_that_is_run_twice_recomputes_the_same():
    torch.manual_seed(0)
    model = Bottleneck(revive_below=0.5)
    x = batches(1, 40, 6)[0].requires_grad_()
    recon, loss, _ = checkpoint(model, x, use_reentrant=False)
    total = recon.square().mean() + loss
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_checkpointing_without_the_random_state():
    torch.manual_seed(0)
    plain = Bottleneck()
    plain.dropout.p = 0.0
    checkpointed = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x))
    actual = train(checkpointed, 2, lambda model, x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("total", [lambda losses: losses[0], sum], ids=["the first", "all"])
def test_too_many_passes_before_their_backward_are_an_error(total):
    layer = quantizer()
    losses = [checkpoint(layer, x.requires_grad_(), use_reentrant=False).loss for x in batches(20, 30, DIM)]
    with pytest.raises(RuntimeError, match="remembers 16 passes"):
        total(losses).backward()


def test_passes_that_no_backward_pass_followed_are_forgotten():
    torch.manual_seed(0)
    plain = Bottleneck()
    checkpointed = copy.deepcopy(plain)
    for model in (plain, checkpointed):
        with torch.no_grad():
            for x in batches(5, 40, 6, seed=1):
                model(x)
    expected = train(plain, 10, lambda model, x: model(x))
    actual = train(checkpointed, 10, lambda model, x: checkpoint(model, x, use_reentrant=True))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(checkpointed.quantizer._passes) == 0


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_inputs_that_are_equal_zero_or_not_finite_under_checkpointing(kind):
    torch.manual_seed(0)
    plain = quantizer(revive_below=0.5)
    checkpointed = copy.deepcopy(plain)
    x = batches(1, 30, DIM)[0]
    inputs = [x, torch.zeros_like(x), x, spoil(x, range(0, 30, 3)), torch.zeros(0, DIM)]
    gradients = []
    for layer, call in ((plain, lambda layer, x: layer(x)), (checkpointed, lambda layer, x: checkpoint(layer, x, **CHECKPOINTS[kind]))):
        torch.manual_seed(1)
        leaves = [each.clone().requires_grad_() for each in inputs]
        outputs = [call(layer, leaf) for leaf in leaves]
        # A reentrant checkpoint takes the gradient of an output that nobody used as 0, which times NaN is NaN; so all are used.
        sum(output[0].square().sum() + output[2] for output in outputs).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert_same_state(state_of(checkpointed), state_of(plain))


def test_training_mode_without_gradients_and_copies_of_the_layer():
    """Passes that no backward pass follows leave a bounded memory, which is no part of a copy or a file."""
    layer = quantizer()
    with torch.no_grad():
        for x in batches(40, 30, DIM):
            layer(x)
    assert len(layer._passes) == 16
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert len(other._passes) == 0
        assert_same_state(state_of(other), state_of(layer))


def test_torch_compile_around_a_checkpoint_leaves_it_to_eager_mode():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = Bottleneck()
    plain.dropout.p = 0.0
    compiled = copy.deepcopy(plain)
    expected = train(plain, 2, lambda model, x: model(x))
    step = torch.compile(lambda model, x: checkpoint(model, x, use_reentrant=False), backend="aot_eager")
    actual = train(compiled, 2, step)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_around_compiled_code_is_an_error():
    torch.compiler.reset()
    layer, x = quantizer(), torch.randn(30, DIM, requires_grad=True)
    output = checkpoint(torch.compile(layer, backend="aot_eager"), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"compile the code around torch\.utils\.checkpoint"):
        output.loss.backward()


def test_inductor_saves_the_codebook_of_before_the_update():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = quantizer()
    compiled = copy.deepcopy(plain)

    def step(layer, x):
        output = layer(x)
        return output.quantized.square().mean() + output.loss

    for x in batches(2, 30, DIM):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        step(plain, leaves[0]).backward()
        torch.compile(step)(compiled, leaves[1]).backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
