"""kopf on one side, the planner on the other: hears what changed, and reconciles each deployment.

    registration    what kopf calls
    queue           one reconcile at a time for each deployment
    reconcile       gather, plan, execute, report
    gather          reads what there is of one deployment
    room            finds out whether a new pod would fit, for the planner's questions
    work_metrics    metrics of the operator's own work
    metrics_server  /metrics

kopf brings the watches, the peering and the process around it. Its state-keeping handlers are not used: a
plan follows from what there is, so nothing is remembered in annotations, and no finalizer is needed.
"""
