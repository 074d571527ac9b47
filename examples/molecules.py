"""A token VAE of molecules that are written as SMILES: how many of its samples are molecules, different and new.

    python examples/molecules.py [--epochs 30] [--out out]

The molecules are made by a small grammar of carbon chains with branches, hetero atoms and benzene rings. Writes molecules.txt. Takes the
extra "molecules", RDKit.
"""

import argparse
import random
import re
from pathlib import Path

import torch
from tqdm import trange

from fastvae.metrics.molecules import MoleculeQuality
from fastvae.models import SequenceVAE
from fastvae.nn import LinearSchedule
from fastvae.training.sentences import Vocabulary

COUNT, BATCH, SAMPLES = 4000, 128, 500
LINKS = ("C", "C", "C", "C", "N", "O", "C(=O)", "C(C)", "C(O)", "C(N)", "C(F)", "c1ccc(cc1)", "C=C")
ENDS = ("C", "O", "N", "F", "Cl", "C#N", "C(=O)O", "c1ccccc1", "C(F)(F)F")
# Atoms of two letters are one token.
TOKEN = re.compile(r"Cl|.")


def draw_molecule(draws: random.Random) -> str:
    """A chain whose every part leaves one bond to the next."""
    return "C" + "".join(draws.choices(LINKS, k=draws.randint(1, 6))) + draws.choice(ENDS)


def train(tokens: torch.Tensor, size: int, epochs: int) -> SequenceVAE:
    torch.manual_seed(0)
    steps = epochs * (len(tokens) // BATCH)
    model = SequenceVAE.recurrent(size, latent_dim=16, word_dropout=0.2, beta=LinearSchedule(max(steps // 2, 1), end=0.5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in trange(epochs, unit="epoch"):
        for batch in torch.randperm(len(tokens))[: steps // epochs * BATCH].split(BATCH):
            optimizer.zero_grad()
            model(tokens[batch]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            model.kl_penalty.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    draws = random.Random(0)
    known = sorted({draw_molecule(draws) for _ in range(COUNT)})
    spaced = [" ".join(TOKEN.findall(smiles)) for smiles in known]
    vocabulary = Vocabulary(sorted({token for smiles in spaced for token in smiles.split()}))
    model = train(vocabulary.encode(spaced), len(vocabulary), arguments.epochs)
    drawn = model.sample(SAMPLES, max_length=64, generator=torch.Generator().manual_seed(0))
    smiles = [text.replace(" ", "") for text in vocabulary.decode(drawn)]
    quality = MoleculeQuality(train=known)
    quality.update(smiles)
    result = quality.compute()
    summary = ", ".join(f"{name} {share:.0%}" for name, share in result._asdict().items())
    print(f"{len(known)} molecules, {SAMPLES} samples: {summary}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "molecules.txt").write_text(f"{summary}\n" + "".join(f"{line}\n" for line in smiles[:40]))


if __name__ == "__main__":
    main()
