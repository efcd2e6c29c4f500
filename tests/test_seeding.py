import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.seeding import derive, generator, global_stream, numpy_generator

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=100)
purposes = st.lists(st.integers(0, 10**6) | st.text('1a,"\\é', max_size=4), max_size=4)


@pytest.mark.parametrize(
    ("seed", "purpose", "expected"),
    [
        (0, (), 7520536977032167579),
        (7, ("client-3", 2, "training"), 3862578847124563680),
        (7, (1,), 7344623431633286730),
        (7, ("1",), 6870006177312721178),
    ],
)
def test_derived_seeds_stay_what_they_are(
    seed: int, purpose: tuple[str | int, ...], expected: int
) -> None:
    assert derive(seed, *purpose) == expected


@EXAMPLES
@given(seed=st.integers(0, 2**63), purpose=purposes)
def test_a_derived_seed_is_the_first_63_bits_of_the_hash(
    seed: int, purpose: list[int | str]
) -> None:
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).hexdigest()
    bits = f"{int(digest, 16):0256b}"
    assert derive(seed, *purpose) == int(bits[:63], 2)


@EXAMPLES
@given(first=purposes, second=purposes)
def test_different_purposes_have_different_seeds(
    first: list[int | str], second: list[int | str]
) -> None:
    assert (derive(1, *first) == derive(1, *second)) == (first == second)


def test_parts_of_a_purpose_do_not_run_together() -> None:
    assert derive(0, "a", "bc") != derive(0, "ab", "c")
    assert derive(1, 23) != derive(12, 3)


def test_streams_of_one_purpose_repeat() -> None:
    assert torch.equal(
        torch.randn(5, generator=generator(3, "x")), torch.randn(5, generator=generator(3, "x"))
    )
    assert np.array_equal(numpy_generator(3, "x").random(5), numpy_generator(3, "x").random(5))


@pytest.mark.parametrize(("seed", "purpose"), [(4, "x"), (3, "y")])
def test_streams_of_other_seeds_and_purposes_differ(seed: int, purpose: str) -> None:
    assert not torch.equal(
        torch.randn(5, generator=generator(3, "x")),
        torch.randn(5, generator=generator(seed, purpose)),
    )
    assert not np.array_equal(
        numpy_generator(3, "x").random(5), numpy_generator(seed, purpose).random(5)
    )


def test_a_stream_ignores_what_other_streams_have_drawn() -> None:
    alone = torch.randn(3, generator=generator(3, "x"))
    mine, other = generator(3, "x"), generator(3, "y")
    torch.randn(7, generator=other)
    torch.randn(7)
    assert torch.equal(torch.randn(3, generator=mine), alone)


def test_generators_leave_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=generator(3, "x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_stream_draws_as_the_generator_of_its_purpose() -> None:
    with global_stream(3, "x"):
        drawn = torch.randn(4)
    assert torch.equal(drawn, torch.randn(4, generator=generator(3, "x")))


def test_the_global_stream_is_restored() -> None:
    before = torch.get_rng_state()
    with global_stream(3, "x"):
        torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_stream_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), global_stream(3, "x"):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_an_inner_stream_does_not_disturb_the_outer() -> None:
    with global_stream(3, "x"):
        plain = torch.randn(4)
    with global_stream(3, "x"):
        first = torch.randn(2)
        with global_stream(3, "y"):
            torch.randn(9)
        second = torch.randn(2)
    assert torch.equal(torch.cat([first, second]), plain)
