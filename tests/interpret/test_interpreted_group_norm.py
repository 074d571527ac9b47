"""The GroupNorm kernels in the interpreter against float64, in both memory layouts."""

import pytest
import test_group_norm as contract
import torch
from _helpers import Place
from test_group_norm import Case, check

from fastvae.kernels import _group_norm, group_norm
from fastvae.kernels._launch import Machine
from fastvae.ops.group_norm import TORCH_ACTIVATIONS

CASES = [
    Case((2, 6, 5, 3), 3, layout="contiguous"),
    Case((2, 6, 5, 3), 3, layout="last", grad_layout="last"),
    Case((1, 4, 7), 4, affine=False, activation="none"),
    Case((3, 8, 1, 1), 2, layout="last"),
    Case((2, 36, 9, 11), 6, layout="last", grad_layout="contiguous"),
    Case((2, 4, 6, 6), 1, mean=1e4),
    # The largest group on chip, with as many threads as there can be, and the smallest that is not.
    Case((1, 8, 32, 64), 1),
    Case((1, 16, 32, 32), 1, layout="last", grad_layout="last", mean=1e2),
    Case((1, 8, 33, 64), 1),
    *(
        Case((2, 6, 5, 3), 3, activation=activation, layout=layout, grad_layout=layout)
        for activation in ("relu", "gelu")
        for layout in ("contiguous", "last")
    ),
    Case((1, 8, 33, 64), 1, activation="gelu"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    check(Place("cpu", "triton"), dtype, case)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_extremes(activation):
    contract.test_far_from_zero(Place("cpu", "triton"), torch.float32, activation)
    contract.test_the_derivative_at_zero_is_that_of_torch(Place("cpu", "triton"), torch.float32, activation)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_gelu_keeps_its_digits_where_it_is_small(sign):
    contract.test_gelu_keeps_its_digits_where_it_is_small(Place("cpu", "triton"), sign)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 50), 3), ((19, 40, 3, 3), 1), ((1, 3, 70, 50), 1)], ids=str)
def test_groups_that_are_not_kept_on_chip(monkeypatch, layout, shape, groups):
    """With partial sums of several splits, of more channels than a program of the combining kernel takes splits of, and of many samples."""
    monkeypatch.setattr(group_norm, "FORWARD_LIMITS", _group_norm.GroupLimits(64, 128))
    monkeypatch.setattr(_group_norm, "BACKWARD_LIMITS", _group_norm.GroupLimits(64, 128))
    check(Place("cpu", "triton"), torch.float32, Case(shape, groups, layout=layout, grad_layout=layout))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # Channels of a group, positions, whether channels are last, bytes of an element; threads of a program, 0 where it does not fit.
        ((1, 1, False, 4), 128, 128),
        ((16, 128, False, 4), 128, 128),
        ((16, 129, False, 4), 256, 256),
        ((8, 1024, True, 4), 512, 512),
        ((16, 1024, False, 2), 512, 1024),
        ((16, 1024, True, 2), 512, 0),
        ((16, 1024, False, 4), 512, 0),
        ((17, 1024, False, 2), 0, 0),
        ((16, 1025, False, 2), 0, 0),
        # Less than a sector.
        ((15, 64, True, 2), 0, 0),
        ((15, 64, False, 2), 128, 128),
        ((15, 1, True, 2), 128, 128),
    ],
    ids=str,
)
def test_programs_of_whole_groups(sizes, forward, backward):
    backward_limits = _group_norm.backward_limits(*sizes[2:])
    for machine in (Machine("sm_90", 132), Machine("gfx942", 304)):
        for limits, threads in ((_group_norm.FORWARD_LIMITS, forward), (backward_limits, backward)):
            config = _group_norm.whole_group(*sizes, limits, machine)
            assert (config.warps * machine.warp_size if config else 0) == (max(threads, machine.threads) if threads else 0)
