"""What `moe status` shows, drawn: a page for people, read-only.

`report` (pure) describes one deployment; the command `moe status` uses it as well. `overview` (pure) adds the
loads of replicas for all deployments, `collecting` reads what it needs, and `server` has the port. The page
is `page.html`: it has no other resources, and what it shows never becomes HTML.
"""
