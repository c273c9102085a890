"""Candidates whose forecast is a weighted sum of the latest rates.

Exponential smoothing and ARIMA with fixed parameters are linear filters: statsmodels estimates the
parameters at a refit, and an update needs only the weights of past rates that follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from statsmodels.tsa.arima.model import ARIMA
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

from moe_operator.autoscaling.model.forecast.past import Floats

LONGEST: Final = 1440
"""Maximum number of weights; those of older rates are negligible at the horizons used here."""
_NEGLIGIBLE: Final = 1e-6


def exponential_smoothing(rates: Floats, horizon: int) -> Floats:
    """Weights of the `horizon`-step forecast by ETS with additive error and damped additive trend.

    Hyndman, Koehler, Ord, Snyder: Forecasting with Exponential Smoothing (2008), parameters by likelihood.

    Args:
        rates: [steps] to estimate from; at least 20, not all equal.
        horizon: steps ahead.
    """
    fit = ETSModel(rates / rates.mean(), error="add", trend="add", damped_trend=True).fit(disp=False)
    alpha, beta, damping = fit.params[:3]
    transition = np.array([[1.0, damping], [0.0, damping]])
    return _weights(transition, np.array([1.0, damping]), np.array([alpha, beta]), horizon)


def best_arima(values: Floats, orders: Sequence[tuple[int, int, int]], horizon: int) -> Floats:
    """Weights of the `horizon`-step forecast by the order with the lowest AIC, from its steady-state filter.

    Args:
        values: [steps], centred around 0.
        orders: (p, d, q) to try, all with the same d.
        horizon: steps ahead.
    """
    fits = [ARIMA(values, order=order, trend="n").fit(method="statespace") for order in orders]
    best = min(fits, key=lambda fit: float(fit.aic))
    system = best.model.ssm
    gain = best.filter_results.kalman_gain[:, 0, -1]  # of the prediction form: what enters the next state
    return _weights(system["transition"], system["design"][0], gain, horizon)


def _weights(transition: Floats, design: Floats, gain: Floats, horizon: int) -> Floats:
    """Response of the forecast to a rate j steps ago, oldest first.

    With state x, x' = F x + g e and e = y - w x, a rate enters as g and fades by F - g w a step.
    """
    ahead = design @ np.linalg.matrix_power(transition, horizon - 1)
    fading = transition - np.outer(gain, design)
    response, weights = gain.astype(np.float64), []
    for _ in range(LONGEST):
        weights.append(float(ahead @ response))
        response = fading @ response
        if np.abs(response).max() < _NEGLIGIBLE:
            break
    return np.array(weights[::-1])
