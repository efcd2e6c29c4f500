"""Flower's own simulation, with Ray between: the bits of the local engine."""

import logging
from typing import Any

import pytest
import tomli_w

from hansa import Federation, Training
from hansa.bundle import read_bundle
from hansa.deploy.layout import write_app
from hansa.deploy.options import read_deployment
from hansa.federation.engines.flower.grid import GridPost
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.methods import FedSelect, Method, ZeroFL
from hansa.federation.participation import Participation
from hansa.federation.tree import name_of
from hansa.flower import apps
from hansa.runs import Run
from hansa.training import train
from support import clients, config, in_turn, net, same

pytestmark = pytest.mark.filterwarnings("ignore")  # what Flower and Ray warn of is theirs


def _name(method: Method) -> str:
    return method.name


def test_a_generated_app_gives_the_local_engines_bits(tmp_path) -> None:
    """FedAvg over two federations, which the app's one server walks by itself."""
    from flwr.simulation import run_simulation

    values = {**config(tmp_path), "rounds": 3, "method": {"name": "fedavg"}}
    del values["participation"]
    values["tree"] = {"federations": 2}
    local = train({**values, "engine": {"kind": "sequential", "workers": 1}})
    path = tmp_path / "description.toml"
    path.write_text(tomli_w.dumps(values))
    assert write_app(read_deployment(path), tmp_path / "app") == 4
    made = apps(tmp_path / "app" / "federation.toml")
    options = {"init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}}
    with in_turn(1):
        run_simulation(made.server, made.client, 4, backend_config=options)
    run = Run(tmp_path / "app" / "results" / "runs" / local.path.name)
    assert run.history.table("ledger").equals(local.history.table("ledger"))
    assert run.history.table("scores").equals(local.history.table("scores"))
    weights, expected = (read_bundle(each.path / "bundle").weights for each in (run, local))
    assert same(weights, expected)


@pytest.mark.parametrize("method", [FedSelect(rate=0.2), ZeroFL(sparse=("*",))], ids=_name)
def test_flowers_simulation_gives_the_local_engines_bits(method: Method) -> None:
    """FedSelect and ZeroFL; WorldLM stands in ``test_worldlm.py``."""
    data = clients(4)

    def federation(kind: Any) -> Federation:
        return Federation(
            net(),
            data,
            method,
            Training(lr=0.1, batch_size=3, epochs=2),
            participation=Participation(failure_rate=0.2),
            engine=EngineOptions(kind=kind, workers=1),
        )

    local, flower = federation("sequential"), federation("flower")
    expected = local.run(3)
    with in_turn(1):
        found = flower.run(3)
    for table in ("ledger", "scores", "pairs"):
        assert found.table(table).equals(expected.table(table)), table
    assert found.table("rounds")["engine"].to_pylist() == ["Flower, simulated"] * 3
    for name in ("root", *data):
        assert same(flower.model_of(name).state_dict(), local.model_of(name).state_dict())
        assert same(flower.masks_of(name), local.masks_of(name))


class Node:
    def __init__(self, node_id: int, key: bytes, since: str = "1") -> None:
        self.node_id, self.public_key, self.last_activated_at = node_id, key, since


class Silent:
    """A Grid with nodes that never say anything."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def get_nodes(self) -> list[Node]:
        return self.nodes


def test_a_node_is_who_its_key_says_and_nobody_twice(caplog) -> None:
    """Claims are checked against keys, paths and each other; greetings are no claims yet."""
    caplog.set_level(logging.INFO)
    keys = {b"a": "root/a", b"b": "root/b"}
    post = GridPost(Silent([]), "r", keys.values(), keys=keys)  # type: ignore[arg-type]
    assert post._objection(b"a", "root/a") == ""
    assert "key" in post._objection(b"a", "root/b")
    assert "key" in post._objection(b"x", "root/a")
    free = GridPost(Silent([]), "r", None)  # type: ignore[arg-type]
    assert free._objection(b"", "root/ward-1") == ""
    for path in ("root", "root/a/b", "root/a b", "root/root", "root/", "a", ""):
        assert "no part" in free._objection(b"", path), path
    assert name_of("root/a") == "a"
