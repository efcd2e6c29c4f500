"""Safeguards of a language model that fine-tuning should not remove cheaply, and their red team.

What a safeguard gives is delay: it raises what an attacker has to spend inside a stated budget,
and guarantees nothing (docs/safeguard.md).
"""
