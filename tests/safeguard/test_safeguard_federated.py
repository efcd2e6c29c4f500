import copy
import json

import pytest
import torch
from test_safeguard_stage import PHASE, TAMPER, world
from tiny_world import WORLD, tiny

from hansa.bundle import read_bundle
from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.tree import Tree
from hansa.federation.wire import decode, encode
from hansa.models.build import restore
from hansa.safeguard.adversaries import Adversary, draw
from hansa.safeguard.federated import Collector, Tamper
from hansa.safeguard.losses import entropy, next_token, run
from hansa.safeguard.models import load_model
from hansa.safeguard.phases.tar import TAR
from hansa.safeguard.rows import Rows, client_of
from hansa.safeguard.world import World
from hansa.safeguarding import safeguard
from hansa.seeding import derive, generator
from hansa.training import train

CLIENTS = World(WORLD.options.model_copy(update={"clients": 3})).clients()
SMALL = TAR(
    steps=3,
    inner_steps=4,
    every=2,
    batch_size=4,
    attack_batch_size=2,
    adversaries=(Adversary(lrs=(1e-3, 1e-2)),),
)


def by_hand(model, client, path, step):
    """One client's gradient, by a loop of its own."""
    walker = copy.deepcopy(model)
    drawn = draw(SMALL.adversaries, 4, derive(0, "attacker", path, step + 1))
    optimizer = torch.optim.AdamW(walker.parameters(), lr=drawn.lr, weight_decay=0.01)

    def batch(split, size, *purpose):
        inputs, _ = client.batch(split)
        rng = generator(0, split, path, step + 1, *purpose)
        return Rows.whole(inputs[torch.randint(0, len(inputs), (size,), generator=rng)])

    total = [torch.zeros_like(p) for p in walker.parameters()]
    held_out = batch("validation", 4)
    for k in range(4):
        optimizer.zero_grad()
        rows = batch("train", 2, k)
        next_token(run(walker, rows).logits, rows).backward()
        optimizer.step()
        if weight := SMALL.points().get(k):
            loss = -4 * weight * entropy(run(walker, held_out).logits, held_out)
            found = torch.autograd.grad(loss, list(walker.parameters()))
            total = [t + g for t, g in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize(
    "tree",
    [
        None,
        Tree({"hub": "root", "client-0": "hub", "client-1": "hub", "client-2": "root"}, "nodes"),
    ],
)
def test_the_root_gets_the_mean_of_the_clients_gradients(tree):
    model = tiny()
    collector = Collector(CLIENTS, model, 0, tree)
    found, told = collector.collect(SMALL, model, 1)
    paths = {name: f"root/{name}" for name in CLIENTS}
    if tree is not None:
        paths |= {"client-0": "root/hub/client-0", "client-1": "root/hub/client-1"}
    each = [by_hand(model, client, paths[name], 1) for name, client in CLIENTS.items()]
    for got, *mine in zip(found, *each, strict=True):
        torch.testing.assert_close(got, sum(mine) / 3, rtol=1e-4, atol=1e-6)
    assert set(told) == {"attack_first", "attack_last", "resist_first", "resist_last"}


def test_only_gradients_and_means_come_up(monkeypatch):
    """Every reply, as it is encoded: one group shaped as the model, one weight, four metrics."""
    sent = []
    original = Tamper.end

    def end(self, node, state, work):
        kept, message = original(self, node, state, work)
        sent.append((kept, decode(encode(message))))
        return kept, message

    monkeypatch.setattr(Tamper, "end", end)
    model = tiny()
    Collector(CLIENTS, model, 0).collect(SMALL, model, 0)
    assert len(sent) == 3
    shapes = {f"model.{name}": p.shape for name, p in model.named_parameters()}
    for kept, message in sent:
        assert not kept.groups
        assert set(message.groups) == {"gradient"}
        assert {n: t.shape for n, t in message.groups["gradient"].items()} == shapes
        assert dict(message.scalars) == {"weight": 1.0}
        assert all(count == 1.0 for _, count in message.metrics.values())


def test_a_client_whose_attack_diverges_is_left_out():
    model = tiny()
    wild = SMALL.model_copy(update={"adversaries": (Adversary(lrs=(1e30,)),)})
    found, told = Collector(CLIENTS, model, 0).collect(wild, model, 0)
    assert told["diverged"] == 1.0
    assert found == []


def test_what_clients_cannot_do_is_refused():
    model = tiny()
    collector = Collector(CLIENTS, model, 0)
    switch = SMALL.model_copy(update={"adversaries": (Adversary(data="switch"),)})
    with pytest.raises(InputError, match=r"phases\.adversaries\.data"):
        collector.collect(switch, model, 0)
    with pytest.raises(InputError, match=r"phases\.loss"):
        collector.collect(SMALL.model_copy(update={"loss": "dpo"}), model, 0)
    rows = Rows.whole(torch.zeros(4, 14, dtype=torch.int64))
    empty = client_of(rows, rows[:0])
    assert isinstance(empty, Client)
    with pytest.raises(InputError, match="no text of ward"):
        Collector({"ward": empty}, model, 0)


def test_a_stage_with_clients_moves_the_model(tmp_path):
    values = world(tmp_path, controls={})
    values["data"]["clients"] = 2
    values["phases"][2] = {**TAMPER, "clients": True}
    made = safeguard(values)
    told = json.loads((made.path / "models.json").read_text())["roles"]
    before = read_bundle(made.path / told["before"])
    assert any(
        not torch.equal(value, made.bundle.weights[name]) for name, value in before.weights.items()
    )


def test_a_model_of_a_federation_with_adapters_is_safeguarded(tmp_path):
    """WorldLM's bundle, with LoRA: the adapters become part of the weights that are trained."""
    for name, seed in (("root", 3), ("leaf", 5), ("restricted", 7)):
        rng = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 10**6, (300,), generator=rng).tolist()
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, numbers)))
    run_ = train(
        {
            "name": "lm",
            "output": str(tmp_path),
            "rounds": 1,
            "text": {"context": 16, "validation": 0.0, "test": 0.1},
            "model": {
                "name": "llama",
                "options": {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "lora": {"r": 2},
                },
            },
            "training": {"batch_size": 4, "steps": 2, "lr": 0.1},
            "method": {"name": "fedavg"},
            "nodes": {
                name: {"text": f"file:{tmp_path}/{text}.txt"}
                for name, text in (("a", "root"), ("b", "leaf"))
            },
        }
    )
    bundle = run_.path / "bundle"
    made = safeguard(
        {
            "name": "safe",
            "output": str(tmp_path),
            "model": {"path": str(bundle)},
            "data": {
                "kind": "texts",
                "retain": f"file:{tmp_path}/root.txt",
                "restricted": f"file:{tmp_path}/restricted.txt",
                "context": 16,
            },
            "phases": [{"kind": "random_mapping", **PHASE}, TAMPER],
        }
    )
    assert not any("lora" in name for name in made.bundle.weights)
    assert made.bundle.lineage[0]["digest"] == read_bundle(bundle).digest
    start = load_model(str(bundle), 16).model
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    torch.testing.assert_close(
        start(tokens).logits, restore(read_bundle(bundle))(tokens), rtol=1e-4, atol=1e-5
    )
