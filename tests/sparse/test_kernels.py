"""The compiled kernels against PyTorch, in every instruction set and in any number of threads."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import Case, cases, check

from hansa.sparse import build, kernels
from hansa.sparse.convolution import Convolution, Geometry
from hansa.sparse.layout import inner_base, is_inner, logical, outer, to_inner
from hansa.sparse.thresholds import count_kept, keep, threshold

needs_kernels = pytest.mark.skipif(kernels.kernels() is None, reason=kernels.find()[1])
SETS = ("avx512", "avx2", "portable")


@pytest.fixture
def found(request: pytest.FixtureRequest) -> kernels.Kernels:
    """The kernels in an instruction set that this processor has."""
    library = kernels.required()
    if SETS.index(request.param) < SETS.index(library.isa):
        pytest.skip(f"this processor has no {request.param}")
    return dataclasses.replace(library, isa=request.param)


@needs_kernels
@pytest.mark.parametrize("found", SETS, indirect=True)
def test_products_agree_with_pytorch(found) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(cases())
    def run(case) -> None:
        check(case, found)

    run()


@needs_kernels
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
@pytest.mark.parametrize("found", SETS, indirect=True)
def test_channels_and_pixels_in_several_parts_add_up(found, sparsity, monkeypatch) -> None:
    monkeypatch.setattr("hansa.sparse.convolution.CORE", 4 << 10)
    geometry = Geometry(60, 6, 45, 70, (3, 3), (1, 1), (1, 1))
    lists = Convolution(geometry, 33, found)
    assert min(lists._units, lists._units_back) > 2
    check(Case(geometry, 33, sparsity, 0, True), found)


@needs_kernels
@pytest.mark.parametrize("batch", [7, 32, 40])
def test_threads_change_no_bit(batch) -> None:
    geometry = Geometry(8, 9, 10, 40, (3, 3), (1, 1), (1, 1))
    x, d = torch.randn(8, 9, 10, batch), torch.randn(40, 9, 10, batch)
    weight = torch.randn(40, 8, 3, 3)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            lists = Convolution(geometry, batch)
            lists.take(weight, 0.8)
            dw = lists.weight_gradient(x, 0.8, d)
            results.append(
                (lists.forward(x), lists.input_gradient(d), dw, lists.kept_gradient(x, d))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from([1.0, 0.0, 0.3]), st.data())
def test_the_threshold_keeps_as_many_as_it_should(numel, sparsity, zeros, data) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(numel, generator=random)
    x[torch.rand(numel, generator=random) < zeros * 0.5] = 0
    k = count_kept(sparsity, numel)
    least = threshold(x, sparsity)
    assert least == threshold(x.double(), sparsity)  # float64 takes PyTorch's own way
    assert keep(x, least).sum() == min(k, int(x.count_nonzero()))


def test_whole_shares_stay_whole_and_ties_are_kept() -> None:
    assert [count_kept(s, 1000) for s in (0.9, 0.95, 0.99, 0.0, 0.9991)] == [100, 50, 10, 1000, 1]
    x = torch.tensor([3.0, -2.0, 2.0, 1.0])
    assert keep(x, threshold(x, 0.5)).tolist() == [True, True, True, False]
    assert not keep(torch.zeros(4), threshold(torch.zeros(4), 0.5)).any()


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (16, 2, 3, 3), (7, 10), (33, 65)])
def test_the_layout_is_strides_and_nothing_else(shape) -> None:
    x = torch.randn(shape, requires_grad=True)
    inner = to_inner(x)
    assert is_inner(inner)
    assert torch.equal(inner, x)
    assert to_inner(inner) is inner
    assert inner_base(inner).data_ptr() == inner.data_ptr()
    assert outer(inner).is_contiguous()
    assert torch.equal(outer(inner), x)
    weights = torch.randn(shape)
    (inner * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    assert is_inner(logical(torch.zeros(*shape[1:], shape[0])))


@needs_kernels
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 4).t()[:2], torch.zeros(4, dtype=torch.float64), torch.zeros(4, device="meta")],
)
def test_a_tensor_that_no_kernel_can_read_is_refused(tensor) -> None:
    with pytest.raises(ValueError, match="contiguous float32"):
        kernels.required().call("kth", tensor, tensor.numel(), 1)


@pytest.fixture
def afresh(monkeypatch):
    """Look for the kernels anew in this test, and after it."""

    def look(path: Path | str) -> tuple[kernels.Kernels | None, str]:
        monkeypatch.setenv("HANSA_KERNELS", str(path))
        kernels.find.cache_clear()
        return kernels.find()

    yield look
    kernels.find.cache_clear()


@needs_kernels
def test_a_library_that_is_damaged_or_foreign_is_not_loaded(afresh, tmp_path) -> None:
    whole = kernels.required().path
    about = whole.with_name(build.MANIFEST).read_text()

    def placed(name: str, library: bytes, manifest: str) -> Path:
        path = tmp_path / name / build.LIBRARY
        path.parent.mkdir()
        path.write_bytes(library)
        path.with_name(build.MANIFEST).write_text(manifest)
        return path

    assert afresh("off") == (None, "HANSA_KERNELS is off")
    assert "not built" in afresh(tmp_path / build.LIBRARY)[1]
    library, why = afresh(placed("whole", whole.read_bytes(), about))
    assert library is not None, why
    assert "not the file" in afresh(placed("short", whole.read_bytes()[:-4096], about))[1]
    older = about.replace(build.digest(build.SOURCE), "0" * 64)
    assert "another source" in afresh(placed("older", whole.read_bytes(), older))[1]
    for name, manifest in (("empty", "{}"), ("none", ""), ("list", "[]")):
        assert afresh(placed(name, whole.read_bytes(), manifest))[0] is None
    foreign = about.replace(build.digest(whole), hashlib.sha256(b"foreign").hexdigest())
    assert afresh(placed("foreign", b"foreign", foreign))[0] is None


def test_without_a_compiler_nothing_is_built_and_it_is_said(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sys, "argv", ["build", "--folder", str(tmp_path)])
    assert build.main() == 1
    assert "no-such-compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _needs(compiler: str) -> str:
    if compiler not in [Path(name).name for name in build.compilers()]:
        pytest.skip(f"no {compiler}")
    return compiler


@needs_kernels
def test_sanitizers_find_nothing_in_five_hundred_shapes(tmp_path) -> None:
    compiler, isa = _needs("g++"), kernels.required().isa
    options = ["-O1", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    library = build.build(tmp_path, compiler, options, sets=(isa,))
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    needed = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]
    if not all(map(os.path.isabs, needed)):
        pytest.skip("no sanitizers")
    about = {
        "HANSA_KERNELS": str(library),
        "LD_PRELOAD": " ".join(needed),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "THREADS": "2",
    }
    program = Path(__file__).with_name("shapes.py")
    run = subprocess.run(
        [sys.executable, str(program), "500"],
        env={**os.environ, **about}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [build.LIBRARY, isa, "500"]
