"""An HTTP/2 client whose every frame the test decides, for what a well-behaved gRPC client never sends."""

import contextlib
import socket
import time

import h2.config
import h2.connection
import h2.events
import h2.settings

GENERATE = "/moe_api.inference.v1.InferenceService/Generate"


class RawClient:
    """One connection. `window`: bytes of a stream that the server may send before it is told of more."""

    def __init__(self, port, window=65_535):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        values = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        self.h2.local_settings = h2.settings.Settings(client=True, initial_values=values)
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def call(self, request, method=GENERATE, more=()):
        """Starts a call with `more` headers; its stream's number."""
        stream = self.headers(method, more)
        message = request.SerializeToString()
        self.h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        self.flush()
        return stream

    def headers(self, method=GENERATE, more=()):
        """Sends the headers of a call and nothing else."""
        stream = self.h2.get_next_available_stream_id()
        fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "127.0.0.1"}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        self.h2.send_headers(stream, [*fields.items(), *more])
        return stream

    def receive(self, seconds):
        """Answers what the protocol asks to be answered, for so long; all events, None where it ends."""
        events, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65_536)
            except TimeoutError:
                break
            except ConnectionError:
                data = b""
            if not data:
                return [*events, None]
            events += self.h2.receive_data(data)
            with contextlib.suppress(ConnectionError):
                self.flush()
        return events


def answers(events):
    """(stream, gRPC status or None, message) of all header blocks."""
    blocks = (e for e in events if isinstance(e, h2.events.ResponseReceived | h2.events.TrailersReceived))
    fields = ((e.stream_id, {_text(k): _text(v) for k, v in e.headers}) for e in blocks)
    return [(stream, f.get("grpc-status"), f.get("grpc-message")) for stream, f in fields]


def _text(value):
    return value.decode() if isinstance(value, bytes) else value
