"""Commands reach a frontend that serves TLS and asks for a key; `moe key` makes one."""

import asyncio

import pytest
from click.testing import CliRunner

from moe_api import mutual
from moe_api.supervision import Supervisor
from moe_cli.main import main
from moe_frontend.edges import Guards
from moe_frontend.identity import keys
from moe_frontend.identity.caller import Caller
from moe_worker.service import listening
from tests.frontend.conftest import bench  # noqa: F401 - a fixture
from tests.frontend.fake_worker import FakeWorker
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture
from tests.pki import Authority, mount


def moe(*args):
    return CliRunner().invoke(main, args)


async def run(*args):
    return await asyncio.to_thread(moe, *args)


@pytest.fixture
def made():
    result = moe("key", "--name", "laptop")
    return result.stdout.strip(), result.stderr.strip()


def test_the_digest_of_a_made_key_lets_it_in(made):
    key, line = made
    known = keys.parse({"team-a": line.encode()})
    assert known.caller(key) == Caller("team-a", "laptop")
    assert len(key) > 40
    assert key != moe("key").stdout.strip()


@pytest.fixture
async def site(http, tmp_path, made):  # noqa: F811
    authority = Authority()
    mount(tmp_path / "tls", authority.pair("models.example"))
    mount(tmp_path / "keys", {"team-a": made[1]})
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    guards = Guards(tls=tmp_path / "tls", api_keys=tmp_path / "keys")
    return await http(workers=1, guards=guards, authority=authority)


async def test_generate_and_tokenize_prove_their_caller(site, made, tmp_path):
    there = ("--endpoint", site.bench.address, "--tls-server-name", "models.example")
    trusted = (*there, "--ca-file", str(tmp_path / "ca.crt"))
    result = await run("generate", *trusted, "--token", made[0], "count 2")
    assert (result.exit_code, result.stdout.strip()) == (0, "w-0:0 w-0:1")
    assert site.bench.workers[0].metadata[0]["x-moe-tenant"] == "team-a"
    refused = await run("generate", *trusted, "--token", "wrong", "count 2")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: API key is not valid: no caller has it")
    missing = await run("generate", *trusted, "count 2")
    assert missing.stderr.startswith("error: credentials are missing")


async def test_chat_proves_its_caller(site, made, tmp_path):
    there = ("--endpoint", site.bench.address, "--tls-server-name", "models.example")
    trusted = (*there, "--ca-file", str(tmp_path / "ca.crt"), "--timeout", "20")
    refused = await run("chat", *trusted, "--token", "wrong", "hello")
    assert refused.exit_code == 2
    assert "API key is not valid" in refused.stderr
    distrusted = await run("chat", *there, "--token", made[0], "hello")
    assert distrusted.exit_code == 3
    assert "does --ca-file or --tls say whether it serves TLS?" in distrusted.stderr
    assert "A worker with mutual TLS needs --tls-folder." in distrusted.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--ca-file", "{}"], "has no certificate in PEM"),
        (["--token", "a\nb"], "--token is no credential"),
        (["--token", ""], "--token is no credential"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(args, sentence, tmp_path):
    (tmp_path / "ca.crt").write_text("nothing")
    given = [arg.format(tmp_path / "ca.crt") for arg in args]
    result = moe("generate", "--endpoint", "127.0.0.1:9", *given, "a")
    assert result.exit_code == 2
    assert sentence in result.stderr


async def test_commands_prove_who_calls_where_workers_ask_for_it(tmp_path):
    authority, supervisor = Authority(), Supervisor()
    mount(tmp_path / "worker", authority.pair(mutual.WORKER))
    mount(tmp_path / "mine", authority.pair(mutual.FRONTEND))
    worker = FakeWorker("w-0")
    endpoint = await worker.start(credentials=listening.credentials(tmp_path / "worker", supervisor))
    there = (
        "generate",
        "--endpoint",
        endpoint.address,
        "--tls-server-name",
        mutual.WORKER,
        "--timeout",
        "5",
    )
    proved = await run(*there, "--tls-folder", str(tmp_path / "mine"), "count 2")
    assert (proved.exit_code, proved.stdout.strip()) == (0, "w-0:0 w-0:1")
    refused = await run(*there, "--ca-file", str(tmp_path / "mine/ca.crt"), "count 2")
    assert refused.exit_code == 3
    (tmp_path / "mine/tls.key").unlink()
    broken = await run(*there, "--tls-folder", str(tmp_path / "mine"), "count 2")
    assert "has no tls.crt with its tls.key in PEM" in broken.stderr
    await worker.server.stop(None)
    await supervisor.close()
