"""Rounds over requests, without Flower between: what a child and its parent owe each other."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from direct import Direct, late, rounds
from hansa.federation.engines.flower import grid
from hansa.federation.engines.flower.exchange import (
    Answer,
    LetterError,
    LostError,
    Request,
    from_bytes,
    to_bytes,
)
from hansa.federation.engines.flower.records import from_records, to_records
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site, encoded
from hansa.federation.engines.local import LocalEngine
from hansa.federation.leaf import DivergedError
from hansa.federation.message import Message, State
from hansa.federation.methods import METHODS, FedAvg, FedSelect
from hansa.federation.methods.base import Method
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.robust import Robust
from hansa.federation.tree import Tree
from hansa.federation.wire import decode, encode
from support import clients, engine, everything, made, run, same


def remote(local: LocalEngine, folder: Path, **options: Any) -> RemoteEngine:
    """The federation of a local engine, with its clients behind requests."""
    sites = {
        path: Site(path, folder / path, LeafWorker(path, client, local.leaf))
        for path, client in local.clients.items()
    }
    return RemoteEngine(
        Direct(sites),
        "run",
        local.tree,
        local.samples,
        local.method,
        local.setup,
        local.seed,
        local.participation,
        **options,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("federations", [1, 2])
def test_every_method_gives_the_local_engines_bits(name, federations, tmp_path) -> None:
    method: Method = made(name)
    if method.max_depth and federations > 1:
        pytest.skip("not defined on a deeper tree")
    if method.pools:
        pytest.skip("pools data, which past one machine is refused")
    data = clients(4)
    options: dict[str, Any] = {
        "data": data,
        "tree": Tree.grouped(data, federations),
        "participation": Participation(fraction=0.75, failure_rate=0.2),
    }
    expected = engine(method, **options)
    found = remote(engine(method, **options), tmp_path)
    before, after = run(expected), rounds(found)
    assert everything(found, after)[1] == everything(expected, before)[1]  # visits, scores, bytes
    for path in expected.tree.walk():
        if not expected.tree.is_leaf(path):
            assert encoded(found.state(path)) == encoded(expected.state(path))


def test_a_late_client_is_left_out_and_ends_the_round_as_it_began(tmp_path) -> None:
    """It trained, and kept a mask that its parent never heard of: that round is undone."""
    local = engine(FedSelect(rate=0.2))
    found = remote(local, tmp_path)
    post = found.post
    assert isinstance(post, Direct)
    post.spoil["root/c1", 2] = late
    results = rounds(found, 4)
    fates = [[visit.fate for visit in result.visits] for result in results]
    assert fates == [["ok"] * 3, ["ok", "late", "ok"], ["ok"] * 3, ["ok"] * 3]
    assert results[1].visits[1].error == "no answer by the deadline"

    # The local engine, told to lose the same reply, must end with the same bits.
    class Late(Participation):
        def fate(self, seed: int, path: str, round_: int, steps: int) -> Any:
            fate, seconds = super().fate(seed, path, round_, steps)
            return ("late" if (path, round_) == ("root/c1", 2) else fate), seconds

    expected = engine(FedSelect(rate=0.2), participation=Late())
    run(expected, 4)
    assert encoded(found.state()) == encoded(expected.state())


def test_a_request_that_comes_again_gets_the_same_answer_without_new_work(tmp_path) -> None:
    local = engine(FedSelect())
    found = remote(local, tmp_path)
    rounds(found, 2)
    post = found.post
    assert isinstance(post, Direct)
    last = next(r for r in reversed(post.requests) if r.kind == "train")
    worker = CountingWorker()
    site = Site(last.path, tmp_path / last.path, worker)
    first = site.answer(last)
    assert (first.status, worker.trained) == ("ok", 0)
    assert site.answer(last) == first
    # Of an earlier round, or of a later one that the parent has moved past: refused.
    old = next(r for r in post.requests if r.kind == "train" and r.path == last.path)
    assert old.round < last.round
    assert site.answer(old).status == "refused"
    assert site.answer(replace(last, body=b"x", known=last.round)).status == "refused"
    assert worker.trained == 0


class CountingWorker:
    samples = 1

    def __init__(self) -> None:
        self.trained = 0

    def train(self, number: int, store: Any, down: Message) -> tuple[Message, dict[str, Any]]:
        self.trained += 1
        before = store.get("me").scalars.get("sum", 0)
        store.put("me", State(scalars={"sum": before + number}))
        return Message(scalars={"sum": before + number}), {}

    def score(self, number: int, store: Any, down: Message) -> dict[str, Any]:
        return {"state": {"sum": (float(store.get("me").scalars.get("sum", 0)), 1.0)}}

    def end(self) -> None:
        pass


def test_states_go_back_to_what_the_parent_knows(tmp_path) -> None:
    """Rounds 1 and 2 are answered, 2 never arrives: 3 stands on 1, as does a score."""
    site = Site("root/a", tmp_path, CountingWorker())

    def ask(kind: Any, number: int, known: int) -> Answer:
        return site.answer(Request(kind, "r", "root/a", number, known))

    assert ask("train", 1, 0).status == "ok"
    assert ask("score", 1, 1).metrics == {"state/sum": (1.0, 1.0)}
    assert ask("train", 2, 1).status == "ok"
    assert ask("score", 2, 1).metrics == {"state/sum": (1.0, 1.0)}
    assert ask("train", 3, 1).status == "ok"
    assert ask("score", 3, 3).metrics == {"state/sum": (4.0, 1.0)}
    # The server lost its round 3 and does it again with another message: it stands on 1 again.
    again = site.answer(Request("train", "r", "root/a", 3, 1, encoded(Message(scalars={"x": 1}))))
    assert again.status == "ok"
    assert ask("score", 3, 3).metrics == {"state/sum": (4.0, 1.0)}


def test_a_kill_between_state_and_answer_trains_again_from_the_state_before(tmp_path) -> None:
    site = Site("root/a", tmp_path, CountingWorker())
    request = Request("train", "r", "root/a", 2, 1)
    site.answer(Request("train", "r", "root/a", 1, 0))
    first = site.answer(request)
    (tmp_path / "r" / "answer").unlink()
    assert site.answer(request) == first


def test_runs_do_not_mix_and_wrong_paths_are_refused(tmp_path) -> None:
    site = Site("root/a", tmp_path, CountingWorker())
    site.answer(Request("train", "r", "root/a", 1, 0))
    other = site.answer(Request("score", "other", "root/a", 1, 0))
    assert other.metrics == {"state/sum": (0.0, 1.0)}
    assert site.answer(Request("train", "r", "root/b", 2, 1)).status == "refused"
    for run_name in ("../r", "", "a/b", "."):
        assert site.answer(Request("train", run_name, "root/a", 1, 0)).status == "refused"


def spoiled(**changes: Any) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, **changes)


def _not_finite(answer: Answer) -> Answer:
    reply = decode(answer.body)
    name = next(iter(reply.group("model")))
    values = {**reply.group("model"), name: reply.group("model")[name] * math.nan}
    groups = {**reply.groups, "model": values}
    return replace(answer, body=encode(Message(groups, reply.scalars, reply.metrics)))


def _no_metric(answer: Answer) -> Answer:
    reply = decode(answer.body)
    told = {**reply.metrics, "loss": (math.inf, 1.0)}
    return replace(answer, body=encode(Message(reply.groups, reply.scalars, told)))


def _weighing(weight: float) -> Callable[[Answer], Answer]:
    def spoil(answer: Answer) -> Answer:
        reply = decode(answer.body)
        return replace(answer, body=encode(Message(reply.groups, {"weight": weight})))

    return spoil


GARBAGE = {
    "no message": (spoiled(body=b"garbage"), "shorter than a message"),
    "no number": (_not_finite, "not finite"),
    "of another model": (
        spoiled(body=encoded(Message({"model": {"w": torch.ones(3)}}, {"weight": 1}))),
        "differs from the model",
    ),
    "without a weight": (spoiled(body=encoded(Message(scalars={"x": 1}))), "weight"),
    "a metric that is no number": (_no_metric, "the metric loss is inf"),
    "metrics beside it": (spoiled(metrics={"loss": (math.nan, 1.0)}), "the metric loss is nan"),
    "a weight that is no number": (_weighing(math.nan), "weight is nan"),
    "a negative weight": (_weighing(-1.0), "weight"),
    "an answer of another round": (spoiled(round=1), "'c1' in round 1, not what was asked"),
    "an answer of another client": (spoiled(path="root/c0"), "'c0' in round 2"),
    "refused": (spoiled(status="refused", error="no data"), "no data"),
}


@pytest.mark.parametrize("about", ["[[", "{}", None, '{"path": "c1", "metrics": {"x": [NaN, 1]}}'])
def test_an_answer_that_cannot_be_read_is_excluded(about) -> None:
    told = {} if about is None else {"hansa": ConfigRecord({"about": about})}
    # Flower makes messages within a run alone; these are the two things that are asked of one.
    message: Any = SimpleNamespace(has_error=lambda: False, content=RecordDict(dict(told)))
    with pytest.raises(LostError, match="garbage for an answer") as error:
        grid.answer_in(message)
    assert error.value.fate == "excluded"


@pytest.mark.parametrize("case", GARBAGE)
def test_a_reply_of_no_use_is_left_out_and_named(case, tmp_path, caplog) -> None:
    spoil, why = GARBAGE[case]
    found = remote(engine(FedAvg()), tmp_path)
    assert isinstance(found.post, Direct)
    found.post.spoil["root/c1", 2] = spoil
    results = rounds(found)
    visit = results[1].visits[1]
    assert (visit.fate, visit.up) == ("failed" if case == "refused" else "excluded", 0)
    assert why in visit.error
    assert "c1" in caplog.text
    assert [visit.fate for visit in results[2].visits] == ["ok"] * 3
    # The other two make the mean of that round between them.
    expected = engine(FedAvg(), data={n: c for n, c in clients().items() if n != "c1"})
    alone = remote(engine(FedAvg()), tmp_path / "alone")
    assert isinstance(alone.post, Direct)
    alone.post.away.add("root/c1")
    run(expected, 2)
    rounds(alone, 2)
    assert same(alone.state().group("model"), expected.state().group("model"))


def test_last_rounds_answer_does_not_count_again(tmp_path) -> None:
    found, alone = (remote(engine(FedAvg()), tmp_path / name) for name in ("found", "alone"))
    assert isinstance(found.post, Direct)
    assert isinstance(alone.post, Direct)
    sent: list[Answer] = []
    found.post.spoil["root/c1", 1] = lambda answer: sent.append(answer) or answer
    found.post.spoil["root/c1", 2] = lambda answer: sent[0]
    alone.post.spoil["root/c1", 2] = late
    (_, visit, _) = rounds(found)[1].visits
    assert (visit.fate, visit.up) == ("excluded", 0)
    assert "'c1' in round 1, not what was asked" in visit.error
    rounds(alone)
    assert encoded(found.state()) == encoded(alone.state())


class Repeating:
    """A Grid of Flower's before sites in this process: it hands out every reply twice over.

    Args:
        sites: of all nodes.
        spoil: what it hands out for the second round's work of c1.
    """

    def __init__(self, sites: dict[str, Site], spoil: str) -> None:
        self.sites, self.spoil = dict(enumerate(sites.values())), spoil
        self.replies: dict[str, tuple[Request, RecordDict]] = {}
        self.before: RecordDict | None = None

    def get_nodes(self) -> list[Any]:
        about = {"public_key": b"", "last_activated_at": "now"}
        return [SimpleNamespace(node_id=node, **about) for node in self.sites]

    def push_messages(self, messages: list[tuple[Request, int]]) -> list[str]:
        ((request, node),) = messages
        ticket = str(len(self.replies))
        self.replies[ticket] = request, to_records(self.sites[node].answer(request))
        return [ticket]

    def pull_messages(self, tickets: list[str]) -> list[Any]:
        (ticket,) = tickets
        request, content = self.replies[ticket]
        if (request.kind, request.path) == ("train", "root/c1"):
            if request.round == 2 and self.spoil == "garbage":
                raise ValueError("no message")
            if request.round == 2 and self.spoil == "replay" and self.before is not None:
                content = self.before
            self.before = content
        return [SimpleNamespace(has_error=lambda: False, content=content)] * 2


@pytest.mark.parametrize(
    ("spoil", "why"),
    [("", ""), ("replay", "'c1' in round 1, not what"), ("garbage", "garbage for a message")],
)
def test_nothing_counts_twice_that_a_grid_delivers_twice(spoil, why, tmp_path, monkeypatch) -> None:
    # A message of Flower's exists within a run alone; here the request stands for it.
    monkeypatch.setattr(grid, "message_of", lambda request, node, ttl: (request, node))
    found, alone = (remote(engine(FedAvg()), tmp_path / name) for name in ("found", "alone"))
    assert isinstance(alone.post, Direct)
    assert isinstance(found.post, Direct)
    there: Any = Repeating(found.post.sites, spoil)
    post = grid.GridPost(there, "run", found.post.sites)
    post.wait(list(found.post.sites), 30.0)
    found.post = post
    if spoil:
        alone.post.spoil["root/c1", 2] = late
    results = rounds(found)
    assert [visit.fate for visit in results[1].visits] == [
        "ok",
        "excluded" if spoil else "ok",
        "ok",
    ]
    assert why in results[1].visits[1].error
    assert [visit.fate for visit in results[2].visits] == ["ok"] * 3
    rounds(alone)
    assert encoded(found.state()) == encoded(alone.state())


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedselect"])
@pytest.mark.parametrize(
    "robust",
    [
        Robust(rule="median"),
        Robust(rule="multi_krum", attackers=0),
        Robust(rule="geometric_median"),
        Robust(rule="norm_bound"),
    ],
    ids=lambda robust: robust.rule,
)
def test_robust_rules_give_the_local_engines_bits(name, robust, tmp_path) -> None:
    local, far = engine(made(name)), engine(made(name))
    local.setup = far.setup = replace(local.setup, robust=robust)
    found = remote(far, tmp_path)
    rounds(found, 2)
    run(local, 2)
    for group, tensors in local.state().groups.items():
        assert same(found.state().group(group), tensors), group


def test_a_loss_that_is_no_number_stops_the_run_or_is_dropped(tmp_path) -> None:
    wild = Training(lr=1e30, batch_size=3, epochs=3)
    with pytest.raises(DivergedError, match="c0"):
        remote(engine(FedAvg(), training=wild), tmp_path / "a").round(1)
    found = remote(engine(FedAvg(), training=wild), tmp_path / "b", on_failure="drop")
    assert [visit.fate for visit in found.round(1, score=False).visits] == ["failed"] * 3


def test_who_is_away_is_not_asked_and_comes_back(tmp_path) -> None:
    found = remote(engine(FedSelect()), tmp_path)
    assert isinstance(found.post, Direct)
    found.post.away.add("root/c2")
    first = found.round(1)
    assert [(visit.fate, visit.down) for visit in first.visits][2] == ("failed", 0)
    assert first.visits[2].error == "not connected"
    assert "root/c2" not in first.scores
    found.post.away.clear()
    second = found.round(2)
    assert [visit.fate for visit in second.visits] == ["ok"] * 3


@given(
    st.builds(
        Answer,
        path=st.text(max_size=9),
        round=st.integers(0, 1 << 40),
        status=st.sampled_from(["ok", "diverged", "refused"]),
        error=st.text(),
        metrics=st.dictionaries(
            st.text(), st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)
        ),
        facts=st.dictionaries(st.text(), st.text() | st.integers(0, 9)),
        body=st.binary(),
    )
)
def test_answers_survive_files_and_flowers_records(answer: Answer) -> None:
    assert from_bytes(Answer, to_bytes(answer)) == answer
    assert from_records(Answer, to_records(answer)) == answer


@given(st.binary(max_size=80) | st.sampled_from([b"{}", b'{"version": 1}', b'{"version": 2}\n']))
def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    with pytest.raises(LetterError):
        from_bytes(Request, data)


@pytest.mark.parametrize(
    "changes",
    [{"round": -1}, {"round": "1"}, {"kind": "rm"}, {"path": 3}, {"known": 1.5}, {"more": 1}],
)
def test_requests_with_wrong_fields_are_refused(changes: dict[str, Any]) -> None:
    import json

    text, _, _ = to_bytes(Request("train", "r", "p")).partition(b"\n")
    odd = json.dumps(json.loads(text) | changes).encode() + b"\n"
    with pytest.raises(LetterError):
        from_bytes(Request, odd)


def test_the_digest_leaves_out_what_may_change_when_a_request_is_repeated() -> None:
    request = Request("train", "r", "p", 3, 2, b"body")
    assert request.digest == replace(request, known=1).digest
    for changes in ({"round": 4}, {"body": b"bodz"}, {"run": "s"}, {"path": "q"}):
        assert request.digest != replace(request, **changes).digest
