"""The API server. Makes no decisions.

client   reads and writes objects
cache    the copy of observed objects that reads use
watcher  keeps it up to date
peering  which of several operators acts
"""
