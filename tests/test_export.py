"""Models for other runtimes: ONNX files against onnxruntime, programs without the package's operators, and AOTInductor packages."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from _helpers import brief
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastvae
import fastvae.export
import fastvae.nn as fnn
from fastvae import models
from fastvae.ops import OPERATORS

BATCH, IMAGE = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
# Inductor does not bound the sizes behind a stride of an image of any size.
MULTIPLES = {0: Dim("batch"), 2: 2 * Dim("height", min=2), 3: 2 * Dim("width", min=2)}


class Encodes(nn.Module):
    """The method ``encode`` of a model as the call of a module, as exporters take it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode(x)


class Decodes(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z)


@dataclass(frozen=True)
class Case:
    """A module, with the shapes of an input that it is traced with and of another that it has to serve."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    other: tuple[int, ...]
    dynamic: dict

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        first, second = (torch.randn(shape, generator=generator) for shape in (self.shape, self.other))
        return first, second

    def program(self, module: nn.Module) -> ExportedProgram:
        return torch.export.export(module, self.inputs()[:1], dynamic_shapes=(self.dynamic,))


def image_vae(**options) -> models.ImageVAE:
    return models.ImageVAE.residual(channels=(8, 16), blocks=1, groups=4, latent_channels=2, precision="float32", **options)


def vqvae() -> models.VQVAE:
    return models.VQVAE.conv(1, num_codes=16, dim=4, channels=8, hidden=4, blocks=1)


def autoencoder_kl() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **levels)
    return fastvae.optimize(vae.eval())


def video_norm() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), fnn.RMSNormSiLU(8), nn.Conv3d(8, 3, 3, padding=1))


def audio_decoder() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), fnn.Snake(6), nn.ConvTranspose1d(6, 1, 4, stride=2, padding=1))


def residual_quantizer() -> nn.Module:
    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = fnn.ResidualVectorQuantizer(3, 8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output = self.quantizer(x)
            return output.quantized, output.indices

    return Indices()


CASES = {
    "encoder of a VAE of linear layers": Case(lambda: models.VAE.mlp(16, (8,), 3).encoder, (3, 16), (5, 16), BATCH),
    "decoder of a VAE of linear layers": Case(lambda: models.VAE.mlp(16, (8,), 3).decoder, (3, 3), (5, 3), BATCH),
    "encoder of a convolutional VAE": Case(lambda: models.VAE.conv(3).encoder, (3, 1, 28, 28), (5, 1, 28, 28), BATCH),
    "decoder of a convolutional VAE": Case(lambda: models.VAE.conv(3).decoder, (3, 3), (5, 3), BATCH),
    "encoder of an ImageVAE": Case(lambda: image_vae(attention=True).encoder, (2, 3, 16, 12), (3, 3, 8, 24), IMAGE),
    "decoder of an ImageVAE": Case(lambda: image_vae(attention=True).decoder, (2, 2, 8, 6), (3, 2, 4, 12), IMAGE),
    "method of an ImageVAE": Case(lambda: Decodes(image_vae()), (2, 2, 8, 6), (3, 2, 4, 12), IMAGE),
    "lean ImageVAE": Case(lambda: image_vae(memory="lean").decoder, (2, 2, 8, 6), (3, 2, 4, 12), IMAGE),
    "indices of a VQ-VAE": Case(lambda: Encodes(vqvae()), (2, 1, 16, 12), (3, 1, 8, 24), IMAGE),
    "decoder of a VQ-VAE": Case(lambda: vqvae().decoder, (2, 4, 4, 3), (3, 4, 2, 6), IMAGE),
    "residual quantizer": Case(residual_quantizer, (5, 4), (9, 4), BATCH),
    "encoder of diffusers": Case(lambda: autoencoder_kl().encoder, (2, 3, 16, 12), (3, 3, 8, 24), IMAGE),
    "decoder of diffusers": Case(lambda: autoencoder_kl().decoder, (2, 4, 8, 6), (3, 4, 4, 12), IMAGE),
    "RMS norm of videos": Case(video_norm, (2, 3, 4, 6, 5), (3, 3, 5, 4, 7), IMAGE | {4: Dim.DYNAMIC}),
    "snake of audio": Case(audio_decoder, (2, 4, 9), (3, 4, 14), {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}),
}
# What the suite runs; the others are proofs.
BRIEF = ("decoder of a VAE of linear layers", "indices of a VQ-VAE")
each_case = pytest.mark.parametrize("case", brief(CASES, BRIEF))


def operators_of(program: ExportedProgram) -> set[str]:
    """The package's operators in a program; torch.no_grad() within a function is a module of its own."""
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    return {node.target._opname for node in nodes if getattr(node.target, "namespace", None) == "fastvae"}


