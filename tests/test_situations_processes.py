"""What programs do around the operators: several threads at once, data loaders with worker processes, many calls, many steps, and tensors
of more than 2^31 elements."""

import threading

import pytest
import torch
from _calls import Call, calls_on
from _helpers import Place, brief, places
from _soak import MAX_GROWTH, resident_bytes, soak
from _soak import ROWS as SIZES
from _tiny_models import TINY
from torch.utils.data import DataLoader, Dataset

import fastvae
from fastvae import functional as FV

ROWS = 4
PAIRS = [(call, place) for call, place in calls_on("cpu") if place.backend in ("cpp", "fallback")]
GIB = 2**30


def results(call: Call, place: Place, seed: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    with fastvae.use_backend(place.backend):
        return call.results(call.tensors("cpu", rows, seed))


def test_all_operators_in_all_threads_at_once():
    """Each thread calls all of them, beginning with another one, and runs its backward passes; each gets the bits that it gets alone."""
    alone = [results(call, place, seed=index) for index, (call, place) in enumerate(PAIRS)]
    count, found = 4, {}
    start = threading.Barrier(count)

    def work(thread: int) -> None:
        start.wait()
        order = [(index + thread * len(PAIRS) // count) % len(PAIRS) for index in range(len(PAIRS))]
        found[thread] = {index: results(*PAIRS[index], seed=index) for index in order}

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    for of_thread in found.values():
        for index, expected in enumerate(alone):
            torch.testing.assert_close(of_thread[index], expected, rtol=0, atol=0, equal_nan=True, msg=str(PAIRS[index][0]))


def test_backward_passes_of_several_threads_add_to_one_parameter():
    weight = torch.ones(50, 20, requires_grad=True)
    count = 4

    def work() -> None:
        for _ in range(5):
            FV.kl_normal(weight, torch.zeros(50, 20), reduction="sum").backward()

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(weight.grad, torch.full_like(weight, 5.0 * count))


class Computed(Dataset):
    """Samples that the operators compute where they are loaded."""

    def __len__(self) -> int:
        return len(PAIRS)

    def __getitem__(self, index: int) -> tuple[int, dict[str, torch.Tensor]]:
        return index, results(*PAIRS[index], seed=index)


def as_it_is(samples: list) -> list:
    return samples


@pytest.mark.parametrize("context", brief(["fork", "spawn", "forkserver"], ["fork", "spawn"]))
def test_workers_of_a_data_loader_call_the_operators(context):
    """Also forked ones, of a process whose threads have run the operators before."""
    alone = [results(call, place, seed=index) for index, (call, place) in enumerate(PAIRS)]
    options = {"num_workers": 2, "multiprocessing_context": context, "collate_fn": as_it_is, "timeout": 120}
    loaded = dict(sample for batch in DataLoader(Computed(), batch_size=8, **options) for sample in batch)
    assert sorted(loaded) == list(range(len(PAIRS)))
    for index, expected in enumerate(alone):
        # A worker has one thread, and torch's own products and sums follow their number.
        torch.testing.assert_close(loaded[index], expected, equal_nan=True, msg=lambda m, i=index: f"{PAIRS[i]}: {m}")


def growth(call: Call, place: Place, calls: int) -> int:
    """Bytes by which the memory of the process grows in so many forward and backward passes, after as many before.

    It is the least of two rounds: what is left behind makes each of them grow, what torch and the allocator keep makes one.
    """
    rows, sizes = rows_to_count(call), []
    for _ in range(3):
        for _ in range(calls):
            results(call, place, seed=0, rows=rows)
        sizes.append(resident_bytes())
    return min(sizes[1] - sizes[0], sizes[2] - sizes[1])


def rows_to_count(call: Call) -> int:
    """So many that the tensors of a thousand calls are more than the growth that passes; feature maps of a few samples are."""
    rows = 256
    return rows if sum(tensor.nbytes for tensor in call.tensors("cpu", rows, 0).values()) <= 2**20 else ROWS


@pytest.mark.prove
@pytest.mark.parametrize(("call", "place"), PAIRS, ids=str)
def test_many_calls_leave_no_memory_behind(call, place):
    assert growth(call, place, 1000) < MAX_GROWTH


def test_memory_that_is_left_behind_is_seen():
    call, place = PAIRS[0]
    kept = []
    leaking = Call(**vars(call) | {"through": lambda **t: kept.append(b"x" * 2**16) or FV.reparameterize_kl(**t)})
    assert growth(leaking, place, 400) > MAX_GROWTH


@pytest.mark.parametrize("name", TINY)
@pytest.mark.usefixtures("one_thread")
def test_a_training_with_batches_that_change(name):
    """One of each size; a loss that is not finite raises."""
    assert soak(name, len(SIZES)).steps == len(SIZES)


@pytest.mark.prove
@pytest.mark.parametrize("name", TINY)
@pytest.mark.usefixtures("one_thread")
def test_the_memory_of_a_long_training(name):
    assert soak(name, 500).growth < MAX_GROWTH


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


@pytest.mark.prove
@pytest.mark.parametrize("place", [p for p in places("reconstruction_forward") if p.backend == "cpp"], ids=str)
def test_more_than_2_to_the_31_elements(place):
    """An image in 8 bits against zeros in bfloat16: its mean square, and the gradient on both sides of the place where int32 overflows."""
    if available_bytes() < 13 * GIB:
        pytest.skip(f"takes 11 GiB of memory, {available_bytes() / GIB:.0f} GiB are free")
    count = 2**31 + 1537
    levels = torch.arange(256, dtype=torch.uint8)
    target = levels.repeat(count // 256 + 1)[:count]
    x = torch.zeros(count, dtype=torch.bfloat16, requires_grad=True)
    loss = FV.mse_loss(x, target)
    expected = (levels.double() / 255).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    for start in (0, 2**30 - 500, 2**31 - 500, count - 1000):
        values = target[start : start + 1000].double() / 255
        torch.testing.assert_close(x.grad[start : start + 1000].double(), -2 * values / count, rtol=4e-3, atol=0)
