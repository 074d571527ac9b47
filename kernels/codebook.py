"""Vector quantization on a GPU."""

import torch

from fastvae.kernels import _device
from fastvae.kernels._nearest import nearest, rows_of


@_device.implements("codebook_nearest")
def _nearest(x, codebook, with_distance):
    indices = nearest(rows_of(x), rows_of(codebook))
    return indices, x.new_empty((0,), dtype=torch.float32)
