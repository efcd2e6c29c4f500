"""A world and a model small enough for sums by hand, and for whole runs in a second."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hansa.safeguard.setup import Setup
from hansa.safeguard.world import World, WorldOptions

OPTIONS = WorldOptions(entities=24, relations=2, values=4, facts=3, seed=5)
WORLD = World(OPTIONS)


def tiny(seed: int = 0, **more: object) -> nn.Module:
    """Return a Llama of some thousand weights that knows nothing."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": WORLD.vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **more})).eval()


def tied(seed: int = 0) -> nn.Module:
    """Return a GPT-2 whose head is its embedding, with dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORLD.vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False
    )
    return GPT2LMHeadModel(config)


def setup_of(model: nn.Module, reference: nn.Module | None = None, **more: object) -> Setup:
    """Return a setup of a model; its reference is another, where none is given."""
    return Setup(model, (reference or tiny(9)).requires_grad_(False), WORLD, **more)
