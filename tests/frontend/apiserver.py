"""A real etcd and kube-apiserver on loopback, without nodes: enough to hold EndpointSlices."""

import contextlib
import socket
import subprocess
import sys
import time

import kubernetes
import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from localcluster import build
from localcluster.progress import Reporter

ACCESS = "only-for-this-test"
LESS_ACCESS = "as-far-as-roles-say"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class ApiServer:
    """Can be killed and started again on the same port and data."""

    def __init__(self, directory):
        with Reporter(sys.stderr) as reporter:
            self.executables = build.ensure(["etcd", "kube-apiserver", "kubectl"], reporter.show)
        self.directory = directory
        self.port, self.etcd_port = free_port(), free_port()
        self.processes = {}
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (directory / "sa.key").write_bytes(pem)
        (directory / "tokens.csv").write_text(
            f"{ACCESS},admin,admin,system:masters\n{LESS_ACCESS},somebody,somebody\n"
        )

    def client(self):
        configuration = kubernetes.client.Configuration(host=f"https://127.0.0.1:{self.port}")
        configuration.verify_ssl = False
        configuration.retries = False
        configuration.api_key = {"authorization": f"Bearer {ACCESS}"}
        return kubernetes.client.ApiClient(configuration)

    def start_etcd(self):
        url, peers = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{free_port()}"
        self._spawn(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        )

    def start(self):
        key = self.directory / "sa.key"
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self.directory / 'pki'}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
        )
        self.wait()

    def wait(self, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                kubernetes.client.CoreV1Api(self.client()).read_namespace("default", _request_timeout=5)
                return
            except (kubernetes.client.ApiException, urllib3.exceptions.HTTPError):
                if time.monotonic() > deadline or self.processes["kube-apiserver"].poll() is not None:
                    raise AssertionError(
                        (self.directory / "kube-apiserver.log").read_text()[-3000:]
                    ) from None
                time.sleep(0.1)

    def kill(self, name="kube-apiserver"):
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def _spawn(self, name, *args):
        with (self.directory / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen([self.executables[name], *args], stdout=log, stderr=log)


@contextlib.contextmanager
def running_api_server(directory):
    server = ApiServer(directory)
    try:
        server.start_etcd()
        server.start()
        yield server
    finally:
        for name in list(server.processes):
            server.kill(name)
