"""Weights change only between answers, and answering goes on after."""

import asyncio

from serve.swap import SwapLock


def test_a_swap_waits_for_answers_and_later_answers_wait_for_the_swap() -> None:
    async def scene() -> list[str]:
        lock, said = SwapLock(), []
        go_on = asyncio.Event()

        async def answer(name: str) -> None:
            async with lock.shared():
                said.append(f"{name} begins")
                await go_on.wait()
                said.append(f"{name} ends")

        async def swap() -> None:
            async with lock.alone():
                said.append("swap")

        tasks = [asyncio.create_task(answer("a")), asyncio.create_task(answer("b"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(swap()))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(answer("c")))
        await asyncio.sleep(0.01)
        assert said == ["a begins", "b begins"]
        go_on.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        return said

    said = asyncio.run(scene())
    assert said.index("swap") > max(said.index("a ends"), said.index("b ends"))
    assert said.index("c begins") > said.index("swap")


def test_a_swap_that_is_given_up_lets_answers_go_on() -> None:
    async def scene() -> None:
        lock = SwapLock()
        async with lock.shared():
            swap = asyncio.create_task(lock.alone().__aenter__())
            await asyncio.sleep(0.01)
            swap.cancel()
            await asyncio.wait({swap})
        async with asyncio.timeout(5), lock.shared():
            pass

    asyncio.run(scene())


def test_an_answer_that_is_cut_off_does_not_hold_up_a_swap() -> None:
    async def scene() -> None:
        lock = SwapLock()

        async def answer() -> None:
            async with lock.shared():
                await asyncio.sleep(60)

        task = asyncio.create_task(answer())
        await asyncio.sleep(0.01)
        task.cancel()
        async with asyncio.timeout(5), lock.alone():
            pass

    asyncio.run(scene())
