"""Tools that work with recorded traces.

recorded  reads traces
load      `moe load` plays one against a deployment
replay    `moe replay` computes what scaling by forecast would have done
"""
