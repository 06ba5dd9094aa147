"""What the driver hears of a run while it goes on."""

import asyncio
from pathlib import Path

import pytest

from rl import journal
from rl.journal import Journal
from rl.store import RunFolder


def test_events_are_waited_for_until_nothing_more_will_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "WATCH_S", 1000.0)

    async def scene() -> None:
        kept = Journal(RunFolder(str(tmp_path)))
        waiting = asyncio.create_task(kept.wait(0))
        await asyncio.sleep(0)
        kept.warn("a word")
        assert [event["text"] for event in await waiting] == ["a word"]
        late = asyncio.create_task(kept.wait(1))
        await asyncio.sleep(0)
        kept.close()
        assert (await late, await kept.wait(1)) == ([], [])

    asyncio.run(asyncio.wait_for(scene(), 60))
