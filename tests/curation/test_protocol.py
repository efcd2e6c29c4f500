"""The two rounds of a curation: what they come to, and what goes over the wire."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import CLIENTS, GRADIENTS, config, records, write

from hansa.config import load
from hansa.curation.federated import Cohort, Counts, check_counts, check_use, ledger, params_of
from hansa.curation.protocol import (
    Curate,
    noise_below,
    points_from,
    sent_points,
    sent_threshold,
    threshold_from,
)
from hansa.curation.scores import Point, Sample, measure, oriented
from hansa.data.answers import Answers
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.flower.exchange import Answer, Request
from hansa.federation.engines.flower.records import from_records, to_records
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site
from hansa.federation.federation import Federation
from hansa.federation.message import Message, MessageError, State
from hansa.federation.node import Node, Reply, Setup
from hansa.federation.store import MemoryStore
from hansa.federation.tree import ROOT
from hansa.federation.wire import decode, encode
from hansa.training import cohort_of, prepare
from support import in_turn

Values = dict[str, Any]
Asked = tuple[Counts, Counts, MemoryStore]
MARK = "zq"  # in every answer and question of the clients, and nowhere else


@pytest.fixture
def values(tmp_path: Path) -> Values:
    found = config(tmp_path)
    for name in CLIENTS:
        held = records(12, name)
        for record in held:
            record["question"] += MARK
            record["answer"] = f"{MARK}{record['answer']}{MARK}"
        found["nodes"][name]["text"] = write(tmp_path / "data" / f"{name}.jsonl", held)
    return found


def deep(values: Values) -> Values:
    nodes = {name: dict(node) for name, node in values["nodes"].items()}
    for name in CLIENTS[:2]:
        nodes[name]["parent"] = "ward"
    return {**values, "nodes": {**nodes, "ward": {}}}


def cohort(values: Values, **options: Any) -> Cohort:
    curation = {**values["curation"], **options}
    return cohort_of(prepare(load({**values, "curation": curation})))


def both(made: Cohort) -> Asked:
    """Return what a cohort counts in its two rounds, and what its nodes keep."""
    store = MemoryStore()
    points = made.points(params_of(made.model), [])
    samples, _ = made.score(points, store)
    kept, _ = made.filter(made.threshold(made.anchor_scores(points)), store)
    return samples, kept, store


def equal(first: Counts, second: Counts) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Message]]:
    """Record every message that goes up, from leaves and from inner nodes."""
    found: list[tuple[str, Message]] = []
    end, reply = Curate.end, Curate.reply

    def ended(self: Curate, node: Node, state: State, work: Any) -> tuple[State, Message]:
        state, message = end(self, node, state, work)
        found.append((node.path, message))
        return state, message

    def replied(self: Curate, node: Node, state: State) -> Message:
        found.append((node.path, reply(self, node, state)))
        return found[-1][1]

    monkeypatch.setattr(Curate, "end", ended)
    monkeypatch.setattr(Curate, "reply", replied)
    return found


# What the rounds come to.


@pytest.mark.parametrize("shape", ["flat", "deep"])
def test_the_rounds_come_to_what_one_place_would(values: Values, shape: str) -> None:
    made = cohort(deep(values) if shape == "deep" else values)
    samples, kept, store = both(made)
    assert isinstance(made.data, Answers)
    task = made.task
    threshold = made.threshold(made.anchor_scores(sent_points(Point(task.params), [])))
    for (name, scores, keep), path in zip(made.held(store), made.tree.leaves(), strict=True):
        assert path.rpartition("/")[2] == name
        pair = made.data.clients[name].batch("train")
        point = Point(task.params)
        sample = Sample(task, task.buffers, point, [], pair, made.data.blank)
        central = measure(made.options.scores, sample)
        for score, found in central.items():
            torch.testing.assert_close(scores[score], oriented(score, found))
        domains = [example.domain for example in made.data.examples[name]]
        numbers = torch.tensor(["xy".index(domain) for domain in domains])
        expected = threshold.keep({n: oriented(n, v) for n, v in central.items()}, numbers)
        assert torch.equal(keep["keep"], expected)
        by_hand = Counter(domains)
        told = Counter(d for d, k in zip(domains, expected.tolist(), strict=True) if k)
        assert samples[name].tolist() == [[by_hand["x"], 0], [by_hand["y"], 0], [0, 0]]
        assert kept[name].tolist() == [[told["x"]], [told["y"]], [0]]
    assert 0 < sum(int(each.sum()) for each in kept.values()) < 33


def test_processes_score_to_the_same_bits(values: Values) -> None:
    made = cohort(values)
    point = made.points(params_of(made.model), [])
    stores = MemoryStore(), MemoryStore()
    with in_turn(0, 1):  # each process reads PyTorch anew
        for workers, store in zip((1, 2), stores, strict=True):
            engine = made.engine.model_copy(update={"workers": workers})
            replace(made, engine=engine).score(point, store)
    for path in made.tree.leaves():
        first, second = (encode(store.get(path)) for store in stores)
        assert first == second


def test_domains_that_no_anchor_has_are_counted_apart(values: Values, tmp_path: Path) -> None:
    held = records(12, "a", ("x", "new", "newer"))
    values["nodes"]["a"]["text"] = write(tmp_path / "data" / "a.jsonl", held)
    values["text"]["test"] = 0.0
    made = cohort(values)
    samples, kept, _ = both(made)
    assert samples["a"].tolist() == [[4, 0], [0, 0], [8, 0]]
    assert not check_counts(made.options, made.public.domains, samples, kept)
    per_domain = cohort(values, threshold={"rate": 0.4, "per_domain": True})
    with pytest.raises(InputError, match=r"^curation\.anchors: found 8 samples of a in a domain"):
        check_counts(per_domain.options, made.public.domains, samples, kept)


@pytest.mark.parametrize("names", [("other", "all"), ("other", "other *")])
def test_domains_may_be_called_as_they_like(
    values: Values, tmp_path: Path, names: tuple[str, str]
) -> None:
    anchors = write(tmp_path / "data" / "anchors.jsonl", records(12, "anchor", names))
    held = records(12, "a", (*names, "new"))
    values["nodes"]["a"]["text"] = write(tmp_path / "data" / "a.jsonl", held)
    values["text"]["test"] = 0.0
    made = cohort(
        values, anchors=anchors, threshold={"rate": 0.4, "per_domain": True, "pool_below": 5}
    )
    samples, kept, _ = both(made)
    threshold = made.threshold(made.anchor_scores(made.points(params_of(made.model), [])))
    about = made.manifest(threshold, "model", samples, kept)
    assert [row["samples"] for row in about["counts"]["a"].values()] == [4, 4, 4]
    assert len(about["thresholds"]) == len(about["false_rejection"]) == 3
    assert len(set(about["thresholds"].values())) > 1


class Direct:
    """Carries requests to clients in this process, by way of Flower's records and back."""

    name = "direct"

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites, self.sent = sites, list[Request]()
        self._answers: dict[str, Answer] = {}

    def present(self, children: Sequence[str]) -> list[str]:
        return list(children)

    def send(self, request: Request) -> str:
        self.sent.append(request)
        again = from_records(Request, to_records(request))
        answer = self.sites[request.path].answer(again)
        self._answers[ticket := str(len(self.sent))] = from_records(Answer, to_records(answer))
        return ticket

    def take(self, ticket: str, until: float) -> Answer:
        return self._answers.pop(ticket)


