"""The versions of the model that can be served, which of them is behind the name `aligned`, and how it got there."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.errors import DataError
from rl.store import RunFolder

LOCK_TIMEOUT_S = 30.0
REVISION_DIGITS = 12
REGISTRY = "registry.json"
STATUS = "status.json"
SERVED_TIMEOUT_S = 1.0
"""For whom asks just now whether there is a server."""


@dataclass(frozen=True)
class Version:
    """One set of weights that can be served."""

    name: str
    """What clients may ask for; `base`, or the run's name and the first digits of the revision."""
    folder: str
    """Hugging Face model folder, or PEFT adapter."""
    revision: str
    """The first digits of the SHA-256 of the weights."""
    run: str = ""
    """The run that made it."""
    rank: int = 0
    """Of an adapter, which the base's engine holds; 0 for weights of its own."""
    step: int = 0
    """Policy version within the run."""
    created: int = 0
    """When it was registered, in seconds since 1970."""


@dataclass(frozen=True)
class Candidate:
    """A version that gets a share of what is asked of `aligned`."""

    version: str
    share: float


@dataclass(frozen=True)
class Said:
    """What the running server made of the registry."""

    serial: int
    """Of the registry that it serves, or cannot."""
    fault: str
    """Why it cannot; "" if it does."""


@dataclass(frozen=True)
class Registry:
    """What is known and wanted; stored in registry.json."""

    base: Version
    precision: str
    max_length: int
    """Tokens of prompt and completion together."""
    max_images: int
    versions: dict[str, Version] = field(default_factory=dict)
    """By name, the oldest first; without the base."""
    promoted: tuple[str, ...] = ()
    """Names of the versions that were `aligned`, the present one last."""
    candidate: Candidate | None = None
    serial: int = 0
    """Counts the changes that were stored."""

    @property
    def aligned(self) -> Version:
        """What the name `aligned` stands for; the base before anything is promoted."""
        return self.versions[self.promoted[-1]] if self.promoted else self.base

    def __str__(self) -> str:
        share = f"; {self.candidate.version} gets {self.candidate.share:g} of it" if self.candidate else ""
        return f"aligned is {self.aligned.name}{share}"

    @property
    def wanted(self) -> list[Version]:
        """The versions in the order in which they are to be served, as far as there is room: what is asked for most
        first, then what a rollback would need, then the newest."""
        names = [*self.promoted[-1:], *([self.candidate.version] if self.candidate else []), *self.promoted[-2::-1]]
        names += list(self.versions)[::-1]
        return [self.versions[name] for name in dict.fromkeys(names)]

    @property
    def needed(self) -> list[str]:
        """Names of the versions without which nothing can be served."""
        return [self.aligned.name, *([self.candidate.version] if self.candidate else [])]

    def promote(self, name: str) -> "Registry":
        """With the version behind the name `aligned`; it is no candidate any more."""
        candidate = None if self.candidate and self.candidate.version == name else self.candidate
        return replace(self, promoted=(*self.promoted, name), candidate=candidate)

    def roll_back(self) -> "Registry":
        """With the version behind `aligned` that was there before.

        Raises:
            DataError: there was none.
        """
        if len(self.promoted) < 2:
            told = "there is no version before this one to go back to"
            if self.candidate:
                told += f"; `raylign promote {self.versions[self.candidate.version].run} --canary 0` ends the canary"
            raise DataError(told)
        return replace(self, promoted=self.promoted[:-1])


def assign(wanted: Sequence[Version], slots: Sequence[str | None]) -> list[str | None]:
    """Which version each slot is to hold: the first of `wanted` that have weights of their own, as far as there are
    slots. A version that is in a slot stays there."""
    names = [version.name for version in wanted if not version.rank][: len(slots)]
    kept = [name if name in names else None for name in slots]
    new = iter([name for name in names if name not in kept])
    return [name or next(new, None) for name in kept]


def stages(registry: Registry, slots: Sequence[str | None]) -> list[list[str | None]]:
    """What the slots are to hold, one change after the other: first only what must be served, for names may still lead
    to a slot whose version is let go, and that must not get a third one meanwhile; then all there is room for."""
    last = assign(registry.wanted, slots)
    first = [name if name in registry.needed else before for name, before in zip(last, slots, strict=True)]
    return [last] if first == last else [first, last]


class RegistryFile:
    """registry.json in the serving folder, and the log of what was decided beside it."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self._store = RunFolder(folder)

    @property
    def exists(self) -> bool:
        return self._store.exists(REGISTRY)

    def read(self) -> Registry:
        """What is stored.

        Raises:
            DataError: there is nothing.
        """
        if not self.exists:
            raise DataError(f"{self.folder} has no registry.json; start serving with `raylign serve RUN`")
        stored: dict[str, Any] = self._store.read_json(REGISTRY)
        return Registry(
            **stored
            | {
                "base": Version(**stored["base"]),
                "versions": {name: Version(**one) for name, one in stored["versions"].items()},
                "promoted": tuple(stored["promoted"]),
                "candidate": Candidate(**stored["candidate"]) if stored["candidate"] else None,
            }
        )

    def write(self, registry: Registry, event: str, **values: Any) -> None:
        """Store it whole, and add a line to decisions.jsonl."""
        self._store.write_json(REGISTRY, asdict(replace(registry, serial=registry.serial + 1)))
        self.log(event, **values)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to decisions.jsonl."""
        self._store.append_row("decisions.jsonl", {"time": round(time.time()), "event": event, **values})

    @contextmanager
    def served(self) -> Iterator[None]:
        """While a server follows it, or starts to; there can be one.

        Raises:
            DataError: another one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        status = self.folder / STATUS
        try:
            with FileLock(self._serving_lock, timeout=SERVED_TIMEOUT_S):
                status.unlink(missing_ok=True)  # of a server that was killed
                try:
                    yield
                finally:
                    status.unlink(missing_ok=True)
        except Timeout:
            raise DataError(f"another `raylign serve` serves {self.folder}; end it, or give another dir=…") from None

    @property
    def is_served(self) -> bool:
        """Whether a server follows it, or starts to."""
        try:
            with FileLock(self._serving_lock, blocking=False):
                return False
        except Timeout:
            return True

    @property
    def _serving_lock(self) -> Path:
        return self.folder / "serving.lock"

    def say(self, said: Said) -> None:
        """By the server: tell what it made of the registry."""
        self._store.write_json(STATUS, asdict(said))

    @property
    def said(self) -> Said | None:
        """What the server told last; None before it has started."""
        try:
            return Said(**json.loads((self.folder / STATUS).read_text()))
        except FileNotFoundError:
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process changes the registry.

        Raises:
            DataError: another holds it for too long.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "registry.lock", timeout=LOCK_TIMEOUT_S):
                yield
        except Timeout as error:
            raise DataError(f"{self.folder} is being changed by another process; try again") from error


def weights_digest(folder: str) -> str:
    """The first digits of the SHA-256 of all weights in a model folder.

    Raises:
        DataError: it has none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors weights")
    digest = hashlib.sha256()
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise DataError(f"{file} is damaged ({error}); write the model anew") from error
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:REVISION_DIGITS]
