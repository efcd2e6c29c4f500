"""The documentation's code runs, and its names exist."""

import re
import shutil
import sys
import tomllib
from ast import literal_eval
from typing import get_args

import pytest

from documents import PAGES, ROOT, blocks, files
from hansa.audit.options import DEFENCES, ArmOptions, AuditOptions, GateOptions, TargetOptions
from hansa.audit.plan import read_plan
from hansa.auditing import load as load_audit
from hansa.config import load
from hansa.curation.options import CurationOptions, Guard, ThresholdOptions, WarmUp
from hansa.curation.scores import SCORES
from hansa.data.answers import AnswerOptions
from hansa.data.corruption import Corruption
from hansa.federation.attackers import Attackers, Kind
from hansa.federation.methods import METHODS
from hansa.federation.methods.official import QUIRKS
from hansa.federation.robust import Robust, Rule
from hansa.pruning import SCORERS
from hansa.pruning.options import PruningOptions
from hansa.safeguard.phases import AnyPhase
from hansa.safeguard_config import PRESETS
from hansa.safeguard_config import load as load_safeguard
from hansa.search.limits import Limits
from hansa.search.options import ClientOptions, SearchOptions
from hansa.search.priors import PriorOptions
from hansa.search.proxies import PROXIES
from hansa.search.recipes import RECIPES
from hansa.search.searchers import SEARCHERS
from hansa.searching import load as load_search
from hansa.training import train
from support import in_turn

PHASES = get_args(get_args(AnyPhase)[0])


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"))
def test_code_in_the_readme_runs(code: str, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    assert "mean" in capsys.readouterr().out


def test_code_about_sparse_training_runs(capsys) -> None:
    (code,) = blocks(ROOT / "docs" / "sparse.md", "python")
    exec(code, {})  # noqa: S102
    assert any(word in capsys.readouterr().out for word in ("compiled kernels", "reference path"))


def test_code_in_the_guide_to_pruning_runs(capsys) -> None:
    (code,) = blocks(ROOT / "docs" / "pruning.md", "python")
    exec(code, {})  # noqa: S102
    assert 0.049 < float(capsys.readouterr().out.split()[-1]) < 0.051


def test_code_about_scores_runs(tmp_path, monkeypatch, capsys) -> None:
    (code,) = blocks(ROOT / "docs" / "curation.md", "python")
    monkeypatch.chdir(tmp_path)
    quick = ["rounds=1", "training.lr_rounds=2", "training.steps=1", "training.batch_size=4"]
    quick += [f"nodes.{n}.text='made:all?num=40&style=public&seed={n}'" for n in ("root", "public")]
    train(
        ROOT / "examples" / "curation-base.toml",
        overrides=[
            text.replace("seed=root", "seed=1").replace("seed=public", "seed=2") for text in quick
        ],
    )
    capsys.readouterr()
    exec(code, {})  # noqa: S102
    found = literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"ifd_score", "conditional_loss"}
    assert all(value > 0 for value in found.values())


def test_code_in_the_guide_to_search_runs(capsys) -> None:
    shared: dict[str, object] = {}
    for code in blocks(ROOT / "docs" / "search.md", "python"):
        exec(code, shared)  # noqa: S102
    first, sizes = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith(
        "both_skips(conv, mbconv) | sequential(mbconv, mbconv) | inner_skip(conv, conv)"
    )
    assert sizes == "3104164 288891904"


def test_every_searcher_proxy_recipe_and_option_of_search_is_documented() -> None:
    text = (ROOT / "docs" / "search.md").read_text()
    assert all(f"| `{name}` |" in text for name in (*SEARCHERS, *RECIPES))
    keys = {*PROXIES, *SearchOptions.model_fields} - {"priors", "limits", "clients"}
    keys |= {f"limits.{key}" for key in Limits.model_fields}
    keys |= {f"priors.{key}" for key in PriorOptions.model_fields}
    keys |= {f"clients.{key}" for key in ClientOptions.model_fields}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []
    for toml in blocks(ROOT / "docs" / "search.md", "toml"):
        ClientOptions.model_validate({"train": "x.toml", **tomllib.loads(toml)["clients"]})
    options = load_search(ROOT / "examples" / "search.toml")
    assert options.chosen.name == "evolution"


def test_every_score_and_option_of_curation_is_documented() -> None:
    text = (ROOT / "docs" / "curation.md").read_text()
    assert all(f"| `{name}` |" in text for name in SCORES)
    kinds = (CurationOptions, ThresholdOptions, WarmUp, Corruption)
    keys = {key for kind in kinds for key in kind.model_fields}
    keys |= {f"guard.{key}" for key in Guard.model_fields} - {"guard.action"}
    assert not [key for key in keys if f"`{key}" not in text and f"curation.{key}" not in text]


def test_code_about_audits_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(ROOT / "docs" / "audit.md", "python"):
        exec(code, {})  # noqa: S102
    assert "no answer, since schema" in capsys.readouterr().out
    assert "not-written" not in (tmp_path / "traffic.jsonl").read_text()


