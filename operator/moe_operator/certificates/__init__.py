"""Certificates of the components of deployments (docs/adr/0038): `issuing` makes them, `renewal` says when.

Both take the time as an argument and access no cluster: `moe_operator.executor.certificates` keeps Secrets.
"""
