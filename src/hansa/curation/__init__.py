"""Data quality control: which training samples of a federation are used at all.

Clients score their own samples (``scores``), the root sets one threshold from public anchors
(``thresholds``), and what travels is the threshold and counts (``protocol``, ``federated``). What
each client keeps is a mask that can be taken off again (``masks``).
"""
