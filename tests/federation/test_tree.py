import pickle
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import InputError
from hansa.federation.tree import Tree, name_of

SURE = settings(deadline=None, derandomize=True)
DEEP = {"ward-1": "north", "south": "root", "north": "root", "ward-2": "north"}


@st.composite
def trees(draw: st.DrawFn) -> dict[str, str]:
    """Return the parents of a random tree: every node below the root or an earlier node."""
    size = draw(st.integers(1, 12))
    above = [draw(st.integers(-1, k - 1)) for k in range(size)]
    return {f"n{k}": "root" if above[k] < 0 else f"n{above[k]}" for k in range(size)}


def test_paths_are_the_names_from_the_root_and_children_come_in_their_order() -> None:
    tree = Tree(DEEP)
    assert tree.children("root") == ("root/north", "root/south")
    assert tree.children("root/north") == ("root/north/ward-1", "root/north/ward-2")
    assert tree.children("root/south") == ()


def test_a_walk_yields_parents_before_children() -> None:
    assert list(Tree(DEEP).walk()) == [
        "root",
        "root/north",
        "root/north/ward-1",
        "root/north/ward-2",
        "root/south",
    ]
    assert list(Tree(DEEP).walk("root/south")) == ["root/south"]


def test_leaves_are_the_nodes_without_children() -> None:
    tree = Tree(DEEP)
    assert list(tree.leaves()) == ["root/north/ward-1", "root/north/ward-2", "root/south"]
    assert [tree.is_leaf(path) for path in tree.walk()] == [False, False, True, True, True]


def test_depth_counts_the_steps_to_the_deepest_leaf() -> None:
    assert Tree({"a": "root"}).depth == 1
    assert Tree(DEEP).depth == 2
    assert Tree({"a": "root", "b": "a", "c": "b", "d": "root"}).depth == 3


def test_children_are_ordered_as_text_not_as_numbers() -> None:
    tree = Tree.flat(["n10", "n9", "N1"])
    assert tree.children("root") == ("root/N1", "root/n10", "root/n9")


def test_a_flat_tree_holds_every_name_below_the_root() -> None:
    assert list(Tree.flat(["b", "a"]).walk()) == ["root", "root/a", "root/b"]


def test_grouped_deals_the_sorted_names_in_turn() -> None:
    tree = Tree.grouped(["e", "c", "a", "d", "b"], 2)
    assert tree.children("root") == ("root/federation-0", "root/federation-1")
    assert list(map(name_of, tree.children("root/federation-0"))) == ["a", "c", "e"]
    assert list(map(name_of, tree.children("root/federation-1"))) == ["b", "d"]


def test_one_federation_is_a_flat_tree() -> None:
    assert Tree.grouped(["b", "a"], 1).children("root") == ("root/a", "root/b")


@pytest.mark.parametrize("federations", [-1, 0, 3])
def test_grouped_refuses_federations_that_would_be_empty(federations: int) -> None:
    with pytest.raises(InputError, match=rf"tree\.federations: found {federations}; .*1 to 2"):
        Tree.grouped(["a", "b"], federations)


def test_grouped_refuses_a_name_that_an_inner_node_bears() -> None:
    with pytest.raises(InputError, match=r"tree\.federation-0: found the name of an inner node"):
        Tree.grouped(["a", "federation-0"], 2)


@SURE
@given(trees(), st.randoms(use_true_random=False))
def test_a_tree_does_not_depend_on_the_order_it_was_written_in(
    parents: dict[str, str], random: Random
) -> None:
    items = list(parents.items())
    random.shuffle(items)
    tree, other = Tree(parents), Tree(dict(items))
    assert list(tree.walk()) == list(other.walk())


@SURE
@given(trees())
def test_every_node_is_visited_once_below_its_parent(parents: dict[str, str]) -> None:
    tree = Tree(parents)
    paths = list(tree.walk())
    assert sorted(map(name_of, paths)) == sorted(["root", *parents])
    for path in paths[1:]:
        above = path.rpartition("/")[0]
        assert name_of(above) == parents[name_of(path)]
        assert path in tree.children(above)
    assert set(tree.leaves()) == {path for path in paths if name_of(path) not in parents.values()}


def test_a_tree_without_nodes_is_refused() -> None:
    with pytest.raises(InputError, match="tree: found no node"):
        Tree({})


@pytest.mark.parametrize(
    "name",
    ["", "root", "a/b", "-a", ".a", "..", "a b", "a\n", "a@b", "a+b", "é", "٣", "a" * 65],
)
def test_a_name_that_cannot_be_part_of_a_path_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="found the name") as caught:
        Tree({"good": "root", name: "root"})
    assert caught.value.key == f"tree.{name}"


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 64, "Root", "n.msg"])
def test_names_of_letters_digits_and_three_signs_are_accepted(name: str) -> None:
    assert Tree({name: "root"}).children("root") == (f"root/{name}",)


@pytest.mark.parametrize("parent", ["nobody", "", "root/a", "Root"])
def test_an_unknown_parent_is_refused(parent: str) -> None:
    with pytest.raises(InputError, match=r"tree\.b: found the parent"):
        Tree({"a": "root", "b": parent})


@pytest.mark.parametrize(
    ("parents", "circle"),
    [
        ({"a": "a"}, "a -> a"),
        ({"a": "b", "b": "a"}, "a -> b -> a"),
        ({"a": "b", "b": "c", "c": "a", "d": "root"}, "a -> b -> c -> a"),
        ({"a": "b", "b": "c", "c": "b"}, "a -> b -> c -> b"),
    ],
    ids=["self", "two", "three beside a good node", "a tail into a cycle"],
)
def test_a_cycle_is_refused_and_shown(parents: dict[str, str], circle: str) -> None:
    with pytest.raises(InputError, match=rf"tree\.a: found the cycle {circle};"):
        Tree(parents)


@pytest.mark.parametrize(("path", "name"), [("root", "root"), ("root/a/b.c", "b.c")])
def test_a_node_is_known_by_the_last_name_of_its_path(path: str, name: str) -> None:
    assert name_of(path) == name


def test_an_input_error_says_on_one_line_where_what_and_what_else() -> None:
    error = InputError("tree.a", "two\n  lines", "one  line")
    assert str(error) == "tree.a: found two lines; allowed: one line"
    assert (error.key, error.found, error.allowed) == ("tree.a", "two\n  lines", "one  line")


def test_an_input_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("key", 3, "1 or 2")))  # noqa: S301
    assert str(error) == "key: found 3; allowed: 1 or 2"
