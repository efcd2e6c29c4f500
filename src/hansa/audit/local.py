"""Local models as targets: the demonstration's reader, a folder of ``transformers``, a bundle."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hansa.audit.reader import Reader, read
from hansa.audit.targets import Asked
from hansa.bundle import read_bundle
from hansa.data.tokenizer import tokenizer_from_json
from hansa.errors import InputError, first_line
from hansa.models.build import Architecture, restore
from hansa.processes import threads_for

END = "\n"


class Pointing:
    """The reader of ``hansa.audit.reader``."""

    at_once, repeats = 128, True

    def __init__(self, reader: Reader | Path) -> None:
        self.reader = reader if isinstance(reader, Reader) else read(reader)
        self.name = f"reader {self.reader.digest[:8]}"

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return the reader's answers."""
        return self.reader.answer([each.prompt for each in asked])


class Transformers:
    """A causal model of the library ``transformers`` in a local folder; nothing is downloaded.

    Args:
        folder: what ``save_pretrained`` wrote, model and tokenizer.
        max_tokens: tokens of an answer.

    Raises:
        InputError: the library is missing, or the folder holds no such model.
    """

    at_once, repeats = 1, True

    def __init__(self, folder: Path, max_tokens: int = 64) -> None:
        if not folder.is_dir():
            raise InputError("target.path", str(folder), "a folder of a model")
        try:
            library: Any = importlib.import_module("transformers")
        except ImportError as error:
            found = "a language model without the library 'transformers'"
            raise InputError("target.kind", found, "pip install hansa[language]") from error
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = library.AutoTokenizer.from_pretrained(str(folder), **options)
            self._model = library.AutoModelForCausalLM.from_pretrained(
                str(folder), use_safetensors=True, **options
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            found = f"{folder} ({first_line(error)})"
            raise InputError("target.path", found, "a causal model with its tokenizer") from error
        self.name, self._max_tokens = folder.name, max_tokens

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return the likeliest answers, token by token."""
        return [self._one(each) for each in asked]

    def _one(self, asked: Asked) -> str:
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(
                asked.prompt.messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = asked.prompt.text
        inputs = self._tokenizer(text, return_tensors="pt")["input_ids"]
        most = getattr(self._model.config, "max_position_embeddings", None)
        _check_fits(inputs.shape[1] + self._max_tokens, most)
        with torch.no_grad():
            made = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self._max_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id or 0,
            )
        told = self._tokenizer.decode(made[0, inputs.shape[1] :], skip_special_tokens=True)
        return str(told).strip()


class FromBundle:
    """A language model in a bundle of Hansa, asked as it was trained to be.

    Args:
        folder: the bundle.
        template: how question and response become its prompt.
        max_tokens: tokens of an answer, which ends with a line.

    Raises:
        InputError: no bundle, or none of a language model.
    """

    at_once, repeats = 1, True

    def __init__(
        self, folder: Path, template: str = "{question}\n{response}\n", max_tokens: int = 64
    ) -> None:
        held = read_bundle(folder)
        architecture = Architecture.model_validate(held.architecture)
        if not architecture.is_language or not held.tokenizer:
            raise InputError("target.path", f"{folder}, no language model", "the bundle of one")
        self._tokenizer = tokenizer_from_json(held.tokenizer)
        self._model = restore(held).eval()
        self._context, self._template = architecture.shape[0], template
        self.name, self._max_tokens = folder.name, max_tokens

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return the likeliest answers, token by token."""
        with threads_for(sum(p.numel() for p in self._model.parameters())):
            return [self._one(each) for each in asked]

    def _one(self, asked: Asked) -> str:
        prompt = asked.prompt
        text = self._template.replace("{question}", prompt.question)
        tokens = self._tokenizer.encode(text.replace("{response}", prompt.body)).tolist()
        _check_fits(len(tokens) + 1, self._context)
        made: list[int] = []
        with torch.no_grad():
            while len(made) < self._max_tokens and len(tokens) + len(made) < self._context:
                logits = self._model(torch.tensor([tokens + made]))
                made.append(int(logits[0, -1].argmax()))
                if END in self._tokenizer.decode(made):
                    break
        return self._tokenizer.decode(made).partition(END)[0].strip()


def _check_fits(num: int, most: int | None) -> None:
    if most is not None and num > most:
        raise InputError("target.path", f"a context of {most} tokens", f"{num} for these prompts")
