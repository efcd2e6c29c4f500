"""Energy of a processor's packages by RAPL, where Linux shows its counters.

A counter tells what the whole package used, other processes included, and moves about once a
millisecond. So one model runs alone for a while, and the energy is divided by its runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_SECONDS = 0.2  # some 200 updates of the counter


@dataclass(frozen=True)
class Meter:
    """The counters of all packages.

    Attributes:
        counters: (file of the microjoules so far, value at which it starts again from 0).
    """

    counters: tuple[tuple[Path, int], ...]

    @classmethod
    def open(cls, folder: Path = POWERCAP) -> "Meter | None":
        """Return the meter of this machine, None where it has none that may be read."""
        found = []
        for each in sorted(folder.glob("intel-rapl:*")):
            if each.name.count(":") > 1:
                continue  # a part of a package, which its package counts
            try:
                int((each / "energy_uj").read_text())
                found.append((each / "energy_uj", int((each / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):
                return None
        return cls(tuple(found)) if found else None

    def read(self) -> list[int]:
        """Return the microjoules of each package since some moment."""
        return [int(file.read_text()) for file, _ in self.counters]

    def joules_per_run(self, run: Callable[[], object], wall: Callable[[], float]) -> float:
        """Run a model for 0.2 seconds and return the energy of one run in joules."""
        before, begun, runs = self.read(), wall(), 0
        while not runs or wall() - begun < _SECONDS:
            run()
            runs += 1
        used = 0
        for old, new, (_, largest) in zip(before, self.read(), self.counters, strict=True):
            used += new - old if new >= old else new + largest - old
        return used / 1e6 / runs
