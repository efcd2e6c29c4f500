"""One organisation's folder: what it runs, with which keys, and how it does."""

import json
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.untrusted import json_of, read_text, toml_of

FILE = "party.toml"
PARTS = ("party", "superlink", "run", "supernode", "worker")
"""What is told of in a party's ``status/``."""
LOCK = ".lock"
"""File that whoever runs a party holds a lock on; it holds that process's number."""
HOLD = ".hold"
"""While a file of this name is there, a party's SuperNode is not started."""
VARIABLE = "HANSA_PARTY"
"""Environment variable that tells Flower's processes which party they work for."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Server(_Section):
    """The federation that a party runs: its own SuperLink."""

    host: str
    """Name or address by which members reach it."""
    port: int = Field(ge=1, le=65535)
    """Port that members call; what stands there lets nobody else in."""
    inner_port: int = Field(ge=1, le=65535)
    """Port of the SuperLink itself, on the loopback."""
    deadline: float
    """Seconds after which an answer of a member is late."""
    wait: float
    """Seconds that members have to connect before the first round."""
    bind: str = "127.0.0.1"
    """Address to listen on: 0.0.0.0 for all of the machine's."""


class Upward(_Section):
    """The federation that a party is a member of: its SuperNode."""

    superlink: str = Field(pattern=r"^[^:\s]+:\d{1,5}$")
    """``host:port`` of the federation."""
    patience: float
    """Seconds that a federation below has for its answer; more than its own deadline, and less
    than that of the federation above."""
    runtime_port: int = Field(9094, ge=1, le=65535)
    """Port on this machine through which the SuperNode's own processes talk to it."""
    look: float = Field(3.0, ge=0.1, le=60)
    """Seconds between two looks of an idle SuperNode for what is asked of it."""


class Party(_Section):
    """What stands in a party's ``party.toml``."""

    path: str
    """Its place in the tree."""
    server: Server | None = None
    upward: Upward | None = None
    data: dict[str, Any] | None = None
    """A client's own data, as in ``[data]``; its share of the run's data where there is none."""
    text: str | None = None
    """Source of the party's own text, where a language model is trained."""
    rules: dict[str, Any] | None = None
    """What holds at this node and nowhere else, as in ``[nodes.NAME]``."""

    def write(self, folder: Path) -> None:
        """Write it into a party's folder."""
        (folder / FILE).write_text(tomli_w.dumps(self.model_dump(exclude_none=True)))

    @classmethod
    def read(cls, folder: Path) -> "Party":
        """Read it from a party's folder.

        Raises:
            InputError: no such file, or something in it is wrong.
        """
        path = folder / FILE
        try:
            values = toml_of(read_text(path))
            return cls.model_validate(values)
        except FileNotFoundError as error:
            raise InputError(str(path), "no such file", "the folder of a party") from error
        except ValidationError as error:
            from hansa.config import explain  # PyTorch's seconds are for errors only

            raise explain(error, cls, values) from error
        except (ValueError, OSError) as error:
            raise InputError(str(path), f"unreadable ({error})", "TOML") from error


def tell(folder: Path, part: str, **facts: Any) -> None:
    """Leave word of how a part of the party does, for ``status`` and the party's own process."""
    place = folder / "status"
    place.mkdir(exist_ok=True)
    write_atomic(place / f"{part}.json", json.dumps(facts))


def told(folder: Path, part: str) -> dict[str, Any]:
    """Return what was told last, nothing where nothing was."""
    try:
        facts = json_of(read_text(folder / "status" / f"{part}.json"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
