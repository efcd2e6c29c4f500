"""Causal language models of the library ``transformers``, as modules from tokens to logits.

A model is built from the values of its configuration alone: nothing is downloaded, no code from
outside the library is run, and its initial values come from PyTorch's global stream. The vocabulary
and the context are those of the run. Special tokens, caches and number formats other than float32
have no part in training here, and are switched off; so is dropout, unless it is asked for.
"""

import copy
import difflib
import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hansa.errors import InputError, first_line
from hansa.untrusted import json_of, read_text

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
}
"""What a family's options are where none are given."""

_RUN_SETS = {
    "vocab_size": None,
    "max_position_embeddings": None,
    "n_positions": None,
    "use_cache": False,
    "return_dict": True,
    "dtype": "float32",
    "bos_token_id": None,  # nosec B105 # a token of text
    "eos_token_id": None,  # nosec B105 # a token of text
    "pad_token_id": None,  # nosec B105 # a token of text: the embedding of a token that pads would not be trained
}
_ELSEWHERE = {"auto_map", "quantization_config", "torch_dtype", "attn_implementation"}
"""Keys of a configuration that ask for code, kernels or number formats from elsewhere."""
_LORA = {
    "r": "a whole number from 1",
    "alpha": "a number above 0",
    "targets": "all-linear, or a list of layers",
}
_BLOCK = re.compile(r"((?:.*?\.)?(?:layers|h|blocks|layer))\.(\d+)\.")


class Lora(BaseModel):
    """Low-rank adapters (Hu et al., ICLR 2022): W + (alpha / r) B A with W frozen, B zero first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(8, ge=1, strict=True)
    """Rank of the adapters."""
    alpha: float = Field(16, gt=0, allow_inf_nan=False, strict=True)
    """What an adapter is scaled by, times its rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", min_length=1)
    """The linear layers that get adapters, by name or its end; by default all but the head."""


class CausalLM(nn.Module):
    """A causal model that maps tokens [batch, T], int64, to logits [batch, T, V].

    Args:
        model: a ``transformers`` causal model. Its buffers that are no part of its state, such as
            the frequencies of rotary positions, stop being buffers: they are the same everywhere,
            and to average them would round them.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._constants = [
            (path, name)
            for path, owner in model.named_modules()
            for name in sorted(owner._non_persistent_buffers_set)
            if owner._buffers[name] is not None
        ]
        for path, name in self._constants:
            owner = model.get_submodule(path)
            value = owner._buffers.pop(name)
            owner._non_persistent_buffers_set.remove(name)
            # Not by assignment, which would make some of them buffers again.
            owner.__dict__[name] = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, T, V] of the token after each."""
        # Without a mask the library looks at values of tensors, to see whether texts are packed.
        every = torch.ones(inputs.shape, dtype=torch.int64, device=inputs.device)
        logits: torch.Tensor = self.model(input_ids=inputs, attention_mask=every).logits
        return logits

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Move the constants with everything else."""
        super()._apply(fn, recurse)
        for path, name in self._constants:
            values = self.model.get_submodule(path).__dict__
            values[name] = fn(values[name])
        return self


def llama(shape: tuple[int, ...], classes: int, **options: Any) -> CausalLM:
    """Return a Llama; its options are those of ``transformers.LlamaConfig``, and ``lora``."""
    return _of_family("llama", shape, classes, options)


def gpt2(shape: tuple[int, ...], classes: int, **options: Any) -> CausalLM:
    """Return a GPT-2; its options are those of ``transformers.GPT2Config``, and ``lora``."""
    return _of_family("gpt2", shape, classes, options)


def configured(
    shape: tuple[int, ...], classes: int, config: Mapping[str, Any] | None = None, lora: Any = None
) -> CausalLM:
    """Return the causal model of a configuration.

    Args:
        shape: (context,), the tokens of an input.
        classes: tokens of the vocabulary.
        config: values as a ``config.json`` has them, ``model_type`` among them.
        lora: the values of ``Lora``, or None for a model that is trained as a whole.

    Raises:
        InputError: a model that ``transformers`` does not have, or that is not causal.
    """
    if not isinstance(config, Mapping):
        raise InputError(
            "model.options.config",
            "nothing" if config is None else repr(config),
            "path of a config.json, or a table of its values",
        )
    kind = config.get("model_type")
    known = imported("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        near = difflib.get_close_matches(str(kind), known, 3) or ["llama", "gpt2", "..."]
        raise InputError(
            "model.options.config.model_type",
            "nothing" if kind is None else repr(kind),
            f"a causal model of the library transformers ({', '.join(near)})",
        )
    model = _made(kind, config, shape, classes, lora)
    if not _is_causal(model, shape[0]):
        raise InputError(
            "model.options.config",
            f"{kind!r}, whose logits depend on later tokens",
            "a causal model; some are with is_decoder = true",
        )
    return model


LANGUAGE: dict[str, Callable[..., CausalLM]] = {
    "llama": llama,
    "gpt2": gpt2,
    "transformers": configured,
}


def read_config(path: str) -> dict[str, Any]:
    """Return the values of a ``config.json``.

    Args:
        path: the file, or a folder that holds it.

    Raises:
        InputError: there is none, or it holds no JSON table.
    """
    place = Path(path)
    place = place / "config.json" if place.is_dir() else place
    try:
        values = json_of(read_text(place))
    except (OSError, ValueError) as error:
        raise InputError(
            "model.options.config",
            f"{path!r} that could not be read ({first_line(error)})",
            "path of a config.json or of its folder",
        ) from error
    if not isinstance(values, dict):
        raise InputError("model.options.config", f"{path!r} without a table", "a config.json")
    return values


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parameters by the transformer block that they are part of.

    Args:
        names: parameter names, in the model's order.

    Returns:
        Name of a block (``model.model.layers.2``), in order of depth, -> its parameters in the
        order given. Parameters outside of blocks are left out.
    """
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _BLOCK.match(name):
            found[match[1]][int(match[2])].append(name)
    return {f"{row}.{k}": found[row][k] for row in found for k in sorted(found[row])}


