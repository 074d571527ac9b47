"""The data set of shapes with known factors."""

import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastvae.metrics.shapes import FactorImages, FactorSizes

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"scale": 2, "rotation": 4, "position_x": 3, "position_y": 5}


def areas(images: Tensor) -> Tensor:
    return images.double().sum((1, 2, 3))


def centres(images: Tensor) -> Tensor:
    """The centres of mass in pixels from the left and the upper edge, ``(batch, 2)``."""
    pixels = torch.arange(images.shape[-1], dtype=torch.float64) + 0.5
    weights = images[:, 0].double() / areas(images)[:, None, None]
    return torch.stack([(weights.sum(1) * pixels).sum(1), (weights.sum(2) * pixels).sum(1)], 1)


def test_the_whole_grid_is_that_of_dsprites():
    data = FactorImages()
    assert len(data) == 3 * 6 * 40 * 32 * 32 == 737_280
    assert data.factors_of(len(data) - 1).tolist() == [2, 5, 39, 31, 31]
    index = torch.arange(0, len(data), 97)
    assert torch.equal(data.index_of(data.factors_of(index)), index)


def test_indices_and_factors_are_inverse_and_the_last_factor_changes_fastest():
    data = FactorImages(**SMALL)
    grid = torch.tensor(list(itertools.product(*map(range, data.sizes))))
    assert data.sizes == FactorSizes(3, 2, 4, 3, 5)
    assert torch.equal(data.factors_of(torch.arange(len(data))), grid)
    assert torch.equal(data.index_of(grid), torch.arange(len(data)))
    assert torch.equal(data.index_of(grid.view(3, -1, 5)).flatten(), torch.arange(len(data)))


def test_every_image_of_a_grid_has_its_own_factors():
    data = FactorImages(scale=2, rotation=6, position_x=2, position_y=2)
    images = data.render(data.factors_of(torch.arange(len(data)))).flatten(1)
    assert len(images.unique(dim=0)) == len(data) == 144


@pytest.mark.parametrize("column", range(5))
def test_neighbours_in_each_factor_differ(column):
    data = FactorImages()
    generator = torch.Generator().manual_seed(column)
    factors = torch.stack([torch.randint(size, (40,), generator=generator) for size in data.sizes], 1)
    neighbours = factors.clone()
    neighbours[:, column] = (factors[:, column] + 1) % data.sizes[column]
    differences = (data.render(factors) - data.render(neighbours)).abs().flatten(1).amax(1)
    # Less than half a level of 8 bits would not show in a stored image.
    assert (differences > 10 / 255).all()


@pytest.mark.parametrize("shape", range(3))
def test_positions_move_the_centre_of_mass_linearly(shape):
    data = FactorImages()
    steps = torch.arange(32)
    still = torch.tensor([shape, 3, 7, 0, 11]).repeat(32, 1)
    still[:, 3] = steps
    moved = centres(data.render(still))
    # The antialiased edge is right to first order: a tenth of a pixel.
    torch.testing.assert_close(moved - moved[0], torch.stack([steps * 32 / 31, 0 * steps], 1).double(), rtol=0, atol=0.1)
    down = centres(data.render(still[:, [0, 1, 2, 4, 3]]))
    torch.testing.assert_close(down - down[0], torch.stack([0 * steps, steps * 32 / 31], 1).double(), rtol=0, atol=0.1)


def test_the_areas_are_those_of_the_shapes():
    data = FactorImages(scale=2, rotation=4, position_x=1, position_y=1)
    # With the radius 1: a square with that circumscribed circle, an ellipse, and a unit square with two half discs.
    units = torch.tensor([2, math.pi / 2, 1 + math.pi / 4], dtype=torch.float64)
    for scale, radius in enumerate((7.5, 15.0)):
        factors = torch.tensor([[shape, scale, rotation, 0, 0] for shape in range(3) for rotation in range(4)])
        expected = (units * radius**2).repeat_interleave(4)
        torch.testing.assert_close(areas(data.render(factors)), expected, rtol=0.02, atol=0)


