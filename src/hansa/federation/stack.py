"""Several leaves at once: their work stacked, one tensor per entry, and stepped together.

Leaves whose work has equal shapes go through the stages of local training side by side; `vmap`
makes of a method's step for one client the step for all of them. Clients of unequal size need no
care of the method's: those with most samples stand first, and a stack becomes shorter when its
last clients have no batch left; a batch that is shorter than the others' is filled up with samples
of weight zero. Nothing of that changes a result beyond the rounding of sums.

What cannot be stacked is done leaf by leaf, and ``failure`` says why.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.func import vmap

from hansa.data.clients import Client, Split, take
from hansa.federation.leaf import (
    SCORED_SPLITS,
    DivergedError,
    Job,
    Leaf,
    Metrics,
    Scores,
    Trained,
    check_work,
)
from hansa.federation.message import State, Tensors
from hansa.federation.methods.base import Work
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch, PureTask
from hansa.seeding import global_stream

T = TypeVar("T")
Step = Callable[[Work, Batch], Work]
Model = tuple[Tensors, Tensors]
EVALUATED = 1024
"""Samples that are scored in one call, over all clients of a stack."""

_log = logging.getLogger("hansa.engine")


@dataclass(frozen=True)
class Item:
    """One leaf of a stack: where it stands, its data, and its work so far."""

    node: Node
    client: Client
    work: Work


class Stack:
    """Trains and scores several leaves at once.

    Args:
        leaf: what does one leaf.
        pads: whether batches of unequal sizes may be filled up. Not so for a model that mixes the
            samples of a batch (BatchNorm): its clients are stacked with those of equal size.

    Attributes:
        failure: why leaves are done one by one, empty while they are not.
    """

    def __init__(self, leaf: Leaf, pads: bool = True) -> None:
        self.leaf, self.pads, self.failure = leaf, pads, ""
        self._setup: Setup | None = None

    def train(self, jobs: Sequence[Job]) -> list[Trained | DivergedError]:
        """Return each leaf's new state, its reply and its training metrics, or its error."""
        method, items, states = self.leaf.method, [], []
        for job in jobs:
            node = self.leaf.node(job)
            states.append(method.receive(node, job.state, job.down))
            items.append(Item(node, job.client, method.begin(node, states[-1])))
        works = self.fit(items, self.leaf.setup.training.epochs)
        return [
            work if isinstance(work, DivergedError) else self.leaf.end(item.node, state, work)
            for item, state, work in zip(items, states, works, strict=True)
        ]

    def score(self, jobs: Sequence[Job]) -> list[Scores | DivergedError]:
        """Return the metrics of each leaf's model by split, and of its state, or its error."""
        nodes = [self.leaf.node(job) for job in jobs]
        states = [self.leaf.held(node, job) for node, job in zip(nodes, jobs, strict=True)]
        models = self._models(jobs, nodes, states)
        scores: list[Scores] = [{} for _ in jobs]
        for split in SCORED_SPLITS:
            chosen = [
                (Item(node, job.client, _as_work(model)), into)
                for node, job, model, into in zip(nodes, jobs, models, scores, strict=True)
                if not isinstance(model, DivergedError) and job.client.count(split)
            ]
            metrics = self._evaluate([item for item, _ in chosen], split)
            for (_, into), found in zip(chosen, metrics, strict=True):
                into[split] = found
        return [
            model if isinstance(model, DivergedError) else _caught(self.leaf.scored, *about)
            for model, *about in zip(models, nodes, states, scores, strict=True)
        ]

    def fit(self, items: Sequence[Item], epochs: int) -> list[Work | DivergedError]:
        """Return the work of each item after all stages of its training, or its error."""

        def kind(item: Item) -> Hashable:
            stages = tuple(self.leaf.method.stages(item.node, item.work, epochs))
            return stages, _signature(item.work), self.pads or item.node.samples

        def alone(item: Item) -> Work | DivergedError:
            return _caught(self.leaf.fit, item.node, item.work, item.client, epochs)

        def together(group: list[Item]) -> list[Work | DivergedError]:
            stages = self.leaf.method.stages(group[0].node, group[0].work, epochs)
            return self._stages(group, stages)

        return self._in_groups(items, kind, together, alone)

    def step(self, phase: str) -> Step:
        """Return the step of a phase for stacked work and a stacked batch."""
        method, setup = self.leaf.method, self._setup
        assert setup is not None  # noqa: S101

        def one(work: Work, batch: Batch) -> Work:
            return method.step(setup, work, batch, phase)

        return vmap(one)

    def prepare(self, client: Client) -> Setup:
        """Return the setup whose task can be stacked; any client's first samples show its shape."""
        if self._setup is None:
            setup = self.leaf.setup
            task, first = setup.task, torch.from_numpy(client.splits["train"][:2])
            with global_stream(self.leaf.seed, "probe"):
                batch = take(client.inputs, client.labels, first)
                gradients, _, _ = task.gradients(task.params, task.buffers, batch)
            unused = frozenset(name for name, gradient in gradients.items() if gradient is None)
            self._setup = replace(setup, task=PureTask(task, unused))
        return self._setup

    def _in_groups(
        self,
        items: Sequence[Item],
        kind: Callable[[Item], Hashable],
        together: Callable[[list[Item]], list[T]],
        alone: Callable[[Item], T],
    ) -> list[T]:
        """Return what ``together`` makes of the items of each kind, in the order of the items."""
        found: dict[int, T] = {}
        for numbers in _grouped(range(len(items)), lambda k: kind(items[k])):
            group = [items[k] for k in numbers]
            if len(group) > 1 and not self.failure:
                try:
                    self.prepare(group[0].client)
                    found.update(zip(numbers, together(group), strict=True))
                    continue
                # What vmap cannot take shows as one of these, and so does a lack of memory.
                except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                    self.failure = (str(error).strip() or repr(error)).splitlines()[0]
                    _log.warning("clients are trained one by one: %s", self.failure)
            found.update((k, alone(items[k])) for k in numbers)
        return [found[k] for k in range(len(items))]

    def _stages(
        self, items: list[Item], stages: Sequence[tuple[str, int]]
    ) -> list[Work | DivergedError]:
        method = self.leaf.method
        works: list[Work | DivergedError] = [item.work for item in items]
        for stage, num in stages:
            # A pass that a client can leave out (its masks say so) tears a stack apart.
            live = [k for k, work in enumerate(works) if not isinstance(work, DivergedError)]
            passes = {k: tuple(method.phases(_whole(works[k]), stage)) for k in live}
            for numbers in _grouped(live, lambda k: (passes[k], _signature(_whole(works[k])))):  # noqa: B023
                group = [replace(items[k], work=_whole(works[k])) for k in numbers]
                trained = self._epochs(group, stage, num, passes[numbers[0]])
                for k, work in zip(numbers, trained, strict=True):
                    works[k] = _caught(self._after, items[k].node, work, stage)
        return works

    def _after(self, node: Node, work: Work, stage: str) -> Work:
        check_work(node, work)
        return self.leaf.method.after(node, work, stage)

    def _epochs(self, items: list[Item], stage: str, num: int, phases: Sequence[str]) -> list[Work]:
        """Return the work of items of one kind after the epochs of one stage."""
        order = sorted(range(len(items)), key=lambda k: -items[k].node.samples)
        sorted_items = [items[k] for k in order]
        work = _stacked([item.work for item in sorted_items])
        pool = Pool([item.client for item in sorted_items], "train")
        # Only where an epoch has several phases do its ends have to meet.
        epochs = [[epoch] for epoch in range(num)] if len(phases) > 1 else [list(range(num))]
        for part in epochs:
            for phase in phases:
                orders = [
                    [self.leaf.order(item.node, stage, epoch) for epoch in part]
                    for item in sorted_items
                ]
                batches = pool.batches(orders, self.leaf.setup.training.batch_size)
                work = self._pass(self.step(phase), work, batches)
        rows = _unstacked(work, len(items))
        return [rows[order.index(k)] for k in range(len(items))]

    def _pass(self, step: Step, work: Work, batches: Iterable[Batch]) -> Work:
        """Return the work after some batches; those at the end of the stack may run out first."""
        finished: list[Work] = []
        size = len(work["metrics"]["count"])
        for batch in batches:
            if len(batch[1]) < size:
                finished.append(_rows(work, len(batch[1]), size))
                work, size = _rows(work, 0, len(batch[1])), len(batch[1])
            work = step(work, batch)
        return _joined([work, *reversed(finished)]) if finished else work

    def _models(
        self, jobs: Sequence[Job], nodes: Sequence[Node], states: Sequence[State]
    ) -> list[Model | DivergedError]:
        """Return each client's model that is to be scored."""
        method, setup = self.leaf.method, self.leaf.setup
        if method.scored != "tuned":
            return [method.model(setup, state) for state in states]
        items = [
            Item(node, job.client, method.tune(node, state))
            for job, node, state in zip(jobs, nodes, states, strict=True)
        ]
        return [
            work if isinstance(work, DivergedError) else (work["params"], work["buffers"])
            for work in self.fit(items, method.tune_epochs(setup))
        ]

    def _evaluate(self, items: Sequence[Item], split: Split) -> list[Metrics]:
        """Return the metrics of each client's model on a split of its data."""
        task = self.leaf.setup.task

        def alone(item: Item) -> Metrics:
            with global_stream(self.leaf.seed, item.node.path, item.node.round, "score"):
                batch = item.client.batch(split)
                return task.evaluate(item.work["params"], item.work["buffers"], batch)

        def together(group: list[Item]) -> list[Metrics]:
            pool = Pool([item.client for item in group], split)
            works = [item.work for item in group]
            shared = all(_is_same(work, works[0]) for work in works)
            held = works[0] if shared else _stacked(works)

            def one(work: Work, batch: Batch) -> Tensors:
                return task.loss(work["params"], work["buffers"], batch, training=False)[1]

            call = vmap(one, in_dims=(None if shared else 0, 0))
            totals = torch.zeros(3, len(group), dtype=torch.float64)
            for batch in pool.all(max(1, EVALUATED // len(group))):
                metrics = call(held, batch)
                rows = [metrics[name].double() for name in ("loss", "accuracy", "count")]
                totals += torch.stack(rows)
            loss, accuracy, count = totals.tolist()
            return [
                {"loss": (loss[k], count[k]), "accuracy": (accuracy[k], count[k])}
                for k in range(len(group))
            ]

        with torch.no_grad():
            return self._in_groups(items, lambda item: _signature(item.work), together, alone)


class Pool:
    """The data of some clients, from which stacked batches are taken.

    Clients that hold parts of one pool of samples are read from there; others are put together.
    """

    def __init__(self, clients: Sequence[Client], split: Split) -> None:
        index = [torch.from_numpy(client.splits[split]) for client in clients]
        first = clients[0]
        if all(client.inputs is first.inputs for client in clients):
            self._inputs, self._labels, self._index = first.inputs, first.labels, index
        else:
            pairs = zip(clients, index, strict=True)
            parts = [(client.inputs[rows], client.labels[rows]) for client, rows in pairs]
            self._inputs = torch.cat([inputs for inputs, _ in parts])
            self._labels = torch.cat([labels for _, labels in parts])
            self._index = list(torch.arange(len(self._labels)).split([len(i) for i in index]))

    def batches(self, orders: Sequence[Sequence[torch.Tensor]], size: int) -> Iterator[Batch]:
        """Yield stacked batches [clients, size, ...], of fewer clients when the last run out.

        Args:
            orders: for each client, the order of its samples in each epoch; clients with more
                samples stand first.
            size: samples per batch; the last one of an epoch may be shorter.
        """
        chunks = [
            [chunk for order in epochs for chunk in rows[order].split(size)]
            for rows, epochs in zip(self._index, orders, strict=True)
        ]
        for number in range(max(len(row) for row in chunks)):
            yield self._batch([row[number] for row in chunks if number < len(row)])

    def all(self, size: int) -> Iterator[Batch]:
        """Yield all samples of every client as stacked batches; what is filled up weighs zero."""
        chunks = [list(rows.split(size)) for rows in self._index]
        nothing = torch.zeros(0, dtype=torch.int64)
        for number in range(max(len(row) for row in chunks)):
            yield self._batch([row[number] if number < len(row) else nothing for row in chunks])

    def _batch(self, rows: list[torch.Tensor]) -> Batch:
        width = max(len(row) for row in rows)
        if all(len(row) == width for row in rows):
            return take(self._inputs, self._labels, torch.stack(rows))
        index = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=int(max(rows, key=len)[0])
        )
        filled = torch.tensor([len(row) for row in rows])[:, None]
        weights = (torch.arange(width) < filled).to(torch.get_default_dtype())
        return (*take(self._inputs, self._labels, index), weights)


def _grouped(numbers: Iterable[int], kind: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        groups[kind(number)].append(number)
    return list(groups.values())


def _caught(call: Callable[..., T], *arguments: object) -> T | DivergedError:
    try:
        return call(*arguments)
    except DivergedError as error:
        return error


def _whole(work: Work | DivergedError) -> Work:
    if isinstance(work, DivergedError):
        raise work
    return work


def _as_work(model: Model) -> Work:
    return {"params": dict(model[0]), "buffers": dict(model[1])}


def _is_same(work: Work, other: Work) -> bool:
    return all(other[g][n] is tensor for g, group in work.items() for n, tensor in group.items())


def _signature(work: Work) -> Hashable:
    """Return what two pieces of work must have in common to be stacked."""
    return tuple(
        (group, tuple((name, t.shape, t.dtype) for name, t in tensors.items()))
        for group, tensors in work.items()
    )


def _stacked(works: Sequence[Work]) -> Work:
    return {
        group: {name: torch.stack([work[group][name] for work in works]) for name in tensors}
        for group, tensors in works[0].items()
    }


def _unstacked(work: Work, size: int) -> list[Work]:
    # Layouts choose kernels, and those round in their own ways.
    whole = {g: {n: t.contiguous() for n, t in tensors.items()} for g, tensors in work.items()}
    return [
        {g: {n: t[k] for n, t in tensors.items()} for g, tensors in whole.items()}
        for k in range(size)
    ]


def _rows(work: Work, start: int, stop: int) -> Work:
    return {g: {n: t[start:stop] for n, t in tensors.items()} for g, tensors in work.items()}


def _joined(parts: Sequence[Work]) -> Work:
    return {
        group: {name: torch.cat([part[group][name] for part in parts]) for name in tensors}
        for group, tensors in parts[0].items()
    }
