"""Prompt files and prompt order."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from cluster.errors import DataError
from rl.data import (
    DataSettings,
    MixedData,
    PromptSets,
    ShuffledStream,
    check_files,
    check_prompts,
    split_by_image,
    without_leaks,
)
from rl.formats import Fault
from rl.policy import load_processor, resolve_model
from rl.types import Prompt
from rl.world.scenes import draw_scene
from tests.conftest import make_prompt


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load(seed: int = 0, faults: list[Fault] | None = None, **fields: object) -> PromptSets:
    settings = TypeAdapter[Any](DataSettings).validate_python(fields)
    return settings.load(seed, (faults if faults is not None else []).extend)


def read(path: Path, **more: object) -> list[Prompt]:
    """All prompts of a file, held out from itself."""
    sets = load(kind="files", train=str(path), **more)
    return [*sets.training, *sets.heldout]


def test_prompts_are_read_with_their_images(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "a.png")
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "What is it?", "images": ["a.png"], "answer": "white", "id": "one"},
        "",
        {"messages": [{"role": "user", "content": "Hello"}]},
    )
    first, second = sorted(read(file), key=lambda prompt: -len(prompt.images))
    assert (first.reference_answer, first.text) == ("white", "What is it?")
    assert first.id.startswith("one-")
    assert first.images[0].open().getpixel((0, 0)) == (255, 255, 255)
    assert second.messages[0]["content"] == [{"type": "text", "text": "Hello"}]
    assert len(second.id) == 16


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "row 2: not JSON"),
        ("[]", "row 2: an object with columns is expected"),
        ({"prompt": " "}, "row 2: 'prompt' must be a non-empty text"),
        ({"prompt": "x", "imgae": "a.png"}, r"row 2: unknown column 'imgae' \(known are "),
        ({"prompt": "x", "images": ["no.png"]}, "row 2: image: image file .*no.png does not exist"),
        ({"prompt": "x", "images": ["broken.png"]}, "row 2: image: broken.png: this is no image"),
        ({"prompt": "x", "truth": "blue"}, "row 2: `truth` must be an object with a `kind` of describe, "),
        ({"prompt": "x", "truth": {"kind": "colour"}}, "row 2: `truth` must be an object with a `kind` of describe, "),
        ({"prompt": "x", "truth": {"kind": "describe"}}, "row 2: `truth` of kind describe needs `objects`"),
        ({"prompt": "x", "truth": {"kind": "describe", "objects": [["here", "cat"]]}}, "needs `objects`, a list of"),
        (
            {"prompt": "x", "truth": {"kind": "sum", "answer": 3}},
            "row 2: `truth` of kind sum needs an `answer`, a text",
        ),
        ({"prompt": "x", "truth": {"kind": "presence", "answer": "no"}}, "needs `negatives`: random, popular"),
        ({"prompt": "x", "answer": ["a", "b"]}, "row 2: 'answer' must be a non-empty text"),
        ({"messages": [{"role": "user"}]}, "row 2: each message needs `role` and `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "row 2: message content must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 image parts in the messages but 0"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "do not end with the user's turn"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, row: object, says: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match=says):
        read(write(tmp_path / "p.jsonl", {"prompt": "fine"}, row))


def test_bad_rows_are_all_reported_and_refused_with_the_first_named(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, *["{"] * 7)
    faults: list[Fault] = []
    with pytest.raises(DataError, match=r"data\.train: 7 bad rows: .*row 6.*\(and 2 more\).*bad_rows=skip"):
        load(kind="files", train=str(file), faults=faults)
    assert [fault.row for fault in faults] == [2, 3, 4, 5, 6, 7, 8]


def test_bad_rows_are_skipped_if_so_configured_and_still_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "one"}, "{", {"prompt": "two"})
    faults: list[Fault] = []
    sets = load(kind="files", train=str(file), bad_rows="skip", heldout_share=0.5, faults=faults)
    assert {prompt.text for prompt in (*sets.training, *sets.heldout)} == {"one", "two"}
    assert [(fault.file, fault.row) for fault in faults] == [("p.jsonl", 2)]


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="holds no usable row"):
        read(write(tmp_path / "p.jsonl", text))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train: file nothing\.jsonl does not exist"):
        read(Path("nothing.jsonl"))


def test_start_and_limit_pick_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": str(index)} for index in range(10)))
    assert {int(prompt.text) for prompt in read(file, start=3, limit=4)} == {3, 4, 5, 6}


def test_all_prompts_of_an_image_are_held_out_together() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(60)]
    prompts = [make_prompt(text, scene) for scene in scenes for text in ("a", "b", "c")]
    training, heldout = split_by_image(prompts, 0.2)
    shown = [{image.digest for prompt in part for image in prompt.images} for part in (training, heldout)]
    assert not shown[0] & shown[1]
    assert len(training) + len(heldout) == len(prompts)
    assert 0.05 < len(heldout) / len(prompts) < 0.4
    again = split_by_image(prompts[::-1], 0.2)
    assert {p.id for p in again.heldout} == {p.id for p in heldout}


def test_training_prompts_about_a_held_out_image_are_left_out() -> None:
    kept = make_prompt("other", None)
    assert without_leaks([make_prompt("a"), kept], [make_prompt("b")]).training == [kept]
    with pytest.raises(DataError, match="hold out other images"):
        without_leaks([make_prompt("a")], [make_prompt("b")])


def test_a_folder_of_images_is_asked_one_question(tmp_path: Path) -> None:
    for index in range(12):
        Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 bad image: broken\.jpg"):
        load(kind="image_folder", path=str(tmp_path), question="What?")
    sets = load(kind="image_folder", path=str(tmp_path), question="What?", bad_rows="skip", heldout_share=0.3)
    assert len(sets.training) + len(sets.heldout) == 12
    assert {prompt.text for prompt in sets.training} == {"What?"}


def test_a_mixture_follows_its_weights_and_its_seed(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 200)):
        write(tmp_path / f"{name}.jsonl", *({"prompt": f"{name} {index}"} for index in range(count)))
    write(tmp_path / "held.jsonl", {"prompt": "held"})
    files = [
        {"kind": "files", "train": str(tmp_path / f"{name}.jsonl"), "heldout": str(tmp_path / "held.jsonl")}
        for name in "ab"
    ]
    parts = [{"data": files[0], "weight": 1}, {"data": files[1], "weight": 3}]
    mixed = load(kind="mixed", parts=parts).training
    counts = Counter(prompt.source for prompt in mixed)
    assert counts == {"a": 40, "b": 120}
    assert len({prompt.id for prompt in mixed}) == 160
    assert [p.id for p in load(kind="mixed", parts=parts).training] == [p.id for p in mixed]
    assert [p.id for p in load(seed=1, kind="mixed", parts=parts).training] != [p.id for p in mixed]
    with pytest.raises(DataError, match="part 1 has 40 prompts, but its share of 200 is 50"):
        load(kind="mixed", parts=parts, prompts=200)


def test_prompts_that_do_not_fit_are_refused_by_id() -> None:
    processor = load_processor(resolve_model("rl/world/base"))
    prompt = make_prompt("red " * 50)
    check_prompts([prompt], processor, room=69, max_images=1)
    with pytest.raises(DataError, match=f"prompt {prompt.id} takes 69 tokens with its images, but only 68 fit"):
        check_prompts([prompt], processor, room=68, max_images=1)


def test_a_placeholder_in_the_text_is_no_image() -> None:
    prompt = make_prompt("What does <image> mean?", None)
    with pytest.raises(DataError, match=rf"prompt {prompt.id} has 0 images but 1 image placeholders in its text"):
        check_prompts([prompt], load_processor(resolve_model("rl/world/base")), room=100, max_images=1)


def test_rows_that_share_an_id_are_prompts_of_their_own(tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": "7"} for text in ("one?", "two?", "three?")]
    prompts = read(write(tmp_path / "p.jsonl", *rows))
    assert len({prompt.id for prompt in prompts}) == 3
    assert all(prompt.id.startswith("7-") for prompt in prompts)


def test_files_that_are_not_there_are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    fields = {"kind": "mixed", "parts": [
        {"data": {"kind": "files", "train": str(tmp_path / "there.jsonl")}},
        {"data": {"kind": "image_folder", "path": str(tmp_path / "gone"), "question": "What?"}},
    ]}  # fmt: skip
    with pytest.raises(DataError, match=r"data\.path: .*gone does not exist"):
        check_files(MixedData.model_validate(fields).files())


def test_no_image_of_a_prompt_with_several_is_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    images = [make_prompt("a", draw_scene(rng)).images[0] for _ in range(40)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What differs?"}]
    asked = [{"role": "user", "content": content}]
    prompts = [Prompt.make(asked, [one, other]) for one, other in itertools.pairwise(images)]
    sets = split_by_image(prompts, 0.2)
    held = {image.digest for prompt in sets.heldout for image in prompt.images}
    assert not held & {image.digest for prompt in sets.training for image in prompt.images}


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
    stream = ShuffledStream(prompts, seed=0)
    first, second = stream.take(10), stream.take(10)
    assert {p.id for p in first} == {p.id for p in second} == {p.id for p in prompts}
    assert first != second


def test_a_position_says_what_comes_next() -> None:
    prompts = [make_prompt(str(index), None) for index in range(10)]
    whole = ShuffledStream(prompts, seed=1).take(35)
    part = ShuffledStream(prompts, seed=1, position=17)
    assert part.take(18) == whole[17:]
    assert part.position == 35
