"""Measures a checkpoint on this machine.

`moe-worker bench`: its speed (cli, measure, plot). `moe-worker explain`: the kernels that would compute it
(explain), and how many launches a decode step takes (fusion).
"""
