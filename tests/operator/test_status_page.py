"""The status page: what it shows, to whom, and that a browser can load nothing else with it."""

import base64
import hashlib
import http.client
import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from moe_api.supervision import Supervisor
from moe_api.worker.v1 import worker_pb2
from moe_operator.errors import ClusterUnavailableError, InstallationError
from moe_operator.kube.cache import ObjectCache
from moe_operator.resources import names
from moe_operator.statuspage import collecting
from moe_operator.statuspage.collecting import Collector
from moe_operator.statuspage.overview import overview
from moe_operator.statuspage.server import StatusServer

HOSTILE = "<script>document.title='owned'</script>"
BODY = {
    "apiVersion": names.API_VERSION,
    "kind": names.KIND,
    "metadata": {"name": "demo", "namespace": "prod", "uid": "u1", "generation": 3, "resourceVersion": "7"},
    "spec": {"model": {"uri": "hf://a/b", "servedName": "docs"}, "replicas": 2},
    "status": {
        "observedGeneration": 3,
        "readyReplicas": 1,
        "replicas": 2,
        "updatedReplicas": 2,
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "ReplicasNotReady",
                "message": f"1/2 replicas ready {HOSTILE}",
                "lastTransitionTime": "2026-01-31T12:00:00Z",
            }
        ],
        "scaling": {
            "desiredReplicas": 2,
            "requestsPerSecond": 3.5,
            "forecast": {"method": "HarmonicArima", "requestsPerSecond": 5, "lower": 3, "upper": 8},
            "horizon": {"seconds": 120, "coldStarts": 6},
            "capacity": {"requestsPerSecond": 4, "source": "Measured"},
        },
    },
}


