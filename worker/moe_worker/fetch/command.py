"""`moe-worker fetch`."""

import logging
from pathlib import Path

import click

from moe_api.ranges import FiniteRange
from moe_api.visible import guard_logs
from moe_worker.config.quantity import parse_bytes
from moe_worker.fetch.cache import CheckpointCache, size_of
from moe_worker.fetch.listing import RemoteFile, checkpoint_files, gibibytes, key, total
from moe_worker.fetch.location import parse
from moe_worker.fetch.meter import Meter, served
from moe_worker.fetch.sources import Source, open_source
from moe_worker.fetch.transfer import Patience, download, patiently
from moe_worker.files import make_folder

log = logging.getLogger(__name__)


@click.command()
@click.argument("uri")
@click.option("--cache", required=True, type=click.Path(path_type=Path), help="Folder of the cache.")
@click.option(
    "--link", required=True, type=click.Path(path_type=Path), help="Symbolic link to make to the checkpoint."
)
@click.option(
    "--max-size", default="0", help="Bytes that the cache may take, e.g. 500Gi. Default: what fits (0)."
)
@click.option("--endpoint", default="", help="URL of the hub or of the S3 API. Default: the public one.")
@click.option(
    "--progress", default="", help="HOST:PORT where progress is served over gRPC. Default: nowhere."
)
@click.option(
    "--timeout",
    type=FiniteRange(1, 86_400),
    default=30.0,
    show_default=True,
    envvar="MOE_FETCH_TIMEOUT",
    show_envvar=True,
    help="Seconds for which a connection may send nothing.",
)
def fetch(
    uri: str, cache: Path, link: Path, max_size: str, endpoint: str, progress: str, timeout: float
) -> None:
    """Download a checkpoint into a cache.

    URI is hf://OWNER/NAME[@REVISION], s3://BUCKET/PATH or gs://BUCKET/PATH. Credentials are HF_TOKEN, AWS_...
    and GOOGLE_... in the environment.

    \b
    Example:
      moe-worker fetch hf://deepseek-ai/DeepSeek-V2-Lite --cache /var/cache/moe --link model
    """
    guard_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    meter = Meter()
    with served(meter, progress):
        source = open_source(parse(uri), endpoint, timeout)
        entry = bring(source, uri, CheckpointCache(cache, parse_bytes(max_size, "--max-size")), meter)
    make_folder(link.parent)
    link.unlink(missing_ok=True)
    link.symlink_to(entry)
    log.info("%s is complete: %s", uri, entry)


def bring(
    source: Source, uri: str, cache: CheckpointCache, meter: Meter, patience: Patience | None = None
) -> Path:
    """The folder in the cache with the checkpoint at a URI, downloaded unless the cache has it.

    Raises FetchError where a retry can help, and SourceError.
    """
    patience = patience or Patience()
    files: list[RemoteFile] = []
    patiently(lambda: files.extend(checkpoint_files(source.files(), uri)), lambda: 0, patience, log.warning)
    name = key(files)
    make_folder(cache.root)
    meter.total = total(files)
    meter.measure = lambda: size_of(cache.staging(name)) or size_of(cache.entry(name))
    with meter.running(log.info):
        with cache.alone(name, wait=False) as mine:
            if mine:
                return _completed(source, files, uri, cache, patience)
        log.info("waiting for another process that downloads %s", uri)
        with cache.alone(name):
            return _completed(source, files, uri, cache, patience)


def _completed(
    source: Source, files: list[RemoteFile], uri: str, cache: CheckpointCache, patience: Patience
) -> Path:
    """The entry, of which this process has the lock."""
    name = key(files)
    entry, staging = cache.entry(name), cache.staging(name)
    if not entry.is_dir():
        there = size_of(staging)
        cache.make_room(name, max(total(files) - there, 0), uri)
        log.info("downloading %s: %d files, %s", uri, len(files), gibibytes(total(files) - there))
        download(source, files, staging, patience, log.warning)
        staging.replace(entry)
    cache.used(name)
    return entry
