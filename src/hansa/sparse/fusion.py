"""A model's steps, with each normalisation taking along the residual and the ReLU after it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from hansa.sparse.layers import pool
from hansa.sparse.norm import BatchNorm2d, GroupNorm

_RELU = (F.relu, torch.relu, torch.relu_)
_ADD = (operator.add, operator.iadd, torch.add)


def _keeping(function: Any) -> Callable[..., Any]:
    """Return a pooling function that keeps the layout."""

    def pooled(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return pool(function, x, *args, **options)

    return pooled


_POOL = {each: _keeping(each) for each in (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers are leaves, those of ours as well."""
        ours = m.__module__.startswith("hansa.sparse.")
        return ours or super().is_leaf_module(m, module_qualified_name)


def fused(model: nn.Module) -> fx.Graph | None:
    """Return the steps of a model in its present mode, None where they cannot be traced.

    Args:
        model: one whose normalisation layers are ``hansa.sparse.norm``'s.
    """
    kinds = dict(model.named_modules())
    if any(map(is_more_than_its_steps, kinds.values())):
        return None
    before = {name: dict(module.__dict__) for name, module in kinds.items()}
    try:
        graph = _Tracer().trace(model)
    except Exception:  # a model's own code may fail on a tracer in any way
        return None
    finally:
        changed = False
        for name, module in kinds.items():
            if module.__dict__.keys() != before[name].keys() or any(
                value is not before[name][key] for key, value in module.__dict__.items()
            ):
                # It keeps something of its inputs, or draws tensors, which a trace would freeze.
                changed = True
                module.__dict__.clear()
                module.__dict__.update(before[name])
    if changed:
        return None
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(kinds[node.target], BatchNorm2d | GroupNorm):
            _take_along(graph, node, kinds)
        elif node.op == "call_function" and node.target in _POOL and node.args:
            node.target = _POOL[node.target]
    graph.lint()
    return graph


def runnable(model: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Return a function that goes through a model's steps with the layers that it has now."""
    if any(node.op == "get_attr" for node in graph.nodes):
        return fx.Interpreter(model, graph=graph).run  # whose tensors may change from call to call
    forward: Callable[..., Any] = fx.GraphModule(model, graph).forward  # faster than node by node
    return forward


def _take_along(graph: fx.Graph, norm: fx.Node, kinds: dict[str, nn.Module]) -> None:
    last, residual = norm, None
    user = _only_user(norm)
    if user is not None and _is_sum(user):
        (residual,) = [each for each in user.args if each is not norm] or [None]
        own = user.target is not operator.iadd or user.args[0] is norm
        if isinstance(residual, fx.Node) and own:
            last = user
        else:
            residual = None
    user = _only_user(last)
    relu = user is not None and _is_relu(user, kinds)
    last = user if relu and user is not None else last
    if last is norm:
        return
    with graph.inserting_after(last):
        # Here the residual is there, whichever side of the sum was worked out first.
        whole = graph.call_module(str(norm.target), norm.args, {"residual": residual, "relu": relu})
    last.replace_all_uses_with(whole)
    while last is not norm:
        before = norm if norm in last.all_input_nodes else last.all_input_nodes[0]
        graph.erase_node(last)
        last = before
    graph.erase_node(norm)


def is_more_than_its_steps(module: nn.Module) -> bool:
    """Tell whether a module has hooks, or code that draws with Python: a trace would lose both."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return True
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any("random" in name for name in code.co_names)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    plain = node.op == "call_function" and node.target in _ADD and not node.kwargs
    return plain and len(node.args) == 2


def _is_relu(node: fx.Node, kinds: dict[str, nn.Module]) -> bool:
    match node.op:
        case "call_function":
            return node.target in _RELU
        case "call_module":
            return type(kinds[str(node.target)]) is nn.ReLU
        case "call_method":
            return node.target in ("relu", "relu_")
    return False
