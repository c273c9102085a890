"""Connects kopf and the planner: receives changes and reconciles each deployment.

    registration    what kopf calls
    operator        the objects that run in the process
    edits           what users change, of all that a watch of deployments shows
    watches         a watcher for each kind of object
    queue           one reconcile at a time for each deployment
    reconcile       gather, plan, execute, report
    planning        makes the plan, with answers of nodes, workers and frontends
    reporting       status, metrics and Events of a reconcile
    gather          reads the objects of one deployment
    room            checks whether a new pod would fit, for the planner
    work_metrics    metrics of the operator's own work
    deployment_metrics  conditions and replicas of each deployment

kopf provides the watches, the peering and the process. Its stateful handlers are not used: a plan depends
only on observed objects, so there is no state in annotations and no finalizer.
"""
