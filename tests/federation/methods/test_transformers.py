"""Methods on a transformer with LoRA adapters: frozen, tied and idle parameters are legal."""

import peft
import pytest
import torch
import transformers
from torch import nn

import hansa
from hansa.data.clients import Client
from hansa.federation.methods import METHODS
from hansa.models.task import Task
from support import engine, made, run, same

# peft asks a transformers model for an attribute under its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

VOCABULARY, LENGTH, CLASSES = 16, 6, 3


class Classifier(nn.Module):
    """A tiny BERT with adapters on its attention; token ids [batch, length] in, logits out."""

    def __init__(self, lora: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LENGTH,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertForSequenceClassification(config)
        if lora:
            adapters = peft.LoraConfig(
                task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]
            )
            model = peft.get_peft_model(model, adapters)
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=inputs).logits
        return logits


def texts(num: int = 3) -> dict[str, Client]:
    """Token ids whose class is the remainder of their sum, shifted at each client."""
    made = {}
    for k in range(num):
        rng = torch.Generator().manual_seed(k)
        inputs = torch.randint(0, VOCABULARY, (14, LENGTH), generator=rng)
        labels = (inputs.sum(1) + k) % CLASSES
        made[f"c{k}"] = Client.of((inputs[:8], labels[:8]), test=(inputs[8:], labels[8:]))
    return made


def test_only_adapters_and_head_travel_and_only_they_have_masks() -> None:
    model = Classifier()
    federation = engine(hansa.FedSelect(rate=0.3, limit=0.5), model=model, data=texts())
    results = run(federation, 3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert any("classifier" in name for name in trainable)
    assert len(trainable) < len(list(model.parameters()))
    state = federation.state("root/c0")
    assert state.group("model").keys() == state.group("mask").keys() == trainable
    shares = {name: mask.float().mean().item() for name, mask in state.group("mask").items()}
    assert max(shares.values()) <= 0.5
    assert all(share > 0 for name, share in shares.items() if "weight" in name)
    sent = 4 * sum(federation.setup.task.params[name].numel() for name in trainable)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert results[0].visits[0].down < sent + 2500 < whole
    for name, parameter in federation.model_of("root/c0").named_parameters():
        if name not in trainable:
            assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_frozen_weights_are_those_of_every_client() -> None:
    model = Classifier()
    federation = engine(hansa.FedSelect(), model=model, data=texts())
    run(federation, 1)
    one, other = (dict(federation.model_of(f"root/c{k}").named_parameters()) for k in (0, 1))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert same({n: one[n].detach() for n in frozen}, {n: other[n].detach() for n in frozen})


def test_a_whole_transformer_trains() -> None:
    federation = engine(hansa.FedSelect(rate=0.2), model=Classifier(lora=False), data=texts(2))
    before = dict(federation.setup.task.params)
    run(federation, 2)
    moved = federation.state().group("model")
    assert sum(not torch.equal(moved[name], before[name]) for name in before) > len(before) / 2


class Tied(nn.Module):
    """An embedding whose weight is its output layer's as well, and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.output = nn.Linear(8, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.embedding(inputs).mean(1))
        return logits


@pytest.mark.parametrize("name", METHODS)
def test_tied_and_idle_parameters_are_legal_in_every_method(name: str) -> None:
    federation = engine(made(name), model=Tied(), data=texts())
    run(federation, 2)
    assert Task(Tied()).params.keys() == {"embedding.weight", "idle"}
    for path in federation.tree.leaves():
        held = federation.model_of(path)
        assert held.output.weight is held.embedding.weight
        assert held.idle.tolist() == [1, 1, 1]
    masks = federation.method.masks(federation.setup, federation.state("root/c0"))
    assert masks.keys() in ({"embedding.weight", "idle"}, set())
