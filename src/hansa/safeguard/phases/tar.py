"""TAR: adversarial meta-training against fine-tuning (Tamirisa et al., arXiv 2408.00761).

min over theta of  weight E_attack[ L_TR(attack(theta)) ] + retain L_retain(theta)   (equation 1)

The attack is K steps of an attacker who is drawn anew each time. The gradient of the
tamper-resistance loss is taken at points of its trajectory and applied to the parameters before
it: first-order, as FO-MAML is. One trajectory serves for attacks of all lengths up to K.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from hansa.errors import InputError
from hansa.safeguard.adversaries import Adversary, Drawn, draw
from hansa.safeguard.losses import entropy, log_likelihood, next_token, preference
from hansa.safeguard.phases.base import Phase, Rate, Size, Steps, gradients, norm, retain
from hansa.safeguard.rows import Rows
from hansa.safeguard.setup import Advance, Metrics, Setup
from hansa.safeguard.sharding import any_rank
from hansa.safeguard.trajectory import Harm, Loss, attack
from hansa.seeding import derive

_PATIENCE = 20
"""So many first steps in a row whose attacks all diverge are a mistake in the configuration."""


class TAR(Phase):
    """Tamper-resistant training."""

    kind: Literal["tar"] = "tar"
    steps: Steps = 750
    lr: Rate = 2e-5
    warm_up: Steps = 32
    batch_size: Size = 8
    inner_steps: int = Field(64, ge=0, strict=True)
    """K, the attacker's steps; with 0 only what is kept is trained."""
    every: int = Field(4, ge=1, strict=True)
    """Attacker's steps between two points at which the loss is taken."""
    tasks: int = Field(1, ge=1, strict=True)
    """Attackers of one outer step, whose gradients are averaged."""
    attack_batch_size: int = Field(4, ge=1, strict=True)
    """Rows of an attacker's batch."""
    adversaries: tuple[Adversary, ...] = Field(
        (Adversary(weight=2), Adversary(data="switch")), min_length=1
    )
    """The attackers that are drawn from."""
    loss: Literal["entropy", "cross_entropy", "dpo"] = "entropy"
    """L_TR on text that is held out: minus the entropy, minus the cross-entropy, or DPO's loss of
    preferring refusals."""
    weight: float = Field(4.0, ge=0, allow_inf_nan=False)
    """What tamper resistance counts."""
    retain: float = Field(1.0, ge=0, allow_inf_nan=False)
    """What keeping the rest counts."""
    representations: bool = True
    """Whether hidden states of retained text are held."""
    weights: Literal["exponential", "normalised", "uniform", "last"] = "exponential"
    """What the points of a trajectory count: exp(growth (k - (K - 1))), as released; the same, made
    to sum to 1, so that K does not change the whole; the same for each, summing to 1; or all on
    the last, as MLAC does."""
    growth: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Growth of the exponential; by default 4 / K, which is the released 0.0625 at K = 64."""
    clients: bool = False
    """Whether clients play the attackers, one outer step's each on its own text, and send their
    gradients (``data.clients``)."""
    beta: float = Field(0.1, gt=0, allow_inf_nan=False)
    """DPO's beta."""
    with_padding: bool = False
    """Whether padding is part of the means, as in the released code."""

    @model_validator(mode="after")
    def _has_points(self) -> "TAR":
        if 0 < self.inner_steps < self.every and self.weights != "last":
            raise ValueError("every must not be more than inner_steps: no loss would be taken")
        return self

    def points(self) -> dict[int, float]:
        """Return what the loss counts after a step of the attacker, by its number from 0.

        ``weight`` comes on top of that. Steps that are not there have no loss after them.
        """
        last = self.inner_steps - 1
        at = range(self.every - 1, self.inner_steps, self.every)
        if self.weights == "last":
            return {last: 1.0} if self.inner_steps else {}
        growth = 4 / max(1, self.inner_steps) if self.growth is None else self.growth
        found = {k: math.exp(growth * (k - last)) for k in at}
        if self.weights == "uniform":
            found = dict.fromkeys(at, 1.0)
        if self.weights != "exponential":
            total = sum(found.values())
            found = {k: each / total for k, each in found.items()}
        return found

    def step_cost(self) -> float:
        """Return the plain steps of an outer step, of batches of ``batch_size`` rows."""
        rows = self.inner_steps * self.attack_batch_size + len(self.points()) * self.batch_size
        kept = 1 + self.representations / 3
        return self.tasks * rows / self.batch_size + kept

    def resistance(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return the tamper-resistance loss of text, from logits [n, T, V]; not that of pairs."""
        if self.loss == "entropy":
            return -entropy(logits, rows, self.with_padding)
        return -next_token(logits, rows)

    def begin(self, setup: Setup) -> Advance:
        """Return an outer step."""
        if self.loss == "dpo":
            setup.data.preferences("held_out")
        if setup.ranks > 1 and any(each.rank for each in self.adversaries):
            raise InputError("phases.adversaries.rank", "adapters on several ranks", "none there")
        if self.clients and setup.collect is None:
            raise InputError("phases.clients", "true without clients", "data.clients")
        failed: list[int] = []

        def advance(step: int) -> Metrics:
            found, metrics = self._tampered(setup, step)
            if metrics.get("diverged"):
                failed.append(step)
                if failed == list(range(_PATIENCE)):
                    raise InputError(
                        "phases.adversaries.lrs",
                        f"rates with which the attacks of the first {_PATIENCE} steps diverged",
                        "smaller rates",
                    )
            metrics |= retain(
                setup,
                self.batch_size,
                step,
                weight=self.retain,
                representations=self.representations,
                with_padding=self.with_padding,
            )
            metrics["retain_norm"] = norm(gradients(setup))
            if not metrics.get("diverged"):
                metrics["tamper_norm"] = norm(found)
                for parameter, gradient in zip(setup.params, found, strict=False):
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad.add_(gradient)
                    )
            return metrics

        return advance

    def _tampered(self, setup: Setup, step: int) -> tuple[list[torch.Tensor], Metrics]:
        """Return the gradients of one outer step's attacks, and what they did.

        Attacks that diverge are normal late in training. Their gradients are left out, all of the
        step's, and told; the attackers stay as they are.
        """
        points = {k: self.weight * each / self.tasks for k, each in self.points().items()}
        if not points:
            return [], {}
        if self.clients and setup.collect is not None:
            return setup.collect(self, setup.model, step)
        found = [torch.zeros_like(p) for p in setup.params]
        metrics: Metrics = {}
        for task in range(self.tasks):
            seed = derive(setup.seed, "safeguard", "attacker", *setup.purpose, step, task)
            drawn = draw(self.adversaries, self.inner_steps, seed)
            told = attack(
                setup.model,
                drawn,
                self._harm(setup, drawn, step, task),
                self._resist(setup, step, task),
                points,
                found,
                setup.rng("adapters", step, task),
            )
            number = self.adversaries.index(drawn.adversary)
            # The last of several tasks is the one that is told.
            metrics |= {"adversary": number, "adversary_lr": drawn.lr, **told}
        is_finite = all(math.isfinite(value) for value in metrics.values())
        # Of several ranks each saw rows of its own, and all must leave the step out or none.
        diverged = any_rank(not is_finite or "diverged" in metrics, setup.ranks)
        return found, {**metrics, "diverged": 1.0} if diverged else metrics

    def _harm(self, setup: Setup, drawn: Drawn, *purpose: int) -> Harm:
        """Return what an attacker descends: the loss of its text, or of answers refused."""
        size = self.attack_batch_size

        def harm(k: int) -> torch.Tensor:
            if k < drawn.benign:
                rows = setup.rows("retain", size, "attack", *purpose, k)
            elif self.loss == "dpo":
                rows = setup.pairs("adversary", size, "attack", *purpose, k).rejected
            else:
                rows = setup.rows("adversary", size, "attack", *purpose, k)
            return next_token(setup.run(rows).logits, rows)

        return harm

    def _resist(self, setup: Setup, *purpose: int) -> Loss:
        """Return the tamper-resistance loss of one trajectory, on one batch that is held out."""
        size = self.batch_size
        if self.loss == "dpo":
            pairs = setup.pairs("held_out", size, "resist", *purpose)
            both = (pairs.chosen, pairs.rejected)
            reference = [log_likelihood(setup.refer(rows).logits, rows) for rows in both]

            def prefer() -> torch.Tensor:
                chosen, rejected = (log_likelihood(setup.run(rows).logits, rows) for rows in both)
                return preference(chosen, rejected, (reference[0], reference[1]), self.beta)

            return prefer
        rows = setup.rows("held_out", size, "resist", *purpose)

        def resist() -> torch.Tensor:
            return self.resistance(setup.run(rows).logits, rows)

        return resist
