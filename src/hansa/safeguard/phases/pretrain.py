"""Pre-training on the made-up world: the model that a safeguard is put into."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hansa.errors import InputError
from hansa.safeguard.losses import next_token
from hansa.safeguard.phases.base import Phase, Rate, Share, Size, Steps
from hansa.safeguard.setup import Advance, Metrics, Setup
from hansa.safeguard.world import Table, World


class Pretrain(Phase):
    """Learns whole tables of the made-up world by heart."""

    kind: Literal["pretrain"] = "pretrain"
    tables: tuple[Table, ...] = Field(("retained", "restricted"), min_length=1)
    """What is learned; without the restricted table it gives the control that never knew it."""
    steps: Steps = 900
    lr: Rate = 2e-3
    warm_up: Steps = 100
    lr_end: Share = 0.02
    batch_size: Size = 64

    is_pretraining: ClassVar[bool] = True

    @model_validator(mode="after")
    def _deals(self) -> "Pretrain":
        if self.batch_size % len(self.tables):
            raise ValueError("a batch_size that can be dealt to the tables evenly")
        return self

    def begin(self, setup: Setup) -> Advance:
        """Return a step on a batch that is dealt to the tables evenly."""
        if not isinstance(setup.data, World):
            raise InputError("phases.kind", "'pretrain' on texts", "model.path, a trained model")
        sources = [setup.data.known(table) for table in self.tables]

        def advance(step: int) -> Metrics:
            rng = setup.rng("pretrain", step)
            size = self.batch_size // len(sources)
            rows = sources[0].draw(size, rng)
            for source in sources[1:]:
                rows = rows.joined(source.draw(size, rng))
            rows = rows[slice(setup.rank, None, setup.ranks)].to(setup.device)
            loss = next_token(setup.run(rows).logits, rows)
            loss.backward()
            return {"loss": loss.item()}

        return advance

    def step_cost(self) -> float:
        """Return 1."""
        return 1.0
