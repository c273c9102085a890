"""From a MoEDeployment and what was observed to a plan. Pure: reads no clock, no cluster, no network.

    moves       which replicas are created and which are deleted now
    gangs       replicas of several workers: all or nothing, bounded restarts
    mesh        what their leaders report, for the status
    placement   whether a new pod would fit in the place of an old one
    gates       when a leader's readiness gate opens
    pinning     keeps pods as they were rendered until an edit
    revisions   records the spec of each revision
    changes     which objects have to be applied, and why: drift and ownership decide
    state       the numbers from which the conditions follow; rollout_progress, frontend_state: parts of it
    conditions  the conditions, by the conventions of Kubernetes
    status_report  the status that a reconcile writes, and what changed in it
    host_paths  whether the administrator allows the directories of nodes that a deployment mounts
    decision    a reason and a sentence for people
    plan        combines them: (deployment, observed, now) -> Plan

`moe_operator.executor` executes a plan.
"""
