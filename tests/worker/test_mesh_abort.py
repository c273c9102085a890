"""Connections between GPUs end together, while graphs are dropped, or the process ends."""

import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist

from moe_worker.config.mesh import MeshShape
from moe_worker.mesh.abort import Abort
from moe_worker.mesh.errors import RankLostError
from moe_worker.mesh.joining import Identity
from moe_worker.mesh.member import Member
from moe_worker.mesh.pulse import Pulse

LONG_S = 60.0


class Group:
    """Its abort returns when `free` is set; groups that share `begun` all have to begin first."""

    def __init__(self, begun, free):
        self._begun, self._free = begun, free

    def abort(self):
        self._begun.wait(LONG_S)
        self._free.wait(LONG_S)


def test_all_groups_abort_at_the_same_time_and_end_when_graphs_are_gone():
    begun, free = threading.Barrier(3), threading.Event()
    abort = Abort([Group(begun, free) for _ in range(2)], LONG_S)
    begun.wait(LONG_S)
    free.set()
    assert abort.wait()


def test_a_process_whose_exchanges_do_not_end_says_so_and_ends():
    free, ended, said = threading.Event(), threading.Event(), []
    abort = Abort([Group(threading.Barrier(1), free)], 0.05)

    def end(reason):
        said.append(reason)
        ended.set()

    abort.guard(end)
    assert ended.wait(LONG_S)
    assert said == ["exchanges between GPUs were not aborted within 0.05 s"]
    assert not abort.wait()
    free.set()


def test_a_group_that_is_gone_already_is_no_failure(caplog):
    class Gone:
        def abort(self):
            raise RuntimeError("no communicator")

    assert Abort([Gone()], LONG_S).wait()
    assert "did not end in order: no communicator" in caplog.text


def test_a_gpu_rank_that_ends_leaves_its_connections_to_the_end_of_its_process(monkeypatch):
    """Graphs may refer to them, so that they would never end."""
    identity = Identity(MeshShape(1, 2), 1, "digest", b"known")
    member, aborted = Member(identity, 1, ("127.0.0.1", 1), torch.device("cuda", 0)), threading.Event()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    member._groups = [SimpleNamespace(abort=aborted.set)]
    member.close()
    assert not aborted.is_set()


def test_ranks_that_meet_again_end_their_connections_first(monkeypatch):
    identity = Identity(MeshShape(1, 2), 1, "digest", b"known")
    member, events = Member(identity, 1, ("127.0.0.1", 1), torch.device("cuda", 0)), []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: events.append("destroyed"))
    member._groups = [SimpleNamespace(abort=lambda: events.append("aborted"))]
    member._wake_from_exchanges()
    member.leave()
    member._groups = [SimpleNamespace(abort=lambda: events.append("aborted again"))]
    member.leave()
    assert events == ["aborted", "destroyed", "aborted again", "destroyed"]


class Ends:
    """A channel."""

    rank, heard = 1, 0.0

    def __init__(self):
        self.ended = []

    def listen(self, lost):
        self.lose = lost

    def beat(self):
        pass

    def end(self, error):
        self.ended.append(error)


def test_results_mean_nothing_before_kernels_are_woken():
    """Whoever waits for a kernel that an abort woke must find that a rank is lost."""
    found, channels = [], [Ends(), Ends()]
    pulse = Pulse(channels, abort=lambda: found.append(pulse.lost))
    error = RankLostError("rank 1 is gone")
    channels[0].lose(channels[0], error)
    assert found == [error]
    assert [each.ended for each in channels] == [[error], [error]]
    pulse.stop()
