"""What serving is configured by: where it listens, what it runs on, whom it lets in, and what it takes."""

from typing import Self

from pydantic import Field, model_validator

from cluster.connect import ActorResources, ClusterSettings
from cluster.errors import ConfigError
from cluster.settings import LocalPath, Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class EngineSettings(Settings):
    """The vLLM engines. One holds the base and all adapters, each further one a version with weights of its own."""

    replicas: int = Field(1, ge=1)
    """Copies of each engine; one that is lost is started again while the others carry on."""
    resources: ActorResources = ActorResources(cpus=0.75, threads=1)
    """Of one replica; `gpus` is its tensor-parallel size, 0 serves on the CPU."""
    slots: int = Field(1, ge=0)
    """Engines for versions with weights of their own. With more than one, older versions are served too, and a
    promoted one is loaded beside the one it replaces."""
    adapters: int = Field(4, ge=1)
    """Adapters that the base's engine holds at the same time."""
    max_sequences: int = Field(64, ge=1)
    """Answers that one replica writes at the same time."""
    max_waiting: int = Field(64, ge=0)
    """Requests that may wait for a replica; one more is answered 429, with the time to come back."""
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory one replica takes."""
    cpu_cache_gib: int = Field(1, ge=1)
    """GiB of key-value cache of a replica on a CPU."""


class LimitSettings(Settings):
    """What one client may ask for."""

    requests_per_minute: int = Field(600, ge=1)
    """Of each API key; where none is asked for, of each client address. One more is answered 429."""
    body_bytes: int = Field(32 * 2**20, ge=1024)
    """Largest request."""
    timeout_s: float = Field(600, gt=0)
    """Longest that an answer may take; then it ends with an error."""


class ImageSettings(Settings):
    """Which images are taken. They come in the request as data URLs; hosts that are named may be fetched from."""

    max_bytes: int = Field(20 * 2**20, ge=1024)
    """Largest image file."""
    max_pixels: int = Field(40_000_000, ge=16)
    """Most pixels of an image; checked before it is decoded."""
    max_side: int = Field(10_000, ge=4)
    """Longest side in pixels; checked before it is decoded."""
    hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from over http or https; none if left out. Redirects are not followed, and a
    name must lead to a public address."""
    timeout_s: float = Field(10, gt=0)
    """Longest that fetching an image may take."""


class GateSettings(Settings):
    """What a run must reach, on the prompts that it and the serving version both held out, to be promoted."""

    win_rate: float = Field(0.5, ge=0, le=1)
    """Smallest win rate against the serving version; equal answers count half."""
    language_accuracy: float | None = Field(None, ge=0, le=1)
    """Smallest language accuracy; left out, where the prompts do not measure it, none is asked for."""
    prompts: int = Field(50, ge=1)
    """Fewest prompts that both must have answered."""


class FolderSettings(Settings):
    """What `raylign rollback` and `raylign keys` need to know."""

    dir: LocalPath = "runs/serving"
    """Folder with the registry of versions, the keys, the verdicts and the preferences of visitors."""


class PromoteSettings(FolderSettings):
    """What `raylign promote` needs to know."""

    gate: GateSettings = GateSettings()
    """What `raylign promote` asks of a run."""


class ServeSettings(PromoteSettings):
    """The whole of `raylign serve`. The commands beside it read the same file, so they take all of it."""

    host: str = "127.0.0.1"
    """Address to listen on. Where it is not loopback, every request needs an API key."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    keys: bool | None = None
    """Whether API keys are asked for; left out, wherever `host` is not loopback."""
    page: bool = True
    """Whether there is a demo page at `/`."""
    log_prompts: bool = False
    """Whether the access log has the text of prompts; images and keys are in no log."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster to serve on."""
    engine: EngineSettings = EngineSettings()
    """The engines."""
    limits: LimitSettings = LimitSettings()
    """Limits of each client."""
    images: ImageSettings = ImageSettings()
    """Which images are taken."""

    @property
    def asks_for_keys(self) -> bool:
        """Whether a request without an API key is refused."""
        return self.host not in LOOPBACK if self.keys is None else self.keys

    @model_validator(mode="after")
    def _check_open_door(self) -> Self:
        if not self.asks_for_keys and self.host not in LOOPBACK:
            raise ConfigError(
                f"keys: {self.host} can be reached from outside, so keys cannot be left out; take keys=false out"
            )
        return self
