"""Tools that work with recorded traces.

recorded      reads traces
load          `moe load` plays one against a deployment
replay        `moe replay` computes what scaling by forecast would have done
cache_replay  `moe replay --cache` compares eviction policies
progress      lines that a long command writes to a log
"""
