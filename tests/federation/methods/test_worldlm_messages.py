"""WorldLM: what its messages hold, and who starts from what."""

import pytest
import torch

from hansa.federation.message import Message, State
from hansa.federation.methods import FedAvg, WorldLM
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from worldlm_tree import (
    CANARY,
    CONTEXT,
    EVERY,
    KEYS,
    LEAVES,
    TRAIN,
    TREE,
    Watched,
    backbone,
    client,
    federation,
    keys,
    paths,
    texts,
    tiny,
)


@pytest.mark.parametrize("names", [LEAVES, EVERY], ids=["leaves", "every"])
def test_siblings_start_from_one_backbone_and_key_blocks_of_their_own(
    watched: type[Watched], names: tuple[str, ...]
) -> None:
    federation(watched(temperature=0.01), names).run(3)
    for number in (1, 2, 3):
        start = {path: params for n, path, params in watched.starts if n == number}
        parts = {
            parent: {backbone(start[child]) for child in TREE.children(parent)}
            for parent in TREE.children(ROOT)
        }
        assert all(len(part) == 1 for part in parts.values())
        # With data between, federations start apart; without, all start alike.
        assert len(set().union(*parts.values())) == (1 if names == LEAVES else 2)
        if number > 1:
            own = {keys(start[path]) for path in TREE.leaves()}
            assert len(own) == len(LEAVES)


def test_messages_hold_model_key_blocks_and_residuals_and_nothing_else(
    crossed: list[Message],
) -> None:
    """No moments, of a node's optimizer or of a server's, nor what was noted."""
    server = ServerOptimizer(kind="nesterov", lr=0.7, momentum=0.9)
    made = federation(
        WorldLM(server=server, threshold=0.9999), training={"optimizer": "adamw", "lr": 0.01}
    )
    made.run(4)
    assert "server.momentum" in made.state_of("A").groups
    names = set(tiny().state_dict())
    groups = {group for message in crossed for group in message.groups}
    assert {"model", "keys", "residual.0"} <= groups
    assert all(g in ("model", "keys") or g.startswith("residual.") for g in groups)
    for message in crossed:
        assert message.group("model").keys() | message.group("keys").keys() == names
        scalars = {key.partition("|")[0].partition(".")[0] for key in message.scalars}
        assert scalars <= {"weight", "took", "residual"}
        assert message.metrics.keys() <= {"loss", "accuracy"}


def test_no_text_is_in_any_message(crossed: list[Message]) -> None:
    """Looked for as text and as token numbers of any width."""
    data = texts(EVERY)
    tokens = torch.tensor(list(CANARY.encode()))
    sung = tokens.repeat(9)[: (TRAIN + 5) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    data["a1"] = client(sung)
    federation(WorldLM(threshold=0.9999), data=data).run(3)
    sent = [encode(message) for message in crossed if message]
    assert len(sent) > 20
    part = tokens[:CONTEXT]
    wanted = [
        part.to(dtype).numpy().tobytes()
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32)
    ]
    assert wanted[0] == CANARY[:CONTEXT].encode()
    held = encode(State({"x": {"inputs": data["a1"].inputs}}))
    assert wanted[2] in held  # it would be found
    assert not any(word in message for word in wanted for message in sent)


def test_key_blocks_that_stay_are_in_no_message(crossed: list[Message]) -> None:
    federation(WorldLM(share_keys=False)).run(2)
    assert all(not KEYS & tensors.keys() for m in crossed for tensors in m.groups.values())


# Stages.


def test_levels_train_from_the_top_down_and_each_from_what_stands_above(
    watched: type[Watched],
) -> None:
    federation(watched()).run(2)
    for number in (1, 2):
        order = [path for n, path, _ in watched.starts if n == number]
        assert sorted(order) == sorted(TREE.walk())
        start = {path: params for n, path, params in watched.starts if n == number}
        for path in order:
            above = [up for up in paths(path) if up != path]
            assert all(order.index(up) < order.index(path) for up in above)
            if above:
                trained = watched.ends[number, above[0]]
                assert backbone(start[path]) == backbone(trained)


def test_parallel_nodes_all_train_from_what_they_received(watched: type[Watched]) -> None:
    made = federation(watched(schedule="parallel"))
    before = tiny().state_dict()
    for number in (1, 2):
        watched.starts.clear()
        for _ in made.rounds(number, number):
            pass
        start = {backbone(params) for _, _, params in watched.starts}
        assert start == {backbone(before)}
        before = made.state_of(ROOT).group("model")  # type: ignore[assignment]


def test_a_node_that_trains_beside_its_children_counts_as_one_of_them() -> None:
    """Backbones: the root's mean of a flat tree is over itself and its leaves, by samples."""
    tree, names = Tree.flat(LEAVES), (ROOT, *LEAVES)
    ours, theirs = (
        federation(method, names, tree=tree)
        for method in (WorldLM(schedule="parallel", residuals=False), FedAvg())
    )
    ours.run(1)
    theirs.run(1)
    first, second = ours.model_of(ROOT).state_dict(), theirs.model_of(ROOT).state_dict()
    assert all(first[n].equal(second[n]) for n in first if n not in KEYS)