def test_every_option_of_audits_is_documented_and_the_example_and_the_plan_are_valid() -> None:
    import tomllib

    text = (ROOT / "docs" / "audit.md").read_text()
    kinds = (AuditOptions, TargetOptions, ArmOptions)
    keys = {key for kind in kinds for key in kind.model_fields} - {"model", "kind"}
    keys |= {f"gate.{key}" for key in GateOptions.model_fields} | set(DEFENCES)
    assert not [key for key in keys if f"`{key}`" not in text]
    load_audit(ROOT / "examples" / "audit.toml")
    (plan,) = blocks(ROOT / "docs" / "audit.md", "toml")
    assert len(read_plan(tomllib.loads(plan)).rules) == 2


def test_every_scorer_and_option_of_pruning_is_documented() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text()
    assert all(f"| `{name}` |" in text for name in SCORERS)
    keys = {key for kind in SCORERS.values() for key in kind.model_fields}
    assert not [
        key
        for key in keys | set(PruningOptions.model_fields)
        if f"`{key}" not in text and f"`pruning.{key}" not in text
    ]


def test_every_rule_attack_and_option_of_robustness_is_documented() -> None:
    text = (ROOT / "docs" / "robustness.md").read_text()
    for name in (*get_args(Rule), *get_args(Kind), *Robust.model_fields, *Attackers.model_fields):
        assert f"`{name}`" in text or f"{name} = " in text, name
    (values,) = blocks(ROOT / "docs" / "robustness.md", "toml")
    load(tomllib.loads(values))


def test_the_documented_configuration_is_valid() -> None:
    import tomllib

    (text,) = blocks(ROOT / "docs" / "configuration.md", "toml")
    config = load(tomllib.loads(text))
    assert config.name == "ward-study"


def test_the_documented_deployments_and_the_example_can_be_written(tmp_path) -> None:
    from hansa.deploy.layout import init
    from hansa.deploy.options import read_deployment

    images, texts = blocks(ROOT / "docs" / "deployment.md", "toml")
    example = (ROOT / "examples" / "deployment" / "federation.toml").read_text()
    for number, (description, num) in enumerate([(images, 7), (example, 7), (texts, 4)]):
        path = tmp_path / f"{number}.toml"
        path.write_text(description)
        assert len(init(read_deployment(path), tmp_path / str(number))) == num


@pytest.mark.filterwarnings("ignore")  # what Flower and Ray warn of is theirs
def test_a_flower_app_of_ones_own_runs(tmp_path, monkeypatch, capsys) -> None:
    from flwr.simulation import run_simulation

    (code,) = blocks(ROOT / "docs" / "deployment.md", "python")
    assert code.count("\n") < 40
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    options = {"init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}}
    with in_turn(1):
        run_simulation(names["server"], names["client"], 3, backend_config=options)
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert 0.3 < accuracy <= 1


def test_every_method_its_options_and_quirks_are_documented() -> None:
    # The table of methods, and the pages of those that have one of their own.
    pages = ("methods", "fedselect", "sparse", "worldlm")
    text = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in pages)
    assert all(f"| `{name}` |" in text for name in METHODS)
    assert all(f"| `{quirk}` |" in text for quirk in QUIRKS)
    options = {key for kind in METHODS.values() for key in kind.model_fields}
    assert not [key for key in options if f"`{key}`" not in text and f"`{key} =" not in text]


def test_the_guide_to_safeguards_names_what_there_is() -> None:
    text = (ROOT / "docs" / "safeguard.md").read_text()
    named = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert named == {get_args(kind.model_fields["kind"].annotation)[0] for kind in PHASES}
    configuration, answers, clients = blocks(ROOT / "docs" / "safeguard.md", "toml")
    values = tomllib.loads(configuration)
    config = load_safeguard(values)
    assert [phase.kind for phase in config.chain] == ["random_mapping", "tar"]
    both = {**values, "data": {**values["data"], **tomllib.loads(clients)["data"]}}
    assert set(load_safeguard(both).data.clients) == {"hospital", "laboratory"}
    asked = load_safeguard({**values, "data": tomllib.loads(answers)["data"]})
    assert asked.data.answers == AnswerOptions()
    for preset in re.findall(r'preset = "?(\w+)', text):
        assert preset in PRESETS


RUN_HERE = [
    "concepts.md",
    "howto/own-data.md",
    "howto/own-model.md",
    "reference/index.md",
    "start.md",
]
ELSEWHERE = {  # those above, and the guide to methods in test_own_method.py
    *("audit.md", "curation.md", "deployment.md", "pruning.md", "search.md", "sparse.md"),
    "howto/own-method.md",
    "bundles.md",  # handover/test_guide.py
    "privacy.md",  # report/test_membership.py
    "audit-proxy.md",  # for Inspect: test_audit_inspect.py, where that is installed
}


@pytest.mark.parametrize("page", RUN_HERE)
def test_code_in_the_first_pages_runs(page: str, tmp_path, monkeypatch, capsys) -> None:
    """With the page's own files, and in ``own-model.md`` after the page's own run."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    saved = files(ROOT / "docs" / page)
    for name, text in saved.items():
        (tmp_path / name).write_text(text)
    if "narrow.toml" in saved:
        train("narrow.toml", overrides=["rounds=1"])
    for code in blocks(ROOT / "docs" / page, "python"):
        exec(code, {})  # noqa: S102
        assert capsys.readouterr().out
    sys.modules.pop("nets", None)


def test_no_page_has_code_that_nobody_runs() -> None:
    pages = [path for path in PAGES if path.parent != ROOT and blocks(path, "python")]
    named = {str(path.relative_to(ROOT / "docs")) for path in pages}
    assert named == {*RUN_HERE, *ELSEWHERE}
