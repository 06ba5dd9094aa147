"""The bounded queue between the halves."""

import asyncio

from rl.queue import BatchQueue
from rl.types import PairBatch
from tests.conftest import make_pair


def batch(step: int) -> PairBatch:
    return PairBatch(step, (make_pair(),), step)


def test_every_rank_gets_every_batch() -> None:
    async def scenario() -> None:
        queue = BatchQueue(capacity=2, first_step=1)
        await queue.put(batch(1))
        assert await queue.get(1) == await queue.get(1) == batch(1)
        assert queue.last(1) == batch(1)

    asyncio.run(scenario())


def test_putting_waits_while_the_learner_is_behind() -> None:
    async def scenario() -> None:
        queue = BatchQueue(capacity=1, first_step=1)
        await queue.put(batch(1))
        late = asyncio.create_task(queue.put(batch(2)))
        await asyncio.sleep(0.01)
        assert not late.done()
        wanted = asyncio.create_task(queue.get(2))
        await late
        assert await wanted == batch(2)

    asyncio.run(scenario())


def test_closing_lets_made_batches_be_taken_and_then_says_none() -> None:
    async def scenario() -> None:
        queue = BatchQueue(capacity=2, first_step=1)
        await queue.put(batch(1))
        waiting = asyncio.create_task(queue.get(2))
        await asyncio.sleep(0.01)
        await queue.close()
        assert await queue.get(1) == batch(1)
        assert await waiting is None

    asyncio.run(scenario())


def test_old_batches_are_forgotten() -> None:
    async def scenario() -> None:
        queue = BatchQueue(capacity=1, first_step=1)
        for step in (1, 2, 3):
            await asyncio.gather(queue.put(batch(step)), queue.get(step))
        await queue.close()
        assert await queue.get(1) is None

    asyncio.run(scenario())
