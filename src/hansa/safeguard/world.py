"""A made-up knowledge world: two tables of invented facts, of which a model should keep one.

Every entity of a table has a value for each relation, drawn at random, so that nothing about one
fact can be told from others. A row is a header that names the table and some facts,

    <begin> <table> (entity relation value <end>) (entity relation value <end>) ...

The retained table is all one part. The entities of the restricted one are split into those that a
defender trains on (adversaries, and held out for the loss after them), those an attacker trains
on, and those that are asked for: nobody trains on them after pre-training, so that a right answer
has been recovered and not been learned anew.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.safeguard.rows import Data, Part, Questions, Rows, Source, client_of
from hansa.seeding import derive, generator

Table = Literal["retained", "restricted"]
_BEGIN, _END, _NEUTRAL = 0, 1, 4
_HEADER: dict[Table, int] = {"retained": 2, "restricted": 3}
_FIRST_RELATION = 5
_DEFENDER = ("adversary", "held_out")
_ROWS = 256
"""Rows that a client holds of each part."""
_FACT = 4
"""Tokens of a fact."""


class WorldOptions(BaseModel):
    """How large the made-up world is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["world"] = "world"
    entities: int = Field(160, ge=8, lt=2**31, strict=True)
    """Entities of each table."""
    relations: int = Field(4, ge=1, strict=True)
    """Facts about each entity."""
    values: int = Field(16, ge=2, strict=True)
    """Values that a relation may have; an answer by chance is right in one of as many cases."""
    facts: int = Field(6, ge=1, strict=True)
    """Facts in a row."""
    shares: tuple[float, float, float] = (0.375, 0.1875, 0.21875)
    """Shares of the restricted entities for adversaries, held out, and the attacker; the rest are
    asked for."""
    clients: int = Field(0, ge=0, strict=True)
    """Clients that the defender's restricted entities are dealt to, each to play the attacker on
    its own in phases with ``clients = true``."""
    seed: int = Field(1234, ge=0, strict=True)
    """What facts and splits are drawn from, whatever the seed of a run."""

    @model_validator(mode="after")
    def _leaves_some(self) -> "WorldOptions":
        if not all(math.isfinite(share) for share in self.shares):
            raise ValueError("shares are numbers")
        cuts = self.cuts()
        if min(b - a for a, b in pairwise(cuts)) < 1:
            raise ValueError("shares must leave an entity for each part, and some to be asked for")
        return self

    def cuts(self) -> list[int]:
        """Return where the parts of the restricted entities begin and end."""
        sums = [sum(self.shares[:k]) for k in range(4)]
        return [*(round(share * self.entities) for share in sums), self.entities]


@dataclass(frozen=True)
class _Facts(Source):
    """Rows of random facts about some entities of a table."""

    world: "World"
    table: Table
    entities: torch.Tensor

    def draw(self, size: int, rng: torch.Generator) -> Rows:
        """Return rows of facts, each drawn on its own."""
        options, shape = self.world.options, (size, self.world.options.facts)
        index = torch.randint(0, len(self.entities), shape, generator=rng)
        relations = torch.randint(0, options.relations, shape, generator=rng)
        return self.world.rows(self.table, self.entities[index], relations)


