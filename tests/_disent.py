"""Representations with known factors, and the scores that disent (0.8.0, MIT) gives them.

``PYTHONPATH=... python tests/_disent.py``, where disent is installed, writes the table of its scores again.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

PATH = Path(__file__).parent / "data" / "disent_scores.json"
# The number of values of each factor.
SIZES = (3, 4, 5)
NUM_TRAIN, NUM_TEST, NUM_GROUPS, GROUP_SIZE = 1000, 500, 1000, 32

Encoder = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _identity(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return factors.astype(float)


def _noisy(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return factors + 0.3 * rng.normal(size=factors.shape)


def _rotated(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
    return (factors / np.array(SIZES)) @ rotation + 0.05 * rng.normal(size=factors.shape)


def _redundant(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each factor in two codes, the second with more noise, beside a code of noise."""
    copies = np.concatenate([factors, factors], 1) + np.repeat([0.1, 0.6], 3) * rng.normal(size=(len(factors), 6))
    return np.concatenate([copies, rng.normal(size=(len(factors), 1))], 1)


def _incomplete(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The last factor is in no code; two codes are noise."""
    return np.concatenate([factors[:, :2] + 0.2 * rng.normal(size=(len(factors), 2)), rng.normal(size=(len(factors), 2))], 1)


CASES: dict[str, Encoder] = {
    "identity": _identity,
    "noisy": _noisy,
    "rotated": _rotated,
    "redundant": _redundant,
    "incomplete": _incomplete,
}


class Samples(NamedTuple):
    """``codes`` is float64, ``(n, d)``, and ``factors`` is int64, ``(n, k)``."""

    codes: np.ndarray
    factors: np.ndarray


def draw_factors(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.integers(0, size, count) for size in SIZES], 1)


def draw_samples(encoder: Encoder) -> Samples:
    """``NUM_TRAIN + NUM_TEST`` independent samples."""
    rng = np.random.default_rng(0)
    factors = draw_factors(NUM_TRAIN + NUM_TEST, rng)
    return Samples(encoder(factors, rng), factors)


def draw_importance() -> np.ndarray:
    """A matrix of importances, ``(d, k)``, where each column has the sum 1."""
    matrix = np.random.default_rng(1).gamma(0.5, size=(6, 4))
    return matrix / matrix.sum(0)


class _Grid:
    """What disent's FactorVAE score asks of a data set, whose observations are the factors."""

    num_factors = len(SIZES)

    def __init__(self):
        self.gt_data, self.rng = self, np.random.default_rng(2)

    def sample_factors(self, count: int) -> np.ndarray:
        return draw_factors(count, self.rng)

    def dataset_batch_from_factors(self, factors: np.ndarray, mode: str) -> np.ndarray:
        return factors

    def dataset_sample_batch(self, count: int, mode: str) -> np.ndarray:
        return self.sample_factors(count)


def _import_metric(name: str) -> Any:
    """A module of disent's metrics; its package imports data sets that need more packages."""
    folder = importlib.import_module("disent").__path__[0]
    for package, attributes in (("dataset", {"DisentDataset": object}), ("metrics", {"__path__": [f"{folder}/metrics"]})):
        module = ModuleType(f"disent.{package}")
        vars(module).update(attributes)
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module(f"disent.metrics._{name}")


def _their_factor_vae(encoder: Encoder) -> float:
    np.random.seed(3)
    rng = np.random.default_rng(4)
    scores = _import_metric("factor_vae").metric_factor_vae(
        _Grid(),
        lambda factors: encoder(factors, rng),
        batch_size=GROUP_SIZE,
        num_train=NUM_GROUPS,
        num_eval=NUM_GROUPS,
        num_variance_estimate=NUM_TRAIN,
    )
    return scores["factor_vae.eval_accuracy"]


def their_scores(encoder: Encoder) -> dict[str, float]:
    """Needs disent."""
    samples = draw_samples(encoder)
    train, test = ([part[rows].T for part in samples] for rows in (slice(NUM_TRAIN), slice(NUM_TRAIN, None)))
    np.random.seed(0)
    dci, sap = _import_metric("dci")._compute_dci(*train, *test), _import_metric("sap")
    scores = {
        "mig": _import_metric("mig")._compute_mig(samples.codes.T, samples.factors.T)["mig.discrete_score"],
        "disentanglement": dci["dci.disentanglement"],
        "completeness": dci["dci.completeness"],
        "informativeness": dci["dci.informativeness_test"],
        "sap": sap._compute_sap(*train, *test, continuous_factors=False)["sap.score"],
        "continuous sap": sap._compute_sap(samples.codes.T, samples.factors.T, None, None, continuous_factors=True)["sap.score"],
        "factor vae": _their_factor_vae(encoder),
    }
    return {name: float(score) for name, score in scores.items()}


def their_importance_scores() -> dict[str, float]:
    """Needs disent."""
    dci, importance = _import_metric("dci"), draw_importance()
    return {"disentanglement": float(dci._disentanglement(importance)), "completeness": float(dci._completeness(importance))}


def stored_scores() -> dict[str, dict[str, float]]:
    return json.loads(PATH.read_text())


if __name__ == "__main__":
    table = {name: their_scores(encoder) for name, encoder in CASES.items()} | {"importance": their_importance_scores()}
    PATH.write_text(json.dumps(table, indent=1) + "\n")
