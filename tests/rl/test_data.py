"""Prompt files and prompt order."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cluster.errors import DataError
from rl.data import PromptStream, check_prompts, read_prompt_file
from rl.policy import load_processor, resolve_model
from tests.conftest import make_prompt


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_prompts_are_read_with_their_images(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "a.png")
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "What is it?", "images": ["a.png"], "answer": "white", "id": "one"},
        "",
        {"messages": [{"role": "user", "content": "Hello"}]},
    )
    first, second = read_prompt_file(file, "data.train")
    assert (first.id, first.reference_answer, first.text) == ("one", "white", "What is it?")
    assert first.images[0].open().getpixel((0, 0)) == (255, 255, 255)
    assert second.messages[0]["content"] == [{"type": "text", "text": "Hello"}]
    assert len(second.id) == 16


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "row 2: not JSON"),
        ("[]", "row 2: a JSON object is expected"),
        ({"prompt": " "}, "row 2: `prompt` must be a non-empty text"),
        ({"prompt": "x", "image": "a.png"}, r"row 2: unknown keys \['image'\]"),
        ({"prompt": "x", "images": ["no.png"]}, "row 2: image file .*no.png does not exist"),
        ({"prompt": "x", "images": ["broken.png"]}, "row 2: the image cannot be read"),
        ({"messages": [{"role": "user"}]}, "row 2: each message needs exactly"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "row 2: message content must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 image parts in `messages` but 0"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, row: object, says: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match=says):
        read_prompt_file(write(tmp_path / "p.jsonl", {"prompt": "fine"}, row), "data.train")


def test_all_bad_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"7 bad rows: .*row 5.*\(and 2 more\)"):
        read_prompt_file(write(tmp_path / "p.jsonl", *["{"] * 7), "data.train")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompt_file(write(tmp_path / "p.jsonl", text), "data.train")


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train: prompt file nothing\.jsonl does not exist"):
        read_prompt_file(Path("nothing.jsonl"), "data.train")


def test_prompts_that_do_not_fit_are_refused_by_id() -> None:
    processor = load_processor(resolve_model("rl/world/base"))
    prompt = make_prompt("red " * 50)
    check_prompts([prompt], processor, room=69, max_images=1)
    with pytest.raises(DataError, match=f"prompt {prompt.id} takes 69 tokens with its images, but only 68 fit"):
        check_prompts([prompt], processor, room=68, max_images=1)


def test_more_images_than_allowed_are_refused_by_id() -> None:
    prompt = make_prompt()
    with pytest.raises(DataError, match=rf"prompt {prompt.id} has 1 images; raise rollout.max_images"):
        check_prompts([prompt], load_processor(resolve_model("rl/world/base")), room=100, max_images=0)


def test_a_model_without_sight_refuses_images() -> None:
    tokenizer = load_processor(resolve_model("rl/world/base")).tokenizer
    prompt = make_prompt()
    with pytest.raises(DataError, match=rf"prompt {prompt.id} has an image, but policy.model takes none"):
        check_prompts([prompt], tokenizer, room=100, max_images=1)


def test_every_epoch_uses_each_prompt_once_in_another_order() -> None:
    prompts = [make_prompt(str(index), None) for index in range(10)]
    stream = PromptStream(prompts, seed=0)
    first, second = stream.take(10), stream.take(10)
    assert {p.id for p in first} == {p.id for p in second} == {p.id for p in prompts}
    assert first != second


def test_a_position_says_what_comes_next() -> None:
    prompts = [make_prompt(str(index), None) for index in range(10)]
    whole = PromptStream(prompts, seed=1).take(35)
    part = PromptStream(prompts, seed=1, position=17)
    assert part.take(18) == whole[17:]
    assert part.position == 35
