"""BRP-NAS (arXiv 2007.08668): a graph network that says which of two models is the better one.

Each model's graph becomes one vector, that of the global node after several graph convolutions;
two vectors side by side become two logits by one linear layer. Their softmax is fitted to the
softmax of the two scores. That layer is linear, so the difference of its logits for (a, b), taken
in both orders, is h(a) - h(b) for one number h: sorting by pairs is sorting by h.
"""

import itertools
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from hansa.processes import one_thread
from hansa.search.searchers.base import Search
from hansa.search.searchers.rounds import Rounds, RoundsSearcher
from hansa.search.spaces import Floats, Ints, Space
from hansa.seeding import global_stream

_CHUNK = 4096
"""Models that are embedded at once."""


class PairPredictor(nn.Module):
    """Graph convolutions to the global node's vector, and a linear layer on two of them.

    Args:
        features: of a node.
        width: of every layer.
        layers: number of graph convolutions.
        dropout: share of activations that training sets to zero.
    """

    def __init__(self, features: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        fans = [features, *[width] * layers]
        pairs = itertools.pairwise(fans)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = dropout
        self.head = nn.Linear(2 * width, 2)

    def embed(self, adjacency: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return vectors [n, width] of graphs [n, nodes, nodes], rows summing to one."""
        nodes = features
        for layer, norm in zip(self.layers, self.norms, strict=True):
            nodes = F.relu(norm(adjacency @ layer(nodes)))
            nodes = F.dropout(nodes, self.dropout, self.training)
        return nodes[:, 0]

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits [n, n, 2] of all ordered pairs of vectors [n, width]."""
        first, second = self.head.weight.chunk(2, 1)
        return (vectors @ first.T)[:, None] + (vectors @ second.T)[None] + self.head.bias

    def order(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return h [n]: a model is thought better than another where its h is larger."""
        first, second = self.head.weight.chunk(2, 1)
        return vectors @ (first[0] - first[1] - second[0] + second[1])


def pair_loss(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of all ordered pairs from the softmax of their scores.

    Args:
        logits: [n, n, 2], see ``PairPredictor.logits``.
        scores: [n].
    """
    size = len(scores)
    both = torch.stack(torch.broadcast_tensors(scores[:, None], scores[None]), -1)
    apart = ~torch.eye(size, dtype=torch.bool)
    target = both[apart].softmax(-1)
    return F.kl_div(logits[apart].log_softmax(-1), target, reduction="batchmean")


class _Brp(Rounds):
    def __init__(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None, options: "BrpNas"
    ) -> None:
        super().__init__(space, candidates, seed, prior, options.size)
        self._options, self._seed = options, seed

    def _graphs(self, positions: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        adjacency, features = self.space.graph(self.candidates[positions])
        mixing = torch.from_numpy(adjacency) + torch.eye(adjacency.shape[1])
        return mixing / mixing.sum(-1, keepdim=True), torch.from_numpy(features)

    def predict(self, round_number: int) -> Floats:
        with one_thread():  # more of them only wait for each other over tensors this small
            with global_stream(self._seed, "brp", round_number):
                predictor = self._fit(round_number)
            return self._order(predictor.eval())

    def _order(self, predictor: PairPredictor) -> Floats:
        predicted = np.full(len(self.candidates), -np.inf)
        still = np.flatnonzero(self.is_open)
        with torch.inference_mode():
            for start in range(0, len(still), _CHUNK):
                part = still[start : start + _CHUNK]
                order = predictor.order(predictor.embed(*self._graphs(part)))
                predicted[part] = order.double().numpy()
        return predicted

    def _fit(self, round_number: int) -> PairPredictor:
        options, stage = self._options, min(round_number, self._options.rounds)
        known = np.array(self.told)
        adjacency, features = self._graphs(known)
        scores = torch.from_numpy(self.scores[known]).float() * options.scale
        model = PairPredictor(
            features.shape[-1], options.width, options.layers, options.dropout
        ).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        epochs, batch = options.epochs * stage, options.batch_size * stage
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for part in torch.from_numpy(self.rng.permutation(len(known))).split(batch):
                if len(part) < 2:
                    continue
                vectors = model.embed(adjacency[part], features[part])
                optimizer.zero_grad()
                pair_loss(model.logits(vectors), scores[part]).backward()
                optimizer.step()
            schedule.step()
        return model


class BrpNas(RoundsSearcher):
    """Rounds by a pairwise graph network.

    The published network is 600 wide and learns at 0.00035; the default is smaller and quicker.

    Attributes:
        width: of each graph convolution.
        layers: number of graph convolutions.
        dropout: share of activations that training sets to zero.
        lr: of AdamW, falling to zero along a cosine.
        weight_decay: of AdamW.
        epochs: of the first fit; the fit of round i takes i times as many.
        batch_size: models of a batch in the first fit, of which all pairs count; grows likewise.
        scale: what scores are multiplied by before their softmax; 100 makes shares percentages.
    """

    name: ClassVar[str] = "brp"
    width: int = Field(64, ge=1)
    layers: int = Field(4, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    lr: float = Field(0.005, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(12, ge=2)
    scale: float = Field(100.0, gt=0)

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search."""
        return _Brp(space, candidates, seed, prior, self)
