"""Build a model from its description, which is all that a bundle keeps of its code."""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hansa.bundle import Bundle
from hansa.classes import import_class
from hansa.errors import InputError
from hansa.models.blox import Blox
from hansa.models.images import CNN, MLP, VGG16, ResNet18, ResNet20
from hansa.models.language import LANGUAGE, read_config
from hansa.models.objective import CLASSIFICATION, NextToken, Objective
from hansa.models.resize import resize
from hansa.seeding import global_stream

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "vgg16": VGG16,
    "blox": Blox,
    **LANGUAGE,
}


_LEAST = 1 << 20
"""Numbers up to this may stand in any bundle's architecture."""
_MOST_INPUT = 1 << 26
"""Most numbers in one input of a bundle's model."""


class Architecture(BaseModel):
    """A model's class, its options, and the shapes it was built for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """One of ``BUILT_IN``, or ``module:Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the class beside the shape and the classes."""
    shape: tuple[int, ...]
    """Shape of one input, without the batch; of text the context, in tokens."""
    classes: int = Field(ge=2)
    """Number of classes; of text the size of the vocabulary."""
    channels: dict[str, dict[str, int]] | None = None
    """Layer -> sizes, of a model that has fewer channels than its class builds."""

    @property
    def is_language(self) -> bool:
        """Whether it maps tokens to the logits of the token after each."""
        return self.name in LANGUAGE


def resolved(architecture: Architecture) -> Architecture:
    """Return an architecture that needs no file beside it.

    The path of a language model's ``config.json`` is replaced by the values there; any other
    architecture is returned as it is.

    Raises:
        InputError: no such file, or none of values.
    """
    if (path := _config_path(architecture)) is None:
        return architecture
    options = {**architecture.options, "config": read_config(path)}
    return architecture.model_copy(update={"options": options})


def _config_path(architecture: Architecture) -> str | None:
    config = architecture.options.get("config")
    is_path = architecture.name == "transformers" and isinstance(config, str)
    return config if is_path else None


def objective_of(architecture: Architecture, bytes_of: torch.Tensor | None = None) -> Objective:
    """Return the objective that a model is trained by.

    Args:
        architecture: the model.
        bytes_of: bytes of text that each token stands for, int64 [classes]; None for one each.
    """
    return NextToken(bytes_of) if architecture.is_language else CLASSIFICATION


def build(
    architecture: Architecture, seed: int = 0, trusted: Collection[str] | None = None
) -> nn.Module:
    """Build a model with initial values drawn from the run's seed.

    A class of the user's own is imported from its module (the current folder included) and gets
    ``shape`` and ``classes`` if its constructor has parameters of those names.

    Args:
        architecture: what to build.
        seed: the run's seed.
        trusted: names ``module:Class`` that may be imported; None allows any, which is right
            for a configuration that the user wrote, and not for a file from elsewhere.

    Raises:
        InputError: unknown name, a module or class that is not there or not trusted, options that
            the class does not take, or a model that does not map the shape to the classes; a path
            of a language model's configuration in a file from elsewhere.
    """
    if trusted is None:
        architecture = resolved(architecture)
    elif _config_path(architecture) is not None:
        raise InputError(
            "model.options.config", "a path in a file from elsewhere", "the values themselves"
        )
    kind = BUILT_IN.get(architecture.name) or _import(architecture.name, trusted)
    try:
        parameters = dict(inspect.signature(kind).parameters)
    except (TypeError, ValueError):
        parameters = {}
    given: dict[str, Any] = {"shape": architecture.shape, "classes": architecture.classes}
    arguments = {name: value for name, value in given.items() if name in parameters}
    unknown = sorted(set(architecture.options) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        allowed = ", ".join(name for name in parameters if name not in given) or "none"
        raise InputError(f"model.options.{unknown[0]}", "an unknown option", allowed)
    try:
        with global_stream(seed, "model"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty layers: the check below says what is wrong
            model = kind(**arguments, **architecture.options)
            if architecture.channels:
                resize(model, architecture.channels)
            # Within the stream, since lazy layers draw their values on the first input.
            check_output(model, architecture)
    except InputError:
        raise
    except Exception as error:  # a constructor may raise anything
        raise InputError(
            "model.options", f"options that {architecture.name} refuses ({error})", "its arguments"
        ) from error
    return model


def restore(found: Bundle, trusted: Collection[str] | None = ()) -> nn.Module:
    """Build the model that a bundle holds, with its weights.

    Args:
        found: what ``read_bundle`` returned.
        trusted: names ``module:Class`` that may be imported, none by default; see ``build``.

    Raises:
        InputError: an architecture that cannot be built, or weights that do not fit it.
    """
    try:
        architecture = Architecture.model_validate(found.architecture)
        _check_size(architecture, found.weights)
        model = build(architecture, trusted=trusted)
        model.load_state_dict(dict(found.weights))
    except (ValidationError, RuntimeError) as error:
        raise InputError(
            "bundle", f"one that does not fit ({error})", "a model's bundle"
        ) from error
    return model


def _check_size(architecture: Architecture, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse an architecture that asks for more numbers than a bundle holds, before there is any.

    A built-in model is put together without memory for its parameters. Those of a user's own class
    are left to it: it is trusted by name.

    Raises:
        InputError: naming both.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    largest = max(_numbers(architecture.model_dump()), default=0)
    if largest > max(held, _LEAST):  # layers, which take time even without memory
        raise InputError("bundle", f"an architecture with {largest} of something", f"{held} or so")
    if math.prod(architecture.shape) > _MOST_INPUT:
        found = f"inputs of {architecture.shape}"
        raise InputError("bundle", found, f"up to {_MOST_INPUT} numbers")
    kind = BUILT_IN.get(architecture.name)
    if kind is None or architecture.is_language:
        return
    given = {"shape": architecture.shape, "classes": architecture.classes}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kind(**given, **architecture.options)
            if architecture.channels:
                resize(model, architecture.channels)
    except Exception:  # what is wrong with it, `build` says in words
        return
    asked = sum(tensor.numel() for tensor in model.state_dict().values())
    if asked > held:
        raise InputError("bundle", f"an architecture of {asked} numbers", f"the {held} it holds")


def _numbers(values: Any) -> Iterator[int]:
    """Yield the whole numbers among options."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif type(values) is int:
        yield values


