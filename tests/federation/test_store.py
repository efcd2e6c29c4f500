import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import InputError
from hansa.federation.message import State
from hansa.federation.store import DiskStore, MemoryStore, Store, link_key
from hansa.federation.wire import encode, encoded_size

KEYS = [
    "root",
    "root/a",
    "root/a/b",
    link_key("root", "root/a"),
    link_key("root/a", "root/a/b"),
    "root/n.msg",
    "root/00000001.msg",
]


def state(value: float, size: int = 4) -> State:
    return State({"model": {"w": torch.full((size,), float(value))}}, {"weight": value})


def value(store: Store, key: str) -> float | None:
    found = store.get(key)
    return found.group("model")["w"][0].item() if found else None


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["memory", "disk", "disk without cache"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return DiskStore(tmp_path, cache_bytes=0 if "without" in request.param else 1 << 30)


def test_a_key_that_was_never_put_has_an_empty_state(store: Store) -> None:
    assert not store.get("root/a")


def test_the_newest_state_is_returned_before_and_after_commits(store: Store) -> None:
    store.put("root", state(1))
    assert value(store, "root") == 1
    store.put("root", state(2))
    assert value(store, "root") == 2
    store.commit(1)
    assert value(store, "root") == 2
    store.put("root", state(3))
    assert value(store, "root") == 3


def test_an_empty_state_removes_what_was_there(store: Store) -> None:
    store.put("root", state(1))
    store.commit(1)
    store.put("root", State())
    assert not store.get("root")
    store.commit(2)
    assert not store.get("root")


def test_keys_do_not_collide(store: Store) -> None:
    for number, key in enumerate(KEYS):
        store.put(key, state(number))
    assert [value(store, key) for key in KEYS] == [0, 1, 2, 3, 4, 5, 6]


def test_a_link_is_named_by_both_its_ends() -> None:
    assert link_key("root/a", "root/a/b") == "root/a@root/a/b"
    assert link_key("root/a", "root/b") != link_key("root/b", "root/a")


STATES = st.builds(state, st.integers(0, 9), st.sampled_from([1, 4, 40])) | st.just(State())
OPERATIONS = st.lists(
    st.tuples(st.just("put"), st.sampled_from(KEYS[:4]), STATES)
    | st.tuples(st.just("get"), st.sampled_from(KEYS[:4]), st.none())
    | st.tuples(st.sampled_from(["commit", "prune", "reopen"]), st.none(), st.none()),
    max_size=25,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(OPERATIONS, st.sampled_from([0, 200, 400, 1 << 30]))
def test_both_stores_give_the_same_answers_and_disk_goes_back_to_the_last_commit(
    operations: list[tuple[str, str, State | None]], cache_bytes: int
) -> None:
    memory, committed, round_ = MemoryStore(), dict[str, State](), 0
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskStore(Path(folder), cache_bytes=cache_bytes)
        for kind, key, put in operations:
            if put is not None:
                memory.put(key, put)
                disk.put(key, put)
            elif kind == "get":
                assert encode(disk.get(key)) == encode(memory.get(key))
            elif kind == "commit":
                round_ += 1
                memory.commit(round_)
                disk.commit(round_)
                committed = {key: memory.get(key) for key in KEYS}
            elif kind == "prune":
                disk.prune()
            else:
                disk, memory = DiskStore(Path(folder), round_, cache_bytes), MemoryStore()
                for kept, held in committed.items():
                    memory.put(kept, held)
        for key in KEYS:
            assert encode(disk.get(key)) == encode(memory.get(key))


def test_what_was_not_committed_is_gone_after_reopening(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.put("root/a", state(10))
    store.commit(1)
    store.put("root", state(2))
    store.put("root/b", state(20))
    again = DiskStore(tmp_path, committed=1)
    assert [value(again, key) for key in ("root", "root/a", "root/b")] == [1, 10, None]


def test_a_commit_that_was_never_recorded_is_gone_after_reopening(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.commit(1)
    assert value(DiskStore(tmp_path, committed=0), "root") is None
    assert files(tmp_path) == []


def test_half_a_file_of_an_uncommitted_round_is_no_harm(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.commit(1)
    store.put("root", state(2))
    (half,) = tmp_path.glob("*/00000002.msg")
    half.write_bytes(half.read_bytes()[:50])
    assert value(DiskStore(tmp_path, committed=1), "root") == 1


def test_reopening_goes_on_with_the_round_after_the_committed_one(tmp_path: Path) -> None:
    for number in range(1, 4):
        store = DiskStore(tmp_path, committed=number - 1)
        store.put("root", state(number))
        store.commit(number)
    assert files(tmp_path) == [f"root/0000000{number}.msg" for number in (1, 2, 3)]
    assert value(DiskStore(tmp_path, committed=3), "root") == 3
    assert value(DiskStore(tmp_path, committed=2), "root") == 2


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, committed=8, cache_bytes=0)
    for number in (9, 10, 100):
        store.put("root", state(number))
        store.commit(number)
    assert value(store, "root") == 100


def test_a_node_whose_name_ends_like_a_file_can_be_reopened(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for number, key in enumerate(KEYS):
        store.put(key, state(number))
    store.commit(1)
    again = DiskStore(tmp_path, committed=1)
    assert [value(again, key) for key in KEYS] == [0, 1, 2, 3, 4, 5, 6]


def test_links_deep_in_a_tree_of_long_names_have_a_place(tmp_path: Path) -> None:
    names = ["root", *(letter * 64 for letter in "abcd")]
    keys = [link_key("/".join(names[:4]), "/".join([*names[:4], last * 64])) for last in "de"]
    store = DiskStore(tmp_path, cache_bytes=0)
    for number, key in enumerate(keys):
        store.put(key, state(number))
    store.commit(1)
    assert [value(DiskStore(tmp_path, committed=1), key) for key in keys] == [0, 1]


def test_prune_keeps_only_the_newest_version_of_what_was_written(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.put("root/a", state(10))
    store.commit(1)
    store.prune()
    store.put("root", state(2))
    store.commit(2)
    assert files(tmp_path) == ["root+a/00000001.msg", "root/00000001.msg", "root/00000002.msg"]
    store.prune()
    assert files(tmp_path) == ["root+a/00000001.msg", "root/00000002.msg"]
    again = DiskStore(tmp_path, committed=2)
    assert [value(again, key) for key in ("root", "root/a")] == [2, 10]


def test_prune_removes_all_older_versions_at_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for number in (1, 2, 3):
        store.put("root", state(number))
        store.commit(number)
    store.prune()
    assert files(tmp_path) == ["root/00000003.msg"]


def test_prune_never_removes_the_committed_version_for_an_uncommitted_one(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.commit(1)
    store.put("root", state(2))
    store.prune()
    assert value(store, "root") == 2
    assert value(DiskStore(tmp_path, committed=1), "root") == 1


def damage(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*/*.msg"))
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    return paths


def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, cache_bytes=0)
    store.put("root/a", state(1))
    (path,) = damage(tmp_path)
    with pytest.raises(InputError, match=r"a damaged state .*checksum") as caught:
        store.get("root/a")
    assert caught.value.key == str(path)


@pytest.mark.parametrize("content", [b"", b"HANSAMSG", b"no message at all, but long enough"])
def test_a_file_that_is_no_message_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    store = DiskStore(tmp_path)
    store.put("root", state(1))
    store.commit(1)
    (path,) = tmp_path.glob("*/*.msg")
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        DiskStore(tmp_path, committed=1).get("root")
    assert caught.value.key == str(path)


def test_the_cache_holds_the_states_used_last_up_to_its_size(tmp_path: Path) -> None:
    size = encoded_size(state(1))
    store = DiskStore(tmp_path, cache_bytes=2 * size)
    store.put("a", state(1))
    store.put("b", state(2))
    assert value(store, "a") == 1
    store.put("c", state(3))
    damage(tmp_path)
    assert [value(store, "a"), value(store, "c")] == [1, 3]
    with pytest.raises(InputError):
        store.get("b")


def test_a_large_state_takes_the_place_of_as_many_small_ones_as_it_needs(tmp_path: Path) -> None:
    small, large = encoded_size(state(1)), encoded_size(state(3, 100))
    store = DiskStore(tmp_path, cache_bytes=small + large - 1)
    store.put("a", state(1))
    store.put("b", state(2))
    store.put("c", state(3, 100))
    damage(tmp_path)
    assert value(store, "c") == 3
    for key in "ab":
        with pytest.raises(InputError):
            store.get(key)


def test_putting_a_key_again_takes_room_in_the_cache_once(tmp_path: Path) -> None:
    size = encoded_size(state(1))
    store = DiskStore(tmp_path, cache_bytes=2 * size)
    store.put("a", state(1))
    for number in range(5):
        store.put("b", state(number))
    damage(tmp_path)
    assert [value(store, "a"), value(store, "b")] == [1, 4]


def test_what_was_read_from_disk_is_cached_too(tmp_path: Path) -> None:
    first = DiskStore(tmp_path)
    first.put("root", state(1))
    first.commit(1)
    store = DiskStore(tmp_path, committed=1)
    assert value(store, "root") == 1
    damage(tmp_path)
    assert value(store, "root") == 1


def test_a_state_holds_no_more_than_its_own_memory(tmp_path) -> None:
    stack = torch.arange(1000.0).reshape(10, 100)
    state = State({"model": {"w": stack[3]}})
    for store in (MemoryStore(), DiskStore(tmp_path)):
        store.put("a", state)
        kept = store.get("a").group("model")["w"]
        assert torch.equal(kept, stack[3])
        assert kept.untyped_storage().nbytes() == 400
