"""What the frontend decides. Pure: no network, no clock, no event loop.

routing   which replica takes the next request, and whether one that failed is tried again
balancing the routing policies: what each replica costs for a request
prefixes  which replica was sent which beginnings of prompts
watched   which replica says that it holds which beginnings of prompts
progress  what a client has of its stream, and the request with which another replica continues it
echo      notices a worker that begins a stream anew
salt      separates clients in caches that they share
tenants   what tenants may use
fair      the order in which requests of tenants are served
costs     the tokens of a request
"""
