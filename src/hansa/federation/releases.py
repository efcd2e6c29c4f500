"""What a private node has let out, counted where no undone round takes it back, and its noise.

A round may be undone and done again, but an answer that has left its node stays known to whoever
saw it. So a node of a deployment counts a *release* in a file of its own before it draws anything
for it. A kill later on leaves one counted too many, never one too few.
"""

import fcntl
import hmac
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hansa.errors import InputError
from hansa.federation.accountant import Mechanisms, check_installed, spent
from hansa.federation.privacy import Privacy
from hansa.files import write_atomic
from hansa.seeding import Keystream
from hansa.untrusted import json_of, read_bytes

FILE = "releases.json"


@dataclass(frozen=True)
class Release:
    """One round's permission to let something out, and a source of noise that is for it alone.

    Attributes:
        number: how many there have been at the node, this one included.
        key: 32 bytes that no other release has.
    """

    number: int
    key: bytes

    def stream(self, *purpose: str | int) -> Keystream:
        """Return the random numbers of one purpose."""
        return Keystream(hmac.digest(self.key, json.dumps(purpose).encode(), "sha256"))


class _Entry(BaseModel):
    """Steps of one kind."""

    model_config = ConfigDict(extra="forbid")

    unit: str
    noise: float = Field(ge=0)
    rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1, strict=True)


class _Held(BaseModel):
    """What stands in the file."""

    model_config = ConfigDict(extra="forbid")

    secret: str = Field(pattern="^[0-9a-f]{64}$")
    number: int = Field(0, ge=0, strict=True)
    done: list[_Entry] = []


class Releases:
    """A private node's releases over all runs, in a file that its owner alone can read.

    The file also holds the secret that the node's noise comes from. It is made here, on the node's
    own machine, and nobody else ever has it.

    Args:
        path: the file; it is made where there is none.
        privacy: the node's.

    Raises:
        InputError: the file is damaged, what was released before hid something else, or epsilon
            cannot be computed here.
    """

    def __init__(self, path: Path, privacy: Privacy) -> None:
        self.path, self.privacy = path, privacy
        check_installed()
        with self._locked():
            if not path.exists():
                self._write(_Held(secret=secrets.token_hex(32)))
            units = {entry.unit for entry in self._read().done} - {privacy.unit}
        if units:
            raise InputError(
                "privacy.unit",
                f"{privacy.unit!r}, after releases that hide by {min(units)!r}",
                f"{min(units)!r}, or other data and a new {path}",
            )

    def open(self, more: Mechanisms) -> Release | None:
        """Count one release and return it, or nothing where the budget does not allow for it.

        It is on the disk before this returns.

        Args:
            more: the steps that it is made of.
        """
        noise, rate, steps = more
        with self._locked():
            held = self._read()
            budget = self.privacy.epsilon
            if budget is not None and spent([*_steps(held), more], self.privacy.delta) > budget:
                return None
            same = {"unit": self.privacy.unit, "noise": noise, "rate": rate}
            for entry in held.done:
                if entry.model_dump(exclude={"steps"}) == same:
                    entry.steps += steps
                    break
            else:
                held.done.append(_Entry(**same, steps=steps))
            held.number += 1
            self._write(held)
        # The number never comes twice, and the fresh bytes make up for a file that was copied or
        # brought back from a backup, where it would.
        about = held.number.to_bytes(8, "big") + secrets.token_bytes(32)
        return Release(held.number, hmac.digest(bytes.fromhex(held.secret), about, "sha256"))

    @property
    def number(self) -> int:
        """How many releases there have been."""
        return self._read().number

    @property
    def epsilon(self) -> float:
        """What all of them have spent."""
        return spent(_steps(self._read()), self.privacy.delta)

    def _read(self) -> _Held:
        try:
            values: Mapping[str, Any] = json_of(read_bytes(self.path))
            return _Held.model_validate(values)
        except FileNotFoundError as error:
            raise InputError(str(self.path), "no such file", "the node's releases") from error
        except (ValueError, ValidationError) as error:
            raise InputError(
                str(self.path), "damaged", "it whole: nothing else tells what was released"
            ) from error

    def _write(self, held: _Held) -> None:
        write_atomic(self.path, held.model_dump_json(), is_secret=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time count."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _steps(held: _Held) -> list[Mechanisms]:
    return [(entry.noise, entry.rate, entry.steps) for entry in held.done]
