"""Clients as adversaries: each plays the tamperer on its own text, and sends a gradient.

An outer step of TAR is then a round of an ordinary method on any engine: the model goes down, a
client lets an attacker train it on its own restricted text, and what comes up is the accumulated
gradient of the tamper-resistance loss on text that it holds out (its validation split). Texts
stay where they are, and so do the attacked models. What is kept is trained at the root.

A client's attackers are restricted ones: the benign text of a switch is the root's.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import ClassVar

import torch
from pydantic import SerializeAsAny
from torch import nn

from hansa.data.clients import Client, Split, take
from hansa.errors import InputError
from hansa.federation.aggregation import WeightedMean, add_metrics
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.message import Message, State
from hansa.federation.methods.base import Asking, Work
from hansa.federation.node import Child, Node, Reply
from hansa.federation.optimizer import Training
from hansa.federation.store import MemoryStore
from hansa.federation.tree import ROOT, Tree
from hansa.models.language import CausalLM
from hansa.models.objective import NextToken
from hansa.safeguard.adversaries import draw
from hansa.safeguard.losses import next_token, run
from hansa.safeguard.phases.tar import TAR
from hansa.safeguard.rows import Rows
from hansa.safeguard.setup import Metrics
from hansa.safeguard.trajectory import attack
from hansa.seeding import derive, generator

_MODEL, _GRADIENT = "model", "gradient"


class Tamper(Asking):
    """One outer step's attacks as a round; not a way to train, so no configuration can name it."""

    name: ClassVar[str] = "tamper"
    tar: SerializeAsAny[TAR]

    def start_root(self, node: Node) -> State:
        """Return the model as it is; each round's is put there before it."""
        return State({_MODEL: node.setup.task.params})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return what the parent sent."""
        return State({_MODEL: down.group(_MODEL)})

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the model to every child."""
        down = Message({_MODEL: state.group(_MODEL)})
        return ((child.path, down) for child in children)

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return nothing to remember, and the gradient of one attack on the client's text."""
        assert node.client is not None  # noqa: S101 leaves hold data
        tar, seed = self.tar, node.setup.seed
        module = copy.deepcopy(node.setup.task.module)
        assert isinstance(module, CausalLM)  # noqa: S101 `Collector` takes no other
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(state.group(_MODEL)[name])
        model = module.model.eval()
        found = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
        drawn = draw(
            tar.adversaries, tar.inner_steps, derive(seed, "attacker", node.path, node.round)
        )

        def batch(split: Split, size: int, *purpose: str | int) -> Rows:
            assert node.client is not None  # noqa: S101 leaves hold data
            rng = generator(seed, split, node.path, node.round, *purpose)
            return _rows(node.client, split, size, rng)

        held_out = batch("validation", tar.batch_size)

        def harm(k: int) -> torch.Tensor:
            rows = batch("train", tar.attack_batch_size, k)
            return next_token(run(model, rows).logits, rows)

        def resist() -> torch.Tensor:
            return tar.resistance(run(model, held_out).logits, held_out)

        points = {k: tar.weight * each for k, each in tar.points().items()}
        rng = generator(seed, "adapters", node.path, node.round)
        told = attack(model, drawn, harm, resist, points, found, rng)
        if "diverged" in told:  # normal late in training; the others' gradients count
            return State(), Message({}, {"weight": 0.0})
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        gradient = dict(zip(names, found, strict=True))
        metrics = {name: (value, 1.0) for name, value in told.items()}
        return State(), Message({_GRADIENT: gradient}, {"weight": 1.0}, metrics)

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the mean of the gradients, each client's the same."""
        mean, weight = WeightedMean(), 0.0
        metrics: dict[str, tuple[float, float]] = {}
        like = dict(node.setup.task.params)
        for reply in replies:
            own = reply.message.number("weight")
            if own > 0:
                weight += own
                mean.add(reply.message.require(_GRADIENT, like), own)
                add_metrics(metrics, reply.message.metrics)
        found = {_GRADIENT: mean.result()} if weight else {}
        return State({_MODEL: state.group(_MODEL), **found}, {"weight": weight}, metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Return the mean of all that lies below, with its weight."""
        return Message({_GRADIENT: state.group(_GRADIENT)}, state.scalars, state.metrics)


class Collector:
    """The clients of a safeguard's training.

    Args:
        clients: name -> its restricted text: what attackers train on, and in its validation split
            what the loss is taken on.
        model: the model, as a module from tokens to logits.
        seed: of the run.
        tree: the federation's shape; flat by default.
        engine: how clients are computed.

    Raises:
        InputError: a client without text that is held out.
    """

    def __init__(
        self,
        clients: Mapping[str, Client],
        model: nn.Module,
        seed: int,
        tree: Tree | None = None,
        engine: EngineOptions | None = None,
    ) -> None:
        for name, client in clients.items():
            if not client.count("validation"):
                found = f"no text of {name} that is held out"
                raise InputError("data.clients", found, "a validation split for every client")
        self._clients, self._seed, self._tree = dict(clients), seed, tree
        self._engine = engine or EngineOptions(kind="sequential", workers=1)
        self._module = model if isinstance(model, CausalLM) else CausalLM(copy.deepcopy(model))
        self.bytes = {"up": 0, "down": 0}

    def collect(self, tar: TAR, model: nn.Module, step: int) -> tuple[list[torch.Tensor], Metrics]:
        """Return the mean gradient over the clients in one outer step, and what attacks did.

        Args:
            tar: the phase.
            model: the model as it is now, one of ``transformers``.
            step: number of the outer step, from 0.
        """
        if tar.loss == "dpo":
            raise InputError("phases.loss", "'dpo' from clients", "entropy or cross_entropy")
        if any(each.data != "restricted" for each in tar.adversaries):
            allowed = "restricted: the benign text of others is not theirs"
            raise InputError("phases.adversaries.data", "others than clients have", allowed)
        federation = Federation(
            self._module,
            self._clients,
            Tamper(tar=tar),
            Training(batch_size=1),
            seed=self._seed,
            buffers="local",
            tree=self._tree,
            engine=self._engine,
            objective=NextToken(),
        )
        store = MemoryStore()
        params = {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
        store.put(ROOT, State({_MODEL: params}))
        federation.keep_states_in(store, step)
        # One round more than is run: after the last one models would be scored.
        with closing(federation.rounds(step + 2, step + 1, score_every=0)) as rounds:
            result = next(rounds)
        for way in self.bytes:
            self.bytes[way] += sum(getattr(visit, way) for visit in result.visits)
        state = federation.state_of(ROOT)
        if not state.number("weight"):
            return [], {"diverged": 1.0}
        told = {name: total / count for name, (total, count) in state.metrics.items()}
        gradient = state.group(_GRADIENT)
        return [gradient[name] for name in params], told


def _rows(client: Client, split: Split, size: int, rng: torch.Generator) -> Rows:
    """Return rows of a client, drawn with replacement."""
    held = torch.from_numpy(client.splits[split])
    index = held[torch.randint(0, len(held), (size,), generator=rng)]
    tokens, wanted = take(client.inputs, client.labels, index)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    counted = mask.clone()
    counted[:, 1:] = wanted[:, :-1] >= 0
    return Rows(tokens, mask, counted)
