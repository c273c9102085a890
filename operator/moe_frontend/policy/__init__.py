"""What the frontend decides. Pure: no network, no clock, no event loop.

routing   which replica takes the next request, and whether one that failed is tried again
progress  what a client has of its stream, and the request with which another replica continues it
echo      notices a worker that begins a stream anew
"""
