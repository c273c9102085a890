"""Discovers the leaders of a deployment, and which of them accept requests.

endpoints   reads leaders from EndpointSlices: pure
slices      watches the EndpointSlices of a service
connecting  opens channels to leaders: over mutual TLS to those that serve it
probing     watches the health of every leader
publishing  publishes the routes of this frontend for the operator
"""
