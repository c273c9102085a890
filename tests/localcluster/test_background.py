"""What goes on in the background of the node ends for no error that nobody foresaw."""

import asyncio
import errno
import json
import os
import socket
import threading
from types import SimpleNamespace

from localcluster.cri import process, runtime
from localcluster.cri.logs import LogFile
from localcluster.forward import Forward
from localcluster.layout import Layout
from localcluster.network import agent, catalog
from localcluster.node import supervisor
from localcluster.node.components import Component
from moe_api.listwatch import ExpiredError
from moe_api.supervision import Backoff, Supervisor


async def test_an_error_that_nobody_foresaw_makes_the_watch_list_again(monkeypatch):
    """Of a list, of a watch, and of one whose history expired."""
    metadata = {"namespace": "a", "name": "b", "resourceVersion": "1"}
    one = {"apiVersion": "v1", "kind": "ServiceList", "metadata": {"resourceVersion": "1"}}
    one["items"] = [{"metadata": metadata}]
    lists, watches = [KeyError("metadata"), one, one, one], [TypeError("a bug"), ExpiredError()]
    listed_again = asyncio.Event()

    class Broken:
        def get(self, path, query):
            answer = lists.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return json.dumps(answer).encode()

        def stream(self, path, query, silence_s):
            if not watches:
                loop.call_soon_threadsafe(listed_again.set)
                threading.Event().wait(10)
            raise watches.pop(0)

    loop, node = asyncio.get_running_loop(), agent.Agent()
    monkeypatch.setattr(agent, "_SLICES", agent._SERVICES)
    monkeypatch.setattr(node, "_transport", Broken())
    monkeypatch.setattr(node, "_supervisor", Supervisor(backoff=Backoff(0.001)))
    node.watch()
    await asyncio.wait_for(listed_again.wait(), 60)
    node._stopping.set()


async def test_a_forward_says_why_it_resets_connections(monkeypatch, tmp_path):
    layout = Layout(tmp_path)
    layout.network_socket.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(agent, "INSIDE", SimpleNamespace(network_socket=layout.network_socket))
    service = {"metadata": {}, "spec": {"selector": {"app": "a"}, "ports": [{"port": 80}]}}
    node = agent.Agent()
    node.catalog = catalog.build({"users/a": service}, {})
    serving = asyncio.create_task(node.serve_forwards())
    while not layout.network_socket.exists():
        await asyncio.sleep(0)

    def ask():
        """What a client gets, and the reason that is told."""
        with Forward(tmp_path, "users", "a", 80) as opened:
            host, port = opened.address.split(":")
            notice = next(opened.notices())
            with socket.create_connection((host, int(port)), 60) as client:
                try:
                    answer = client.recv(1)
                except ConnectionResetError:
                    answer = b""
        return answer, notice

    answer, notice = await asyncio.wait_for(asyncio.to_thread(ask), 60)
    serving.cancel()
    await node._supervisor.close()
    assert answer == b""
    assert notice == (
        "service users/a has no ready pod for port 80, so connections are reset until it has one; "
        "`kubectl get pods -n users -l app=a` shows its pods"
    )


def test_a_forward_names_services_that_went_and_pods_that_do_not_listen():
    service = {"metadata": {}, "spec": {"ports": [{"port": 80}]}}
    [port] = catalog.build({"users/a": service}, {}).ports["users/a"]
    ends = {
        "metadata": {"namespace": "users", "labels": {"kubernetes.io/service-name": "a"}},
        "addressType": "IPv4",
        "ports": [{"port": 8000}],
        "endpoints": [{"addresses": ["10.0.0.9"]}],
    }
    assert "users/a was deleted" in catalog.build({}, {}).lacks(port)
    assert "no ready pod of service users/a accepts" in catalog.build(
        {"users/a": service}, {"x": ends}
    ).lacks(port)


def echo(text, output):
    """The process that writes `text` to a descriptor."""
    actions = [(os.POSIX_SPAWN_DUP2, output, 1)]
    return os.posix_spawn("/bin/echo", ["echo", text], {}, file_actions=actions)


async def test_a_container_ends_also_where_its_last_words_cannot_be_written(monkeypatch, tmp_path, caplog):
    async def started(spec, stdout, stderr):
        return process.Started(echo("last words", stdout), "")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process, "start", started)
    monkeypatch.setattr(LogFile, "write", full)
    node = runtime.Runtime(tmp_path / "containers", tmp_path / "images.json", [], [])
    pod = SimpleNamespace(
        config=runtime.SandboxConfig("pod", False, str(tmp_path), ""),
        home=tmp_path,
        namespaces=SimpleNamespace(descriptors=()),
    )
    image = SimpleNamespace(name="i", variables={})
    made = node.create(
        pod, runtime.ContainerConfig(image, ("echo",), {}, "", (), False, "c.log", stop_signal=15)
    )
    await node.start(made)
    await asyncio.wait_for(made.ended.wait(), 60)
    assert (made.exit_code, made.running) == (0, False)
    assert "No space left on device" in caplog.text


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
    monkeypatch.setattr(supervisor, "_BACKOFF", Backoff(0.001))
    monkeypatch.setattr(supervisor.children, "ended", lambda: [ended.pop()] if ended else [])
    monkeypatch.setattr(supervisor.children, "kill_orphans", lambda _: None)
    with socket.socket() as listener:
        keeper = supervisor.Supervisor(listener)
    etcd = Component("etcd", ("/etcd",), "")
    keeper._running["etcd"] = SimpleNamespace(pid=1, component=etcd, ended=asyncio.Event())
    keeper.reap()
    async with asyncio.timeout(60):
        while keeper._running["etcd"].pid != 2:
            await asyncio.sleep(0.001)
    assert tries == ["etcd"] * 3
