"""The endpoint as strangers meet it: the real `openai` client, curl, bad input of every kind, promotions under load, a
replica that is lost."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import ROOT, free_port, listeners, raylign
from tests.e2e.serving.conftest import ASKED, MESSAGES, PER_MINUTE, PICTURE, RUNNING, SEEN, URL, WAITING, Server


def test_each_model_says_which_version_it_is(server: Server, full_run: Path) -> None:
    cards = {card.id: card.model_dump() for card in server.client.models.list()}
    assert list(cards)[:2] == ["base", "aligned"]
    version = cards["aligned"]["version"]
    assert re.fullmatch(rf"{full_run.name}-[0-9a-f]{{6}}", version)
    assert cards[version]["revision"] == cards["aligned"]["revision"] != cards["base"]["revision"]
    assert (cards["aligned"]["max_model_len"], cards["aligned"]["max_images"]) == (128, 1)
    assert server.get("/v1/models/aligned").json().items() <= cards["aligned"].items()
    assert server.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_a_picture_is_described_and_the_answer_says_which_version_wrote_it(server: Server, model: str) -> None:
    raw = server.client.chat.completions.with_raw_response.create(**ASKED | {"model": model})
    answer = raw.parse()
    assert all(part in answer.choices[0].message.content for part in SEEN)
    card = server.client.models.retrieve(model).model_dump()
    assert raw.headers["x-raylign-version"] == answer.model == card["version"]
    assert raw.headers["x-raylign-revision"] == card["revision"]
    assert raw.headers["x-raylign-candidate"] == "false"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_gives_the_same_answer_in_pieces_and_what_it_took(server: Server) -> None:
    whole = server.client.chat.completions.create(**ASKED).choices[0].message.content
    chunks = list(server.client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_the_parameters_that_clients_use(server: Server) -> None:
    create = server.client.chat.completions.create
    several = create(**ASKED | {"n": 3, "temperature": 1.5, "seed": 7})
    again = create(**ASKED | {"n": 3, "temperature": 1.5, "seed": 7})
    assert [one.message.content for one in several.choices] == [one.message.content for one in again.choices]
    assert len({one.message.content for one in several.choices}) > 1
    stopped = create(**ASKED, stop=["left"]).choices[0]
    assert stopped.message.content.endswith("top ")
    assert create(**ASKED | {"max_tokens": 3}).choices[0].finish_reason == "length"
    scored = create(**ASKED, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in scored.content)
    text = server.client.completions.create(model="base", prompt="USER: copy: a b ASSISTANT:", max_tokens=8)
    assert text.choices[0].text
    assert text.usage.prompt_tokens > 0


def test_curl_gets_a_stream(server: Server) -> None:
    done = subprocess.run(
        ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json",
         "-H", f"Authorization: Bearer {server.key}", "-d", json.dumps(ASKED | {"stream": True})],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def with_image(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return ASKED | {"messages": [{"role": "user", "content": [part]}]}


def with_url(url: str) -> dict[str, Any]:
    return ASKED | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"{", 400, "invalid_request", "the body is not valid JSON"),
        (b"[]", 400, "invalid_request", "the body must be a JSON object"),
        ({"messages": MESSAGES}, 400, "invalid_request", "model must name one of /v1/models"),
        (ASKED | {"model": "gpt"}, 404, "model_not_found", "there is no model 'gpt'; there are base, aligned"),
        (ASKED | {"messages": [{"role": "martian", "content": "hi"}]}, 400, "invalid_request", "messages[0].role must"),
        (ASKED | {"chat_template": "x"}, 400, "invalid_request", "chat_template is not a parameter"),
        (ASKED | {"temperature": 99}, 400, "invalid_request", "temperature must be in [0, 2]"),
        (ASKED | {"temperature": "hot"}, 400, "invalid_request", "temperature: Input should be a valid number"),
        (ASKED | {"max_tokens": -1}, 400, "invalid_request", "max_tokens must be at least 1"),
        (ASKED | {"max_tokens": 9999}, 400, "invalid_request", "max_tokens=9999 cannot be greater than max_model_len"),
        (ASKED | {"n": 99}, 400, "invalid_request", "n must be a whole number from 1 to 16"),
        (ASKED | {"top_logprobs": 99, "logprobs": True}, 400, "invalid_request", "logprobs"),
        (with_url("file:///etc/passwd"), 400, "invalid_image", "give the image as a data URL"),
        (with_url("http://127.0.0.1:8265/"), 400, "invalid_image", "images are not fetched from this host"),
        (with_url("data:image/png;base64,???"), 400, "invalid_image", "not valid base64"),
        (with_image(PICTURE[:60]), 400, "invalid_image", "the image is damaged or cut off"),
        (with_image(b"<svg/>", "image/svg+xml"), 400, "invalid_image", "the image's type is image/svg+xml"),
        (b" " * 1_000_001, 413, "request_too_large", "the request is over 1000000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_shape(
    server: Server, body: Any, status: int, code: str, says: str
) -> None:
    answer = server.post(body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert {"message", "type", "param", "code"} == error.keys()
    assert (error["type"], error["code"]) == ("not_found_error" if status == 404 else "invalid_request_error", code)
    for secret in ("Traceback", str(ROOT), "site-packages"):
        assert secret not in answer.text


def test_other_pages_methods_and_types_are_refused_too(server: Server) -> None:
    assert server.post(ASKED, **{"Content-Type": "text/plain"}).status_code == 415
    assert server.get("/v1/chat/completions").status_code == 405
    for path in ("/v1/load_lora_adapter", "/tokenize", "/invocations", "/docs", "/page/../settings.py"):
        assert server.get(path).json()["error"]["code"] == "not_found"

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 50_000

    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    unsized = httpx.post(f"{server.url}/v1/completions", content=endless(), headers=headers, timeout=60)
    assert unsized.status_code == 413


def test_nobody_comes_in_without_a_valid_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/v1/models/base", "/metrics"):
        assert httpx.get(server.url + path).status_code == 401
    for header in ("", "Bearer", "Bearer rl-wrong", f"Basic {server.key}"):
        answer = server.post(ASKED, Authorization=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    guest = server.key_of("guest")
    assert server.get("/v1/models", guest).status_code == 200
    assert server.run("keys", "revoke", "guest").code == 0
    assert server.get("/v1/models", guest).status_code == 401
    everything = "".join(file.read_text() for file in server.folder.rglob("*.json*"))
    assert guest not in everything
    assert server.key not in everything


def test_the_endpoint_listens_on_loopback_only(server: Server) -> None:
    assert listeners(int(server.url.rpartition(":")[2])) == {"0100007F"}


def test_a_second_server_in_the_same_place_is_refused_at_once(server: Server, full_run: Path, tmp_path: Path) -> None:
    same_folder = server.run("serve", str(full_run), f"port={free_port()}")
    assert same_folder.code == 4
    assert "another `raylign serve` serves" in same_folder.output
    port = server.url.rpartition(":")[2]
    same_port = raylign("serve", str(full_run), f"dir={tmp_path}", f"port={port}")
    assert same_port.code == 3
    assert f"port: {port} of 127.0.0.1 is taken; give another" in same_port.output
    assert {server.get("/v1/models").status_code for _ in range(10)} == {200}


def test_one_client_too_eager_does_not_hold_up_the_others(server: Server) -> None:
    greedy = server.key_of("greedy")
    with httpx.Client(headers={"Authorization": f"Bearer {greedy}"}) as client:
        answers = (client.get(f"{server.url}/v1/models") for _ in range(4 * PER_MINUTE))
        refused = next(answer for answer in answers if answer.status_code != 200)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert server.get("/v1/models").status_code == 200


async def stream_once(client: AsyncOpenAI, outcomes: "Counter[tuple[str, str]]") -> None:
    """One streamed answer; counts (version, how it ended)."""
    from openai import APIStatusError

    try:
        answer = await client.chat.completions.create(**ASKED, stream=True)
        finish = "cut off"
        async for chunk in answer:
            finish = chunk.choices[0].finish_reason or finish
        outcomes[answer.response.headers["x-raylign-version"], finish] += 1
    except APIStatusError as error:
        outcomes["", f"{error.status_code}, retry after {error.response.headers.get('retry-after')}"] += 1


def test_more_than_can_wait_are_told_to_come_back_and_the_others_are_answered(server: Server) -> None:
    async def crowd() -> "Counter[tuple[str, str]]":
        outcomes: Counter[tuple[str, str]] = Counter()
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=120) as client:
            await asyncio.gather(*(stream_once(client, outcomes) for _ in range(3 * (RUNNING + WAITING))))
        return outcomes

    outcomes = asyncio.run(crowd())
    ended = Counter({how: count for (_, how), count in outcomes.items()})
    assert set(ended) <= {"stop", *(f"429, retry after {seconds}" for seconds in range(2, 8))}
    assert "429, retry after 2" in ended
    assert ended["stop"] >= RUNNING + WAITING


def test_promotion_and_rollback_lose_no_request_of_32_streaming_clients(server: Server, second_run: Path) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()

    async def scene() -> list[Any]:
        done = asyncio.Event()
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=120) as client:

            async def visitor() -> None:
                while not done.is_set():
                    await stream_once(client, outcomes)

            visitors = [asyncio.create_task(visitor()) for _ in range(32)]
            await asyncio.sleep(3)
            promoted = await asyncio.to_thread(server.run, "promote", str(second_run))
            await asyncio.sleep(3)
            back = await asyncio.to_thread(server.run, "rollback")
            await asyncio.sleep(3)
            done.set()
            await asyncio.gather(*visitors)
        return [promoted, back]

    before = server.client.models.retrieve("aligned").model_dump()["version"]
    promoted, back = asyncio.run(scene())
    assert promoted.code == 0, promoted.output
    assert "gate passed: win rate 0.5" in promoted.output
    assert "the server serves it" in promoted.output
    assert back.code == 0, back.output
    versions = {version for version, _ in outcomes}
    assert {how for _, how in outcomes} == {"stop"}, "no request failed, none was cut off"
    assert len(versions) == 2
    assert before in versions
    assert server.client.models.retrieve("aligned").model_dump()["version"] == before
    log = [json.loads(line) for line in (server.folder / "decisions.jsonl").read_text().splitlines()]
    assert [one["event"] for one in log[-2:]] == ["promoted", "rolled back"]
    assert log[-2]["verdict"]["win_rate"] == 0.5


def test_an_adapter_is_served_beside_its_base_and_gets_its_share(server: Server, adapter_run: Path) -> None:
    (adapter,) = [card for card in server.get("/v1/models").json()["data"] if card["id"].startswith("adapter-")]
    answer = server.post(ASKED | {"model": adapter["id"]})
    assert answer.json()["model"] == answer.headers["x-raylign-version"] == adapter["id"]
    assert answer.headers["x-raylign-revision"] == adapter["revision"]
    shared = server.run("promote", str(adapter_run), "--canary", "0.5")
    assert shared.code == 0, shared.output
    assert f"{adapter['id']} gets 0.5 of it" in shared.output
    headers = [server.post(ASKED).headers for _ in range(40)]
    chosen = {(one["x-raylign-candidate"], one["x-raylign-version"]) for one in headers}
    assert {candidate for candidate, _ in chosen} == {"true", "false"}
    assert ("true", adapter["id"]) in chosen
    assert ("false", adapter["id"]) not in chosen
    ended = server.run("promote", str(adapter_run), "--canary", "0")
    assert ended.code == 0, ended.output
    assert {server.post(ASKED).headers["x-raylign-candidate"] for _ in range(10)} == {"false"}


def test_a_run_that_fails_the_gate_is_not_served(server: Server, second_run: Path) -> None:
    before = server.get("/v1/models").json()
    refused = server.run("promote", str(second_run), "gate.win_rate=0.9")
    assert refused.code == 4
    assert "win rate is 0.5, but gate.win_rate asks for 0.9" in refused.output
    nothing = server.run("promote", str(server.folder))
    assert nothing.code == 4
    assert "is no run folder" in nothing.output
    assert server.get("/v1/models").json() == before


def test_damaged_weights_are_refused_before_the_server_hears_of_them(
    server: Server, second_run: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(second_run, broken)
    weights = broken / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = server.get("/v1/models").json()
    outcome = server.run("promote", str(broken))
    assert outcome.code == 4, outcome.output
    assert "model.safetensors is damaged" in outcome.output
    assert server.get("/v1/models").json() == before


def test_what_happened_is_counted_and_logged_without_prompts_images_or_keys(server: Server) -> None:
    server.post(ASKED)
    text = server.get("/metrics").text
    counted = dict(re.findall(r'^raylign_requests_total\{status="200",version="([^"]+)"\} (\d+)', text, re.M))
    assert int(counted["base"]) >= 1
    assert re.search(r'^raylign_refused_total\{reason="key"\} [1-9]', text, re.M)
    assert re.search(r'^raylign_refused_total\{reason="queue"\} [1-9]', text, re.M)
    log = (server.folder / "access.log").read_text()
    entry = json.loads(log.splitlines()[-1])
    assert (entry["client"], entry["model"], entry["status"]) == ("tests", "aligned", 200)
    for secret in ("What do you see", URL[30:60], server.key):
        assert secret not in log


def test_a_lost_replica_costs_only_what_it_was_writing(server: Server) -> None:
    """The other engine carries on meanwhile, and the lost one comes back with the version it had."""
    before = server.post(ASKED).headers["x-raylign-version"]
    ended: Counter[str] = Counter()

    async def visitor(client: AsyncOpenAI, begun: asyncio.Event) -> None:
        from openai import APIError

        long: Any = ASKED | {"max_tokens": 90, "extra_body": {"ignore_eos": True}}
        try:
            finish = "cut off"
            async for chunk in await client.chat.completions.create(**long, stream=True):
                begun.set()
                finish = chunk.choices[0].finish_reason or finish
            ended[finish] += 1
        except APIError as error:
            ended[error.message] += 1

    async def scene() -> None:
        begun = asyncio.Event()
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=240) as client:
            visitors = [asyncio.create_task(visitor(client, begun)) for _ in range(RUNNING)]
            await begun.wait()
            (replica,) = [one for one in psutil.process_iter(["name"]) if "raylign:slot-1" in " ".join(one.cmdline())]
            os.kill(replica.pid, signal.SIGKILL)
            other = await asyncio.to_thread(server.post, ASKED | {"model": "base"})
            assert other.status_code == 200
            await asyncio.gather(*visitors)

    asyncio.run(scene())
    lost = "the replica that wrote this answer was lost; ask again"
    assert ended[lost] >= 1
    assert set(ended) <= {lost, "length", "stop"}
    after = server.post(ASKED)
    assert (after.status_code, after.headers["x-raylign-version"]) == (200, before)
