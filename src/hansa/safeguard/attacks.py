"""One attack on one model: fine-tune a copy of it, and ask it at some steps on the way."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hansa.errors import InputError
from hansa.safeguard.adversaries import optimizer_of, scheduled
from hansa.safeguard.edits import edit
from hansa.safeguard.losses import next_token, run
from hansa.safeguard.measure import score
from hansa.safeguard.redteam_options import Attack, Edit
from hansa.safeguard.rows import Data, Rows
from hansa.seeding import generator, global_stream

Point = dict[str, Any]
"""What was measured after ``step`` steps: topic -> {``choice``, ``said``}, and ``prompts``,
template -> the same about what is restricted; after training also its mean ``loss`` since the
point before."""
Curve = list[Point]


class Probe:
    """Asks a model all that is measured of it.

    Args:
        data: whose questions are asked.
        templates: prompts of the restricted questions; by default all there are.

    Raises:
        InputError: a template that the data do not have.
    """

    def __init__(self, data: Data, templates: Sequence[str] = ()) -> None:
        for name in templates:
            if name not in data.templates:
                allowed = ", ".join(data.templates)
                raise InputError("redteam.templates", repr(name), f"some of {allowed}")
        self.templates = tuple(templates) or data.templates
        self._topics = dict(data.questions())
        if (fresh := data.fresh()) is not None:
            self._topics["fresh"] = fresh[1]
        self._prompts = {name: data.questions(name)["restricted"] for name in self.templates}

    @property
    def chance(self) -> float:
        """The share of restricted questions that a guess gets right."""
        asked = next(iter(self._prompts.values()))
        counted = (asked.candidates >= 0).sum(-1).expand(asked.places.shape)
        return float((1 / counted[asked.places >= 0].double()).mean())

    def __call__(self, model: nn.Module, step: int) -> Point:
        """Return what a model answers after some steps of an attack."""
        prompts = {}
        for name, questions in self._prompts.items():
            found = score(model, questions)
            prompts[name] = {"choice": found.choice, "said": found.said}
        point: Point = {"step": step, "prompts": prompts}
        # An attacker asks in whatever words work.
        point["restricted"] = {
            key: max(prompt[key] for prompt in prompts.values()) for key in ("choice", "said")
        }
        for topic, questions in self._topics.items():
            if topic != "restricted":
                found = score(model, questions)
                point[topic] = {"choice": found.choice, "said": found.said}
        return point


def attack(
    model: nn.Module,
    data: Data,
    spec: Attack,
    lr: float,
    seed: int,
    probes: Sequence[int],
    probe: Probe,
) -> Curve:
    """Fine-tune a copy of a model as an attacker would.

    Every batch comes from a generator of its own, keyed by seed and step: attacks of one seed see
    the same rows at the same steps, whatever else differs.

    Args:
        model: the model, which stays as it is.
        data: the attacker's text, and retained text.
        spec: how it is trained.
        lr: learning rate.
        seed: of the attack.
        probes: steps after which the model is asked, beside the last.
        probe: asks it.

    Returns:
        A point for each probe; a loss that is no number ends the attack, and the curve with it.

    Raises:
        InputError: an attack that these data or this model cannot have.
    """
    with global_stream(seed, "attack", "weights"):  # adapters and dropout take no generator
        attacked = copy.deepcopy(model)
        if spec.rank is not None:
            attacked = _with_adapters(attacked, spec.rank)
        attacked.train()
        trained = [p for p in attacked.parameters() if p.requires_grad]
        optimizer = optimizer_of(spec.optimizer, trained, lr, spec.weight_decay)
        device, losses = trained[0].device, []
        curve: Curve = []
        for step, rows in enumerate(_batches(data, spec, seed)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scheduled(spec.schedule, step, spec.steps)
            optimizer.zero_grad(set_to_none=True)
            rows = rows.to(device)
            loss = next_token(run(attacked, rows).logits, rows)
            loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            optimizer.step()
            if step + 1 in probes or step + 1 == spec.steps:
                curve.append({**probe(attacked, step + 1), "loss": sum(losses) / len(losses)})
                losses = []
        return curve


def edited(
    model: nn.Module,
    how: Edit,
    seed: int,
    probe: Probe,
    unprotected: Mapping[str, torch.Tensor] | None = None,
) -> Curve:
    """Return what a copy of a model answers after an edit, at step 0."""
    changed = copy.deepcopy(model)
    edit(changed, how, generator(seed, "attack", "edit"), unprotected)
    return [probe(changed, 0)]


def _batches(data: Data, spec: Attack, seed: int) -> Iterator[Rows]:
    """Yield the batch of each step."""
    if spec.data == "fresh":
        if (fresh := data.fresh()) is None:
            found = f"fresh data for {spec.name}, which these data do not have"
            raise InputError("redteam.attacks.data", found, "benign")
        restricted = benign = fresh[0]
    else:
        restricted, benign = data.source("attacker"), data.source("retain")
    shares = {"benign": spec.batch, "mixed": round(spec.benign * spec.batch)}
    first = int(spec.benign * spec.steps) if spec.data == "switch" else 0
    for step in range(spec.steps):
        num = spec.batch if step < first else shares.get(spec.data, 0)
        rng = generator(seed, "attack", step)
        parts = [s.draw(n, rng) for s, n in ((benign, num), (restricted, spec.batch - num)) if n]
        yield parts[0] if len(parts) == 1 else parts[0].joined(parts[1])


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return a model with LoRA adapters in all linear layers but the head, which alone train."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "redteam.attacks.rank", "no library 'peft'", "pip install hansa[language]"
        ) from error
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"
    )
    adapted: nn.Module = peft.inject_adapter_in_model(config, model)
    return adapted
