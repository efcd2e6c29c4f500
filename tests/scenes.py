"""The documentation's commands: which are run, with what less, and which are not, and why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from documents import ROOT, files
from hansa import train

DOCS = ROOT / "docs"
SMALL = ("--set", "rounds=1", "--set", "training.epochs=1", "--set", "compare_up_to=0")
LESS_DATA = ("--set", "data.clients=4", "--set", "data.train_per_class=1")
TINY_RESNET = (*SMALL, *LESS_DATA, "--set", "model.options.width=2")
TINY_TEXT = (
    *("--set", "rounds=1", "--set", "training.steps=1", "--set", "training.batch_size=4"),
    *("--set", "text.most_kb=8", "--set", "model.options.hidden_size=16"),
    *("--set", "model.options.intermediate_size=16", "--set", "compare_up_to=0"),
    *("--set", "model.options.num_hidden_layers=2", "--set", "text.context=16"),
)


@dataclass(frozen=True)
class Scene:
    """Commands that are run one after another in one folder with the examples in it.

    Attributes:
        commands: command as the documentation has it -> what is added, so that it takes seconds;
            of an option that is given twice the last counts.
        prepare: what stands in the folder before.
        ends: command -> its exit status, where that is not 0.
        silent: commands that print nothing.
    """

    commands: dict[str, tuple[str, ...]]
    prepare: Callable[[Path], None] = lambda folder: None
    ends: dict[str, int] = field(default_factory=dict)
    silent: tuple[str, ...] = ()


def _pages(*names: str) -> Callable[[Path], None]:
    """Save the files that a reader of these pages saves."""

    def prepare(folder: Path) -> None:
        for name in names:
            for title, text in files(DOCS / name).items():
                (folder / title).write_text(text)

    return prepare


def _image(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (20 + seed % 3, 18), dtype=np.uint8)
    return Image.fromarray(values)


def _photos(folder: Path) -> None:
    """A folder of images by class, and a Parquet file of images by hospital."""
    _pages("howto/own-data.md", "start.md")(folder)
    rows = []
    for number in range(48):
        name, path = ("cat", "dog")[number % 2], folder / "photos" / ("cat", "dog")[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        _image(0).resize((16, 16)).save(path / f"{number}.png")
        rows.append((f"hospital-{number % 3}", name, (path / f"{number}.png").read_bytes()))
    hospitals, labels, images = zip(*rows, strict=True)
    structs = [{"bytes": data, "path": None} for data in images]
    table = pa.table({"hospital": hospitals, "label": labels, "image": structs})
    pq.write_table(table, folder / "scans.parquet")


def _fedavg(folder: Path) -> None:
    """A finished run of the example with FedAvg."""
    train(folder / "examples" / "digits-fedavg.toml", overrides=[*SMALL[1::2]])


_FEW = "data={ kind='world', entities=24, relations=2, values=4, facts=3 }"
_PHASES = (
    "phases=[{ kind='pretrain', steps=2 }, { kind='random_mapping', steps=1 },"
    " { kind='tar', steps=1, batch_size=4, inner_steps=1, every=1, attack_batch_size=4,"
    " adversaries=[{ lrs=[1e-3] }] }]"
)
_CONTROLS = "controls={ never={ phases=[{ kind='pretrain', steps=2, tables=['retained'] }] } }"
_ATTACKS = (
    "redteam={ seeds=[0], processes=1, probes=[1], floor=0.5,"
    " attacks=[{ name='full', steps=1, lrs=[1e-3] }] }"
)
SAFEGUARD = tuple(
    part for text in ("name=NAME", _FEW, _PHASES, _CONTROLS, _ATTACKS) for part in ("--set", text)
)
_MADE = [
    f"nodes.{name}.text='made:{kind}?num=24&seed={seed}'"
    for name, kind, seed in (
        ("clinic", "drug", 1),
        ("hospital", "disease", 2),
        ("insurer", "policy", 3),
        ("laboratory", "lab", 4),
    )
]
CURATED = (
    *("--set", "rounds=1", "--set", "training.steps=1", "--set", "training.batch_size=4"),
    *("--set", "curation.anchors='made:all?num=30&seed=200'"),
    *("--set", "curation.scores=['ifd']", "--set", "curation.guard.action=warn"),
    *(part for text in _MADE for part in ("--set", text)),
)
BASE = (
    *("--set", "rounds=1", "--set", "training.steps=1", "--set", "training.batch_size=4"),
    *("--set", "nodes.root.text='made:all?num=40&seed=100&style=public'"),
    *("--set", "nodes.public.text='made:all?num=40&seed=101&style=public'"),
)
AUDITED = ("--set", "target={ kind='trusting' }", "--set", "cases=12", "--set", "strengths=[]")
SEARCHED = (
    "--set",
    "budget=6",
    "--set",
    "repeats=1",
    "--set",
    "proxies=[]",
    "--set",
    "train=false",
)

SMALLEST = (  # of the shipped pipelines
    *("profile.models=2", "profile.on_refusal=table", "search.budget=2", "search.repeats=0"),
    *("search.proxies=[]", "search.limits.fastest=1.0", "train.rounds=1", "train.data.clients=2"),
    *("train.training.epochs=1", "train.data.train_per_class=1", "prune.data.clients=2"),
    *("personalise.rounds=1", "personalise.data.clients=2", "personalise.data.train_per_class=1"),
    *("personalise.training.epochs=1", "prune.pruning.iterations=1"),
)
EDGE = tuple(part for text in SMALLEST for part in ("--set", text))

FEDSELECT = "hansa train examples/digits-fedselect.toml"
COMPARE = "hansa compare examples/digits-fedselect.toml"
SCENES: dict[str, Scene] = {
    "first": Scene(
        {
            "hansa --help": (),
            FEDSELECT: SMALL,
            f"{FEDSELECT} --set rounds=10 --set method.limit=0.5": SMALL,
            f"{FEDSELECT} --set method.limit=0.5": SMALL,
            f"{FEDSELECT} --set method.limit=0.5 --set engine.kind=stacked --json": SMALL,
            "hansa train --resume runs/digits-fedselect-seed0": ("--set", "rounds=2"),
            "hansa report runs/digits-fedselect-seed0 runs/digits-fedselect-seed0-2": (),
            "hansa report runs/digits-fedselect-seed0": (),
            "hansa report runs/digits-fedavg-seed0 --out page.html": (),
            "hansa export runs/digits-fedselect-seed0 client-3": (),
            f"{FEDSELECT} --set name=simulated --set engine.kind=sequential": SMALL,
            f"{COMPARE} --methods local,fedavg,fedselect --seeds 0,1,2": (*SMALL, "--seeds", "0"),
            f"{COMPARE} --methods local,fedavg-tuned,fedselect --seeds 0,1,2": (
                *(*SMALL, "--seeds", "0"),
            ),
            f"{COMPARE} --methods local,fedavg,fedselect,random-mask --seeds 0,1,2": (
                *(*SMALL, "--seeds", "0"),
            ),
            "hansa compare examples/digits-personalised.toml --processes 2": (
                *(*SMALL, "--set", "data.clients=3", "--seeds", "0", "--processes", "1"),
            ),
        },
        _fedavg,
    ),
    "data": Scene(
        {
            "hansa train photos.toml": (),
            "hansa train scans.toml": (),
            "hansa train mine.toml": ("--set", "rounds=1"),
        },
        _photos,
    ),
    "model": Scene(
        {"hansa train narrow.toml": (), "hansa export runs/narrow-seed0 client-1": ()},
        _pages("howto/own-model.md"),
    ),
    "method": Scene(
        {
            "hansa train forgiving.toml": SMALL,
            "hansa train forgiving.toml --set method.radius=0.5 --set name=forgiving-near": SMALL,
            "hansa report runs/forgiving-seed0 runs/forgiving-near-seed0": (),
        },
        _pages("howto/own-method.md"),
    ),
    "pruning": Scene(
        {
            "hansa prune examples/digits-pruned.toml --method prospr --density 0.05"
            " --iterations 10": (
                *(*LESS_DATA, "--iterations", "2", "--set", "model.options.width=2"),
            ),
            "hansa prune examples/digits-pruned.toml --density 0.5 --structured": (
                *(*LESS_DATA, "--set", "model.options.width=4"),
            ),
            "hansa prune examples/digits-pruned.toml --method snip --density 0.5 --structured": (
                *(*LESS_DATA, "--set", "model.options.width=4"),
            ),
            "hansa train examples/digits-pruned.toml": TINY_RESNET,
            "hansa train examples/digits-zerofl.toml": TINY_RESNET,
        }
    ),
    "language": Scene(
        {
            "hansa train examples/worldlm.toml": TINY_TEXT,
            "hansa report runs/worldlm-seed0": (),
            "hansa compare examples/worldlm.toml --methods local,fedavg,worldlm": (
                *(*TINY_TEXT, "--seeds", "0"),
            ),
        }
    ),
    "curation": Scene(
        {
            "hansa train examples/curation-base.toml": BASE,
            "hansa curate examples/curation.toml --dry-run": CURATED,
            "hansa curate examples/curation.toml --train": CURATED,
            "hansa train examples/curation.toml": CURATED,
        }
    ),
    "safeguard": Scene(
        {
            "hansa safeguard examples/safeguard.toml": SAFEGUARD,
            "hansa redteam examples/safeguard.toml": SAFEGUARD,
            "hansa redteam runs/NAME-seed0-safeguard/bundle --join": ("--set", _ATTACKS),
        }
    ),
    "audit": Scene(
        {
            "hansa audit examples/audit.toml": AUDITED,
            "hansa audit examples/audit.toml --max-adopted 0.05": AUDITED,
        },
        ends={"hansa audit examples/audit.toml --max-adopted 0.05": 3},
    ),
    "search": Scene(
        {
            "hansa search examples/search.toml": SEARCHED,
            "hansa search examples/search.toml --set limits.parameters=150000": SEARCHED,
            "hansa search table query --parameters 150000": (),
            "hansa search table query '[[[0],[0,1,1,1]],[[2],[0,1,0,1]],[[2],[0,0,0,1]]]'": (),
            "hansa search table generate my.sqlite --recipe gratings16-w8 --models spread:24"
            " --seeds 2 --workers 2": (
                *("--recipe", "digits16-w8", "--models", "0", "--workers", "1", "--seeds", "1"),
            ),
            "hansa search table merge my.parquet my.sqlite": (),
            "hansa search table query --table my.parquet --latency 4": ("--table", "gratings16-w8"),
        }
    ),
    "pipeline": Scene(
        {
            "hansa pipeline edge": EDGE,
            "hansa pipeline edge --dry-run": EDGE,
            "hansa pipeline edge --until prune": EDGE,
            "hansa pipeline edge --set train.rounds=20 --set seed=1": (
                *(*EDGE, "--set", "seed=0", "--until", "search"),
            ),
        }
    ),
    "deployment": Scene(
        {
            "hansa deploy init examples/deployment/federation.toml study": (),
            "hansa deploy status study": (),
            "hansa deploy down study": (),
        },
        silent=("hansa deploy down study",),
    ),
}

_DEPLOYED = "tests/deploy/test_processes.py::test_a_federation_of_federations_gives_the_hand_computed_number"  # noqa: E501
_ON_FLOWER = "tests/test_own_method.py::test_flower_trains_it_with_the_same_bits"
_SERVED = "tests/ui/test_ui_server.py::test_the_command_serves_until_it_is_ended"
ELSEWHERE: dict[str, str] = {
    "hansa demo": (
        "tests/pipeline/test_demo.py::"
        "test_the_demo_runs_the_shipped_pipelines_and_leaves_out_what_is_not_installed"
    ),
    "hansa ui": _SERVED,
    "hansa ui elsewhere --port 0 --no-browser": _SERVED,
    f"{FEDSELECT} --engine flower": _ON_FLOWER,
    f"{FEDSELECT} --set name=on-flower --engine flower": _ON_FLOWER,
    "hansa train forgiving.toml --engine flower --set name=forgiving-flower": _ON_FLOWER,
    "hansa audit proxy plan.toml --upstream http://127.0.0.1:8000 --sample response.json": (
        "tests/audit/test_audit_proxy_cli.py::test_it_serves_until_it_is_ended"
    ),
    "hansa deploy up study": _DEPLOYED,
    "hansa deploy start study/client-0": _DEPLOYED,  # by `deploy up`, for each party
    "hansa deploy export study/client-0 client-0-bundle": (
        "tests/deploy/test_processes.py::"
        "test_a_deployment_gives_the_local_engines_bits_and_lives_through_faults"
    ),
    "hansa prune runs/study-seed0/bundle --method magnitude --density 0.2": (
        "tests/test_prune.py::test_the_command_prunes_trains_shrinks_and_prunes_again"
    ),
}
"""Command -> the test that runs it, or the same with another name, folder or configuration."""

EXCEPTED: dict[str, str] = {
    "hansa compare CONFIG ": "a form of command, run in other words above",
    "hansa safeguard CONFIG": "a form of command, run in other words above",
    "hansa redteam CONFIG ": "a form of command, run in other words above",
    "hansa pipeline language": (
        "minutes; tests/pipeline/test_language_pipeline.py runs a smaller one of the same kinds, "
        "and joins the stages of this one"
    ),
    "hansa report study/": (
        "a run that a deployment made; the same command on runs of one machine is run above"
    ),
    "hansa search examples/search.toml --set searcher=by_cost --set 'options={}' --set prior=": (
        "a teacher and 135 blocks are trained, over a minute at the least; "
        "tests/search/test_searching.py does the same in Python by a tiny recipe"
    ),
    "hansa search table generate my.sqlite --recipe gratings16-w8 --models spread:240": (
        "an hour of training"
    ),
    "hansa search table profile my.parquet --out my.parquet": (
        "refuses what does not repeat, on a machine that has other work; "
        "tests/search/test_profile.py holds the measuring"
    ),
    "hansa prune examples/digits-pruned.toml --method snip --density 0.5 --structured --set "
    "data.source=": "needs CIFAR-10, which is not shipped",
    "python my_application.py": "the reader's own",
    "inspect eval hansa/audit": (
        "Inspect is not among what tests install; tests/audit/test_audit_inspect.py, where it is"
    ),
    "python benchmarks/": "minutes to hours of measuring; tests/test_benchmarks.py checks them",
    "make demo": "installs, then `hansa demo`; targets are checked",
    "pip install": "installs; the names of extras are checked",
}
"""What a command begins with -> why no test runs it; its options are read all the same."""
