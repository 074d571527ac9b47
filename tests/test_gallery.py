"""docs/gallery.md: every model is there with its file, and formulas and pictures are those of docstrings and examples."""

import inspect
import re
from pathlib import Path

import pytest

from fastvae.models import VAE, DeepVAE, HierarchicalVAE, ImageVAE, LadderVAE
from fastvae.models.registry import MODELS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "gallery.md"
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
# Models whose loss is that of their base; the formula in the docstring of LadderVAE is that of its posterior.
SAME_LOSS = {ImageVAE: VAE, LadderVAE: HierarchicalVAE, DeepVAE: HierarchicalVAE}


def formula_of(model: type) -> str | None:
    """The first formula of a class's docstring on lines of its own."""
    found = re.search(r"\.\. math::(.*?)(?:\n\n|\Z)", inspect.getdoc(SAME_LOSS.get(model, model)), re.DOTALL)
    return found and " ".join(found[1].split())


def shown(section: str) -> str:
    (formula,) = re.findall(r"```math\n(.*?)```", section, re.DOTALL)
    return " ".join(re.sub(r"\\(begin|end)\{split\}", "", formula).split())


def test_every_model_is_there():
    assert SECTIONS.keys() == {model.__name__ for model in MODELS}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_model_has_its_file_and_a_formula(model):
    section = SECTIONS[model.__name__]
    files = [(DOCS / link).resolve() for link in re.findall(r"File: \[`[\w.]+`\]\(([^)]+)\)", section)]
    assert files == [Path(inspect.getsourcefile(model)).resolve()]
    assert shown(section)


@pytest.mark.parametrize("model", [model for model in MODELS if formula_of(model)], ids=lambda model: model.__name__)
def test_a_formula_is_that_of_the_docstring(model):
    assert shown(SECTIONS[model.__name__]) == formula_of(model)


def test_every_picture_is_there_with_the_example_that_draws_it():
    shown_pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)\n\n[^\n]*\[`\w+`\]\((\.\./examples/\w+\.py)\)", PAGE.read_text())
    assert {DOCS / picture for picture, _ in shown_pictures} == set((DOCS / "images/models").iterdir())
    for picture, example in shown_pictures:
        assert Path(picture).name in (DOCS / example).read_text()
