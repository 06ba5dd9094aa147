"""Visitors' choices: answers are remembered as they stream by, and a choice becomes a pair that alignment can read."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rl.policy import load_processor, resolve_model
from rl.render import answer_token_ids, prompt_token_ids
from rl.stored import OfflinePairs
from serve import preferences
from serve.asgi import Head
from serve.errors import ApiError
from serve.preferences import Preferences, Recorder
from serve.requests import Asked
from tests.conftest import make_prompt

PROMPT = make_prompt()
ASKED = Asked({"model": "aligned"}, PROMPT.messages, PROMPT.images, remember=True)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(resolve_model("rl/world/base"))


def stream(text: str, processor: Any, finish: str | None = "stop") -> bytes:
    """The events of an answer, as vLLM sends them with token ids and log-probs."""
    ids = (*answer_token_ids(text, processor), processor.tokenizer.eos_token_id)
    prompt_ids = list(prompt_token_ids(PROMPT, processor, expand_images=True))
    first = {"prompt_token_ids": prompt_ids, "choices": [{"delta": {"role": "assistant", "content": ""}}]}
    events = [first]
    for index, id in enumerate(ids):
        content = f" {text}" if index == 0 else ""
        logprobs = {"content": [{"logprob": -0.5}]}
        last = finish if index == len(ids) - 1 else None
        choice = {"delta": {"content": content}, "token_ids": [id], "logprobs": logprobs, "finish_reason": last}
        events.append({"choices": [choice]})
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


def remember(kept: Preferences, id: str, text: str, processor: Any, asked: Asked = ASKED) -> None:
    recorder = Recorder(asked, Head(200, "text/event-stream", "demo-abc", "abcdef"))
    whole = stream(text, processor)
    for start in range(0, len(whole), 7):  # pieces end anywhere
        recorder.see(whole[start : start + 7])
    answer = recorder.remembered()
    assert answer is not None
    kept.remember(id, answer)


def choose(kept: Preferences, choice: str = "first", **more: str) -> str:
    body = {"first": "a", "second": "b", "choice": choice, **more}
    return asyncio.run(kept.choose(json.dumps(body).encode(), "127.0.0.1"))


@pytest.fixture
def kept(tmp_path: Path, processor: Any) -> Preferences:
    kept = Preferences(str(tmp_path))
    remember(kept, "a", "there is a red circle at the top left.", processor)
    remember(kept, "b", "there is a blue square at the top left.", processor)
    return kept


def test_a_choice_is_a_pair_that_alignment_reads_token_by_token(kept: Preferences, processor: Any) -> None:
    assert choose(kept, "second", reason="it is blue") == "second"
    source = OfflinePairs(path=str(kept.folder))
    (pair,) = source.load("pairs", 0, processor, 128, [], lambda faults: None)
    assert pair.completions.chosen.text == "there is a blue square at the top left."
    assert pair.completions.rejected.text == "there is a red circle at the top left."
    assert pair.completions.chosen.logps == (-0.5,) * len(pair.completions.chosen.token_ids), "as it was sampled"
    assert pair.prompt == PROMPT.__class__(**{**vars(PROMPT), "source": "demo page"})
    assert pair.judgements.chosen.reason == "it is blue (demo-abc abcdef)"
    assert pair.judgements.chosen.judge == "visitor"


def test_equal_bad_and_identical_answers_make_no_pair_but_are_kept(kept: Preferences, processor: Any) -> None:
    remember(kept, "c", "there is a red circle at the top left.", processor)
    choose(kept, "both_bad")
    choose(kept, "tie", second="c")
    choose(kept, "first", first="c", second="b")
    remember(kept, "d", "there is a red circle at the top left.", processor)
    choose(kept, "first", second="d")
    lines = [json.loads(line) for line in (kept.folder / "choices.jsonl").read_text().splitlines()]
    assert [(line["choice"], line["step"]) for line in lines] == [
        ("both_bad", None), ("tie", None), ("first", 1), ("first", None),
    ]  # fmt: skip
    assert lines[0]["answers"] == ["there is a red circle at the top left.", "there is a blue square at the top left."]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body"),
        (b"[]", 400, "the body"),
        (b'{"first": "a", "second": "b"}', 400, "choice: Field required"),
        (b'{"first": "a", "second": "b", "choice": "left"}', 400, "choice: Input should be"),
        (b'{"first": "a", "second": "b", "choice": "tie", "x": 1}', 400, "x: Extra inputs"),
        (b'{"first": "a", "second": "a", "choice": "tie"}', 400, "must be different ones"),
        (b'{"first": "a", "second": "z", "choice": "tie"}', 404, "'z' is not remembered any more"),
        (json.dumps({"first": "a", "second": "b", "choice": "tie", "reason": "x" * 2001}).encode(), 400, "reason: "),
    ],
)
def test_a_choice_that_cannot_be_is_refused(kept: Preferences, body: bytes, status: int, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(kept.choose(body, "me"))
    assert caught.value.status == status
    assert says in caught.value.message
    assert not kept.folder.exists()


def test_a_choice_is_made_once_and_between_answers_to_the_same_question(kept: Preferences, processor: Any) -> None:
    choose(kept)
    with pytest.raises(ApiError, match="made already"):
        choose(kept, first="b", second="a")
    other = make_prompt("Is there a red circle?")
    remember(kept, "c", "yes.", processor, Asked({"model": "aligned"}, other.messages, other.images, remember=True))
    with pytest.raises(ApiError, match="to the same question"):
        choose(kept, second="c")


def test_an_answer_that_was_cut_off_is_not_remembered(processor: Any) -> None:
    recorder = Recorder(ASKED, Head(200, "text/event-stream", "demo-abc", "abcdef"))
    recorder.see(stream("there is a red circle.", processor, finish=None))
    assert recorder.remembered() is None


def test_pictures_of_what_is_remembered_take_no_more_memory_than_they_may(
    kept: Preferences, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "REMEMBERED_BYTES", 2 * len(PROMPT.images[0].png))
    remember(kept, "c", "yes.", processor)
    with pytest.raises(ApiError, match="'a' is not remembered"):
        choose(kept)


def test_only_the_newest_answers_are_remembered(
    kept: Preferences, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "REMEMBERED", 2)
    remember(kept, "c", "yes.", processor)
    with pytest.raises(ApiError, match="'a' is not remembered"):
        choose(kept)
