"""Profiles by a clock that only models move: turns, statistics, windows that do not count."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from hansa.errors import InputError
from hansa.search import profile as profiles
from hansa.search.profile import (
    KEY,
    Clock,
    Latency,
    Meter,
    ProfileOptions,
    agreement,
    default_device,
    difference,
    profile,
    rank_correlation,
)
from hansa.search.profile.rounds import Times, take_turns


class Machine:
    """Time stands still but for runs: model m takes ``seconds(m, run)``, half of it waiting."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.seconds, self.now = seconds, 0.0
        self.log: list[int] = []
        self.counts: Counter[int] = Counter()
        self.threads: set[int] = set()
        self.clock = Clock(wall=lambda: 2 * self.now, cpu=lambda: self.now)

    def runner(self, number: int) -> Callable[[], None]:
        def run() -> None:
            self.now += self.seconds(number, self.counts[number])
            self.counts[number] += 1
            self.log.append(number)
            self.threads.add(torch.get_num_threads())

        return run

    def models(self, numbers: range) -> list[tuple[int, Callable[[], nn.Module]]]:
        return [(number, lambda number=number: _Fake(self.runner(number))) for number in numbers]


class _Fake(nn.Module):
    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.run = run

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.run()
        return inputs


def steady(number: int, run: int) -> float:
    """Each model has its own time, and runs differ a little."""
    return (1 + number) * (1 + 0.001 * (run % 7))


def options(**changed: object) -> ProfileOptions:
    return ProfileOptions(**{"device": "box", "batches": (1,), "rounds": 40, **changed})


def measured(machine: Machine, num: int = 10, **changed: object) -> list[Latency]:
    own = options(**changed)
    return profile(machine.models(range(num)), (2,), own, clock=machine.clock)


def test_models_take_turns_in_orders_drawn_anew() -> None:
    machine = Machine(steady)
    runners = [machine.runner(number) for number in range(6)]
    take_turns(runners, 40, 2, machine.clock, 0, "here")
    assert machine.log[:12] == [number for number in range(6) for _ in range(2)]
    rounds = np.array(machine.log[12:]).reshape(40, 6)
    assert (np.sort(rounds) == np.arange(6)).all()  # each once a round
    assert len({tuple(each) for each in rounds}) > 35
    again = Machine(steady)
    take_turns([again.runner(n) for n in range(6)], 40, 2, again.clock, 0, "here")
    assert again.log == machine.log
    take_turns(runners, 40, 2, machine.clock, 0, "there")
    assert machine.log[252 + 12 :] != again.log[12:]


def test_times_are_those_of_their_model_and_round() -> None:
    machine = Machine(lambda number, run: 10.0**number * (run + 1))
    times = take_turns([machine.runner(n) for n in range(3)], 4, 1, machine.clock, 0)
    expected = np.outer([2, 3, 4, 5], [1, 10, 100])  # the first run was the warm-up
    assert times.cpu == pytest.approx(expected)
    assert times.wall == pytest.approx(2 * expected)
    assert times.repeats() == pytest.approx(np.array([[2, 20, 200], [3, 30, 300]]))


def test_repeats_are_even_and_odd_rounds() -> None:
    cpu = np.array([[5.0], [1.0], [4.0], [2.0]])
    assert Times(cpu, cpu).repeats().tolist() == [[4], [1]]


def test_statistics_by_hand() -> None:
    """Run k of a model takes 4 + k seconds of work."""
    (row,) = measured(Machine(lambda _, run: 4.0 + run), 1, warmup=1, retries=0, force=True)
    # the anchor is the model itself, so the two share the runs 6 to 85: one each a round
    assert row.cpu_min in (6, 7)
    assert row.runs == 40
    assert row.wall_min == 2 * row.cpu_min
    assert row.wall_median == pytest.approx(2 * row.cpu_median)
    assert 80 > row.cpu_p90 > row.cpu_median > row.cpu_min
    machine = Machine(lambda number, run: 100.0 if number else 4.0 + run)
    row = measured(machine, 2, warmup=1, retries=0, force=True)[1]
    assert (row.cpu_min, row.cpu_median, row.cpu_p90) == (100, 100, 100)


def test_rows_carry_key_and_circumstances() -> None:
    machine = Machine(steady)
    rows = measured(machine, 3, batches=(4, 1, 4), threads=1, window=2)
    assert [(row.batch, row.model) for row in rows] == [(b, m) for b in (4, 1) for m in range(3)]
    assert rows[4].key == (1, "box", "torch", 1, 1, "float32")
    assert KEY == ("model", "device", "backend", "batch", "threads", "dtype")
    assert len({row.key for row in rows}) == 6
    assert all(row.usable and row.joules is None and row.anchor == 0 for row in rows)
    assert all(row.torch == row.backend_version == torch.__version__ for row in rows)
    assert [Latency.of(row.row()) for row in rows] == rows
    assert rows[0].cpu_min == pytest.approx(1, rel=0.01)
    assert rows[2].cpu_min == pytest.approx(3, rel=0.01)


def test_threads_are_set_and_given_back() -> None:
    before, machine = torch.get_num_threads(), Machine(steady)
    measured(machine, 2, threads=before + 1)
    assert machine.threads == {before + 1}
    assert torch.get_num_threads() == before


def test_window_that_drifts_is_measured_again() -> None:
    """All is a tenth slower in the first trial of the second window."""
    trial = 3 + 40

    def seconds(number: int, run: int) -> float:
        slow = (number >= 8 and run < trial) or (number == 0 and 2 * trial <= run < 3 * trial)
        return steady(number, run) * (1.1 if slow else 1)

    machine = Machine(seconds)
    rows = measured(machine, 16, window=8)
    assert all(row.usable and abs(row.drift) < 0.01 for row in rows)
    assert machine.log.count(15) == 2 * trial
    assert machine.log.count(7) == trial
    assert rows[15].cpu_min == pytest.approx(16, rel=0.01)