def pod(name, address, ready=True, role="worker"):
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "prod",
            "uid": name,
            "resourceVersion": "1",
            "labels": {names.LABEL_NAME: "demo", names.LABEL_ROLE: role, names.LABEL_DATA_RANK: name[-1]},
        },
        "status": {
            "podIP": address,
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


PODS = [
    pod("demo-0", "10.0.0.1"),
    pod("demo-1", "10.0.0.2", ready=False),
    pod("demo-frontend", "10.0.0.3", role="frontend"),
]
EVENT = {
    "involvedObject": {"kind": names.KIND, "uid": "u1"},
    "eventTime": "2026-01-31T12:00:00.000001Z",
    "type": "Normal",
    "reason": "ScaledUp",
    "message": "1 to 2 replicas",
}
ROUTES = {
    "metadata": {"annotations": {names.ANNOTATION_CACHES: '{"promptTokens": 200, "cachedPromptTokens": 150}'}}
}
LOAD = worker_pb2.Load(
    queued=2, running=5, kv_tokens_capacity=1000, kv_tokens_used=955, prompt_tokens=400, prefix_hit_tokens=100
)


def shown():
    return overview([(BODY, PODS, [ROUTES])], [EVENT], {"10.0.0.1": LOAD}, datetime(2026, 1, 31, tzinfo=UTC))


def test_the_overview_has_deployments_loads_cache_hits_forecast_and_decisions():
    (one,) = shown()["deployments"]
    assert (one["namespace"], one["name"], one["replicas"]["desired"]) == ("prod", "demo", 2)
    first, second, _ = sorted(one["pods"], key=lambda pod: pod["name"])
    assert first["load"] == {
        "queued": 2, "running": 5, "kvUsedPercent": 96, "prefixHitPercent": 25, "outputTokens": 0
    }  # fmt: skip
    assert (second["load"], second["ready"]) == (None, False)
    assert one["scaling"]["forecast"]["upper"] == 8
    assert one["caches"] == {"promptTokens": 200, "cachedPromptTokens": 150}
    assert [decision["reason"] for decision in one["decisions"]] == ["ScaledUp"]
    json.dumps(one)


class Cluster:
    """Counts how often Events are listed."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def events_about(self, kind, namespace):
        self.asked.append((kind, namespace))
        if self.error:
            raise self.error
        return [EVENT]


def collector(cluster, asked):
    cache = ObjectCache(frozenset({names.KIND, "Pod"}))
    cache.put(names.KIND, BODY)
    for one in PODS:
        cache.put("Pod", one)

    def loads(addresses):
        asked.append(sorted(addresses))
        return {"10.0.0.1": LOAD}

    return Collector(cluster, cache, (), loads)


def test_many_viewers_cost_one_read(monkeypatch):
    cluster, asked = Cluster(), []
    reading = collector(cluster, asked)
    found = [reading.read() for _ in range(5)]
    assert asked == [["10.0.0.1", "10.0.0.2"]]  # workers, and no frontends
    assert cluster.asked == [(names.KIND, "")]
    assert found[0]["deployments"][0]["decisions"]
    assert found[0]["problems"] == []
    monkeypatch.setattr(collecting, "FRESH_S", 0.0)
    reading.read()
    assert len(asked) == 2


def test_without_the_right_to_read_events_the_rest_is_shown():
    found = collector(Cluster(ClusterUnavailableError("away")), []).read()
    assert found["deployments"][0]["decisions"] == []
    assert found["problems"] == ["decisions are missing: away"]


@pytest.fixture
async def page():
    """A served page; `page.fails` makes reading fail."""
    supervisor, server = Supervisor(), StatusServer(0)

    def read():
        if page.fails:
            raise ValueError("secret")
        return {**shown(), "problems": []}

    class page:  # noqa: N801
        fails = False
        port = server.port
        url = f"http://127.0.0.1:{server.port}"

    server.start(supervisor, read)
    yield page
    server.stop()
    await supervisor.close()


def get(page, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


def test_it_is_read_only_and_for_those_who_ask_for_this_machine(page):
    assert json.loads(get(page, "/status.json")[2])["deployments"][0]["name"] == "demo"
    for method in ("POST", "PUT", "DELETE"):
        assert get(page, "/status.json", method)[0] == 405
    assert get(page, "/status.json", host="attacker.example")[0] == 421
    assert get(page, "/status.json", host="localhost:8081")[0] == 200
    assert get(page, "/../settings.py")[0] == 404
    assert get(page, "/", "HEAD")[2] == ""
    page.fails = True
    status, _, text = get(page, "/status.json")
    assert (status, "secret" in text) == (500, False)


class Elements(HTMLParser):
    """What a page loads, and its inline scripts and styles."""

    def __init__(self):
        super().__init__()
        self.loaded, self.handlers, self.inline, self.inside = [], [], {"script": [], "style": []}, None

    def handle_starttag(self, tag, attributes):
        self.inside = tag if tag in self.inline else None
        self.loaded += [
            value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")
        ]
        self.handlers += [name for name, _ in attributes if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        if self.inside:
            self.inline[self.inside].append(data)

    def handle_endtag(self, tag):
        self.inside = None


def test_the_policy_allows_this_script_and_style_and_nothing_else(page):
    _, headers, text = get(page, "/")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    elements = Elements()
    elements.feed(text)
    assert elements.loaded == []
    assert elements.handlers == []
    for kind, texts in elements.inline.items():
        digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in texts]
        assert policy[f"{kind}-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
        assert digests
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org/2000/svg)",
        text,
    )


def test_a_port_that_is_taken_is_said():
    taken = StatusServer(0)
    with pytest.raises(InstallationError, match="set another MOE_OPERATOR_STATUS_PORT"):
        StatusServer(taken.port)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (apt-get install chromium)")
def test_a_browser_draws_it(page, tmp_path):
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=1150,1000", "--enable-logging=stderr"]
    drawn = subprocess.run(
        [*command, "--dump-dom", page.url], capture_output=True, text=True, timeout=60, check=True
    )
    dom = drawn.stdout
    assert "Refused to" not in drawn.stderr  # what the policy blocks is logged
    assert "1/2 replicas ready" in dom
    assert 'aria-label="forecast: 5 requests/s in 120 s (3 to 8), by HarmonicArima"' in dom
    assert 'aria-label="KV cache 96 %"' in dom
    assert 'aria-label="prefix cache hits 25 %"' in dom
    assert 'aria-label="prefix cache hits 75 %"' in dom
    assert "ScaledUp" in dom
    assert "&lt;script&gt;document.title" in dom
    assert '<th scope="col" class="number">Restarts</th>' in dom
    assert "<title>MoEDeployments</title>" in dom
