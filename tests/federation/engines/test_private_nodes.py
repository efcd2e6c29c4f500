"""Private nodes behind requests: each round that is done is a release, whatever is undone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from direct import Direct, late, rounds
from hansa.federation.engines.flower.exchange import Answer, Request
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site, decoded, encoded
from hansa.federation.engines.local import LocalEngine
from hansa.federation.leaf import Leaf
from hansa.federation.methods import FedAvg
from hansa.federation.privacy import Privacy, epsilon
from hansa.federation.releases import Releases
from hansa.federation.rules import Rules
from hansa.federation.tree import ROOT
from support import clients, engine, run, same

UNITS = ["gradient", "update"]
STEPS = {"gradient": 6, "update": 1}  # two epochs of three batches, of which the last is short
ASKED = Request("train", "run", "root/c0", 1, 0)


def private(unit: str, path: str = "root/c0", **options: Any) -> LocalEngine:
    """The local engine with one private node; its noise comes from the seed."""
    values: dict[str, Any] = {"unit": unit, "noise": 1.0, **options}
    local = engine(FedAvg())
    local.setup = replace(local.setup, rules={path: Rules(privacy=Privacy(**values))})
    made = LocalEngine(local.tree, local.clients, local.method, local.setup, seed=5)
    made.data = local.data
    return made


def site_of(local: LocalEngine, folder: Path, path: str = "root/c0") -> Site:
    """A node as it stands in a deployment."""
    rules, setup = local.setup.rules.get(path), local.setup
    if rules is not None and rules.privacy is not None:
        setup = replace(setup, releases=Releases(folder / path / "releases.json", rules.privacy))
    leaf = Leaf(local.method, setup, local.seed)
    return Site(path, folder / path, LeafWorker(path, local.clients[path], leaf))


def deployed(local: LocalEngine, folder: Path, **options: Any) -> RemoteEngine:
    sites = {path: site_of(local, folder, path) for path in local.clients}
    about = (local.tree, local.samples, local.method, local.setup, local.seed)
    return RemoteEngine(Direct(sites), "run", *about, **options)


def counted(folder: Path, local: LocalEngine, path: str = "root/c0") -> Releases:
    privacy = local.setup.rules[path].privacy
    assert privacy is not None
    return Releases(folder / path / "releases.json", privacy)


def down(local: LocalEngine) -> bytes:
    """What the root sends in its first round."""
    return encoded(next(local.ask(local.node(ROOT, 1), local.state())).down)


def model(answer: Answer) -> dict[str, torch.Tensor]:
    assert answer.status == "ok", answer.error
    return dict(decoded(answer.body).group("model"))


@pytest.mark.parametrize("unit", UNITS)
def test_a_round_done_twice_is_two_releases_with_noise_of_their_own(unit, tmp_path) -> None:
    """The first answer is lost, or comes too late: it has left the node all the same."""
    local = private(unit)
    site, asked = site_of(local, tmp_path), replace(ASKED, body=down(local))
    first = site.answer(asked)
    assert site.answer(asked) == first  # the kept answer, which is no new release
    assert counted(tmp_path, local).number == 1
    # Its parent never had it: round 1 is undone and asked for anew, in another process.
    (tmp_path / "root/c0/run/answer").unlink()
    second = site_of(local, tmp_path).answer(asked)
    assert counted(tmp_path, local).number == 2
    noise = epsilon(Privacy(unit=unit), 7, 3, 2 * STEPS[unit])
    assert counted(tmp_path, local).epsilon == pytest.approx(noise)
    # The state it stood on is the same, and so is the training by updates: what differs is noise.
    difference = [a - b for a, b in zip(model(first).values(), model(second).values(), strict=True)]
    assert all((part.abs() > 0).float().mean() > 0.9 for part in difference)


@pytest.mark.parametrize("unit", UNITS)
def test_whoever_knows_the_seed_cannot_take_the_noise_off(unit, tmp_path) -> None:
    """The local engine's noise comes from the seed; here the same run has other noise each time."""
    local = private(unit)
    asked = replace(ASKED, body=down(local))
    found = [model(site_of(local, tmp_path / name).answer(asked)) for name in ("a", "b")]
    leaf = Leaf(local.method, local.setup, local.seed)
    simulated = Site("root/c0", tmp_path, LeafWorker("root/c0", local.clients["root/c0"], leaf))
    of_seed = model(simulated.answer(asked))
    for one, other in [(found[0], found[1]), (found[0], of_seed), (found[1], of_seed)]:
        assert all((one[name] != other[name]).float().mean() > 0.9 for name in one)


