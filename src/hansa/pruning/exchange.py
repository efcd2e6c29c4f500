"""One mask for a federation, found before its training by what its clients' data say.

Every exchange is a round of an ordinary method: the root sends a point, clients reply with a mean
over their training samples, inner nodes average. A last one hands out the masks.

===========  ===============================================  ====================================
combine      what a client replies                            exchanges before the masks
===========  ===============================================  ====================================
scores       its scores, by batches of its own                one for each iteration
gradients    gradients, then Hessian-vector products, of all  ProsPr 2M + 1 (M + 1 to first order),
             its samples                                      SNIP 1
===========  ===============================================  ====================================

With ``gradients`` the masks are those that the pooled samples would give, each inner step on all of
them, as long as batches do not mix samples (BatchNorm does). Every reply is a sum that secure
aggregation could hide, though it says as much about a client's data as a gradient does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import SerializeAsAny

from hansa.errors import InputError
from hansa.federation.aggregation import WeightedMean, add_metrics
from hansa.federation.leaf import DivergedError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method, Work, begin_work, training_metrics
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.tree import ROOT
from hansa.models.task import Batch
from hansa.pruning.objective import Objective, masked, prunable
from hansa.pruning.prospr import ProsPr
from hansa.pruning.saliency import Snip
from hansa.pruning.scorer import Scorer
from hansa.pruning.select import Scope, scheduled, select

Combine = Literal["scores", "gradients"]
_SENT = ("point", "vector", "mask")


class Exchange(Method):
    """Finds masks; not a way to train, so no configuration can name it."""

    name: ClassVar[str] = "exchange"
    scorer: SerializeAsAny[Scorer]
    combine: Combine
    density: float
    iterations: int = 1
    scope: Scope = "global"
    floor: float = 0.0
    densities: Mapping[str, float] = {}
    exclude: tuple[str, ...] = ()
    given: Any = None
    """Masks that are there already, of a scorer that sees no data; then nothing is asked."""

    @property
    def exchanges(self) -> int:
        """Rounds of replies before the masks are sent."""
        if self.given is not None:
            return 0
        if self.combine == "scores":
            return self.iterations
        if not isinstance(self.scorer, ProsPr):
            return 1
        return self.scorer.inner_steps * (1 if self.scorer.order == "first" else 2) + 1

    def check_scorer(self) -> None:
        """Refuse scorers that cannot be combined in the way that is wanted.

        Raises:
            InputError: naming the option.
        """
        scorer = self.scorer
        if not scorer.needs_data:
            return  # nothing is combined
        if self.combine == "scores":
            if not scorer.nested:
                raise InputError("pruning.method", scorer.name, "another scorer in a federation")
            return
        if not isinstance(scorer, ProsPr) and scorer.name != Snip.name:
            raise InputError("pruning.combine", f"'gradients' with {scorer.name}", "prospr or snip")
        if self.iterations > 1:
            raise InputError("pruning.iterations", self.iterations, "1 with gradients")
        if isinstance(scorer, ProsPr) and scorer.order == "unrolled":
            raise InputError("pruning.options.order", "'unrolled'", "exact or first, by gradients")

    def order_of(self, node: Node) -> int:
        """Return 1: every exchange sees the same batches."""
        return 1

    def start_root(self, node: Node) -> State:
        """Return what is sent first: the weights, or masks that are there already."""
        if self.given is not None:
            return State({"mask": self.given})
        return State({"point": node.setup.task.params})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return what the parent sent."""
        return State({group: down.groups[group] for group in _SENT if down.group(group)})

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the same message to every child."""
        if node.round > self.exchanges and node.path == ROOT:
            down = Message({"mask": state.group("mask")})
        else:
            down = Message({group: state.groups[group] for group in _SENT if state.group(group)})
        return ((child.path, down) for child in children)

    def stages(self, node: Node, work: Work, epochs: int) -> Sequence[tuple[str, int]]:
        """Return one pass over the data, however many epochs a round of training has."""
        return (("train", 1),)

    def passes(self, setup: Setup) -> int:
        """Return 1."""
        return 1

    def begin(self, node: Node, state: State) -> Work:
        """Return work at the point received."""
        params = {**node.setup.task.params, **state.group("point")}
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        work = begin_work(node.setup, params, node.setup.task.buffers)
        groups = {"vector": state.group("vector"), "mask": state.group("mask")}
        work |= {name: dict(tensors) for name, tensors in groups.items() if tensors}
        if node.round > self.exchanges:
            return work | {"idle": {}}
        if self.combine == "gradients":
            return work | {"sum": zeros, "step": {"step": torch.tensor(self._step(node.round))}}
        return work | {"inputs": {}, "targets": {}}

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after one batch: its gradient or product added, or the batch kept."""
        if "idle" in work:
            return work
        if "inputs" in work:
            number = str(len(work["inputs"]))
            if len(work["inputs"]) >= self.scorer.num_batches:
                return work
            inputs, targets = ({number: part} for part in batch[:2])
            return {
                **work,
                "inputs": {**work["inputs"], **inputs},
                "targets": {**work["targets"], **targets},
            }
        objective, samples = self._objective(setup), len(batch[1])
        pair, step = (batch[0], batch[1]), int(work["step"]["step"])
        try:
            if "vector" in work:
                found = objective.product(work["params"], work["vector"], pair, step)
            else:
                found = objective.gradient(work["params"], pair, step)
        except InputError:  # a loss that is no number: the engine looks at the metrics
            loss = torch.full((), torch.nan)
            return {**work, "metrics": {**work["metrics"], "loss": loss}}
        sums = {name: total + found[name] * samples for name, total in work["sum"].items()}
        return {**work, "sum": sums}

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return nothing to remember, and the client's mean."""
        if "idle" in work:
            return State(), Message()
        if self.combine == "gradients":
            mean = {name: total / node.samples for name, total in work["sum"].items()}
        else:
            mean = self._scores(node, work)
            if not all(tensor.isfinite().all() for tensor in mean.values()):
                raise DivergedError(node.path, node.round, "a score is not finite")
        return State(), Message({"mean": mean}, {"weight": node.samples}, training_metrics(work))

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state with the mean of the replies; at the root, what is to be sent next."""
        if node.round > self.exchanges:
            for _ in replies:
                continue
            return State({"mask": state.group("mask")})
        mean, weight = WeightedMean(), 0.0
        metrics: dict[str, tuple[float, float]] = {}
        like = self._like(node.setup)
        for reply in replies:
            weight += reply.message.number("weight")
            mean.add(reply.message.require("mean", like), reply.message.number("weight"))
            add_metrics(metrics, reply.message.metrics)
        if not weight:
            raise InputError("pruning", f"no reply in exchange {node.round}", "some client's")
        if node.path != ROOT:
            return State({"mean": mean.result()}, {"weight": weight}, metrics)
        if self.combine == "scores":
            return self._next_scores(node, state, mean.result())
        return self._next_gradients(node, state, mean.result())

    def reply(self, node: Node, state: State) -> Message:
        """Return the mean of all that lies below, with its weight."""
        if node.round > self.exchanges:
            return Message()
        return Message({"mean": state.groups["mean"]}, state.scalars, state.metrics)

    def _objective(self, setup: Setup) -> Objective:
        module = setup.task.module
        return Objective(module, names=prunable(module, self.exclude), seed=setup.seed)

    def _like(self, setup: Setup) -> dict[str, torch.Tensor]:
        if self.combine == "gradients":
            return dict(setup.task.params)
        return {n: setup.task.params[n] for n in prunable(setup.task.module, self.exclude)}

    def _scores(self, node: Node, work: Work) -> dict[str, torch.Tensor]:
        """Return the client's own scores; where its batches are few they come again."""
        objective = self._objective(node.setup)
        if "mask" in work:
            objective = objective.within(work["mask"])
        held = [(work["inputs"][key], work["targets"][key]) for key in work["inputs"]]
        batches = [held[k % len(held)] for k in range(self.scorer.num_batches)]
        try:
            found = self.scorer.scores(objective, batches, node.setup.seed)
        except InputError as error:
            raise DivergedError(node.path, node.round, f"the loss is {error.found}") from error
        return {name: tensor.to(work["params"][name].dtype) for name, tensor in found.items()}

    def _next_scores(self, node: Node, state: State, mean: Tensors) -> State:
        mask = self._select(mean, node.round, state.group("mask") or None)
        params = node.setup.task.params
        point = {**params, **masked({name: params[name] for name in mask}, mask)}
        return State({"point": point, "mask": mask})

    def _select(
        self, scores: Tensors, number: int, within: Tensors | None
    ) -> dict[str, torch.Tensor]:
        last = self.iterations
        return select(
            scores,
            scheduled(self.density, number, last),
            scope=self.scope,
            floor=self.floor,
            densities={name: scheduled(own, number, last) for name, own in self.densities.items()},
            within=within,
        )

    def _step(self, number: int) -> int:
        """Return the inner step that an exchange is about; the outer loss is the step after."""
        steps = self._prospr.inner_steps
        return number - 1 if number <= steps + 1 else 2 * steps + 1 - number

    @property
    def _prospr(self) -> ProsPr:
        """The scorer; SNIP is ProsPr without inner steps."""
        return self.scorer if isinstance(self.scorer, ProsPr) else ProsPr(inner_steps=0)

    def _next_gradients(self, node: Node, state: State, mean: Tensors) -> State:
        """Return the state after one exchange of ProsPr (see ``prospr.ProsPr``)."""
        scorer, number = self._prospr, node.round
        steps = scorer.inner_steps
        groups: dict[str, Any] = {
            group: tensors for group, tensors in state.groups.items() if group.startswith("at.")
        }
        if number <= steps:
            buffer = scorer.push(state.group("buffer"), mean)
            point = state.groups["point"]
            groups[f"at.{number - 1}"] = point
            moved = {name: p - scorer.inner_lr * buffer[name] for name, p in point.items()}
            return State({**groups, "point": moved, "buffer": buffer})
        derivative, carried = mean, dict[str, torch.Tensor]()
        if number > steps + 1:
            before, skip = state.groups["derivative"], self._skips(number)
            derivative = {n: d if skip else d + mean[n] for n, d in before.items()}
            carried = dict(scorer.carry(state.groups["vector"]))
        if number == self.exchanges:
            params = node.setup.task.params
            names = prunable(node.setup.task.module, self.exclude)
            scores = {name: (params[name] * derivative[name]).abs() for name in names}
            return State({"mask": self._select(scores, self.iterations, None)})
        vector = scorer.vector(carried, derivative)
        point = groups[f"at.{self._step(number + 1)}"]
        return State({**groups, "point": point, "vector": vector, "derivative": derivative})

    def _skips(self, number: int) -> bool:
        """Tell whether the official first step's curvature is left out."""
        scorer = self._prospr
        official = scorer.first_step == "official" and scorer.momentum > 0
        return official and self._step(number) == 0
