"""A differentiable supernet (DARTS, arXiv 1806.09055; GDAS, arXiv 1910.04465) of Blox.

A stage is a mixture of all 45 cells under a softmax of 45 architecture parameters. The cells share
their operations: three that may stand first, f, and three that may stand second, g. What a cell
returns is then a sum of some of 24 terms: f(x) for each f, and g of f(x), of f(x) + x and of x for
each pair. So the mixture of all 45 is exact at 24 operations a stage instead of 87, and every
operation learns from all cells it stands in.

Two forms. ``path`` draws one cell per stage and step (Gumbel-softmax, straight through), so that a
step costs what a step of one model costs; on one core this is the form that is affordable, and
the default. ``mixture`` computes all terms: about 12 times the operations and the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hansa.errors import InputError
from hansa.models.blox import Blox, BloxCell
from hansa.models.blox_space import CELLS, NUM_CELLS, NUM_STAGES, OPERATIONS, id_of_cells
from hansa.models.images import NORMS, Norm
from hansa.processes import one_thread
from hansa.search.select import totals
from hansa.search.spaces import Floats
from hansa.seeding import generator, global_stream

NUM_OPERATIONS = len(OPERATIONS)
_INPUTS = 2 * NUM_OPERATIONS + 1
"""What a second operation may read: each f(x), each f(x) + x, and x."""
NUM_TERMS = NUM_OPERATIONS * (1 + _INPUTS)
Samples = tuple[torch.Tensor, torch.Tensor]


def _term(source: int, second: int) -> int:
    return NUM_OPERATIONS * (1 + source) + second


def _terms_of_cells() -> torch.Tensor:
    """Return which terms each cell adds, float32 [45, 24]."""
    found = torch.zeros(NUM_CELLS, NUM_TERMS)
    for number, cell in enumerate(CELLS):
        first = cell.operations[0]
        if cell.wiring in ("single", "outer_skip", "both_skips", "parallel"):
            found[number, first] = 1
        if cell.wiring == "single":
            continue
        source = {"parallel": 2 * NUM_OPERATIONS, "sequential": first, "outer_skip": first}
        read = source.get(cell.wiring, NUM_OPERATIONS + first)
        found[number, _term(read, cell.operations[1])] = 1
    return found


TERMS = _terms_of_cells()


class MixedCell(nn.Module):
    """All cells at once: maps [batch, C, S, S] in and out."""

    def __init__(self, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        singles = [BloxCell(op, channels, norm).operations[0] for op in range(NUM_OPERATIONS)]
        self.first = nn.ModuleList(singles)
        self.second = nn.ModuleList(
            BloxCell(op, channels, norm).operations[0] for op in range(NUM_OPERATIONS)
        )

    def forward(self, maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the cells' outputs, summed under weights [45]; what weighs 0 costs nothing."""
        shares = weights @ TERMS.to(weights)
        used = [float(each) != 0 for each in shares.detach()]
        firsts: dict[int, torch.Tensor] = {}

        def first(op: int) -> torch.Tensor:
            if op not in firsts:
                firsts[op] = self.first[op](maps)
            return firsts[op]

        def read(source: int) -> torch.Tensor:
            if source == 2 * NUM_OPERATIONS:
                return maps
            inner = first(source % NUM_OPERATIONS)
            return inner if source < NUM_OPERATIONS else inner + maps

        parts = [shares[op] * first(op) for op in range(NUM_OPERATIONS) if used[op]]
        for source in range(_INPUTS):
            for op in range(NUM_OPERATIONS):
                term = _term(source, op)
                if used[term]:
                    parts.append(shares[term] * self.second[op](read(source)))
        return torch.stack(parts).sum(0)


