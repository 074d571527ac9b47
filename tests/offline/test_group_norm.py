"""The Triton kernels of GroupNorm compile, without a GPU, for the GPUs that Triton knows."""

import pytest
import torch  # noqa: F401

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastvae._ops import NORM_ACTIVATIONS  # noqa: E402
from fastvae.kernels import _launch, group_norm  # noqa: E402

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)]
KERNELS = [value for name, value in vars(group_norm).items() if name.endswith("_kernel")]
# What the arguments point to: the tensors of the user, the statistics, the sums.
POINTERS = {
    "*dtype": ("input", "output", "grad_output", "grad_input", "weight", "bias", "grad_weight", "grad_bias"),
    "*fp64": ("mean", "rstd", "sums"),
    "*fp32": ("slots", "through"),
    "fp32": ("eps",),
}


def signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    kinds = {name: kind.replace("dtype", dtype) for kind, names in POINTERS.items() for name in names}
    return {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter has replaced the kernels")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: getattr(kernel, "__name__", "interpreted"))
@pytest.mark.parametrize(("dtype", "last", "rows", "columns"), [("fp32", True, 64, 32), ("bf16", False, 1024, 2), ("fp16", True, 1, 128)])
def test_compiles(target, kernel, dtype, last, rows, columns):
    options = {"ACTIVATION": NORM_ACTIVATIONS["silu"], "LAST": last, "ROWS": rows, "COLUMNS": columns, "BLOCK": group_norm.PIECES}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature(kernel, dtype, constants), constexprs=constants)
    compiled = triton.compile(source, target=target, options=_launch.OPTIONS)
    assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    # What every device has, so that several programs fit on a multiprocessor.
    assert compiled.metadata.shared <= 16 * 1024
