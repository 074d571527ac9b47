"""The emulated GPU: what it finds in kernels with one fault each, and what it asks of every operator that tests of results do not."""

import gc

import pytest
import torch
from _calls import CALLS_OF_KERNELS, first_of_each_function
from _helpers import brief

import fastvae
from fastvae import functional as FV

STREAMS_WITH_A_WORKSPACE = 16
INVALID_CONFIGURATION = 9
COUNTERS = {"allocation": "allocations", "launch": "launches"}

each_call = pytest.mark.parametrize("call", CALLS_OF_KERNELS, ids=str)
# For tests in which a call fails at each of its steps.
each_function = pytest.mark.parametrize("call", brief(CALLS_OF_KERNELS, [call.name for call in first_of_each_function(CALLS_OF_KERNELS)]))


def launch(emulated, kernel, blocks=(1, 1), threads=64, *, default_stream=False, guard=True):
    return emulated.launch_kernel(kernel.encode(), *blocks, threads, int(default_stream), int(guard))


def results(call, rows=2):
    """Of a call's outputs and gradients, on tensors of its own."""
    with fastvae.use_backend("cuda"):
        return call.results(call.tensors("cpu", rows))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (1, 65536), (2**31, 1)], ids=str)
def test_grids_that_no_gpu_takes(emulated, blocks):
    assert launch(emulated, "nothing", blocks) == INVALID_CONFIGURATION


@pytest.mark.parametrize("threads", [0, 1025])
def test_blocks_that_no_gpu_takes(emulated, threads):
    assert launch(emulated, "nothing", threads=threads) == INVALID_CONFIGURATION


@pytest.mark.parametrize(
    ("kernel", "options", "report"),
    [
        ("nothing", {"default_stream": True}, "another stream than the current one"),
        ("nothing", {"guard": False}, "without a device guard"),
        ("exited lane", {}, "names lanes that have exited"),
        ("exited lane", {"threads": 40}, "names lanes that have exited"),
        ("waits apart", {}, "wait at different barriers"),
    ],
    ids=str,
)
def test_faults_of_launches_and_barriers(emulated, kernel, options, report):
    launch(emulated, kernel, **options)
    assert any(report in line for line in emulated.take_reports())


def test_a_kernel_without_a_fault(emulated):
    assert launch(emulated, "nothing", (3, 2)) == 0
    assert emulated.take_reports() == []


@pytest.mark.build("races")
@pytest.mark.parametrize(
    ("kernel", "blocks", "report"),
    [
        ("reads unwritten", 1, "before the block writes it"),
        ("no barrier", 1, "nothing orders a read after a write"),
        ("shuffle for a barrier", 1, "nothing orders a read after a write"),
        ("barrier of the warp", 1, None),
        ("barrier of the warp between warps", 1, "nothing orders a read after a write"),
        ("barrier of the block", 1, None),
        ("blocks write one address", 2, "nothing orders two writes"),
        ("both fences", 3, None),
        ("no fence before", 3, "nothing orders a read after a write"),
        ("no fence after", 3, "nothing orders a read after a write"),
        ("fences of each thread before", 3, "nothing orders a read after a write"),
    ],
    ids=str,
)
def test_faults_of_accesses(emulated, kernel, blocks, report):
    launch(emulated, kernel, (blocks, 1))
    reports = emulated.take_reports()
    if report is None:
        assert reports == []
    else:
        assert any(report in line or "before the block writes it" in line for line in reports)
        assert all("faults.cpp" in line for line in reports)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("temporary", ["captured", "on the 17th stream"])
def test_an_operator_keeps_its_one_workspace(emulated, reduction, temporary):
    """Two sums in one launch, of the loss and of the gradient of a log variance of one value, share it."""
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(33, 700, generator=generator) for _ in range(2))

    def loss_and_gradients():
        leaves = x.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
        with fastvae.use_backend("cuda"):
            loss = FV.gaussian_nll(leaves[0], t, leaves[1], reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    expected = loss_and_gradients()
    if temporary == "captured":
        emulated.set_capturing(1)
        actual = loss_and_gradients()
    else:
        for stream in range(STREAMS_WITH_A_WORKSPACE + 1):
            emulated.set_stream(stream)
            actual = loss_and_gradients()
    assert emulated.take_reports() == []
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each_call
def test_results_are_the_same_on_any_stream_and_while_captured(emulated, call):
    expected = results(call)
    for stream in range(STREAMS_WITH_A_WORKSPACE, STREAMS_WITH_A_WORKSPACE + 3):
        emulated.set_stream(stream)
        assert_equal(results(call), expected)
    emulated.set_capturing(1)
    assert_equal(results(call), expected)


def failure(call):
    """The type and the message of the error that a call raises; nothing keeps the error, and with it what was alive then."""
    try:
        results(call)
    except RuntimeError as error:
        return type(error), str(error)
    return None


def fails_each_time(emulated, call, what, error, message):
    """Lets each allocation or launch of a call fail, one at a time: the right error comes, nothing leaks, and the next call is right."""
    emulated.fail(what, -1)
    expected = results(call)
    times = emulated.count(COUNTERS[what])
    assert times > 0
    blocks = emulated.count("blocks")
    for number in range(times):
        emulated.fail(what, number)
        raised, text = failure(call)
        emulated.fail(what, -1)
        assert raised is error
        assert message in text
        assert emulated.count("open_tickets") == 0
    assert_equal(results(call), expected)
    # A backward pass that fails leaves gradients in torch's queue until the next one.
    gc.collect()
    assert emulated.count("blocks") == blocks


@each_function
def test_allocations_that_fail(emulated, call):
    fails_each_time(emulated, call, "allocation", torch.OutOfMemoryError, "CUDA out of memory")


@each_function
def test_launches_that_fail(emulated, call):
    fails_each_time(emulated, call, "launch", RuntimeError, "launching a kernel: too many resources")


@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
def test_a_captured_graph_is_replayed_on_other_data(emulated, reduction):
    x, target = torch.randn(7, 900, generator=torch.Generator().manual_seed(0)), torch.zeros(7, 900)
    with fastvae.use_backend("cuda"):
        emulated.begin_capture()
        captured = FV.mse_loss(x, target, reduction=reduction)
        emulated.end_capture()
        assert captured.isnan().all()
        for factor in (1.0, -3.0):
            x.mul_(factor)
            emulated.replay()
            assert torch.equal(captured, FV.mse_loss(x, target, reduction=reduction))
    emulated.drop_graph()


def test_a_captured_search_is_replayed_on_other_data(emulated):
    """Its scratch memory is freed in the capture, and its worklist and tickets begin anew in each replay."""
    x, codebook = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(0)).split((1, 1))
    x, codebook = x[0].clone(), codebook[0, :70].clone()
    with fastvae.use_backend("cuda"):
        emulated.begin_capture()
        captured = FV.vq_nearest(x, codebook)
        emulated.end_capture()
        for shift in (0.0, 0.5):
            x.add_(shift)
            emulated.replay()
            assert torch.equal(captured, FV.vq_nearest(x, codebook))
    emulated.drop_graph()
