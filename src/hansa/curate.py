"""The curate stage: score every client's examples, set one threshold, filter, and report.

Steps come one after another, and each is done once: the same command goes on where an earlier one
stopped, and after a change of the configuration repeats what depends on it, nothing else.

``config.toml``, ``steps.json``
    what was asked for, and which steps are done.
``clients/NAME/``
    what a client has of its own: its examples with scores and masks (``samples.parquet``), and
    after the last step the examples with their statistics (``samples.jsonl``) and those that are
    kept (``kept.jsonl``).
``scores.msg``, ``kept.msg``, ``states/``
    the anchors' scores, what the clients have told, and what nodes keep, as encoded messages.
``manifest.json``
    what was done, for the bundles of models trained on what is kept.
``clean/``
    masks that keep what is labelled clean, for comparison, where labels are known.
``runs/``
    trained on all, filtered and clean examples, where that was asked for.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch

from hansa.bundle import digest, read_bundle
from hansa.config import RunConfig, load
from hansa.curation.federated import Cohort, Counts, check_counts, ledger, params_of
from hansa.curation.findings import Holder, compared, separation
from hansa.curation.masks import MANIFEST, write_samples
from hansa.curation.measures import CLEAN
from hansa.curation.options import CurationOptions
from hansa.curation.scorer import NAMES
from hansa.curation.scores import SCORES, oriented
from hansa.curation.thresholds import Threshold, ThresholdOptions
from hansa.data.answers import AnswerOptions, Answers
from hansa.data.examples import write_jsonl
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult
from hansa.federation.message import State, Tensors
from hansa.federation.store import DiskStore
from hansa.federation.tree import name_of
from hansa.federation.wire import decode, encode
from hansa.files import write_atomic
from hansa.report.curation import report
from hansa.runs import Run, claim, locked
from hansa.tensor_files import read_tensors
from hansa.training import Trial, cohort_of, completed, prepare

Step = Literal["score", "threshold", "filter", "train", "report"]
STEPS: tuple[Step, ...] = get_args(Step)
Watch = Callable[[str, int, int], None]
_log = logging.getLogger("hansa")
_NOT_OF_SCORES = ("name", "output", "engine", "rounds", "score_every", "compare_up_to", "curation")
"""Keys of a configuration that change no parameters after a given round."""


@dataclass(frozen=True)
class Curated:
    """What the stage made.

    Attributes:
        path: its folder.
        summary: what was measured, as JSON values.
        report: the page about it, None where the report was not reached.
    """

    path: Path
    summary: dict[str, Any]
    report: Path | None


def curate(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    until: Step = "report",
    train_too: bool = False,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Curated:
    """Score, threshold and filter the training examples of a federation's leaves.

    Args:
        source: a configuration with ``[curation]`` and ``[text.answers]``, as for ``train``.
        overrides: ``key=value`` with dotted keys, such as ``curation.threshold.rate=0.05``.
        until: the last step; ``threshold`` tells what would be kept, and writes no masks (a dry
            run, for which floors of ``curation.guard`` only warn).
        train_too: whether to train on all examples, on those that are kept, and on those that are
            labelled clean, where labels are known, and to compare the losses.
        out: the folder to make or to go on in; by default ``NAME-seedN-curation`` beside the runs.
        watch: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used, and a filter that takes more than
            ``curation.guard`` allows.
    """
    config = load(source, overrides)
    if until not in STEPS:
        raise InputError("--until", repr(until), ", ".join(STEPS))
    if config.curation is None:
        raise InputError("curation", "nothing", "a table [curation], and [text.answers]")
    if config.curation.masks is not None:
        raise InputError("curation.masks", config.curation.masks, "nothing: they are made here")
    trial = prepare(config)
    cohort = cohort_of(trial)
    name = f"{config.name}-seed{config.seed}-curation"
    path = Path(out) if out is not None else Path(config.output) / name
    begun = (path / "steps.json").exists()
    claim(path, begun, ("config.toml", "steps.json"), "that of a curation")
    with locked(path):
        stage = _Stage(path, trial, cohort, watch or (lambda what, done, total: None))
        wanted = STEPS[: STEPS.index(until) + 1]
        stage.score()
        if "threshold" in wanted:
            stage.threshold(dry_run=until == "threshold")
        if "filter" in wanted:
            stage.filter()
        if train_too and "train" in wanted:
            stage.train()
        summary = stage.summary()
        if until != "report":
            return Curated(path, summary, None)
        write_atomic(path / "summary.json", _json(summary))
        page = report(path / "report.html", config, summary, stage.holders)
        return Curated(path, summary, page)


class _Stage:
    """The steps of one folder, and what is known between them."""

    def __init__(self, path: Path, trial: Trial, cohort: Cohort, watch: Watch) -> None:
        self.path, self.trial, self.cohort, self.watch = path, trial, cohort, watch
        self.config, self.options = trial.config, cohort.options
        self._done: dict[str, str] = _read_json(path / "steps.json")
        write_atomic(path / "steps.json", _json(self._done))
        write_atomic(path / "config.toml", self.config.as_toml())

    def score(self) -> None:
        """Let the clients score, unless they have."""
        key = self._key("score", "scores", "sketch", "warm_up", "epsilon")
        if self._is_done("score", key):
            return
        names = ", ".join(self.options.scores)
        self.watch(f"scoring by {names}", 0, 1)
        at = params_of(self.trial.model)
        points = self.cohort.points(at, list(self._checkpoints(key)))
        anchors = self.cohort.anchor_scores(points)
        store = DiskStore(self.path / "states", 0)  # from the start
        counts, result = self.cohort.score(points, store)
        about = State({"anchors": anchors, "counts": counts})
        write_atomic(self.path / "scores.msg", encode(about))
        self._note("score", key, result)
        self.watch(f"scoring by {names}", 1, 1)

    def threshold(self, dry_run: bool) -> None:
        """Set the threshold, and let the clients count what they would keep."""
        key = self._key("threshold", "threshold", "by", "soft", "epsilon")
        if not self._is_done("threshold", key):
            store = DiskStore(self.path / "states", 1)  # as of the scores
            counts, result = self.cohort.filter(self._threshold, store)
            about = State({"counts": counts})
            write_atomic(self.path / "kept.msg", encode(about))
            self._note("threshold", key, result)
        options = self.options
        if dry_run:
            guard = options.guard.model_copy(update={"action": "warn"})
            options = options.model_copy(update={"guard": guard})
        for text in check_counts(options, self.cohort.public.domains, self._samples, self._kept):
            _log.warning("curation: %s", text)

    def filter(self) -> None:
        """Write every client's masks and what is kept, beside its examples."""
        key = self._key("filter")
        if self._is_done("filter", key):
            return
        clean = self.path / "clean"
        for folder in (self.path, clean):  # they would stand for masks of two thresholds
            (folder / MANIFEST).unlink(missing_ok=True)
        for done, (name, scores, keep) in enumerate(self._held()):
            self.watch("writing masks", done, len(self._samples))
            examples, folder = self._data.examples[name], self.path / "clients" / name
            values = {score: oriented(score, each) for score, each in scores.items()}  # and back
            write_samples(folder, examples, values, keep)
            columns = {NAMES.get(score, score): each.tolist() for score, each in values.items()}
            columns["hansa_keep"] = keep["keep"].double().tolist()
            if "weights" in keep:
                columns["hansa_weight"] = keep["weights"].tolist()
            stats = {
                example.id: {column: values_[k] for column, values_ in columns.items()}
                for k, example in enumerate(examples)
            }
            fields = self._answers.fields
            write_jsonl(folder / "samples.jsonl", examples, stats, fields)
            kept = [
                e for e, is_kept in zip(examples, keep["keep"].tolist(), strict=True) if is_kept
            ]
            write_jsonl(folder / "kept.jsonl", kept, stats, fields)
            if self._is_labelled:
                is_clean = torch.tensor([example.kind == CLEAN for example in examples])
                write_samples(clean / "clients" / name, examples, {}, {"keep": is_clean})
        about = {**self._manifest(), "ledger": self._ledger}
        if self._is_labelled:
            write_atomic(clean / MANIFEST, _json({**about, "scores": [], "rule": {"kind": CLEAN}}))
        write_atomic(self.path / MANIFEST, _json(about))  # last: it stands for all of it
        self._note("filter", key)

    def train(self) -> None:
        """Train on all examples, on those kept, and on those labelled clean."""
        for done, config in enumerate(configs := list(self._runs().values())):
            self.watch("training", done, len(configs))
            completed(config)
        self.watch("training", len(configs), len(configs))

    def summary(self) -> dict[str, Any]:
        """Return what was found so far, as JSON values."""
        found: dict[str, Any] = {"path": str(self.path), "scores": list(self.options.scores)}
        found["by"] = list(self.options.deciding)
        found["excluded"] = {n: dict(self._data.excluded[n]) for n in self._leaves}
        if "threshold" in self._done:
            about = self._manifest()
            found |= {key: about[key] for key in ("rule", "thresholds", "false_rejection")}
            found["clients"] = _shares(about["counts"])
            sent = self._ledger
            found["bytes"] = {way: sum(visit[way] for visit in sent) for way in ("up", "down")}
        if self._is_labelled and "score" in self._done:
            found["auroc"] = separation(self.holders)
            if "threshold" in self._done:
                chosen = self._threshold
                found["rules"] = compared(self.cohort, self.holders, self._anchors, chosen)
        losses = {}
        for name, config in self._runs().items() if "filter" in self._done else ():
            if (config.folder / "summary.json").is_file():
                scored = Run(config.folder).history.scored("test", "loss")
                each = scored[max(scored)]
                losses[name] = {"mean": sum(each.values()) / len(each), "clients": each}
        if losses:
            found["test_loss"] = losses
        return found

    @cached_property
    def holders(self) -> dict[str, Holder]:
        """What the clients hold, as a simulation sees it."""
        found = {}
        for name, scores, _ in self._held(1):
            examples = self._data.examples[name]
            kinds = tuple(example.kind for example in examples)
            found[name] = Holder(scores, kinds, self.cohort.public.numbers(examples))
        return found

    def _checkpoints(self, key: str) -> Iterator[tuple[Tensors, float]]:
        """Yield the common model's parameters and rate after some rounds on all data."""
        warm_up = self.options.warm_up
        if warm_up is None or not any(SCORES[name].gradients for name in self.options.scores):
            return
        for number in warm_up.kept:
            self.watch("training for gradients", number, warm_up.rounds)
            path = self.path / "runs" / f"warm-up-{key[:8]}-{number:08d}.safetensors"
            if path.exists():
                held = read_tensors(path)
                params = {name: held[name] for name in params_of(self.trial.model)}
                yield params, self.config.training.rate(number)
                continue
            # One run that goes on: a run of its own for each would train the first rounds again.
            config = self.config.model_copy(
                update={
                    "name": f"warm-up-{key[:8]}",
                    "output": str(self.path / "runs"),
                    "rounds": number,
                    "score_every": 0,
                    "compare_up_to": 0,
                    "curation": None,
                }
            )
            weights = read_bundle(completed(config) / "bundle").weights
            params = {name: weights[name] for name in params_of(self.trial.model)}
            write_atomic(path, safetensors.torch.save(params))
            yield params, self.config.training.rate(number)

    def _runs(self) -> dict[str, RunConfig]:
        """Return what is trained to compare: on all, on kept, and on clean examples."""
        # How the masks were found is in their manifest, and no part of these configurations.
        kept, clean = (
            CurationOptions(masks=str(path), threshold=ThresholdOptions(kind="share"))
            for path in (self.path, self.path / "clean")
        )
        wanted = {"all": None, "filtered": kept} | ({"clean": clean} if self._is_labelled else {})
        mark = self._done.get("filter", "")[:8]
        return {
            name: self.config.model_copy(
                update={
                    "name": f"{name}-{mark}" if name == "filtered" else name,
                    "output": str(self.path / "runs"),
                    "curation": curation,
                }
            )
            for name, curation in wanted.items()
        }

    @property
    def _data(self) -> Answers:
        return self.cohort.data

    @property
    def _answers(self) -> AnswerOptions:
        assert self.config.text is not None and self.config.text.answers is not None  # noqa: S101, PT018
        return self.config.text.answers

    @property
    def _leaves(self) -> list[str]:
        return [name_of(path) for path in self.cohort.tree.leaves()]

    @property
    def _is_labelled(self) -> bool:
        examples = [e for name in self._leaves for e in self._data.examples[name]]
        return all(example.kind for example in examples)

    @property
    def _labels(self) -> list[list[str]]:
        """What is said of the examples beside their text, which the data's fingerprint is of."""
        examples = [e for name in self._leaves for e in self._data.examples[name]]
        return [[e.id, e.domain, e.kind] for e in examples]

    @property
    def _anchors(self) -> Tensors:
        return decode((self.path / "scores.msg").read_bytes()).group("anchors")

    @property
    def _samples(self) -> Counts:
        return decode((self.path / "scores.msg").read_bytes()).group("counts")

    @property
    def _kept(self) -> Counts:
        return decode((self.path / "kept.msg").read_bytes()).group("counts")

    @cached_property
    def _threshold(self) -> Threshold:
        return self.cohort.threshold(self._anchors)

    @property
    def _ledger(self) -> list[dict[str, Any]]:
        return [v for step in ("score", "threshold") for v in _read_json(self._sent(step))["sent"]]

    def _held(self, upto: int = 2) -> Iterator[tuple[str, Tensors, Tensors]]:
        store = DiskStore(self.path / "states", upto, reads_only=True)
        for name, scores, keep in self.cohort.held(store):
            if not scores:
                raise InputError(str(self.path / "states"), f"no scores of {name}", "them whole")
            yield name, scores, keep

    def _manifest(self) -> dict[str, Any]:
        model = digest(self.trial.model.state_dict())
        about = self.cohort.manifest(self._threshold, model, self._samples, self._kept)
        return {**about, "round": 0}

    def _sent(self, step: str) -> Path:
        return self.path / f"{step}.ledger.json"

    def _key(self, step: str, *names: str) -> str:
        """Return what a step stands on: options, data, model, and the step before."""
        options = self.options.model_dump(mode="json", include=set(names))
        about: list[object] = [step, options]
        if step == "score":
            model = digest(self.trial.model.state_dict())
            about += [self._data.fingerprint, self.cohort.public.fingerprint, model]
            about += [self.config.seed, list(self.cohort.tree.leaves()), self._labels]
            if options["warm_up"] is not None:
                values = self.config.as_dict()
                about.append({k: v for k, v in values.items() if k not in _NOT_OF_SCORES})
        else:
            about.append(self._done[{"threshold": "score", "filter": "threshold"}[step]])
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _is_done(self, step: str, key: str) -> bool:
        return self._done.get(step) == key

    def _note(self, step: str, key: str, result: RoundResult | None = None) -> None:
        """Write down that a step is done, and that those that stand on it no longer are."""
        if result is not None:
            write_atomic(self._sent(step), _json({"sent": ledger(result)}))
        before = STEPS[: STEPS.index(step)]
        self._done = {name: k for name, k in self._done.items() if name in before} | {step: key}
        write_atomic(self.path / "steps.json", _json(self._done))


def _shares(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Any]:
    found = {}
    for name, rows in counts.items():
        samples, kept = (sum(row[key] for row in rows.values()) for key in ("samples", "kept"))
        share = kept / samples if samples else float("nan")
        found[name] = {"samples": samples, "kept": kept, "share": share, "domains": dict(rows)}
    return found


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            str(path), f"unreadable ({error})", "what a curation left there"
        ) from error
    return found
