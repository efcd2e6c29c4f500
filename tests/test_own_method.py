"""A method that stands in one file of a user's own, as the documentation has it."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import ROOT, blocks, files
from hansa.bundle import read_bundle
from hansa.config import difference, load
from hansa.errors import InputError
from hansa.federation.compiled import fill, masked, trace
from hansa.federation.engines.plan import Plan
from hansa.federation.message import Message, State
from hansa.federation.methods import METHODS, FedAvg, Method, method_class, named
from hansa.federation.node import Node, Reply
from hansa.runs import Run
from hansa.training import train
from support import CLASSES, FEATURES, Row, engine, in_turn, net, same

PAGE = ROOT / "docs" / "howto" / "own-method.md"
HANSA = str(Path(sys.executable).with_name("hansa"))
LESS = ["rounds=2", "data.train_per_class=3", "model.options.hidden=[8]"]

USER = """
from typing import ClassVar
from hansa import FedAvg, Method

NUMBER = 3

class Nameless(FedAvg):
    pass

class Same(FedAvg):
    name: ClassVar[str] = "fedavg"

class Half(Method):
    name: ClassVar[str] = "half"

class Whole(FedAvg):
    name: ClassVar[str] = "whole"
    strength: float = 1.0

class Outer:
    class Inner(FedAvg):
        name: ClassVar[str] = "inner"

raised = 1 / NUMBER
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with the page's files and a module ``user_methods`` in it."""
    for name, text in {**files(PAGE), "user_methods.py": USER}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("forgiving", "user_methods"):
        sys.modules.pop(name, None)


def test_the_file_of_the_page_is_short() -> None:
    assert files(PAGE)["forgiving.py"].count("\n") < 60


def test_every_engine_here_trains_it(folder: Path) -> None:
    """In this process, in others, one client at a time and several at once."""
    weights = {}
    plans: dict[str, list[str]] = {
        "alone": ["engine.kind='sequential'", "engine.workers=1"],
        "workers": ["engine.kind='sequential'", "engine.workers=2"],
        "stacked": ["engine.kind='stacked'", "engine.workers=1"],
    }
    for name, plan in plans.items():
        run = train("forgiving.toml", overrides=[*LESS, *plan, f"name='{name}'"])
        assert "one at a time" not in (run.path / "log.txt").read_text()
        assert run.config.method.name == "median"
        assert run.history.table("rounds")["engine"].to_pylist()[0].startswith(plan[0][13:20])
        weights[name] = read_bundle(run.path / "bundle").weights
    assert same(weights["alone"], weights["workers"])
    for name, tensor in weights["alone"].items():
        torch.testing.assert_close(weights["stacked"][name], tensor)


