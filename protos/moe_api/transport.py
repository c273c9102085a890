"""gRPC channel and server options that belong together, so that both ends detect a dead connection soon.

When a process is killed, the kernel closes its connections and the other end learns of it at once. A pod that
is cut off sends nothing: only HTTP/2 pings detect it. The client pings every 5 s while calls run and gives up
5 s later, so a call on a dead connection ends with UNAVAILABLE within 10 s (gRPC's default: never). The
server has to allow such frequent pings; otherwise it sends ENHANCE_YOUR_CALM and closes a healthy connection.

https://github.com/grpc/grpc/blob/master/doc/keepalive.md describes keepalive; that the timeout of pings
(``ping_timeout_ms``, a minute by default) is what counts on a connection where nothing arrives was seen
with grpcio 1.85.
"""

from typing import Final

_KEEPALIVE_MS: Final = 5_000
# Prompts of a long context travel in one message: 128 Ki tokens of text are well under 16 MiB (default 4).
_MAX_MESSAGE_BYTES: Final = 16 * 2**20
# Requests slightly too long for a small model get our own error message instead of gRPC's.
_MIN_MESSAGE_BYTES: Final = 2**20

_MAX_METADATA_BYTES: Final = 16 * 2**10

_Options = tuple[tuple[str, int], ...]

# One bit for each algorithm; the lowest stands for "identity". gRPC refuses other messages with UNIMPLEMENTED
# before it decompresses them: 15 KB of gzip would become 15 MiB.
_UNCOMPRESSED: Final = ("grpc.compression_enabled_algorithms_bitset", 1)

CLIENT_OPTIONS: Final[_Options] = (
    _UNCOMPRESSED,
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # The first limits one connection attempt (default 20 s), the others the pause between attempts (1 s
    # growing to 120 s): a client reconnects to a restarted worker within 2 s.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
)


# Concurrent calls of one connection; more wait at the client. This bounds how far a client that resets its
# calls as fast as it starts them gets ahead of the server.
_STREAMS: Final = 256

_SERVER_OPTIONS: Final[_Options] = (
    _UNCOMPRESSED,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings too, so that it ends the streams of a client that vanished.
    ("grpc.keepalive_time_ms", 4 * _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 2 * _KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", 2 * _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # A connection that does not start HTTP/2, or does not acknowledge our settings, is closed.
    ("grpc.server_handshake_timeout_ms", 2 * _KEEPALIVE_MS),
    ("grpc.http2.settings_timeout", 2 * _KEEPALIVE_MS),
    # A connection without calls is closed; an old one accepts no new calls and ends with its last one.
    ("grpc.max_connection_idle_ms", 5 * 60_000),
    ("grpc.max_connection_age_ms", 60 * 60_000),
    ("grpc.max_allowed_incoming_connections", 1_000),
    # Calls on all connections that Python has not accepted yet. Above the first number gRPC cancels some of
    # them at random, on any connection; its default of 1,000 is less than one connection can reset in a
    # second.
    ("grpc.server.max_pending_requests", 256 * _STREAMS),
    ("grpc.server.max_pending_requests_hard_limit", 512 * _STREAMS),
    # Without this the window of each stream grows with the bandwidth, to megabytes for messages that nobody
    # reads yet. While the server reads one, gRPC opens the window for all of it anyway.
    ("grpc.http2.bdp_probe", 0),
    # Metadata of a request. Between the two limits (8 and 16 KiB by default) gRPC refuses requests at random:
    # some of those with a long token.
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
    # Two processes on one port would share its connections; the second one should fail to start instead.
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)


def server_options(most_bytes: int = _MAX_MESSAGE_BYTES, most_streams: int = _STREAMS) -> _Options:
    """Options of a server.

    Args:
        most_bytes: size of the largest valid request, limited to between 1 and 16 MiB; gRPC refuses larger
        messages with RESOURCE_EXHAUSTED before it buffers them.
        most_streams: concurrent calls of one connection.
    """
    received = min(max(most_bytes, _MIN_MESSAGE_BYTES), _MAX_MESSAGE_BYTES)
    return (
        *_SERVER_OPTIONS,
        ("grpc.max_concurrent_streams", most_streams),
        ("grpc.max_receive_message_length", received),
    )


SERVER_OPTIONS: Final = server_options()
