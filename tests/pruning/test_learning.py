"""On a small task scorers keep what a random choice of the same size does not."""

from statistics import mean

from test_benchmarks import loaded

pruning = loaded("pruning")


def test_scorers_beat_random_masks_on_digits() -> None:
    """Three seeds, half of the benchmark's schedule; no order among scorers is claimed."""
    task = pruning.Task(
        {"source": "digits", "validation": 0.0},
        {"name": "cnn", "options": {"channels": [16, 32], "hidden": 64}},
        steps=200,
        batch=64,
        lr=0.1,
    )
    rows = {"random": 0.1, "snip": 0.1, "prospr": 0.1}
    found = {
        row: mean(pruning.accuracy(pruning.Cell("digits", row, density, s), task) for s in range(3))
        for row, density in rows.items()
    }
    assert all(found[row] > found["random"] + 0.25 for row in rows if row != "random"), found
