"""Questions and their answers: how they are read from files or a hub, and written back."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

from hansa.data.sources import parquet_files
from hansa.data.text_sources import hub_table
from hansa.errors import InputError, first_line
from hansa.files import write_atomic
from hansa.parquet import opened, pieces

STATS = "__dj__stats__"
Name = Annotated[str, StringConstraints(min_length=1, strict=True)]
Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        id: unique within its source; by default its number there, from 0.
        question: may be empty.
        answer: may be empty.
        domain: declared by whoever holds it.
        fact: a span of the answer that states what is claimed, where known.
        kind: "" for unknown, "clean" or the kind of corruption, where labelled.
        extra: every other field of the record as it was read.
    """

    id: str
    question: str
    answer: str
    domain: str = ""
    fact: str = ""
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Fields(BaseModel):
    """What the fields of a record are called. All but question and answer may be missing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Name = "question"
    answer: Name = "answer"
    domain: Name = "domain"
    id: Name = "id"
    fact: Name = "fact"
    kind: Name = "kind"
    hub_split: Name = "train"
    """Split of a hub data set."""

    @model_validator(mode="after")
    def _are_distinct(self) -> "Fields":
        names = list(self.names().values())
        if len(set(names)) < len(names):
            raise ValueError("two fields of one name")
        return self

    def names(self) -> dict[str, str]:
        """Return the name in a record of each attribute of an example."""
        return {key: name for key, name in self.model_dump().items() if key != "hub_split"}


USUAL = Fields()


def read_examples(source: str, key: str, fields: Fields = USUAL) -> list[Example]:
    """Read the examples of a source. Those with an empty answer are kept.

    Args:
        source: ``jsonl:PATH`` or ``parquet:PATH`` (a file, a folder or a pattern), ``hub:NAME``,
            ``made:DOMAIN?num=250&seed=0&style=private`` (`made_examples.make`) or
            ``sentences:PATH?num=250&seed=0&domain=NAME`` (`made_examples.sentences`).
        key: configuration key of the source, for errors.
        fields: what the fields of a record are called.

    Raises:
        InputError: unknown kind, a file or column that is missing, a line that is no JSON object
            in UTF-8, a field that is no string, ids that repeat, no record at all.
    """
    from hansa.data.made_examples import read_made, read_sentences  # they build on this module

    kind, _, rest = source.partition(":")
    made = {"made": read_made, "sentences": read_sentences}
    if kind in made and rest:
        return made[kind](rest, key)
    if kind not in _RECORDS or not rest:
        raise InputError(
            key,
            repr(source),
            "'jsonl:PATH', 'parquet:PATH', 'hub:NAME', 'made:DOMAIN' or 'sentences:PATH'",
        )
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, record in _RECORDS[kind](rest, key, fields):
        example = _example(record, str(len(examples)), place, key, fields)
        if example.id in places:
            found = f"the id {example.id!r} both in {places[example.id]} and in {place}"
            raise InputError(key, found, "ids that do not repeat")
        places[example.id] = place
        examples.append(example)
    if not examples:
        raise InputError(key, f"no record in {source!r}", "a source with records in it")
    return examples


def write_jsonl(
    path: Path,
    examples: Sequence[Example],
    stats: Mapping[str, Mapping[str, float]] | None,
    fields: Fields = USUAL,
) -> None:
    """Write examples as one JSON object a line, which `read_examples` reads back.

    Domain, fact and kind stand in every line or, where no example has one, in none. What JSON has
    no form for becomes null (numbers that are not finite) or a string (dates and such).

    Args:
        path: the file; it appears whole or not at all.
        examples: with ids that do not repeat.
        stats: values by id and name; they join the field ``__dj__stats__`` of a record, where
            Data-Juicer keeps its own.
        fields: what the fields of a record shall be called.

    Raises:
        InputError: ids that repeat, lone surrogates, another field of the same name.
    """
    if len({example.id for example in examples}) < len(examples):
        raise InputError(str(path), "ids that repeat", "examples with ids of their own")
    optional = {"domain", "fact", "kind"}
    empty = {key for key in optional if not any(getattr(one, key) for one in examples)}
    names = {key: name for key, name in fields.names().items() if key not in empty}
    lines = []
    for example in examples:
        record: Record = {name: getattr(example, key) for key, name in names.items()}
        twice = sorted(record.keys() & example.extra.keys())
        if twice:
            found = f"another field {twice[0]!r} of the example {example.id}"
            raise InputError(str(path), found, "fields with names of their own")
        record |= example.extra
        if stats is not None and example.id in stats:
            before = record.get(STATS)
            record[STATS] = {**(before if isinstance(before, dict) else {}), **stats[example.id]}
        try:
            lines.append(_line(record))
        except (UnicodeEncodeError, RecursionError) as error:
            found = f"the example {example.id}, {_reason(error)}"
            raise InputError(str(path), found, "text that UTF-8 can hold, nested less") from error
    write_atomic(Path(path), b"".join(lines))


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _example(record: Record, number: str, place: str, key: str, fields: Fields) -> Example:
    held = {}
    extra = dict(record)
    for attribute, name in fields.names().items():
        is_needed = attribute in ("question", "answer")
        if is_needed and name not in record:
            found = f"no field {name!r} in {place}"
            raise InputError(key, found, f"one of {', '.join(record) or 'nothing'}")
        value = extra.pop(name, None)
        if value is None and not is_needed:
            continue
        if attribute == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            found = f"{type(value).__name__} as {name!r} in {place}"
            raise InputError(key, found, f"a string, or another name for fields.{attribute}")
        held[attribute] = value
    return Example(**{"id": number, **held}, extra=extra)


def _jsonl(path: str, key: str, fields: Fields) -> Iterator[tuple[str, Record]]:
    for file in _jsonl_files(path, key):
        try:
            with file.open("rb") as stream:
                # Only a line feed ends a line; strings may hold other ends of lines.
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        place = f"line {number} of {file}"
                        yield place, _object(line, place, key)
        except OSError as error:
            raise InputError(key, f"{file} that cannot be read ({error})", "a file") from error


def _jsonl_files(path: str, key: str) -> list[Path]:
    place = Path(path)
    try:
        if place.is_dir():
            files = sorted(place.rglob("*.jsonl"))
        else:
            files = [place] if place.is_file() else sorted(place.parent.glob(place.name))
    except ValueError:  # no pattern
        files = []
    files = [file for file in files if file.is_file()]
    if not files:
        raise InputError(key, f"no JSON lines at {path}", "a file, folder or pattern")
    return files


def _object(line: bytes, place: str, key: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # without the mark that Windows puts
        if rb"\u" in line:  # an escape can spell half a character
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(key, f"{place}, {_reason(error)}", "a JSON object in UTF-8") from error
    if not isinstance(record, dict):
        raise InputError(key, f"{type(record).__name__} as {place}", "a JSON object")
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "which holds a lone surrogate"
    if isinstance(error, RecursionError):
        return "which is nested too deep"
    return f"which is no JSON ({first_line(error)})"


def _parquet(path: str, key: str, fields: Fields) -> Iterator[tuple[str, Record]]:
    for file in parquet_files(path, key):
        with opened(file, key) as held:
            yield from _rows(held.file.schema_arrow, pieces(held), str(file), key, fields)


def _hub(name: str, key: str, fields: Fields) -> Iterator[tuple[str, Record]]:
    loaded = hub_table(name, fields.hub_split, key)
    batches = loaded.with_format("arrow").iter(1024)
    yield from _rows(loaded.features.arrow_schema, batches, f"hub:{name}", key, fields)


def _rows(
    schema: pa.Schema, batches: Any, place: str, key: str, fields: Fields
) -> Iterator[tuple[str, Record]]:
    for name in (fields.question, fields.answer):
        if name not in schema.names:
            raise InputError(
                key, f"no column {name!r} in {place}", f"one of {', '.join(schema.names)}"
            )
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except (ValueError, OverflowError) as error:  # no UTF-8; a date that Python has not
            found = f"a batch of {place} that cannot be read ({first_line(error)})"
            raise InputError(key, found, "text, numbers and dates") from error
        for record in records:
            number += 1
            yield f"row {number} of {place}", record


_RECORDS: dict[str, Callable[[str, str, Fields], Iterator[tuple[str, Record]]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hub": _hub,
}
