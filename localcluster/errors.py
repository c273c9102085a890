"""The errors of the local cluster: one tree, so that a caller can catch `LocalClusterError` and show its
message.
"""

from __future__ import annotations


class LocalClusterError(Exception):
    """An error of the local cluster; the message names the problem and the remedy."""


class BuildError(LocalClusterError):
    """The executables cannot be built; the message says why, and what to do without a compiler."""


class NamespacesForbiddenError(LocalClusterError):
    """This machine does not let an ordinary user make namespaces, so no local cluster can run here."""


class StartError(LocalClusterError):
    """A component did not become ready; the message names it, its log file and the log's last lines."""


class NotRunningError(LocalClusterError):
    """An operation needs a running cluster and there is none in that directory."""


class AlreadyRunningError(LocalClusterError):
    """`up` was asked for a cluster that runs already, or that another process is starting or stopping."""


class ForwardError(LocalClusterError):
    """A port of the host cannot be connected to a service; the message says which services or ports exist."""


class ImageError(LocalClusterError):
    """An image name or an image definition is not usable; the message says what is known or expected."""


class CommandError(LocalClusterError):
    """A tool (kubectl) failed; the message holds its command line, exit code and standard error."""
