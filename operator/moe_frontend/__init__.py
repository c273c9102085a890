"""The router in front of the leaders of a deployment; it needs no torch.

main, serving   the command `moe-frontend` and its process; parameters: types of its options
listening       the ports
edges           TLS and authentication, from the command line
identity        who sends a request, and how that is proved
discovery       which leaders there are, and which of them take requests
policy          which replica takes a request, and how another one continues its stream: pure
transport       carries requests and answers over gRPC
http            OpenAI's HTTP API
rpc             conversations over gRPC
chat            chat templates, and tool calls and reasoning in answers
outputs         the output cache
"""
