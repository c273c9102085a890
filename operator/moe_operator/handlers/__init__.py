"""kopf on one side, `plan` on the other: hears what changed, and reconciles each deployment in turn.

kopf brings the watches, the peering and the process around it. Its state-keeping handlers are not used: a
plan follows from what there is, so nothing is remembered in annotations, and no finalizer is needed.
"""