@pytest.mark.slow(25)
def test_flower_trains_it_with_the_same_bits(folder: Path) -> None:
    """By the real command, in processes that find the file in the current folder."""
    less = [part for text in LESS for part in ("--set", text)]
    here = [*less, "--set", "engine.kind=sequential", "--set", "name=here"]
    with in_turn(1):
        for options in (here, [*less, "--engine", "flower", "--set", "name=flower"]):
            command = [HANSA, "train", "forgiving.toml", *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    local, flower = (Run(folder / "runs" / f"{name}-seed0") for name in ("here", "flower"))
    assert flower.history.table("rounds")["engine"].to_pylist() == ["Flower, simulated"] * 2
    for table in ("ledger", "scores"):
        assert flower.history.table(table).equals(local.history.table(table)), table
    weights, expected = (read_bundle(run.path / "bundle").weights for run in (flower, local))
    assert same(weights, expected)


def test_the_pages_python_runs(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(folder)  # where Python looks when it is started there
    (code,) = blocks(PAGE, "python")
    exec(code, {})  # noqa: S102
    assert 0 < float(capsys.readouterr().out) < 1


def test_its_server_takes_medians_and_its_clients_stay_near(folder: Path) -> None:
    """By hand: two parameters, three replies of which one is broken; a step of length 5."""
    method = method_class("forgiving:Median").model_validate({"radius": 2.0})
    setup = engine(method, model=Row(2)).setup
    node = Node("root", 1, 0, setup)
    sent = [[1.0, 9.0], [2.0, 8.0], [1e9, -1e9]]
    replies = [
        Reply(f"root/{n}", State(), Message({"model": {"w": torch.tensor(w)}}, {"weight": 1}))
        for n, w in enumerate(sent)
    ]
    merged = method.aggregate(node, method.start_root(node), replies)
    assert merged.group("model")["w"].tolist() == [2.0, 8.0]
    assert merged.number("weight") == 3
    assert method.aggregate(node, merged, []).group("model") == merged.group("model")

    work = method.begin(Node("root/0", 1, 4, setup), State({"model": {"w": torch.zeros(2)}}))
    away = {**work, "params": {"w": torch.tensor([30.0, 40.0])}}
    batch = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    after = method.step(setup, away, batch, "train")["params"]["w"]
    torch.testing.assert_close(after, torch.tensor([1.2, 1.6]))
    near = {**work, "params": {"w": torch.tensor([0.3, 0.4])}}
    assert method.step(setup, near, batch, "train")["params"]["w"].tolist() == pytest.approx(
        [0.3, 0.4]
    )


def test_its_step_becomes_a_graph_that_can_be_compiled(folder: Path) -> None:
    """Whole: no way back to Python, and the step's own numbers (compiling: test_compiled.py)."""
    method = method_class("forgiving:Median").model_validate({"radius": 0.1})
    federation = engine(method, model=net(), plan=Plan("stacked", 3))
    federation.use(federation.plan)
    setup = federation.stack.prepare(next(iter(federation.clients.values())))
    works = []
    for seed in range(3):
        torch.manual_seed(seed)
        params = {n: p + 0.3 * torch.randn_like(p) for n, p in setup.task.params.items()}
        start = {"model": dict(setup.task.params), "buffers": {}}
        works.append({**method.begin(Node("root/0", 1, 6, setup), State(start)), "params": params})
    stacked = {
        group: {n: torch.stack([work[group][n] for work in works]) for n in works[0][group]}
        for group in works[0]
    }
    step = masked(lambda work, batch: method.step(setup, work, batch, "train"))
    inputs, labels = torch.randn(3, 4, FEATURES), torch.randint(CLASSES, (3, 4))
    filled = fill((inputs, labels), 3, 4)
    after, traced = step(stacked, filled), trace(step, stacked, filled)
    told = traced.graph(*traced.inputs)
    assert {traced.names[place][0] for place in traced.changed} >= {"params"}
    for place, tensor in zip(traced.changed, told, strict=True):
        group, name = traced.names[place]
        torch.testing.assert_close(tensor, after[group][name])


def test_a_configuration_reads_back_equal(folder: Path) -> None:
    config = load({"method": {"name": "user_methods:Whole", "strength": 0.5}})
    assert config.method.name == "whole"
    again = load(config.as_dict())
    assert again == config
    assert difference(config, again) == []
    assert config.as_dict()["method"]["name"] == "user_methods:Whole"
    inner = load({"method": {"name": "user_methods:Outer.Inner"}})
    assert named(inner.method) == "user_methods:Outer.Inner"


@pytest.mark.parametrize("name", METHODS)
def test_built_in_methods_keep_their_names(name: str) -> None:
    assert method_class(name) is METHODS[name]
    assert named(METHODS[name]()) == name


def test_a_class_on_a_built_in_one_is_not_taken_for_it() -> None:
    class Other(FedAvg):
        pass

    assert named(Other()).endswith("Other")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("no_such_module:Median", "'no_such_module:Median' (No module named 'no_such_module')"),
        ("user_methods:Nothing", "'user_methods:Nothing' (module 'user_methods' has no attribute"),
        ("user_methods:NUMBER", "'user_methods:NUMBER', which cannot be called"),
        ("user_methods:Outer", "'user_methods:Outer', which is no method"),
        ("user_methods:Half", "'user_methods:Half', which lacks aggregate, begin, dispatch, end"),
        ("user_methods:Nameless", "'user_methods:Nameless' with no name of its own"),
        ("user_methods:Same", "'user_methods:Same' with the name 'fedavg'"),
        ("user_methods:", "'user_methods:'; allowed: local, fedavg,"),
        (3, "3; allowed: local, fedavg,"),
    ],
)
def test_what_is_no_method_is_refused(folder: Path, name: Any, found: str) -> None:
    with pytest.raises(InputError) as caught:
        load({"method": {"name": name}})
    assert str(caught.value).startswith(f"method.name: found {found}")


def test_wrong_options_of_a_users_method_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"method\.radius: found -1"):
        load("forgiving.toml", ["method.radius=-1"])
    with pytest.raises(InputError, match=r"method\.radios: found an unknown key.*radius"):
        load("forgiving.toml", ["method.radios=1"])


def test_a_module_that_fails_is_named_with_its_error(folder: Path) -> None:
    Path("broken_methods.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match=r"'broken_methods:M' \(division by zero\)"):
        load({"method": {"name": "broken_methods:M"}})


def test_the_contract_is_abstract() -> None:
    assert Method.__abstractmethods__ == {
        *("start_root", "receive", "begin", "end", "dispatch", "aggregate", "reply")
    }