def test_a_square_is_upright_at_first_and_stands_on_a_corner_after_an_eighth_of_a_turn():
    data = FactorImages(shape=1, scale=1, rotation=2, position_x=1, position_y=1)
    upright, tilted = data.render(data.factors_of(torch.arange(2)))[:, 0]
    # Half a side is 15 / sqrt(2) = 10.6 pixels: 0.6 of the eleventh pixel from the middle is inside.
    side = torch.zeros(64)
    side[22:42], side[21], side[42] = 1, 15 / math.sqrt(2) - 10, 15 / math.sqrt(2) - 10
    torch.testing.assert_close(upright[32], side)
    torch.testing.assert_close(upright, upright.T)
    # The corners are 15 pixels to the left and right; half a pixel from the middle, half of the fifteenth pixel is inside.
    assert (tilted[32] > 0.4).sum() == 30
    # Each row has two pixels less than the one below.
    assert (tilted[32 - 12] > 0.4).sum() == 8


def test_a_heart_points_down():
    heart = FactorImages(scale=1, rotation=1, position_x=1, position_y=1)[2][0][0]
    torch.testing.assert_close(heart, heart.flip(1))
    widths = (heart > 0.5).sum(1)
    filled = widths.nonzero().flatten()
    assert widths[filled[-1]] <= 3 < widths[filled[0]]
    # The dent between the lobes.
    assert heart[filled[0], 32] == 0


def test_every_shape_is_inside_the_image_and_its_values_are_between_0_and_1():
    data = FactorImages(scale=1, rotation=9, position_x=2, position_y=2)
    images = data.render(data.factors_of(torch.arange(len(data))))
    assert images.shape == (len(data), 1, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (images[:, 0, border] < 0.2).all()
    moved = FactorImages(scale=1, rotation=9, position_x=1, position_y=1)
    expected = areas(moved.render(moved.factors_of(torch.arange(len(moved)))))
    torch.testing.assert_close(areas(images).view(len(moved), 4), expected[:, None].expand(-1, 4), rtol=0.01, atol=0)


def test_a_batch_an_item_and_a_loader_give_the_same_images():
    data = FactorImages(**SMALL)
    images, factors = next(iter(DataLoader(data, batch_size=7, shuffle=False)))
    assert torch.equal(factors, data.factors_of(torch.arange(7)))
    assert torch.equal(images, data.render(factors))
    for index in range(7):
        image, values = data[index]
        assert torch.equal(image, images[index])
        assert torch.equal(values, factors[index])
    assert len(pickle.dumps(data)) < 1000


def test_iteration_ends_with_the_grid():
    data = FactorImages(shape=1, scale=1, rotation=2, position_x=2, position_y=1)
    assert [factors.tolist() for _, factors in data] == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]


def test_another_default_dtype_changes_nothing():
    data = FactorImages(**SMALL)
    factors = data.factors_of(torch.arange(0, len(data), 11))
    expected = data.render(factors)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(data.render(factors), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"rotation: got 0, takes an integer of at least 1"):
        FactorImages(rotation=0)
    with pytest.raises(ValueError, match=r"shape: got 4, takes an integer from 1 to 3"):
        FactorImages(shape=4)


def test_wrong_indices_are_named():
    data = FactorImages(**SMALL)
    for index in (360, -1):
        with pytest.raises(IndexError, match=rf"index: got {index}, takes an integer from 0 to 359"):
            data[index]
    with pytest.raises(IndexError, match=r"index: got 400, takes"):
        data.factors_of(torch.tensor([[1, 400]]))
    with pytest.raises(TypeError, match=r"index: got torch.float32, takes integers"):
        data.factors_of(torch.tensor(1.0))


def test_wrong_factors_are_named():
    data = FactorImages(**SMALL)
    with pytest.raises(ValueError, match=r"factors: got rotation 4, takes an integer from 0 to 3"):
        data.index_of(torch.tensor([0, 0, 4, 0, 0]))
    with pytest.raises(ValueError, match=r"factors: got position_y -1, takes an integer from 0 to 4"):
        data.render(torch.tensor([[0, 0, 0, 0, -1]]))
    with pytest.raises(ValueError, match=r"factors: got shape \(2, 4\), takes \(..., 5\)"):
        data.index_of(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"factors: got shape \(5,\), takes \(batch, 5\)"):
        data.render(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"factors: got torch.float32, takes integers"):
        data.render(torch.zeros(2, 5))
