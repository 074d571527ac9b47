"""Every autoencoder of diffusers after ``fastvae.optimize``: docs/diffusers.md says which norms are fused, and nothing else changes."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
from _diffusers import CASES, OTHERS
from diffusers.models import autoencoders

import fastvae
from fastvae.compat import patch_diffusers
from fastvae.nn import UpsampleConv2d
from fastvae.nn._fused_norms import is_fused

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("diffusers_table", ROOT / "tools/diffusers_table.py")
diffusers_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(diffusers_table)

pytestmark = pytest.mark.usefixtures("one_thread")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_the_page_is_what_the_code_does():
    rows = [diffusers_table.row(case) for case in CASES]
    assert diffusers_table.PAGE.read_text() == diffusers_table.page(rows)
    assert all(row.is_whole for row in rows)
    assert len({case.cls for case, row in zip(CASES, rows, strict=True) if row.sites}) >= 20


def test_no_class_is_missing():
    assert {case.cls for case in CASES} | set(OTHERS) == {name for name in vars(autoencoders) if name[0].isupper()}


@each_case
def test_outputs_and_gradients_stay(case):
    model = case.model()
    optimized = fastvae.optimize(copy.deepcopy(model), report=None)
    assert list(optimized.state_dict()) == list(model.state_dict())
    (output, gradients), (expected, expected_gradients) = case.results(optimized), case.results(model)
    torch.testing.assert_close(output, expected, rtol=0.0, atol=5e-5 * float(expected.abs().max()))
    # Of a bias before a norm, or of a key of attention, nothing but rounding is left where the terms of the gradient cancel.
    largest = max(float(grad.abs().max()) for grad in expected_gradients.values() if grad is not None)
    for name, expected in expected_gradients.items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            tolerance = 5e-4 * float(expected.abs().max()) + 1e-6 * largest
            torch.testing.assert_close(gradients[name], expected, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [case for case in CASES if case.cls != "AutoencoderTiny"], ids=lambda case: case.name)
def test_outputs_in_double_precision(case):
    """Sharper: what is left is that some norms of diffusers compute in float32 whatever they are given. AutoencoderTiny, whose latents are
    float32 too, has no norms."""
    model = case.model().double()
    outputs = []
    for each in (fastvae.optimize(copy.deepcopy(model), report=None), model):
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(each(case.input().double(), **case.call).sample)
    torch.testing.assert_close(*outputs, rtol=0.0, atol=1e-6 * float(outputs[1].abs().max()))


def is_patched(model) -> bool:
    return any(is_fused(module) or isinstance(module, UpsampleConv2d) for module in model.modules())


def assert_same_bits(actual, expected) -> None:
    assert torch.equal(actual[0], expected[0])
    for name, gradient in expected[1].items():
        assert gradient is None or torch.equal(actual[1][name], gradient), name


@each_case
def test_a_patched_model_can_be_copied_pickled_and_patched_again(case):
    model = patch_diffusers(case.model())
    expected = case.results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(case.results(twin), expected)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in patch_diffusers(model).modules()] == kinds


# Loading a class of which parts stay in float32 takes accelerate.
@pytest.mark.parametrize("case", [case for case in CASES if not case.keeps_float32], ids=lambda case: case.name)
def test_what_a_patched_model_saves_loads_as_one_that_is_not(case, tmp_path):
    model = patch_diffusers(case.model())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert is_patched(model)
    assert not is_patched(loaded)
    states = model.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


# With checkpointing AutoencoderTiny leaves out a scaling, and the others run again on caches that their first run has changed.
OTHERWISE_WITH_CHECKPOINTING = ("AutoencoderTiny", "AutoencoderKLMagvit", "AutoencoderKLKVAEVideo")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.checkpoints and case.cls not in OTHERWISE_WITH_CHECKPOINTING], ids=lambda case: case.name
)
def test_gradient_checkpointing(case):
    model = patch_diffusers(case.model())
    expected = case.results(model)
    model.enable_gradient_checkpointing()
    assert_same_bits(case.results(model), expected)
