"""Snake in plain PyTorch, block by block, for contiguous tensors and for channels that are last in memory."""

import torch
from torch import Tensor

from fastvae.fallback._blocks import Rooms, written
from fastvae.fallback._layout import ChannelLayout
from fastvae.fallback._register import implements
from fastvae.ops import snake as ops
from fastvae.ops._results import accumulation_dtype


@implements(ops.forward)
def snake_forward(arguments: ops.ForwardArguments) -> Tensor:
    input, dtype, output = arguments.input, accumulation_dtype(arguments.input.dtype), arguments.allocate()
    layout = ChannelLayout(input)
    elements, outputs = layout.matrices(input), layout.matrices(output)
    frequency, gain = (layout.per_channel(parameter, dtype) for parameter in arguments[1:])
    with Rooms(dtype) as rooms:
        for block in layout.blocks():
            values = rooms["values"].widened(layout.part(elements, block))
            sine = torch.mul(values, frequency, out=rooms["sine"].like(values)).sin_()
            with written(layout.part(outputs, block), rooms["result"]) as out:
                torch.addcmul(values, sine.square_(), gain, out=out)
    return output


@implements(ops.backward)
def snake_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, dtype, results = arguments.input, accumulation_dtype(arguments.input.dtype), arguments.allocate()
    layout = ChannelLayout(input)
    elements, incoming, outputs = (layout.matrices(t) for t in (input, arguments.grad_output, results.grad_input))
    frequency, gain = (layout.per_channel(parameter, dtype) for parameter in arguments[2:])
    grad_frequency, grad_gain = (torch.zeros_like(parameter) for parameter in (frequency, gain))
    with Rooms(dtype) as rooms:
        for block in layout.blocks():
            values, grad = (rooms[name].widened(layout.part(t, block)) for name, t in (("values", elements), ("incoming", incoming)))
            phase = torch.mul(values, frequency, out=rooms["phase"].like(values))
            sine = torch.sin(phase, out=rooms["sine"].like(values))
            product = phase.cos_().mul_(sine).mul_(grad)
            grad_gain.add_(sine.square_().mul_(grad).sum_to_size(gain.shape))
            grad_frequency.add_(torch.mul(product, values, out=sine).sum_to_size(gain.shape))
            with written(layout.part(outputs, block), rooms["result"]) as out:
                torch.addcmul(grad, product, frequency * gain, value=2.0, out=out)
    results.grad_frequency.copy_(grad_frequency.mul_(gain).mul_(2.0).view(-1))
    results.grad_gain.copy_(grad_gain.view(-1))
    return results
