import numpy as np
import pytest
import torch

from hansa.data.clients import Client, Index, Samples, Split
from hansa.errors import InputError


def floats(*values: float) -> Samples:
    return torch.tensor([[v] for v in values]), torch.arange(len(values))


def test_bytes_are_scaled_to_between_minus_one_and_one() -> None:
    images = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).reshape(4, 1, 1, 1)
    client = Client(images, torch.tensor([0, 1, 0, 1]), {"train": np.arange(4)})
    inputs, _ = client.batch("train")
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))


def test_scaling_leaves_the_pool_as_it_is() -> None:
    images = torch.full((2, 1, 1, 1), 7, dtype=torch.uint8)
    client = Client(images, torch.tensor([0, 1]), {"train": np.arange(2)})
    client.batch("train")
    assert client.inputs.flatten().tolist() == [7, 7]


def test_other_inputs_are_handed_out_as_they_are() -> None:
    client = Client.of(floats(300.0, -2.5), floats(1.0))
    assert client.batch("train")[0].tolist() == [[300.0], [-2.5]]


def test_a_batch_holds_the_clients_positions_of_the_pool() -> None:
    inputs, labels = torch.arange(10.0, 16.0), torch.arange(20, 26)
    splits: dict[Split, Index] = {
        "train": np.array([5, 0]),
        "validation": np.array([], np.int64),
        "test": np.array([3]),
    }
    client = Client(inputs, labels, splits)
    assert [t.tolist() for t in client.batch("train")] == [[15, 10], [25, 20]]
    assert [t.tolist() for t in client.batch("test")] == [[13], [23]]
    assert [t.tolist() for t in client.batch("validation")] == [[], []]
    assert [client.count(s) for s in ("train", "validation", "test")] == [2, 0, 1]


def test_a_client_of_tensors_holds_each_split() -> None:
    client = Client.of(floats(1, 2), test=floats(3), validation=floats(4, 5, 6))
    assert client.batch("train")[0].flatten().tolist() == [1, 2]
    assert client.batch("test")[0].flatten().tolist() == [3]
    assert client.batch("validation")[0].flatten().tolist() == [4, 5, 6]
    assert client.batch("validation")[1].tolist() == [0, 1, 2]


def test_a_client_of_tensors_may_have_no_validation() -> None:
    client = Client.of(floats(1, 2), floats(3))
    assert client.count("validation") == 0
    assert client.batch("test")[0].tolist() == [[3]]


def test_class_numbers_become_int64() -> None:
    inputs, labels = floats(1, 2)
    client = Client.of((inputs, labels.int()), (inputs, labels.to(torch.uint8)))
    assert client.labels.dtype == torch.int64
    assert client.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_split_of_unequal_lengths_is_named(name: str) -> None:
    parts = {"train": floats(1), "validation": floats(1), "test": floats(1)}
    parts[name] = (torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(InputError) as caught:
        Client.of(**parts)
    assert str(caught.value) == f"{name}: found 3 inputs and 2 labels; allowed: equal numbers"


def test_a_client_without_training_samples_is_refused() -> None:
    with pytest.raises(InputError, match="train: found no samples"):
        Client.of(floats(), floats(1))


def test_splits_of_different_dtypes_are_refused() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    train, test = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, 2, 2)
    with pytest.raises(InputError, match=r"inputs: found torch.uint8 and torch.float32"):
        Client.of((train, labels), test=(test, labels))
