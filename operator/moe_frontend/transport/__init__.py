"""Carries requests and answers over gRPC.

service     InferenceService, as the frontend offers it
bounds      refuses requests that are too large to be valid
metadata    which metadata pass between clients and workers
holding     holds requests while no replica takes any
replicas    the channels to replicas, and what runs on them
forwarding  one request to a replica, and its answer back; replays the stream of a lost replica
failures    how an attempt can fail, and what the client is told
"""
