"""From a MoEDeployment to the objects that serve it. Pure: reads no clock, no cluster, no network.

`children` renders the objects, `observed` reads what there is, `rollout` decides which replicas change now,
`conditions` says what state that is, and `plan` puts it together: (deployment, observed, now) -> Plan.
"""
