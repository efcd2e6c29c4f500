"""Safeguards of a real model: retained and restricted text, questions, and pairs of answers."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.data.answers import AnswerOptions
from hansa.data.clients import Client
from hansa.data.text_sources import Query, read
from hansa.errors import InputError
from hansa.safeguard.facts import Encode, Examples, asked_for_facts, examples_of, facts_of
from hansa.safeguard.rows import (
    Data,
    Part,
    Pool,
    Preferences,
    Questions,
    Rows,
    Source,
    check_disjoint,
    client_of,
)
from hansa.seeding import generator
from hansa.untrusted import MOST_BYTES, json_of, read_text

Sources = str | Annotated[tuple[str, ...], Field(min_length=1)]
_LETTERS = "ABCDEFGHIJ"
_CLOZE = 8
"""Places of a row that are asked for."""


class TextsOptions(BaseModel):
    """Where texts come from.

    A source is ``file:PATH``, ``folder:PATH``, ``parquet:PATH``, ``python:KIND`` or ``hub:NAME``;
    with ``answers`` one of questions and answers, as ``nodes.NAME.text`` names them, or a list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["texts"]
    retain: Sources
    """Text that the model should keep."""
    restricted: Sources
    """Text that it should not."""
    attacker: Sources | None = None
    """Restricted text that an attacker has; by default a share of ``restricted``."""
    answers: AnswerOptions | None = None
    """What stands around questions and answers, where the sources hold those. Then a row is one
    of them, and the facts that they state are asked for."""
    clients: dict[str, Sources] = Field(default_factory=dict)
    """Restricted text of clients who play the attacker, each on its own, in phases with
    ``clients = true``. A fifth of each is held out for the loss."""
    shares: tuple[float, float, float] = (0.45, 0.15, 0.2)
    """Shares of ``restricted`` for adversaries, held out, and the attacker; the rest is asked
    for. Parts are contiguous."""
    context: int = Field(256, ge=8, strict=True)
    """Tokens of a row."""
    most_kb: int | None = Field(1000, ge=1, strict=True)
    """Most text read from a source, in thousands of bytes."""
    column: str | None = None
    """Text column of Parquet files and hub data sets."""
    retained_questions: str | None = None
    """A jsonl file with ``question``, ``choices`` and ``answer`` (the number of the choice, from
    0). By default held-out text is asked for its next tokens, each among four."""
    restricted_questions: str | None = None
    """The same about what is restricted."""
    pairs: str | None = None
    """A jsonl file with ``prompt``, ``chosen`` and ``rejected``, to train refusals by."""

    @model_validator(mode="after")
    def _leaves_some(self) -> "TextsOptions":
        if min(self.shares) <= 0 or sum(self.shares) >= 1:
            raise ValueError("shares must be above 0, and leave some to be asked for")
        if self.answers is not None and self.answers.corruption is not None:
            raise ValueError("answers without corruption, which is for training")
        several = [self.retain, self.restricted, self.attacker, *self.clients.values()]
        if self.answers is None and any(isinstance(each, tuple) for each in several):
            raise ValueError("one source of text each; lists are for questions and answers")
        return self


