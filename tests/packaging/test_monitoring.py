"""Dashboards, alerts and `helm test` of the chart, rendered by helm, against what the processes export."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from benchmarks import dashboard_pictures, dashboards
from localcluster.build import ensure
from tests.packaging import scraped
from tests.packaging.promql import PromqlError, parse
from tests.pki import Authority

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/moe-operator"
BOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = [
    rule for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
UNITS = {"short", "reqps", "ops", "s", "percent", "percentunit", "bytes"}


@pytest.fixture(scope="module")
def exported():
    """Labels of every series that Prometheus has of the three processes, with those of its targets."""
    found = {}
    pods = scraped.TARGET | scraped.OF_DEPLOYMENT
    for process, labels in (
        (scraped.operator, scraped.TARGET),
        (scraped.frontend, pods),
        (scraped.worker, pods),
    ):
        for name, own in scraped.scrape(process).items():
            found.setdefault(name, set()).update(own | labels)
    return found


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """`render(*settings)` gives the objects that `helm template` prints, without the long CRDs."""
    helm, home = ensure(["helm"])["helm"], tmp_path_factory.mktemp("helm")

    def run(*settings):
        words = [helm, "template", "moe-operator", CHART, "--namespace", "moe-system"]
        words += [word for setting in settings for word in ("--set", setting)]
        words += ["--set", "crds.install=false"]
        folders = {f"HELM_{name}_HOME": str(home / name) for name in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            words, env={**os.environ, **folders}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [body for body in yaml.safe_load_all(done.stdout) if body]

    return run


def wrong(text, exported, legend=""):
    """What an expression names that nobody exports."""
    found = parse(text)
    unknown = {f"metric {name}" for name in found.names - exported.keys()}
    known = found.names & exported.keys()
    unknown |= {
        f"{name}{{{label}}}" for name, label in found.matched if name in known and label not in exported[name]
    }
    labels = set().union(found.made, *(exported[name] for name in known))
    unknown |= {f"by ({label})" for label in found.grouped - labels}
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    # Aggregation drops all labels but those that it names.
    left = found.grouped if found.grouped or "sum(" in text else labels
    return unknown | {f"legend {label}" for label in shown - left}


def board(path):
    return json.loads(path.read_text(encoding="utf-8"))


def panels(path):
    return [panel for panel in board(path)["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_name_in_a_panel_is_exported(path, exported):
    found = {
        f"{panel['title']}: {problem}"
        for panel in panels(path)
        for target in panel["targets"]
        for problem in wrong(target["expr"], exported, target["legendFormat"])
    }
    assert not found
    for variable in board(path)["templating"]["list"]:
        if variable["type"] == "query":
            query, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            assert not wrong(query, exported, f"{{{{{label}}}}}")


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_have_units_legends_and_the_chosen_data_source(path):
    body = board(path)
    assert body["uid"] == f"moe-operator-{path.stem}"
    variables = {variable["name"] for variable in body["templating"]["list"]}
    assert variables == {"datasource", "namespace", "deployment"}
    assert len({panel["id"] for panel in body["panels"]}) == len(body["panels"])
    for panel in panels(path):
        chosen = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {item["uid"] for item in chosen} == {"${datasource}"}
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert all(target["legendFormat"] for target in panel["targets"])
        used = set(re.findall(r"\$(?!__)(\w+)", json.dumps(panel["targets"])))
        assert used <= variables
        seconds = ["_seconds_bucket" in target["expr"] for target in panel["targets"]]
        assert not any(seconds) or panel["fieldConfig"]["defaults"]["unit"] == "s"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_single_value_has_its_own_colours(path):
    """Without them, Grafana shows each value of 80 and more in red."""
    for panel in panels(path):
        if panel["type"] == "stat":
            defaults = panel["fieldConfig"]["defaults"]
            assert defaults["color"]["mode"] == ("thresholds" if "thresholds" in defaults else "fixed")


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_shares_of_failures_are_seen(path):
    """On one to 100 %, a failure of 1 % looks like none."""
    for panel in panels(path):
        if re.search(r"^Share of .*(error|500)", panel["description"]):
            assert "max" not in panel["fieldConfig"]["defaults"]
            assert "rate(" not in panel["targets"][0]["expr"], "it leaves out the first failures"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_each_series_of_a_panel_has_a_legend_of_its_own(path):
    """Metrics of a recreated pod differ in labels that no legend shows: they are aggregated."""
    for panel in panels(path):
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert parse(target["expr"]).grouped >= shown, panel["title"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_the_first_event_of_a_kind_is_counted(path):
    """A counter that begins with it, at 1 or more, has had no increase for Prometheus."""
    for panel in panels(path):
        for target in panel["targets"]:
            text = target["expr"]
            for counter, span in re.findall(
                r"increase\((\w+(?:_total|_count)\b(?:\{.*?\})?)\[(.*?)\]\)", text
            ):
                assert f"({counter} unless {counter} offset {span}) or increase({counter}[{span}])" in text


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path):
    taken = set()
    for panel in board(path)["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert max(columns) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_name_in_an_alert_is_exported(rule, exported):
    told = " ".join(rule["annotations"].values())
    legend = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"{{\1}}", told)
    assert not wrong(rule["expr"], exported, legend)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(rule):
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    page, _, section = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert section in anchors


def test_an_error_that_an_alert_leaves_out_exists():
    from moe_operator import errors  # noqa: PLC0415

    (rule,) = (rule for rule in RULES if rule["alert"] == "MoEReconcileErrors")
    (left_out,) = re.findall(r'error_type!~"\|(\w+)"', rule["expr"])
    assert issubclass(getattr(errors, left_out), errors.RetryableError)


@pytest.mark.parametrize(
    "text",
    [
        "sum(rate(moe_worker_steps_total[5m])",
        "rate(moe_worker_requests_queued[5m])",
        'moe_worker_steps_total{pod="a}',
        "rat(moe_worker_steps_total[5m])",
        "rate(moe_worker_steps_total[5 minutes])",
        "sum by pod (moe_worker_steps_total)",
    ],
)
def test_broken_expressions_are_noticed(text):
    with pytest.raises(PromqlError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("moe_worker_request_queued", "metric moe_worker_request_queued"),
        ('moe_worker_requests_queued{modl="a"}', "moe_worker_requests_queued{modl}"),
        ("sum by (layer) (moe_worker_experts_active)", "by (layer)"),
    ],
)
def test_names_that_nobody_exports_are_noticed(text, problem, exported):
    assert wrong(text, exported) == {problem}


def test_nothing_of_it_is_rendered_by_default(render):
    kinds = {body["kind"] for body in render()}
    assert not kinds & {"ConfigMap", "PrometheusRule", "PodMonitor", "ServiceMonitor"}


def test_dashboards_become_config_maps_that_grafana_finds(render):
    settings = ("metrics.dashboards.enabled=true", "metrics.dashboards.annotations.grafana_folder=MoE")
    maps = [body for body in render(*settings) if body["kind"] == "ConfigMap"]
    assert len(maps) == len(BOARDS) == 4
    found = {}
    for body in maps:
        assert body["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert body["metadata"]["annotations"] == {"grafana_folder": "MoE"}
        found |= {name: json.loads(text) for name, text in body["data"].items()}
    assert found == {f"moe-operator-{path.name}": board(path) for path in BOARDS}


def test_alerts_become_a_prometheus_rule(render):
    settings = (
        "metrics.enabled=true",
        "metrics.alerts.enabled=true",
        "metrics.alerts.labels.release=prometheus",
    )
    (rule,) = (body for body in render(*settings) if body["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    with pytest.raises(RuntimeError, match=r"metrics\.alerts\.enabled needs metrics.enabled: set it to true"):
        render("metrics.alerts.enabled=true")


def test_pod_monitors_give_the_labels_that_expressions_use(render):
    monitors = [body for body in render("metrics.podMonitor.enabled=true") if body["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    for body in monitors:
        labels = {re.sub(r"\W", "_", name) for name in body["spec"]["podTargetLabels"]}
        assert labels == scraped.OF_DEPLOYMENT


def test_the_benchmark_scrapes_as_the_prometheus_operator_does(render):
    *pods, operator = dashboards.scrape_configs(render(*dashboards.MONITORS))
    for scrape in (*pods, operator):
        made = {rule.get("target_label") for rule in scrape["relabel_configs"]} - {None}
        of_deployment = set() if scrape is operator else scraped.OF_DEPLOYMENT
        assert made | {"instance"} == scraped.TARGET | of_deployment
    kept = [
        [rule["regex"] for rule in scrape["relabel_configs"] if rule.get("action") == "keep"][1:]
        for scrape in pods
    ]
    assert sorted(kept) == [["frontend", "http"], ["frontend", "metrics"], ["worker", "metrics"]]


def kept(rules, labels):
    """Whether Prometheus scrapes a target with these labels, by its documentation of relabel_config."""
    return all(
        re.fullmatch(rule["regex"], ";".join(labels.get(name, "") for name in rule["source_labels"]))
        for rule in rules
        if rule.get("action") == "keep"
    )


@pytest.mark.parametrize("role", ["worker", "frontend", "other"])
@pytest.mark.parametrize("port", ["grpc", "http", "metrics", "mesh"])
def test_the_documented_configuration_scrapes_what_the_pod_monitors_do(render, role, port):
    text = (ROOT / "docs/observability.md").read_text()
    [documented] = yaml.safe_load(re.search(r"```yaml\n(scrape_configs:.*?)```", text, re.DOTALL)[1])[
        "scrape_configs"
    ]
    monitors = dashboards.scrape_configs(render("metrics.podMonitor.enabled=true"))
    labels = {
        "__meta_kubernetes_pod_label_app_kubernetes_io_part_of": "moe-operator",
        "__meta_kubernetes_pod_label_serving_moe_operator_dev_role": role,
        "__meta_kubernetes_pod_container_port_name": port,
    }
    wanted = any(kept(scrape["relabel_configs"], labels) for scrape in monitors)
    assert kept(documented["relabel_configs"], labels) == wanted
    made = {rule["target_label"] for rule in documented["relabel_configs"] if "target_label" in rule}
    assert made == {"namespace", "pod"} | scraped.OF_DEPLOYMENT


def test_the_benchmark_evaluates_every_panel_and_alert():
    found = dashboards.expressions(120)
    assert len(found) == len(RULES) + sum(len(panel["targets"]) for path in BOARDS for panel in panels(path))
    assert not any(
        "$" in item.text for item in found if item.place != "alerts" or "label_replace" not in item.text
    )
    known = {item.title for item in found}
    assert set(dashboards.EXPLAINED) <= known
    assert dashboards.filled('a{b=~"$deployment"}[$__rate_interval]', 9) == 'a{b=~".*"}[20s]'


def test_the_benchmark_draws_each_panel_with_its_legends():
    named = ("namespace", "pod", "k8s_namespace_name", "serving_moe_operator_dev_name")
    metric = dict.fromkeys(named, "users") | {"le": "1"}
    series = [{"metric": metric, "values": [[0, "0"], [5, "1"], [20, "1"]]}]
    texts = [item.text for item in dashboards.expressions(20)]
    recording = dashboards.Recording(0, 20, dict.fromkeys(texts, series) | {texts[0]: []})
    for name in ("experts", "overview"):
        figure = dashboard_pictures.draw(board(CHART / f"dashboards/{name}.json"), recording)
        written = [text.get_text() for text in figure.texts]
        assert {panel["title"] for panel in panels(CHART / f"dashboards/{name}.json")} <= {*written}
        assert ("No data" in written) is (name == "experts")  # of the first expression
    assert "desired users/users" in written
    assert "1 req/s" in written


class Health(http.server.BaseHTTPRequestHandler):
    """Says that it is well at /healthz, and nowhere else."""

    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_helm_test_asks_the_operator_and_a_frontend(render, served):
    (pod,) = (body for body in render("test.deployment=users/docs") if body["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    python, flag, program, *urls = container["command"]
    assert (python, flag) == ("python", "-c")
    assert urls == [
        "http://moe-operator-test.moe-system:8080/healthz",
        "http://docs-frontend.users:8080/health",
        "grpc://docs-frontend.users:8000",
    ]
    assert run_test(program, f"{served}/healthz") == (0, f"{served}/healthz: 200\n")
    code, said = run_test(program, f"{served}/healthz", f"{served}/health")
    assert code == 1
    assert f"{served}/health: HTTP Error 503" in said


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://otel:4318", 4318), ("https://10.0.0.1", 4317), ("http://otel:4318/", 4318),
        ("http://[fd00::10]", 4317), ("https://[fd00::1]:4318/", 4318),
    ],
)  # fmt: skip
def test_the_operator_may_reach_the_port_of_the_collector(render, endpoint, port):
    found = render("networkPolicy.enabled=true", f"telemetry.otlpEndpoint={endpoint}")
    (policy,) = (body for body in found if body["kind"] == "NetworkPolicy")
    assert policy["spec"]["egress"][-1] == {"ports": [{"port": port}]}


def run_test(program, *urls, ca_file=""):
    """Exit code and output of the test's program."""
    impatient = program.replace("PATIENCE_S = 60.0", "PATIENCE_S = 0.0")
    done = subprocess.run(
        [sys.executable, "-c", impatient, *urls],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CA_FILE": str(ca_file)},
    )
    return done.returncode, done.stdout


