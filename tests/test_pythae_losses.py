"""Losses and gradients of the models that pythae has too, with the same weights and noise, against pythae's."""

import pytest
import torch
from _pythae import CASES, Case, our_figures, stored_figures, their_figures

each_case = pytest.mark.parametrize("name", CASES)


def assert_same(figures: dict, expected: dict) -> None:
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(torch.tensor(figures[key]).double(), torch.tensor(value).double(), rtol=1e-6, atol=1e-7)


def test_the_table_has_every_case():
    assert stored_figures().keys() == CASES.keys()


@each_case
def test_losses_are_those_that_pythae_gave(name):
    assert_same(our_figures(CASES[name]), stored_figures()[name])


@each_case
def test_losses_are_those_that_pythae_gives(name):
    pytest.importorskip("pythae.models", reason="pythae is not installed: pip install pythae")
    assert_same(their_figures(CASES[name]), stored_figures()[name])


def test_a_wrong_weight_is_seen():
    case = CASES["beta-VAE"]
    with pytest.raises(AssertionError):
        assert_same(our_figures(Case(case.theirs, CASES["VAE"].make)), stored_figures()["beta-VAE"])
