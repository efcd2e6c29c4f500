"""What noise amounts to: epsilon at a given delta.

The accountant is that of Opacus, by Renyi differential privacy: Mironov, Talwar and Zhang, "Renyi
Differential Privacy of the Sampled Gaussian Mechanism" (2019), turned into epsilon and delta by
Theorem 21 of Balle et al., "Hypothesis Testing Interpretations and Renyi Differential Privacy"
(AISTATS 2020).
"""

import logging
import warnings
from functools import lru_cache

from hansa.errors import InputError

_ORDERS = [
    *(1 + k / 10 for k in range(1, 100)),
    *range(11, 64),
    *(64, 80, 96, 128, 192, 256, 384, 512),
]
"""Any order gives a valid bound; the high ones are the best where there is much noise."""


@lru_cache(maxsize=4096)
def spent(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon of a number of subsampled Gaussian mechanisms.

    Args:
        noise: standard deviation of the noise over the sensitivity, above 0.
        rate: chance with which a record is in a step, 1 without sampling.
        steps: number of mechanisms, at least 1.
        delta: the delta at which epsilon is wanted.

    Raises:
        InputError: Opacus is not installed.
    """
    handlers = list(logging.root.handlers)
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise InputError(
            "privacy", "no library 'opacus', which computes epsilon", "pip install hansa[language]"
        ) from error
    logging.root.handlers[:] = handlers  # the library's import adds one, which prints our own log
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        # At either end of the orders the bound is only looser than it could be.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, float(accountant.get_epsilon(delta, alphas=_ORDERS)))
