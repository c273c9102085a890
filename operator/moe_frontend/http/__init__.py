"""OpenAI's HTTP API, in the process that serves gRPC and by the same routing, holding and replay.

`schemas`, `errors`, `sampling`, `prompts`, `formats`, `conversation`, `answers`, `logprobs` and `openapi` are
pure: the meaning of requests, and the form of answers. `completions` and `chats` are the two endpoints.
`bodies` reads what clients send, within bounds. `exchange` carries one request to the replicas, and `events`
streams. `gate` is what every request passes, `app` has the routes, `measures` the metrics, `server` the port,
`protocol` its bounds.
"""
