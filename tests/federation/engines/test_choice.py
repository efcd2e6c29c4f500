"""What an engine chooses, and what it says about it."""

import json
import logging
import sys
import types

import pytest
import torch
from torch import nn

from hansa import Federation
from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation import compiled
from hansa.federation.engines import choice
from hansa.federation.engines.choice import Chooser
from hansa.federation.engines.plan import EngineOptions, Plan
from hansa.federation.methods import FedAvg, FedSelect
from hansa.federation.optimizer import Training
from hansa.federation.tree import Tree
from support import clients, engine, everything, net, run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "hansa")


def chooser(options: EngineOptions, rounds: int = 100, **about: object) -> Chooser:
    about.setdefault("data", clients(6))
    return Chooser(engine(FedAvg(), **about), options, rounds)  # type: ignore[arg-type]


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let a trial of a stack take so long per step, in place of what it takes."""
    tried = []

    def timed(small: choice.LocalEngine) -> float:
        tried.append(small.plan.stack)
        return seconds[small.plan.stack]

    monkeypatch.setattr(choice, "_timed", timed)
    return tried


def test_a_short_run_goes_client_by_client_without_a_trial(caplog, monkeypatch) -> None:
    tried = pretend(monkeypatch, {})
    assert chooser(EngineOptions(), rounds=2).choose() == Plan()
    assert tried == []
    assert caplog.messages == ["engine: sequential (a short run)"]


def test_the_fastest_stack_is_taken_and_remembered(caplog, monkeypatch) -> None:
    tried = pretend(monkeypatch, {1: 1.0, 2: 0.9, 5: 0.5, 6: 0.7})
    options = EngineOptions(workers=1)
    assert chooser(options).choose() == Plan("stacked", 5)
    assert tried == [1, 2, 5, 6]  # at most the cohort
    assert "trial" in caplog.messages[0]
    assert "5: 500.00" in caplog.messages[0]
    assert chooser(options).choose() == Plan("stacked", 5)
    assert tried == [1, 2, 5, 6]
    assert "in a trial before" in caplog.messages[1]
    # Another model is another matter.
    chooser(options, model=nn.Linear(4, 3)).choose()
    assert tried == [1, 2, 5, 6] * 2


def test_single_clients_win_where_they_are_faster(monkeypatch) -> None:
    pretend(monkeypatch, {1: 0.4, 2: 0.9, 5: 0.5, 6: 0.7})
    assert chooser(EngineOptions(workers=1)).choose() == Plan()


def test_a_damaged_memory_of_trials_is_measured_anew(monkeypatch) -> None:
    tried = pretend(monkeypatch, {1: 1.0, 2: 0.9, 5: 0.5, 6: 0.7})
    first = chooser(EngineOptions(workers=1))
    first.choose()
    for text in ("", "[]", "{}", '{"stack": null, "seconds": 1}'):
        first._place().write_text(text)
        assert chooser(EngineOptions(workers=1)).choose() == Plan("stacked", 5)
    assert len(tried) == 4 * 5
    assert json.loads(first._place().read_text()) == {"stack": 5, "seconds": 0.5}


def test_a_limit_of_memory_ends_the_trial(monkeypatch) -> None:
    tried = pretend(monkeypatch, {1: 1.0, 2: 0.9, 5: 0.5, 6: 0.1})
    peaks = iter([0, 0, 200 * 2**20])
    monkeypatch.setattr(choice, "_peak", lambda device: next(peaks))
    options = EngineOptions(workers=1, stack_memory_mb=500)
    assert chooser(options).choose() == Plan("stacked", 5)
    assert tried == [1, 2, 5]


def test_a_long_run_takes_a_process_per_core(monkeypatch) -> None:
    monkeypatch.setattr(choice.os, "sched_getaffinity", lambda pid: range(4))
    pretend(monkeypatch, {1: 1.0, 2: 0.5})
    monkeypatch.setattr(choice, "_may_start_processes", lambda: True)
    assert chooser(EngineOptions()).choose() == Plan("stacked", 2, workers=4)
    # Three leaves can occupy three processes.
    assert chooser(EngineOptions(), data=clients(3)).choose().workers == 3
    monkeypatch.setattr(choice, "_may_start_processes", lambda: False)
    pretend(monkeypatch, {1: 1.0, 2: 0.9, 5: 0.5, 6: 0.7})
    assert chooser(EngineOptions(), model=net(nn.Tanh())).choose().workers == 1


def test_a_script_without_a_guard_starts_no_processes(tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__file__=str(script)))
    monkeypatch.setattr(choice.multiprocessing, "parent_process", lambda: None)
    script.write_text("federation.run(1000)\n")
    assert not choice._may_start_processes()
    script.write_text("if __name__ == '__main__':\n    federation.run(1000)\n")
    assert choice._may_start_processes()
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace())  # a notebook
    assert not choice._may_start_processes()


def test_a_model_that_cannot_be_stacked_is_named_in_one_line(caplog) -> None:
    options = EngineOptions(kind="stacked", workers=1)
    assert chooser(options, model=net(nn.Dropout(0.5))).choose() == Plan()
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "clients are trained one by one: the model draws random numbers while it trains"
    ]


def test_batchnorm_is_not_filled_up() -> None:
    options = EngineOptions(kind="stacked", stack=3, workers=1)
    training = Training(lr=0.1, batch_size=4)
    data = clients(6, per_client=8)
    made = chooser(options, model=net(nn.BatchNorm1d(6)), data=data, training=training)
    assert made.choose() == Plan("stacked", 3, pads=False)


def test_without_a_compiler_stacks_are_not_compiled(caplog, monkeypatch) -> None:
    monkeypatch.setattr(choice, "has_compiler", lambda: False)
    plan = chooser(EngineOptions(kind="compiled", stack=3, workers=1)).choose()
    assert plan == Plan("stacked", 3)
    assert "there is no C++ compiler, so that steps are not compiled" in caplog.messages


class Arrived:
    """Programs that are there, or are not yet."""

    def __init__(self, there: bool) -> None:
        self.there, self.pending = there, ()

    def arrived(self) -> bool:
        return self.there


@pytest.mark.parametrize(("compiled", "changes"), [(0.1, True), (0.49, False)])
def test_a_run_changes_over_to_a_compiled_step_that_is_faster(
    compiled: float, changes: bool, monkeypatch, caplog
) -> None:
    pretend(monkeypatch, {1: 1.0, 2: 0.9, 5: 0.5, 6: 0.7})
    monkeypatch.setattr(choice, "has_compiler", lambda: True)
    monkeypatch.setattr(choice, "POLL", 0.0)
    made, programs = chooser(EngineOptions(workers=1)), Arrived(False)
    made.choose()

    def begin(plan: Plan) -> tuple[object, Arrived]:
        return made._small(Plan("stacked", 5), 5), programs

    monkeypatch.setattr(made, "_begin_compiling", begin)
    assert made.better() is None
    programs.there = True
    pretend(monkeypatch, {5: compiled})
    better = made.better()
    assert (better is not None) is changes
    assert ("times as fast" in caplog.messages[-1]) is changes
    assert made.better() is None  # once is enough


def test_a_resumed_run_goes_on_as_it_began(caplog) -> None:
    made = chooser(EngineOptions(workers=3))
    assert made.again(Plan("stacked", 7, workers=2)) == Plan("stacked", 7, workers=3)
    assert made.better() is None


def test_a_trial_leaves_no_trace_in_the_run() -> None:
    data = clients(6)
    plain = engine(FedSelect(), data=data)
    expected = everything(plain, run(plain))
    tried = engine(FedSelect(), data=data)
    made = Chooser(tried, EngineOptions(workers=1), 10_000)
    made.choose()
    tried.plan = Plan()
    assert everything(tried, run(tried)) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda:7"}, r"engine\.device: found 'cuda:7', where PyTorch sees \d+ CUDA"),
        ({"device": "tpu"}, r"engine\.device: found 'tpu'; allowed: cpu or cuda"),
        ({"device": "meta"}, r"engine\.device: found 'meta'; allowed: cpu or cuda"),
        ({"kind": "sequential", "precision": "bfloat16"}, r"engine\.precision: found 'bfloat16'"),
        ({"kind": "sequential", "stack": 4}, r"engine\.stack: found 4 with kind 'sequential'"),
    ],
)
def test_what_a_machine_does_not_have_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Federation(net(), clients(), FedAvg(), engine=EngineOptions.model_validate(options))


def test_a_model_that_no_process_finds_is_named_before_the_run() -> None:
    class Hidden(nn.Linear):
        pass

    with pytest.raises(InputError, match=r"engine\.workers"):
        Federation(Hidden(4, 3), clients(), FedAvg(), engine=EngineOptions(workers=2))


def test_stacks_are_no_larger_than_what_stands_below_one_node(monkeypatch) -> None:
    tried = pretend(monkeypatch, {1: 1.0, 2: 0.5})
    data = clients(6)
    made = chooser(EngineOptions(workers=1), data=data, tree=Tree.grouped(data, 3))
    assert made.choose() == Plan("stacked", 2)
    assert tried == [1, 2]


def test_one_client_is_no_stack(monkeypatch, caplog) -> None:
    tried = pretend(monkeypatch, {1: 1.0})
    assert chooser(EngineOptions(workers=1), data=clients(1), rounds=1000).choose() == Plan()
    assert tried == []
    assert "no two clients to stack" in caplog.text


def test_a_step_that_failed_to_compile_is_not_waited_for(monkeypatch) -> None:
    def fails(traced: object, path: object, wait: bool) -> bool:
        if not seen:
            seen.append(path)
            return False  # under way
        raise compiled.CompileError("no")

    seen: list[object] = []
    monkeypatch.setattr(compiled, "make", fails)
    other = engine(FedAvg(), plan=Plan("compiled", 3, wait=False))
    run(other, 2)
    assert other.stack.programs is not None
    assert other.stack.programs.pending == {}


def test_bfloat16_computes_in_fewer_digits_and_keeps_weights_whole() -> None:
    exact = engine(FedAvg(), plan=Plan("stacked", 3))
    rough = engine(FedAvg(), plan=Plan("stacked", 3, precision="bfloat16"))
    run(exact), run(rough)
    for name, p in exact.state().group("model").items():
        other = rough.state().group("model")[name]
        assert other.dtype is torch.float32
        assert not torch.equal(other, p)
        torch.testing.assert_close(other, p, rtol=0, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_run_of_the_cpu() -> None:
    data: dict[str, Client] = clients(5)
    here = engine(FedSelect(), data=data, plan=Plan("stacked", 4))
    there = engine(FedSelect(), data=data, plan=Plan("stacked", 4, device="cuda"))
    run(here), run(there)
    for name, p in here.state().group("model").items():
        torch.testing.assert_close(there.state().group("model")[name], p, rtol=1e-3, atol=1e-4)
