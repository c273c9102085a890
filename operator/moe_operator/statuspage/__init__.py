"""A read-only page for people: `moe status` of all deployments, as graphics.

`report` (pure) describes one deployment; the command `moe status` uses it as well. `overview` (pure) adds the
loads of replicas for all deployments, `collecting` reads what it needs, and `server` has the port. The page
is `page.html`: it has no other resources, and never interprets what it shows as HTML.
"""
