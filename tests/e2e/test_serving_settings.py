"""`raylign serve` as it is set up otherwise: a place for a second version, two pictures in a request, pictures from a
named host, prompts in the log, a limit on answers that some reach, and no page."""

import asyncio
import base64
import http.server
import io
import json
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.e2e.conftest import Cluster, free_port, read_until, start
from tests.e2e.serving.conftest import ASKED, PICTURE, SEEN, STOPPED, URL, Server, serving

RUNNING, WAITING, LIMIT_S = 16, 800, 3
IMAGE_TOKENS = 16
LONG = ASKED | {"n": RUNNING, "temperature": 1, "max_tokens": 90, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(cluster: Cluster, full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("serving") / "there", free_port()
    run = tmp_path_factory.mktemp("two") / "pictures"
    shutil.copytree(full_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"]["max_images"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with serving(
        "serve", str(run), f"dir={folder}", f"port={port}", f"cluster.address={cluster.address}",
        "page=false", "log_prompts=true", "images.hosts=[127.0.0.1,localhost]", f"limits.timeout_s={LIMIT_S}",
        "engine.slots=2", f"engine.max_sequences={RUNNING}", f"engine.max_waiting={WAITING}",
    ):  # fmt: skip
        yield Server(f"http://127.0.0.1:{port}", folder, key="none")


def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(
    cluster: Cluster, full_run: Path, tmp_path: Path
) -> None:
    """Else the next one would find that Ray Serve runs on the cluster already."""
    process = start("serve", str(full_run), f"dir={tmp_path}", f"cluster.address={cluster.address}")
    read_until(process, "starting the engines")
    time.sleep(5)  # until some of its actors are there
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output.splitlines()) == (130, STOPPED)


def test_there_is_no_page(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css"):
        assert httpx.get(server.url + path).status_code == 404


def test_without_keys_only_loopback_names_are_answered(server: Server) -> None:
    """A page elsewhere may make its own name lead here."""
    refused = server.post(ASKED, Host="pages.example")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_host")


def test_prompts_are_logged_when_asked_for_and_images_never(server: Server) -> None:
    server.post(ASKED)
    log = (server.folder / "access.log").read_text()
    assert "What do you see?" in json.loads(log.splitlines()[-1])["prompt"]
    assert URL[30:60] not in log


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/moved.png" else 200)
        self.send_header("Location", "/good.png")
        self.send_header("Content-Type", "text/html" if self.path == "/page.png" else "image/png")
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *_: Any) -> None:
        pass


def test_pictures_are_fetched_from_the_hosts_that_are_named(server: Server) -> None:
    def ask(url: str) -> httpx.Response:
        image = {"type": "image_url", "image_url": {"url": url}}
        text = {"type": "text", "text": "What do you see?"}
        return server.post(ASKED | {"messages": [{"role": "user", "content": [image, text]}]})

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        port = pictures.server_port
        good = ask(f"http://127.0.0.1:{port}/good.png")
        refused = {
            "redirects are not followed": ask(f"http://127.0.0.1:{port}/moved.png"),
            "the image's type is text/html": ask(f"http://127.0.0.1:{port}/page.png"),
            "the image cannot be fetched": ask(f"http://localhost:{port}/good.png"),  # a name that leads inside
            "not fetched from this host": ask(f"http://127.0.0.2:{port}/good.png"),
        }
        pictures.shutdown()
    assert all(part in good.json()["choices"][0]["message"]["content"] for part in SEEN)
    for says, answer in refused.items():
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
        assert says in answer.json()["error"]["message"]


def test_several_pictures_of_one_request_are_all_seen(server: Server) -> None:
    def ask(*colours: str) -> httpx.Response:
        content: list[Any] = [{"type": "text", "text": "What do you see?"}]
        for colour in colours:
            png = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(png, "PNG")
            url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return server.post(ASKED | {"messages": [{"role": "user", "content": content}], "logprobs": True})

    def logps(answer: httpx.Response) -> list[float]:
        return [one["logprob"] for one in answer.json()["choices"][0]["logprobs"]["content"]]

    one, two, other, turned = ask("red"), ask("red", "blue"), ask("red", "green"), ask("blue", "red")
    assert two.json()["usage"]["prompt_tokens"] == one.json()["usage"]["prompt_tokens"] + IMAGE_TOKENS
    assert len({tuple(logps(answer)) for answer in (one, two, other, turned)}) == 4
    refused = ask("red", "blue", "green")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert "at most 2 images are taken in one request" in refused.json()["error"]["message"]


def test_a_large_picture_is_taken(server: Server) -> None:
    """Some parts of the way take messages of up to 4 MB only if not told otherwise."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    assert len(png.getvalue()) > 6_000_000
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    answer = server.post(ASKED | {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 200, answer.text


def writing(server: Server) -> float:
    """Answers that the engines have been asked for and not ended."""
    return sum(map(float, re.findall(r"^raylign_writing\{.*\} (\S+)", httpx.get(f"{server.url}/metrics").text, re.M)))


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while writing(server):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_an_answer_over_its_time_ends_with_an_error_and_makes_room(server: Server) -> None:
    async def ask(client: httpx.AsyncClient, stream: bool) -> str:
        answer = await client.post("/v1/chat/completions", json=LONG | {"stream": stream})
        if answer.status_code == 504:
            return str(answer.json()["error"]["code"])
        if not stream:
            return "done"
        last = [line for line in answer.text.splitlines() if line][-1]
        return "done" if last == "data: [DONE]" else str(json.loads(last.removeprefix("data: "))["error"]["code"])

    async def crowd() -> Counter[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asked = (ask(client, stream=bool(number % 2)) for number in range(WAITING // RUNNING))
            return Counter(await asyncio.gather(*asked))

    ended = asyncio.run(crowd())
    assert "timeout" in ended
    assert set(ended) <= {"done", "timeout"}
    wait_until_idle(server)
    assert server.post(ASKED).status_code == 200


def test_what_a_client_does_not_wait_for_is_not_written(server: Server) -> None:
    async def leave() -> None:
        url = f"{server.url}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
            others = [group.create_task(client.post(url, json=LONG | {"stream": True})) for _ in range(20)]
            async with client.stream("POST", url, json=LONG | {"stream": True}) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                assert writing(server) > RUNNING
            for other in others:
                other.cancel()

    asyncio.run(leave())
    wait_until_idle(server)
    assert server.post(ASKED).status_code == 200, "within its time, which all these answers together would exceed"
    assert json.loads((server.folder / "access.log").read_text().splitlines()[-2])["status"] == 499


def test_a_promoted_version_is_loaded_beside_the_one_before(server: Server, second_run: Path) -> None:
    (first,) = server.get("/v1/models").json()["data"][2:]
    promoted = server.run("promote", str(second_run))
    assert promoted.code == 0, promoted.output
    both = {card["id"] for card in server.get("/v1/models").json()["data"][2:]}
    assert len(both) == 2
    assert first["id"] in both
    answers = {name: server.post(ASKED | {"model": name}).headers["x-raylign-version"] for name in (*both, "aligned")}
    assert answers == {name: name for name in both} | {"aligned": (both - {first["id"]}).pop()}
    assert server.run("rollback").code == 0
    assert server.post(ASKED).headers["x-raylign-version"] == first["id"]
