"""Rows of the multistep solvers: exact where the prediction is a polynomial of their order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.polynomial import polynomial

from vqkernels.schedulers._multistep_rows import (
    Path,
    StepWeights,
    dpm_solver,
    growth,
    unipc_corrector,
    unipc_predictor,
    usable_order,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAMBDAS = np.array([-3.0, -2.4, -2.1, -1.3, -0.4, 0.5, 1.6])
STEP = 3


def path(lambdas: np.ndarray = LAMBDAS) -> Path:
    """A variance-preserving one."""
    return Path.of(1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas)))


def solution(levels: Path, coefficients: np.ndarray, data: bool, x: float) -> float:
    """The ODE's end where the prediction is a polynomial of lambda - lambda_s, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    h = levels.lamb[STEP + 1] - levels.lamb[STEP]
    u, weights = (nodes + 1) / 2 * h, weights * h / 2
    predicted = polynomial.polyval(u, coefficients)
    near, far = (levels.sigma, levels.alpha) if data else (levels.alpha, levels.sigma)
    integrand = np.exp(u - h) if data else -np.exp(h - u)
    total = float(np.sum(weights * integrand * predicted))
    return near[STEP + 1] / near[STEP] * x + far[STEP + 1] * total


def applied(step: StepWeights, levels: Path, coefficients: np.ndarray, newest: int) -> float:
    """The step from x = 0.7 with the polynomial's values at the levels `newest`, newest - 1, ..."""
    values = [
        polynomial.polyval(levels.lamb[newest - k] - levels.lamb[STEP], coefficients)
        for k in range(len(step.predictions))
    ]
    return step.sample * 0.7 + float(np.dot(step.predictions, values))


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_solves_polynomials(algorithm: str, order: int) -> None:
    coefficients, data = np.array([0.4, -1.1][:order]), algorithm.endswith("++")
    step = dpm_solver(path(), STEP, order, algorithm, "heun")
    result = applied(step, path(), coefficients, STEP)
    assert result == pytest.approx(solution(path(), coefficients, data, 0.7), rel=1e-13)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_third_order_has_half_the_second_derivative(algorithm: str) -> None:
    """As its authors' code has it: lines are exact, of a parabola half is there."""
    data = algorithm.endswith("++")
    step = dpm_solver(path(), STEP, 3, algorithm, "heun")
    line, parabola = np.array([0.4, -1.1]), np.array([0, 0, 1.3])
    result = applied(step, path(), line, STEP)
    assert result == pytest.approx(solution(path(), line, data, 0.7), rel=1e-13)
    half = applied(step, path(), parabola, STEP) - step.sample * 0.7
    assert half * 2 == pytest.approx(solution(path(), parabola, data, 0), rel=1e-12)


def test_third_order_of_the_sde() -> None:
    """A parabola gets the same half of its exact integral, and diffusers' sign something else."""
    parabola = np.array([0, 0, 1.3])
    h = LAMBDAS[STEP + 1] - LAMBDAS[STEP]
    # alpha_t int_0^h 2 e^(2 (u - h)) u^2 du, halved.
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, weights = (nodes + 1) / 2 * h, weights * h / 2
    integral = float(np.sum(weights * 2 * np.exp(2 * (u - h)) * 1.3 * u * u))
    for sign, right in ((1.0, True), (-1.0, False)):
        step = dpm_solver(path(), STEP, 3, "sde-dpmsolver++", "heun", sde_sign=sign)
        half = applied(step, path(), parabola, STEP) - step.sample * 0.7
        assert (half == pytest.approx(path().alpha[STEP + 1] * integral / 2, rel=1e-12)) == right


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_corrector_solves_polynomials(order: int, data: bool, solver: str) -> None:
    coefficients = np.array([0.4, -1.1, 0.3, 0.8][: order + 1])
    step = unipc_corrector(path(), STEP, order, solver, data)
    result = applied(step, path(), coefficients, STEP + 1)
    assert result == pytest.approx(solution(path(), coefficients, data, 0.7), rel=1e-12)


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("data", [True, False])
def test_predictor_solves_polynomials(data: bool, solver: str) -> None:
    """Orders 1 and 3; the second is not exact for straight lines, but nearly for short steps."""
    for order in (1, 3):
        coefficients = np.array([0.4, -1.1, 0.3][:order])
        step = unipc_predictor(path(), STEP, order, solver, data)
        result = applied(step, path(), coefficients, STEP)
        assert result == pytest.approx(solution(path(), coefficients, data, 0.7), rel=1e-12)
    errors = []
    for scale in (0.25, 0.125):
        levels = path(LAMBDAS * scale)
        step = unipc_predictor(levels, STEP, 2, solver, data)
        line = np.array([0.4, -1.1])
        errors.append(abs(applied(step, levels, line, STEP) - solution(levels, line, data, 0.7)))
    assert errors[1] < errors[0] / 6  # third order in h


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_growth(k: int) -> None:
    """Its series in rational numbers, on both sides of where the recursion takes over."""
    for z in (-40.0, -3.0, -1.0001, -0.9999, -1e-3, 0.0, 1e-9, 0.5, 1.0001, 7.0):
        series = sum(
            Fraction(z) ** n / math.factorial(n + k - 1) for n in range(1, max(30, int(5 * abs(z))))
        )
        assert growth(k, z) == pytest.approx(float(series), rel=1e-13, abs=0)


def test_usable_order() -> None:
    repeated = Path([1.0] * 6, [1.0] * 6, [-2.0, -1.0, -1.0, 0.0, 1.0, math.inf])
    assert [usable_order(repeated, step, 3) for step in (1, 2, 3)] == [1, 1, 2]
    assert usable_order(repeated, 4, 3) == 1
    assert usable_order(path(), STEP, 3) == 3


@pytest.mark.parametrize("data", [True, False])
def test_last_step_to_no_noise(data: bool) -> None:
    """Its limit: the data as it is predicted."""
    levels = Path.of(np.array([0.6, 0.8, 1.0]), np.array([0.8, 0.6, 0.0]))
    step = unipc_predictor(levels, 1, 1, "bh1", data)
    x, said = 0.7, 0.3
    expected = said if data else (x - 0.6 * said) / 0.8
    assert step.sample * x + step.predictions[0] * said == pytest.approx(expected, rel=1e-14)
    near = Path.of(np.array([0.6, 0.8, 1.0]), np.array([0.8, 0.6, 1e-9]))
    close = unipc_predictor(near, 1, 1, "bh1", data)
    assert close.predictions[0] == pytest.approx(step.predictions[0], rel=1e-8)


def test_noise_of_the_sde_keeps_the_variance() -> None:
    """Where the predicted data are the truth, a step leaves x_t with the variance of its level."""
    levels = path()
    for algorithm in ("sde-dpmsolver++", "sde-dpmsolver"):
        step = dpm_solver(levels, STEP, 1, algorithm, "midpoint")
        # x_s = alpha_s x0 + sigma_s z, as the noise or the data tells it.
        if algorithm.endswith("++"):
            of_noise = step.sample * levels.sigma[STEP]
            of_data = step.sample * levels.alpha[STEP] + step.predictions[0]
        else:
            of_noise = step.sample * levels.sigma[STEP] + step.predictions[0]
            of_data = step.sample * levels.alpha[STEP]
        assert of_data == pytest.approx(levels.alpha[STEP + 1], rel=1e-13)
        if algorithm.endswith("++"):
            assert math.hypot(of_noise, step.noise) == pytest.approx(
                levels.sigma[STEP + 1], rel=1e-13
            )
