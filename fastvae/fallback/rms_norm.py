"""RMS normalisation and SiLU in plain PyTorch, block by block, for contiguous tensors and for channels that are last in memory.

A tensor is seen as (samples, channels, positions), or as (samples, positions, channels) where its channels are last. A block holds all
channels of some positions, so that one of samples whose positions are few holds several samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fallback._blocks import Block, widen, written
from fastvae.fallback._layout import ChannelLayout
from fastvae.fallback._register import implements
from fastvae.ops import rms_norm as ops
from fastvae.ops._results import accumulation_dtype
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES


def _of_samples(parameter: Tensor | None, block: Block) -> Tensor | None:
    return parameter if parameter is None or parameter.shape[0] == 1 else parameter[block[0]]


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``normal * weight + bias``, of which ``normal`` may be the memory."""
    if weight is not None:
        normal = normal.mul_(weight)
    return normal if bias is None else normal.add_(bias)


@implements(ops.forward)
def rms_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, dtype = arguments.input, accumulation_dtype(arguments.input.dtype)
    layout, results = ChannelLayout(input), arguments.allocate()
    if not input.numel():
        results.rrms.zero_()
    elements, outputs = layout.matrices(input), layout.matrices(results.output)
    table = results.rrms.view(layout.samples, layout.positions).unsqueeze(layout.axis)
    parameters = [layout.per_channel(p, dtype) for p in (arguments.weight, arguments.bias)]
    for block in layout.blocks():
        values = widen(layout.part(elements, block), dtype)
        rrms = layout.part(table, block)
        _write_rrms(rrms, torch.linalg.vector_norm(values, dim=layout.axis, keepdim=True), arguments)
        affine = _affine(values * rrms, *(_of_samples(p, block) for p in parameters))
        layout.part(outputs, block).copy_(F.silu(affine, inplace=True) if arguments.activation == NORM_ACTIVATIONS["silu"] else affine)
    return results


def _write_rrms(rrms: Tensor, norms: Tensor, arguments: ops.ForwardArguments) -> None:
    channels = max(arguments.input.shape[1], 1)
    if arguments.eps_mode == EPS_MODES["add"]:
        rrms.copy_(norms.square_().div_(channels).add_(arguments.eps).rsqrt_())
    else:
        # The root is multiplied first, so that where eps bounds the norm the result is the limit to the last bit.
        rrms.copy_(norms.div_(channels**0.5).reciprocal_().clamp_(max=ops.limit_of_rrms(channels, arguments.eps)))


@implements(ops.backward)
def rms_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, dtype = arguments.input, accumulation_dtype(arguments.input.dtype)
    layout, grad_input = ChannelLayout(input), arguments.allocate().grad_input
    elements, incoming, results = (layout.matrices(t) for t in (input, arguments.grad_output, grad_input))
    table = arguments.rrms.reshape(layout.samples, layout.positions).unsqueeze(layout.axis)
    weight, bias = parameters = [layout.per_channel(p, dtype) for p in (arguments.weight, arguments.bias)]
    sums = [None if p is None else torch.zeros_like(p) for p in parameters]
    for block in layout.blocks():
        rrms = layout.part(table, block)
        normal = widen(layout.part(elements, block), dtype) * rrms
        of_block = [_of_samples(p, block) for p in parameters]
        grad = widen(layout.part(incoming, block), dtype)
        if arguments.activation == NORM_ACTIVATIONS["silu"]:
            grad = torch.ops.aten.silu_backward(grad, normal if weight is None and bias is None else _affine(normal.clone(), *of_block))
        for total, terms in zip(sums, (grad if weight is None else grad * normal, grad), strict=True):
            if total is not None:
                part = _of_samples(total, block)
                part.add_(terms.sum_to_size(part.shape))
        grad = grad if weight is None else grad * of_block[0]
        projection = (grad * normal).mean(layout.axis, keepdim=True)
        if arguments.eps_mode == EPS_MODES["clamp"]:
            projection.masked_fill_(rrms >= ops.limit_of_rrms(layout.channels, arguments.eps), 0.0)
        with written(layout.part(results, block), dtype) as out:
            torch.addcmul(grad, normal, projection, value=-1.0, out=out).mul_(rrms)
    totals = zip((arguments.weight, arguments.bias), sums, strict=True)
    grads = (input.new_empty((0,)) if p is None else total.reshape(p.shape).to(p.dtype) for p, total in totals)
    return ops.BackwardResults(grad_input, *grads)