def test_requests_to_clients_elsewhere_come_to_the_same_counts(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cohort(values)
    samples, kept, _ = both(made)

    def rounds(self: Federation, last: int, first: int, score_every: int) -> Iterator[RoundResult]:
        local = self._engine
        sites = {
            path: Site(path, tmp_path / "sites" / path, LeafWorker(path, client, local.leaf))
            for path, client in local.clients.items()
        }
        far = RemoteEngine(
            Direct(sites),
            "run",
            local.tree,
            local.samples,
            local.method,
            local.setup,
            local.seed,
            local.participation,
        )
        far.store = local.store
        yield far.round(first, False)

    monkeypatch.setattr(Federation, "rounds", rounds)
    again, left, _ = both(made)
    assert equal(again, samples)
    assert equal(left, kept)


# What goes over the wire.


def messages(values: Values, replies: list[tuple[str, Message]], **options: Any) -> Cohort:
    made = cohort(values, **options)
    both(made)
    assert replies
    return made


@pytest.mark.parametrize("soft", [False, True])
def test_nothing_but_counts_leaves_a_client(
    values: Values, tmp_path: Path, replies: list[tuple[str, Message]], soft: bool
) -> None:
    validation = write(tmp_path / "data" / "validation.jsonl", records(4, "val"))
    made = messages(
        deep(values),
        replies,
        scores=["conditional_loss", "ifd", "duplicates", *GRADIENTS],
        by=["conditional_loss", "gradient_cosine"],
        validation=validation,
        soft=soft,
    )
    leaves = set(made.tree.leaves())
    assert Counter(path for path, _ in replies) == {
        **dict.fromkeys(leaves, 2),
        "root/ward": 2,
    }
    for path, message in replies:
        again = decode(encode(message))
        assert set(again.groups) == {"counts"}
        assert not again.scalars
        assert not again.metrics
        below = {leaf for leaf in leaves if leaf == path or leaf.startswith(f"{path}/")}
        assert set(again.group("counts")) == below
        for counts in again.group("counts").values():
            assert counts.dtype is torch.int64
            assert counts.shape in ((3, 2), (3, 1))
            assert counts.sum() <= 24


def test_no_text_token_or_score_is_in_a_reply(
    values: Values, replies: list[tuple[str, Message]]
) -> None:
    made = messages(values, replies, scores=["conditional_loss", "ifd", "length"])
    store = both(made)[2]
    held = {name: scores for name, scores, _ in made.held(store)}
    tokens = torch.tensor([*MARK.encode()])
    for path, message in replies:
        data = encode(message)
        assert MARK.encode() not in data
        assert tokens.numpy().tobytes() not in data
        own = made.data.clients[path.rpartition("/")[2]].inputs
        assert not any(row.numpy()[:4].tobytes() in data for row in own)
        for name in CLIENTS:
            for scores in held[name].values():
                # Lengths are small whole numbers, as counts are, but never of this kind.
                for value in scores:
                    assert value.double().numpy().tobytes() not in data
                    assert value.float().numpy().tobytes() not in data or value == 0


def test_training_losses_are_not_told_either(values: Values) -> None:
    made, store = cohort(values), MemoryStore()
    _, result = made.score(made.points(params_of(made.model), []), store)
    assert not dict(result.scores)
    assert {visit.fate for visit in result.visits} == {"ok"}
    for visit in result.visits:
        assert not any(total for total, _ in visit.metrics.values())
        assert visit.up < 400
    assert [row["path"] for row in ledger(result)] == list(made.tree.leaves())


# Noise.


def counted(epsilon: float | None, seed: int = 0, columns: int = 1, level: float = 0.0) -> Any:
    """Return a client's noised counts of no sample at all, of many domains."""
    method = Curate(scores=("ifd",), blank=(10,), num_domains=3999, epsilon=epsilon)
    setup = Setup.__new__(Setup)
    object.__setattr__(setup, "seed", seed)
    node = Node("root/a", 1, 0, setup)
    state = State({"level": {"values": torch.tensor([level])}}, {"by": "ifd"})
    none = torch.zeros(0, dtype=torch.int64)
    found: torch.Tensor = method._counts(
        node, state, none, [torch.zeros(0, dtype=torch.bool)] * columns
    )
    return found


@pytest.mark.parametrize(("epsilon", "columns"), [(0.5, 1), (2.0, 1), (2.0, 2)])
def test_noise_is_as_wide_as_epsilon_asks(epsilon: float, columns: int) -> None:
    """Two-sided geometric: variance 2 a / (1 - a)^2, and P(k + 1) / P(k) = a."""
    found = counted(epsilon, columns=columns).double().flatten()
    a = math.exp(-epsilon / 2 / columns)
    variance = 2 * a / (1 - a) ** 2
    num = len(found)
    assert abs(float(found.mean())) < 4 * math.sqrt(variance / num)
    kurtosis = float((found**4).mean()) / variance**2
    assert abs(float(found.var()) / variance - 1) < 4 * math.sqrt((kurtosis - 1) / num)
    zeros, ones = (int((found.abs() == k).sum()) for k in (0, 1))
    assert ones / zeros == pytest.approx(2 * a, rel=0.2)
    assert (found.abs() < noise_below(epsilon)).float().mean() > 0.999


def test_noise_is_drawn_by_seed_and_never_twice_for_two_questions() -> None:
    assert torch.equal(counted(1.0), counted(1.0))
    assert not torch.equal(counted(1.0), counted(1.0, seed=1))
    # The difference of two answers would else be what it is without noise.
    assert not torch.equal(counted(1.0), counted(1.0, level=0.5))
    assert not counted(None).any()


def test_noised_counts_are_told_and_masks_are_as_without(values: Values) -> None:
    exact, noised = both(cohort(values)), both(cohort(values, epsilon=1.0))
    assert not equal(exact[0], noised[0])
    assert not equal(exact[1], noised[1])
    assert equal(noised[1], both(cohort(values, epsilon=1.0))[1])
    for name in CLIENTS:
        path = f"{ROOT}/{name}"
        assert torch.equal(
            *(store.get(path).group("keep")["keep"] for store in (exact[2], noised[2]))
        )
        assert (noised[0][name] >= 0).all()


def test_floors_are_not_missed_by_noise_alone(values: Values) -> None:
    """A domain that nobody has, or a small client, is not told from noise."""
    made = cohort(values, epsilon=0.1, threshold={"rate": 0.4, "per_domain": True, "pool_below": 5})
    num = int(noise_below(0.1))
    samples = {"a": torch.tensor([[9 * num, 0], [9 * num, 0], [num, 0]])}
    kept = {"a": torch.tensor([[9 * num], [9 * num], [0]])}
    assert not check_counts(made.options, ("x", "y"), samples, kept)
    samples["a"][2, 0] += 2
    with pytest.raises(InputError, match=r"^curation\.anchors: found \d+ samples of a in a domain"):
        check_counts(made.options, ("x", "y"), samples, kept)
    kept["a"] = torch.tensor([[0], [9 * num], [0]])
    pooled = cohort(values, epsilon=0.1)
    with pytest.raises(InputError, match=r"^curation\.guard\.domain: found domain 'x' keeps 0 of"):
        check_counts(pooled.options, ("x", "y"), samples, kept)


# Replies that are none.


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("root/b", torch.zeros(3, 2, dtype=torch.int64)),
        ("root/aa", torch.zeros(3, 2, dtype=torch.int64)),
        ("root", torch.zeros(3, 2, dtype=torch.int64)),
        ("root/a", torch.zeros(2, 2, dtype=torch.int64)),
        ("root/a", torch.zeros(3, 1, dtype=torch.int64)),
        ("root/a", torch.zeros(3, dtype=torch.int64)),
        ("root/a", torch.zeros(3, 2)),
        ("root/a", torch.zeros(3, 2, dtype=torch.int32)),
    ],
)
def test_counts_that_are_none_are_refused(path: str, counts: torch.Tensor) -> None:
    method = Curate(scores=("ifd",), blank=(10,), num_domains=2)
    node, asked = Node(ROOT, 1, 0, Setup.__new__(Setup)), State()
    reply = Reply("root/a", State(), Message({"counts": {path: counts}}))
    with pytest.raises(MessageError, match=f"counts of {path}"):
        method.aggregate(node, asked, [reply])
    fine = Reply("root/a", State(), Message({"counts": {"root/a": torch.zeros(3, 2).long()}}))
    assert set(method.aggregate(node, asked, [fine]).group("counts")) == {"root/a"}


