"""Coefficients of one step of the exponential multistep solvers, in float64.

Along a sampling path x = alpha x_0 + sigma z, lambda = log(alpha / sigma) rises from noise to data.
Over a step from s to t, h = lambda_t - lambda_s, a model that predicts the data m gives

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(u - h) m(lambda_s + u) du

exactly, and one that predicts the noise the same with alpha and sigma exchanged and another sign.
A solver of order p puts the polynomial through the last p predictions in place of m; the
integrals of its powers are the functions `growth` below.

Sources: Lu et al. 2022, arXiv:2206.00927 (DPM-Solver) and arXiv:2211.01095 (++, and its SDE form);
Zhao et al. 2023, arXiv:2302.04867 (UniPC).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np


class Path(NamedTuple):
    """alpha, sigma and lambda at every level of a schedule, the last one included."""

    alpha: list[float]
    sigma: list[float]
    lamb: list[float]

    @classmethod
    def of(cls, alpha: np.ndarray, sigma: np.ndarray) -> Path:
        with np.errstate(divide="ignore"):  # lambda is infinite where nothing is noise
            lamb = np.log(alpha) - np.log(sigma)
        return cls(alpha.tolist(), sigma.tolist(), lamb.tolist())


class StepWeights(NamedTuple):
    """x_t = sample x_s + sum_k predictions[k] m_k + noise z, m_0 being the newest prediction."""

    sample: float
    predictions: list[float]
    noise: float = 0.0


@functools.cache
def _series(k: int) -> tuple[float, ...]:
    return tuple(1 / math.factorial(n + k - 1) for n in range(19, 0, -1))


def growth(k: int, z: float) -> float:
    """g_1 = e^z - 1, g_{k+1} = g_k / z - 1 / k!: the sum over n >= 1 of z^n / (n + k - 1)!."""
    if abs(z) < 1:  # where the recursion cancels
        total = 0.0
        for coefficient in _series(k):
            total = (total + coefficient) * z
        return total
    value = math.expm1(z)
    for i in range(1, k):
        value = value / z - 1 / math.factorial(i)
    return value


def usable_order(path: Path, step: int, order: int) -> int:
    """The order that the levels allow: a level that repeats says nothing new.

    A last level without noise is infinitely far in lambda and leaves order 1.
    """
    if path.lamb[step + 1] - path.lamb[step] in (0, math.inf):
        return 1
    for k in range(1, order):
        if path.lamb[step - k + 1] == path.lamb[step - k]:
            return k
    return order


def dpm_solver(
    path: Path, step: int, order: int, algorithm: str, solver: str, *, sde_sign: float = 1.0
) -> StepWeights:
    """A step of DPM-Solver, multistep; `sde_sign` -1 is diffusers' third order of the SDE."""
    data, sde = algorithm.endswith("++"), algorithm.startswith("sde")
    alpha_t, sigma_t = path.alpha[step + 1], path.sigma[step + 1]
    h = path.lamb[step + 1] - path.lamb[step]
    if data:
        kept = sigma_t / path.sigma[step] * (math.exp(-h) if sde else 1)
        scale, z = -alpha_t, -2 * h if sde else -h
        noise = sigma_t * math.sqrt(-math.expm1(-2 * h)) if sde else 0.0
    else:
        kept = alpha_t / path.alpha[step]
        scale, z = -sigma_t * (2 if sde else 1), h
        noise = sigma_t * math.sqrt(math.expm1(2 * h)) if sde else 0.0

    first = scale * growth(1, z)
    if order == 1:
        return StepWeights(kept, [first], noise)
    r0 = (path.lamb[step] - path.lamb[step - 1]) / h
    second = first / 2 if solver == "midpoint" and order == 2 else scale * growth(2, z)
    if order == 2:
        return StepWeights(kept, [first + second / r0, -second / r0], noise)
    third = scale * growth(3, z)
    if sde and sde_sign < 0:
        third += scale
    r1 = (path.lamb[step - 1] - path.lamb[step - 2]) / h
    # first m0 + second D1 + third D2, with D1 and D2 of the differences d0 = (m0 - m1) / r0 and
    # d1 = (m1 - m2) / r1.
    new = (second * (2 * r0 + r1) + third) / (r0 + r1)
    old = -(second * r0 + third) / (r0 + r1)
    predictions = [first + new / r0, -new / r0 + old / r1, -old / r1]
    return StepWeights(kept, predictions, noise)


def unipc_predictor(path: Path, step: int, order: int, solver: str, data: bool) -> StepWeights:
    """UniP: from level `step` to the next with the predictions at `step`, `step - 1`, ..."""
    return _unipc(path, step, order, solver, data, corrects=False)


def unipc_corrector(path: Path, step: int, order: int, solver: str, data: bool) -> StepWeights:
    """UniC: the same step once more, now that the prediction m_0 at its end is known as well.

    The second prediction is that at `step`.
    """
    return _unipc(path, step, order, solver, data, corrects=True)


def _unipc(
    path: Path, step: int, order: int, solver: str, data: bool, *, corrects: bool
) -> StepWeights:
    h = path.lamb[step + 1] - path.lamb[step]
    near, far = (path.sigma, path.alpha) if data else (path.alpha, path.sigma)
    kept, scale, z = near[step + 1] / near[step], far[step + 1], -h if data else h
    if h == math.inf and not data:  # sigma_t e^h is 0 inf there: its limit
        return StepWeights(kept, [-path.alpha[step + 1] * path.sigma[step] / path.alpha[step]])
    first = -scale * growth(1, z)
    ratios = [(path.lamb[step - k] - path.lamb[step]) / h for k in range(1, order)]
    if corrects:
        ratios.append(1.0)
    if not ratios:
        return StepWeights(kept, [first])
    b = z if solver == "bh1" else math.expm1(z)
    if len(ratios) == 1:
        rho = [0.5]  # as the paper has it for the lowest orders
    else:
        powers = np.vander(ratios, increasing=True).T
        moments = [math.factorial(k) * growth(k + 1, z) / b for k in range(1, len(ratios) + 1)]
        rho = np.linalg.solve(powers, moments).tolist()
    others = [-scale * b * weight / ratio for weight, ratio in zip(rho, ratios, strict=True)]
    here = first - math.fsum(others)
    if corrects:
        return StepWeights(kept, [others[-1], here, *others[:-1]])
    return StepWeights(kept, [here, *others])
