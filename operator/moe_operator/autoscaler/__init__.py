"""Between the cluster and the pure code of `moe_operator.scaling`: one deployment's part of scaling.

    reports     what a worker says of its load becomes a report, or a sentence that says why not
    coldstart   how long a replica took to start, from its pod's conditions
    subject     a deployment that scales, as a reconcile saw it
    scaler      its memory: takes a reading every few seconds, says how many replicas there should be
    reporting   what people are told: status, condition, event

    keeping     the memory as an object of the cluster

Pure: nothing here reads a clock or talks to the cluster. `handlers.autoscaler` brings both. Times are those
of the scaling clock, in seconds since the epoch.
"""
