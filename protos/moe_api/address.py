"""Writes and checks addresses of the form ``HOST:PORT``, with an IPv6 host in brackets."""


def check_address(text: str) -> str:
    """Returns the address without surrounding space.

    Raises:
        ValueError: the address is not ``HOST:PORT``; the text is a message for users.
    """
    address = text.strip()
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]") and _is_name(host[1:-1])
    plain = _is_name(host) and not set(host) & set("[]:/ ")
    if not (bracketed or plain) or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8000 or [::1]:8000")
    return address


def _is_name(host: str) -> bool:
    """Whether it can be looked up: Python's functions for sockets raise UnicodeError for other texts."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def split(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of an address that `check_address` accepts."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def join(host: str, port: int) -> str:
    """``HOST:PORT``. host: a name or an IP address without brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
