"""A program: the layers of a kernel that tools/hub.py wrote, in the place of others by the ``kernels`` package, against the package.

It takes the kernel's folder and the backend that serves it, and prints the kernel's name and whether it has compiled kernels.
"""

import sys
from pathlib import Path

import torch
from kernels.verify import Digest, Metadata
from torch import nn
from torch.nn import functional as F

from kernels import (
    LocalLayerRepository,
    Mode,
    get_loaded_kernels,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)

# Last, where the folder kernels/ of the checkout does not stand in for the package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import fastvae
from fastvae import functional as FV

# What `kernels` chooses by the torch that is installed, on whatever device the layers are.
VARIANT = "cuda" if torch.version.cuda else "cpu"


class GroupNormSiLU(nn.GroupNorm):
    def forward(self, input):
        return F.silu(super().forward(input))


class RMSNormSiLU(nn.Module):
    def __init__(self, channels, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(channels)), eps

    def forward(self, input):
        return F.silu(F.rms_norm(input.movedim(1, -1), (input.shape[1],), self.weight, self.eps)).movedim(-1, 1)


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        alpha = self.alpha.view(-1, *(1,) * (x.ndim - 2))
        return x + torch.sin(alpha * x).square() / alpha


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook, self.commitment_cost = nn.Parameter(torch.randn(16, 6)), 0.25


class NearestCode(Quantizer):
    def forward(self, x):
        return torch.cdist(x, self.codebook).argmin(-1)


class VectorQuantize(Quantizer):
    def forward(self, x):
        indices = torch.cdist(x.detach(), self.codebook.detach()).argmin(-1)
        codes = self.codebook[indices]
        loss = F.mse_loss(codes, x.detach()) + self.commitment_cost * F.mse_loss(x, codes.detach())
        return x + (codes - x).detach(), indices, loss


class RMSNorm(nn.RMSNorm):
    pass


class GroupNorm(nn.GroupNorm):
    pass


IMAGE, VECTORS = (2, 8, 6, 5), (7, 6)
CASES = {
    GroupNorm: ((4, 8), IMAGE, lambda m, x: FV.group_norm_silu(x, 4, m.weight, m.bias, activation="none")),
    GroupNormSiLU: ((4, 8), IMAGE, lambda m, x: FV.group_norm_silu(x, 4, m.weight, m.bias)),
    RMSNorm: ((6,), VECTORS, lambda m, x: FV.rms_norm_silu(x, m.weight, None, torch.finfo(x.dtype).eps, dim=-1, activation="none")),
    RMSNormSiLU: ((8, 1e-5), IMAGE, lambda m, x: FV.rms_norm_silu(x, m.weight, None, 1e-5)),
    Snake: ((8,), IMAGE, lambda m, x: FV.snake(x, m.alpha)),
    NearestCode: ((), VECTORS, lambda m, x: FV.vq_nearest(x, m.codebook)),
    VectorQuantize: ((), VECTORS, lambda m, x: FV.vector_quantize(x, m.codebook)),
}


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def results(call, module: nn.Module, x: torch.Tensor):
    """The outputs, and the gradients of what learns."""
    x = x.clone().requires_grad_()
    given = outputs(call(x))
    learned = [output for output in given if output.requires_grad]
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad([output.sum() for output in learned], leaves, allow_unused=True) if learned else []
    return [output.detach() for output in given], gradients


def assert_close(actual, expected, **tolerances) -> None:
    for ours, theirs in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, **tolerances)


def check_digests(repository: Path) -> None:
    for variant in (repository / "build").iterdir():
        digest = Metadata.read_from_file(variant / "metadata.json").digest
        digest.validate(Digest.hash_variant(digest.algorithm, variant))


def check_layer(cls: type[nn.Module], repository: Path, backend: str) -> None:
    """In every mode, with gradients: what the package gives by the same backend, to the last bit in plain PyTorch, and nearly what the
    module gave."""
    # Another build of the C++ kernels may round a product and a sum once or twice.
    same = {"rtol": 0, "atol": 0} if backend == "fallback" else {"rtol": 2e-6, "atol": 2e-6}
    (arguments, shape, function), name = CASES[cls], cls.__name__
    replace_kernel_forward_from_hub(cls, name)
    torch.manual_seed(0)
    module, x = cls(*arguments), torch.randn(shape)
    plain = results(module, module, x)
    with fastvae.use_backend(backend):
        ours = results(lambda x: function(module, x), module, x)
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE):
        with use_kernel_mapping({name: {"cpu": LocalLayerRepository(repository, layer_name=name)}}, inherit_mapping=False):
            kernelize(module, mode=mode, device="cpu", use_fallback=False)
        assert module.forward.__func__.__module__.startswith(f"_fastvae_{VARIANT}_")
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if Mode.TORCH_COMPILE in mode else module
        actual = results(call, module, x)
        assert_close(actual, ours, **same)
        assert_close(actual, plain, rtol=1e-4, atol=1e-5)


def main() -> None:
    repository, backend = Path(sys.argv[1]), sys.argv[2]
    check_digests(repository)
    layers = vars(get_local_kernel(repository).layers).values()
    names = {layer.__name__ for layer in layers if isinstance(layer, type) and issubclass(layer, nn.Module)}
    assert names == {cls.__name__ for cls in CASES}, names
    for cls in CASES:
        check_layer(cls, repository, backend)
    (loaded,) = get_loaded_kernels()
    served = sys.modules[f"{loaded.metadata.id}._backend"].serving("group_norm_forward", "cpu", torch.float32)
    print(loaded.metadata.id, "cpp" in served)


if __name__ == "__main__":
    main()
