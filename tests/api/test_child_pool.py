"""Processes that answer questions: what they announce is not believed."""

import asyncio

import pytest

from moe_api.child_pool import ChildEndedError, ChildPool


async def test_an_answer_that_is_announced_as_too_long_ends_the_process_before_it_is_read():
    pool = ChildPool("tests.api.boasting_child", 10.0, b"first", answer_most=2**20)
    async with asyncio.timeout(60):
        with pytest.raises(ChildEndedError):
            await pool.ask(b"question")
    assert not pool._idle
    await pool.close()
