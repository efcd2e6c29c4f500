import pytest
import torch

from hansa.federation.message import Message, MessageError


def test_a_message_without_content_is_false() -> None:
    assert not Message()
    assert not Message({"model": {}, "buffers": {}})


@pytest.mark.parametrize(
    "message",
    [
        Message({"model": {"w": torch.zeros(0)}}),
        Message({"empty": {}, "model": {"w": torch.zeros(1)}}),
        Message(scalars={"weight": 0}),
        Message(metrics={"loss": (0.0, 0.0)}),
    ],
    ids=["tensor", "one group of two", "scalar", "metric"],
)
def test_any_content_makes_a_message_true_even_a_zero(message: Message) -> None:
    assert message


def test_a_group_that_is_absent_reads_as_empty() -> None:
    message = Message({"model": {"w": torch.ones(1)}})
    assert message.group("model")["w"].item() == 1
    assert message.group("buffers") == {}


@pytest.mark.parametrize("value", [3, -0.5, 0])
def test_a_number_is_returned_as_it_is(value: float) -> None:
    assert Message(scalars={"weight": value}).number("weight") == value


@pytest.mark.parametrize("value", [True, False, "3", ""])
def test_truth_values_and_text_are_no_numbers(value: bool | str) -> None:
    with pytest.raises(MessageError, match=r"'weight' is .*not a number"):
        Message(scalars={"weight": value}).number("weight")


def test_an_absent_scalar_is_no_number() -> None:
    with pytest.raises(MessageError, match="'weight' is None"):
        Message(scalars={"other": 1}).number("weight")


LIKE = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}


def test_require_returns_a_group_that_fits_whatever_its_order() -> None:
    group = {"b": torch.arange(4), "a": torch.ones(2, 3)}
    assert Message({"model": group}).require("model", LIKE) is group


def test_require_accepts_an_absent_group_only_where_nothing_is_wanted() -> None:
    assert Message().require("model", {}) == {}
    with pytest.raises(MessageError, match="group 'model' differs from the model in a, b"):
        Message().require("model", LIKE)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"a": LIKE["a"]}, "differs from the model in b"),
        ({**LIKE, "c": LIKE["a"]}, "differs from the model in c"),
        ({"a": LIKE["a"], "B": LIKE["b"]}, "differs from the model in B, b"),
        ({**LIKE, "a": torch.zeros(3, 2)}, r"model/a is torch.float32 \(3, 2\), not .* \(2, 3\)"),
        ({**LIKE, "a": torch.zeros(6)}, r"model/a is torch.float32 \(6,\)"),
        ({**LIKE, "a": torch.zeros(2, 3, 1)}, r"\(2, 3, 1\)"),
        ({**LIKE, "b": torch.zeros(4)}, r"model/b is torch.float32 \(4,\), not torch.int64"),
    ],
    ids=["missing", "extra", "renamed", "transposed", "flat", "extra dimension", "dtype"],
)
def test_require_refuses_what_does_not_fit(group: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(MessageError, match=said):
        Message({"model": group}).require("model", LIKE)


def test_require_names_at_most_three_of_the_tensors_that_differ() -> None:
    group = {name: torch.zeros(1) for name in "edcba"}
    with pytest.raises(MessageError, match=r"differs from the model in a, b, c$"):
        Message({"model": group}).require("model", {})


def test_a_message_error_is_a_value_error() -> None:
    assert issubclass(MessageError, ValueError)
