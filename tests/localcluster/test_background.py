"""What goes on in the background of the node ends for no error that nobody foresaw."""

import asyncio
import socket
from types import SimpleNamespace

import pytest

from localcluster.network import watch
from localcluster.node import supervisor
from localcluster.node.components import Component


class Stop(BaseException):
    """Ends what never returns."""


def test_an_error_that_nobody_foresaw_makes_the_watch_list_again(monkeypatch):
    answers = [KeyError("metadata"), ("1", [{"metadata": {"namespace": "a", "name": "b"}}])]

    def listed(_):
        answer = answers.pop(0) if answers else Stop()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def broken(_, version):
        raise TypeError(version)
        yield

    seen = []
    monkeypatch.setattr(watch, "list_objects", listed)
    monkeypatch.setattr(watch, "changes", broken)
    monkeypatch.setattr(watch, "_RETRY", 0.001)
    with pytest.raises(Stop):
        watch.follow("/api/v1/services", seen.append)
    assert [list(objects) for objects in seen] == [["a/b"]]


async def test_a_component_that_cannot_be_started_for_now_is_tried_again(monkeypatch):
    tries = []

    def spawn(self, component):
        tries.append(component.name)
        if len(tries) < 3:
            raise BlockingIOError("Resource temporarily unavailable")
        self._running[component.name] = SimpleNamespace(pid=2)

    ended = [1]
    monkeypatch.setattr(supervisor.Supervisor, "spawn", spawn)
    monkeypatch.setattr(supervisor, "_RESTART_DELAY", 0.001)
    monkeypatch.setattr(supervisor.children, "ended", lambda: [ended.pop()] if ended else [])
    monkeypatch.setattr(supervisor.children, "kill_orphans", lambda _: None)
    with socket.socket() as listener:
        keeper = supervisor.Supervisor(listener)
    etcd = Component("etcd", ("/etcd",), "")
    keeper._running["etcd"] = SimpleNamespace(pid=1, component=etcd, ended=asyncio.Event())
    keeper.reap()
    async with asyncio.timeout(5):
        while keeper._running["etcd"].pid != 2:
            await asyncio.sleep(0.001)
    assert tries == ["etcd"] * 3
