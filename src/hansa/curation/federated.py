"""The two rounds of curation over a federation, and what the root does before each of them."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hansa.bundle import digest
from hansa.curation.gradients import Sketch, gradients, mean_gradient, stored
from hansa.curation.influence import datainf
from hansa.curation.masks import Kept, manifest
from hansa.curation.options import CurationOptions
from hansa.curation.protocol import (
    COUNTS,
    KEEP_GROUP,
    SCORES_GROUP,
    Curate,
    noise_below,
    points_from,
    sent_points,
    sent_threshold,
)
from hansa.curation.scores import INFLUENCE, SCORES, VALIDATION, Point, Sample, measure, oriented
from hansa.curation.sequences import Pair
from hansa.curation.thresholds import Threshold, set_threshold
from hansa.data.answers import AnswerOptions, Answers, Packed, pack_examples
from hansa.data.clients import SPLITS, Client, Index, Split
from hansa.data.examples import Example, read_examples
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.message import State, Tensors
from hansa.federation.optimizer import Training
from hansa.federation.store import MemoryStore, Store
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models.objective import NextToken
from hansa.models.task import Task
from hansa.processes import one_thread

_log = logging.getLogger("hansa")
UNUSED = 0.9
"""IFD above which a question has hardly helped."""
Counts = Mapping[str, torch.Tensor]
"""Client -> counts [domains + 1, columns], the last row of domains that no anchor has."""


@dataclass(frozen=True)
class Public:
    """The public examples of a curation.

    Attributes:
        anchors: what the threshold is set by, None where no rule needs them.
        validation: what gradients are compared with, None where no score needs them.
        domains: the domains of the anchors, in alphabetical order.
    """

    anchors: Packed | None
    validation: Packed | None
    domains: tuple[str, ...]

    def numbers(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the number of each example's domain [n]; that of unknown ones is the last."""
        known = {name: k for k, name in enumerate(self.domains)}
        found = [known.get(example.domain, len(known)) for example in examples]
        return torch.tensor(found, dtype=torch.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over their tokens, as hex."""
        digest = hashlib.sha256()
        for packed in (self.anchors, self.validation):
            for tensor in () if packed is None else (packed.inputs, packed.labels):
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().data)
        digest.update("\0".join(self.domains).encode())
        return digest.hexdigest()


def read_public(options: CurationOptions, answers: AnswerOptions, data: Answers) -> Public:
    """Read the public examples of a curation.

    Raises:
        InputError: examples that cannot be read, do not fit the context, have no answer, or stand
            in both sets, where they would vouch for themselves.
    """
    held: dict[str, Packed | None] = {"anchors": None, "validation": None}
    for name in held:
        source = getattr(options, name)
        if source is None:
            continue
        key = f"curation.{name}"
        assert data.tokenizer is not None  # noqa: S101 text has one
        examples = read_examples(source, key, answers.fields)
        packed = pack_examples(examples, answers, data.shape[0], data.tokenizer)
        if packed.excluded:
            why = ", ".join(f"{num} {reason}" for reason, num in packed.excluded.items())
            raise InputError(key, f"examples that cannot be scored ({why})", "whole examples")
        held[name] = packed
    anchors, validation = held["anchors"], held["validation"]
    if anchors is not None and validation is not None:
        seen = {(e.question, e.answer) for e in anchors.examples}
        both = sum((e.question, e.answer) in seen for e in validation.examples)
        if both:
            raise InputError("curation.validation", f"{both} of the anchors", "other examples")
    domains = sorted({e.domain for e in anchors.examples}) if anchors is not None else []
    return Public(anchors, validation, tuple(domains))


@dataclass(frozen=True)
class Cohort:
    """Who takes part in a curation, and how.

    Attributes:
        model: the causal model; what it holds of values counts only where a point leaves it open.
        data: the clients and their examples.
        public: the public examples.
        options: what is asked for.
        tree: the federation's shape; clients are its leaves.
        engine: how the work is done: on Flower, or leaf by leaf by so many processes.
        training: the run's training, for its batches alone.
        seed: everything random is derived from it.
    """

    model: nn.Module
    data: Answers
    public: Public
    options: CurationOptions
    tree: Tree
    engine: EngineOptions
    training: Training
    seed: int

    @property
    def task(self) -> Task:
        """The model as a task."""
        return Task(self.model, NextToken(self.data.bytes_of))

    @one_thread()
    def points(self, at: Tensors, checkpoints: Sequence[tuple[Tensors, float]]) -> State:
        """Return what the root sends for samples to be scored.

        Args:
            at: parameters of the model that losses are taken at.
            checkpoints: parameters and learning rate of each model that gradients are taken at;
                where there is none, ``at``.
        """
        model, task, made = Point(at), self.task, list[Point]()
        wanted = {name for name in self.options.scores if SCORES[name].gradients}
        if not wanted:
            return sent_points(model, made)
        validation = self.public.validation
        assert validation is not None  # noqa: S101 the options need it
        sketch, pair = Sketch(self.options.sketch, self.seed), _pair(validation)
        rates = checkpoints or [(at, 1.0)]
        for params, rate in rates:
            mean = mean_gradient(gradients(task, params, task.buffers, pair, sketch))
            made.append(Point(params, rate, {VALIDATION: mean}))
        if "datainf" in wanted:
            last = made[-1]
            direction = last.directions[VALIDATION]
            pieces = gradients(task, last.params, task.buffers, self._reference(), sketch)
            with stored(pieces) as store:
                influence = datainf(direction, store.pieces)
            both = {VALIDATION: direction, INFLUENCE: influence}
            made[-1] = replace(last, directions=both)
        return sent_points(model, made)

    @one_thread()
    def anchor_scores(self, points: State) -> dict[str, torch.Tensor]:
        """Return the oriented scores of the anchors, as a client would make them of its samples."""
        anchors, task = self.public.anchors, self.task
        if anchors is None:
            return {}
        model, checkpoints = points_from(points)
        sketch = Sketch(self.options.sketch, self.seed)
        pair, blank = _pair(anchors), self.data.blank
        sample = Sample(task, task.buffers, model, checkpoints, pair, blank, sketch)
        found = measure(self.options.scores, sample)
        return {name: oriented(name, values) for name, values in found.items()}

    def threshold(self, scores: Mapping[str, torch.Tensor]) -> Threshold:
        """Return the threshold that the anchors' scores give.

        Raises:
            InputError: see ``set_threshold``.
        """
        anchors, options = self.public.anchors, self.options
        examples = () if anchors is None else anchors.examples
        numbers, names = self.public.numbers(examples), self.public.domains
        if "ifd" in options.deciding and examples:
            check_use(scores["ifd"])
        return set_threshold(options.threshold, options.deciding, scores, numbers, names)

    def score(self, points: State, store: Store) -> tuple[Counts, RoundResult]:
        """Let every client score its samples: the first round, into a store that is empty."""
        return self._round(1, points, store)

    def filter(self, threshold: Threshold, store: Store) -> tuple[Counts, RoundResult]:
        """Let every client apply a threshold: the second round, on a store after the first."""
        return self._round(2, sent_threshold(threshold, self.options.soft), store)

    def manifest(
        self, threshold: Threshold, model: str, samples: Counts, kept: Counts
    ) -> dict[str, Any]:
        """Return what was done, for the bundle's card."""
        return manifest(
            threshold,
            rule=self.options.threshold.model_dump(mode="json", exclude_none=True),
            soft=self.options.soft,
            domains=self.public.domains,
            data=self.data.fingerprint,
            public=self.public.fingerprint,
            model=model,
            samples=samples,
            kept=kept,
            epsilon=self.options.epsilon,
        )

    def held(self, store: Store) -> Iterator[tuple[str, Tensors, Tensors]]:
        """Yield each client, its scores, and what it keeps: of a simulation, not of the protocol.

        ``keep`` is a bool for each sample, ``weights`` what it counts, where asked for.
        """
        for path in self.tree.leaves():
            state = store.get(path)
            yield name_of(path), state.group(SCORES_GROUP), state.group(KEEP_GROUP)

    def _round(self, number: int, sent: State, store: Store) -> tuple[Counts, RoundResult]:
        options = self.options
        method = Curate(
            scores=options.scores,
            blank=self.data.blank,
            num_domains=len(self.public.domains),
            sketch=options.sketch,
            epsilon=options.epsilon,
            soft_rate=options.threshold.rate if options.soft else None,
        )
        kind = "flower" if self.engine.kind == "flower" else "sequential"
        federation = Federation(
            self.model,
            self._clients(),
            method,
            self.training,
            seed=self.seed,
            buffers="local",
            tree=self.tree,
            engine=EngineOptions(kind=kind, workers=self.engine.workers),
            objective=NextToken(self.data.bytes_of),
        )
        store.put(ROOT, sent)
        federation.keep_states_in(store, number - 1)
        # One round more than is run: after the last one models would be scored.
        with closing(federation.rounds(number + 1, number, score_every=0)) as rounds:
            result = next(rounds)
        counts = federation.state_of(ROOT).group(COUNTS)
        if missing := [name_of(path) for path in self.tree.leaves() if path not in counts]:
            found = f"no counts of {', '.join(missing[:3])}"
            raise InputError("curation", found, "an answer of every client: another try")
        named = {name_of(path): counts[path].clamp(min=0) for path in sorted(counts)}
        result = replace(result, number=0, engine=f"curation, {result.engine}")
        return named, result

    def _clients(self) -> dict[str, Client]:
        """Return what the leaves hold for training, with the domains of their samples."""
        clients = {}
        for path in self.tree.leaves():
            name = name_of(path)
            client, examples = self.data.clients[name], self.data.examples[name]
            num = len(examples)
            rows = np.arange(num)
            splits: dict[Split, Index] = dict.fromkeys(SPLITS, rows[:0])
            splits["train"] = rows
            domains = self.public.numbers(examples)
            inputs, labels = client.inputs[:num], client.labels[:num]
            clients[name] = Client(inputs, labels, splits, domains=domains)
        return clients

    def _reference(self) -> Pair:
        """Return the samples that DataInf's matrices are made of: all that are public."""
        held = [packed for packed in (self.public.validation, self.public.anchors) if packed]
        pairs = [_pair(packed) for packed in held]
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def check_counts(
    options: CurationOptions, domains: Sequence[str], samples: Counts, kept: Counts
) -> list[str]:
    """Return what a filter does that it should not, in words, or stop because of it.

    Args:
        options: the floors.
        domains: names of the domains.
        samples: client -> samples by domain, in the first column.
        kept: client -> those kept by domain, in the first column.

    Raises:
        InputError: a floor is not reached, and ``guard.action`` is ``stop``; a domain without
            anchors, where each domain has a threshold of its own.
    """
    # What is not above it may be noise alone, of which nothing follows.
    noise = 0.0 if options.epsilon is None else noise_below(options.epsilon)
    if options.threshold.per_domain:
        for name, each in samples.items():
            if (other := int(each[-1, 0])) > noise:
                found = f"{other} samples of {name} in a domain that no anchor has"
                raise InputError("curation.anchors", found, "anchors of every domain")
    guard, short = options.guard, list[tuple[str, str]]()
    for name, each in samples.items():
        num, left = int(each[:, 0].sum()), int(kept[name][:, 0].sum())
        if num > noise and (left == 0 or left < guard.client * num):
            short.append(("client", f"client {name} keeps {left} of {num} samples"))
    rows = (*domains, "any other")
    for k, name in enumerate(rows):
        held = [client for client, each in samples.items() if each[k, 0] > noise]
        num, left = (sum(int(of[client][k, 0]) for client in held) for of in (samples, kept))
        if len(domains) > 1 and num and left < guard.domain * num:
            short.append(("domain", f"domain {name!r} keeps {left} of {num} samples"))
    if short and guard.action == "stop":
        key, found = short[0]
        floor = getattr(guard, key)
        raise InputError(
            f"curation.guard.{key}",
            found,
            f"a share of {floor:g} and at least one; another threshold, "
            f"curation.guard.{key} lower, or curation.guard.action = 'warn'",
        )
    return [text for _, text in short]


def check_use(ifd: torch.Tensor) -> None:
    """Warn of anchors whose answers their questions hardly help: the ratio then tells nothing.

    Args:
        ifd: oriented scores of the anchors [m].
    """
    median = -float(ifd.median())
    if median > UNUSED:
        _log.warning(
            "curation: the median IFD of the anchors is %.2f: the model hardly uses their "
            "questions; conditional_loss may tell more",
            median,
        )


def _pair(packed: Packed) -> Pair:
    return packed.inputs, packed.labels


def params_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's trainable parameters, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def curated(cohort: Cohort, model: nn.Module) -> Kept:
    """Score and filter in one go, by the model as it is.

    Raises:
        InputError: see ``Cohort.threshold`` and ``check_counts``.
    """
    at, store = params_of(model), MemoryStore()
    points = cohort.points(at, [])
    threshold = cohort.threshold(cohort.anchor_scores(points))
    samples, scored = cohort.score(points, store)
    kept, filtered = cohort.filter(threshold, store)
    for warning in check_counts(cohort.options, cohort.public.domains, samples, kept):
        _log.warning("curation: %s", warning)
    return Kept(
        {name: keep for name, _, keep in cohort.held(store)},
        {
            **cohort.manifest(threshold, digest(model.state_dict()), samples, kept),
            "ledger": ledger(scored, filtered),
        },
    )


def ledger(*results: RoundResult) -> list[dict[str, Any]]:
    """Return what rounds have sent, as JSON values."""
    about = ("path", "fate", "down", "up")
    return [{key: getattr(v, key) for key in about} for result in results for v in result.visits]
