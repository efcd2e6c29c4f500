"""Controls choose other entries than FedSelect, and no others do they differ in."""

import pytest
import torch

from hansa.errors import InputError
from hansa.federation.methods import FedSelect, HeadMask, LeastChange, RandomMask
from hansa.federation.methods.fedselect import FedSelect as Base
from support import engine, everything, net, run, same

OPTIONS = {"rate": 0.2, "limit": 0.5}


@pytest.mark.parametrize("kind", [RandomMask, LeastChange])
def test_masks_are_of_equal_size_at_every_moment(kind: type[Base]) -> None:
    ours, control = engine(FedSelect(**OPTIONS)), engine(kind(**OPTIONS))
    with ours, control:
        for number in range(1, 5):
            ours.round(number), control.round(number)
            for path in ours.tree.leaves():
                first, second = (e.state(path).group("next") for e in (ours, control))
                assert {n: int(m.sum()) for n, m in first.items()} == {
                    n: int(m.sum()) for n, m in second.items()
                }
                assert not same(first, second)


def test_least_change_takes_the_entries_that_moved_least() -> None:
    method = LeastChange(rate=0.5, limit=1.0)
    node = engine(method).node("root", 1)
    moved = {"w": torch.tensor([0.4, 0.0, 0.3, 0.1])}
    empty = {"w": torch.zeros(4, dtype=torch.bool)}
    chosen = method.promote(empty, method.rank(node, moved), 0.5)
    assert chosen["w"].tolist() == [False, True, False, True]


def test_random_masks_differ_between_clients_rounds_and_seeds_and_are_reproducible() -> None:
    first, second = engine(RandomMask(**OPTIONS)), engine(RandomMask(**OPTIONS))
    assert everything(first, run(first)) == everything(second, run(second))
    one, other = (first.state(f"root/c{k}").group("next") for k in (0, 1))
    assert not same(one, other)
    moved = {"w": torch.zeros(50)}
    method, node = RandomMask(), first.node("root/c0", 1)
    later = first.node("root/c0", 2)
    assert same(method.rank(node, moved), method.rank(node, moved))
    assert not same(method.rank(node, moved), method.rank(later, moved))


def test_a_head_mask_never_changes_and_its_body_is_shared_from_the_first_round() -> None:
    federation = engine(HeadMask())
    results = run(federation, 3)
    for path in federation.tree.leaves():
        for name, held in federation.state(path).group("mask").items():
            assert bool(held.all()) == bool(held.any()) == name.startswith("head")
    root = federation.state().group("model")
    assert torch.equal(root["head.weight"], federation.setup.task.params["head.weight"])
    sizes = [visit.down for visit in results[1].visits]
    body = 4 * sum(p.numel() for n, p in net().named_parameters() if n.startswith("body"))
    assert all(body < size < body + 600 for size in sizes)


def test_a_head_mask_by_patterns() -> None:
    federation = engine(HeadMask(personal=("*.bias",)))
    run(federation, 1)
    held = federation.state("root/c0").group("mask")
    assert {name for name, mask in held.items() if mask.all()} == {"body.bias", "head.bias"}
    with pytest.raises(InputError, match=r"method.personal: found 'tail.\*'"):
        engine(HeadMask(personal=("tail.*",)))
    with pytest.raises(InputError, match=r"method.mode: found 'workshop'"):
        engine(HeadMask(mode="workshop"))
