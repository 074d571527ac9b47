"""Antialiased images of a square, an ellipse and a heart from their signed distances."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The semi-major axis of the ellipse is 1.
SEMI_MINOR_AXIS = 0.5


def _square(x: Tensor, y: Tensor, half_side: float = math.sqrt(0.5)) -> Tensor:
    """The distance in the maximum norm, which is the Euclidean one beside the edges."""
    return torch.maximum(x.abs(), y.abs()) - half_side


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    """f / |grad f| for f = x^2 + y^2 / b^2 - 1: the distance to first order; -inf at the centre."""
    return (x.square() + (y / SEMI_MINOR_AXIS).square() - 1) / (2 * torch.hypot(x, y / SEMI_MINOR_AXIS**2))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """The union of a square that stands on a corner and of discs on its two upper sides, as wide as the sides."""
    u, v = (x - y) * math.sqrt(0.5), (-x - y) * math.sqrt(0.5)
    discs = [torch.hypot(u - centre_u, v - centre_v) - 0.5 for centre_u, centre_v in ((0.5, 0.0), (0.0, 0.5))]
    return torch.minimum(torch.minimum(*discs), _square(u, v, 0.5))


# The signed distance, negative inside, from points to the edge of a shape around the origin whose farthest point is at distance 1. The
# y axis points down.
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_square, _ellipse, _heart)


def draw_shapes(size: int, shape: Tensor, radius: Tensor, angle: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images ``(batch, 1, size, size)`` float32, 1 inside a shape and 0 outside.

    Args:
        size: height and width in pixels.
        shape: the number of the shape in ``SHAPES``, ``(batch,)`` int64.
        radius: from the centre to the farthest point, in pixels, ``(batch,)`` float32.
        angle: clockwise, in radians, ``(batch,)`` float32.
        x, y: the centre, in pixels from the left and the upper edge, ``(batch,)`` float32.
    """
    pixels = torch.arange(size, dtype=torch.float32, device=shape.device) + 0.5
    right, down = pixels - x.view(-1, 1, 1), pixels[:, None] - y.view(-1, 1, 1)
    radius, cosine, sine = (values.view(-1, 1, 1) for values in (radius, angle.cos(), angle.sin()))
    point = (cosine * right + sine * down) / radius, (cosine * down - sine * right) / radius
    distance = torch.stack([signed_distance(*point) for signed_distance in SHAPES])[shape, torch.arange(len(shape), device=shape.device)]
    # An edge at distance d from the centre of a pixel leaves about 1/2 - d of it inside.
    return (0.5 - distance * radius).clamp(0, 1)[:, None]
