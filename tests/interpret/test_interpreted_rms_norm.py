"""The RMS norm kernels in the interpreter against float64, in both memory layouts."""

import math

import pytest
import torch
from _helpers import Place
from test_rms_norm import NAMES, Case, check

from fastvae import functional as FV
from fastvae.kernels import _rms_norm, rms_norm
from fastvae.kernels._launch import Machine

PLACE = Place("cpu", "triton")
MACHINES = (Machine("sm_90", 132), Machine("gfx942", 304))

CASES = [
    Case((2, 6, 5, 3), layout="contiguous"),
    Case((2, 6, 5, 3), layout="last", grad_layout="last"),
    Case((2, 96, 3, 4, 5), ("weight",), eps_mode="clamp", layout="last", grad_layout="contiguous"),
    Case((1, 4, 7), (), activation="none"),
    Case((3, 17, 1, 1), NAMES, eps_mode="clamp", eps=4.0),
    # Parameters of each sample, of all samples, and one of each.
    Case((3, 20, 6, 6), ("scale", "shift"), activation="none", layout="last", grad_layout="last"),
    Case((3, 20, 6, 6), ("weight", "shift")),
    Case((3, 20, 6, 6), ("shift",), layout="last"),
    # Several blocks for each program, in several splits.
    Case((2, 3, 41, 43), ("weight", "bias")),
    Case((2, 100, 19, 11), NAMES, layout="last", grad_layout="last"),
    # The most channels of contiguous memory on chip, and the fewest that are not.
    Case((1, 1024, 11), size=1e2),
    Case((1, 1025, 11), eps_mode="clamp"),
    *(
        Case((2, 6, 5, 3), NAMES, activation=activation, layout=layout, grad_layout=layout)
        for activation in ("relu", "gelu")
        for layout in ("contiguous", "last")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    check(PLACE, dtype, case)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("parameters", [(), ("weight",), NAMES], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 13), (19, 33, 3), (1, 600, 1)], ids=str)
def test_channels_that_are_read_in_tiles(monkeypatch, layout, parameters, shape):
    """Several tiles of which the last is not full, with several blocks of positions and with less than one."""
    monkeypatch.setattr(_rms_norm, "MAX_CHANNELS", {True: 16, False: 16})
    for eps_mode, eps in (("add", 1e-6), ("clamp", math.sqrt(shape[1]))):
        case = Case(shape, parameters, eps_mode=eps_mode, eps=eps, layout=layout, grad_layout=layout)
        check(PLACE, torch.float32, case)


@pytest.mark.parametrize("count", [1, 2, rms_norm.SPLITS, rms_norm.SPLITS + 1, 3 * rms_norm.SPLITS])
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 40)], ids=str)
def test_partial_sums_are_added_in_float64(count, shape):
    """Of a parameter of all samples, and of one of each."""
    rows, channels = math.prod(shape[:-1]), shape[-1]
    sums = torch.randn(rows, count, channels, generator=torch.Generator().manual_seed(count))
    sums[:, ::2] *= 1e8
    grad = torch.empty(shape)
    rms_norm._add_partial_sums(sums, grad)
    assert torch.equal(grad, sums.double().sum(1).float().view(shape))


def test_an_eps_that_float32_does_not_hold():
    """The bound of 1 / RMS is infinite."""
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(FV.rms_norm_silu(x, eps=1e-300, eps_mode="clamp"), FV.rms_norm_silu(x, eps=0.0))


@pytest.mark.parametrize(
    ("sizes", "block", "threads"),
    [
        # Channels, positions, whether channels are last, bytes of an element; rows and columns of a block, threads of its program.
        ((1, 1, True, 4), (1, 1), 128),
        ((3, 10_000, False, 4), (256, 4), 128),
        ((96, 106_080, False, 4), (16, 128), 256),
        ((96, 106_080, False, 2), (32, 128), 256),
        ((96, 106_080, True, 2), (16, 128), 128),
        ((512, 4096, False, 4), (8, 512), 512),
        ((512, 4096, False, 2), (8, 512), 256),
        ((512, 4096, True, 4), (2, 512), 128),
        ((512, 4, False, 4), (4, 512), 256),
        ((1024, 4096, False, 4), (8, 1024), 1024),
        ((1024, 4096, False, 2), (8, 1024), 512),
        ((4096, 4096, True, 4), (1, 4096), 512),
        # In tiles.
        ((1025, 4096, False, 2), (32, 64), 128),
        ((1025, 5, False, 4), (8, 128), 128),
        ((4097, 4096, True, 4), (32, 32), 128),
    ],
    ids=str,
)
def test_blocks(sizes, block, threads):
    config = _rms_norm.position_blocks(*sizes, MACHINES[0])
    assert (config.rows, config.columns) == block
    assert config.warps * MACHINES[0].warp_size == threads
    assert config.whole == (config.columns >= sizes[0])


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.architecture)
@pytest.mark.parametrize(("itemsize", "channels_last"), _rms_norm.BACKWARD_REGISTERS)
@pytest.mark.parametrize("channels", [1, 96, 512, 1024, 4096, 5000])
@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (4, 106_080), (8, 4096), (7, 5001), (5000, 9)], ids=str)
def test_splits_of_the_backward_pass(machine, itemsize, channels_last, channels, batch, positions):
    """Every position is in one split, none of which is empty, and the programs that keep all channels run at once."""
    registers = _rms_norm.BACKWARD_REGISTERS[itemsize, channels_last]
    blocks = _rms_norm.position_blocks(channels, positions, channels_last, itemsize, machine)
    split_positions, splits = _rms_norm.backward_splits(batch, positions, blocks, registers, machine)
    assert split_positions % blocks.rows == 0
    assert split_positions * (splits - 1) < positions <= split_positions * splits
    if blocks.whole:
        assert splits == 1 or batch * splits * blocks.warps * 32 * registers <= 132 * _rms_norm.REGISTER_FILE
    else:
        assert split_positions == blocks.rows


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("itemsize", "channels_last"), _rms_norm.BACKWARD_REGISTERS)
@pytest.mark.parametrize("channels", [96, 1024, 4096])
def test_a_program_fits_on_a_multiprocessor(architecture, itemsize, channels_last, channels):
    machine = Machine(architecture, 132)
    blocks = _rms_norm.position_blocks(channels, 4096, channels_last, itemsize, machine)
    limit = _rms_norm.register_limit(blocks, _rms_norm.BACKWARD_REGISTERS[itemsize, channels_last], machine)
    assert blocks.warps * machine.warp_size <= 1024
    assert limit.get("maxnreg", 0) * blocks.warps * 32 <= _rms_norm.REGISTER_FILE
    assert bool(limit) == architecture.startswith("sm_")


def test_samples_are_joined_where_they_share_the_parameters_and_the_channels_are_last():
    def call(*shape, last=False, parameter=None):
        x = torch.empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else torch.empty(shape)
        return rms_norm._RMSNormCall.of(rms_norm.ops.ForwardArguments(x, parameter, None, 1e-6, 0, 0))

    joined = [
        call(5, 6, 4, 4, last=True),
        call(5, 6, 4, 4, last=True, parameter=torch.ones(6)),
        call(80, 6),
        call(80, 6, 1, 1),
    ]
    assert [(c.batch, c.positions) for c in joined] == [(1, 80)] * 4
    separate = [call(5, 6, 4, 4), call(5, 6, 4, 4, last=True, parameter=torch.ones(5, 6))]
    assert [(c.batch, c.positions) for c in separate] == [(5, 16)] * 2
