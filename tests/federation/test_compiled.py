"""Steps as graphs, and as programs of this machine."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stack import assert_equal, ragged
from torch import nn
from torch.nn import functional as F

from hansa.federation import compiled
from hansa.federation.compiled import (
    CompileError,
    Programs,
    StepGrowsError,
    fill,
    has_compiler,
    masked,
    trace,
)
from hansa.federation.engines.plan import Plan
from hansa.federation.methods import FedAvg, FedSelect, Method
from hansa.federation.methods.base import Work, begin_work
from hansa.federation.optimizer import Training
from hansa.federation.stack import _stacked
from hansa.models.task import Batch
from support import CLASSES, FEATURES, engine, net, run

compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")


def stacked_step(
    method: Method, model: nn.Module, training: Training, size: int = 3
) -> tuple[object, Work]:
    """The stacked step of a method, and work for it: clients with weights of their own."""
    federation = engine(method, model=model, training=training, plan=Plan("stacked", size))
    federation.use(federation.plan)
    setup = federation.stack.prepare(next(iter(federation.clients.values())))
    works = []
    for k in range(size):
        torch.manual_seed(k)
        params = {n: torch.randn_like(p) for n, p in setup.task.params.items()}
        works.append(begin_work(setup, params, setup.task.buffers))
    return masked(lambda work, batch: method.step(setup, work, batch, "train")), _stacked(works)


def batch_of(size: int, width: int, shape: tuple[int, ...] = (FEATURES,)) -> Batch:
    rng = torch.Generator().manual_seed(9)
    inputs = torch.randn(size, width, *shape, generator=rng)
    return inputs, torch.randint(0, CLASSES, (size, width), generator=rng)


@given(
    num=st.integers(1, 4), given_=st.integers(1, 5), more=st.integers(0, 3), wider=st.integers(0, 3)
)
def test_filling_up_adds_what_does_not_count(num: int, given_: int, more: int, wider: int) -> None:
    inputs, labels = batch_of(num, given_)
    filled = fill((inputs, labels), num + more, given_ + wider)
    assert filled[0].shape == (num + more, given_ + wider, FEATURES)
    assert torch.equal(filled[0][:num, :given_], inputs)
    assert torch.equal(filled[1][:num, :given_], labels)
    assert filled[2][:num].sum() == num * given_
    assert filled[2][:num, :given_].all()
    assert filled[3].tolist() == [True] * num + [False] * more


def test_a_filled_batch_steps_as_the_batch_itself_and_idle_clients_stay() -> None:
    step, work = stacked_step(FedAvg(), net(), Training(lr=0.1, momentum=0.9))
    inputs, labels = batch_of(2, 3)
    after = step(work, fill((inputs, labels), 3, 5))  # type: ignore[operator]
    active = torch.ones(3, dtype=torch.bool)
    # Each client alone, with its own batch and nothing filled up.
    plain = step(  # type: ignore[operator]
        work, (*(torch.cat([t, t[:1]]) for t in (inputs, labels)), torch.ones(3, 3), active)
    )
    for name, p in after["params"].items():
        torch.testing.assert_close(p[:2], plain["params"][name][:2])
        assert torch.equal(p[2], work["params"][name][2])
        assert torch.equal(after["memory.momentum"][name][2], torch.zeros_like(p[2]))
    assert after["metrics"]["count"].tolist() == [3.0, 3.0, 0.0]


def test_a_graph_does_what_the_step_does() -> None:
    step, work = stacked_step(FedSelect(), net(), Training(lr=0.1, momentum=0.9, clip_norm=0.5))
    work["mask"] = {n: torch.rand(p.shape) < 0.5 for n, p in work["params"].items()}
    filled = fill(batch_of(2, 3), 3, 4)
    traced = trace(step, work, filled)  # type: ignore[arg-type]
    after = step(work, filled)  # type: ignore[operator]
    told = traced.graph(*traced.inputs)
    for place, tensor in zip(traced.changed, told, strict=True):
        group, name = traced.names[place]
        torch.testing.assert_close(tensor, after[group][name])
    assert "mask" not in {traced.names[place][0] for place in traced.changed}


def test_the_first_step_of_adam_adds_to_its_work() -> None:
    step, work = stacked_step(FedAvg(), net(), Training(optimizer="adam"))
    filled = fill(batch_of(3, 4), 3, 4)
    with pytest.raises(StepGrowsError):
        trace(step, work, filled)  # type: ignore[arg-type]
    assert trace(step, step(work, filled), filled).changed  # type: ignore[arg-type, operator]


def test_a_key_tells_graphs_shapes_and_constants_apart() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net, self.scale = net(), torch.full((CLASSES,), scale)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs) * self.scale

    def key(model: nn.Module, lr: float = 0.1, width: int = 4) -> str:
        step, work = stacked_step(FedAvg(), model, Training(lr=lr))
        return trace(step, work, fill(batch_of(3, width), 3, width)).key  # type: ignore[arg-type]

    assert key(Scaled(1.0)) == key(Scaled(1.0))
    keys = {key(Scaled(1.0)), key(Scaled(2.0)), key(Scaled(1.0), lr=0.2), key(Scaled(1.0), width=5)}
    assert len(keys) == 4


def test_a_model_with_large_frozen_parts_is_not_compiled(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "MAX_CONSTANTS", 8)
    model = net()
    model.body.requires_grad_(False)
    step, work = stacked_step(FedAvg(), model, Training())
    with pytest.raises(CompileError, match="frozen weights"):
        trace(step, work, fill(batch_of(3, 4), 3, 4))  # type: ignore[arg-type]


@given(
    high=st.integers(1, 3),
    wide=st.integers(1, 3),
    rows=st.integers(3, 8),
    columns=st.integers(3, 8),
    seed=st.integers(0, 99),
)
def test_pooling_by_slices_is_pooling(
    high: int, wide: int, rows: int, columns: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, rows, columns, generator=rng, requires_grad=True)
    with compiled._Slices():
        sliced = F.max_pool2d(maps, (high, wide))
    native = F.max_pool2d(maps, (high, wide))
    assert torch.equal(sliced, native)
    weights = torch.randn(native.shape, generator=rng)
    assert torch.equal(
        *(torch.autograd.grad((p * weights).sum(), maps)[0] for p in (sliced, native))
    )


@pytest.mark.parametrize(
    "options", [{"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"dilation": 2}]
)
def test_other_pooling_is_left_alone(options: dict[str, object]) -> None:
    maps = torch.randn(2, 3, 7, 7)
    with compiled._Slices():
        assert torch.equal(F.max_pool2d(maps, 2, **options), F.max_pool2d(maps, 2, **options))
        assert len(F.max_pool2d(maps, 2, return_indices=True)) == 2


@compiler
def test_a_compiled_run_is_the_sequential_one(caplog) -> None:
    training = Training(lr=0.1, batch_size=4, epochs=2, momentum=0.9)
    data = ragged(dtype=torch.float32)
    one = engine(FedAvg(), data=data, training=training)
    other = engine(FedAvg(), data=data, training=training, plan=Plan("compiled", 4))
    first, second = run(one), run(other)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert_equal(one, other, 1e-5)
    for a, b in zip(first, second, strict=True):
        assert a.samples == b.samples
    programs = other.stack.programs
    assert programs is not None
    assert [program is not None for program in programs._known.values()] == [True]

    # The next run finds the program, and does not wait for it.
    again = engine(FedAvg(), data=data, training=training, plan=Plan("compiled", 4, wait=False))
    run(again, 1)
    assert again.stack.programs is not None
    assert any(again.stack.programs._known.values())


def test_a_compiler_that_fails_is_said_once_and_changes_nothing(
    caplog, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    data = ragged(dtype=torch.float32)
    one = engine(FedAvg(), data=data)
    other = engine(FedAvg(), data=data, plan=Plan("compiled", 4))
    run(one), run(other)
    told = [record.message for record in caplog.records if "not compiled" in record.message]
    assert len(told) == 1
    assert_equal(one, other, 1e-5)
    # A later run does not try again.
    caplog.clear()
    later = Programs()
    assert later.pending == {}
    run(engine(FedAvg(), data=data, plan=Plan("compiled", 4)), 1)
    assert len([record for record in caplog.records if "not compiled" in record.message]) == 1
