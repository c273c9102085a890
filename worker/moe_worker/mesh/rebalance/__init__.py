"""Experts move between the ranks of a stage while it serves, to where the load of ranks is even.

`plan` decides from the loads of experts, `execute` moves them: each rank reads what it will hold in the
background, one layer after the other, and all switch between two forward passes.
"""
