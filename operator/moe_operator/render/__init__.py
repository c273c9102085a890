"""The objects that serve a MoEDeployment, as manifests. Pure.

objects    common parts of all rendered objects
merge      a user's pod template, merged into a rendered one
pods       the parts that worker pods and frontend pods share
model      how a model gets into the worker's container
gang       replicas of several workers: ranks, leader's address, secret, topology
gang_record  what the operator remembers of a gang, as an annotation
worker     the workers' StatefulSets and their headless Service
frontend   the frontend's Deployment, Service and rights
access     what TLS and authentication add to it
internal_tls  what mutual TLS between components adds to pods
network    NetworkPolicies
exposure   the HTTPRoute, the GRPCRoute and the Ingress
inference_pool  the InferencePool
children   all of them, in the order in which they are applied
"""
