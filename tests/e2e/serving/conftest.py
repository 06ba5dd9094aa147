"""One running `raylign serve`, which asks for keys, for all tests of this folder."""

import base64
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI

from rl.config import AlignConfig
from rl.policy import adapt, load_model, resolve_model
from tests.conftest import make_prompt
from tests.e2e.conftest import Cluster, free_port, raylign, read_until, start

STOPPED = ["stopping; this takes some seconds (again to abort)", "stopped"]
RUNNING, WAITING, PER_MINUTE = 16, 24, 2000
PICTURE = make_prompt().images[0].png
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
MESSAGES: list[Any] = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What do you see?"}]}]
ASKED: dict[str, Any] = {"model": "aligned", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
SEEN = ("red circle at the top left", "green cross at the bottom right")


@dataclass
class Server:
    """A running `raylign serve`."""

    url: str
    folder: Path
    key: str

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"} | headers
        return httpx.post(self.url + path, content=content, headers=sent, timeout=120)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key or self.key}"}, timeout=120)

    def run(self, command: str, *arguments: str) -> Any:
        return raylign(command, *arguments, f"dir={self.folder}")

    def key_of(self, name: str) -> str:
        made = raylign("keys", "add", name, f"dir={self.folder}")
        assert made.code == 0, made.output
        return next(line for line in made.output.splitlines() if line.startswith("rl-"))

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=120, max_retries=0)


@contextmanager
def serving(*arguments: str) -> Iterator[None]:
    """While a `raylign` command serves; it must end well on Ctrl-C, and say nothing but that."""
    process = start(*arguments)
    read_until(process, "until Ctrl-C")
    yield
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.splitlines()[-2:] == STOPPED, output


@pytest.fixture(scope="package")
def adapter_run(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is an adapter, one that nobody trained."""
    import torch

    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    shutil.copytree(full_run, folder)
    shutil.rmtree(folder / "model")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["policy"]["lora"] = {"rank": 8, "alpha": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    adapted: Any = adapt(load_model(resolve_model("rl/world/base"), "float32"), AlignConfig(**config).policy)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapted.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="package")
def server(
    cluster: Cluster, full_run: Path, adapter_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("serving") / "here", free_port()
    arguments = [
        "serve", str(full_run), str(adapter_run), f"dir={folder}", f"port={port}", "keys=true",
        f"cluster.address={cluster.address}",
        f"limits.requests_per_minute={PER_MINUTE}", f"engine.max_sequences={RUNNING}", f"engine.max_waiting={WAITING}",
        "limits.body_bytes=1000000",
    ]  # fmt: skip
    refused = raylign(*arguments)
    assert refused.code == 3
    assert f"raylign keys add NAME dir={folder}" in refused.output
    made = raylign("keys", "add", "tests", f"dir={folder}")
    with serving(*arguments):
        yield Server(f"http://127.0.0.1:{port}", folder, made.output.splitlines()[0])
