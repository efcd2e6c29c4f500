"""What has left a private node stays counted, and its noise comes from nowhere else."""

import json
import math
import shutil
import stat
from hashlib import shake_256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansa.errors import InputError
from hansa.federation.accountant import spent
from hansa.federation.privacy import Privacy, noised, poisson
from hansa.federation.releases import Releases
from hansa.seeding import Keystream

UPDATE = Privacy(unit="update", noise=2.0)
ONE = (2.0, 1.0, 1)


def test_a_key_stream_is_shake_256_of_key_and_position() -> None:
    stream = Keystream(b"k" * 32)
    for position in (0, 1):
        data = shake_256(b"k" * 32 + position.to_bytes(8, "big")).digest(16)
        words = [int.from_bytes(data[k : k + 8], "little") for k in (0, 8)]
        assert stream.uniform(2).tolist() == [(word >> 11) / 2**53 for word in words]


def test_noise_of_a_key_stream_is_normal_and_its_chances_are_even() -> None:
    draws, chances = Keystream(b"n" * 32).normal((3, 50_001)), Keystream(b"u" * 32).uniform(300_001)
    assert (draws.shape, draws.dtype) == ((3, 50_001), torch.float64)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(chances.numpy(), "uniform").pvalue > 0.01
    halves = draws.flatten()[:-1].reshape(2, -1)  # made of the same pairs of numbers
    assert abs(float((halves[0] * halves[1]).mean())) < 0.02
    assert len(draws.unique()) == draws.numel()
    assert Keystream(b"n" * 32).normal(()).shape == ()
    assert Keystream(b"n" * 32).normal((0, 3)).shape == (0, 3)


def test_a_stream_goes_on_and_streams_of_other_keys_have_nothing_in_common() -> None:
    one, same, other = Keystream(b"a" * 32), Keystream(b"a" * 32), Keystream(b"b" * 32)
    first, second = one.normal((5,)), one.normal((5,))
    assert torch.equal(first, same.normal((5,)))
    assert not torch.isclose(first, second).any()
    assert not torch.isclose(first, other.normal((5,))).any()


def test_updates_and_batches_take_their_draws_from_it() -> None:
    before, after = {"w": torch.zeros(4)}, {"w": torch.zeros(4)}
    found = noised(Privacy(unit="update", clip=3.0, noise=2.0), before, after, Keystream(b"k" * 32))
    assert torch.equal(found["w"], (6 * Keystream(b"k" * 32).normal((4,))).float())
    (chosen,) = poisson(8, 4, 1, Keystream(b"k" * 32))
    assert torch.equal(chosen, (Keystream(b"k" * 32).uniform(8) < 0.5).nonzero().flatten())


def test_releases_are_counted_in_a_file_for_its_owner_alone(tmp_path) -> None:
    path = tmp_path / "state" / "releases.json"
    releases = Releases(path, UPDATE)
    assert (releases.number, releases.epsilon) == (0, 0.0)
    first, second = releases.open(ONE), releases.open(ONE)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (1, 2)
    assert first.key != second.key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.name for p in path.parent.iterdir()} == {"releases.json", ".releases.json.lock"}
    # Whoever is started next goes on from there, with the same secret.
    secret = json.loads(path.read_text())["secret"]
    again = Releases(path, UPDATE)
    assert (again.number, again.epsilon) == (2, spent([(2.0, 1.0, 2)], UPDATE.delta))
    assert json.loads(path.read_text())["secret"] == secret
    assert Releases(tmp_path / "other.json", UPDATE).number == 0
    assert json.loads((tmp_path / "other.json").read_text())["secret"] != secret


def test_purposes_of_a_release_have_streams_of_their_own(tmp_path) -> None:
    release = Releases(tmp_path / "r.json", UPDATE).open(ONE)
    assert release is not None
    kinds = [("privacy",), ("gradients",), ("train", 0, "drawn"), ("train", 1, "drawn")]
    values = [float(release.stream(*kind).uniform(1)) for kind in kinds]
    assert len(set(values)) == len(kinds)
    assert values == [float(release.stream(*kind).uniform(1)) for kind in kinds]


def test_a_folder_that_was_copied_or_brought_back_repeats_no_noise(tmp_path) -> None:
    path = tmp_path / "r.json"
    Releases(path, UPDATE)
    shutil.copy(path, tmp_path / "backup")
    one = Releases(path, UPDATE).open(ONE)
    shutil.copy(tmp_path / "backup", path)
    two = Releases(path, UPDATE).open(ONE)
    assert one is not None
    assert two is not None
    assert one.number == two.number
    assert one.key != two.key


def test_what_is_counted_is_on_the_disk_before_anything_is_drawn(tmp_path, monkeypatch) -> None:
    import hansa.federation.releases as module

    releases = Releases(tmp_path / "r.json", UPDATE)
    write = module.write_atomic

    def full(*_: object, **__: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(OSError, match="full"):  # no count, no release
        releases.open(ONE)
    monkeypatch.setattr(module, "write_atomic", write)
    assert releases.number == 0


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([(2.0, 1.0, 1), (2.0, 0.5, 3), (5.0, 0.5, 4)]), max_size=6))
def test_what_is_let_out_stays_within_the_budget_and_adds_up(tmp_path_factory, wanted) -> None:
    privacy = Privacy(unit="update", noise=2.0, epsilon=4.0)
    releases = Releases(tmp_path_factory.mktemp("r") / "r.json", privacy)
    let_out = []
    for more in wanted:
        fits = spent([*let_out, more], privacy.delta) <= 4.0
        release = releases.open(more)
        assert (release is not None) == fits
        let_out += [more] if release else []
    assert releases.number == len(let_out)
    assert releases.epsilon == pytest.approx(spent(let_out, privacy.delta), rel=1e-9)
    assert releases.epsilon <= 4.0


def test_what_was_let_out_under_other_rules_counts_as_it_was(tmp_path) -> None:
    path = tmp_path / "r.json"
    Releases(path, UPDATE).open(ONE)
    quieter = Releases(path, Privacy(unit="update", noise=8.0))
    quieter.open((8.0, 1.0, 1))
    assert quieter.epsilon == spent([ONE, (8.0, 1.0, 1)], 1e-5)
    assert quieter.epsilon > spent([(8.0, 1.0, 2)], 1e-5)
    # Once something left without noise there is no budget any more.
    bare = Releases(path, Privacy(unit="update", noise=0.0))
    assert bare.open((0.0, 1.0, 1)) is not None
    assert bare.epsilon == math.inf
    assert Releases(path, Privacy(unit="update", epsilon=1000.0)).open((1.0, 1.0, 1)) is None


def test_a_file_that_cannot_be_gone_on_with_is_refused(tmp_path) -> None:
    path = tmp_path / "r.json"
    releases = Releases(path, UPDATE)
    releases.open(ONE)
    with pytest.raises(InputError, match=r"privacy\.unit: found 'gradient'.*'update'"):
        Releases(path, Privacy(unit="gradient"))
    whole = json.loads(path.read_text())
    for damage in ("", "[]", "{}", json.dumps(whole)[:-9], json.dumps({**whole, "number": -1})):
        path.write_text(damage)
        with pytest.raises(InputError, match="damaged"):
            Releases(path, UPDATE)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        releases.open(ONE)


def test_without_the_library_it_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    import hansa.federation.accountant as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="opacus"):
        Releases(tmp_path / "r.json", UPDATE)
    assert not (tmp_path / "r.json").exists()
