"""Privacy in a deployment: who is told of it, what stands where, and what is refused."""

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hansa.deploy.charter import Charter
from hansa.deploy.holding import Holding
from hansa.deploy.layout import init, write_app
from hansa.deploy.member import ClientSite
from hansa.deploy.options import read_deployment
from hansa.deploy.party import Party
from hansa.deploy.supervisor import Supervisor
from hansa.errors import InputError
from hansa.federation.engines.flower.exchange import Request
from hansa.federation.engines.flower.site import decoded, encoded
from hansa.federation.privacy import Privacy, epsilon
from hansa.federation.tree import ROOT

NORTH, OWN = {"noise": 0.9, "epsilon": 8.0}, {"unit": "update", "noise": 4.0}
DEPLOY: dict[str, Any] = {
    "federations": {"north": {"privacy": NORTH}},
    "parties": {
        "client-0": {"federation": "north"},
        "client-1": {"federation": "north", "privacy": OWN},
        "client-2": {},
    },
}


def described(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "name": "study",
        "data": {"clients": 3, "train_per_class": 2},
        "model": {"options": {"hidden": [4]}},
        "training": {"batch_size": 2},
        "deploy": DEPLOY,
        **changes,
    }
    path = folder / "description.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def test_each_party_is_as_private_as_its_federation_or_itself_wants(tmp_path) -> None:
    made = tmp_path / "made"
    folders = init(read_deployment(described(tmp_path)), made)
    found = {}
    for folder in folders:
        rules = Holding.of(Party.read(folder), folder).rules
        found[folder.name] = rules.privacy
        assert not list(folder.rglob("releases.json"))  # a secret that others made would be none
    assert found == {
        "root": None,
        "north": None,  # its server has nothing to train on
        "client-0": Privacy(**NORTH),  # type: ignore[arg-type]
        "client-1": Privacy(**OWN),  # type: ignore[arg-type]
        "client-2": None,
    }
    for settings in made.glob("*/app/federation.toml"):
        assert not any(word in settings.read_text() for word in ("privacy", "0.9\n", "releases"))


@pytest.mark.parametrize(("name", "steps"), [("client-0", 10), ("client-1", 1)])
def test_a_private_client_trains_with_a_secret_of_its_own(name, steps, tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(described(tmp_path)), made)
    folder, charter = made / name, Charter.read(made / "north" / "app" / "federation.toml")
    party = Party.read(folder)
    Supervisor(folder).check()
    secret = folder / "state" / "releases.json"
    before = secret.read_text()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    site = ClientSite(charter, Holding.of(party, folder))
    config = charter.config
    start = encoded(_down(charter))
    answers = [
        site.answer(Request("train", "r", party.path, number, number - 1, start))
        for number in (1, 2)
    ]
    assert [answer.status for answer in answers] == ["ok", "ok"]
    assert all(answer.metrics == {} for answer in answers)
    assert decoded(answers[0].body).groups.keys() == {"model"}
    scored = site.answer(Request("score", "r", party.path, 2, 2, start))
    privacy = Holding.of(party, folder).rules.privacy
    assert privacy is not None
    samples = int(site.answer(Request("hello", "r", "")).facts["samples"])
    num = steps if steps == 1 else config.training.batches(samples) * config.training.epochs
    wanted = epsilon(privacy, samples, 2, 2 * num)
    assert scored.metrics["state/epsilon"] == pytest.approx((wanted, 1.0))
    assert secret.read_text() != before
    assert tomllib.loads((folder / "party.toml").read_text())["rules"]["privacy"]


def _down(charter: Charter) -> Any:
    from hansa.federation.message import State
    from hansa.federation.node import Child, Node

    method, setup = charter.config.method, charter.setup
    state = method.start_root(Node(ROOT, 0, 0, setup))
    ((_, sent),) = method.dispatch(Node(ROOT, 1, 0, setup, 1), state, [Child("x", State())])
    return sent


def deploy(**changes: Any) -> dict[str, Any]:
    return {"deploy": {**DEPLOY, **changes}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no noise": (
        deploy(parties={**DEPLOY["parties"], "client-2": {"privacy": {"noise": -1.0}}}),
        "deploy.parties.client-2.privacy.noise",
    ),
    "a unit of another name": (
        deploy(federations={"north": {"privacy": {"unit": "user"}}}),
        "deploy.federations.north.privacy.unit",
    ),
    "a key of another name": (deploy(privacy={"sigma": 1.0}), "deploy.privacy.sigma"),
    "a budget without noise": (
        deploy(privacy={"noise": 0.0, "epsilon": 1.0}),
        "deploy.privacy",
    ),
    "a method whose looks nobody counts": (
        {"method": {"name": "fedprox"}},
        "deploy.parties.client-0.privacy",
    ),
    "layers that mix samples": (
        {"model": {"name": "resnet20", "options": {"norm": "batch"}}},
        "privacy",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_privacy_that_cannot_be_kept_is_refused_before_anything_is_written(case, tmp_path) -> None:
    changes, key = WRONG[case]
    with pytest.raises(InputError) as caught:
        init(read_deployment(described(tmp_path, **changes)), tmp_path / "made")
    assert caught.value.key == key
    assert not (tmp_path / "made").exists()


def test_an_app_to_simulate_has_no_private_nodes(tmp_path) -> None:
    with pytest.raises(InputError, match="to simulate") as caught:
        write_app(read_deployment(described(tmp_path)), tmp_path / "app")
    assert caught.value.key == "deploy.federations.north.privacy"


def test_what_an_owner_writes_wrongly_is_said_at_the_start_of_the_party(tmp_path) -> None:
    made = tmp_path / "made"
    init(read_deployment(described(tmp_path)), made)
    folder = made / "client-1"
    whole = tomllib.loads((folder / "party.toml").read_text())
    for privacy, word in (
        ({"noise": "much"}, r"rules\.privacy\.noise"),
        ({"noise": 0.0, "epsilon": 3.0}, r"rules\.privacy"),
    ):
        wrong = {**whole, "rules": {"privacy": privacy}}
        (folder / "party.toml").write_text(tomli_w.dumps(wrong))
        with pytest.raises(InputError, match=word):
            Supervisor(folder).check()
    (folder / "party.toml").write_text(tomli_w.dumps(whole))
    Supervisor(folder).check()
    (folder / "state" / "releases.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Supervisor(folder).check()
