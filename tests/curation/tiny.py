"""A tiny language model, and a few questions with answers: seconds matter."""

from collections.abc import Sequence

import torch

from hansa.curation.sequences import Pair
from hansa.data.answers import AnswerOptions, Packed, blank_prompt, pack_examples
from hansa.data.examples import Example
from hansa.data.tokenizer import ByteTokenizer
from hansa.models.language import llama
from hansa.models.objective import NextToken
from hansa.models.task import Task

CONTEXT = 32
OPTIONS = AnswerOptions()
BLANK = blank_prompt(OPTIONS, ByteTokenizer())
PAIRS = [("two?", "2"), ("name of it?", "the river"), ("", "no question"), ("why", "so")]


def task(lora: bool = True, seed: int = 0) -> Task:
    """A Llama of one block; with adapters whose second matrix is no longer zero."""
    torch.manual_seed(seed)
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    adapters = {"r": 2, "targets": ["q_proj", "v_proj"]} if lora else None
    made = Task(llama((CONTEXT,), 256, **small, lora=adapters), NextToken())
    for name, value in made.params.items():
        if ".lora_B." in name:
            value.normal_(std=0.1)
    return made


def packed(pairs: Sequence[tuple[str, str]] = PAIRS) -> Packed:
    examples = [Example(str(k), q, a) for k, (q, a) in enumerate(pairs)]
    return pack_examples(examples, OPTIONS, CONTEXT, ByteTokenizer())


def samples(pairs: Sequence[tuple[str, str]] = PAIRS) -> Pair:
    found = packed(pairs)
    return found.inputs, found.labels
