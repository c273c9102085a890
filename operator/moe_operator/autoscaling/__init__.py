"""Scales a deployment by forecast: what replicas report becomes a number of replicas in the status.

    loop             the deployments that scale, each in a task of its own
    rounds           one deployment: ask, decide, report, keep
    polling          asks the replicas how busy they are, and the frontends who waits
    readings         what a worker says of its load, checked
    coldstart        how long a replica took to start, from its pod's conditions
    subject          a deployment that scales, as a reconcile saw it
    scaler           its memory: takes a reading every few seconds, says how many replicas there should be
    scaling_history  the memory as an object of the cluster
    storage          reads and writes that object, and the scaler's part of the status
    reporting        what people are told: status, condition, event
    metrics          what each scaler measured, expects and wants
    model            the mathematics, which knows no Kubernetes

`loop`, `rounds`, `polling` and `storage` act; the others are pure. Times are those of the scaling clock, in
seconds since the epoch.
"""