class World(Data):
    """The world of some options.

    Attributes:
        options: how large it is.
        parts: entities of the restricted table by part; ``evaluation`` are asked for.
    """

    def __init__(self, options: WorldOptions) -> None:
        self.options = options
        self.context = 2 + _FACT * options.facts
        self._first_value = _FIRST_RELATION + 2 * options.relations
        self._first_entity = self._first_value + options.relations * options.values
        self.vocabulary = self._first_entity + 2 * options.entities
        rng = generator(options.seed, "world")
        shape = (options.entities, options.relations)
        self._tables: dict[Table, torch.Tensor] = {
            table: torch.randint(0, options.values, shape, generator=rng) for table in _HEADER
        }
        order, cuts = torch.randperm(options.entities, generator=rng), options.cuts()
        names = ("adversary", "held_out", "attacker", "evaluation")
        self.parts = {
            name: order[start:end] for name, start, end in zip(names, cuts, cuts[1:], strict=False)
        }

    def rows(
        self,
        table: Table,
        entities: torch.Tensor,
        relations: torch.Tensor,
        template: str = "plain",
    ) -> Rows:
        """Return rows [n, T] of facts, whose entities and relations are [n, facts]."""
        options, number = self.options, list(_HEADER).index(table)
        values = self._tables[table][entities, relations]
        facts = torch.stack(
            [
                self._first_entity + number * options.entities + entities,
                _FIRST_RELATION + number * options.relations + relations,
                self._first_value + relations * options.values + values,
                torch.full_like(values, _END),
            ],
            -1,
        ).flatten(1)
        header = torch.tensor([[_BEGIN, _NEUTRAL if template == "neutral" else _HEADER[table]]])
        return Rows.whole(torch.cat([header.expand(len(facts), 2), facts], 1))

    def source(self, part: Part) -> Source:
        """Return where rows of a part come from."""
        if part == "retain":
            return self.known("retained")
        if part == "forget":
            own = torch.cat([self.parts["adversary"], self.parts["held_out"]])
            return _Facts(self, "restricted", own)
        return _Facts(self, "restricted", self.parts[part])

    def known(self, table: Table) -> Source:
        """Return where rows about a whole table come from, for the training before a safeguard."""
        return _Facts(self, table, torch.arange(self.options.entities))

    @property
    def templates(self) -> tuple[str, ...]:
        """The header that names the table, and one that names neither."""
        return ("plain", "neutral")

    def questions(self, template: str = "plain") -> Mapping[str, Questions]:
        """Return questions for every fact of the retained table, and of two restricted parts."""
        if template not in self.templates:
            raise InputError("template", repr(template), ", ".join(self.templates))
        every = torch.arange(self.options.entities)
        return {
            "retained": self._asked("retained", every, template),
            "restricted": self._asked("restricted", self.parts["evaluation"], template),
            "attacker": self._asked("restricted", self.parts["attacker"], template),
        }

    def clients(self) -> Mapping[str, Client]:
        """Return clients that each know some of the defender's restricted entities."""
        found = {}
        for k in range(self.options.clients):
            rng = generator(self.options.seed, "client", k)
            parts = [self.parts[name][k :: self.options.clients] for name in _DEFENDER]
            if min(len(part) for part in parts) == 0:
                allowed = f"at most {min(len(self.parts[name]) for name in _DEFENDER)}"
                raise InputError("data.clients", self.options.clients, allowed)
            rows = [_Facts(self, "restricted", part).draw(_ROWS, rng) for part in parts]
            found[f"client-{k}"] = client_of(rows[0], rows[1])
        return found

    def fresh(self) -> tuple[Source, Questions]:
        """Return new facts about retained entities, as many as an attacker has, and questions."""
        options = self.options.model_copy(update={"seed": derive(self.options.seed, "fresh")})
        other, some = World(options), torch.arange(len(self.parts["attacker"]))
        return _Facts(other, "retained", some), other._asked("retained", some, "plain")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the options, which everything is drawn from."""
        return hashlib.sha256(self.options.model_dump_json().encode()).hexdigest()

    @cached_property
    def _within(self) -> torch.Tensor:
        """Where in a row the relation of each fact stands [facts]."""
        return 2 + 1 + _FACT * torch.arange(self.options.facts)

    def _asked(self, table: Table, entities: torch.Tensor, template: str) -> Questions:
        """Return rows that hold every fact about some entities; the last is filled up."""
        options = self.options
        each = torch.cartesian_prod(entities, torch.arange(options.relations))
        each = each[torch.randperm(len(each), generator=generator(options.seed, "asked", table))]
        num = -(-len(each) // options.facts)
        index = torch.arange(num * options.facts)
        asked, relations = each[index % len(each)].view(num, options.facts, 2).unbind(-1)
        first = self._first_value + relations.unsqueeze(-1) * options.values
        places = self._within.expand(num, -1).clone()
        places[-1, (index >= len(each)).view(num, -1)[-1]] = -1  # asked already
        return Questions(
            self.rows(table, asked, relations, template),
            places,
            first + torch.arange(options.values),
            self._tables[table][asked, relations],
        )
