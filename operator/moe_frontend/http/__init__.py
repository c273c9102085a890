"""OpenAI's HTTP API, in the process that serves gRPC and by the same routing, holding and replay.

`schemas`, `errors`, `sampling`, `prompts`, `answers` and `logprobs` are pure: what a request means, and what
an answer looks like. `bodies` reads what clients send, within bounds. `exchange` carries one request to the
replicas, and `events` streams. `gate` is what every request passes, `app` has the routes, `server` the port.
"""