class Supernet(nn.Module):
    """The network of ``Blox`` with a mixed cell in each stage.

    Args:
        shape: channels, height and width of an input.
        classes: number of classes.
        width: channels of the first stage.
        norm: ``batch`` or ``group``.

    Attributes:
        architecture: logits of all cells, [3, 45]; no parameter of ``weights()``.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, width: int = 8, norm: str = "batch"
    ) -> None:
        super().__init__()
        frame = Blox(shape, classes, 0, width, norm)
        self.stem, self.head = frame.stem, frame.head
        self.reductions = nn.ModuleList(each.get_submodule("reduction") for each in frame.stages)
        self.cells = nn.ModuleList(MixedCell(width * 2**k, NORMS[norm]) for k in range(NUM_STAGES))
        self.architecture = nn.Parameter(torch.zeros(NUM_STAGES, NUM_CELLS))

    def weights(self) -> list[nn.Parameter]:
        """Return all parameters but the architecture's."""
        return [each for name, each in self.named_parameters() if name != "architecture"]

    def forward(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes] under weights of cells, [3, 45]."""
        maps = self.stem(inputs)
        for cell, reduction, own in zip(self.cells, self.reductions, weights, strict=True):
            maps = reduction(cell(maps, own))
        logits: torch.Tensor = self.head(maps.mean((2, 3)))
        return logits


class SupernetFitting(BaseModel):
    """How a supernet is trained: a step of the weights, then one of the architecture.

    Attributes:
        form: ``path`` or ``mixture``, see this file's head.
        steps: of each kind.
        batch_size: samples of each step.
        lr: of the weights: SGD with momentum 0.9, falling to 0 along a cosine.
        weight_decay: of the weights.
        clip: largest norm of their gradient.
        architecture_lr: of the architecture: Adam with beta1 0.5, as in DARTS.
        warm_up: share of the steps at the beginning in which the architecture stays uniform.
        temperature: of the softmax at the beginning and at the end; it falls linearly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["path", "mixture"] = "path"
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=2)
    lr: float = Field(0.05, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    clip: float = Field(5.0, gt=0)
    architecture_lr: float = Field(0.02, gt=0)
    warm_up: float = Field(0.3, ge=0, lt=1)
    temperature: tuple[float, float] = (5.0, 1.0)


@dataclass(frozen=True)
class Searched:
    """What a supernet found.

    Attributes:
        probabilities: of the cells of each stage, float64 [3, 45], each row sums to 1.
    """

    probabilities: Floats

    @property
    def model(self) -> int:
        """The number of the model of the likeliest cells."""
        return id_of_cells(self.probabilities.argmax(1).tolist())

    def ranking(self) -> Floats:
        """Return the logarithm of every model's probability, float64 [91125]."""
        return totals(np.log(self.probabilities))


def search_supernet(
    train: Samples,
    validation: Samples,
    classes: int,
    width: int = 8,
    norm: str = "batch",
    options: SupernetFitting | None = None,
    seed: int = 0,
    watch: Callable[[int, int], None] | None = None,
) -> Searched:
    """Train a supernet: weights on training data, architecture on validation data, in turn.

    The architecture's gradient is DARTS's first order. Norms always use a batch's own statistics,
    since those of an operation that stands in many cells belong to none of them.

    Args:
        train: inputs float32 [n, channels, side, side] and labels int64 [n] for the weights.
        validation: such samples for the architecture; not those that results are told on.
        classes: number of classes.
        width: channels of the first stage.
        norm: ``batch`` or ``group``.
        options: steps, rates, form.
        seed: of all draws.
        watch: called after every pair of steps with how many are done and how many there are.

    Raises:
        InputError: too few samples for a batch, or a training that diverged.
    """
    options = options or SupernetFitting()
    for name, (_, labels) in (("train", train), ("validation", validation)):
        if len(labels) < options.batch_size:
            raise InputError(f"{name} samples", len(labels), f"at least {options.batch_size}")
    shape = (train[0].shape[1], train[0].shape[2], train[0].shape[3])
    with global_stream(seed, "supernet"):
        network = Supernet(shape, classes, width, norm)
    network.train()
    by_weights = torch.optim.SGD(
        network.weights(), options.lr, 0.9, weight_decay=options.weight_decay
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(by_weights, options.steps)
    by_cells = torch.optim.Adam([network.architecture], options.architecture_lr, (0.5, 0.999))
    rng = generator(seed, "supernet draws")

    def loss(samples: Samples, temperature: float) -> torch.Tensor:
        inputs, labels = samples
        chosen = torch.randperm(len(labels), generator=rng)[: options.batch_size]
        weights = _weights(network.architecture, temperature, options.form, rng)
        return F.cross_entropy(network(inputs[chosen], weights), labels[chosen])

    first, last = options.temperature
    with one_thread():
        for step in range(options.steps):
            temperature = first + (last - first) * step / options.steps
            network.zero_grad()
            loss(train, temperature).backward()
            nn.utils.clip_grad_norm_(network.weights(), options.clip)
            by_weights.step()
            falling.step()
            if step >= options.warm_up * options.steps:
                network.zero_grad()
                loss(validation, temperature).backward()
                by_cells.step()
            if watch:
                watch(step + 1, options.steps)
    probabilities = network.architecture.detach().double().softmax(1).numpy()
    if not np.isfinite(probabilities).all():
        raise InputError("lr", options.lr, "a smaller one: the supernet's training diverged")
    return Searched(probabilities)


def _weights(
    architecture: torch.Tensor, temperature: float, form: str, rng: torch.Generator
) -> torch.Tensor:
    """Return weights of cells, [3, 45], each row of sum 1; one-hot in value for ``path``."""
    if form == "mixture":
        return (architecture / temperature).softmax(1)
    uniform = torch.rand(architecture.shape, generator=rng).clamp(1e-9, 1 - 1e-7)
    noise = -(-uniform.log()).log()
    soft = ((architecture + noise) / temperature).softmax(1)
    hard = F.one_hot((architecture + noise).argmax(1), NUM_CELLS).to(soft)
    # soft - soft is exactly 0, so that cells which were not drawn weigh nothing.
    return hard + (soft - soft.detach())
