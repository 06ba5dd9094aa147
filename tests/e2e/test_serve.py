"""The base and the aligned model behind one OpenAI endpoint, asked by the real client."""

import base64
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_prompt
from tests.e2e.conftest import Cluster, free_port, listeners, raylign, read_until, start


@pytest.fixture(scope="module")
def client(cluster: Cluster, full_run: Path) -> Any:
    from openai import OpenAI

    port = free_port()
    process = start("serve", str(full_run), f"--port={port}", f"--address={cluster.address}")
    read_until(process, "serving base and aligned")
    yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130


def question() -> list[dict[str, Any]]:
    picture = "data:image/png;base64," + base64.b64encode(make_prompt().images[0].png).decode()
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What do you see?"}]
    return [{"role": "user", "content": parts}]


def test_both_models_are_offered(client: Any) -> None:
    assert {"base", "aligned"} <= {model.id for model in client.models.list()}


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_a_picture_is_described(client: Any, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=question(), max_tokens=40, temperature=0)
    assert "red circle at the top left" in answer.choices[0].message.content
    assert "green cross at the bottom right" in answer.choices[0].message.content


def test_streaming_gives_the_same_answer_in_pieces(client: Any) -> None:
    asked = {"model": "aligned", "messages": question(), "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) > 3


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    outcome = raylign("serve", str(tmp_path))
    assert outcome.code == 4
    assert "is no run folder" in outcome.output


def test_the_endpoint_listens_on_loopback_only(client: Any) -> None:
    assert listeners(client.base_url.port) == {"0100007F"}
