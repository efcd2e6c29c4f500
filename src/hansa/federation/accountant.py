"""What noise amounts to: epsilon at a given delta.

The accountant is that of Opacus, by Renyi differential privacy: Mironov, Talwar and Zhang, "Renyi
Differential Privacy of the Sampled Gaussian Mechanism" (2019), turned into epsilon and delta by
Theorem 21 of Balle et al., "Hypothesis Testing Interpretations and Renyi Differential Privacy"
(AISTATS 2020).
"""

import logging
import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec

from hansa.errors import InputError

_ORDERS = [
    *(1 + k / 10 for k in range(1, 100)),
    *range(11, 64),
    *(64, 80, 96, 128, 192, 256, 384, 512),
]
"""Any order gives a valid bound; the high ones are the best where there is much noise."""


Mechanisms = tuple[float, float, int]
"""Some subsampled Gaussian mechanisms of one kind: standard deviation of the noise over the
sensitivity; chance with which a record is in a step, 1 without sampling; how many there were."""


def spent(mechanisms: Iterable[Mechanisms], delta: float) -> float:
    """Return epsilon of all that was done with the same data.

    Args:
        mechanisms: what was done, in any order.
        delta: the delta at which epsilon is wanted.

    Returns:
        0 after nothing, infinity where something had no noise.

    Raises:
        InputError: Opacus is not installed.
    """
    done = tuple(sorted(each for each in mechanisms if each[2] > 0))
    if not done:
        return 0.0
    return math.inf if any(noise == 0 for noise, _, _ in done) else _composed(done, delta)


def check_installed() -> None:
    """Refuse to go on without the library that computes epsilon, without importing it.

    Raises:
        InputError: Opacus is not installed.
    """
    if find_spec("opacus") is None:
        raise _missing()


def _missing() -> InputError:
    return InputError(
        "privacy", "no library 'opacus', which computes epsilon", "pip install hansa[language]"
    )


@lru_cache(maxsize=4096)
def _composed(mechanisms: tuple[Mechanisms, ...], delta: float) -> float:
    handlers = list(logging.root.handlers)
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise _missing() from error
    logging.root.handlers[:] = handlers  # the library's import adds one, which prints our own log
    accountant = RDPAccountant()
    accountant.history = list(mechanisms)
    with warnings.catch_warnings():
        # At either end of the orders the bound is only looser than it could be.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, float(accountant.get_epsilon(delta, alphas=_ORDERS)))
