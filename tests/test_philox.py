"""The randomness contract: Philox4x32-10, the numbering of normals, and their distribution."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
from _helpers import NOISE_TOLERANCE, TOLERANCES, Source, each_place, each_place_and_dtype, lay_out, places
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import functional as FV
from fastvae.reference import latent as reference

DATA = Path(__file__).parent / "data"
contract = runpy.run_path(str(DATA / "make_normals.py"))

# kat_vectors of Random123 for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def table() -> dict[int, torch.Tensor]:
    with (DATA / "normals.csv").open(newline="") as file:
        seeds, *rows = csv.reader(file)
    columns = zip(*rows, strict=True)
    return {int(seed): torch.tensor([float(v) for v in column], dtype=torch.float64) for seed, column in zip(seeds, columns, strict=True)}


def reference_philox(counter, key) -> tuple[int, ...]:
    result = reference.philox_rounds([torch.tensor(w) for w in counter], [torch.tensor(w) for w in key])
    return tuple(int(w) for w in result)


def noise(place, seed, *shape: int, num_samples=None, dtype=torch.float32) -> torch.Tensor:
    """What a backend draws: ``z`` of a standard normal."""
    zeros = torch.zeros(shape, dtype=dtype, device=place.device)
    return FV.reparameterize(zeros, zeros, seed=seed, num_samples=num_samples)


def philox_implementations():
    implementations = {"reference": reference_philox, "contract": contract["philox4x32"]}
    if places("latent_forward")[0].backend == "cpp":
        implementations["cpp"] = lambda counter, key: tuple(fastvae._C.philox4x32(counter, key))
    return pytest.mark.parametrize("philox4x32", implementations.values(), ids=implementations)


@philox_implementations()
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(philox4x32, counter, key, result):
    assert philox4x32(words(counter), words(key)) == words(result)


@philox_implementations()
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_any_counter_and_key(philox4x32, values):
    counter, key = tuple(values[:4]), tuple(values[4:])
    assert philox4x32(counter, key) == contract["philox4x32"](counter, key)


def test_the_counter_is_64_bits_wide():
    counter, key = torch.tensor([0, 2**32 - 1, 2**32, 2**62 + 5]), torch.tensor(-3)
    ours = torch.stack(reference.philox4x32(counter, key), dim=1).tolist()
    expected = [contract["philox4x32"]((c % 2**32, c >> 32, 0, 0), (2**32 - 3, 2**32 - 1)) for c in counter.tolist()]
    assert [tuple(row) for row in ours] == expected


def test_box_muller_at_its_corners():
    """The smallest and the largest radius, and angles on both sides of each border between quadrants."""
    borders = [q * 2**30 + half * 2**29 + step for q in range(4) for half in range(2) for step in (-1, 0, 1)]
    pairs = [(even, odd % 2**32) for even in (0, 1, 2**31, 2**32 - 129, 2**32 - 1) for odd in borders]
    even, odd = torch.tensor(pairs).unbind(1)
    ours = torch.stack(reference.box_muller(even, odd), dim=1).double()
    expected = torch.tensor([contract["box_muller"](*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=NOISE_TOLERANCE)


def test_the_table_is_what_its_script_writes():
    with (DATA / "normals.csv").open(newline="") as file:
        seeds, *rows = csv.reader(file)
    assert tuple(int(seed) for seed in seeds) == contract["SEEDS"]
    assert rows == contract["rows"]()


@each_place_and_dtype("latent_forward")
@pytest.mark.parametrize("seed", contract["SEEDS"])
def test_every_backend_draws_the_table(place, dtype, seed):
    expected = table()[seed]
    drawn = noise(place, seed, expected.numel(), dtype=dtype)
    assert drawn.dtype == dtype
    rounding = 0.0 if dtype == torch.float64 else TOLERANCES[dtype]["rtol"]
    torch.testing.assert_close(drawn.double().cpu(), expected, rtol=rounding, atol=NOISE_TOLERANCE)


@each_place("latent_forward")
@pytest.mark.parametrize("shape", [(), (1,), (63,), (41, 401), (3, 5, 7, 11), (1_000_001,)], ids=str)
def test_noise_of_two_backends_agrees(place, shape):
    zeros = torch.zeros(shape)
    with fastvae.use_backend("reference"):
        expected = FV.reparameterize(zeros, zeros, seed=77)
    torch.testing.assert_close(noise(place, 77, *shape).cpu(), expected, rtol=0, atol=NOISE_TOLERANCE)


@each_place("latent_forward")
def test_a_far_tile_follows_the_contract(place):
    """Element numbers past the first tiles, in the middle of a vector and at a ragged end."""
    drawn = noise(place, 5, 1_000_001).cpu()
    for element in (511, 512, 131_071, 131_072, 524_287, 777_777, 999_999, 1_000_000):
        assert float(drawn[element]) == pytest.approx(contract["normal"](5, element), abs=NOISE_TOLERANCE)


@each_place("latent_forward")
def test_elements_are_numbered_row_major_over_the_logical_tensor(place):
    flat = noise(place, 9, 2 * 3 * 5 * 7)
    assert torch.equal(noise(place, 9, 2, 3, 5, 7), flat.view(2, 3, 5, 7))
    assert torch.equal(noise(place, 9, 3, 5, 7, num_samples=2), flat.view(2, 3, 5, 7))
    assert torch.equal(noise(place, 9, 64), flat[:64])


@each_place("latent_forward")
@pytest.mark.parametrize("layout", ["chunked", "permuted", "sliced", "offset", "expanded", "channels_last"])
def test_the_layout_of_the_input_does_not_move_the_noise(place, layout):
    zeros = torch.zeros(4, 6, 5, 3, device=place.device)
    laid_out = lay_out(zeros, layout)
    assert torch.equal(FV.reparameterize(laid_out, laid_out, seed=4), FV.reparameterize(zeros, zeros, seed=4))


@each_place("latent_forward")
def test_one_seed_as_an_integer_and_as_a_tensor(place):
    seed = torch.tensor(123, device=place.device)
    assert torch.equal(noise(place, 123, 100), noise(place, seed, 100))
    assert int(seed) == 123


@each_place("latent_forward")
def test_manual_seed_reproduces_and_the_next_call_differs(place):
    mu = torch.zeros(100, device=place.device)
    torch.manual_seed(0)
    first, second = FV.reparameterize(mu, mu), FV.reparameterize(mu, mu)
    torch.manual_seed(0)
    assert torch.equal(FV.reparameterize(mu, mu), first)
    assert not (first == second).any()


@each_place("latent_forward")
def test_a_generator_reproduces_and_leaves_the_global_one_alone(place):
    mu = torch.zeros(100, device=place.device)
    generator = torch.Generator(place.device)
    state = torch.get_rng_state()
    first = FV.reparameterize(mu, mu, generator=generator.manual_seed(1))
    second = FV.reparameterize(mu, mu, generator=generator)
    assert torch.equal(FV.reparameterize(mu, mu, generator=generator.manual_seed(1)), first)
    assert not (first == second).any()
    assert torch.equal(torch.get_rng_state(), state)


@each_place("latent_forward")
def test_all_functions_draw_the_same_noise_from_a_seed(place):
    mu, logvar = Source(place.device).normal(2, 7, 33)
    for num_samples in (None, 3):
        alone = FV.reparameterize(mu, logvar, seed=8, num_samples=num_samples)
        assert torch.equal(FV.reparameterize_kl(mu, logvar, seed=8, num_samples=num_samples)[0], alone)


@each_place("latent_forward")
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_distribution(place, seed):
    """Kolmogorov-Smirnov, and four moments within five standard errors."""
    stats = pytest.importorskip("scipy.stats", reason="the test of Kolmogorov and Smirnov is SciPy's")
    drawn = noise(place, seed, 1_000_001).double().cpu().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    count = drawn.size
    for statistic, expected, variance in ((drawn, 0, 1), (drawn**2, 1, 2), (drawn**3, 0, 15), (drawn**4, 3, 96)):
        assert abs(statistic.mean() - expected) < 5 * (variance / count) ** 0.5


@each_place("latent_forward")
def test_streams_of_a_tile_are_independent(place):
    """The four streams, which share counters and, in pairs, words: neither values nor squares are correlated."""
    streams = noise(place, 3, 1000 * 512).double().cpu().view(1000, 4, 128).transpose(0, 1).reshape(4, -1)
    for values in (streams, streams**2):
        correlation = torch.corrcoef(values) - torch.eye(4)
        assert correlation.abs().max() < 5 / streams.shape[1] ** 0.5


@each_place("latent_forward")
def test_neighbours_and_seeds_are_independent(place):
    count = 200_000
    draws = [noise(place, seed, count).double().cpu() for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**62)]
    base = draws[0]
    others = draws[1:] + [base.roll(lag) for lag in (1, 2, 4, 128, 256, 384, 512)]
    for other in others:
        for a, b in ((base, other), (base**2, other**2)):
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / count**0.5


@each_place("latent_forward")
def test_calls_do_not_repeat_each_other(place):
    """A window of one call's noise is found nowhere in the next calls'."""
    mu = torch.zeros(4096, device=place.device)
    torch.manual_seed(1)
    calls = [FV.reparameterize(mu, mu).cpu() for _ in range(50)]
    quadruples = torch.cat(calls).view(-1, 4)
    assert torch.unique(quadruples, dim=0).shape == quadruples.shape


def test_every_device_has_a_place():
    assert {place.device for place in places("latent_forward")} >= {"cpu"}
