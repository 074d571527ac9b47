"""What users see of a residual block, whose sum is in place where nobody looks."""

import pytest
import torch
from _helpers import Source
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvae.models.networks import ResidualBlock


def residual_block() -> tuple[ResidualBlock, torch.Tensor]:
    torch.manual_seed(0)
    return ResidualBlock(8, 8, 4), Source("cpu").normal(2, 8, 6, 6).requires_grad_()


def plain_sum(block: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    return block.conv2(block.norm2(block.conv1(block.norm1(x)))) + block.shortcut(x)


def test_what_a_hook_keeps_of_a_residual_block_stays_as_it_was():
    block, x = residual_block()
    kept = []
    for layer in (block.conv1, block.conv2, block.shortcut, block.norm1, block.norm2):
        layer.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    output = block(x)
    assert all(torch.equal(now, then) for now, then in kept)
    torch.testing.assert_close(output, plain_sum(block, x))


def test_hooks_for_all_modules_keep_what_they_saw():
    block, x = residual_block()
    kept = []
    handle = register_module_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    try:
        block(x)
    finally:
        handle.remove()
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("names", [["conv2"], [""], ["conv1", "norm2", "shortcut", "conv2", ""]], ids=str)
def test_full_backward_hooks_on_a_residual_block(names):
    block, x = residual_block()
    expected = torch.autograd.grad(plain_sum(block, x).square().sum(), x)[0]
    seen = []
    for name in names:
        block.get_submodule(name).register_full_backward_hook(lambda module, *_: seen.append(module))
    block(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert len(seen) == len(names)


def test_selective_activation_checkpointing_of_a_residual_block():
    """It keeps what convolutions gave, and refuses it where it was changed since."""
    block, x = residual_block()
    expected = torch.autograd.grad(plain_sum(block, x).square().sum(), x)[0]

    def keeps(context, operator, *args, **kwargs):
        convolution = operator is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE

    output = checkpoint(block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keeps))
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)


def test_a_residual_block_promotes_as_a_sum_does():
    block, x = residual_block()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == plain_sum(block, x).dtype == torch.float32


def test_a_residual_block_under_function_transforms():
    block, x = residual_block()
    rows = torch.func.vmap(lambda row: block(row[None])[0])(x)
    torch.testing.assert_close(rows, plain_sum(block, x), rtol=1e-5, atol=1e-5)
