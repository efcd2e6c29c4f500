import pytest

from hansa.config import RunConfig, difference, load
from hansa.errors import InputError
from hansa.federation.methods import FedSelect

BASE = {"rounds": 3, "data": {"clients": 4}, "method": {"name": "fedselect", "rate": 0.1}}


def test_a_configuration_written_as_toml_reads_back_equal(tmp_path) -> None:
    config = load({**BASE, "data": {"clients": 4, "partition": {"kind": "shards", "classes": 3}}})
    path = tmp_path / "config.toml"
    path.write_text(config.as_toml())
    assert load(path) == config


def test_overrides_are_toml_values_or_strings() -> None:
    overrides = ["training.lr=0.5", "data.source=folder:/x y", "method.limit=1", "name=b"]
    config = load(BASE, [*overrides, "model.options={hidden=[3, 4]}"])
    assert config.training.lr == 0.5
    assert config.data.source == "folder:/x y"
    assert config.model.options == {"hidden": [3, 4]}
    assert (config.name, config.rounds) == ("b", 3)


def test_overrides_leave_the_given_values_alone() -> None:
    load(BASE, ["data.clients=9"])
    assert BASE["data"] == {"clients": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=-1", "training.lr: found -1; allowed: greater than 0"),
        ("trainin.lr=1", "trainin: found an unknown key; allowed: .*did you mean training"),
        ("training.learning_rate=1", "training.learning_rate: found an unknown key; .*lr"),
        ("method.name=fedsel", "method.name: found 'fedsel'; allowed: local, fedavg,"),
        (
            "method.alpha=1",
            "method.alpha: found an unknown key; allowed: name, weighting, rate, limit",
        ),
        ("method=3", "method: found 3; allowed: a table"),
        ("methods={a={}}", "methods: found methods to compare; allowed: .method."),
        ("method.quirks=['holes']", "method: found values that do not go .* mode 'official'"),
        ("method.mode=both", "method.mode: found 'both'; allowed: 'cvpr', 'workshop' or"),
        ("data.partition.kind=pie", "data.partition.kind: found 'pie'; allowed: 'iid', 'shards'"),
        ("data.partition.classes=2", "data.partition.kind: found nothing"),
        ("data.partition={kind='shards', classes=0}", "data.partition.classes: found 0; allowed"),
        ("data.partition={kind='shards', s=1}", "data.partition.s: .*allowed: kind, classes"),
        ("data.test=0.9", "data: found values that do not go together; .*leave samples"),
        ("rounds.x=1", "--set: found 'rounds.x', but 'rounds' is no table"),
        ("rounds", "--set: found 'rounds'; allowed: key=value"),
        ("name=../x", "name: found '../x'"),
        ("training.optimizer=sdg", "training.optimizer: found 'sdg'; allowed: 'sgd', 'adam'"),
    ],
)
def test_errors_name_the_key_the_find_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(BASE, [override])


def test_files_that_are_no_configuration_are_named(tmp_path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    for path in (bad, tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            load(path)


def test_difference_names_the_keys() -> None:
    first, second = load(BASE), load(BASE, ["training.lr=7", "rounds=4"])
    assert difference(first, second) == ["rounds", "training.lr"]
    assert difference(first, load(BASE, ["method={name='local'}"])) == [
        f"method.{key}" for key in sorted({"name", *FedSelect.model_fields})
    ]


def test_defaults_are_a_valid_configuration() -> None:
    assert load({}) == RunConfig()


def test_kinds_of_a_union_are_no_part_of_a_key() -> None:
    with pytest.raises(InputError, match=r"^text\.answers\.corruption\.shares: found 'x'; allowed"):
        load({"text": {"answers": {"corruption": {"shares": "x"}}}})
