"""Scaling by forecast: pure code that says how many replicas a deployment should have, and why.

Work is what arrives and needs a replica: requests after the output cache, unless whoever samples weighs them
otherwise. Rates are work per minute; times are seconds since the epoch; a minute is such a time over 60, as
an integer. Nothing here reads a clock, a file or a cluster.

    samples   reports of replicas, checked, become rates of whole minutes
    history   14 days of them in a compact form that survives a restart
    forecast  demand at the horizon, with a band
    horizon   how long a replica takes to start, measured
    capacity  what one replica can do within its latency target, learned
    spec      what the user asks of scaling
    sizing    all of it and the spec become a number of replicas with a reason
"""
