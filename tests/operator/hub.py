"""The stand-in of a hub in a pod: serves a folder of the node as hf://moe/docs, slowly if asked to.

python hub.py FOLDER SECONDS
"""

import sys
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.worker.remote import Handler, Remote


class Slow(Handler):
    def _file(self, content, *given):
        if len(content) > 1 << 20:
            time.sleep(float(sys.argv[2]))
        super()._file(content, *given)


files = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir() if path.is_file()}
Slow.remote = Remote(files)
ThreadingHTTPServer(("0.0.0.0", 8080), Slow).serve_forever()  # noqa: S104 - in a pod of its own
