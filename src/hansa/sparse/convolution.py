"""One convolution of one size on the compiled kernels, on batch-innermost tensors.

Tensors here are [channels, height, width, batch] and contiguous (see ``layout``). A linear layer is
a convolution of maps of one pixel.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from hansa.sparse.kernels import Argument, Kernels, required

NEAR = 600 << 10
"""Bytes of a slab that stays near the core together with what its block writes."""
CORE = 48 << 10
"""Bytes that stay in the core's first cache: what a tile of outputs reads of a unit's channels."""
FEW = 16
"""Entries of a list for which a tile's sums are worth fetching and storing again."""
MOST = 1 << 20
"""Bytes of the largest slab of all samples at once."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution without groups and dilation.

    Attributes:
        inputs: input channels.
        height: rows of an input map.
        width: columns of an input map.
        outputs: output channels.
        kernel: rows and columns of the kernel.
        stride: of rows and of columns.
        padding: rows of zeros above and below, columns left and right.
    """

    inputs: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @cached_property
    def out(self) -> tuple[int, int]:
        """Rows and columns of an output map."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, strict=True)
        high, wide = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return high, wide

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns that a tap reaches beyond a block, in the input's phases."""
        high, wide = ((k - 1) // s for k, s in zip(self.kernel, self.stride, strict=True))
        return high, wide

    @property
    def classes(self) -> int:
        """How many classes a stride deals the input's pixels into, each with taps of its own."""
        return self.stride[0] * self.stride[1]


@dataclass(frozen=True)
class Blocks:
    """How a product is cut: output pixels of a block, and the slab of input that it needs.

    Attributes:
        samples: samples of a block: all, or those of one vector.
        rows: rows of a block.
        columns: columns of a block.
        slab: rows and columns of each phase of a slab.
    """

    samples: int
    rows: int
    columns: int
    slab: tuple[int, int]

    @classmethod
    def of(
        cls, out: tuple[int, int], planes: int, reach: tuple[int, int], batch: int, vector: int
    ) -> "Blocks":
        """Return blocks for maps of a size whose slabs, of so many planes, stay near the core."""

        def fit(samples: int, pixels: int) -> "Blocks":
            columns = _even(out[1], max(1, pixels // samples))
            row = 4 * planes * (columns + reach[1]) * samples
            rows = _even(out[0], max(4, NEAR // row - reach[0]))
            return cls(samples, rows, columns, (rows + reach[0], columns + reach[1]))

        # All samples at once read and write memory in one go; where maps are small, or channels
        # many, the slab would be too large for that.
        whole = fit(batch, 16 * vector)
        high, wide = whole.slab
        if batch <= vector or (batch <= 4 * vector and 4 * planes * high * wide * batch <= MOST):
            return whole
        return fit(vector, vector * vector)


def _even(total: int, most: int) -> int:
    """Return the size of equal parts of at most a size."""
    return -(-total // -(-total // most))


class Convolution:
    """The kept weights of a layer as lists, and the products with them.

    Args:
        geometry: its sizes.
        batch: samples that come at once.
        library: the kernels; by default those that were found.
    """

    def __init__(self, geometry: Geometry, batch: int, library: Kernels | None = None) -> None:
        found = library or required()
        self.geometry, self._kernels = geometry, found
        g, (sh, sw) = geometry, geometry.stride
        self._forward = Blocks.of(g.out, g.inputs * g.classes, g.reach, batch, found.vector)
        classes = (-(-g.height // sh), -(-g.width // sw))
        self._backward = Blocks.of(classes, g.outputs, g.reach, batch, found.vector)
        self._tables = self._offsets()
        size = g.outputs * len(self._tables[0])
        self._unit = self._channels(self._forward, g.classes)
        self._unit_back = self._channels(self._backward, 1)
        self._units = -(-g.inputs // self._unit)
        self._units_back = -(-g.outputs // self._unit_back)

        def numbers(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32)

        # Pages of these that no kept weight reaches are never touched, and cost no memory.
        self._begin = numbers(g.outputs * self._units + 1)
        self._offset, self._value, self._flat = numbers(size), _new(size), numbers(size)
        self._begin_back = numbers(g.classes * g.inputs * self._units_back + 1)
        self._offset_back, self._value_back = numbers(size), _new(size)
        self.kept = 0
        self.version = 0

    def _channels(self, blocks: Blocks, planes: int) -> int:
        """Return how many channels a tile of two rows of outputs reads from the first cache."""
        (high, wide), vector = self.geometry.reach, self._kernels.vector
        tile = vector * vector // 2 + wide * blocks.samples
        return max(1, CORE // (4 * planes * (2 + high) * tile))

    def _step(self, lists: int, units: int) -> int:
        """Return how many units are added up before a tile's sums are stored."""
        return _even(units, max(1, -(-FEW * lists * units // max(1, self.kept))))

    def _offsets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return, by column of the weight matrix, offsets in both slabs, and the target.

        The target is class * inputs + input channel.
        """
        g, (kh, kw), (sh, sw), (top, left) = (
            self.geometry, self.geometry.kernel, self.geometry.stride, self.geometry.reach
        )  # fmt: skip
        row, column = torch.meshgrid(torch.arange(kh), torch.arange(kw), indexing="ij")
        class_ = (row % sh) * sw + column % sw
        (high, wide), back_wide = self._forward.slab, self._backward.slab[1]
        forward = (class_ * high + row // sh) * wide + column // sw
        backward = (top - row // sh) * back_wide + left - column // sw
        channel = torch.arange(g.inputs)[:, None]
        samples, back = self._forward.samples, self._backward.samples
        return (
            (samples * (channel * g.classes * high * wide + forward.flatten())).flatten().int(),
            (back * backward.flatten()).repeat(g.inputs).int(),
            (class_.flatten() * g.inputs + channel).flatten().int(),
        )

    def take(self, weight: torch.Tensor, threshold: float) -> int:
        """Take the weights [outputs, inputs, rows, columns] of at least a magnitude, never zeros.

        Returns:
            A number that ``version`` holds until weights are taken again.
        """
        g = self.geometry
        self.version += 1
        forward, backward, target = self._tables
        (high, wide), samples = self._backward.slab, self._backward.samples
        self.kept = int(
            self._kernels.call(
                "pattern",
                *(weight, float(threshold), g.outputs, len(forward), forward, backward, target),
                *(high * wide * samples, g.classes * g.inputs),
                *(self._unit * len(forward) // g.inputs, self._unit_back),
                *(self._begin, self._offset, self._value),
                *(self._flat, self._begin_back, self._offset_back, self._value_back),
            )
        )
        return self.version

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output [outputs, out rows, out columns, batch] of an input."""
        g = self.geometry
        y = _new(g.outputs, *g.out, x.shape[3])
        self._kernels.call(
            "convolve",
            *(*self._source(x), self._begin, self._offset, self._value, g.outputs),
            *(self._units, self._step(g.outputs, self._units), bias),
            *(y, *g.out, torch.get_num_threads()),
        )
        return y

    def _source(self, x: torch.Tensor) -> tuple[Argument, ...]:
        g, blocks = self.geometry, self._forward
        sizes = (g.inputs, g.height, g.width, x.shape[3], *g.stride, *g.padding)
        return (x, *sizes, blocks.samples, blocks.rows, blocks.columns, *blocks.slab)

    def input_gradient(self, d: torch.Tensor) -> torch.Tensor:
        """Return the gradient [inputs, height, width, batch] of the input."""
        g, blocks, batch = self.geometry, self._backward, d.shape[3]
        (sh, sw), (top, left), threads = g.stride, g.reach, torch.get_num_threads()
        x = _new(g.inputs, g.height, g.width, batch)
        units, lists = self._units_back, g.classes * g.inputs
        for class_ in range(g.classes):
            # Input pixels of a class begin here, and their first tap meets this output pixel.
            y0, x0 = (class_ // sw - g.padding[0]) % sh, (class_ % sw - g.padding[1]) % sw
            q0, p0 = (y0 + g.padding[0]) // sh, (x0 + g.padding[1]) // sw
            if y0 >= g.height or x0 >= g.width:
                continue
            rows, columns = -(-(g.height - y0) // sh), -(-(g.width - x0) // sw)
            out = x if g.classes == 1 else _new(g.inputs, rows, columns, batch)
            self._kernels.call(
                "convolve",
                *(d, g.outputs, *g.out, batch, 1, 1, top - q0, left - p0),
                *(blocks.samples, blocks.rows, blocks.columns, *blocks.slab),
                *(self._begin_back[class_ * g.inputs * units :], self._offset_back),
                *(self._value_back, g.inputs, units, self._step(lists, units)),
                *(None, out, rows, columns, threads),
            )
            if g.classes > 1:
                self._kernels.call(
                    "interleave",
                    *(out, x, g.inputs, rows, columns, batch, y0, x0, sh, sw, g.height, g.width),
                    threads,
                )
        return x

    def weight_gradient(self, x: torch.Tensor, threshold: float, d: torch.Tensor) -> torch.Tensor:
        """Return the dense gradient of the weights, of the inputs of at least a magnitude."""
        g = self.geometry
        gradient = _new(g.outputs, g.inputs, *g.kernel)
        self._kernels.call(
            "gradient",
            *(x, float(threshold), d, gradient, g.inputs, g.height, g.width, x.shape[3]),
            *(g.outputs, *g.kernel, *g.stride, *g.padding, *g.out, torch.get_num_threads()),
        )
        return gradient

    def kept_gradient(self, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the kept weights alone, zero elsewhere."""
        g = self.geometry
        values = _new(self.kept)
        self._kernels.call(
            "sample",
            *(*self._source(x), self._begin, self._offset, g.outputs, self._units, d),
            *(*g.out, values),
            torch.get_num_threads(),
        )
        gradient = torch.zeros(g.outputs, g.inputs, *g.kernel)
        gradient.view(-1)[self._flat[: self.kept].long()] = values
        return gradient


def _new(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32)
