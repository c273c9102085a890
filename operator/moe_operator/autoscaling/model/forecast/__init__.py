"""Forecasts demand at the horizon, with prediction intervals."""

from moe_operator.autoscaling.model.forecast.forecaster import Forecaster
from moe_operator.autoscaling.model.forecast.result import Errors, Forecast

__all__ = ["Errors", "Forecast", "Forecaster"]
