"""Our reading of WorldLM: language models across federations of federations.

Iacob et al., "Worldwide Federated Training of Language Models", 2024 (arXiv 2405.14446). The paper
leaves the attention, the key layers and the residual procedures open; what stands here is a
reading of them, and each choice is an option.

A model is a backbone B, shared by all, and key blocks K, which every node keeps for itself. A pass
at a node q below p, with the residuals R sent to it::

    B_q <- B_p                                                    receive
    K_q <- attention(query K_q, bank {K_q, K_p} + R)              receive
    local steps on the node's own data, if any                    training
    each r in R that is not used goes to the child most like it   dispatch
    B_q <- B_q + server step of the mean over children            aggregate
    K_q <- K_q + nu (attention(query K_q, bank {K_q, K_c...}) - K_q)
    a child's block that is not like the new K_q becomes a residual, offered above

A residual is a key block that its own federation does not resemble. It travels up until some other
branch resembles it, comes down there in the next pass, and ends as one more entry of a bank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from hansa.errors import InputError
from hansa.federation.aggregation import add_metrics, flattened, regrouped
from hansa.federation.attention import (
    Attention,
    Blocks,
    Granularity,
    Score,
    entropy,
    likeness,
)
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import (
    Figure,
    Inner,
    Method,
    Scored,
    Work,
    begin_work,
    training_metrics,
)
from hansa.federation.methods.fedavg import check_number
from hansa.federation.methods.residuals import (
    Residual,
    cut,
    delivered,
    pack,
    route,
    taken,
    unpack,
)
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.server import ServerOptimizer, as_groups, moments_of
from hansa.federation.tree import ROOT
from hansa.models.language import blocks

_NOTE = "note"


class WorldLM(Method):
    """Backbone averaged, key blocks personal and mixed by attention, residuals across branches."""

    name: ClassVar[str] = "worldlm"
    alone: ClassVar[str] = "its attention looks at the key blocks of each child"
    scored: ClassVar[Scored] = "trained"
    averages: ClassVar[bool] = True
    keys: int | tuple[str, ...] = 1
    """The key blocks: so many of the last transformer blocks, or their names."""
    score: Score = "cosine"
    """Likeness of two nodes' key blocks: the cosine, the cosine about the bank's mean, or the
    inner product over the root of the length."""
    granularity: Granularity = "block"
    """Whether attention has one weight for a block, for a tensor of it, or for a row of that."""
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False, strict=True)
    """What the cosines are divided by before the softmax."""
    combine: Literal["attention", "mean"] = "attention"
    """``mean`` gives every entry of a bank the same weight."""
    self_in_bank: bool = True
    """Whether a node's own key blocks are an entry of its bank."""
    share_keys: bool = True
    """Whether key blocks are mixed at all; without, they stay as each node trains them."""
    nu: float = Field(1.0, ge=0, le=1, strict=True)
    """Step of an inner node's key blocks towards what its children make of them."""
    residuals: bool = True
    """Whether key blocks travel across federations."""
    residual: Literal["block", "difference"] = "block"
    """What travels: the block itself, or its difference from the federation's own."""
    threshold: float = Field(0.5, ge=-1, le=1, strict=True)
    """Cosine below which a child's block becomes a residual, and from which another's takes it."""
    most: int = Field(1, ge=1, strict=True)
    """Most residuals on an edge, in each direction and pass."""
    hops: int = Field(4, ge=1, strict=True)
    """Edges and waits after which a residual expires; twice the depth of the tree is enough."""
    schedule: Literal["levels", "parallel"] = "levels"
    """Whether an inner node trains before its children, who start from it, or beside them."""
    weighting: Literal["samples", "uniform"] = "samples"
    """A child's weight in the mean of backbones: the training samples below it, or the nodes
    below it that train; its own count where it trains beside its children."""
    server: ServerOptimizer = ServerOptimizer()
    """What an inner node makes of the mean of its children's backbones."""

    @model_validator(mode="before")
    @classmethod
    def _without_keys(cls, values: Any) -> Any:
        """Turn residuals off where key blocks are not mixed and nothing is said of residuals."""
        if not isinstance(values, Mapping) or values.get("share_keys") is not False:
            return values
        return {"residuals": False, **values}

    @model_validator(mode="after")
    def _fits(self) -> "WorldLM":
        if not self.share_keys and self.residuals:
            raise ValueError("residuals need share_keys")
        if self.residual == "difference" and self.threshold == -1:
            raise ValueError("a threshold of -1 makes no residual")
        return self

    def inner_training(self) -> Inner:
        """Return when an inner node trains on data of its own."""
        return "before" if self.schedule == "levels" else "beside"

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse key blocks that the model does not have.

        Raises:
            InputError: no such blocks.
        """
        super().check(setup, depth)
        found = self._found(setup)
        if setup.robust is not None and self.share_keys and self.keys:
            raise InputError(
                "robust",
                "a rule with key blocks that are mixed by attention, which no rule covers",
                "method.share_keys = false, or method.keys = 0",
            )
        if isinstance(self.keys, int):
            if not 0 <= self.keys <= len(found):
                raise InputError("method.keys", self.keys, f"0 to {len(found)} blocks")
        else:
            for name in self.keys:
                if name not in found:
                    allowed = ", ".join(found) or "none: the model has no numbered blocks"
                    raise InputError("method.keys", repr(name), allowed)

    def blocks(self, setup: Setup) -> Blocks:
        """Return the key blocks, each with the names of its tensors."""
        found = self._found(setup)
        if isinstance(self.keys, int):
            names = list(found)[len(found) - self.keys :]
        else:
            names = [name for name in found if name in self.keys]
        return {name: found[name] for name in names}

    def _found(self, setup: Setup) -> Blocks:
        """Return all blocks of the model that is trained."""
        return blocks(setup.task.params)

    def start_root(self, node: Node) -> State:
        """Return the initial model."""
        task = node.setup.task
        return State({"model": task.params, "buffers": task.buffers})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return backbone from above, key blocks mixed with those from above and residuals."""
        setup, key_blocks = node.setup, self.blocks(node.setup)
        model, buffers, keys = self._received(setup, state, down)
        came = [r.moved() for r in unpack(down, key_blocks, setup.task.params)]
        own = bool(state.group("model"))
        used = [r for r in came if own and self._uses(node, r, keys, key_blocks)]
        unused = [r for r in came if r not in used]
        notes: dict[str, float] = {}
        if own and self.share_keys and key_blocks:
            above = down.require("keys", keys)
            rows = [keys] if self.self_in_bank else []
            bank = [*rows, above, *(self._entry(r, keys, key_blocks) for r in used)]
            names = [*([node.path] if self.self_in_bank else []), _parent(node.path)]
            names += [r.origin for r in used]
            mixed, weights = self._attention(keys, bank, key_blocks)
            notes |= _noted("down", names, weights)
            keys = mixed
        waiting = [r for r in unpack(state, key_blocks, setup.task.params) if not r.upward]
        held = [*waiting, *(r for r in unused if r.hops <= self.hops)]
        notes |= {"residuals_used": len(used), "residuals_came": len(came)}
        notes["residuals_expired"] = len(unused) - sum(r.hops <= self.hops for r in unused)
        moments = as_groups(moments_of(state))
        groups = {"model": {**model, **keys}, "buffers": buffers, **moments}
        return _with(State(groups, _scalars(notes)), held, came)

    def held(self, node: Node, state: State, down: Message) -> State:
        """Return the backbone from above with the node's own key blocks as they are."""
        model, buffers, keys = self._received(node.setup, state, down)
        waiting = unpack(state, self.blocks(node.setup), node.setup.task.params)
        return _with(State({"model": {**model, **keys}, "buffers": buffers}), waiting)

    def _received(
        self, setup: Setup, state: State, down: Message
    ) -> tuple[dict[str, torch.Tensor], Tensors, dict[str, torch.Tensor]]:
        """Return backbone and buffers from above, and the node's own key blocks or the first."""
        names = _names(self.blocks(setup))
        like = setup.task.params
        model = down.require("model", {n: p for n, p in like.items() if n not in names})
        shared = setup.shared_buffers
        buffers = {
            **setup.task.buffers,
            **state.group("buffers"),
            **down.require("buffers", shared),
        }
        held, first = state.group("model"), {n: p for n, p in like.items() if n in names}
        if held:
            keys = {name: held[name] for name in first}
        else:
            keys = dict(down.require("keys", first)) if self.share_keys else first
        whole = {name: model[name] if name in model else keys[name] for name in like}
        return whole, buffers, keys

    def _uses(self, node: Node, residual: Residual, keys: Tensors, key_blocks: Blocks) -> bool:
        """Tell whether a residual ends in this node's own bank."""
        if not self.share_keys or not node.num_children:
            return True
        entry = self._entry(residual, keys, key_blocks)
        return likeness(entry, keys, key_blocks[residual.block]) >= self.threshold

    def _entry(self, residual: Residual, keys: Tensors, key_blocks: Blocks) -> Tensors:
        """Return a residual as an entry of a bank."""
        if self.residual == "block":
            return residual.tensors
        return {n: keys[n] + residual.tensors[n] for n in key_blocks[residual.block]}

    def _attention(
        self, query: Tensors, bank: Sequence[Tensors], key_blocks: Blocks
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        score = self.score if self.combine == "attention" else None
        return Attention(score, self.granularity, self.temperature)(query, bank, key_blocks)

    def begin(self, node: Node, state: State) -> Work:
        """Return work that starts from the node's backbone and key blocks."""
        return begin_work(node.setup, state.group("model"), state.group("buffers"))

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the node's key blocks as its own, and backbone and key blocks as the reply."""
        params, names = work["params"], _names(self.blocks(node.setup))
        keys = {name: p for name, p in params.items() if name in names}
        kept = State({"model": params, "buffers": work["buffers"]}, _notes(state))
        reply = self._reply(node.setup, params, keys, work["buffers"])
        scalars = {"weight": node.samples if self.weighting == "samples" else 1, **taken(state)}
        return kept, Message(reply, scalars, training_metrics(work))

    def settle(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return an inner node's state after training on data of its own, and its share."""
        trained = {"model": work["params"], "buffers": {**work["buffers"]}}
        if self.schedule == "levels":
            return replace(state, groups={**state.groups, **trained}), Message()
        names = _names(self.blocks(node.setup))
        keys = {name: p for name, p in work["params"].items() if name in names}
        share = self._reply(node.setup, work["params"], keys, work["buffers"])
        weight = node.samples if self.weighting == "samples" else 1
        shared = node.setup.shared_buffers
        stays = {name: b for name, b in work["buffers"].items() if name not in shared}
        groups = {**state.groups, "buffers": {**state.group("buffers"), **stays}}
        if not self.share_keys:
            groups["model"] = {**state.group("model"), **keys}
        # All else stays as it was: children start where this node did, as one of them.
        after = replace(state, groups=groups)
        return after, Message(share, {"weight": weight}, training_metrics(work))

    def _reply(
        self, setup: Setup, model: Tensors, keys: Tensors, buffers: Tensors
    ) -> dict[str, Tensors]:
        groups: dict[str, Tensors] = {
            "model": {name: p for name, p in model.items() if name not in keys},
            "buffers": {name: buffers[name] for name in setup.shared_buffers},
            "keys": keys if self.share_keys else {},
        }
        return {group: tensors for group, tensors in groups.items() if tensors}

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield backbone, key blocks, and to each child the residuals that are most like it."""
        setup, key_blocks = node.setup, self.blocks(node.setup)
        names = _names(key_blocks)
        model = {name: p for name, p in state.group("model").items() if name not in names}
        keys = {name: p for name, p in state.group("model").items() if name in names}
        groups: dict[str, Tensors] = {
            "model": model,
            "keys": keys if self.share_keys else {},
            "buffers": {name: state.group("buffers")[name] for name in setup.shared_buffers},
        }
        down = Message({group: tensors for group, tensors in groups.items() if tensors})
        held = [r for r in unpack(state, key_blocks, setup.task.params) if not r.upward]
        if not held:
            yield from ((child.path, down) for child in children)
            return
        known = list(children)
        links = {c.path: c.link.group("keys") for c in known if c.link.group("keys")}
        sent = route(held, links, key_blocks, self.most, self._entry)
        for child in known:
            yield child.path, pack(down, sent.get(child.path, ()))

    def remember(self, node: Node, state: State, child: Child, reply: Message) -> State:
        """Return the child's newest key blocks, by which residuals find their way."""
        keys = reply.group("keys")
        return State({"keys": keys}) if keys and self.residuals else State()

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply without whole backbone, key blocks or weight, or with odd residuals."""
        key_blocks, model = self.blocks(node.setup), state.group("model")
        names = _names(key_blocks)
        reply.require("model", {n: p for n, p in model.items() if n not in names})
        reply.require("buffers", node.setup.shared_buffers)
        check_number(reply, "weight")
        if self.share_keys and names:
            reply.require("keys", {n: p for n, p in model.items() if n in names})
            unpack(reply, key_blocks, node.setup.task.params)

    def unchanged(self, node: Node, state: State) -> Mapping[str, Tensors]:
        """Return backbone and buffers as the children were sent them."""
        names, held = _names(self.blocks(node.setup)), state.group("buffers")
        return {
            "model": {n: p for n, p in state.group("model").items() if n not in names},
            "buffers": {name: held[name] for name in node.setup.shared_buffers},
        }

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the backbones' mean after the server's step, key blocks by attention, residuals.

        Raises:
            MessageError: a reply that does not fit the model.
        """
        setup, key_blocks = node.setup, self.blocks(node.setup)
        names, model = _names(key_blocks), state.group("model")
        like: dict[str, Tensors] = {
            "model": {n: p for n, p in model.items() if n not in names},
            "buffers": setup.shared_buffers,
        }
        own_keys = {n: p for n, p in model.items() if n in names}
        mean = setup.mean(flattened(self.unchanged(node, state)))
        weight, metrics = 0.0, dict[str, tuple[float, float]]()
        bank: dict[str, Tensors] = {}
        offered: list[Residual] = []
        took: set[str] = set()
        for reply in replies:
            message = reply.message
            weight += message.number("weight")
            sent = {group: message.require(group, tensors) for group, tensors in like.items()}
            mean.add(flattened(sent), message.number("weight"))
            add_metrics(metrics, message.metrics)
            if self.share_keys and own_keys:
                keys = message.require("keys", own_keys)
                if reply.path == node.path:
                    own_keys = dict(keys)
                elif message.number("weight"):  # else nobody below it has trained
                    bank[reply.path] = keys
                offered += [r.moved() for r in unpack(message, key_blocks, setup.task.params)]
                took |= delivered(message)
        # Nothing is received at the root, whose notes are those of the pass before.
        notes = {} if node.path == ROOT else _notes(state)
        held = [r for r in unpack(state, key_blocks, setup.task.params) if not r.upward]
        still = [r.moved() for r in held if r.id not in took]
        results = regrouped(mean.result(), like) if weight else like
        backbone, moments = dict(like["model"]), moments_of(state)
        if weight:
            backbone, moments = self.server.step(backbone, results["model"], moments)
        new_keys, weights = own_keys, dict[str, torch.Tensor]()
        if bank:
            rows = [own_keys] if self.self_in_bank else []
            mixed, weights = self._attention(own_keys, [*rows, *bank.values()], key_blocks)
            new_keys = _stepped(own_keys, mixed, self.nu)
            heads = [node.path] if self.self_in_bank else []
            notes |= _scalars(_noted("up", [*heads, *bank], weights))
            for path, keys in bank.items():
                alike = [likeness(keys, new_keys, names) for names in key_blocks.values()]
                notes[f"{_NOTE}|likeness|{path}"] = min(alike)
        fresh = self._cut(node, bank, new_keys, key_blocks)
        kept = [*still, *offered]
        here = [r for r in kept if r.hops <= self.hops]
        upward, waiting = self._sorted(node, [*fresh, *here], bank, key_blocks)
        notes |= _scalars(
            {
                "residuals_cut": len(fresh),
                "residuals_up": len(upward),
                "residuals_held": len(waiting),
                "residuals_given": len(held) - len(still),
                "residuals_lost": len(kept) - len(here),
            }
        )
        groups: dict[str, Tensors] = {
            "model": {n: backbone[n] if n in backbone else new_keys[n] for n in model},
            "buffers": {**state.group("buffers"), **results["buffers"]},
        }
        groups |= as_groups(moments)
        scalars = {"weight": weight, **notes, **taken(state)}
        residuals = [*waiting, *(replace(r, upward=True) for r in upward)]
        return _with(State(groups, scalars, metrics), residuals)

    def _cut(
        self, node: Node, bank: Mapping[str, Tensors], keys: Tensors, key_blocks: Blocks
    ) -> list[Residual]:
        """Return the children's blocks that the node's own do not resemble."""
        if not (self.residuals and self.share_keys):
            return []
        changed = self.residual == "difference"
        return cut(node.round, bank, keys, key_blocks, self.threshold, self.most, changed)

    def _sorted(
        self, node: Node, found: list[Residual], bank: Mapping[str, Tensors], key_blocks: Blocks
    ) -> tuple[list[Residual], list[Residual]]:
        """Return which residuals go up, and which wait here for the next pass.

        One that came from below waits where another child resembles it; one that was cut here
        goes up at once, for here it has been compared. At the root all wait.
        """
        if node.path == ROOT:
            return [], found
        upward: list[Residual] = []
        waiting: list[Residual] = []
        for residual in found:
            fits = any(
                not residual.is_from(path)
                and likeness(
                    self._entry(residual, keys, key_blocks), keys, key_blocks[residual.block]
                )
                > self.threshold
                for path, keys in bank.items()
            )
            fresh = residual.cut_at(node.path)
            (waiting if fits and not fresh else upward).append(residual)
        return upward[: self.most], [*waiting, *upward[self.most :]]

    def reply(self, node: Node, state: State) -> Message:
        """Return backbone, key blocks and residuals, with weight and metrics of all below."""
        setup, key_blocks = node.setup, self.blocks(node.setup)
        names, model = _names(key_blocks), state.group("model")
        keys = {name: p for name, p in model.items() if name in names}
        groups = self._reply(setup, model, keys, state.group("buffers"))
        scalars = {"weight": state.number("weight"), **taken(state)}
        found = unpack(state, key_blocks, setup.task.params)
        return pack(Message(groups, scalars, state.metrics), [r for r in found if r.upward])

    def figures(self, state: State) -> Iterator[Figure]:
        """Yield attention weights, their entropy, and what became of residuals."""
        for key, value in sorted(state.scalars.items()):  # as from a disk, so from memory
            kind, _, rest = key.partition("|")
            if kind == _NOTE and isinstance(value, int | float):
                name, _, other = rest.partition("|")
                yield other, name, float(value)


def _names(key_blocks: Blocks) -> frozenset[str]:
    return frozenset(name for names in key_blocks.values() for name in names)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _stepped(before: Tensors, after: Tensors, nu: float) -> dict[str, torch.Tensor]:
    """Return a step of ``nu`` on the way; whole steps and none are exact."""
    if nu == 1:
        return dict(after)
    return {n: old + nu * (after[n] - old) if nu else old for n, old in before.items()}


def _noted(way: str, names: Sequence[str], weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return attention weights, averaged over blocks, and their mean entropy, as notes."""
    if not weights:
        return {}
    mean = torch.stack(list(weights.values())).mean(0)
    notes: dict[str, float] = {}
    for name, weight in zip(names, mean.tolist(), strict=True):
        key = f"attention_{way}|{name}"
        notes[key] = notes.get(key, 0.0) + weight
    notes[f"entropy_{way}"] = sum(entropy(w) for w in weights.values()) / len(weights)
    return notes


def _scalars(notes: Mapping[str, float]) -> dict[str, float]:
    return {f"{_NOTE}|{name}": value for name, value in notes.items()}


def _notes(state: State) -> dict[str, float]:
    """Return what was noted so far in this pass."""
    found = {key: value for key, value in state.scalars.items() if key.startswith(f"{_NOTE}|")}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _with(state: State, residuals: Sequence[Residual], came: Sequence[Residual] = ()) -> State:
    """Return a state that holds residuals, and knows which ones have just come."""
    marked = {f"took|{r.id}": True for r in came}
    return pack(replace(state, scalars={**state.scalars, **marked}), residuals)