class Texts(Data):
    """The data of some options, in a model's tokens.

    Args:
        options: where texts come from.
        encode: text to token numbers.
        vocabulary: number of tokens.

    Raises:
        InputError: text that cannot be read or is too short, and parts that share text.
    """

    def __init__(self, options: TextsOptions, encode: Encode, vocabulary: int) -> None:
        self.options, self.vocabulary, self.context = options, vocabulary, options.context
        self._encode = encode
        retained = self._read("retain")
        restricted = self._read("restricted")
        cut = max(1, round(len(retained) * 0.9))
        parts = {"retain": retained[slice(cut)], "retained": retained[slice(cut, None)]}
        sums = [sum(options.shares[:k]) for k in range(4)]
        cuts = [*(round(share * len(restricted)) for share in sums), len(restricted)]
        names = ("adversary", "held_out", "attacker", "restricted")
        for name, start, end in zip(names, cuts, cuts[1:], strict=False):
            parts[name] = restricted[slice(start, end)]
        if options.attacker is not None:
            parts["attacker"] = self._read("attacker")
        self._examples = {name: e for name, e in parts.items() if isinstance(e, Examples)}
        self._parts = {name: _rows_of(part) for name, part in parts.items()}
        for name, rows in self._parts.items():
            if not len(rows):
                found = f"text without one row of {options.context} tokens for {name}"
                raise InputError("data", found, "longer texts, or a smaller context")
        check_disjoint(self._parts)
        self._clients = {
            name: _rows_of(self._held_by(source, f"data.clients.{name}"))
            for name, source in options.clients.items()
        }
        for name, rows in self._clients.items():
            for part in ("attacker", "restricted"):
                check_disjoint({f"client {name}": rows, part: self._parts[part]})
        self._pairs = None if options.pairs is None else self._read_pairs(options.pairs)

    def source(self, part: Part) -> Source:
        """Return where rows of a part come from."""
        return Pool(self._forget if part == "forget" else self._parts[part])

    @cached_property
    def _forget(self) -> Rows:
        """All that the defender has of what is restricted, put together once and not per batch."""
        return self._parts["adversary"].joined(self._parts["held_out"])

    @property
    def templates(self) -> tuple[str, ...]:
        """A prompt that says what it is, and one that does not; of text there is only one."""
        return ("plain", "bare") if self._files else ("plain",)

    def questions(self, template: str = "plain") -> Mapping[str, Questions]:
        """Return questions of the files, or about text that is held out."""
        if template not in self.templates:
            raise InputError("template", repr(template), ", ".join(self.templates))
        found = {}
        for topic in ("retained", "restricted"):
            path = self._files.get(topic)
            found[topic] = (
                self._about(topic)
                if path is None
                else self._asked(path, f"data.{topic}_questions", template)
            )
        found["attacker"] = self._about("attacker")
        return found

    def _about(self, name: str) -> Questions:
        """Return questions for what a part states."""
        answers = self.options.answers
        if answers is None:
            return self._cloze(self._parts[name], name)
        every = [one for part in self._examples.values() for one in part.held]
        key = {"retained": "data.retain"}.get(name, f"data.{name}")
        return asked_for_facts(self._examples[name], facts_of(every), answers, self._encode, key)

    def preferences(self, part: Part) -> Preferences:
        """Return pairs of answers; of all but two fifths for the defender, by part."""
        if self._pairs is None:
            return super().preferences(part)
        num = len(self._pairs.chosen)
        first, second, third = (round(share * num) for share in (0.45, 0.6, 0.8))
        place = {
            "adversary": slice(first),
            "held_out": slice(first, second),
            "forget": slice(second),
            "attacker": slice(second, third),
        }.get(part)
        if place is None:
            return super().preferences(part)
        return Preferences(self._pairs.chosen[place], self._pairs.rejected[place])

    def clients(self) -> Mapping[str, Client]:
        """Return the clients that play the attacker."""
        found = {}
        for name, rows in self._clients.items():
            cut = round(0.8 * len(rows))
            if not 0 < cut < len(rows):
                raise InputError(f"data.clients.{name}", f"{len(rows)} rows", "two or more")
            found[name] = client_of(rows[slice(cut)], rows[slice(cut, None)])
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 of all rows."""
        # Not where they lie: what is read from there is hashed itself.
        unread = {"retain", "restricted", "attacker"} if self.options.answers else set[str]()
        digest = hashlib.sha256(self.options.model_dump_json(exclude=unread).encode())
        for rows in self._held():
            digest.update(rows.tokens.numpy().tobytes())
        return digest.hexdigest()

    def _held(self) -> Iterator[Rows]:
        """Yield all that is trained on or asked for, files included."""
        yield from self._parts.values()
        yield from self._clients.values()
        if self._pairs is not None:
            yield from (self._pairs.chosen, self._pairs.rejected)
        for questions in self.questions().values():
            answers = questions.answers.flatten().unsqueeze(1)
            yield from (questions.rows, Rows.whole(answers))

    @property
    def _files(self) -> dict[str, str]:
        given = {
            "retained": self.options.retained_questions,
            "restricted": self.options.restricted_questions,
        }
        return {topic: path for topic, path in given.items() if path is not None}

    def _read(self, name: str) -> Rows | Examples:
        return self._held_by(getattr(self.options, name), f"data.{name}")

    def _held_by(self, source: Sources, key: str) -> Rows | Examples:
        options = self.options
        if options.answers is not None:
            sources = [source] if isinstance(source, str) else source
            made = examples_of(sources, key, options.answers, self._encode, options.context)
            self._check(made.rows.tokens.flatten(), key)
            return made
        assert isinstance(source, str)  # noqa: S101 the options have looked
        most = None if options.most_kb is None else 1000 * options.most_kb
        text = read(source, Query(key, most, options.column))
        tokens = torch.tensor(self._encode(text), dtype=torch.int64)
        self._check(tokens, key)
        num = len(tokens) // options.context
        return Rows.whole(tokens[: num * options.context].view(num, options.context))

    def _check(self, tokens: torch.Tensor, key: str) -> None:
        if len(tokens) and int(tokens.max()) >= self.vocabulary:
            found = f"token {int(tokens.max())} for a model of {self.vocabulary}"
            raise InputError(key, found, "the model's own tokenizer")

    def _cloze(self, rows: Rows, topic: str) -> Questions:
        """Return questions for the token at some places of each row, among three others.

        The others come from the same text, so that rare tokens do not give an answer away.
        """
        rng = generator(0, "cloze", topic)
        shape = (len(rows), min(_CLOZE, self.context - 1))
        places = torch.stack(
            [torch.randperm(self.context - 1, generator=rng)[: shape[1]] for _ in range(len(rows))]
        )
        right = rows.tokens.gather(1, places + 1)
        pool = rows.tokens.flatten()
        others = pool[torch.randint(0, len(pool), (*shape, 3), generator=rng)]
        others = torch.where(others == right.unsqueeze(-1), -1, others)
        candidates = torch.cat([right.unsqueeze(-1), others], -1)
        answers = torch.randint(0, 4, places.shape, generator=rng)
        # The right one changes places with the first, so that no place gives it away.
        index = torch.arange(4).expand(candidates.shape).clone()
        index[..., 0] = answers
        index.scatter_(-1, answers.unsqueeze(-1), 0)
        return Questions(rows, places, candidates.gather(-1, index), answers)

    def _asked(self, path: str, key: str, template: str) -> Questions:
        texts, answers, widths = [], [], []
        for record in _records(path, ("question", "choices", "answer"), key):
            choices, answer = record["choices"], record["answer"]
            if not (isinstance(choices, list) and 2 <= len(choices) <= len(_LETTERS)):
                raise InputError(key, f"choices {choices!r}", "a list of 2 to 10")
            if not (isinstance(answer, int) and 0 <= answer < len(choices)):
                raise InputError(key, f"answer {answer!r}", f"0 to {len(choices) - 1}")
            lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices)]  # noqa: B905
            head, tail = ("Question: ", "Answer:") if template == "plain" else ("", "")
            texts.append("\n".join([head + str(record["question"]), *lines, tail]))
            answers.append(answer)
            widths.append(len(choices))
        tokens = [self._encode(text) for text in texts]
        longest = max(len(text) for text in tokens)
        if longest > self.context:
            raise InputError(key, f"a question of {longest} tokens", f"{self.context} at most")
        letters = torch.tensor([self._encode(f" {letter}")[-1] for letter in _LETTERS])
        most = max(widths)
        candidates = letters[:most].expand(len(texts), 1, most).clone()
        for row, width in enumerate(widths):
            candidates[row, :, width:] = -1
        rows = Rows.padded(((text, len(text)) for text in tokens), longest)
        self._check(rows.tokens.flatten(), key)
        places = torch.tensor([[len(text) - 1] for text in tokens])
        return Questions(rows, places, candidates, torch.tensor(answers).unsqueeze(1))

    def _read_pairs(self, path: str) -> Preferences:
        sides: dict[str, list[tuple[list[int], int]]] = {"chosen": [], "rejected": []}
        for record in _records(path, ("prompt", "chosen", "rejected"), "data.pairs"):
            prompt = self._encode(str(record["prompt"]))
            for side, held in sides.items():
                held.append((prompt + self._encode(str(record[side])), len(prompt)))
        if len(sides["chosen"]) < 10:
            raise InputError("data.pairs", f"{len(sides['chosen'])} pairs", "10 or more")
        if len({tuple(text) for text, _ in sides["rejected"]}) < len(sides["rejected"]):
            allowed = "each once, since some are the attacker's"
            raise InputError("data.pairs", "a pair that stands there twice", allowed)
        rows = {side: Rows.padded(held, self.context) for side, held in sides.items()}
        if any((each.counted.sum(1) == 0).any() for each in rows.values()):
            found = f"a prompt that leaves no room for an answer in {self.context} tokens"
            raise InputError("data.pairs", found, "a larger data.context")
        return Preferences(**rows)


def _records(path: str, fields: tuple[str, ...], key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a jsonl file that has some.

    Raises:
        InputError: no such file, a line that is no object, or one without a field.
    """
    try:
        lines = read_text(Path(path), MOST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(key, f"{path} that cannot be read ({error})", "a jsonl file") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json_of(line)
        except ValueError as error:
            raise InputError(key, f"line {number} of {path}, no JSON", "jsonl") from error
        if not isinstance(record, dict) or not set(fields) <= set(record):
            raise InputError(key, f"line {number} of {path}", f"fields {', '.join(fields)}")
        count += 1
        yield record
    if not count:
        raise InputError(key, f"{path} without a line", "one or more")


def _rows_of(part: Rows | Examples) -> Rows:
    return part.rows if isinstance(part, Examples) else part
