import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from hansa.errors import InputError
from hansa.models import Architecture, build, objective_of, resolved
from hansa.models.objective import CLASSIFICATION, NextToken

USER = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, shape, classes, width=3):
        super().__init__()
        self.hidden = nn.Linear(torch.Size(shape).numel(), width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs):
        return self.head(self.hidden(inputs.flatten(1)).relu())


class Fixed(nn.Module):
    """Knows its shapes and is not told them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(inputs.flatten(1))


class Any(Net):
    def __init__(self, shape, classes, **options):
        super().__init__(shape, classes, options["wide"])


class Frozen(Fixed):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Broken(Fixed):
    def forward(self, inputs):
        return self.head(inputs)


class Pair(Fixed):
    def forward(self, inputs):
        return super().forward(inputs), None


class Lazy(Fixed):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2)


class Statistics(Fixed):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs):
        return self.head(self.norm(inputs.flatten(1)))


class NoModule:
    pass


NUMBER = 3
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module ``user_nets`` in it."""
    (tmp_path / "user_nets.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("user_nets", None)


def of(name: str, shape: tuple[int, ...] = (1, 2, 2), classes: int = 2, **options: Any) -> Any:
    return Architecture(name=name, shape=shape, classes=classes, options=options)


def values(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 10)])
def test_built_in_models_map_images_to_classes(name: str, shape: tuple[int, ...]) -> None:
    options = {"width": 4} if name == "resnet18" else {}
    model = build(of(name, shape, 5, **options))
    assert model(torch.zeros(3, *shape)).shape == (3, 5)


def test_options_reach_the_model() -> None:
    model = build(of("mlp", hidden=[7, 6]))
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [(7, 4), (6, 7), (2, 6)]


def test_one_seed_gives_one_model() -> None:
    torch.manual_seed(1)
    first = values(build(of("mlp"), seed=3))
    torch.manual_seed(2)
    assert values(build(of("mlp"), seed=3)) == first


def test_another_seed_gives_another_model() -> None:
    assert values(build(of("mlp"), seed=3)) != values(build(of("mlp"), seed=4))


def test_building_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    build(of("mlp"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_comes_ready_to_train() -> None:
    model = build(of("resnet18", (1, 8, 8), width=4, norm="batch"))
    assert all(module.training for module in model.modules())


def test_trying_a_model_leaves_its_statistics_alone() -> None:
    model = build(of("resnet18", (1, 8, 8), width=4, norm="batch"))
    assert {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")} == {0}


@pytest.mark.parametrize("name", ["resnet", "MLP", "", ":", "module:", ":Class"])
def test_an_unknown_name_is_told_what_there_is(name: str) -> None:
    with pytest.raises(InputError) as caught:
        build(of(name))
    assert caught.value.key == "model.name"
    assert str(caught.value).endswith(
        "allowed: mlp, cnn, resnet18, resnet20, vgg16, blox, llama, gpt2, transformers or "
        "module:Class"
    )


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError) as caught:
        build(of("cnn", (1, 8, 8), hiden=3))
    assert str(caught.value) == (
        "model.options.hiden: found an unknown option; allowed: channels, hidden"
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"hidden": 8}),
        ("mlp", {"hidden": [-1]}),
        ("cnn", {"channels": [4]}),
        ("resnet18", {"norm": "layer"}),
        ("resnet18", {"width": "wide"}),
        ("resnet18", {"width": 0}),
        ("mlp", {"classes": 3}),
    ],
)
def test_options_that_a_model_cannot_take_are_refused(name: str, options: dict[str, Any]) -> None:
    architecture = Architecture(name=name, shape=(1, 8, 8), classes=2, options=options)
    with pytest.raises(InputError, match=rf"model\.options: found options that {name} refuses"):
        build(architecture)


def test_inputs_of_a_shape_that_the_model_cannot_take_are_refused() -> None:
    with pytest.raises(InputError, match=r"cnn refuses"):
        build(of("cnn", (64,)))


def test_a_class_of_the_users_own_is_told_the_shapes(user: Path) -> None:
    model = build(of("user_nets:Net", (1, 2, 3), 5, width=4))
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 6), (4,), (5, 4), (5,)]


