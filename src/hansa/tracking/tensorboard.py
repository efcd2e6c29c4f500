"""TensorBoard: event files in the run's folder, ``tensorboard --logdir RUNS`` shows them."""

from collections import defaultdict
from collections.abc import Mapping, Set

from hansa.runs import Run
from hansa.tracking.figures import ROUND


class TensorBoard:
    """Event files of a run, in its folder ``tensorboard``.

    Args:
        run: the run, some rounds of which may be there already.
    """

    name = "tensorboard"

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        self._steps = _read(str(folder)) if folder.is_dir() else defaultdict(set)
        held = self._steps[ROUND]
        # What a kill left of a round is taken back by readers, since that round is written again.
        purge = max(held) + 1 if held else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        if not held:
            self._writer.add_text("configuration", f"```toml\n{run.config.as_toml()}```")

    def steps(self, key: str) -> Set[int]:
        """Return the steps that a number of this name is there for."""
        return self._steps[key]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
            self._steps[name].add(step)
        self._writer.flush()

    def close(self, done: bool) -> None:
        """End the file."""
        self._writer.close()


def _read(folder: str) -> defaultdict[str, set[int]]:
    """Return name -> steps, of all files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(folder, {"scalars": 0}).Reload()
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name in held.Tags()["scalars"]:
        found[name] = {event.step for event in held.Scalars(name)}
    return found
