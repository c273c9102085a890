"""The processes of a cluster with IPv6 only, in a network namespace without IPv4: with the addresses that the
operator renders and mutual TLS, a mesh of two workers, a frontend and the operator respond as in a cluster.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
# As the kubelet writes it into a pod.
HOSTS = "::1 localhost\nfd00::5 pod\n"
NAMESPACE = """
hostname pod
mount --bind "$1" /etc/hosts
ip link set lo up
ip address add fd00::5/128 dev lo
ip address delete 127.0.0.1/8 dev lo
shift
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_everything_responds_where_there_is_no_ipv4(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny", eos_token_id=None)
    hosts = tmp_path / "hosts"
    hosts.write_text(HOSTS)
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
    command += ["sh", "-ec", NAMESPACE, "sh", hosts, sys.executable, "-m", "tests.soak.ipv6_pod", checkpoint]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("tokens") == 8
    assert set(found.values()) == {200}, found
    metrics = {f"{one} metrics" for one in ("worker", "second worker", "frontend")}
    assert set(found) == {"completion", "operator health", *metrics}
