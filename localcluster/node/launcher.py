"""Starts the cluster's PID 1 in namespaces of its own: `python -m localcluster.node.launcher STATE_DIR
SOCKET_FD`.

Runs on the host for some milliseconds: binds the API server's host port (a socket stays in the network
namespace where it was made), enters new namespaces, forks PID 1, writes down who that is, and ends. PID 1
waits for the record to be written, so there is never a cluster that `down` cannot find.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from localcluster import linux
from localcluster.errors import NamespacesForbiddenError
from localcluster.layout import Layout
from localcluster.node import init
from localcluster.node.supervisor import report
from localcluster.processes import Record, identify
from localcluster.settings import read_settings

_FORBIDDEN = (
    "this machine does not allow {what} to an ordinary user ({error}). "
    "The local cluster needs unprivileged user namespaces: "
    "on Debian and Ubuntu `sysctl kernel.unprivileged_userns_clone=1` and "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`, "
    "elsewhere `sysctl user.max_user_namespaces=10000`; "
    "in Docker `--privileged`. Or use a cluster that exists already: set KUBECONFIG to its kubeconfig file."
)


def enter_user_namespace() -> None:
    """Makes this process root of a new user namespace in which only the present user exists.

    Raises:
        NamespacesForbiddenError: the machine forbids it; the message says what to do.
    """
    user, group = os.getuid(), os.getgid()
    try:
        linux.unshare(linux.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise NamespacesForbiddenError(
            _FORBIDDEN.format(what="user namespaces", error=error.strerror)
        ) from error


def enter_other_namespaces() -> None:
    """Gives this process its own mounts, network, host name and IPC; and its next child a PID namespace.

    Raises:
        NamespacesForbiddenError: the machine forbids it; the message says what to do.
    """
    kinds = (
        linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWPID
    )
    try:
        linux.unshare(kinds)
    except OSError as error:
        raise NamespacesForbiddenError(_FORBIDDEN.format(what="namespaces", error=error.strerror)) from error


def bind_api_port(port: int) -> socket.socket:
    """A listening socket at 127.0.0.1:port; 0 takes a free port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    return listener


def launch(layout: Layout, progress: socket.socket) -> None:
    """Forks the cluster's PID 1, which never returns from here, and records it."""
    settings = read_settings(layout.settings)
    listener = bind_api_port(settings.api_port)
    enter_user_namespace()
    enter_other_namespaces()
    recorded, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(written)
        if os.read(recorded, 1) != b"w":
            os._exit(1)
        os.close(recorded)
        init.main(layout, settings, listener, progress)
    identity = identify(pid)
    if identity is None:
        raise ChildProcessError(
            f"the cluster's first process {pid} ended at once; see {layout.log('supervisor')}"
        )
    Record(identity).write(layout.record)
    os.write(written, b"w")


def main() -> None:
    """The command line: the state directory and the number of the inherited progress socket."""
    layout = Layout(Path(sys.argv[1]))
    progress = socket.socket(fileno=int(sys.argv[2]))
    try:
        launch(layout, progress)
    except (NamespacesForbiddenError, OSError) as error:
        report(progress, "launcher", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
