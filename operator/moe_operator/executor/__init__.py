"""Carries out what `moe_operator.planner` planned. Decides nothing."""
