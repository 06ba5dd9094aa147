"""Replies of paid judges on disk, keyed by what was asked."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

LOCK_TIMEOUT_S = 30.0


class ReplyCache:
    """A SQLite file that several processes may share."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, written REAL NOT NULL)"
        )

    def get(self, key: str) -> Any | None:
        """The value stored under `key`, None if there is none."""
        row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Store a JSON value; it is on disk when this returns."""
        self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, json.dumps(value), time.time()))
