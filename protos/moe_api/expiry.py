"""Metrics of when certificates expire: of those that a process uses now, whatever its Secret holds by now."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from moe_api.tls import KeyPair

INTERNAL: Final = "internal"
"""Of the connections between frontends, workers and the operator."""
CLIENT: Final = "client"
"""Of the ports that clients connect to."""
USE: Final = "moe.certificate.use"
Life = tuple[datetime, datetime]


def life(pair: KeyPair) -> Life:
    """From when to when the certificate of the chain that expires first is valid.

    Raises:
        ValueError: there is no certificate in PEM.
    """
    # A quarter of a second, which processes without TLS save.
    from cryptography import x509  # noqa: PLC0415

    chain = x509.load_pem_x509_certificates(pair.certificate)
    first = min(chain, key=lambda one: one.not_valid_after_utc)
    return first.not_valid_before_utc, first.not_valid_after_utc


def measure(meter: Meter, used: Mapping[str, Callable[[], KeyPair]]) -> None:
    """Creates gauges of both ends of a certificate's life, in seconds since 1970.

    used: the key pair in use, by INTERNAL or CLIENT; read at each export.
    """
    if not used:
        return

    def read(end: int) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for use, current in used.items():
                yield Observation(life(current())[end].timestamp(), {USE: use})

        return observe

    for end, name, said in (
        (0, "not_before", "From when the certificate in use is valid"),
        (1, "not_after", "When the certificate in use expires"),
    ):
        meter.create_observable_gauge(f"moe.certificate.{name}.timestamp", [read(end)], "s", said)
