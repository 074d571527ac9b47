"""Cases of the penalties on an encoder's Jacobian."""

import itertools
import math

import torch
from _fuzz import LAYOUTS, Draw, Size, Trial
from _fuzz_bounds import ELEMENTS, as_tuple, loss_weights, reduced
from _helpers import lay_out
from test_jacobian import FUNCTIONS as ACTIVATION_FUNCTIONS
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.jacobian import ACTIVATIONS
from fastvae.reference.jacobian import derivatives


def contractive(draw: Draw) -> Trial:
    activation, reduction = draw.choice(tuple(ACTIVATIONS)), draw.choice(tuple(REDUCTIONS))
    batch, units = draw.sizes(2, ELEMENTS)
    inputs, alpha = draw.choice((1, 5, 16, 33, 70)), ACTIVATIONS[activation].alpha
    if ACTIVATIONS[activation].has_parameter:
        alpha *= draw.choice((1.0, 1.0, 0.3, 5.0))
    if draw.extreme:
        hidden = draw.values(batch, units)
        # No layer gives what its activation does not.
        hidden = hidden.abs() if activation in ("relu", "softplus") else hidden.clamp(min=-alpha) if activation == "elu" else hidden
    else:
        a = draw.normal(batch, units, layout=False).double()
        if not ACTIVATIONS[activation].from_preactivation:
            a = ACTIVATION_FUNCTIONS[activation](a, alpha)
        hidden = lay_out(a.to(draw.dtype), draw.choice(LAYOUTS))
    tensors = {"hidden": hidden, "weight": draw.values(units, inputs)}
    options = {"activation": activation, "reduction": reduction, "grad_scale": draw.choice((1.0, 0.5))}
    if ACTIVATIONS[activation].has_parameter:
        options["alpha"] = alpha

    def sizes(wide, oracle, incoming):
        """The slopes of sigmoid and its like are differences of numbers up to 1, and so are their derivatives."""
        # In float64 such a difference is rounded too: 1 + tanh(u) is 0 for a large negative u.
        slope, change = (t.abs() + 1e-13 for t in derivatives(wide["hidden"], activation, alpha))
        flow, norms = loss_weights(incoming[0], slope.shape, reduction), wide["weight"].square().sum(1)
        of_weight = 4.0 * (flow * slope * (1.0 + slope)).sum(0)[:, None] * wide["weight"].abs()
        return {
            "output 0": Size(reduced(2.0 * norms * slope * (1.0 + slope), reduction)),
            "gradient of hidden": Size(2.0 * flow * norms * (slope * (1.0 + change) + change), roundings=2),
            "gradient of weight": Size(of_weight, roundings=2),
        }

    return Trial(
        lambda module, t: (module.contractive_penalty(**t, **options),), tensors, ("hidden", "weight"), sizes, draw.extreme,
        by_operator=draw.extreme,
    )  # fmt: skip


class _Encoder(nn.Module):
    """Layers whose weights are given with the call, as autograd's tensors."""

    def __init__(self, weights: list[Tensor], activations: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential()
        for weight, activation in zip(weights, activations, strict=True):
            linear = nn.Linear(1, 1, bias=False)
            del linear.weight
            linear.weight, linear.in_features, linear.out_features = weight, weight.shape[1], weight.shape[0]
            self.layers.append(linear).append(activation)


def jacobian(draw: Draw) -> Trial:
    """An MLP; in float64, where the norm and its gradients are known to the last digits, or the norm alone in float32."""
    dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    widths = [draw.choice((1, 2, 3, 7, 8, 17, 33)) for _ in range(draw.choice((2, 3, 3, 4)))]
    batch = draw.choice((0, 1, 2, 5, 17))
    weights = {
        f"weight {i}": draw.normal(rows, columns, dtype=dtype, layout=False) / math.sqrt(columns)
        for i, (columns, rows) in enumerate(itertools.pairwise(widths))
    }
    activations = [draw.choice((nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Softplus, nn.Identity))() for _ in weights]
    tensors = {"x": draw.normal(batch, widths[0], dtype=dtype)} | weights
    options = {"reduction": draw.choice(("batchmean", "sum", "sample")), "with_output": draw.chance(0.3)}
    if draw.chance(0.2):
        options["chunk_size"] = draw.choice((1, 2, 5))
    method = draw.choice(("auto", "auto", "autograd", "closed_form" if len(weights) == 1 else "gram"))

    def call(module, t):
        encoder = _Encoder([t[name] for name in weights], activations).layers
        return as_tuple(module.jacobian_frobenius(encoder, t["x"], method=method if module is FV else "autograd", **options))

    def sizes(wide, oracle, incoming):
        """Each of the products of a chain of layers rounds, and the norm adds squares of their sums: bounded by the sums of absolutes."""
        chain = torch.eye(widths[0], dtype=torch.float64)
        for weight in weights:
            chain = wide[weight].abs() @ chain
        size = (1.0 + float(chain.square().sum())) * 4.0 * len(weights)
        flow = max((float(g.abs().max()) for g in incoming if g.numel()), default=0.0)
        scale = size * (1.0 + flow) * max(batch, 1) * (1.0 + max((float(w.abs().max()) for w in wide.values() if w.numel()), default=0.0))
        return {name: Size(scale) for name in oracle}

    method_is_known = FV.explain_jacobian_method(_Encoder(list(weights.values()), activations).layers, tensors["x"]).method
    assert method_is_known == ("closed_form" if len(weights) == 1 else "gram")
    leaves = tuple(tensors) if dtype == torch.float64 else ()
    return Trial(call, tensors, leaves, sizes, extreme=False)
