"""API keys: several, each with a name, stored as hashes, revocable while serving."""

import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.errors import DataError

PREFIX = "rl-"
LOCK_TIMEOUT_S = 30.0


class KeyFile:
    """keys.json in the serving folder, readable by its owner alone. It is read anew when it has changed."""

    def __init__(self, folder: str):
        self._path = Path(folder) / "keys.json"
        self._changed = -1
        self._hashes: dict[str, dict[str, Any]] = {}

    def names(self) -> dict[str, int]:
        """When each key was made, in seconds since 1970, by its name."""
        return {name: one["created"] for name, one in self._read().items()}

    def add(self, name: str) -> str:
        """Make a key and return it; it is kept nowhere.

        Raises:
            DataError: the name is blank or looks like a setting, or there is a key of that name.
        """
        if not name.strip() or "=" in name:
            raise DataError("a key needs a name, without `=`: raylign keys add NAME")
        key = PREFIX + secrets.token_urlsafe(32)
        with self._locked():
            keys = self._read()
            if name in keys:
                raise DataError(f"there is a key named {name} already; revoke it first, or choose another name")
            self._write({**keys, name: {"sha256": _digest(key), "created": int(time.time())}})
        return key

    def revoke(self, name: str) -> None:
        """Forget a key; running servers refuse it from their next request on.

        Raises:
            DataError: there is none of that name.
        """
        if name not in (keys := self._read()):
            raise DataError(f"there is no key named {name}; there are {', '.join(keys) or 'none'}")
        with self._locked():
            self._write({other: value for other, value in self._read().items() if other != name})

    def owner(self, key: str) -> str | None:
        """The name of a key, None if it is none of these; takes as long for a wrong key as for a right one."""
        digest = _digest(key)
        matching = [name for name, one in self._read().items() if hmac.compare_digest(one["sha256"], digest)]
        return matching[0] if matching else None

    def _read(self) -> dict[str, dict[str, Any]]:
        changed = self._path.stat().st_mtime_ns if self._path.is_file() else 0
        if changed != self._changed:
            self._hashes = json.loads(self._path.read_text()) if changed else {}
            self._changed = changed
        return self._hashes

    def _locked(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S)

    def _write(self, keys: dict[str, dict[str, Any]]) -> None:
        part = self._path.with_suffix(".part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps(keys, indent=1) + "\n")
        os.replace(part, self._path)


def _digest(key: str) -> str:
    """A key has 256 random bits, so a plain hash cannot be guessed back."""
    return hashlib.sha256(key.encode()).hexdigest()