def test_a_class_of_the_users_own_is_drawn_from_the_seed(user: Path) -> None:
    assert values(build(of("user_nets:Net"), 3)) == values(build(of("user_nets:Net"), 3))
    assert values(build(of("user_nets:Net"), 3)) != values(build(of("user_nets:Net"), 4))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_made_on_the_first_input_are_drawn_from_the_seed(user: Path) -> None:
    torch.manual_seed(1)
    first = values(build(of("user_nets:Lazy"), 3))
    torch.manual_seed(2)
    assert values(build(of("user_nets:Lazy"), 3)) == first


def test_a_class_that_knows_its_shapes_is_not_told_them(user: Path) -> None:
    assert build(of("user_nets:Fixed"))(torch.zeros(1, 1, 2, 2)).shape == (1, 2)


def test_a_class_that_takes_any_option_gets_them(user: Path) -> None:
    assert build(of("user_nets:Any", wide=6)).get_parameter("hidden.weight").shape == (6, 4)


def test_an_unknown_option_of_a_users_class_is_named(user: Path) -> None:
    with pytest.raises(InputError) as caught:
        build(of("user_nets:Fixed", width=3))
    assert str(caught.value) == "model.options.width: found an unknown option; allowed: none"


def test_a_class_that_is_not_trusted_is_not_imported(user: Path) -> None:
    with pytest.raises(InputError, match="code from outside Hansa"):
        build(of("user_nets:Net"), trusted=["user_nets:Fixed", "user_nets", "Net"])
    assert "user_nets" not in sys.modules


def test_a_trusted_class_is_built(user: Path) -> None:
    assert len(values(build(of("user_nets:Fixed"), trusted={"user_nets:Fixed"}))) == 10


def test_built_in_models_need_no_trust() -> None:
    assert isinstance(build(of("mlp"), trusted=()), nn.Module)


@pytest.mark.parametrize(
    "name",
    ["no_such_module:Net", "user_nets:Nothing", "user_nets:NUMBER", ".user_nets:Net", "a..b:Net"],
)
def test_a_class_that_is_not_there_is_refused(user: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        build(of(name))
    assert caught.value.key == "model.name"
    assert name in str(caught.value)


def test_a_class_that_is_no_module_is_refused(user: Path) -> None:
    with pytest.raises(InputError, match=r"allowed: a subclass of torch\.nn\.Module"):
        build(of("user_nets:NoModule"))


def test_a_model_of_another_output_shape_is_refused(user: Path) -> None:
    with pytest.raises(InputError) as caught:
        build(of("user_nets:Fixed", classes=3))
    assert str(caught.value) == (
        "model.name: found user_nets:Fixed, which maps inputs of shape (2, 1, 2, 2) to (2, 2); "
        "allowed: a model that returns logits of shape (2, 3)"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Broken", "mat1 and mat2 shapes cannot be multiplied"), ("Pair", "has no attribute 'shape'")],
)
def test_a_model_that_fails_on_its_inputs_is_refused_with_the_reason(
    user: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        build(of(f"user_nets:{name}"))


def test_a_model_with_nothing_to_train_is_refused(user: Path) -> None:
    with pytest.raises(InputError, match="without trainable parameters"):
        build(of("user_nets:Frozen"))


def test_a_users_statistics_are_not_touched_by_the_trial(user: Path) -> None:
    model = build(of("user_nets:Statistics"))
    assert model.training
    assert model.get_buffer("norm.running_mean").tolist() == [0, 0, 0, 0]
    assert model.get_buffer("norm.num_batches_tracked").item() == 0


@pytest.mark.parametrize(
    "change", [{"classes": 1}, {"shape": ["wide"]}, {"depth": 3}, {"name": None}]
)
def test_an_architecture_of_wrong_values_is_refused(change: dict[str, Any]) -> None:
    whole: dict[str, Any] = {"name": "mlp", "shape": [1, 2, 2], "classes": 2}
    assert Architecture(**whole).shape == (1, 2, 2)
    with pytest.raises(ValidationError):
        Architecture(**{**whole, **change})


@pytest.mark.parametrize("name", ["mlp", "user_nets:Net"])
def test_models_of_other_inputs_than_text_classify(name: str) -> None:
    architecture = of(name, config="config.json")
    assert not architecture.is_language
    assert objective_of(architecture) is CLASSIFICATION
    assert resolved(architecture) is architecture


@pytest.mark.parametrize("name", ["llama", "gpt2", "transformers"])
def test_language_models_are_trained_on_the_next_token(name: str) -> None:
    sizes = torch.tensor([1, 2])
    objective = objective_of(of(name, (4,)), sizes)
    assert of(name, (4,)).is_language
    assert isinstance(objective, NextToken)
    assert objective.bytes_of is sizes
