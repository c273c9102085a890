"""`moe rollout` against an API server that answers as told: what it waits for, prints and patches."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import kubernetes
import pytest
import yaml
from click.testing import CliRunner

from moe_cli import rollout
from moe_cli.main import main
from moe_operator.resources import names

RESTARTED = names.ANNOTATION_RESTARTED


class Answers(ThreadingHTTPServer):
    """Gives each answer once, the last one for ever; keeps the patches."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.deployment, self.records, self.patches = [], [], []

    def next(self):
        return self.deployment.pop(0) if len(self.deployment) > 1 else self.deployment[0]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        found = {"items": self.server.records} if "controllerrevisions" in self.path else self.server.next()
        self.answer(found)

    def do_PATCH(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.patches.append((self.headers["Content-Type"].rpartition("/")[2], body))
        self.answer(self.server.next())

    def answer(self, found):
        code = found.get("code", 200)
        if code == 0:
            self.close_connection = True
            return
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    made = Answers()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    path = tmp_path / "kubeconfig"
    here = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "prod"}}
    config = {
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{made.server_port}"}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [here],
    }
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setattr(rollout, "_POLL_S", 0.001)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def moe(*words):
    return CliRunner().invoke(main, ["rollout", *words])


def body(reason, *, message="1/1 replicas ready", holds="True", generation=2, seen=2, **metadata):
    condition = {"type": "Progressing", "reason": reason, "message": message, "status": holds}
    return {
        "metadata": {"name": "docs", "generation": generation, **metadata},
        "spec": {"model": {"uri": "file:///m"}, "engine": {"maxBatchSize": 4}},
        "status": {"revision": "bb", "conditions": [{**condition, "observedGeneration": seen}]},
    }


def refusal(code, message, **details):
    return {"kind": "Status", "code": code, "message": message, "details": details}


def record(number, revision, size):
    spec = {"model": {"uri": "file:///m"}, "engine": {"maxBatchSize": size}}
    labels = {names.LABEL_REVISION: revision}
    metadata = {"name": f"docs-{revision}", "labels": labels}
    return {"metadata": metadata, "revision": number, "data": {"spec": spec}}


def test_history_writes_values_as_manifests_do(server):
    server.deployment = [body("Complete")]
    changed = record(2, "bb", 4)
    changed["data"]["spec"] |= {"networkPolicy": {"mode": "Restricted"}, "worker": {"hostNetwork": True}}
    server.records = [record(1, "aa", 4), changed]
    done = moe("history", "docs")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split(maxsplit=3)[3] == (
        'networkPolicy={"mode": "Restricted"}, worker={"hostNetwork": true}'
    )


def test_status_prints_each_change_of_the_reason_or_the_message_once(server):
    server.deployment = [
        body("Complete", seen=1),
        body("RollingOut"),
        body("RollingOut"),
        body("RollingOut", message="2/2 replicas ready"),
        body("Complete", message="2/2 replicas ready"),
    ]
    done = moe("status", "docs")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Waiting: the operator has not reconciled the latest change yet",
        "RollingOut: 1/1 replicas ready",
        "RollingOut: 2/2 replicas ready",
        "Complete: 2/2 replicas ready",
    ]


def test_status_waits_for_a_restart_that_changed_no_generation(server):
    waiting = body("Complete", annotations={RESTARTED: "now"})
    seen = {**waiting, "status": {**waiting["status"], "restartedAt": "now"}}
    server.deployment = [waiting, seen]
    done = moe("status", "docs")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["Waiting", "Complete"]


@pytest.mark.parametrize("away", [refusal(503, "etcd is restarting"), refusal(429, "too many"), {"code": 0}])
def test_status_keeps_waiting_while_the_api_server_restarts(server, away):
    server.deployment = [body("RollingOut"), *[away] * 5, body("Complete")]
    done = moe("status", "docs")
    assert (done.exit_code, done.stderr) == (0, "")
    reasons = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert reasons == ["RollingOut", "Waiting", "Complete"]


def test_ctrl_c_ends_it_silently_with_the_exit_code_of_shells(server, monkeypatch):
    def interrupted(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout.time, "sleep", interrupted)
    server.deployment = [body("RollingOut")]
    done = moe("status", "docs")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "RollingOut: 1/1 replicas ready\n", "")


def test_status_does_not_wait_for_an_api_server_that_stays_away(server, monkeypatch):
    server.deployment = [refusal(503, "etcd is away")]
    never = moe("status", "docs")
    assert (never.exit_code, never.stdout) == (3, "")
    assert never.stderr == "error: the cluster could not serve the request (503 etcd is away); try again\n"
    monkeypatch.setattr(rollout, "PATIENCE_S", 0.01)
    server.deployment = [body("RollingOut"), refusal(503, "etcd is away")]
    assert moe("status", "docs").exit_code == 3


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        (refusal(404, "not found", name="docs"), 2, "no MoEDeployment docs in namespace prod; "),
        (refusal(404, ""), 2, "this cluster does not know MoEDeployments; install the CRD"),
        (
            refusal(403, 'User "me" cannot patch resource "moedeployments"'),
            2,
            'the cluster refuses the request (403 User "me" cannot patch resource "moedeployments"); grant ',
        ),
        (refusal(401, "Unauthorized"), 2, "the cluster does not accept your credentials (401 Unauthorized)"),
        (refusal(409, "modified"), 1, "conflict: the object was modified concurrently (409 modified); "),
        (refusal(422, "spec.replicas: not negative"), 2, "the cluster does not take the change (422 spec."),
        (refusal(429, "too many requests"), 4, "the cluster could not serve the request (429 too many"),
    ],
)
def test_a_refusal_says_what_the_api_server_says(server, answer, code, sentence):
    server.deployment = [answer]
    done = moe("pause", "docs")
    assert done.exit_code == code
    assert done.stderr.startswith(f"error: {sentence}"), done.stderr


def test_pause_and_restart_change_their_field_and_nothing_that_others_set_meanwhile(server):
    server.deployment = [body("Complete")]
    assert moe("pause", "docs").stdout == "docs is paused\n"
    assert moe("restart", "docs").stdout.startswith("docs restarts; ")
    (kind, paused), (_, restarted) = server.patches
    assert (kind, paused) == ("merge-patch+json", {"spec": {"rollout": {"paused": True}}})
    assert [*restarted["metadata"]["annotations"]] == [RESTARTED]


def test_undo_refuses_to_guess_what_was_before_a_change_that_is_not_reconciled(server):
    server.deployment = [body("Complete", generation=3)]
    server.records = [record(1, "aa", 2), record(2, "bb", 8)]
    done = moe("undo", "docs")
    assert (done.exit_code, server.patches) == (1, [])
    assert done.stderr.startswith("error: the operator has not reconciled the latest change of docs yet")
    assert moe("undo", "docs", "--to-revision", "1").exit_code == 0


@pytest.mark.parametrize(
    ("found", "number"), [(body("RollingOut"), 1), (body("InvalidSpec", holds="False"), 2)]
)
def test_undo_of_a_spec_that_made_no_revision_restores_the_newest_one(server, found, number):
    server.deployment = [found]
    server.records = [record(1, "aa", 2), record(2, "bb", 8)]
    done = moe("undo", "docs")
    assert f"docs rolls back to revision {number};" in done.stdout
    ((_, change),) = server.patches
    assert change == [
        {"op": "add", "path": "/spec/engine", "value": {"maxBatchSize": 2 if number == 1 else 8}}
    ]
