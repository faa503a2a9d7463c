"""Exponential integrals: how a step of size h in log signal-to-noise weighs a prediction and its derivatives.

A prediction m(lambda) that is a polynomial around the start, m = sum_k m_k (lambda - lambda_s)^k / k!, is
integrated exactly against the exponential of the linear part. All float64, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SERIES_BELOW = 1.0  # the recursion loses digits to cancellation for small arguments, the series does not
SERIES_TERMS = 24


def phi(k: int, z: float) -> float:
    """phi_k(z): phi_0 = e^z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z, phi_k(0) = 1/k!.

    By its power series sum_n z^n / (n + k)! for |z| < 1, by the recursion elsewhere; z may be -inf (then 0).
    """
    if z == -math.inf:
        return 0.0
    if abs(z) < SERIES_BELOW:
        return math.fsum(z**n / math.factorial(n + k) for n in range(SERIES_TERMS))
    value = math.exp(z)
    for i in range(k):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


def moment(k: int, h: float, z: float) -> float:
    """h^(k+1) phi_{k+1}(z): the weight of the k-th derivative over a step h; z is h times some factor.

    h = inf is allowed for k = 0 and z = -inf, where the limit of h phi_1(-h) is 1.
    """
    if h == math.inf:
        return 1.0
    return h ** (k + 1) * phi(k + 1, z)


def difference_weights(offsets: Sequence[float], k: int) -> list[float]:
    """Weights w: the k-th derivative at the start is sum_a w_a (m_a - m_start).

    offsets: distance of each point from the start, all different and not 0; at least k of them. Exact for
    polynomials of a degree up to len(offsets). Solves sum_a w_a offset_a^i / i! = [i = k], i = 1..len.
    """
    count = len(offsets)
    if count == 1:
        return [1.0 / offsets[0]]
    reach = max(abs(offset) for offset in offsets)  # a scaled system stays well conditioned
    scaled = np.asarray(offsets, dtype=np.float64) / reach
    system = np.array([scaled**i / math.factorial(i) for i in range(1, count + 1)])
    wanted = np.array([float(i == k) for i in range(1, count + 1)])
    weights: list[float] = (np.linalg.solve(system, wanted) / reach**k).tolist()
    return weights


def relaxation(kind: str, c: float, h: float, z: float) -> float:
    """The factor on a derivative: 1 + O(h), so that the order of the update stays what it is.

    kind: "none" 1; "const" c (the exception: not 1 + O(h)); "linear" 1 + c h; "exp" 1 + c (e^z - 1);
    "bh1", "bh2" make the second-order update the one of UniPC's two kinds. z: -h for data predictions, h for
    noise. Source: arXiv 2312.07243; the bh ones also arXiv 2302.04867.
    """
    if kind == "none":
        return 1.0
    if kind == "const":
        return c
    if kind == "linear":
        return 1.0 + c * h
    if kind == "exp":
        return 1.0 + c * math.expm1(z)
    second = z * z * phi(2, z)  # e^z - 1 - z without its cancellation
    return (z * z / 2 if kind == "bh1" else (z / 2) * math.expm1(z)) / second