def test_a_client_that_does_not_answer_ends_the_curation(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregate = Curate.aggregate

    def partly(self: Curate, node: Node, state: State, replies: Iterator[Reply]) -> State:
        return aggregate(self, node, state, (r for r in replies if r.path != "root/b"))

    monkeypatch.setattr(Curate, "aggregate", partly)
    with pytest.raises(InputError, match=r"^curation: found no counts of b"):
        both(cohort(values))


def test_what_is_sent_reads_back(values: Values) -> None:
    made = cohort(values, by=["conditional_loss", "length"], soft=True)
    points = made.points(params_of(made.model), [])
    threshold = made.threshold(made.anchor_scores(points))
    again = threshold_from(decode(encode(sent_threshold(threshold, True))))
    rng = np.random.default_rng(0)
    scores = {n: torch.from_numpy(rng.normal(size=50)) for n in ("conditional_loss", "length")}
    domains = torch.from_numpy(rng.integers(0, 3, 50))
    assert torch.equal(again.keep(scores, domains), threshold.keep(scores, domains))
    assert torch.equal(again.weights(scores, domains, 0.4), threshold.weights(scores, domains, 0.4))
    model, checkpoints = points_from(decode(encode(points)))
    assert not checkpoints
    assert all(torch.equal(model.params[n], p) for n, p in params_of(made.model).items())


def test_a_model_that_uses_no_questions_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    check_use(-torch.tensor([0.1, 0.2, 0.99]))
    assert not caplog.records
    check_use(-torch.tensor([0.1, 0.95, 0.99]))
    assert "median IFD of the anchors is 0.95" in caplog.text
