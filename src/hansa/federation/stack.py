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
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.func import vmap

from hansa.data.clients import Client, Split, take
from hansa.errors import first_line
from hansa.federation.compiled import Program, Programs, fill, masked
from hansa.federation.engines.plan import Plan
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
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Work, scheduled
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.pool import Pool
from hansa.federation.spending import SPENT, opened
from hansa.models.task import Batch, PureTask
from hansa.seeding import global_stream

T = TypeVar("T")
Step = Callable[[Work, Batch], Work]
Model = tuple[Tensors, Tensors]
EVALUATED = 1024
"""Labels that are scored in one call, over all clients of a stack."""

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
        plan: how stacks are done. Where its ``pads`` is not set, for a model that mixes the samples
            of a batch (BatchNorm), clients are stacked with those of equal size only.
        width: samples of a full batch, over all clients.

    Attributes:
        failure: why some leaves are done one by one, empty while none are.
        programs: the compiled steps, where the plan has any.
    """

    def __init__(self, leaf: Leaf, plan: Plan, width: int) -> None:
        self.leaf, self.plan, self.width, self.failure = leaf, plan, width, ""
        self.programs = Programs(plan.wait) if plan.kind == "compiled" else None
        self._device = torch.device(plan.device)
        self._setup: Setup | None = None
        self._pools: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._failed: set[Hashable] = set()

    def train(self, jobs: Sequence[Job]) -> list[Trained | DivergedError]:
        """Return each leaf's new state, its reply and its training metrics, or its error."""
        method, items, about = self.leaf.method, [], []
        found: dict[int, Trained | DivergedError] = {}
        for number, job in enumerate(jobs):
            node = opened(self.leaf.node(job), job.state)
            if node is None:
                found[number] = job.state, Message(), SPENT
                continue
            state = method.receive(node, job.state, job.down)
            items.append(Item(node, job.client, method.begin(node, state)))
            about.append((number, job, state))
        works = self.fit(items, self.leaf.setup.training.epochs)
        for (number, job, state), item, work in zip(about, items, works, strict=True):
            if isinstance(work, DivergedError):
                found[number] = work
            else:
                found[number] = self.leaf.end(item.node, job, state, work)
        return [found[number] for number in range(len(jobs))]

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
        items = [replace(item, work=scheduled(item.node, item.work)) for item in items]

        def kind(item: Item) -> Hashable:
            stages = tuple(self.leaf.method.stages(item.node, item.work, epochs))
            return stages, _kind(item), self.plan.pads or item.node.samples

        def alone(item: Item) -> Work | DivergedError:
            return _caught(self.leaf.fit, item.node, item.work, item.client, epochs)

        if self.leaf.setup.uneven:  # a stack has one setup, which knows no node's privacy
            return [alone(item) for item in items]

        def together(group: list[Item]) -> list[Work | DivergedError]:
            stages = self.leaf.method.stages(group[0].node, group[0].work, epochs)
            return self._stages(group, stages)

        return self._in_groups(items, kind, together, alone)

    def prepare(self, client: Client) -> Setup:
        """Return the setup whose task can be stacked; any client's first samples show its shape."""
        if self._setup is None:
            setup, plan = self.leaf.setup, self.plan
            task, first = setup.task, torch.from_numpy(client.splits["train"][:2])
            with torch.enable_grad(), global_stream(self.leaf.seed, "probe"):
                batch = take(client.inputs, client.labels, first)
                gradients, _, _ = task.gradients(task.params, task.buffers, batch)
            unused = frozenset(name for name, gradient in gradients.items() if gradient is None)
            pure = PureTask(task, unused, plan.device, plan.precision)
            self._setup = replace(setup, task=pure)
        return self._setup

    def _on(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a pool of samples on the device, where it stays once it was brought there."""
        if self._device.type == "cpu":
            return inputs, labels
        key = id(inputs), id(labels)
        if key not in self._pools:
            self._pools[key] = inputs.to(self._device), labels.to(self._device)
        return self._pools[key]

    def _in_groups(
        self,
        items: Sequence[Item],
        kind: Callable[[Item], Hashable],
        together: Callable[[list[Item]], list[T]],
        alone: Callable[[Item], T],
    ) -> list[T]:
        """Return what ``together`` makes of the items of each kind, in the order of the items."""
        found: dict[int, T] = {}
        for about, numbers in _grouped(range(len(items)), lambda k: kind(items[k])).items():
            group = [items[k] for k in numbers]
            if about not in self._failed and (len(group) > 1 or self.plan.is_rough):
                try:
                    self.prepare(group[0].client)
                    found.update(zip(numbers, together(group), strict=True))
                    continue
                # What vmap cannot take shows as one of these, and so does a lack of memory.
                except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                    self._failed.add(about)
                    if not self.failure:
                        self.failure = _reason(error)
                        _log.warning("some clients are done one by one: %s", self.failure)
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
            kinds = {k: (passes[k], _signature(_whole(works[k]))) for k in live}
            for numbers in _grouped(live, kinds.__getitem__).values():
                group = [replace(items[k], work=_whole(works[k])) for k in numbers]
                trained, finite = self._epochs(group, stage, num, passes[numbers[0]])
                for k, work, sound in zip(numbers, trained, finite, strict=True):
                    works[k] = _caught(self._after, items[k].node, work, stage, sound)
        return works

    def _after(self, node: Node, work: Work, stage: str, sound: bool) -> Work:
        if not sound:
            check_work(node, work)
        return scheduled(node, self.leaf.method.after(node, work, stage))

    def _epochs(
        self, items: list[Item], stage: str, num: int, phases: Sequence[str]
    ) -> tuple[list[Work], list[bool]]:
        """Return the work of items of one kind after the epochs of one stage.

        With it goes whether it is surely finite.
        """
        order = sorted(range(len(items)), key=lambda k: -items[k].node.samples)
        sorted_items = [items[k] for k in order]
        pool = Pool([item.client for item in sorted_items], "train", self._on)
        work = _moved(_stacked([item.work for item in sorted_items]), self._device)
        # A stack that is less than half full is faster without a program.
        compiled = self.programs is not None and 2 * len(items) >= self.plan.stack
        if compiled:
            work = _filled_up(work, self.plan.stack)
        # Only where an epoch has several phases do its ends have to meet.
        epochs = [[epoch] for epoch in range(num)] if len(phases) > 1 else [list(range(num))]
        with torch.no_grad():
            for part in epochs:
                for phase in phases:
                    orders = [
                        [self.leaf.order(item.node, stage, epoch) for epoch in part]
                        for item in sorted_items
                    ]
                    batches = pool.batches(orders, self.leaf.setup.training.batch_size)
                    work = (self._compiled if compiled else self._pass)(phase, work, batches)
        rows, finite = _unstacked(_moved(work, torch.device("cpu")), len(items))
        places = [order.index(k) for k in range(len(items))]
        return [rows[place] for place in places], [finite[place] for place in places]

    def _step(self, phase: str) -> Step:
        method, setup = self.leaf.method, self._setup
        assert setup is not None  # noqa: S101

        def one(work: Work, batch: Batch) -> Work:
            return method.step(setup, work, batch, phase)

        return one

    def _pass(self, phase: str, work: Work, batches: Iterable[Batch]) -> Work:
        """Return the work after some batches; those at the end of the stack may run out first."""
        step, finished = vmap(self._step(phase)), []
        size = len(work["metrics"]["count"])
        for batch in batches:
            if len(batch[1]) < size:
                finished.append(_rows(work, len(batch[1]), size))
                work, size = _rows(work, 0, len(batch[1])), len(batch[1])
            work = step(work, batch)
        return _joined([work, *reversed(finished)]) if finished else work

    def _compiled(self, phase: str, work: Work, batches: Iterable[Batch]) -> Work:
        """Return the work after some batches, by a program from the moment there is one."""
        assert self.programs is not None  # noqa: S101
        step = masked(self._step(phase))
        programs: dict[int, Program | None] = {}
        for number, batch in enumerate(batches):
            width = self.width if self.plan.pads else batch[1].shape[1]
            filled = fill(batch, self.plan.stack, width)
            # The first step may add the memory of an optimizer; after that shapes stay.
            if width not in programs or number == 1:
                about = (phase, _signature(work), filled[0].shape)
                programs[width] = self.programs.find(about, step, work, filled)
            program = programs[width]
            work = program.step(work, filled) if program else step(work, filled)
        return work

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
            work if isinstance(work, DivergedError) else method.trained(setup, work)
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
            pool = Pool([item.client for item in group], split, self._on)
            works = [item.work for item in group]
            shared = all(_is_same(work, works[0]) for work in works)
            held = _moved(works[0] if shared else _stacked(works), self._device)
            pure = self.prepare(group[0].client).task

            def one(work: Work, batch: Batch) -> Tensors:
                return pure.loss(work["params"], work["buffers"], batch, training=False)[1]

            call = vmap(one, in_dims=(None if shared else 0, 0))
            objective = task.objective
            shape = len(objective.sums), len(group)
            totals = torch.zeros(shape, dtype=torch.float64, device=self._device)
            each = max(1, group[0].client.labels[:1].numel())  # labels of a sample
            for batch in pool.all(max(1, EVALUATED // (len(group) * each))):
                metrics = call(held, batch)
                totals += torch.stack([metrics[name].double() for name in objective.sums])
            columns = totals.T.tolist()
            return [
                objective.totals(dict(zip(objective.sums, column, strict=True)))
                for column in columns
            ]

        with torch.no_grad():
            if self.plan.scores:
                return self._in_groups(items, _kind, together, alone)
            return [alone(item) for item in items]


def try_out(leaf: Leaf, jobs: Sequence[Job], plan: Plan) -> tuple[Plan, str]:
    """Try a step and a score of some clients both ways, stacked and one by one.

    Args:
        leaf: what does one leaf.
        jobs: two clients or more.
        plan: how stacks are done.

    Returns:
        The plan with what was found (``pads``, ``scores``), and why clients cannot be stacked,
        empty where they can.
    """
    training = leaf.setup.training
    # Other optimizers make a whole step of the rounding of a gradient that is zero.
    plain = Training(lr=training.lr, batch_size=training.batch_size)
    leaf = replace(leaf, setup=replace(leaf.setup, training=plain))
    failure = ""
    for pads in (True, False):
        stack = Stack(leaf, replace(plan, pads=pads), 0)
        failure = _told(_difference, stack, jobs)
        if not failure:
            return replace(stack.plan, scores=not _told(_score_difference, stack, jobs)), ""
    return plan, failure


def _told(compare: Callable[[Stack, Sequence[Job]], str], stack: Stack, jobs: Sequence[Job]) -> str:
    try:
        return compare(stack, jobs)
    except Exception as error:  # a user's module may raise anything
        return _reason(error)


def _reason(error: Exception) -> str:
    """Return an error as part of a line."""
    text = first_line(error)
    if "randomness" in text:
        return "the model draws random numbers while it trains"
    if "data-dependent control flow" in text:
        return "the model's control flow depends on the values of a tensor"
    return text


def _score_difference(stack: Stack, jobs: Sequence[Job]) -> str:
    leaf, share = stack.leaf, 0.1 if stack.plan.is_rough else 1e-3
    setup = leaf.setup
    model = dict(setup.task.params), dict(setup.task.buffers)
    for split in SCORED_SPLITS:
        # Unlike numbers of samples, so that something is filled up.
        few = [
            replace(j.client, splits={**j.client.splits, split: index[: 3 + k]})
            for k, j in enumerate(jobs)
            if len(index := j.client.splits[split])
        ]
        items = [Item(Node("", 0, 0, setup), client, _as_work(model)) for client in few]
        for client, found in zip(few, stack._evaluate(items, split), strict=True):
            alone = setup.task.evaluate(*model, client.batch(split))["loss"][0]
            if abs(found["loss"][0] - alone) > share * abs(alone) + 1e-6:
                return "its stacked score gives other numbers"
    return stack.failure


def _difference(stack: Stack, jobs: Sequence[Job]) -> str:
    leaf, clients = stack.leaf, [job.client for job in jobs]
    method, nodes = leaf.method, [leaf.node(job) for job in jobs]
    states = [method.receive(n, job.state, job.down) for n, job in zip(nodes, jobs, strict=True)]
    works = [method.begin(n, state) for n, state in zip(nodes, states, strict=True)]
    most = min(leaf.setup.training.batch_size, *(node.samples for node in nodes))
    sizes = [max(1, most - (stack.plan.pads and k > 0)) for k in range(len(jobs))]
    stack.prepare(clients[0])
    batches = Pool(clients, "train", stack._on).batches(
        [[torch.arange(size)] for size in sizes], most
    )
    batch = next(batches)
    first = method.stages(nodes[0], works[0], 1)[0][0]
    for phase in method.phases(works[0], first):
        with torch.no_grad():
            together = vmap(stack._step(phase))(_moved(_stacked(works), stack._device), batch)
        rows, _ = _unstacked(_moved(together, torch.device("cpu")), len(jobs))
        for k, (client, size) in enumerate(zip(clients, sizes, strict=True)):
            inputs, labels = client.batch("train")
            with global_stream(leaf.seed, "probe"):
                alone = method.step(leaf.setup, works[k], (inputs[:size], labels[:size]), phase)
            if _is_off(works[k], alone, rows[k], 0.1 if stack.plan.is_rough else 1e-3):
                return "its stacked step gives other numbers"
    return ""


def _is_off(before: Work, alone: Work, together: Work, share: float) -> bool:
    """Tell whether two steps differ by more than a share of what they change."""
    for group, tensors in alone.items():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            start = before.get(group, {}).get(name, torch.zeros_like(tensor))
            change = (tensor - start).abs().max() if tensor.numel() else 0.0
            noise = 1e-6 * tensor.abs().max() if tensor.numel() else 0.0
            if ((together[group][name] - tensor).abs() > share * change + noise + 1e-12).any():
                return True
    return False


def _grouped(numbers: Iterable[int], kind: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        groups[kind(number)].append(number)
    return groups


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


def _kind(item: Item) -> Hashable:
    """Return what two items must have in common to be stacked."""
    inputs = item.client.inputs
    return _signature(item.work), inputs.dtype, inputs.shape[1:]


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


def _unstacked(work: Work, size: int) -> tuple[list[Work], list[bool]]:
    """Return the work of each client, and whether it is surely finite."""
    # Layouts choose kernels, and those round in their own ways.
    whole = {g: {n: t.contiguous() for n, t in tensors.items()} for g, tensors in work.items()}
    floats = [t for ts in whole.values() for t in ts.values() if t.is_floating_point()]
    # Sums are quick, and finite only where all they add up is; large numbers may overflow, so
    # those that are not get a closer look.
    sums = torch.stack(
        [t.flatten(1).sum(1).double() if t.dim() > 1 else t.double() for t in floats]
    )
    rows = [
        {g: {n: t[k] for n, t in tensors.items()} for g, tensors in whole.items()}
        for k in range(size)
    ]
    return rows, sums.isfinite().all(0).tolist()[:size]


def _moved(work: Work, device: torch.device) -> Work:
    return {g: {n: t.to(device) for n, t in tensors.items()} for g, tensors in work.items()}


def _filled_up(work: Work, size: int) -> Work:
    """Return stacked work of full size; what is added repeats the last client's."""
    missing = size - len(work["metrics"]["count"])
    return (
        _joined(
            [work, *[{g: {n: t[-1:] for n, t in ts.items()} for g, ts in work.items()}] * missing]
        )
        if missing
        else work
    )


def _rows(work: Work, start: int, stop: int) -> Work:
    return {g: {n: t[start:stop] for n, t in tensors.items()} for g, tensors in work.items()}


def _joined(parts: Sequence[Work]) -> Work:
    return {
        group: {name: torch.cat([part[group][name] for part in parts]) for name in tensors}
        for group, tensors in parts[0].items()
    }
