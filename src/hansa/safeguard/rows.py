"""What safeguards train on and are measured by: rows of tokens, sources of them, and questions."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from hansa.data.clients import IGNORED, Client
from hansa.errors import InputError

Part = Literal["retain", "forget", "adversary", "held_out", "attacker"]
"""Which data: what the model should keep; what it should not (the defender's part of it, all of
it, or split between the adversaries of its training and the loss that is taken after them); and
what an attacker trains on, which no defender has seen."""


@dataclass(frozen=True)
class Rows:
    """A batch of texts.

    Attributes:
        tokens: token numbers [n, T], int64; anything at places that are masked.
        mask: True where a token is part of a text [n, T], padding stands at the end.
        counted: True where a token counts as a label of the token before it [n, T].
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def whole(cls, tokens: torch.Tensor) -> "Rows":
        """Return rows without padding, of which every token counts."""
        every = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, every, every)

    @classmethod
    def padded(cls, texts: Iterable[tuple[list[int], int]], width: int) -> "Rows":
        """Return rows of texts of several lengths.

        Args:
            texts: token numbers of each, and how many of them, at its head, count as no label.
            width: T; a longer text is cut.
        """
        held = list(texts)
        tokens = torch.zeros(len(held), width, dtype=torch.int64)
        mask, counted = (torch.zeros(len(held), width, dtype=torch.bool) for _ in range(2))
        for row, (text, skipped) in enumerate(held):
            num = min(len(text), width)
            tokens[row, :num] = torch.tensor(text[:num])
            mask[row, :num] = True
            counted[row, skipped:num] = True
        return cls(tokens, mask, counted)

    @property
    def labels(self) -> torch.Tensor:
        """The next token at each place but the last [n, T - 1], ``IGNORED`` where none counts."""
        wanted = (self.counted & self.mask)[:, 1:]
        return torch.where(wanted, self.tokens[:, 1:], IGNORED)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: torch.Tensor | slice) -> "Rows":
        return Rows(self.tokens[index], self.mask[index], self.counted[index])

    def joined(self, other: "Rows") -> "Rows":
        """Return the rows of both, of one width."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Rows(*(torch.cat(pair) for pair in pairs))

    def to(self, device: str | torch.device) -> "Rows":
        """Return the rows on another device."""
        return Rows(*(field.to(device) for field in self._fields()))

    def digests(self) -> set[bytes]:
        """Return a digest of each text, to see whether two sets share any."""
        return {
            hashlib.sha256(row[keep].numpy().tobytes()).digest()
            for row, keep in zip(self.tokens, self.mask, strict=True)
        }

    def _fields(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.tokens, self.mask, self.counted


class Source(ABC):
    """Where batches come from."""

    @abstractmethod
    def draw(self, size: int, rng: torch.Generator) -> Rows:
        """Return ``size`` rows; the same generator gives the same."""


@dataclass(frozen=True)
class Pool(Source):
    """Rows that are there, drawn with replacement."""

    rows: Rows

    def draw(self, size: int, rng: torch.Generator) -> Rows:
        """Return ``size`` of the rows."""
        return self.rows[torch.randint(0, len(self.rows), (size,), generator=rng)]


@dataclass(frozen=True)
class Preferences:
    """Questions with an answer that is wanted and one that is not, row by row.

    Attributes:
        chosen: questions with the wanted answers, of which the answers count.
        rejected: the same questions with the others.
    """

    chosen: Rows
    rejected: Rows

    def draw(self, size: int, rng: torch.Generator) -> "Preferences":
        """Return ``size`` of the pairs."""
        index = torch.randint(0, len(self.chosen), (size,), generator=rng)
        return Preferences(self.chosen[index], self.rejected[index])


@dataclass(frozen=True)
class Questions:
    """What a model is asked, each answer one token among candidates.

    Attributes:
        rows: the texts that questions stand in [n, T].
        places: where in its row the token before each answer stands [n, q], -1 for none.
        candidates: the tokens that an answer is chosen from [n, q, c], -1 where there are fewer.
        answers: which candidate is right [n, q].
    """

    rows: Rows
    places: torch.Tensor
    candidates: torch.Tensor
    answers: torch.Tensor

    def __getitem__(self, index: slice) -> "Questions":
        return Questions(
            self.rows[index], self.places[index], self.candidates[index], self.answers[index]
        )


class Data(ABC):
    """All that a safeguard is trained on and measured by.

    Attributes:
        vocabulary: number of tokens.
        context: most tokens of a row.
    """

    vocabulary: int
    context: int

    @abstractmethod
    def source(self, part: Part) -> Source:
        """Return where batches of a part come from.

        Raises:
            InputError: there is no such data.
        """

    @abstractmethod
    def questions(self, template: str = "plain") -> Mapping[str, Questions]:
        """Return the questions of each topic.

        They are ``retained``, ``restricted``, and ``attacker``: what the attacker trains on.

        Args:
            template: the prompt that they stand in, one of ``templates``.
        """

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts that questions can stand in."""
        return ("plain",)

    def preferences(self, part: Part) -> Preferences:
        """Return pairs of answers, to train refusals by.

        Raises:
            InputError: there are none.
        """
        raise InputError("data", "no pairs of answers", "data.pairs, to train refusals by")

    def clients(self) -> Mapping[str, Client]:
        """Return what clients hold who contribute adversaries; there are none by default."""
        return {}

    def fresh(self) -> "tuple[Source, Questions] | None":
        """Return a harmless task that no model has seen, with its questions, where one can be made.

        A model that is of use can still be fine-tuned to it.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the SHA-256 of all of it, as hex."""


def client_of(train: Rows, held_out: Rows) -> Client:
    """Return a client that trains on some whole rows and holds out others."""
    pairs = [(rows.tokens[:, :-1], rows.tokens[:, 1:]) for rows in (train, held_out)]
    nothing = (pairs[0][0][:0], pairs[0][1][:0])
    return Client.of(pairs[0], nothing, pairs[1])


def check_disjoint(parts: Mapping[str, Rows]) -> None:
    """Refuse parts of which two share a text.

    An evaluation that shares facts with an attacker measures what was learned anew, which no
    safeguard can stop.

    Raises:
        InputError: naming two parts, and how many texts they share.
    """
    digests = {name: rows.digests() for name, rows in parts.items()}
    names = list(digests)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            if shared := digests[first] & digests[second]:
                found = f"{len(shared)} texts that {first} and {second} share"
                raise InputError("data", found, "parts that share none")
