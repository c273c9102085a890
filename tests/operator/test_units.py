"""The small pure parts: quantities, drift, revisions, log lines, the queue's pauses, peering."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity

from moe_operator.autoscaling.subject import scaling_spec
from moe_operator.controller.queue import backoff
from moe_operator.errors import InstallationError, InvalidSpecError
from moe_operator.kube import peering
from moe_operator.observed.problems import error_sentence
from moe_operator.planner.drift import first_difference
from moe_operator.render import worker
from moe_operator.resources import quantity
from moe_operator.resources.deployment import parse
from moe_operator.resources.engine_spec import Engine, EngineRouting
from moe_operator.resources.rollout_spec import Rollout
from moe_operator.resources.scaling_spec import Scaling
from moe_operator.settings import Settings, from_environment
from moe_worker.config.engine import BOUNDS
from moe_worker.service.command import serve
from tests.operator.worlds import deployment

SUFFIXES = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "e3", "E-2"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.decimals(0, 10**6, places=3), st.sampled_from([s for s in SUFFIXES if not s.lower().startswith("e")])
)
def test_quantities_mean_what_the_kubernetes_client_says(number, suffix):
    text = f"{number}{suffix}"
    assert quantity.parse(text) == parse_quantity(text)


@pytest.mark.parametrize(("text", "value"), [("12e6", 12_000_000), ("1E", 10**18), ("2E-2", Decimal("0.02"))])
def test_quantities_with_exponents(text, value):
    assert quantity.parse(text) == value


@pytest.mark.parametrize("text", ["", "Mi", "512MiB", "1 Gi", "0x10", "1.2.3"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match="is not a quantity; write a number"):
        quantity.parse(text)


@given(JSON)
def test_nothing_differs_from_itself(value):
    assert first_difference(value, value) is None


def test_a_difference_is_named_by_its_path():
    desired = {"spec": {"containers": [{"name": "a", "args": ["x", "y"]}, {"name": "b", "image": "i"}]}}
    actual = {"spec": {"containers": [{"name": "b", "image": "j"}, {"name": "a", "args": ["x", "y"]}]}}
    assert first_difference(desired, actual) == "spec.containers[b].image"
    actual["spec"]["containers"][0]["image"] = "i"
    actual["spec"]["containers"][1]["args"].append("z")
    assert first_difference(desired, actual) == "spec.containers[a].args"


def test_only_what_changes_the_pods_changes_the_revision():
    base = worker.revision(deployment())
    assert worker.revision(deployment(replicas=5)) == base
    assert worker.revision(deployment(frontend={"replicas": 3})) == base
    assert worker.revision(deployment(engine={"contextLength": 512})) != base
    assert worker.revision(deployment(worker={"env": [{"name": "A", "value": "1"}]})) != base


def test_what_the_spec_leaves_open_is_left_to_the_worker():
    flags = ("--context-length", "--format", "--kv-dtype", "--generation-config", "--config-override")
    flags += ("--kv-offload", "--routing-mass", "--routing-margin", "--learn-routing", "--prefill-tokens")
    for flag in (*flags, "--target-step-ms"):
        assert flag not in worker.command(deployment())
    chosen = {"contextLength": 512, "kvMemory": "2Gi", "format": "w4a8", "kvDtype": "fp8"}
    chosen |= {
        "kvOffload": "1.5Gi",
        "prefillTokens": 8192,
        "targetStepMilliseconds": 200,
        "generationConfig": "Auto",
        "configOverride": '{"rope_theta": 1e6}',
        "routing": {"mass": "800m", "margin": "50m", "learning": "Online"},
    }
    command = worker.command(deployment(engine=chosen))
    assert command[command.index("--generation-config") + 1] == "auto"
    assert command[command.index("--config-override") + 1] == '{"rope_theta": 1e6}'
    assert command[command.index("--routing-mass") + 1] == "0.8"
    assert command[command.index("--routing-margin") + 1] == "0.05"
    assert "--learn-routing" in command
    assert command[command.index("--format") + 1] == "w4a8"
    assert command[command.index("--kv-dtype") + 1] == "fp8"
    assert command[command.index("--context-length") + 1] == "512"
    assert command[command.index("--kv-memory") + 1] == str(2 * 1024**3)
    assert command[command.index("--kv-offload") + 1] == str(3 * 1024**3 // 2)
    assert command[command.index("--prefill-tokens") + 1] == "8192"
    assert command[command.index("--target-step-ms") + 1] == "200"


GPU = {"resources": {"limits": {"nvidia.com/gpu": 1}}}


@pytest.mark.parametrize(
    ("settings", "batch", "memory"),
    [
        ({}, "16", str(1 << 29)),
        ({"worker": GPU}, "256", None),
        ({"worker": {"acceleratorPercentage": 100}}, "256", None),
        ({"worker": {"acceleratorPercentage": 50, "acceleratorResource": "a.b/half"}}, "16", str(1 << 29)),
        ({"worker": GPU, "engine": {"device": "cpu"}}, "16", str(1 << 29)),
        ({"worker": GPU, "engine": {"maxBatchSize": 8, "kvMemory": "1Gi"}}, "8", str(1 << 30)),
    ],
)
def test_batch_and_cache_fill_a_gpu_that_a_worker_has_to_itself(settings, batch, memory):
    of = deployment(**settings)
    words = worker.command(of)
    assert words[words.index("--max-batch-size") + 1] == batch
    assert scaling_spec(of.spec, Scaling(max_replicas=2)).capacity_prior == pytest.approx(6 * int(batch))
    assert (words[words.index("--kv-memory") + 1] if "--kv-memory" in words else None) == memory
    assert memory is not None or words[words.index("--device") + 1] == "cuda"


@pytest.mark.parametrize(
    ("verification", "flags"),
    [("None", {"--no-check-weights"}), ("Weights", set()), ("Digests", {"--check-digests"})],
)
def test_the_verification_of_a_checkpoint_is_a_flag_of_the_worker(verification, flags):
    command = worker.command(deployment(engine={"verification": verification}))
    assert {word for word in command if "check" in word and word.startswith("--")} == flags
    known = {flag for option in serve.params for flag in (*option.opts, *option.secondary_opts)}
    assert flags <= known


def test_a_variable_of_the_user_wins_over_ours():
    spec = deployment(worker={"env": [{"name": "OTEL_SERVICE_NAME", "value": "mine"}]})
    env = worker.pod_spec(spec)["containers"][0]["env"]
    assert [item["value"] for item in env if item["name"] == "OTEL_SERVICE_NAME"] == ["mine"]


def test_traces_are_off_unless_there_is_an_endpoint():
    def endpoint(**spec):
        env = worker.pod_spec(deployment(**spec))["containers"][0]["env"]
        return [item["value"] for item in env if item["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT"]

    assert endpoint() == []
    assert endpoint(telemetry={"otlpEndpoint": "http://otel:4317"}) == ["http://otel:4317"]


def test_the_last_error_line_is_the_sentence():
    assert error_sentence("error: first\nloading\nerror: second: it is so\n") == "second: it is so"
    assert error_sentence("Traceback\nValueError: error: inside") is None


def test_a_spec_that_got_past_the_crd_is_refused_with_every_field_named():
    body = {
        "metadata": {"namespace": "n", "name": "x", "uid": "u"},
        "spec": {"model": {}, "replicas": "many"},
    }
    with pytest.raises(InvalidSpecError) as caught:
        parse(body)
    for field in ("spec.model.uri", "spec.replicas"):
        assert field in str(caught.value)


@pytest.mark.parametrize("parallelism", [{"pipeline": 2}, {"expert": 2}])
def test_learning_of_several_workers_is_refused_after_edits_too(parallelism):
    """CEL counts `expert` at creation only."""
    spec = {"model": {"uri": "file:///mnt/models/x"}, "engine": {"routing": {"learning": "Online"}}}
    body = {"metadata": {"namespace": "n", "name": "x", "uid": "u"}, "spec": spec}
    assert parse(body).spec.engine.routing.learning == "Online"
    with pytest.raises(InvalidSpecError, match=r"learning Online is for replicas of one worker: set"):
        parse({**body, "spec": {**spec, "parallelism": parallelism}})


def test_the_spec_and_the_engine_have_the_same_bounds_of_mass():
    (rule,) = EngineRouting.model_fields["mass"].json_schema_extra["x-kubernetes-validations"]
    least, most = map(quantity.parse, re.findall(r"quantity\('(\w+)'\)", rule["rule"]))
    (flag,) = (option.type for option in serve.params if "--routing-mass" in option.opts)
    assert (float(least), float(most)) == BOUNDS["routing_mass"] == (flag.min, flag.max)


@pytest.mark.parametrize(
    ("field", "flag", "otherwise"),
    [
        ("context_length", "--context-length", None),
        ("max_batch_size", "--max-batch-size", "otherwise 16"),
        ("prefill_tokens", "--prefill-tokens", "Default: 2048"),
        ("target_step_milliseconds", "--target-step-ms", "Default: 50"),
    ],
)
def test_the_crd_allows_what_a_worker_takes_and_tells_its_default(field, flag, otherwise):
    described = Engine.model_fields[field]
    (rule,) = described.json_schema_extra["x-kubernetes-validations"]
    least, most = map(int, re.findall(r"self [<>]= (\d+)", rule["rule"]))
    (option,) = (option for option in serve.params if flag in option.opts)
    assert BOUNDS[option.name][0] <= least <= most <= BOUNDS[option.name][1]
    if otherwise is not None:
        assert f"{otherwise}." in described.description
        assert float(otherwise.rpartition(" ")[2]) == option.default


def test_fields_of_a_newer_crd_are_passed_over():
    """`helm upgrade` changes the CRD first: its defaults reach the operator that is about to be replaced."""
    spec = {"model": {"uri": "file:///mnt/models/x"}, "speed": "fast", "engine": {"warp": 9}}
    body = {"metadata": {"namespace": "n", "name": "x", "uid": "u"}, "spec": spec}
    known = {"model": {"uri": "file:///mnt/models/x"}}
    assert parse(body).spec == parse({**body, "spec": known}).spec


def test_settings_come_from_the_environment_and_are_checked():
    assert from_environment({"MOE_OPERATOR_WORKERS": "3"}) == Settings(workers=3)
    assert from_environment({}) == Settings()
    with pytest.raises(
        InstallationError, match="MOE_OPERATOR_DEBOUNCE_SECONDS is 'soon'; it must be a number"
    ):
        from_environment({"MOE_OPERATOR_DEBOUNCE_SECONDS": "soon"})


@pytest.mark.parametrize(
    ("text", "names"),
    [("", ()), (" ", ()), ("a", ("a",)), (" b , a,,b\n", ("b", "a")), ("0-9," + "x" * 63, ("0-9", "x" * 63))],
)
def test_namespaces_are_read_one_by_one_and_each_once(text, names):
    assert from_environment({"MOE_OPERATOR_WATCH_NAMESPACES": text}).namespaces == names


@pytest.mark.parametrize(
    "text", ["*", "a,team-*", "!a", ",", " , ", "a b", "A", "-a", "a.b", "x" * 64, "é", "a,/b"]
)
def test_what_names_no_namespace_does_not_become_a_scope(text):
    """kopf would take a pattern, which nothing else does; separators alone would mean all namespaces."""
    with pytest.raises(
        InstallationError, match=r"NAMESPACES is .* not the name of a namespace; separate names"
    ):
        from_environment({"MOE_OPERATOR_WATCH_NAMESPACES": text})


def test_the_operator_says_in_one_sentence_which_setting_is_wrong():
    command = [sys.executable, "-m", "moe_operator"]
    environment = {**os.environ, "MOE_OPERATOR_WATCH_NAMESPACES": "*"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: MOE_OPERATOR_WATCH_NAMESPACES is '*', and '*' is not the name")
    assert ended.stderr.count("\n") == 1


def test_0_turns_the_ports_of_the_operator_off_and_other_settings_refuse_it():
    given = {"MOE_OPERATOR_METRICS_PORT": "0", "MOE_OPERATOR_STATUS_PORT": "0"}
    assert from_environment(given) == Settings(metrics_port=0, status_port=0)
    for variable, text, expected in (
        ("STATUS_PORT", "-1", "a whole number of 0 or more"),
        ("STATUS_PORT", "1.5", "a whole number of 0 or more"),
        ("WORKERS", "0", "a whole number of 1 or more"),
        ("RESYNC_SECONDS", "0", "a number above 0"),
        ("RESYNC_SECONDS", "nan", "a number above 0"),
        ("RESYNC_SECONDS", "inf", "a number above 0"),
        ("RESYNC_SECONDS", "1e10", "a number above 0, 1000000000 at most"),
        ("METRICS_PORT", "65536", "a whole number of 0 or more, 65535 at most"),
    ):
        with pytest.raises(InstallationError, match=f"_{variable} is '{text}'; it must be {expected}"):
            from_environment({f"MOE_OPERATOR_{variable}": text})


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True), st.floats(0.1, 10))
def test_pauses_grow_up_to_a_limit_and_are_spread_over_their_second_half(failures, chance, patience):
    settings = Settings()
    longest = backoff(settings, failures, patience, 0.0)
    assert settings.retry_first_seconds <= longest / patience <= settings.retry_most_seconds * (1 + 1e-9)
    assert longest <= backoff(settings, failures + 1, patience, 0.0)
    assert longest / 2 <= backoff(settings, failures, patience, chance) <= longest


def test_the_process_that_started_last_ranks_highest_and_an_expired_record_counts_for_nothing():
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert peering.priority(start + timedelta(milliseconds=1)) > peering.priority(start)
    record = {"priority": 1, "lifetime": 20, "lastseen": start.isoformat()}
    assert peering.Record.parse(record).expires == start + timedelta(seconds=20)


@pytest.mark.parametrize(("whole", "grace"), [(60, None), (600, "595"), (5, "3"), (0, "0")])
def test_a_worker_hands_off_its_streams_before_its_pod_is_killed(whole, grace):
    spec = worker.pod_spec(deployment(worker={"terminationGracePeriodSeconds": whole}))
    environment = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
    assert environment.get("MOE_WORKER_GRACE") == grace


@pytest.mark.parametrize(
    ("rollout", "paused"),
    [
        ({}, False),
        ({"pause": True}, True),
        ({"pause": False}, False),
        ({"paused": True}, True),
        ({"paused": False, "pause": True}, False),
        ({"paused": True, "pause": False}, True),
    ],
)
def test_paused_takes_precedence_over_the_deprecated_pause(rollout, paused):
    assert Rollout.model_validate(rollout).is_paused is paused


@pytest.mark.parametrize(
    ("scaling", "latency_s", "throughput"),
    [
        ({}, 2.5, None),
        ({"latencyTargetSeconds": 0.5, "priorRequestsPerSecond": 1.5}, 0.5, 1.5),
        ({"latencyTargetMilliseconds": 250, "priorThroughput": "500m"}, 0.25, 0.5),
        ({"latencyTargetMilliseconds": 250, "latencyTargetSeconds": 2.5, "priorThroughput": 3}, 0.25, 3.0),
        ({"priorThroughput": "1.5", "priorRequestsPerSecond": 9.0}, 2.5, 1.5),
    ],
)
def test_new_fields_of_scaling_take_precedence_over_deprecated_ones(scaling, latency_s, throughput):
    found = Scaling.model_validate({"maxReplicas": 2, **scaling})
    assert (found.latency_target_s, found.assumed_throughput) == (latency_s, throughput)
