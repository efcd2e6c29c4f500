"""Benchmarks of the library lm-evaluation-harness, for models of real text.

Which prompt and how many examples in it can move a score from one third to almost one half (see
docs/redteam.md); both are part of what is told.
"""

from typing import Any

from torch import nn

from hansa.errors import InputError, first_line
from hansa.safeguard.models import Loaded
from hansa.safeguard.redteam_options import Harness

_KEY = "redteam.harness"


def check(loaded: Loaded) -> None:
    """Refuse benchmarks where nothing can run them.

    Raises:
        InputError: no library, or a model without a tokenizer of real text.
    """
    _library()
    _tokenizer(loaded)


def evaluate(
    options: Harness, model: nn.Module, loaded: Loaded, device: str = "cpu"
) -> dict[str, Any]:
    """Return a model's scores, as JSON values.

    Args:
        options: which benchmarks, and how.
        model: a causal model of ``transformers``.
        loaded: what has its tokenizer.
        device: where it runs.

    Raises:
        InputError: no library, no tokenizer, or a task that the library does not have.
    """
    library = _library()
    wrapped = library.models.huggingface.HFLM(
        pretrained=model.to(device),
        tokenizer=_tokenizer(loaded),
        batch_size=options.batch,
        device=device,
    )
    try:
        found = library.simple_evaluate(
            model=wrapped,
            tasks=list(options.tasks),
            num_fewshot=options.shots,
            limit=options.limit,
            apply_chat_template=options.template,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError) as error:
        named = f"{', '.join(options.tasks)} ({first_line(error)})"
        raise InputError(f"{_KEY}.tasks", named, "tasks of lm-evaluation-harness") from error
    tasks = {name: _accuracy(values) for name, values in found["results"].items()}
    return {
        "version": getattr(library, "__version__", "?"),
        "shots": options.shots,
        "limit": options.limit,
        "template": options.template,
        "tasks": {name: value for name, value in tasks.items() if value is not None},
    }


def _accuracy(values: dict[str, Any]) -> float | None:
    """Return a task's first measure, its accuracy where it has one."""
    measures = {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if isinstance(value, float | int) and "stderr" not in key and "," in key
    }
    return measures.get("acc", next(iter(measures.values()), None))


def _tokenizer(loaded: Loaded) -> Any:
    if loaded.own_tokenizer is not None:
        return loaded.own_tokenizer
    if loaded.tokenizer:
        import tokenizers
        import transformers

        try:
            held = tokenizers.Tokenizer.from_str(loaded.tokenizer)
        except Exception as error:  # the library raises nothing narrower
            found = f"a tokenizer of Hansa's own ({first_line(error)})"
            raise InputError(_KEY, found, "a model with a tokenizer of the library") from error
        return transformers.PreTrainedTokenizerFast(tokenizer_object=held)
    raise InputError(_KEY, "a model without a tokenizer", "a model of real text")


def _library() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError as error:
        raise InputError(_KEY, "no library 'lm_eval'", "pip install hansa[harness]") from error
    return lm_eval