def check_output(model: nn.Module, architecture: Architecture) -> None:
    """Try the model on two empty inputs.

    Raises:
        InputError: it is no module, fails on them, or does not return [2, classes]; of a language
            model [2, T, classes].
    """
    if not isinstance(model, nn.Module):
        raise InputError("model.name", architecture.name, "a subclass of torch.nn.Module")
    text = architecture.is_language
    wanted = (2, *(architecture.shape if text else ()), architecture.classes)
    inputs = torch.zeros(2, *architecture.shape, dtype=torch.int64 if text else None)
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(inputs)
        found = str(tuple(logits.shape))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        found = f"an error: {str(error).strip().partition(chr(10))[0]}"
    finally:
        model.train(was)
    if found != str(wanted):
        raise InputError(
            "model.name",
            f"{architecture.name}, which maps inputs of shape (2, "
            f"{', '.join(map(str, architecture.shape))}) to {found}",
            f"a model that returns logits of shape {wanted}",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model.name", f"{architecture.name} without trainable parameters", "some")


def _import(name: str, trusted: Collection[str] | None) -> Callable[..., nn.Module]:
    if trusted is not None and ":" in name and name not in trusted:
        raise InputError(
            "model.name", f"{name!r}, code from outside Hansa", "a class named as trusted"
        )
    return import_class(name, "model.name", f"{', '.join(BUILT_IN)} or module:Class")
