"""How `make test` distributes files: every test runs, and no more than two processes have clusters."""

import random
from types import SimpleNamespace

import pytest
from xdist.remote import Producer

from tests.conftest import CLUSTER_FILES, CLUSTERS, FileScheduling


class Node:
    """A process that runs one test at a time; it has to know the next one, or that there is none."""

    def __init__(self, number):
        self.gateway = SimpleNamespace(id=number)
        self.shutting_down = False
        self.waiting, self.files = [], set()

    def send_runtest_some(self, tests):
        self.waiting += tests

    def shutdown(self):
        self.shutting_down = True

    @property
    def can_run(self):
        return len(self.waiting) > (0 if self.shutting_down else 1)


def files(chance):
    in_clusters = [
        f"tests/{name if name.endswith('.py') else name + 'test_some.py'}" for name in CLUSTER_FILES
    ]
    others = [f"tests/worker/test_{number}.py" for number in range(20)]
    return chance.sample(in_clusters, chance.randint(0, len(in_clusters))), others[: chance.randint(0, 20)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_test_runs_and_few_processes_have_clusters(processes):
    for seed in range(100):
        chance = random.Random(seed)
        in_clusters, others = files(chance)
        tests = [f"{f}::{n}" for f in (*in_clusters, *others) for n in range(chance.randint(1, 6))]
        config = SimpleNamespace(
            option=SimpleNamespace(loadscopereorder=False), getvalue=lambda _: ["popen"] * processes
        )
        scheduling = FileScheduling(config, Producer("test", enabled=False))
        nodes = [Node(number) for number in range(processes)]
        for node in nodes:
            scheduling.add_node(node)
        for node in nodes:
            scheduling.add_node_collection(node, tests)
        scheduling.schedule()
        ran = set()
        while able := [node for node in nodes if node.can_run]:
            node = chance.choice(able)
            test = node.waiting.pop(0)
            ran.add(test)
            node.files.add(tests[test].split("::")[0])
            scheduling.mark_test_complete(node, test)
        assert len(ran) == len(tests)
        assert sum(not node.files.isdisjoint(in_clusters) for node in nodes) <= CLUSTERS
