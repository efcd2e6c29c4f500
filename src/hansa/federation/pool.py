"""Stacked batches: the samples of several clients, side by side."""

from collections.abc import Callable, Iterator, Sequence

import torch

from hansa.data.clients import Client, Split, take
from hansa.models.task import Batch

OnDevice = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Pool:
    """The data of some clients, from which stacked batches are taken.

    Clients that hold parts of one pool of samples are read from there; others are put together.
    """

    def __init__(self, clients: Sequence[Client], split: Split, on: OnDevice) -> None:
        index = [torch.from_numpy(client.splits[split]) for client in clients]
        first = clients[0]
        self._weights: torch.Tensor | None = None
        weighted = split == "train" and any(client.weights is not None for client in clients)
        one_pool = all(c.inputs is first.inputs and c.labels is first.labels for c in clients)
        if one_pool and not weighted:
            self._inputs, self._labels = on(first.inputs, first.labels)
            self._index = index
        else:
            pairs = zip(clients, index, strict=True)
            parts = [(client.inputs[rows], client.labels[rows]) for client, rows in pairs]
            device = on(first.inputs[:0], first.labels[:0])[0].device
            self._inputs = torch.cat([inputs for inputs, _ in parts]).to(device)
            self._labels = torch.cat([labels for _, labels in parts]).to(device)
            self._index = list(torch.arange(len(self._labels)).split([len(i) for i in index]))
            if weighted:
                ones = [torch.ones(len(client.labels)) for client in clients]
                each = [
                    (one if client.weights is None else client.weights)[rows]
                    for client, one, rows in zip(clients, ones, index, strict=True)
                ]
                self._weights = torch.cat(each).to(device, torch.get_default_dtype())

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
        for number in range(max(len(row) for row in chunks)):
            yield self._batch([row[number] if number < len(row) else row[0][:0] for row in chunks])

    def _batch(self, rows: list[torch.Tensor]) -> Batch:
        width = max(len(row) for row in rows)
        device = self._labels.device
        if all(len(row) == width for row in rows):
            index = torch.stack(rows).to(device)
            samples = take(self._inputs, self._labels, index)
            return samples if self._weights is None else (*samples, self._weights[index])
        # A client's own sample fills its batch up: another's may be no number.
        index = torch.stack([own[:1].expand(width) for own in self._index[: len(rows)]])
        weights = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        index[weights] = torch.cat(rows)
        index = index.to(device)
        filled = take(self._inputs, self._labels, index)
        held = weights.to(device, torch.get_default_dtype())
        return (*filled, held if self._weights is None else held * self._weights[index])
