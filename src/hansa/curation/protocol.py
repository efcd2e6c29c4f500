"""What nodes exchange to filter their data: two rounds of an ordinary method.

======  ==================================================  =======================================
round   goes down                                           comes up
======  ==================================================  =======================================
score   the model, and what gradients are compared with     by client and domain: samples, and how
                                                            many could not be scored
filter  the threshold: one number, or one for each domain   by client and domain: samples kept
        (with several scores or soft weights, the anchors'
        scores as well, which are public)
======  ==================================================  =======================================

Samples, tokens and scores of samples stay where they are: a client's scores, and which samples it
keeps, are part of its own state. Even the counts may be noised.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch

from hansa.curation.gradients import Sketch
from hansa.curation.scores import Point, Sample, measure, oriented
from hansa.curation.thresholds import Threshold
from hansa.data.clients import Client
from hansa.federation.aggregation import add_metrics
from hansa.federation.message import Message, MessageError, State, Tensors
from hansa.federation.methods.base import Asking, Work
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.wire import encode
from hansa.seeding import generator

SCORES_GROUP, KEEP_GROUP, COUNTS = "scores", "keep", "counts"
_LEVEL, _REFERENCE, _ANCHORS = "level", "reference", "anchors"
_MODEL, _CHECKPOINT = "model", "checkpoint"


class Curate(Asking):
    """Scores and filters; not a way to train, so no configuration can name it."""

    name: ClassVar[str] = "curation"
    common: ClassVar[bool] = False
    scores: tuple[str, ...]
    blank: tuple[int, ...]
    num_domains: int
    sketch: int | None = None
    epsilon: float | None = None
    soft_rate: float | None = None
    """p-value from which on a sample counts in full; None where samples are kept or not."""

    def start_root(self, node: Node) -> State:
        """Return nothing: what is sent is put into the root's state before each round."""
        return State()

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return what the parent sent, beside the scores that the node has made before."""
        own = {g: state.groups[g] for g in (SCORES_GROUP, KEEP_GROUP) if state.group(g)}
        return State({**own, **down.groups}, down.scalars)

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the same message to every child."""
        down = Message({g: t for g, t in state.groups.items() if g != COUNTS}, state.scalars)
        return ((child.path, down) for child in children)

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what the client makes of what it was sent, and its counts."""
        assert node.client is not None  # noqa: S101 leaves hold data
        domains = domains_of(node.client)
        if "by" in state.scalars:
            keep = self._filtered(state, domains)
            kept = {SCORES_GROUP: state.groups[SCORES_GROUP], KEEP_GROUP: keep}
            counted = self._counts(node, state, domains, [keep["keep"]])
            return State(kept), Message({COUNTS: {node.path: counted}})
        found = self._scores(node.setup, state, node.client)
        usable = torch.stack([values.isfinite() for values in found.values()]).all(0)
        counted = self._counts(node, state, domains, [torch.ones_like(usable), ~usable])
        return State({SCORES_GROUP: found}), Message({COUNTS: {node.path: counted}})

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the counts of all clients below, by their paths."""
        counts: dict[str, torch.Tensor] = {}
        metrics: dict[str, tuple[float, float]] = {}
        shape = (self.num_domains + 1, 1 if "by" in state.scalars else 2)
        for reply in replies:
            for path, each in reply.message.group(COUNTS).items():
                if path != reply.path and not path.startswith(f"{reply.path}/"):
                    raise MessageError(f"counts of {path} from {reply.path}")
                if each.dtype is not torch.int64 or each.shape != shape:
                    raise MessageError(f"counts of {path} are {each.dtype} {tuple(each.shape)}")
                counts[path] = each
            add_metrics(metrics, reply.message.metrics)
        return State({COUNTS: counts}, {}, metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Return the counts of all clients below."""
        return Message({COUNTS: state.group(COUNTS)}, {}, state.metrics)

    def _scores(self, setup: Setup, state: State, client: Client) -> dict[str, torch.Tensor]:
        """Return the client's scores, higher for better samples."""
        model, checkpoints = points_from(state)
        inputs, labels = client.batch("train")
        sample = Sample(
            setup.task,
            setup.task.buffers,
            model,
            checkpoints,
            (inputs, labels),
            self.blank,
            Sketch(self.sketch, setup.seed),
        )
        found = measure(self.scores, sample)
        return {name: oriented(name, values) for name, values in found.items()}

    def _filtered(self, state: State, domains: torch.Tensor) -> dict[str, torch.Tensor]:
        threshold, scores = threshold_from(state), state.group(SCORES_GROUP)
        keep = threshold.keep(scores, domains)
        if self.soft_rate is None:
            return {"keep": keep}
        weights = threshold.weights(scores, domains, self.soft_rate)
        return {"keep": keep, "weights": weights}

    def _counts(
        self, node: Node, state: State, domains: torch.Tensor, columns: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return how many samples of each domain [domains + 1, columns] are in each column.

        One sample more or less changes the columns of one domain by one each at most, so noise of
        P(k) ~ exp(-|k| eps / columns) is eps-private (Ghosh et al., STOC 2009). Each of the two
        replies spends half of epsilon. The noise is another for another question: were it the
        same, the difference of two answers would be exact.
        """
        num = self.num_domains + 1
        counts = torch.stack([torch.bincount(domains[c], minlength=num) for c in columns], 1)
        if self.epsilon is None:
            return counts
        asked = {g: t for g, t in state.groups.items() if g not in (SCORES_GROUP, KEEP_GROUP)}
        question = hashlib.sha256(encode(Message(asked, state.scalars))).hexdigest()
        rng = generator(node.setup.seed, node.path, node.round, "counts", question)
        chance = -math.expm1(-self.epsilon / 2 / len(columns))
        shape = counts.shape
        drawn = [torch.empty(shape).geometric_(chance, generator=rng).long() for _ in "+-"]
        return counts + drawn[0] - drawn[1]


def noise_below(epsilon: float) -> float:
    """Return what the noise of a count of the first round stays below, but for 1 in 40,000."""
    return 4 / epsilon * math.log(20_000)


def domains_of(client: Client) -> torch.Tensor:
    """Return the number of the domain of each training sample [n]; 0 where there are none."""
    index = torch.from_numpy(client.splits["train"])
    if client.domains is None:
        return torch.zeros(len(index), dtype=torch.int64)
    return client.domains[index]


def sent_points(model: Point, checkpoints: Iterable[Point]) -> State:
    """Return what the root sends for samples to be scored."""
    groups: dict[str, Tensors] = {_MODEL: model.params}
    scalars: dict[str, float] = {}
    for number, point in enumerate(checkpoints):
        key = f"{_CHECKPOINT}.{number:03d}"
        if point.params is not model.params:
            groups[key] = point.params
        scalars[key] = point.rate
        for name, direction in point.directions.items():
            groups[f"{key}.{name}"] = {block: v.float() for block, v in direction.items()}
    return State(groups, scalars)


def points_from(state: State) -> tuple[Point, list[Point]]:
    """Return what ``sent_points`` has put into a message."""
    model = Point(state.groups[_MODEL])
    checkpoints = []
    for key in sorted(k for k in state.scalars if k.startswith(_CHECKPOINT)):
        directions = {
            group.removeprefix(f"{key}."): tensors
            for group, tensors in state.groups.items()
            if group.startswith(f"{key}.")
        }
        params = state.group(key) or model.params
        checkpoints.append(Point(params, state.number(key), directions))
    return model, checkpoints


def sent_threshold(threshold: Threshold, soft: bool) -> State:
    """Return what the root sends for samples to be filtered."""
    numbers = sorted(threshold.levels)
    groups: dict[str, Mapping[str, torch.Tensor]] = {
        _LEVEL: {
            "domains": torch.tensor(numbers),
            "values": torch.tensor([threshold.levels[k] for k in numbers], dtype=torch.float64),
        },
        _REFERENCE: threshold.reference,
    }
    if soft:
        groups[_ANCHORS] = {str(k): held for k, held in threshold.anchors.items()}
    scalars: dict[str, str | float] = {"by": ",".join(threshold.by)}
    if threshold.share is not None:
        scalars["share"] = threshold.share
    return State({group: tensors for group, tensors in groups.items() if tensors}, scalars)


def threshold_from(state: State) -> Threshold:
    """Return what ``sent_threshold`` has put into a message."""
    level = state.groups[_LEVEL]
    levels = dict(zip(level["domains"].tolist(), level["values"].tolist(), strict=True))
    return Threshold(
        tuple(str(state.scalars["by"]).split(",")),
        state.number("share") if "share" in state.scalars else None,
        levels,
        state.group(_REFERENCE),
        {int(number): held for number, held in state.group(_ANCHORS).items()},
    )