def test_machine_that_stays_slow_is_refused_or_marked() -> None:
    machine = Machine(lambda number, run: steady(number, run) * (1.1 if run > 85 else 1))
    slower = Machine(
        lambda number, run: steady(number, run) * (1.1 if number >= 8 or run >= 86 else 1)
    )
    kept: list[list[Latency]] = []
    with pytest.raises(InputError, match=r"model 0 \+10% since the first window, over 5%.*--force"):
        profile(
            slower.models(range(16)), (2,), options(window=8), keep=kept.append, clock=slower.clock
        )
    assert [len(rows) for rows in kept] == [8]
    assert slower.log.count(15) == 3 * 43
    rows = measured(machine, 16, window=8, force=True)
    assert [row.usable for row in rows] == [True] * 8 + [False] * 8
    assert rows[15].drift == pytest.approx(0.1, abs=0.01)


def noisy(number: int, run: int) -> float:
    """Times that repeat in neither half: the least of each is drawn."""
    half = np.random.default_rng([number, run % 2]).uniform(1, 2)
    return 1.0 if number == 0 else float(half)


def test_repeats_that_disagree_are_refused_or_marked() -> None:
    with pytest.raises(InputError, match=r"repeats with a rank correlation of .*, under 0.9"):
        measured(Machine(noisy), 12, retries=0)
    rows = measured(Machine(noisy), 12, retries=0, force=True)
    assert not any(row.usable for row in rows)
    assert agreement(rows) < 0.9
    assert all(row.usable for row in measured(Machine(noisy), 12, retries=0, min_agreement=-1.0))


def test_few_models_are_judged_by_how_far_repeats_lie_apart() -> None:
    rows = measured(Machine(steady), 3)
    assert agreement(rows) is None
    assert difference(rows) < 0.01
    with pytest.raises(InputError, match=r"repeats \d+% apart, over 5%"):
        measured(Machine(noisy), 3, retries=0)


def test_resumed_profile_measures_what_is_missing() -> None:
    kept: list[list[Latency]] = []
    first = Machine(steady)

    def stop(rows: list[Latency]) -> None:
        kept.append(rows)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(first.models(range(24)), (2,), options(window=8), keep=stop, clock=first.clock)
    done = [row for rows in kept for row in rows]
    assert [row.model for row in done] == list(range(16))
    second, watched = Machine(steady), []
    rows = profile(
        second.models(range(24)),
        (2,),
        options(window=8),
        done=done,
        watch=lambda *each: watched.append(each),
        clock=second.clock,
    )
    assert rows[:16] == done
    assert [row.model for row in rows] == list(range(24))
    assert set(second.log) == {0, *range(16, 24)}  # the anchor and what was missing
    assert watched == [(16, 24), (24, 24)]
    elsewhere = Machine(steady)
    profile(elsewhere.models(range(2)), (2,), options(device="other"), done, clock=elsewhere.clock)
    assert set(elsewhere.log) == {0, 1}


def test_resumed_profile_keeps_the_first_anchor() -> None:
    done = measured(Machine(steady), 8)
    slower = Machine(lambda number, run: 1.2 * steady(number, run))
    with pytest.raises(InputError, match=r"\+20% since the first window"):
        profile(slower.models(range(16)), (2,), options(), done=done, clock=slower.clock)


def test_energy_of_one_run(tmp_path: Path) -> None:
    """A run takes a tenth of a second of the wall and 3 J; the counter starts again at 50 J."""
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for each in (package, part):
        each.mkdir()
        (each / "energy_uj").write_text("48000000")
        (each / "max_energy_range_uj").write_text("50000000")
    machine = Machine(lambda *_: 0.05)
    step = machine.runner(0)

    def run() -> None:
        step()
        used = int((package / "energy_uj").read_text()) + 3_000_000
        (package / "energy_uj").write_text(str(used % 50_000_000))

    meter = Meter.open(tmp_path)
    assert len(meter.counters) == 1
    assert meter.joules_per_run(run, machine.clock.wall) == pytest.approx(3)
    assert Meter.open(tmp_path / "nowhere") is None
    rows = profile(machine.models(range(2)), (2,), options(), clock=machine.clock, meter=meter)
    assert [row.joules for row in rows] == [0, 0]  # nobody moves the counter here


def test_device_is_named_by_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model name\t: Intel(R) Core(TM) i7-7820X CPU @ 3.60GHz\n"
    monkeypatch.setattr("hansa.search.profile.options.processor", lambda: name)
    assert default_device() == ProfileOptions().device_name == "intel-core-i7-7820x-cpu-3.60ghz"
    monkeypatch.setattr("hansa.search.profile.options.processor", lambda: "")
    assert default_device() == "cpu"


def test_rank_correlation_is_that_of_others() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(6, size=(2, 30)).astype(float)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_modules_run_in_evaluation_mode_and_dtype() -> None:
    seen: list[tuple[bool, torch.dtype, torch.Size]] = []

    class Looks(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert torch.is_inference_mode_enabled()
            seen.append((self.training, inputs.dtype, inputs.shape))
            return super().forward(inputs)

    machine = Machine(steady)
    models = [(7, lambda: nn.Sequential(Looks(2, 3), _Fake(machine.runner(7))))]
    own = options(dtype="bfloat16", batches=(5,))
    (row,) = profile(models, (2,), own, clock=machine.clock)
    assert set(seen) == {(False, torch.bfloat16, torch.Size([5, 2]))}
    assert row.dtype == "bfloat16"


def test_nothing_to_measure_is_nothing() -> None:
    assert profiles.profile([], (2,), options()) == []
