"""gRPC calls to workers and frontends.

dialing    opens channels to pods: over mutual TLS to those that serve it
leader     calls of a reconcile to one leader, and to a pod that downloads the model
mesh       reports of leaders about the ranks of their gangs
frontends  the routes of frontends
together   several blocking calls at the same time
pods       calls from an event loop, over connections that stay open: load, waiting requests
"""
