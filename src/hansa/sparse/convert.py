"""Any model of Conv2d and Linear layers, made to train sparsely."""

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import nn

from hansa.errors import InputError
from hansa.sparse import layers
from hansa.sparse.choice import CLEAR, Way, fastest, first_inputs, may_be_last, turned
from hansa.sparse.functions import geometry_of
from hansa.sparse.fusion import fused, runnable
from hansa.sparse.kernels import find, kernels
from hansa.sparse.layers import DenseConv2d, Path, Rule, SparseConv2d, SparseLinear
from hansa.sparse.norm import BatchNorm2d, GroupNorm
from hansa.sparse.probe import Timing, timing
from hansa.sparse.thresholds import plain

_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    nn.GroupNorm: GroupNorm,
    nn.MaxPool2d: layers.MaxPool2d,
    nn.AvgPool2d: layers.AvgPool2d,
}


def sparsify(
    model: nn.Module,
    sparsity: float | None,
    *,
    inputs: float | None = None,
    sparse: Iterable[str] | None = None,
    refresh: int = 10,
    fixed: bool = False,
    path: Path = "auto",
    batch_size: int = 32,
    fuse: bool = True,
) -> "SparseModel":
    """Return a copy of a model whose convolutions and linear layers train sparsely.

    In training the output and the input's gradient are those of each layer's largest weights, the
    weight's gradient that of its largest inputs; all weights move, and none is set to zero (SWAT,
    Raihan and Aamodt, NeurIPS 2020; ZeroFL, Qiu et al., ICLR 2022, section 3.1). In evaluation
    only the largest weights count. Names of parameters and buffers stay as they are.

    Args:
        model: any module; it is not changed.
        sparsity: share of each layer's weights that is not used, in [0, 1). None uses weights as
            they are, and leaves out as many inputs as there are zeros.
        inputs: share of a layer's inputs that the weight's gradient leaves out; as ``sparsity`` by
            default.
        sparse: patterns of the names of layers, such as ``stages.*``. By default as in ZeroFL:
            every convolution of more than one pixel and every linear layer, without the model's
            first and last layer.
        refresh: steps between new thresholds.
        fixed: weights that are not among the largest get no gradient. Faster, and no longer SWAT:
            what is out can only come back when others shrink below it.
        path: ``kernels`` or ``reference``, or ``auto``, which times each layer once, and where
            that leaves it open, the whole step.
        batch_size: the batch that layers are timed with.
        fuse: whether the model's steps are traced once for each mode of its layers, for
            normalisation to take residual and ReLU along. Not for a model whose own code does
            something else from call to call with the same modes.

    Raises:
        InputError: a share outside of [0, 1), a pattern that fits no layer, one that fits a layer
            of another kind, or ``kernels`` where there are none.
    """
    for key, share in (("sparsity", sparsity), ("inputs", inputs)):
        is_share = isinstance(share, float | int) and 0 <= share < 1
        if share is not None and not is_share:
            raise InputError(key, repr(share), "a share from 0 up to, but not including, 1")
    for key, count in (("refresh", refresh), ("batch_size", batch_size)):
        if not isinstance(count, int) or count < 1:
            raise InputError(key, repr(count), "a whole number from 1 on")
    if path not in get_args(Path):
        raise InputError("path", repr(path), ", ".join(get_args(Path)))
    if path == "kernels" and kernels() is None:
        raise InputError("path", f"'kernels' ({find()[1]})", "auto or reference")
    names = chosen(model, sparse)
    model = copy.deepcopy(model)
    rule = Rule(sparsity, sparsity if inputs is None else inputs, refresh, fixed, path)
    for name, module in model.named_modules():
        if name in names:
            _turn(module, SparseConv2d if isinstance(module, nn.Conv2d) else SparseLinear)
            module._share(name, rule)
        elif type(module) is nn.Conv2d:
            _turn(module, DenseConv2d).rule = rule
        elif type(module) in _KINDS:
            _turn(module, _KINDS[type(module)])
    return SparseModel(model, rule, batch_size, fuse)


