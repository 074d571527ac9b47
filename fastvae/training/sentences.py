"""Sentences of a small grammar: a text data set that needs no download."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.training.data_module import AutoencoderData
from fastvae.training.errors import DataError
from fastvae.training.sources import InMemory, Source

# Each symbol has its productions, one of which is drawn; what is no symbol is a word. A verb agrees with its subject.
GRAMMAR: dict[str, list[str]] = {
    "SENTENCE": ["ONE ACTION-OF-ONE", "SOME ACTION-OF-SOME", "WHEN ONE ACTION-OF-ONE", "WHEN SOME ACTION-OF-SOME"],
    "WHEN": ["today", "every morning", "at night", "in winter", "sometimes"],
    "ONE": ["the BEING", "a BEING", "the QUALITY BEING", "a QUALITY BEING"],
    "SOME": ["the BEINGS", "many BEINGS", "the QUALITY BEINGS", "two QUALITY BEINGS"],
    "ACTION-OF-ONE": ["MOVES", "MOVES PLACE", "SEES ONE", "SEES SOME", "MOVES MANNER"],
    "ACTION-OF-SOME": ["MOVE", "MOVE PLACE", "SEE ONE", "SEE SOME", "MOVE MANNER"],
    "BEING": ["dog", "cat", "bird", "child", "farmer", "teacher", "horse", "fox"],
    "BEINGS": ["dogs", "cats", "birds", "children", "farmers", "teachers", "horses", "foxes"],
    "QUALITY": ["old", "young", "small", "hungry", "happy", "quiet"],
    "MOVES": ["sleeps", "waits", "runs", "sings", "plays"],
    "MOVE": ["sleep", "wait", "run", "sing", "play"],
    "SEES": ["sees", "follows", "hears", "likes"],
    "SEE": ["see", "follow", "hear", "like"],
    "PLACE": ["near the THING", "behind the THING", "under the THING"],
    "THING": ["house", "tree", "river", "wall", "bridge"],
    "MANNER": ["slowly", "loudly", "alone", "together"],
}
# The special tokens in the order that SequenceVAE has them by default.
SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>")
# The grammar has 1.3 million sentences, of which the short ones are frequent: drawing more different ones than this takes ever longer.
MAX_SENTENCES = 20_000


class Vocabulary:
    """Words and their tokens, the special ones first.

    Args:
        words: all other words, each once.
    """

    def __init__(self, words: Sequence[str]):
        self.words = (*SPECIAL, *words)
        self._tokens = {word: token for token, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: Sequence[str], length: int | None = None) -> Tensor:
        """Tokens ``(count, length)``, int64: the words, the end, padding.

        Args:
            sentences: words with blanks between them; one that is not in the vocabulary becomes the unknown token.
            length: by default that of the longest sentence and its end.

        Raises:
            ValueError: for a sentence that is too long.
        """
        rows = [[self._tokens.get(word, SPECIAL.index("<unknown>")) for word in sentence.split()] for sentence in sentences]
        longest = 1 + max(map(len, rows), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length: got {length}, takes at least {longest} for the longest sentence and its end")
        tokens = torch.full((len(rows), length), SPECIAL.index("<pad>"))
        for row, words in zip(tokens, rows, strict=True):
            row[: len(words) + 1] = torch.tensor([*words, SPECIAL.index("<end>")])
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """The sentences of tokens ``(count, length)``, each up to its end."""
        return [self._sentence(row) for row in tokens.tolist()]

    def _sentence(self, row: list[int]) -> str:
        end = SPECIAL.index("<end>")
        return " ".join(self.words[token] for token in (row[: row.index(end)] if end in row else row))


def words_of_grammar() -> list[str]:
    """All words of the grammar, in alphabetical order."""
    parts = {part for productions in GRAMMAR.values() for production in productions for part in production.split()}
    return sorted(parts - GRAMMAR.keys())


def draw_sentence(draws: random.Random, symbol: str = "SENTENCE") -> str:
    """A sentence, or what a symbol becomes."""
    parts = draws.choice(GRAMMAR[symbol]).split()
    return " ".join(draw_sentence(draws, part) if part in GRAMMAR else part for part in parts)


class GrammarSentences(AutoencoderData):
    """Different sentences of a small English grammar, such as "today the old dog follows two quiet cats". Needs no download.

    ``x`` are tokens ``(length,)``, int64, padded at the end. ``vocabulary`` turns tokens into words and back.

    Args:
        count: sentences; ``seed`` decides which.
        options: of :class:`AutoencoderData`.
    """

    vocabulary = Vocabulary(words_of_grammar())

    def __init__(self, count: int = 5000, **options):
        super().__init__(**options)
        if not 1 <= count <= MAX_SENTENCES:
            raise DataError(f"count: got {count}, takes an integer from 1 to {MAX_SENTENCES}")
        self.count = count

    def load(self) -> tuple[Source, Source | None]:
        draws = random.Random(self.seed)
        sentences: dict[str, None] = {}
        while len(sentences) < self.count:
            sentences[draw_sentence(draws)] = None
        return InMemory(self.vocabulary.encode(list(sentences)), names=list(sentences)), None
