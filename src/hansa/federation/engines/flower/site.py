"""A child at home: its state on its own disk, and each request answered once.

``FOLDER/RUN/states/`` holds its states by round, ``FOLDER/RUN/answer`` the last answer. A request
that comes again gets that answer; one for an earlier round is refused. A request says which of
the child's replies its parent has kept: what came later never reached anybody and is undone, so
that parent and child always stand on the same round, whoever was killed in between.
"""

import fcntl
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hansa.data.clients import Client
from hansa.errors import InputError, first_line
from hansa.federation.engines.flower.exchange import (
    Answer,
    LetterError,
    Request,
    from_bytes,
    to_bytes,
)
from hansa.federation.engines.plan import Plan
from hansa.federation.leaf import DivergedError, Job, Leaf, Metrics, Scores
from hansa.federation.message import Message, MessageError
from hansa.federation.stack import Stack
from hansa.federation.store import DiskStore, Store
from hansa.federation.wire import MAX_BYTES, decode, encode
from hansa.files import write_atomic
from hansa.models.task import Task

_log = logging.getLogger("hansa.flower")
_LARGEST = 8  # times the model that a message may unfold to
_SMALL = 1 << 20  # bytes beside it
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Worker(Protocol):
    """Does the work of one node: a leaf's training, or a federation's round."""

    samples: int

    def train(self, number: int, store: Store, down: Message) -> tuple[Message, Metrics]:
        """Do a round, keep what it leaves in the store, and return the reply and its metrics.

        Raises:
            DivergedError: a loss is no number.
        """
        ...

    def score(self, number: int, store: Store, down: Message) -> Scores:
        """Return the node's scores.

        Raises:
            DivergedError: a loss is no number.
        """
        ...

    def end(self) -> None:
        """Take note that the run is over."""
        ...


class LeafWorker:
    """Trains and scores one client, as the sequential engine would."""

    def __init__(self, path: str, client: Client, leaf: Leaf) -> None:
        self.path, self.client, self.samples = path, client, client.count("train")
        self._stack = Stack(leaf, Plan(), leaf.setup.training.batch_size)

    def train(self, number: int, store: Store, down: Message) -> tuple[Message, Metrics]:
        """Train the client."""
        (done,) = self._stack.train([self._job(number, store, down)])
        if isinstance(done, DivergedError):
            raise done
        state, reply, metrics = done
        if state:
            store.put(self.path, state)
        return reply, metrics

    def score(self, number: int, store: Store, down: Message) -> Scores:
        """Score the client's model."""
        (scores,) = self._stack.score([self._job(number, store, down)])
        if isinstance(scores, DivergedError):
            raise scores
        return scores

    def end(self) -> None:
        """Do nothing: a client's states stay where they are."""

    def _job(self, number: int, store: Store, down: Message) -> Job:
        return Job(self.path, number, self.client, store.get(self.path), down)


