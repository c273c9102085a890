"""Files of mounted Secrets are followed; what is not valid changes nothing."""

import asyncio
import logging

import pytest

from moe_api import mounted
from moe_api.mounted import Mounted, MountedError
from tests.pki import mount


def numbers(files):
    return {name: int(content) for name, content in files.items()}


async def test_all_files_of_a_snapshot_are_taken_together(tmp_path):
    mount(tmp_path, {"a": "1", "b": "2"})
    told = []
    value = Mounted(tmp_path, numbers, told.append)
    assert value.value == {"a": 1, "b": 2}
    mount(tmp_path, {"a": "3", "c": "4"})
    await value.refresh()
    assert value.value == {"a": 3, "c": 4}
    await value.refresh()
    assert told == [{"a": 3, "c": 4}]


async def test_the_last_valid_content_stays_in_force_and_the_error_is_logged_once(tmp_path, caplog):
    mount(tmp_path, {"a": "1"})
    value = Mounted(tmp_path, numbers)
    mount(tmp_path, {"a": "one"})
    with caplog.at_level(logging.ERROR):
        await value.refresh()
        await value.refresh()
    assert value.value == {"a": 1}
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} is not valid: invalid literal for int() with base 10: b'one'; "
        "the last valid content stays in force"
    ]
    mount(tmp_path, {"a": "2"})
    await value.refresh()
    assert value.value == {"a": 2}


async def test_a_volume_that_is_gone_changes_nothing(tmp_path):
    folder = tmp_path / "volume"
    mount(folder, {"a": "1"})
    value = Mounted(folder, numbers)
    folder.rename(tmp_path / "elsewhere")
    await value.refresh()
    assert value.value == {"a": 1}


async def test_it_watches(tmp_path, monkeypatch):
    monkeypatch.setattr(mounted, "INTERVAL_S", 0.01)
    (tmp_path / "a").write_text("1")
    changed = asyncio.Event()
    value = Mounted(tmp_path, numbers, lambda _: changed.set())
    watching = asyncio.create_task(value.watch())
    (tmp_path / "a").write_text("2")
    async with asyncio.timeout(60):
        await changed.wait()
    watching.cancel()
    assert value.value == {"a": 2}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": "one"}, "is not valid: invalid literal"),
        ({"a": b"1" * (mounted.BYTES_MOST + 1)}, "is too large: 1 files; 2097152 bytes is the most"),
    ],
)
def test_there_is_no_start_without_valid_content(tmp_path, files, sentence):
    mount(tmp_path, files)
    with pytest.raises(MountedError, match=sentence):
        Mounted(tmp_path, numbers)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MountedError, match=r"nowhere cannot be read: No such file or directory"):
        Mounted(tmp_path / "nowhere", numbers)
