"""Conversations over gRPC, with the meaning that they have over HTTP.

`messages` (pure) converts requests to those of `moe_frontend.http.schemas`; `chat` serves them.
"""
