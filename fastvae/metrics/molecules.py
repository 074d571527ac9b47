"""Molecules that a model has written as SMILES: how many are valid, different and new."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._extras import extra

with extra("molecules"):
    from rdkit import Chem
    from rdkit.rdBase import BlockLogs
with extra("metrics"):
    from torchmetrics import Metric


class MoleculeResult(NamedTuple):
    """Float64 scalars in [0, 1].

    ``validity`` is the share of strings that are molecules, ``uniqueness`` the share of different ones among those, ``novelty`` the share
    of the different ones that the training data lack.
    """

    validity: Tensor
    uniqueness: Tensor
    novelty: Tensor


def canonical_smiles(smiles: str) -> str | None:
    """RDKit's canonical form of a molecule, with its stereochemistry; None for what is none, the empty string among it."""
    # RDKit prints a line for each string that is no molecule, of which an untrained model writes thousands.
    with BlockLogs():
        molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return None if molecule is None else Chem.MolToSmiles(molecule)


class MoleculeQuality(Metric):
    """Validity, uniqueness and novelty (Polykovskiy et al., *MOSES*, 2020) of molecules, as RDKit reads them.

    Two strings are the same molecule where their canonical forms are equal. The metric keeps 8 bytes a valid molecule: a hash, in which
    n molecules collide with probability :math:`n^2 / 2^{65}`.

    Args:
        train: SMILES of the training data; those that are no molecules are passed over.
        options: of ``torchmetrics.Metric``.
    """

    total: Tensor
    valid: list[Tensor]

    def __init__(self, train: Iterable[str] = (), **options: Any):
        super().__init__(**options)
        self.known = _hashes(train).unique()
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid", [], dist_reduce_fx="cat")

    def update(self, smiles: Sequence[str]) -> None:
        """Adds strings that a model has written."""
        if isinstance(smiles, str):
            raise TypeError("smiles: got a string, takes a sequence of them")
        self.total += len(smiles)
        self.valid.append(_hashes(smiles).to(self.total.device))

    def compute(self) -> MoleculeResult:
        valid = (torch.cat([*self.valid]) if isinstance(self.valid, list) else self.valid).cpu()
        if self.total == 0:
            raise ValueError("smiles: got none, takes at least one")
        unique = valid.unique()
        new = ~torch.isin(unique, self.known)
        shares = ((len(valid), int(self.total)), (len(unique), len(valid)), (int(new.sum()), len(unique)))
        # Where there are no molecules, none is different or new.
        return MoleculeResult(*(torch.tensor(part / max(whole, 1), dtype=torch.float64) for part, whole in shares))


def _hashes(smiles: Iterable[str]) -> Tensor:
    """A hash of the canonical form of each string that is a molecule, int64."""
    forms = (form for form in map(canonical_smiles, smiles) if form is not None)
    digests = [hashlib.sha256(form.encode()).digest()[:8] for form in forms]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)
