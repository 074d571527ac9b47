"""The files that users have: a stored ``state_dict`` of each class of models, loaded strictly, gives the numbers stored with it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from _tiny_models import TINY, make, numbers, scrambled

pytest.importorskip("safetensors", reason="safetensors is not installed: pip install fastvae-kernels[train]")

from safetensors import safe_open
from safetensors.torch import load_file

from fastvae.models import registry

FOLDER = Path(__file__).resolve().parent / "data" / "states"
pytestmark = pytest.mark.usefixtures("one_thread")


def part(stored: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", TINY)
def test_a_stored_state_gives_the_stored_numbers(name):
    stored = load_file(FOLDER / f"{name}.safetensors")
    model = make(name).eval()
    model.load_state_dict(part(stored, "state."))
    expected = part(stored, "output.")
    assert expected
    torch.testing.assert_close(numbers(name, model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_stored_numbers_are_those_of_the_state(name):
    """Those of another state differ: a test that compares them sees what is not loaded."""
    stored, fresh = part(load_file(FOLDER / f"{name}.safetensors"), "output."), numbers(name, make(name).eval())
    assert stored.keys() == fresh.keys()
    assert any(not torch.allclose(stored[key], fresh[key], rtol=1e-4, atol=1e-4) for key in stored)


def test_every_class_has_its_file():
    """They are small enough for a checkout, and say which version wrote them."""
    assert set(TINY) == {model.__name__ for model in registry.MODELS} == {path.stem for path in FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
    for path in FOLDER.iterdir():
        with safe_open(path, "pt") as file:
            assert file.metadata()["version"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", TINY)
def test_a_copy_of_a_model_is_one_of_its_own(name, duplicate):
    model = scrambled(name)
    other = duplicate(model)
    torch.testing.assert_close(numbers(name, other), numbers(name, model), rtol=0, atol=0)
    assert not {t.data_ptr() for t in other.state_dict().values() if t.numel()} & {t.data_ptr() for t in model.state_dict().values()}
