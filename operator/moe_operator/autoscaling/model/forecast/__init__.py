"""Forecasts demand at the horizon, with prediction intervals.

`forecaster` imports statsmodels: two thirds of the time that an operator takes to start. It is imported in
the thread that makes the first forecaster, so an operator without autoscaled deployments never does.
"""