def chosen(model: nn.Module, patterns: Iterable[str] | None = None) -> tuple[str, ...]:
    """Return the names of the layers that patterns fit, by default those that ZeroFL sparsifies.

    Raises:
        InputError: a pattern that fits no layer, or one that fits a layer of another kind; a model
            without any layer to sparsify.
    """
    able = {name: m for name, m in model.named_modules() if _is_able(m)}
    if patterns is None:
        kinds = (nn.Conv2d, nn.Linear)
        within = [name for name, m in model.named_modules() if isinstance(m, kinds)][1:-1]
        found = [n for n in within if n in able and not _is_pointwise(able[n])]
        if not found:
            raise InputError(
                "model", "no layer to sparsify", "layers between the first and the last one"
            )
        return tuple(found)
    if isinstance(patterns, str):
        raise InputError("sparse", repr(patterns), "a list of patterns")
    patterns = list(patterns)
    if not patterns:
        raise InputError("sparse", "no pattern", "patterns of the names of layers")
    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children())}
    for pattern in patterns:
        fits = [name for name in leaves if fnmatchcase(name, pattern)]
        if not fits:
            raise InputError("sparse", repr(pattern), f"patterns of these: {', '.join(able)}")
        if "*" not in pattern and fits[0] not in able:
            about = f"{pattern!r}, a {type(leaves[fits[0]]).__name__}"
            raise InputError("sparse", about, "Conv2d with zeros as padding, or Linear")
    names = [n for n in able if any(fnmatchcase(n, pattern) for pattern in patterns)]
    if not names:
        raise InputError("sparse", ", ".join(patterns), f"patterns of these: {', '.join(able)}")
    return tuple(names)


