"""Rows of a request stand and fall together."""

from __future__ import annotations

import asyncio

import pytest

from vlarl_ray.inference.vllm_rows import all_or_none


def test_where_one_fails_the_others_have_ended_before_it_is_known():
    running = set()

    async def row(name: str, *, fails: bool = False) -> str:
        running.add(name)
        try:
            await asyncio.sleep(0.01 if fails else 60)
            if fails:
                raise ValueError(name)
            return name
        finally:
            await asyncio.sleep(0.01)  # to tell vLLM takes a moment, too
            running.discard(name)

    async def request() -> None:
        with pytest.raises(ValueError, match="b"):
            await all_or_none([row("a"), row("b", fails=True), row("c")])
        assert running == set()

    asyncio.run(request())


def test_results_come_in_the_order_of_rows():
    async def row(index: int) -> int:
        await asyncio.sleep(0.003 * (3 - index))
        return index

    async def request() -> list[int]:
        return await all_or_none([row(index) for index in range(3)])

    assert asyncio.run(request()) == [0, 1, 2]
