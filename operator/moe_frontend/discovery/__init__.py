"""Discovers the leaders of a deployment, and which of them accept requests.

endpoints   reads leaders from EndpointSlices: pure
slices      watches the EndpointSlices of a service
probing     watches the health of every leader
publishing  publishes the routes of this frontend for the operator
"""
