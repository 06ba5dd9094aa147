"""The bounded queue of pairs between the two halves."""

import asyncio

from rl.types import PairBatch


class BatchQueue:
    """Batches by step. Every rank of the learner gets each; a batch is forgotten once a later one is asked for."""

    def __init__(self, capacity: int, first_step: int):
        self._capacity = capacity
        self._batches: dict[int, PairBatch] = {}
        self._wanted = first_step
        self._closed = False
        self._changed = asyncio.Condition()

    async def put(self, batch: PairBatch) -> None:
        """Add the next step's batch; waits while `capacity` batches lie ahead of the learner."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or batch.step < self._wanted + self._capacity)
            if not self._closed:
                self._batches[batch.step] = batch
                self._changed.notify_all()

    async def get(self, step: int) -> PairBatch | None:
        """The batch of `step`, waited for; None if the queue was closed without it."""
        async with self._changed:
            self._wanted = max(self._wanted, step)
            self._batches = {key: value for key, value in self._batches.items() if key >= step - 1}
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._closed or step in self._batches)
            return self._batches.get(step)

    def last(self, step: int) -> PairBatch:
        """The batch of the step the learner has just finished."""
        return self._batches[step]

    async def close(self) -> None:
        """No batch comes after those that are in the queue."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
