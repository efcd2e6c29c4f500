"""A language model that is trained in no time, and simulated attackers on it."""

from typing import Any

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tar(phase: dict[str, Any]) -> dict[str, Any]:
    """Return the phase TAR with one attacker of two steps.

    Args:
        phase: what it has in common with other phases: steps, rate, batch size.
    """
    return {
        "kind": "tar",
        **phase,
        "inner_steps": 2,
        "every": 1,
        "attack_batch_size": 2,
        "adversaries": [{"lrs": [1e-3]}],
    }