class SparseModel(nn.Module):
    """A model with sparse layers, under the model's own names.

    Its steps are traced where they can be, so that normalisation, residual and ReLU run as one;
    what cannot be traced runs as it is written.

    Args:
        model: what ``sparsify`` made; its layers are shared, not copied.
        rule: what its sparse layers share.
        batch_size: the batch that layers are timed with.
        fuse: whether its steps are traced.
    """

    plain: nn.Module

    def __init__(self, model: nn.Module, rule: Rule, batch_size: int, fuse: bool = True) -> None:
        super().__init__()
        # The model's own tables: parameters go by the names that they have there.
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.__dict__["plain"] = model  # hidden: its layers are this module's own
        self.rule, self.batch_size, self.fuse = rule, batch_size, fuse
        self.training = model.training
        self._steps: dict[Any, Callable[..., Any] | None] = {}
        self._decided = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the steps, which any process traces again."""
        return {**self.__dict__, "_steps": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseModel":
        model, rule = copy.deepcopy((self.plain, self.rule), memo)
        twin = SparseModel(model, rule, self.batch_size, self.fuse)
        twin._decided = self._decided
        return twin

    def train(self, mode: bool = True) -> "SparseModel":
        """Set the mode of all layers."""
        super().train(mode)
        self.plain.train(mode)
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the model returns."""
        alone = len(inputs) == 1 and not options and isinstance(inputs[0], torch.Tensor)
        if alone and self.training and not self._decided:
            self.decide(inputs[0])
        if alone and self.training and self.rule.last:
            inputs = (turned(inputs[0]),)
        return (self._runner() if alone else self.plain)(*inputs, **options)

    @property
    def sparse_layers(self) -> dict[str, SparseConv2d | SparseLinear]:
        """The layers that train sparsely, by name."""
        kinds = (SparseConv2d, SparseLinear)
        return {name: m for name, m in self.named_modules() if isinstance(m, kinds)}

    @property
    def thresholds(self) -> list[str]:
        """Names of the buffers that hold thresholds, which are no part of the model's state."""
        names = self.sparse_layers
        return [f"{name}.{buffer}".lstrip(".") for name in names for buffer in layers.THRESHOLDS]

    @property
    def how(self) -> str:
        """Which path the layers take, in words."""
        found, why = find()
        if self.rule.path == "reference":
            return "reference path"
        if found is None:
            return f"reference path ({why})"
        if not self._decided:
            return f"undecided until its first batch of float32 (kernels: {found.isa})"
        count, rest = sum(self.rule.compiled.values()), ", all channels-last" * self.rule.last
        return (
            f"compiled kernels ({found.isa}) in {count} of {len(self.sparse_layers)} layers{rest}"
        )

    @torch.no_grad()
    def decide(self, inputs: torch.Tensor) -> None:
        """Settle which layers run on the compiled kernels, for inputs of this size.

        Args:
            inputs: any batch of them; only their shape counts.
        """
        if kernels() is None or self.rule.path == "reference":
            self._decided = True
            return
        if not (plain(inputs) and inputs.numel()):  # others may come
            return
        self._decided = True
        took: dict[str, Timing] = {}
        for name, x in first_inputs(self, inputs).items():
            layer = self.sparse_layers[name]
            if not layer.fits(x):
                continue
            if self.rule.path == "kernels":
                self.rule.compiled[name] = True
            else:
                took[name] = self._timing(layer, x)
        if took:
            self.take(self._fastest(inputs, took))

    def take(self, way: Way) -> None:
        """Train in a way from now on, with weights that lie as its maps do."""
        self._decided = True
        self.rule.compiled, self.rule.last = dict(way.compiled), way.last
        layout = torch.channels_last if way.last else torch.contiguous_format
        for each in self.plain.parameters():
            if each.dim() == 4 and plain(each):
                each.data = each.data.contiguous(memory_format=layout)

    def _timing(self, layer: SparseConv2d | SparseLinear, x: torch.Tensor) -> Timing:
        rule = self.rule
        # Where weights are used as they are, what is to come is unknown; most of them will be zero.
        sparsity = 0.9 if rule.sparsity is None else rule.sparsity
        inputs = 0.9 if rule.inputs is None else rule.inputs
        geometry = geometry_of(x, layer.weight, layer.shape)
        return timing(geometry, self.batch_size, sparsity, inputs, layer.shape is None)

    def _fastest(self, inputs: torch.Tensor, took: dict[str, Timing]) -> Way:
        compiled = {name: each.compiled < each.reference for name, each in took.items()}
        by_layer, off = Way(compiled), dict.fromkeys(compiled, False)
        best = sum(min(each.compiled, each.reference) for each in took.values())
        if best <= (1 - CLEAR) * sum(each.reference for each in took.values()):
            return by_layer
        others = {"kernels": Way(dict.fromkeys(compiled, True)), "contiguous": Way(off)}
        ways = {"layers": by_layer}
        ways |= {name: way for name, way in others.items() if way != by_layer}
        if inputs.dim() == 4 and may_be_last(self.plain):
            ways["channels-last"] = Way(off, last=True)
        return ways[fastest(self, inputs, ways)]

    def _runner(self) -> Callable[..., Any]:
        if not (self.rule.last or any(self.rule.compiled.values())):
            return self.plain
        parts = tuple(self.plain.modules())
        about = parts, tuple(part.training for part in parts)
        if about not in self._steps:
            graph = fused(self.plain) if self.fuse else None
            self._steps[about] = None if graph is None else runnable(self.plain, graph)
        return self._steps[about] or self.plain


def _turn(module: nn.Module, kind: type[nn.Module]) -> Any:
    """Make a module, in place, an instance of a subclass of its class."""
    module.__class__ = kind
    return module


def _is_able(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return False
    same = module.padding == "same"
    return not same or all(d * (k - 1) % 2 == 0 for d, k in _pairs(module))


def _pairs(conv: nn.Conv2d) -> Iterable[tuple[int, int]]:
    return zip(conv.dilation, conv.kernel_size, strict=True)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