def flat(output) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


def check_onnx(program: torch.onnx.ONNXProgram, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """onnxruntime gives what the module gives."""
    nodes = [*program.model_proto.graph.node, *(node for function in program.model_proto.functions for node in function.node)]
    assert {node.domain for node in nodes if "fastvae" in node.domain or "fastvae" in node.op_type} == set()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in inputs:
        (name,) = (argument.name for argument in session.get_inputs())
        with torch.no_grad():
            expected = flat(module(x))
        for ours, theirs in zip(session.run(None, {name: x.numpy()}), expected, strict=True):
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


@each_case
def test_a_module_is_exported_to_onnx_as_it_is(case):
    module = case.module()
    program = torch.onnx.export(module, case.inputs()[:1], dynamic_shapes=(case.dynamic,), dynamo=True, verbose=False)
    check_onnx(program, module, case.inputs())


@each_case
def test_a_program_loses_the_operators_of_the_package(case):
    module = case.module()
    program = case.program(module).run_decompositions(fastvae.export.decompositions())
    assert operators_of(program) == set()
    for x in case.inputs():
        for ours, theirs in zip(flat(program.module()(x)), flat(module(x)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.prove
def test_the_programs_of_these_cases_have_operators_to_lose():
    found = {operator for case in CASES.values() for operator in operators_of(case.program(case.module()))}
    searches = {"codebook_quantize", "codebook_residual_quantize"}
    assert found == {"group_norm_forward", "rms_norm_forward", "snake_forward", *searches}


def test_a_program_is_exported_to_onnx_once_it_has_lost_them():
    case = CASES["decoder of an ImageVAE"]
    module = case.module()
    program = case.program(module).run_decompositions(fastvae.export.decompositions())
    check_onnx(torch.onnx.export(program, dynamo=True, verbose=False), module, case.inputs())


def test_every_operator_has_a_definition():
    table = fastvae.export.decompositions()
    assert table.keys() == {op.overloads[backend] for op in OPERATORS.values() for backend in fastvae.ops.BACKENDS}
    assert all(op._definition is not None for op in OPERATORS.values())


def test_a_forced_backend_serves_what_is_not_exported_to_onnx():
    """The definition takes the place of a backend during torch.onnx.export alone."""
    case = CASES["decoder of an ImageVAE"]
    module = case.module()
    with fastvae.use_backend("fallback"):
        check_onnx(torch.onnx.export(module, case.inputs()[:1], dynamo=True, verbose=False), module, case.inputs()[:1])
        program = case.program(module)
    overloads = {node.target._overloadname for node in program.graph.nodes if getattr(node.target, "namespace", None) == "fastvae"}
    assert overloads == {"fallback"}


@pytest.mark.prove
@pytest.mark.parametrize("decomposed", [False, True], ids=["with the package's operators", "in torch's own"])
@pytest.mark.parametrize(("name", "dynamic"), [("encoder of an ImageVAE", MULTIPLES), ("indices of a VQ-VAE", IMAGE)])
def test_a_package_of_aotinductor_gives_the_same(name, dynamic, decomposed, tmp_path):
    """In a process of its own, which imports the package where the program has its operators."""
    case = replace(CASES[name], dynamic=dynamic)
    module = case.module()
    program = case.program(module)
    if decomposed:
        program = program.run_decompositions(fastvae.export.decompositions())
    package, arrays = tmp_path / "model.pt2", tmp_path / "arrays.pt"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    inputs = case.inputs()
    torch.save((inputs, [module(x).detach() for x in inputs]), arrays)
    code = (
        f"import sys, torch{'' if decomposed else ', fastvae'}\n"
        "model = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "for x, expected in zip(*torch.load(sys.argv[2])): torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)\n"
        "print('fastvae' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(package), str(arrays)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.stdout == f"{not decomposed}\n", result.stderr