def test_without_noise_a_private_node_is_the_local_engines_bit_for_bit(tmp_path) -> None:
    """So noise is all that the secret changes."""
    local = private("update", noise=0.0, clip=1e-3)
    found, expected = deployed(local, tmp_path), private("update", noise=0.0, clip=1e-3)
    rounds(found)
    run(expected)
    assert same(found.state().group("model"), expected.state().group("model"))
    assert counted(tmp_path, local).number == 3


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_spent_is_told_as_on_the_local_engine(unit, tmp_path) -> None:
    local = private(unit)
    after = rounds(deployed(local, tmp_path))
    before = run(private(unit))
    for mine, theirs in zip(after, before, strict=True):
        told = [result.scores["root/c0"]["state"]["epsilon"] for result in (mine, theirs)]
        assert told[0] == pytest.approx(told[1])
        assert "epsilon" not in mine.scores["root/c1"]["state"]
        visits = {visit.path: visit for visit in mine.visits}
        assert visits["root/c0"].metrics == {}  # no loss of private training
        assert visits["root/c1"].metrics


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_is_spent_by_what_left_the_node_and_not_by_what_was_kept(unit, tmp_path) -> None:
    """Three rounds fit; the second is late and undone, so the fourth does not any more."""
    limit = epsilon(Privacy(unit=unit), 7, 3, 3 * STEPS[unit]) + 1e-6
    local = private(unit, epsilon=limit)
    found = deployed(local, tmp_path)
    assert isinstance(found.post, Direct)
    found.post.spoil["root/c0", 2] = late
    results = rounds(found, 4)
    visits = [{visit.path: visit for visit in result.visits}["root/c0"] for result in results]
    assert [visit.fate for visit in visits] == ["ok", "late", "ok", "spent"]
    assert (visits[3].up, "budget" in visits[3].error) == (0, True)
    assert [visit.fate for visit in results[3].visits[1:]] == ["ok", "ok"]
    told = results[3].scores["root/c0"]["state"]["epsilon"]
    assert told == pytest.approx((limit - 1e-6, 1.0))
    assert counted(tmp_path, local).number == 3
    # A run of another name has the budget of this one, which is of the node.
    site = found.post.sites["root/c0"]
    again = site.answer(replace(ASKED, run="another", body=down(local)))
    assert again.metrics == {"spent": (1.0, 1.0)}
    assert again.body == b""


def test_a_kill_on_the_way_counts_what_was_not_sent(tmp_path, monkeypatch) -> None:
    """Between the count and the answer: one too many, never one too few."""
    local = private("update")
    site, asked = site_of(local, tmp_path), replace(ASKED, body=down(local))

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeafWorker, "train", _then(LeafWorker.train, killed))
        with pytest.raises(KeyboardInterrupt):
            site.answer(asked)
    assert counted(tmp_path, local).number == 1
    assert site_of(local, tmp_path).answer(asked).status == "ok"
    assert counted(tmp_path, local).number == 2


def _then(first: Any, second: Any) -> Any:
    def both(*arguments: Any) -> Any:
        first(*arguments)
        return second(*arguments)

    return both


def test_what_is_not_counted_is_not_let_out(tmp_path) -> None:
    """Whoever trains a private node of a deployment past the count is stopped."""
    local = private("update")
    site_of(local, tmp_path)
    setup = replace(local.setup, releases=counted(tmp_path, local))
    leaf = Leaf(local.method, setup, local.seed)
    (job,) = (job for job in local.jobs(1) if job.path == "root/c0")
    node = leaf.node(job)
    state = local.method.receive(node, job.state, job.down)
    with pytest.raises(RuntimeError, match="not counted"):
        leaf.end(node, job, state, local.method.begin(node, state))


@pytest.mark.parametrize("unit", UNITS)
def test_an_inner_node_with_data_counts_the_rounds_it_does(unit, tmp_path) -> None:
    """The root trains beside its clients. Its server is killed in round 1, and does it again."""
    data = next(reversed(clients(4).values()))
    limit = epsilon(Privacy(unit=unit), 7, 3, 3 * STEPS[unit]) + 1e-6
    local = private(unit, ROOT, epsilon=limit)
    privacy = local.setup.rules[ROOT].privacy
    assert privacy is not None

    def server() -> RemoteEngine:
        made = deployed(local, tmp_path)
        own = Releases(tmp_path / "releases.json", privacy)
        made.setup, made.data = replace(made.setup, releases=own), {ROOT: data}
        made.samples = {**local.samples, ROOT: data.count("train")}
        return made

    lost, again = server(), server()
    lost.round(1)
    again.round(1)  # its clients answer from what they kept
    before, after = (made.state().group("model") for made in (lost, again))
    assert all((before[name] != after[name]).float().mean() > 0.9 for name in before)
    assert Releases(tmp_path / "releases.json", privacy).number == 2
    results = [again.round(number) for number in (2, 3)]
    visits = [{visit.path: visit for visit in result.visits}[ROOT] for result in results]
    assert [visit.fate for visit in visits] == ["ok", "spent"]
    assert "budget" in visits[1].error
    assert results[1].scores[ROOT]["state"]["epsilon"][0] == pytest.approx(limit - 1e-6)
    assert Releases(tmp_path / "releases.json", privacy).number == 3
