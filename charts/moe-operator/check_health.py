"""`helm test`: waits until each URL of the command line answers with 200; exits with 1 if one does not."""

import sys
import time
import urllib.request

PATIENCE_S = 60.0


def answer(url: str) -> str:
    """The status of a URL, or the error."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - URLs of the chart
            return str(response.status)
    except OSError as error:
        return str(error)


def healthy(url: str, deadline: float) -> bool:
    """Whether the URL answers with 200 before the deadline, in seconds of the monotonic clock."""
    while (said := answer(url)) != "200" and time.monotonic() < deadline:
        time.sleep(1)
    print(f"{url}: {said}", flush=True)
    return said == "200"


if __name__ == "__main__":
    end = time.monotonic() + PATIENCE_S
    results = [healthy(url, end) for url in sys.argv[1:]]
    sys.exit(not all(results))
