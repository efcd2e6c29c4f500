"""Where the states of nodes live between rounds: in memory, or on disk with a bounded cache.

A key names a state: a node's path for its own state, ``PARENT@CHILD`` for what a parent remembers
of a child. What a round puts becomes permanent when the round is committed; on disk a kill before
that leaves the states of the last committed round.
"""

import os
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from hansa.errors import InputError
from hansa.federation.message import MessageError, State
from hansa.federation.wire import decode, encode
from hansa.files import sync_folder

_VERSION = f"{'[0-9]' * 8}.msg"


def link_key(parent: str, child: str) -> str:
    """Return the key of what a parent remembers of a child."""
    return f"{parent}@{child}"


class Store(Protocol):
    """States by key; an empty state stands for one that was never put."""

    def get(self, key: str) -> State:
        """Return the newest state of a key."""
        ...

    def put(self, key: str, state: State) -> None:
        """Set the state of a key; an empty state removes it."""
        ...

    def commit(self, round_: int) -> None:
        """Make what was put since the last commit part of this round."""
        ...


def owned(state: State) -> State:
    """Return a state that holds no part of larger tensors, which it would keep in memory.

    What was trained in a stack are views of the stack.
    """
    groups = {
        group: {
            name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
            for name, t in tensors.items()
        }
        for group, tensors in state.groups.items()
    }
    return State(groups, state.scalars, state.metrics)


class MemoryStore:
    """States in memory."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def get(self, key: str) -> State:
        """Return the newest state of a key."""
        return self._states.get(key, State())

    def put(self, key: str, state: State) -> None:
        """Set the state of a key."""
        self._states[key] = owned(state)

    def commit(self, round_: int) -> None:
        """Do nothing: memory does not outlive its process."""


class DiskStore:
    """States as files ``FOLDER/KEY/ROUND.msg``, the newest ones also in a bounded cache.

    A state belongs to the round that will be committed next. The version in force is the newest
    file whose round is not above the last committed one; ``recover`` removes the others.
    """

    def __init__(
        self,
        folder: Path,
        committed: int = 0,
        cache_bytes: int = 1 << 30,
        writes: int | None = None,
        reads_only: bool = False,
    ) -> None:
        """Open the states as of a round.

        Args:
            folder: where they lie.
            committed: the last round that counts; what lies there of later ones is removed.
            cache_bytes: memory for states, as encoded.
            writes: the round that is written to, by default the next one.
            reads_only: leave later rounds where they are, and do not look at them.
        """
        self._folder = folder
        self._round = committed + 1 if writes is None else writes
        self._limit = cache_bytes
        self._cache: OrderedDict[str, State] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._held = 0
        self._written: dict[str, Path] = {}
        self._replaced: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._upto = committed if reads_only else None
        self._places = set() if reads_only else self._recover(committed)

    def get(self, key: str) -> State:
        """Return the newest state of a key.

        Raises:
            InputError: the file is damaged.
        """
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        versions = self._versions(key)
        if not versions:
            return State()
        data = versions[-1].read_bytes()
        try:
            state = decode(data)
        except MessageError as error:
            raise InputError(str(versions[-1]), f"a damaged state ({error})", "it whole") from error
        self._keep(key, state, len(data))
        return state

    @property
    def num_states(self) -> int:
        """The number of keys that have a state."""
        return len(self._places)

    def put(self, key: str, state: State) -> None:
        """Write a state for the round under way."""
        path = self._place(key) / f"{self._round:08d}.msg"
        self._places.add(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encode(state)
        path.write_bytes(data)
        self._written[key] = path
        self._keep(key, owned(state), len(data))

    def commit(self, round_: int) -> None:
        """Bring everything written since the last commit to the disk.

        The caller then records the round; after that ``prune`` may remove older versions.
        """
        for path in self._written.values():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(path.parent)
        sync_folder(self._folder)
        self._replaced |= self._written.keys()
        self._written.clear()
        self._round = round_ + 1

    def prune(self) -> None:
        """Remove versions that the last commit has replaced."""
        for key in self._replaced:
            committed = [path for path in self._versions(key) if int(path.stem) < self._round]
            for path in committed[:-1]:
                path.unlink()
        self._replaced.clear()

    def settle(self) -> None:
        """Remove every version that a newer one has replaced, in whichever round."""
        for place in self._places:
            for path in sorted(place.glob(_VERSION))[:-1]:
                path.unlink()

    def _recover(self, committed: int) -> set[Path]:
        """Remove versions of later rounds; return the folders that still hold one."""
        places = set()
        for path in self._folder.glob(f"*/{_VERSION}"):
            if int(path.stem) > committed:
                path.unlink()
            else:
                places.add(path.parent)
        return places

    def _place(self, key: str) -> Path:
        name = key.replace("/", "+")
        # A file system holds names of up to 255 bytes; links deep in a tree may be longer.
        return self._folder / (name if len(name) <= 255 else sha256(name.encode()).hexdigest())

    def _versions(self, key: str) -> list[Path]:
        found = sorted(self._place(key).glob(_VERSION))
        return [path for path in found if self._upto is None or int(path.stem) <= self._upto]

    def _keep(self, key: str, state: State, size: int) -> None:
        self._held += size - self._sizes.pop(key, 0)
        self._cache[key] = state
        self._cache.move_to_end(key)
        self._sizes[key] = size
        while self._held > self._limit and self._cache:
            oldest, _ = self._cache.popitem(last=False)
            self._held -= self._sizes.pop(oldest)