@pytest.fixture
def grpc_served(tmp_path):
    """Ports of gRPC servers that are well: in plaintext and with TLS; and the authority's file."""
    authority = Authority()
    pair = authority.pair("localhost")
    (tmp_path / "ca.crt").write_bytes(pair["ca.crt"])
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials([(pair["tls.key"], pair["tls.crt"])])
    plain = server.add_insecure_port("127.0.0.1:0")
    secure = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield plain, secure, tmp_path / "ca.crt"
    server.stop(None)


def test_helm_test_speaks_grpc_and_verifies_certificates(render, grpc_served):
    plain, secure, ca_file = grpc_served
    settings = ("test.deployment=users/docs", "test.tls.enabled=true", "test.tls.caSecret=ca")
    (pod,) = (body for body in render(*settings) if body["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    program, _, *urls = container["command"][2:]
    assert urls == ["https://docs-frontend.users:8080/health", "grpcs://docs-frontend.users:8000"]
    (variable,), (mount,), (volume,) = container["env"], container["volumeMounts"], pod["spec"]["volumes"]
    assert variable == {
        "name": "CA_FILE",
        "value": f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}",
    }
    assert volume["secret"]["secretName"] == "ca"

    found = run_test(program, f"grpc://localhost:{plain}", f"grpcs://localhost:{secure}", ca_file=ca_file)
    assert found == (0, f"grpc://localhost:{plain}: SERVING\ngrpcs://localhost:{secure}: SERVING\n")
    code, said = run_test(program, f"grpcs://localhost:{secure}")  # the system does not know the authority
    assert code == 1
    assert "UNAVAILABLE" in said
    code, said = run_test(program, f"https://localhost:{secure}/health")
    assert code == 1
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_the_charts_metadata_names_the_kinds_and_an_example_that_is_valid():
    from moe_operator.resources import names  # noqa: PLC0415
    from moe_operator.resources.deployment import parse as parse_deployment  # noqa: PLC0415

    notes = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]
    (kind,) = yaml.safe_load(notes["artifacthub.io/crds"])
    crd = yaml.load((ROOT / "crds/moedeployments.yaml").read_text(), yaml.CSafeLoader)
    assert kind["name"] == crd["metadata"]["name"]
    assert kind["version"] in {version["name"] for version in crd["spec"]["versions"]}
    (example,) = yaml.safe_load(notes["artifacthub.io/crdsExamples"])
    example["metadata"] |= {"namespace": "default", "uid": "u", "generation": 1}
    assert parse_deployment(example).name
    images = {item["image"] for item in yaml.safe_load(notes["artifacthub.io/images"])}
    assert images == {names.DEFAULT_OPERATOR_IMAGE, names.DEFAULT_WORKER_IMAGE}


def test_endpoint_pickers_find_the_gauges_that_the_docs_name(exported):
    page = (ROOT / "docs/pods.md").read_text()
    rows = re.findall(r"^\| `(queuedRequestsSpec|runningRequestsSpec|kvUsageSpec)` \| `(\w+)`", page, re.M)
    assert len(rows) == 3
    assert {name for _, name in rows} <= exported.keys()
