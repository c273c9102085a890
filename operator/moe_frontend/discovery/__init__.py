"""Which leaders there are, and which of them take requests.

endpoints   leaders as EndpointSlices name them: pure
slices      watches the EndpointSlices of a service
probing     watches the health of every leader
publishing  writes where this frontend sends requests, for the operator
"""
