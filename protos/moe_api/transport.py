"""gRPC channel and server options that belong together, for quick news of a dead peer.

A killed process closes its connections, and the peer knows at once. A pod that is cut off says nothing:
only HTTP/2 pings tell. The client pings every 5 s while calls run and gives up 5 s later, so a call on a
dead connection ends with UNAVAILABLE within 10 s (gRPC's own default: never). A server has to allow pings
that frequent, or it answers ENHANCE_YOUR_CALM and closes a healthy connection.

https://github.com/grpc/grpc/blob/master/doc/keepalive.md describes keepalive; that the timeout of pings
(``ping_timeout_ms``, a minute by default) is what counts on a connection where nothing arrives was seen
with grpcio 1.85.
"""

from typing import Final

_KEEPALIVE_MS: Final = 5_000
# Prompts of a long context travel in one message: 128 Ki tokens of text are well under 16 MiB (default 4).
_MAX_MESSAGE_BYTES: Final = 16 * 2**20

_Options = tuple[tuple[str, int], ...]

CLIENT_OPTIONS: Final[_Options] = (
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # The first sets how long one attempt to connect may take (default 20 s), the others how long to
    # wait between attempts (1 s growing to 120 s): a restarted worker is found again within 2 s.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
)

SERVER_OPTIONS: Final[_Options] = (
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings too, so that the streams of a client that vanished are given up.
    ("grpc.keepalive_time_ms", 4 * _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 2 * _KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", 2 * _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # Two processes on one port would share its connections; better that the second one fails to start.
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
)
