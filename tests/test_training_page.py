"""The commands of docs/training.md, in order, on fewer images and steps."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

for package in ("lightning", "jsonargparse", "tensorboard", "mlxtend", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("training_page", ROOT / "tools/training_page.py")
training_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training_page)

FEWER = {"zip(pixels, digits)": "zip(pixels[::20], digits[::20])", "--trainer.max_epochs 20": "--trainer.max_steps 2"}


@pytest.mark.prove
def test_the_commands_make_what_the_page_shows(tmp_path):
    page = training_page.PAGE.read_text()
    for text, replacement in FEWER.items():
        assert page.count(text) == 1
        page = page.replace(text, replacement)
    training_page.run(page, tmp_path)
    shown = re.findall(r"\]\(images/training/(\S+)\)", page)
    assert {*shown, "latents.npz"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert all((training_page.PICTURES / name).is_file() for name in shown)
    with np.load(tmp_path / "out/latents.npz") as latents:
        assert latents["z"].shape == (250, 20)
        assert sorted(np.unique(latents["label"])) == list(range(10))


def test_a_page_runs_nothing_but_fastvae(tmp_path):
    with pytest.raises(ValueError, match=r"^training.md: got a command 'rm', takes fastvae$"):
        training_page.run("```sh\nrm -r out\n```\n", tmp_path)
