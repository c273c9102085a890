"""Executes plans of `moe_operator.planner`. Makes no decisions."""
