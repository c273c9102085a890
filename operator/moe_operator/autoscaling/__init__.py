"""Autoscaling by forecast: turns the load that replicas report into a number of replicas in the status.

    loop             the deployments that scale, each in its own task
    rounds           one deployment: poll, decide, report, persist
    polling          reads the load of replicas and the requests that frontends hold
    readings         validates the load report of a worker
    coldstart        the start time of a replica, from its pod's conditions
    subject          a deployment that scales, as a reconcile observed it
    scaler           state of one deployment: turns readings into a number of replicas
    scaling_history  that state as a Kubernetes object
    storage          reads and writes that object and the scaler's part of the status
    reporting        status, condition and event for users
    metrics          what each scaler measures, forecasts and decides
    model            the mathematics, without Kubernetes

`loop`, `rounds`, `polling` and `storage` have side effects; the others are pure. Times are seconds since the
epoch on the scaling clock.
"""