class Site:
    """Answers the requests of a node's parent.

    Args:
        path: the node.
        folder: where its states lie, a folder for each run.
        worker: does the work.
        facts: more about the node, for ``hello``.
        max_bytes: what a request's message may unfold to; ``largest`` where the model is known.
    """

    def __init__(
        self,
        path: str,
        folder: Path,
        worker: Worker,
        facts: dict[str, str | int] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.path, self._folder, self._worker = path, folder, worker
        self._facts, self._max_bytes = facts or {}, max_bytes

    def answer(self, request: Request) -> Answer:
        """Return the answer to a request; what cannot be answered is refused in words."""
        if request.kind == "hello":
            facts = {**self._facts, "samples": self._worker.samples}
            return Answer(self.path, facts=facts)
        try:
            if request.path != self.path:
                raise InputError("request", f"one for {request.path}", self.path)
            folder = self._folder / check_run(request.run)
            with _locked(folder):
                if request.kind == "end":
                    self._worker.end()
                    return Answer(self.path)
                if request.kind == "score":
                    return self._scored(request, folder)
                return self._trained(request, folder)
        except DivergedError as error:
            return Answer(self.path, request.round, "diverged", error.what)
        except Exception as error:  # whatever a request sets off, its parent hears of it
            if not isinstance(error, InputError | MessageError | LetterError):
                _log.exception("%s of round %d", request.kind, request.round)
            return Answer(self.path, request.round, "refused", first_line(error))

    def _trained(self, request: Request, folder: Path) -> Answer:
        last = _last(folder)
        if last is not None and request.round <= last[1].round:
            if last[0] == request.digest:
                return last[1]
            if request.round < last[1].round or request.known >= request.round:
                raise InputError(
                    "round", request.round, f"a later one, after {last[1].round} was answered"
                )
        self._check_known(request, folder)
        store = DiskStore(folder / "states", request.known, writes=request.round)
        store.settle()
        # What this round answered before, if it did, stood on what is being undone.
        (folder / "answer").unlink(missing_ok=True)
        write_atomic(folder / "known", str(request.known))
        down = decoded(request.body, self._max_bytes)
        reply, metrics = self._worker.train(request.round, store, down)
        store.commit(request.round)
        answer = Answer(self.path, request.round, metrics=metrics, body=encoded(reply))
        write_atomic(folder / "answer", f"{request.digest}\n".encode() + to_bytes(answer))
        return answer

    def _scored(self, request: Request, folder: Path) -> Answer:
        self._check_known(request, folder)
        store = DiskStore(folder / "states", request.known, reads_only=True)
        down = decoded(request.body, self._max_bytes)
        scores = self._worker.score(request.round, store, down)
        flat = {f"{split}/{n}": pair for split, ms in scores.items() for n, pair in ms.items()}
        return Answer(self.path, request.round, metrics=flat)

    def _check_known(self, request: Request, folder: Path) -> None:
        """Refuse to go back further than this node's states do.

        Raises:
            InputError: the parent stands where this node cannot follow.
        """
        try:
            kept = int((folder / "known").read_text())
        except FileNotFoundError:
            kept = None
        if request.known and kept is None:
            found = f"nothing of this run, where round {request.known} was answered"
            raise InputError(str(folder), found, "the states of then; or a run of another name")
        if kept is not None and request.known < kept:
            found = f"states since round {kept}, where those of {request.known} are wanted"
            raise InputError(str(folder), found, "a parent that has not lost its own")


def check_run(run: str) -> str:
    """Return what a run is called, if a folder may be.

    Raises:
        InputError: it may not.
    """
    if not _RUN.fullmatch(run):
        raise InputError("run", repr(run), "letters, digits, '.', '_' and '-'")
    return run


def scores_of(answer: Answer) -> Scores:
    """Return the scores that an answer carries, by split."""
    scores: Scores = {}
    for key, pair in answer.metrics.items():
        split, _, name = key.partition("/")
        scores.setdefault(split, {})[name] = pair
    scores.setdefault("state", {})  # which has no entries with most methods
    return scores


def encoded(message: Message) -> bytes:
    """Return a message as bytes, none for an empty one."""
    return encode(message) if message else b""


def largest(task: Task) -> int:
    """Return the bytes that a message about a task's model may unfold to, either way."""
    model = sum(t.nbytes for t in (*task.params.values(), *task.buffers.values()))
    return _LARGEST * model + _SMALL


def decoded(body: bytes, max_bytes: int = MAX_BYTES) -> Message:
    """Return the message that a body stands for.

    Raises:
        MessageError: it stands for none, or would unfold to more than ``max_bytes``.
    """
    return decode(body, max_bytes) if body else Message()


def _last(folder: Path) -> tuple[str, Answer] | None:
    """Return the digest of the last request that was answered, and the answer."""
    try:
        digest, _, data = (folder / "answer").read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return digest.decode(errors="replace"), from_bytes(Answer, data)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a node's states of a run for one request at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
