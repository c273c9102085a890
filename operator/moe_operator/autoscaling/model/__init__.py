"""The mathematics of autoscaling: pure code that returns the number of replicas and the reason.

Work is what arrives and needs a replica: requests that the output cache does not answer, unless the caller
weights them differently. Rates are work per minute; times are seconds since the epoch; a minute is such a
time divided by 60, as an integer. Nothing here reads a clock, a file or a cluster.

    samples   validates reports of replicas and converts them to rates of whole minutes
    history   14 days of rates in a compact form, which is stored
    forecast  demand at the horizon, with a band
    horizon   the measured cold starts of replicas
    capacity  the learned load that one replica serves within its latency target
    spec      the limits and targets from the spec
    sizing    combines all of these into a number of replicas with a reason
"""
