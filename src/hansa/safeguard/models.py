"""Models to be safeguarded: those of ``transformers``, from bundles, folders or a hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hansa.bundle import CARD, Bundle, read_bundle
from hansa.errors import InputError, first_line
from hansa.models.build import Architecture, restore
from hansa.models.language import CausalLM, merged
from hansa.safeguard.checkpoint import full

_KEY = "model.path"


@dataclass(frozen=True)
class Loaded:
    """A causal model, and what belongs to it.

    Attributes:
        model: a model of ``transformers``, float32, without adapters.
        architecture: how to build it again.
        tokenizer: a bundle's tokenizer as JSON (``tokenizer_from_json``), else empty.
        own_tokenizer: that of ``transformers``, of a model that comes from a folder or a hub.
        parent: the bundle that it comes from.
    """

    model: nn.Module
    architecture: Architecture
    tokenizer: str = ""
    own_tokenizer: Any = None
    parent: Bundle | None = None


def load_model(path: str, context: int) -> Loaded:
    """Return the model of a bundle, of a folder that ``save_pretrained`` wrote, or of a hub.

    Master weights are float32 whatever the file holds: in bfloat16 the small steps of a defender
    or an attacker vanish.

    Args:
        path: the folder, or a name on the hub.
        context: most tokens of a row, which a model from elsewhere is described by.

    Raises:
        InputError: no causal model there, or one of a smaller context.
    """
    if (Path(path) / CARD).is_file():
        bundle = read_bundle(path)
        module = restore(bundle)
        if not isinstance(module, CausalLM):
            raise InputError(_KEY, f"{path}, a model of images", "a causal language model")
        architecture = Architecture.model_validate(bundle.architecture)
        options = {k: v for k, v in architecture.options.items() if k != "lora"}
        architecture = architecture.model_copy(update={"options": options})
        return Loaded(merged(module.model), architecture, bundle.tokenizer, None, bundle)
    transformers = _library()
    try:
        # Weights from elsewhere are data, and so is whatever lies beside them.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(
            _KEY,
            f"{path!r} without a causal model and its tokenizer ({first_line(error)})",
            "a bundle, a folder of transformers, or a name on the hub",
        ) from error
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and context > most:
        raise InputError("data.context", context, f"{most} at most with this model")
    model.config.use_cache = False
    if tokenizer.pad_token is None:  # batches here are padded by a mask; other tools want a token
        tokenizer.pad_token = tokenizer.eos_token
    values = {**model.config.to_dict(), "model_type": model.config.model_type}
    architecture = Architecture(
        name="transformers",
        options={"config": _plain(values)},
        shape=(context,),
        classes=model.config.get_text_config().vocab_size,
    )
    return Loaded(model, architecture, "", tokenizer)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return a model's decoder layers: its longest list of modules of one class.

    Raises:
        InputError: there is none.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    ]
    if not lists:
        raise InputError(_KEY, "a model without decoder layers", "a transformer")
    return max(lists, key=len)


def width_of(model: nn.Module) -> int:
    """Return the width of a model's hidden states.

    Raises:
        InputError: they are not all of one width, as where embeddings are projected.
    """
    with torch.no_grad():
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    widths = {state.shape[-1] for state in states}
    if len(widths) > 1:
        raise InputError(_KEY, f"hidden states of widths {sorted(widths)}", "one of one width")
    return int(widths.pop())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights, whole and on the CPU, under the names that a bundle has."""
    return {f"model.{name}": full(value) for name, value in model.state_dict().items()}


def take_state(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put weights as ``state_of`` returns them into a model."""
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that JSON can hold."""
    kinds = (str, int, float, bool, list, dict, type(None))
    return {key: value for key, value in values.items() if isinstance(value, kinds)}


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            _KEY, "no library 'transformers'", "pip install hansa[language]"
        ) from error
    return transformers
