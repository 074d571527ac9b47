"""Whole models and losses, exported, written to a file and read again, in this process and in a fresh one."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _helpers import Source
from torch.utils import _pytree as pytree

import fastvae
import fastvae.models as models
import fastvae.nn as fnn
from fastvae import functional as FV

ROOT = Path(__file__).parents[1]


def small_residual():
    return models.ImageVAE.residual(channels=(8, 16), blocks=1, groups=4, latent_channels=2)


def uniform(*shape: int) -> torch.Tensor:
    return Source("cpu").uniform(*shape)


# Each gives a named tuple; in evaluation mode too, as deployed.
MODELS = {
    "VAE": (lambda: models.VAE.mlp(16, (8,), 3, beta=fnn.LinearSchedule(4), capacity=1.0), lambda: (uniform(3, 16), uniform(3, 3))),
    "convolutional VAE": (lambda: models.VAE.conv(3), lambda: (uniform(2, 1, 28, 28), uniform(2, 3))),
    "ImageVAE": (small_residual, lambda: (uniform(2, 3, 8, 8), uniform(2, 2, 4, 4))),
    "LadderVAE": (lambda: models.LadderVAE.mlp(16, (8, 6), (3, 2)), lambda: (uniform(3, 16), (uniform(3, 2), uniform(3, 3)))),
    "DeepVAE": (
        lambda: models.DeepVAE.residual(8, 1, (4, 8), 1, 2, groups=2),
        lambda: (uniform(2, 1, 8, 8), (uniform(2, 2, 4, 4), uniform(2, 2, 8, 8))),
    ),
    "AE": (lambda: models.AE.conv(3), lambda: (uniform(2, 1, 28, 28),)),
    "SparseAE": (lambda: models.SparseAE.mlp((1, 4, 4), (), 5, code="sigmoid"), lambda: (uniform(2, 1, 4, 4),)),
    "ContractiveAE": (lambda: models.ContractiveAE.mlp((1, 4, 4), (), 5, code="sigmoid"), lambda: (uniform(2, 1, 4, 4),)),
    "VQVAE": (lambda: models.VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1), lambda: (uniform(2, 1, 8, 8),)),
    "VQVAE2": (lambda: models.VQVAE2.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1), lambda: (uniform(2, 1, 8, 8),)),
    "VectorQuantizer": (lambda: fnn.VectorQuantizer(8, 4), lambda: (uniform(5, 4),)),
    "ResidualVectorQuantizer": (lambda: fnn.ResidualVectorQuantizer(2, 8, 4), lambda: (uniform(5, 4),)),
    "ELBOLoss": (lambda: fnn.ELBOLoss(beta=fnn.LinearSchedule(4)), lambda: (uniform(3, 5), uniform(3, 5), uniform(3, 2), uniform(3, 2))),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    make, arguments = MODELS[name]
    model, arguments = make().eval(), arguments()
    expected = model(*arguments)
    program = torch.export.export(model, arguments)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            output = loaded(*arguments)
        assert type(output) is type(expected)
        for ours, theirs in zip(pytree.tree_leaves(output), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(ours, theirs)


class QuantizesVectors(torch.nn.Module):
    def forward(self, x, codebook):
        return FV.vector_quantize(x, codebook)


def test_the_results_of_functions_are_saved(tmp_path):
    arguments = uniform(5, 4), uniform(8, 4)
    torch.export.save(torch.export.export(QuantizesVectors(), arguments), tmp_path / "model.pt2")
    assert type(torch.export.load(tmp_path / "model.pt2").module()(*arguments)) is FV.VQ


def test_a_saved_model_is_loaded_by_another_process(tmp_path):
    model, arguments = models.VAE.mlp(16, (8,), 3).eval(), (uniform(3, 16), uniform(3, 3))
    torch.export.save(torch.export.export(model, arguments), tmp_path / "model.pt2")
    torch.save((arguments, model(*arguments).loss.detach()), tmp_path / "arguments.pt")
    program = (
        "import sys, torch, fastvae.models; arguments, loss = torch.load(sys.argv[2]);"
        "output = torch.export.load(sys.argv[1]).module()(*arguments);"
        "torch.testing.assert_close(output.loss, loss); print(type(output).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt2"), str(tmp_path / "arguments.pt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "VAEOutput\n", result.stderr


def named_tuples() -> dict[str, type]:
    """Those that the public names of the package lead to."""
    found = {}
    for package in (fastvae.functional, fnn, models):
        names = [f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
        for name in names:
            members = inspect.getmembers(importlib.import_module(name), inspect.isclass)
            tuples = [c for _, c in members if issubclass(c, tuple) and hasattr(c, "_fields") and c.__module__.startswith("fastvae.")]
            found |= {f"{c.__module__}.{c.__qualname__}": c for c in tuples}
    # No function returns the arguments and results of an operator, and no quantizer its state.
    internal = ("fastvae.ops.", "fastvae.nn._codebook_state.")
    return {name: c for name, c in found.items() if not name.startswith(internal) and not name.rpartition(".")[2].startswith("_")}


def test_every_named_tuple_can_be_saved():
    assert {"ELBO", "VQ", "VQOutput", "VAEOutput", "AEOutput", "VQVAEOutput"} <= {c.__name__ for c in named_tuples().values()}
    for name, kind in named_tuples().items():
        value = kind(*range(len(kind._fields)))
        spec = pytree.treespec_loads(pytree.treespec_dumps(pytree.tree_structure(value)))
        assert pytree.tree_unflatten(range(len(kind._fields)), spec) == value, name
