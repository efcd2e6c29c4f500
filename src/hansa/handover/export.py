"""A bundle in a form that others open, in a folder that appears whole or not at all.

``transformers``
    what ``from_pretrained`` of that library opens: ``config.json``, weights under its names, the
    tokenizer where there is one.
``onnx``
    ``model.onnx`` for any number of inputs, with what it stands on in its metadata.

Either is opened again by what it is for, and compared with the bundle's model, before the folder
takes its name. ``README.md`` is the model's card.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from hansa.bundle import Bundle, read_bundle
from hansa.data.tokenizer import tokenizer_from_json
from hansa.errors import InputError
from hansa.files import new_folder
from hansa.handover.card import model_card
from hansa.handover.tokenizer import write_tokenizer
from hansa.models import Architecture, restore
from hansa.models.language import CausalLM, imported, merged
from hansa.models.masks import attach, finalise
from hansa.models.onnx import TOLERANCE, check_packages, difference, runner, to_onnx
from hansa.seeding import generator

Form = Literal["transformers", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]
LOGITS = 1e-5
"""Most difference of logits from the bundle's model, relative to the largest of them or to 1."""


def export(
    path: str | Path,
    out: str | Path,
    to: Form,
    *,
    dtype: Dtype = "float32",
    license_: str = "unknown",
    trusted: Collection[str] = (),
) -> dict[str, Any]:
    """Write a bundle's model in a form that others open.

    Adapters are merged into the weights, and what was pruned is zero.

    Args:
        path: the bundle, which is verified first.
        out: the folder to make.
        to: ``transformers`` (language models) or ``onnx``.
        dtype: what weights are written as; of ONNX float32 alone.
        license_: name of a licence as a model hub spells it.
        trusted: names ``module:Class`` of models whose code may be imported.

    Returns:
        JSON values: ``folder``, ``files``, ``digest`` of the bundle, and the largest ``difference``
        from its model that was found.

    Raises:
        InputError: a bundle that does not match its digests, a model that has no such form or that
            says something else in it, missing packages, or a folder that holds something.
    """
    if to not in get_args(Form):
        raise InputError("--to", repr(to), " or ".join(get_args(Form)))
    if dtype not in (get_args(Dtype) if to == "transformers" else ("float32",)):
        allowed = ", ".join(get_args(Dtype)) + "; float32 with onnx"
        raise InputError("--dtype", f"{dtype!r} with {to}", allowed)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_):
        raise InputError("--license", repr(license_), "a name such as apache-2.0, mit or unknown")
    found = read_bundle(path)
    model = _model(found, trusted)
    architecture = Architecture.model_validate(found.architecture)
    if to == "transformers" and not isinstance(model, CausalLM):
        raise InputError("--to", f"'transformers' with the model {architecture.name}", "onnx")
    with new_folder(Path(out)) as folder:
        if isinstance(model, CausalLM) and to == "transformers":
            far = _to_transformers(found, model, getattr(torch, dtype), architecture, folder)
        else:
            far = _to_onnx(found, model, architecture, folder)
        (folder / "README.md").write_text(model_card(found, to, license_, Path(out).resolve().name))
        files = sorted(entry.name for entry in folder.iterdir())
    return {"folder": str(out), "files": files, "digest": found.digest, "difference": far}


def _model(found: Bundle, trusted: Collection[str]) -> nn.Module:
    """Return a bundle's model without adapters and masks, in evaluation mode."""
    model = restore(found, trusted)
    if isinstance(model, CausalLM):
        merged(model.model)
    if found.kept:
        finalise(attach(model, found.kept))
    return model.eval()


def _to_transformers(
    found: Bundle,
    model: CausalLM,
    dtype: torch.dtype,
    architecture: Architecture,
    folder: Path,
) -> float:
    inner: Any = model.model
    inner.config.get_text_config().use_cache = True  # training has no use for it, generating has
    library = imported("transformers")
    with _quiet(library):
        inner.to(dtype).save_pretrained(folder)
        if found.tokenizer:
            write_tokenizer(found.tokenizer, architecture.shape[0], folder)
            _check_tokens(found.tokenizer, library.AutoTokenizer.from_pretrained(folder))
        kind = library.AutoModelForCausalLM
        opened = kind.from_pretrained(folder, dtype=torch.float32).eval()
    inner.float()  # as rounded as what was written

    def logits(tokens: torch.Tensor) -> Any:
        with torch.inference_mode():
            return opened(input_ids=tokens).logits.numpy()

    return _checked(logits, model, architecture, LOGITS, "transformers")


def _check_tokens(form: str, opened: Any) -> None:
    text = "Räume, trees\n\n\tand  42 don't\x00 \N{GRINNING FACE}."
    if opened(text)["input_ids"] != tokenizer_from_json(form).encode(text).tolist():
        raise InputError("tokenizer", "one that gives other numbers in transformers", "another")


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keep the library from telling how far it is, and that a test's text is a long one."""
    told = library.utils.logging
    level, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()


def _to_onnx(found: Bundle, model: nn.Module, architecture: Architecture, folder: Path) -> float:
    check_packages("--to", "transformers")
    sizes = {0: torch.export.Dim("batch")}
    if architecture.is_language:
        sizes[1] = torch.export.Dim("tokens", min=2, max=max(2, architecture.shape[0]))
    about = {
        "hansa.bundle": found.digest,
        "hansa.stage": str(found.card["stage"]),
        "hansa.data": str(found.card.get("data", "")),
        **({"labels": json.dumps(found.labels, ensure_ascii=False)} if found.labels else {}),
    }
    written = to_onnx(model, _inputs(architecture, 2), sizes, about)
    far = _checked(runner(written), model, architecture, TOLERANCE, "onnxruntime")
    (folder / "model.onnx").write_bytes(written)
    return far


def _checked(
    run: Callable[[torch.Tensor], Any],
    model: nn.Module,
    architecture: Architecture,
    most: float,
    name: str,
) -> float:
    """Return the largest difference from the bundle's model on batches of 1 and of 3.

    Raises:
        InputError: it is larger than allowed.
    """
    far = max(difference(run, model, _inputs(architecture, size)) for size in (1, 3))
    if not far <= most:
        found = f"a model whose outputs in {name} differ from PyTorch's by {far:.2g}"
        raise InputError("--to", found, f"at most {most:g} relative to the largest")
    return far


def _inputs(architecture: Architecture, size: int) -> torch.Tensor:
    """Return random inputs [size, ...]; of text, those of an odd size are shorter than others."""
    rng = generator(0, "handover", size)
    if not architecture.is_language:
        return torch.randn((size, *architecture.shape), generator=rng)
    tokens = max(2, architecture.shape[0] - size % 2)
    return torch.randint(architecture.classes, (size, tokens), generator=rng)
