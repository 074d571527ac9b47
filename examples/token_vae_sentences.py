"""Trains a VAE of sentences on those of a small grammar; writes sentences from the prior, reconstructions and walks between sentences.

    python examples/token_vae_sentences.py [--out out] [--epochs 25]

The weight of the KL rises from 0, and words that the decoder is given are dropped at random, so that it uses the code. The share of words
that are reconstructed shows that it does; the share of samples that are sentences of the grammar shows that subjects and verbs agree.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from fastvae.models import SequenceVAE
from fastvae.nn import LinearSchedule
from fastvae.training.sentences import GRAMMAR, GrammarSentences

BATCH = 128


def pattern(symbol: str = "SENTENCE") -> str:
    """The sentences of the grammar as a regular expression."""
    productions = (" ".join(pattern(part) if part in GRAMMAR else part for part in text.split()) for text in GRAMMAR[symbol])
    return f"(?:{'|'.join(productions)})"


def train(tokens: Tensor, vocabulary_size: int, epochs: int, seed: int = 0) -> SequenceVAE:
    torch.manual_seed(seed)
    steps = epochs * (len(tokens) // BATCH)
    # The KL counts fully after two thirds of the training.
    model = SequenceVAE.recurrent(vocabulary_size, latent_dim=16, word_dropout=0.4, beta=LinearSchedule(max(2 * steps // 3, 1), end=0.5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bar = trange(epochs, unit="epoch")
    for _ in bar:
        for batch in torch.randperm(len(tokens))[: steps // epochs * BATCH].split(BATCH):
            output = model(tokens[batch])
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            model.kl_penalty.step()
        bar.set_postfix(recon_loss=output.recon_loss.item(), kl=output.kl.item())
    return model.eval()


@torch.no_grad()
def report(model: SequenceVAE, data: GrammarSentences, test: Tensor) -> tuple[str, str]:
    """The figures, and the text."""
    vocabulary, generator = data.vocabulary, torch.Generator().manual_seed(0)
    samples = vocabulary.decode(model.sample(200, generator=generator))
    known = set(data.source.names)
    right = [sentence for sentence in samples if re.fullmatch(pattern(), sentence)]
    new = [sentence for sentence in right if sentence not in known]
    recon, words = model.reconstruct(test), test != model.pad
    bound = model.log_prob_bound(test, 20, generator=generator)
    figures = (
        f"{len(right) / len(samples):.0%} of the samples are sentences of the grammar, {len(new) / len(samples):.0%} new ones\n"
        f"{(recon == test)[words].float().mean():.0%} of the words of test sentences are reconstructed\n"
        f"KL {model(test).kl:.1f} nats, log p(x) >= {bound.mean():.1f} nats, perplexity <= {torch.exp(-bound.sum() / words.sum()):.1f}"
    )
    path = model.interpolate(test[:3], test[3:6], steps=6)
    walks = ["\n".join(vocabulary.decode(walk)) for walk in path]
    pairs = [f"{original}\n  -> {copy}" for original, copy in zip(vocabulary.decode(test[:8]), vocabulary.decode(recon[:8]), strict=True)]
    parts = {"samples from the prior": "\n".join(samples[:12]), "test sentences and reconstructions": "\n".join(pairs)}
    parts["from one test sentence to another"] = "\n\n".join(walks)
    return figures, "\n\n".join(f"{title.upper()}\n\n{text}" for title, text in parts.items()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=25)
    arguments = parser.parse_args()
    data = GrammarSentences(8000, val=0.0)
    model = train(data.samples("train")["x"], len(data.vocabulary), arguments.epochs)
    figures, text = report(model, data, data.samples("test", 500)["x"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sentences.txt").write_text(f"{figures}\n\n{text}")
    print(text)
    print(figures)


if __name__ == "__main__":
    main()