def beside_adapters(
    model: nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a model's weights under the names that they have in one with adapters.

    Args:
        model: the model with adapters, whose own values are taken for these.
        weights: the state of the same model with or without adapters.
    """
    mine = model.state_dict()
    moved = {name.replace(".base_layer.", "."): name for name in mine if ".base_layer." in name}
    adapters = {name: value for name, value in mine.items() if ".lora_" in name}
    return adapters | {moved.get(name, name): value for name, value in weights.items()}


def merged(model: nn.Module) -> nn.Module:
    """Return a model whose low-rank adapters have become part of its weights.

    A safeguard that lives in adapters is removed by leaving them out.
    """
    for path, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if base is None or not hasattr(module, "merge"):
            continue
        module.merge()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _of_family(
    kind: str, shape: tuple[int, ...], classes: int, options: dict[str, Any]
) -> CausalLM:
    library = imported("transformers")
    family = library.AutoConfig.for_model(kind)
    names: dict[str, str] = family.attribute_map
    common = set(library.PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
    allowed = (set(family.to_dict()) - common | set(names) | {"lora"}) - set(_RUN_SETS)
    for key in options:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 3) or sorted(allowed)
            found = "what the run itself sets" if key in _RUN_SETS else "an unknown option"
            raise InputError(f"model.options.{key}", found, ", ".join(near))
    lora = options.pop("lora", None)
    given = {names.get(key, key): value for key, value in options.items()}
    return _made(kind, {**SMALL[kind], **given}, shape, classes, lora)


def _made(
    kind: str, values: Mapping[str, Any], shape: tuple[int, ...], classes: int, lora: Any
) -> CausalLM:
    """Return a model of a configuration's values, with the run's own vocabulary and context."""
    if len(shape) != 1:
        raise InputError("model.name", f"{kind!r} for inputs of shape {shape}", "text as data")
    library = imported("transformers")
    values = {k: copy.deepcopy(v) for k, v in values.items() if k not in _ELSEWHERE}
    values.pop("model_type", None)
    # Models that see images as well keep what concerns text in a table of its own.
    text = values if values.get("text_config") is None else values["text_config"]
    text.update({k: v for k, v in _RUN_SETS.items() if v is not None or k.endswith("_id")})
    text["vocab_size"] = classes
    config = library.AutoConfig.for_model(kind, **values)
    inner = config.get_text_config()
    given = {inner.attribute_map.get(key, key) for key in text}
    if (most := getattr(inner, "max_position_embeddings", None)) is not None:
        key = inner.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        inner.max_position_embeddings = max(most, shape[0]) if key in given else shape[0]
    for key, value in inner.to_dict().items():
        if "drop" in key and key not in given and isinstance(value, float):
            setattr(inner, key, 0.0)
    model = library.AutoModelForCausalLM.from_config(
        config,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",  # vmap has rules for all it does
    )
    return CausalLM(model if lora is None else _with_adapters(model, lora))


def _with_adapters(model: nn.Module, values: Any) -> nn.Module:
    try:
        lora = Lora.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        raise InputError(
            f"model.options.lora.{key}".rstrip("."),
            repr(first["input"]) if key in _LORA or not key else "an unknown key",
            _LORA.get(key, f"the keys {', '.join(_LORA)}"),
        ) from error
    targets: str | list[str] = "all-linear"
    if lora.targets != "all-linear":
        targets = list(lora.targets)
        linear = (nn.Linear, imported("transformers.pytorch_utils").Conv1D)
        layers = [name for name, layer in model.named_modules() if isinstance(layer, linear)]
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                ends = sorted({name.rpartition(".")[2] for name in layers})
                raise InputError("model.options.lora.targets", repr(target), ", ".join(ends))
    peft = imported("peft")
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets)
    # In place and not wrapped, so that blocks have the same names with and without adapters.
    adapted: nn.Module = peft.inject_adapter_in_model(config, model)
    return adapted


def _is_causal(model: CausalLM, context: int) -> bool:
    """Tell whether the first half of the logits is the same whatever stands in the second half."""
    half, was = context // 2, model.training
    inputs = torch.zeros(2, context, dtype=torch.int64)
    inputs[1, half:] = 1
    model.eval()
    with torch.no_grad():
        first, second = model(inputs)[:, :half]
    model.train(was)
    return torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def imported(name: str) -> Any:
    """Return a module of a library that language models stand on.

    Raises:
        InputError: the library is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            "model.name",
            f"a language model without the library {name.partition('.')[0]!r}",
            "pip install hansa[language]",
        ) from error
