"""Changing weights between answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SwapLock:
    """Many answers at the same time, or one swap of the weights alone; a swap that waits goes before new answers."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self.answers = 0
        """Those being written."""
        self._swapping = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """While an answer is written."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._swapping)
            self.answers += 1
        try:
            yield
        finally:
            self.answers -= 1
            await self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While weights change."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._swapping)
            self._swapping = True
        try:
            async with self._condition:
                await self._condition.wait_for(lambda: not self.answers)
            yield
        finally:
            self._swapping = False
            await self._tell()

    async def _tell(self) -> None:
        async with self._condition:
            self._condition.notify_all()
