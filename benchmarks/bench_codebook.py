"""Exact nearest codes, the training step of a quantizer, and residual quantization.

Random vectors are the easiest case of the search: their nearest codes are far ahead of the next. So there are two more kinds of data, one
clustered, and encodings with the codebook of a trained VQ-VAE.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Case, Inputs, Results, Unavailable, WrongResult, compiled, forced
from fastvae import functional as FV
from fastvae.compat import patch_vector_quantize
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer
from fastvae.training.plain_torch import quantize_and_move

# Written by `python examples/vqvae_mnist.py --save-latents benchmarks/data`.
TRAINED = Path(__file__).parent / "data" / "vqvae_digits.npz"
CHUNK = 1024
RESIDUAL_STEPS = 8
# float32 may take either of two distances for the smaller one where they differ by less than this, relative to the larger one.
NEAR = 1e-5


def cdist_argmin(x, codebook):
    return torch.cdist(x, codebook).argmin(-1)


def addmm_argmin(x, codebook):
    """As one who knows would write it: no root, no norm of x, in place."""
    return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)


def call(function):
    """The provider that calls ``function(x, codebook)`` without gradients."""

    def provide(inputs: Inputs):
        x, codebook = inputs.leaves["x"], inputs.others["codebook"]

        def operation():
            with torch.no_grad():
                return function(x, codebook)

        return operation

    return provide


def compiled_call(function):
    def provide(inputs: Inputs):
        compiled(function)  # raises where there is no compiler
        return call(torch.compile(function))(inputs)

    return provide


def fused(inputs: Inputs):
    """Exact, so every index is held against float64 before anything is timed."""
    operation = call(FV.vq_nearest)(inputs)
    x, codebook = inputs.leaves["x"].detach().double(), inputs.others["codebook"].double()
    for rows, found in zip(x.split(CHUNK), operation().split(CHUNK), strict=True):
        distances = torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        if not torch.equal(found, distances.argmin(-1)):
            raise WrongResult("fastvae: an index is not that of float64")
    return operation


def share_rechecked(operation) -> str:
    """How many rows a faster search left to a more accurate one, where the search counts them."""
    extension = sys.modules.get("fastvae._C")
    if extension is None:
        return ""
    extension.codebook_statistics(reset=True)
    operation()
    counts = extension.codebook_statistics()
    if not counts["rows"]:
        return ""
    shares = {name: counts[name] / counts["rows"] for name in ("screened_again", "rechecked")}
    return f"{shares['screened_again']:.2%} of rows searched again in float32, {shares['rechecked']:.2%} in float64"


def without_integers(inputs: Inputs):
    """With 32-bit floating-point products alone, as on a processor that has no faster ones."""
    extension = sys.modules.get("fastvae._C")
    if extension is None or "avx512_vnni" not in extension.instruction_sets():
        raise Unavailable("this processor has no faster products to leave out")
    operation, fastest = fused(inputs), extension.instruction_set()

    def slower():
        extension.set_instruction_set("avx512")
        try:
            return operation()
        finally:
            extension.set_instruction_set(fastest)

    return slower


# The OpenBLAS that faiss brings does not know every processor, and then multiplies as the oldest one did: three to four times slower.
OPENBLAS_CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}


def faiss_flat(inputs: Inputs):
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in OPENBLAS_CORES:
        os.environ.setdefault("OPENBLAS_CORETYPE", OPENBLAS_CORES[capability])
    try:
        import faiss
    except ModuleNotFoundError:
        raise Unavailable("faiss is not installed") from None
    x, codebook = inputs.leaves["x"].detach(), inputs.others["codebook"]
    if x.device.type != "cpu":
        raise Unavailable("faiss is installed for the CPU")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = x.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def random(size, dtype, device) -> Inputs:
    n, d, k = size
    x, codebook = torch.randn(n, d, dtype=dtype, device=device), torch.randn(k, d, dtype=dtype, device=device)
    return Inputs({"x": x.requires_grad_()}, {"codebook": codebook})


def structured(size, dtype, device) -> Inputs:
    """Correlated vectors in clusters of unequal size, and a codebook that has been fitted to them."""
    n, d, k = size
    basis = torch.randn(d, d, dtype=dtype, device=device) * torch.logspace(0, -2, d, dtype=dtype, device=device)[:, None]
    centres = torch.randn(max(k // 4, 1), d, dtype=dtype, device=device)
    which = (torch.rand(n, device=device) ** 2 * len(centres)).long()
    x = 3 + (centres[which] + 0.3 * torch.randn(n, d, dtype=dtype, device=device)) @ basis
    layer = VectorQuantizer(k, d, kmeans_iters=3).to(device)
    layer(x)
    return Inputs({"x": x.requires_grad_()}, {"codebook": layer.codebook})


def trained(size, dtype, device) -> Inputs:
    """Some encodings of digits and the codebook of a trained VQ-VAE."""
    n, d, k = size
    data = {name: torch.from_numpy(values).to(device, dtype) for name, values in np.load(TRAINED).items()}
    return Inputs({"x": data["x"][:n, :d].clone().requires_grad_()}, {"codebook": data["codebook"][:k, :d].clone()})


def distances_of_indices(results: Results, inputs: Inputs) -> Results:
    """Rounding may take a code that is as near to within its error: what has to agree is how near."""
    x, codebook = inputs.leaves["x"].detach().double(), inputs.others["codebook"].double()
    return {"distance": (x - codebook[results["indices"]]).norm(dim=-1)}


def products(inputs: Inputs) -> float:
    """The floating-point operations of all inner products, with one codebook or a stack of them."""
    return 2.0 * inputs.leaves["x"].numel() * inputs.others["codebook"][..., 0].numel()


def _nearest(name, size, ours=fused, setup=random, quick=False) -> Case:
    return Case(
        family="codebook",
        name=name,
        size=size,
        tiny=(50, size[1] // 2, 70),
        setup=setup,
        providers={
            "eager": call(cdist_argmin),
            "addmm": call(addmm_argmin),
            "compile": compiled_call(cdist_argmin),
            "faiss": faiss_flat,
            "fastvae": ours,
            "fastvae-fallback": forced(fused, "fallback"),
        },
        outputs=("indices",),
        work=products,
        unit="FLOP",
        compare=distances_of_indices,
        remark=share_rechecked,
        quick=quick,
    )


def layer_inputs(size, dtype, device) -> Inputs:
    inputs = random(size, dtype, device)
    return Inputs(inputs.leaves, inputs.others, incoming=(torch.randn(size[:2], dtype=dtype, device=device), None))


def _step(layer, x: Tensor, incoming):
    """Forward and backward of a layer whose codebook moves, from the same codebook each time."""

    def operation():
        x.grad = None
        quantized, loss = layer(x)
        torch.autograd.backward((quantized, loss), incoming)
        return quantized, loss

    return operation


def fused_step(inputs: Inputs):
    x, codebook = inputs.leaves["x"], inputs.others["codebook"]
    layer = VectorQuantizer(*codebook.shape, decay=1.0, commitment_cost=1.0).to(x.device)
    layer.codebook.copy_(codebook)
    layer.ema_sum.copy_(codebook)

    def call_layer(x):
        output = layer(x)
        return output.quantized, output.loss

    return _step(call_layer, x, inputs.incoming)


def plain_step(function):
    def provide(inputs: Inputs):
        x, codebook = inputs.leaves["x"], inputs.others["codebook"].clone()
        state = codebook, torch.ones_like(codebook[:, 0]), codebook.clone()
        return _step(lambda x: function(x, *state), x, inputs.incoming)

    return provide


def compiled_step(inputs: Inputs):
    compiled(quantize_and_move)(inputs)  # raises where there is no compiler
    return plain_step(torch.compile(quantize_and_move))(inputs)


def library():
    try:
        return importlib.import_module("vector_quantize_pytorch")
    except ModuleNotFoundError:
        raise Unavailable("vector-quantize-pytorch is not installed") from None


def vector_quantize_pytorch_step(inputs: Inputs):
    x, codebook = inputs.leaves["x"], inputs.others["codebook"]
    codes, dim = codebook.shape
    layer = library().VectorQuantize(dim, codes, decay=1.0, commitment_weight=1.0, rotation_trick=False).to(x.device)
    layer.codebook = codebook
    layer._codebook.embed_avg.copy_(codebook[None])

    def call_layer(x):
        quantized, _, loss = layer(x[None])
        return quantized[0], loss.sum()

    return _step(call_layer, x, inputs.incoming)


def without_near_ties(inputs: Inputs) -> Inputs:
    """Vectors whose codes no rounding changes, so that all providers take the same: another stands where two codes are about as near."""
    x = inputs.leaves["x"].detach()
    left, distinct = x.double(), x.new_ones(len(x), dtype=torch.bool)
    for codebook in _stacked(inputs.others["codebook"]).double():
        rows = [
            torch.cdist(chunk, codebook, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False) for chunk in left.split(CHUNK)
        ]
        (nearest, second), indices = torch.cat([row.values for row in rows]).unbind(-1), torch.cat([row.indices for row in rows])
        distinct &= second - nearest > NEAR * second
        left = left - codebook[indices[:, 0]]
    others = distinct.nonzero().squeeze(1)
    x[~distinct] = x[others[: len(x) - len(others)]]
    return inputs


def plain_inputs(size, dtype, device) -> Inputs:
    return without_near_ties(layer_inputs(size, dtype, device))


def cosine_inputs(size, dtype, device) -> Inputs:
    """Vectors and codes of length 1."""
    inputs = layer_inputs(size, dtype, device)
    for tensor in (inputs.leaves["x"], inputs.others["codebook"]):
        tensor.data = torch.nn.functional.normalize(tensor.data, dim=-1)
    return without_near_ties(inputs)


def residual_layer_inputs(size, dtype, device) -> Inputs:
    inputs = residual_inputs((*size, RESIDUAL_STEPS), dtype, device)
    incoming = torch.randn(size[:2], dtype=dtype, device=device), None
    return without_near_ties(Inputs(inputs.leaves, inputs.others, incoming=incoming))


def _stacked(codebook: Tensor) -> Tensor:
    """The codebooks of the steps, ``(steps, codes, dim)``, of a stack of them or of a single one."""
    return codebook.view(-1, *codebook.shape[-2:])


def plain_quantizer(codes: int, dim: int):
    return library().VectorQuantize(dim, codes, decay=1.0)


def cosine_quantizer(codes: int, dim: int):
    return library().VectorQuantize(dim, codes, decay=1.0, use_cosine_sim=True)


def residual_quantizer(codes: int, dim: int):
    return library().ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=RESIDUAL_STEPS, decay=1.0)


def library_step(make, patch):
    """A step of a layer of vector-quantize-pytorch with its default options, except that the averages keep the codebook where it is."""

    def provide(inputs: Inputs):
        x, codebooks = inputs.leaves["x"], _stacked(inputs.others["codebook"])
        layer = make(*codebooks.shape[1:]).to(x.device)
        quantizers = (module for module in layer.modules() if isinstance(module, library().VectorQuantize))
        for quantizer, codebook in zip(quantizers, codebooks, strict=True):
            quantizer.codebook = codebook
            quantizer._codebook.embed_avg.copy_(codebook[None])
        layer = patch(layer)

        def call_layer(x):
            quantized, _, loss = layer(x[None])
            return quantized[0], loss.sum()

        return _step(call_layer, x, inputs.incoming)

    return provide


def compiled_library_step(make):
    def provide(inputs: Inputs):
        compiled(make)(inputs)  # raises where there is no compiler
        return library_step(make, torch.compile)(inputs)

    return provide


def _patched_step(name, size, make, setup) -> Case:
    return Case(
        family="codebook",
        name=name,
        size=size,
        tiny=(60, 5, 20),
        setup=setup,
        providers={
            "eager": library_step(make, lambda layer: layer),
            "compile": compiled_library_step(make),
            "fastvae": library_step(make, patch_vector_quantize),
            "fastvae-fallback": forced(library_step(make, patch_vector_quantize), "fallback"),
        },
        outputs=("quantized", "loss"),
        work=products,
        unit="FLOP",
    )


def _training_step(size, quick=False) -> Case:
    return Case(
        family="codebook",
        name="vq_training_step",
        size=size,
        tiny=(60, 5, 20),
        setup=layer_inputs,
        providers={
            "eager": plain_step(quantize_and_move),
            "compile": compiled_step,
            "vector-quantize-pytorch": vector_quantize_pytorch_step,
            "fastvae": fused_step,
            "fastvae-fallback": forced(fused_step, "fallback"),
        },
        outputs=("quantized", "loss"),
        work=products,
        unit="FLOP",
        quick=quick,
    )


def residual_inputs(size, dtype, device) -> Inputs:
    """Vectors, and codebooks that have been fitted to what the steps before leave of some of them."""
    n, d, k, steps = size
    x, layer = torch.randn(n, d, dtype=dtype, device=device), ResidualVectorQuantizer(steps, k, d, kmeans_iters=2).to(device)
    layer(torch.randn(8 * k, d, dtype=dtype, device=device))
    return Inputs({"x": x.requires_grad_()}, {"codebook": torch.stack([step.codebook for step in layer.layers])})


def in_single_steps(search):
    """A search of each codebook, a gather and a subtraction."""

    def quantize(x, codebooks):
        residual, indices = x, []
        for codebook in codebooks:
            indices.append(search(residual, codebook))
            residual = residual - codebook[indices[-1]]
        return x - residual, torch.stack(indices, -1)

    return quantize


def all_steps_at_once(x, codebooks):
    return FV.residual_quantize(x, codebooks)[:2]


def vector_quantize_pytorch_residual(inputs: Inputs):
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ModuleNotFoundError:
        raise Unavailable("vector-quantize-pytorch is not installed") from None
    codebooks = inputs.others["codebook"]
    steps, codes, dim = codebooks.shape
    layer = ResidualVQ(dim=dim, num_quantizers=steps, codebook_size=codes, rotation_trick=False).to(codebooks.device).eval()
    for step, codebook in zip(layer.layers, codebooks, strict=True):
        step.codebook = codebook
    return call(lambda x, _: tuple(output[0] for output in layer(x[None])[:2]))(inputs)


def detours_of_indices(results: Results, inputs: Inputs) -> Results:
    """A code that rounding takes for the nearest changes all later steps, so each step is judged by itself, on some of the vectors: how
    far its code is, relative to the nearest one."""
    x, quantized, indices = (t.detach()[:CHUNK] for t in (inputs.leaves["x"], results["quantized"], results["indices"]))
    left, detours = x.double(), []
    for codebook, index in zip(inputs.others["codebook"].double(), indices.unbind(-1), strict=True):
        distances = torch.cdist(left, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        detours.append(distances.gather(1, index[:, None]).squeeze(1) / distances.amin(1))
        left = left - codebook[index]
    if not torch.allclose(x.double() - left, quantized.double(), rtol=1e-4, atol=1e-4):
        raise WrongResult("the result is not the sum of the codes")
    return {"detour": torch.stack(detours)}


def _residual(size, quick=False) -> Case:
    return Case(
        family="codebook",
        name="residual_quantize",
        size=size,
        tiny=(50, size[1] // 2, 30, 3),
        setup=residual_inputs,
        providers={
            "eager": call(in_single_steps(cdist_argmin)),
            "compile": compiled_call(in_single_steps(cdist_argmin)),
            "vector-quantize-pytorch": vector_quantize_pytorch_residual,
            "fastvae-single-steps": call(in_single_steps(FV.vq_nearest)),
            "fastvae": call(all_steps_at_once),
            "fastvae-fallback": forced(call(all_steps_at_once), "fallback"),
        },
        outputs=("quantized", "indices"),
        work=products,
        unit="FLOP",
        compare=detours_of_indices,
        remark=share_rechecked,
        quick=quick,
    )


CASES = (
    _nearest("vq_nearest", (8192, 64, 512), quick=True),
    _nearest("vq_nearest", (32768, 64, 1024)),
    _nearest("vq_nearest_without_int16", (32768, 64, 1024), ours=without_integers),
    _nearest("vq_nearest_structured", (32768, 64, 1024), setup=structured),
    _nearest("vq_nearest_trained", (8192, 64, 512), setup=trained),
    _nearest("vq_nearest", (16384, 256, 8192)),
    _nearest("vq_nearest", (65536, 8, 1024), quick=True),
    _nearest("vq_nearest", (65536, 4, 16384)),
    _training_step((32768, 64, 1024)),
    _patched_step("vector_quantize_step", (32768, 64, 1024), plain_quantizer, plain_inputs),
    _patched_step("vector_quantize_cosine_step", (32768, 64, 1024), cosine_quantizer, cosine_inputs),
    _patched_step("residual_vq_step", (8192, 64, 1024), residual_quantizer, residual_layer_inputs),
    _residual((750, 128, 1024, 8), quick=True),
    _residual((2048, 8, 1024, 8)),
    _residual((2048, 64, 1024, 8)),
    _residual((32768, 64, 1024, 8)),
)
