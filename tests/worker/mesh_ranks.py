"""The ranks of a mesh as processes of this machine, and what they run.

follow: one rank that follows. follow_and_read_slowly: likewise. dispatch: one of several ranks that exchange
tokens by many random routings, and compare with all experts in one process.

Processes are forked from one that has imported torch: the import takes 2.5 s of a core for each otherwise.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
from pathlib import Path

ROUNDS = 25
PATIENT_S = 60.0
"""Silence after which a rank is lost in tests: on a busy machine a process may stand still for seconds."""
SHORT_STEP_S = 6.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["moe_worker.engine.following"])


def free_address():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Processes:
    """One process for each of `arguments_of_each`, which calls `target`; `errors` is what each wrote."""

    def __init__(self, target, arguments_of_each):
        self._folder = tempfile.TemporaryDirectory(prefix="mesh-ranks-")
        self._files = []
        self.processes = []
        for number, own in enumerate(arguments_of_each):
            self._files.append(Path(self._folder.name) / f"{number}.log")
            arguments = self._files[-1], target, own
            self.processes.append(_FORKS.Process(target=_run, args=arguments, daemon=True))
            self.processes[-1].start()

    @property
    def errors(self):
        return [file.read_text() if file.exists() else "" for file in self._files]

    def send_signal(self, how, number=0):
        os.kill(self.processes[number].pid, how)

    def wait(self, seconds=60):
        """Their exit statuses."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, f"it did not end within {seconds} s: {self.errors}"
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
        self.wait()


def _run(log, target, arguments):
    """In the new process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    target(*arguments)


def followers(checkpoint, ranks, target=None, **options):
    """All ranks but the leader. target: runs one instead of `follow`."""
    return Processes(
        target or follow, [(checkpoint, options | {"mesh_rank": rank}) for rank in range(1, ranks)]
    )


def follow(checkpoint, options):
    from moe_worker.config.engine import EngineOptions  # noqa: PLC0415
    from moe_worker.engine.following import follow  # noqa: PLC0415
    from moe_worker.mesh import pulse  # noqa: PLC0415

    pulse.SILENT_S = PATIENT_S
    follow(Path(checkpoint), EngineOptions(**options))


def follow_and_read_slowly(checkpoint, options):
    """Exchanges may wait for SHORT_STEP_S, and experts are read for longer where ranks meet again."""
    from moe_worker.mesh import member  # noqa: PLC0415
    from moe_worker.mesh.rebalance.hold import HeldExperts  # noqa: PLC0415

    usual, member.STEP_S = HeldExperts.adopt, SHORT_STEP_S

    def slowly(held, moved, layers):
        time.sleep(1.5 * SHORT_STEP_S)
        usual(held, moved, layers)

    HeldExperts.adopt = slowly
    follow(checkpoint, options)


def dispatch(rank, ranks, file):
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    rank, ranks = int(rank), int(ranks)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    for seed in range(ROUNDS):
        _one_routing(random.Random(seed), torch.Generator().manual_seed(seed), rank, ranks)
    dist.destroy_process_group()


def _one_routing(draw, generator, rank, ranks):
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable  # noqa: PLC0415
    from moe_worker.mesh.placement import Topology, placement  # noqa: PLC0415
    from moe_worker.moe.experts import Experts  # noqa: PLC0415
    from moe_worker.quant.matrix import Dense  # noqa: PLC0415

    routed, shared, width = ranks * draw.randint(1, 3), draw.randint(0, 2), 8
    per_token = draw.randint(1, routed)
    counts = [draw.choice([0, 0, 1, 1, 5, 17]) for _ in range(ranks)]
    weights = [torch.randn(routed + shared, *size, generator=generator) for size in ((8, width), (width, 4))]
    loads = [[draw.random() for _ in range(routed)]]
    (places,) = placement(loads, Topology(ranks), ranks * draw.randint(0, 2))
    each = len(places) // ranks
    held = [*places[rank * each : (rank + 1) * each], *range(routed, routed + shared)]
    drawn = []
    for count in counts:  # every rank draws all, and keeps its own
        x_TD = torch.randn(count, width, generator=generator)
        scores_TE = torch.rand(count, routed, generator=generator)
        if draw.random() < 0.3:
            scores_TE[:, : routed // 2] += 1  # some ranks may get nothing
        experts_TK = scores_TE.topk(per_token).indices
        dropped = torch.rand(experts_TK.shape, generator=generator) < draw.choice([0, 0.3, 1])
        experts_TK = experts_TK.masked_fill(dropped, -1)
        experts_TK = torch.cat((experts_TK, torch.arange(routed, routed + shared).expand(count, -1)), dim=1)
        weights_TK = torch.rand(experts_TK.shape, generator=generator).masked_fill(experts_TK < 0, 0)
        drawn.append((x_TD, experts_TK, weights_TK))
    own = drawn[rank]
    table = PlaceTable(places, routed, ranks, torch.device("cpu"))
    exchange = AllToAllDispatch(table, routed, dist.group.WORLD)
    local = Experts(*(Dense(weight[held]) for weight in weights))
    for _ in range(2):  # nothing stays behind from one layer to the next
        received = exchange.scatter(*own)
        outputs = exchange.gather(local.forward(*received))
        expected = Experts(*map(Dense, weights)).forward(*own)
        assert outputs.shape == expected.shape
        assert torch.allclose(outputs, expected, atol=1e-5), (rank, counts)
    if len(places) == routed:  # which copy of an expert computes a token depends on the batch
        factors_A = torch.randn(routed + shared, generator=generator)[held]
        outputs = exchange.gather(
            _scaled(factors_A, *exchange.scatter(*max(drawn, key=lambda each: len(each[0]))))
        )
        of_first = outputs.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(outputs, of_first), f"tokens of rank {rank} have other bits than those of rank 0"


def _scaled(factors_A, x_RD, experts_RK, weights_RK):
    """Experts that multiply by a number each, so that a row has the same bits wherever it stands."""
    shares_RK = factors_A[experts_RK.clamp(min=0)] * weights_RK.masked_fill(experts_RK < 0, 0)
    return (shares_RK.unsqueeze(2) * x_RD.unsqueeze(1)).sum(dim=1)
