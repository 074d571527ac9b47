"""The architecture of a GPU, and which backend comes first on it: a pure function of the work and the architecture.

Two backends serve a GPU, ``cuda`` and ``triton``. No GPU was measured yet, so the choice is by paper:

* Elementwise operators and reductions read and write the same bytes in both. ``cuda`` takes less time to launch.
* The search for the nearest codes multiplies. ``cuda`` multiplies in float32 without tensor cores, ``triton`` in float16 on them (from
  :data:`MIN_TENSOR_CORE_DIM` elements on), and both let float64 decide what that leaves open.
"""

import functools

import torch

# Tensor cores multiply 16 elements at a time. Neither backend takes them for shorter vectors, where the padding costs more than they gain.
MIN_TENSOR_CORE_DIM = 16
# Multiply-adds a picosecond (10^12 a second) by the data sheets: in float32 without tensor cores, and in float16 with float32 sums on them.
# On GPUs of the RTX line the second is twice the first, which does not outweigh that a search in float16 leaves more to float64.
_MULTIPLY_ADDS_PER_PICOSECOND = {"sm_80": (9.7, 156.0), "sm_90": (33.5, 495.0), "sm_100": (40.0, 1125.0)}
# Either kernel is taken to reach this share of those.
_EFFICIENCY = 0.5
# A search makes six launches; from Python each takes some 20 us longer than from C++.
_LAUNCHES_MICROSECONDS = 120.0


@functools.cache
def architecture(index: int | None) -> str:
    """``"sm_90"``, ``"gfx942"``, ... of the GPU of that number."""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def searches_on_tensor_cores(multiply_adds: int, dim: int, architecture: str) -> bool:
    """Whether a search of ``multiply_adds`` in all, through vectors of ``dim`` elements, gains more by tensor cores than it loses by
    launches."""
    if dim < MIN_TENSOR_CORE_DIM or architecture not in _MULTIPLY_ADDS_PER_PICOSECOND:
        return False
    float32, tensor_cores = (_EFFICIENCY * rate for rate in _MULTIPLY_ADDS_PER_PICOSECOND[architecture])
    return multiply_adds * (1 / float32 - 1 / tensor_cores) >= _LAUNCHES_MICROSECONDS * 1e6
