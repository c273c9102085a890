"""Carries requests and answers over gRPC.

service     InferenceService, as the frontend offers it
admin       what the operator and the kubelet ask, on a port of its own
authenticating  who calls, before a request is received
bounds      refuses requests that are too large to be valid
metadata    which metadata pass between clients and workers
admission   limits of tenants
turns       requests of tenants wait for slots, in fair order
holding     holds requests while no replica takes any
loads       asks replicas for their load
replicas    the channels to replicas, and what runs on them
watching    what prefix caches of replicas hold
prompts     counts what prefix caches of replicas saved
attempts    one attempt at one replica: the request there, the response back
forwarding  one request, by several attempts; replays the stream of a lost replica
failures    how an attempt can fail, and what the client is told
"""
