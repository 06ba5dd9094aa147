"""Data sets that people have, each in a small file written in exactly its format."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from cluster.errors import DataError
from rl.formats import Fault, FormatName, Record, read_records
from rl.types import Attributes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "coco").mkdir()
    for name in ("a.jpg", "coco/b.jpg", "2353424.jpg"):
        Image.new("RGB", (16, 12), "red").save(tmp_path / name)
    return tmp_path


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(buffer, format="PNG")
    return buffer.getvalue()


def records(path: Path, format: FormatName, images: Path | None = None) -> list[Record]:
    read = [record for _, _, record in read_records(path, format, images)]
    assert not any(isinstance(one, Fault) for one in read), read
    return read  # type: ignore[return-value]


def faults(path: Path, format: FormatName) -> list[str]:
    return [str(record) for _, _, record in read_records(path, format, None) if isinstance(record, Fault)]


def as_json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def as_lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def as_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def texts(record: Record) -> list[tuple[str, list[str]]]:
    """Roles with their parts, an image as its placeholder."""
    return [
        (message["role"], [part.get("text", "<image>") for part in message["content"]]) for message in record.messages
    ]


def answers(record: Record) -> list[tuple[str, float | None]]:
    return [(one.text, one.score) for one in record.judged]


def test_trl_standard(folder: Path) -> None:
    file = as_lines(
        folder / "p.jsonl", {"prompt": "What?", "chosen": "a cat", "rejected": "a dog", "images": ["a.jpg"]}
    )
    (one,) = records(file, "trl")
    assert texts(one) == [("user", ["<image>", "What?"])]
    assert one.images == (folder / "a.jpg",)
    assert answers(one) == [("a cat", 1.0), ("a dog", 0.0)]
    assert one.preference


def test_trl_conversational_with_parts_as_arrow_gives_them_back(folder: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}],
        "images": [{"bytes": png(), "path": None}],
    }
    (one,) = records(as_parquet(folder / "p.parquet", row), "trl")
    assert texts(one) == [("user", ["<image>", "What?"])]
    assert one.images == (png(),)
    assert answers(one) == [("a cat", 1.0), ("a dog", 0.0)]


def test_trl_with_an_implicit_prompt(folder: Path) -> None:
    turn = {"role": "user", "content": "Say yes"}
    row = {
        "chosen": [turn, {"role": "assistant", "content": "yes"}],
        "rejected": [turn, {"role": "assistant", "content": "no"}],
    }
    (one,) = records(as_lines(folder / "p.jsonl", row), "trl")
    assert texts(one) == [("user", ["Say yes"])]
    assert answers(one) == [("yes", 1.0), ("no", 0.0)]


def test_what_this_project_writes_is_a_trl_set(folder: Path) -> None:
    from rl.store import RunFolder
    from rl.tables import write_pairs
    from tests.conftest import make_pair

    run = RunFolder(str(folder))
    write_pairs((make_pair(),), run.filesystem, run.path("own.parquet"))
    (one,) = records(folder / "own.parquet", "trl")
    assert answers(one) == [("good.", 1.0), ("bad.", 0.0)]
    assert texts(one) == [("user", ["<image>", "What do you see?"])]


def test_llava_instruct(folder: Path) -> None:
    rows = [
        {
            "id": "000000033471",
            "image": "coco/b.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
                {"from": "gpt", "value": "White and red."},
                {"from": "human", "value": "What feature is on its back?"},
                {"from": "gpt", "value": "An advertisement."},
            ],
        },
        {"id": "x1", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
        {
            "id": "x2",
            "image": "a.jpg",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "Red."}],
        },
    ]
    first, text_only, image_last = records(as_json(folder / "llava.json", rows), "llava")
    assert texts(first) == [
        ("user", ["<image>", "What are the colors of the bus?"]),
        ("assistant", ["White and red."]),
        ("user", ["What feature is on its back?"]),
    ]
    assert first.answer == "An advertisement."
    assert first.id == "000000033471"
    assert text_only.images == ()
    assert texts(image_last) == [("user", ["What?", "<image>"])]


def test_scigraphqa(folder: Path) -> None:
    row = {
        "image_file": "a.jpg", "id": "1234", "caption": "A figure", "first_mention": "Fig. 1", "response": "…",
        "title": "T", "abstract": "A",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "q_a_pairs": [["What does it show?", "Growth."], ["Of what?", "Of trees."]],
    }  # fmt: skip
    one, other = records(as_parquet(folder / "s.parquet", row), "scigraphqa")
    assert texts(one) == [("user", ["<image>", "What does it show?"])]
    assert (one.answer, other.answer) == ("Growth.", "Of trees.")
    assert other.images == (folder / "a.jpg",)


def test_lrv_instruct(folder: Path) -> None:
    row = {"image_id": "2353424", "question": "Is there a cat?", "answer": "No.", "task": "negative"}
    (one,) = records(as_json(folder / "filter_cap.json", [row]), "lrv")
    assert one.images == (folder / "2353424.jpg",)
    assert one.answer == "No."


GRADES = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}


def test_helpsteer_joins_the_answers_of_a_prompt(folder: Path) -> None:
    low = dict(GRADES, helpfulness=0)
    rows = [
        {"prompt": "Why?", "response": "Because.", **GRADES},
        {"prompt": "Why?", "response": "No idea.", **low},
        {"prompt": "How?", "response": "So.", **GRADES},
    ]
    why, how = records(as_lines(folder / "train.jsonl", *rows), "helpsteer")
    assert answers(why) == [("Because.", 11.0), ("No idea.", 8.0)]
    assert why.judged[0].attributes == Attributes(3, 4, 4, 2, 2)
    assert not why.preference
    assert answers(how) == [("So.", 11.0)]


def test_helpsteer2_with_turns(folder: Path) -> None:
    prompt = "Hi<extra_id_1>Assistant\nHello.<extra_id_1>User\nHow are you?<extra_id_1>Assistant\n"
    (one,) = records(as_lines(folder / "t.jsonl", {"prompt": prompt, "response": "Well.", **GRADES}), "helpsteer")
    assert texts(one) == [("user", ["Hi"]), ("assistant", ["Hello."]), ("user", ["How are you?"])]


def test_rlaif_v(folder: Path) -> None:
    row = {
        "ds_name": "RLAIF-V", "image": {"bytes": png(), "path": "x.jpg"}, "question": "What?", "chosen": "sea",
        "rejected": "land", "origin_dataset": "coco", "origin_split": '{"model": "x"}', "idx": 0, "image_path": "x.jpg",
    }  # fmt: skip
    (one,) = records(as_parquet(folder / "r.parquet", row), "rlaif_v")
    assert one.images == (png(),)
    assert answers(one) == [("sea", 1.0), ("land", 0.0)]


def test_rlhf_v_keeps_its_text_in_json(folder: Path) -> None:
    row = {
        "ds_name": "RLHF-V", "image": {"bytes": png(), "path": None}, "image_path": "a.jpg", "idx": 1,
        "text": json.dumps({"question": "What?", "chosen": "sea", "rejected": "land"}), "origin_dataset": "vqa",
        "origin_split": "train",
    }  # fmt: skip
    (one,) = records(as_parquet(folder / "r.parquet", row), "rlhf_v")
    assert texts(one) == [("user", ["<image>", "What?"])]
    assert answers(one) == [("sea", 1.0), ("land", 0.0)]


def rated(response: str, *ratings: str) -> dict[str, Any]:
    names = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    aspects = {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(names, ratings, strict=True)}
    return {"annotations": aspects, "model": "m", "response": response}


def test_vlfeedback_adds_ratings_and_passes_over_those_not_given(folder: Path) -> None:
    row = {
        "id": "v1", "prompt": "What?", "models": ["m", "m"], "img_path": "a.jpg",
        "completions": [rated("sea", "4", "5", "5"), rated("land", "2", "N/A", "5")],
    }  # fmt: skip
    (one,) = records(as_lines(folder / "v.jsonl", row), "vlfeedback")
    assert answers(one) == [("sea", 14.0), ("land", None)]
    assert one.images == (folder / "a.jpg",)


def test_povid(folder: Path) -> None:
    row = {
        "id": "000000033471", "image": "coco/b.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a bus"}],
        "rejected_conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "two buses"}],
    }  # fmt: skip
    (one,) = records(as_json(folder / "povid.json", [row]), "povid")
    assert answers(one) == [("a bus", 1.0), ("two buses", 0.0)]


def test_csv_of_prompts(folder: Path) -> None:
    with (folder / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "image", "answer"])
        writer.writeheader()
        writer.writerow({"prompt": "What, exactly?", "image": "a.jpg", "answer": "red"})
        writer.writerow({"prompt": "Hello", "image": "", "answer": ""})
    one, other = records(folder / "p.csv", "prompts")
    assert (one.images, one.answer) == ((folder / "a.jpg",), "red")
    assert (other.images, other.answer) == ((), None)


def test_a_folder_of_files_is_read_in_order(folder: Path) -> None:
    (folder / "set").mkdir()
    as_lines(folder / "set" / "2.jsonl", {"prompt": "b", "images": ["a.jpg"]})
    as_lines(folder / "set" / "1.jsonl", {"prompt": "a"})
    assert [texts(one)[0][1][-1] for one in records(folder / "set", "prompts", folder)] == ["a", "b"]


@pytest.mark.parametrize(
    ("format", "row", "says"),
    [
        ("trl", {"prompt": "x", "chosen": "a"}, "row 1: column 'rejected' is missing"),
        ("trl", {"prompt": "x", "chosen": "a", "rejected": " "}, "row 1: 'rejected' must be a non-empty text"),
        ("trl", {"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
        ("trl", {"prompt": "x <image> <image>", "chosen": "a", "rejected": "b", "images": ["a.jpg"]}, "has 2 <image>"),
        ("trl", {"prompt": "x", "chosen": "a", "rejected": "b", "imgs": ["a.jpg"]}, "'imgs' looks like pictures"),
        ("trl", {"prompt": [{"role": "user", "content": ["x"]}], "chosen": "a", "rejected": "b"}, "message content"),
        ("scigraphqa", {"image_file": "a.jpg", "q_a_pairs": 5}, "not of the shape that this format has"),
        ("vlfeedback", {"prompt": "x", "completions": None, "img_path": "a.jpg"}, "not of the shape"),
        ("llava", {"conversations": [{"from": "human", "value": "x"}]}, "no question with an answer"),
        ("llava", {"conversations": [{"from": "x", "value": "x"}] * 2}, "no 'from' that is human or gpt"),
        ("helpsteer", {"prompt": "x", "response": "y", **GRADES, "verbosity": 5}, "'verbosity' is 5, not from 0 to 4"),
        ("helpsteer", {"prompt": "x", "response": "", **GRADES}, "'response' must be a non-empty text"),
        ("rlhf_v", {"image": "a.jpg", "text": "{"}, "not the JSON object"),
        ("rlaif_v", {"image": {}, "question": "x", "chosen": "a", "rejected": "b"}, "neither a path nor bytes"),
        ("scigraphqa", {"image_file": "a.jpg", "q_a_pairs": [["x"]]}, "not a question with an answer"),
        ("vlfeedback", {"prompt": "x", "completions": [{}], "img_path": "a.jpg"}, "has no annotations"),
    ],
)
def test_a_bad_row_is_a_fault_with_its_number(folder: Path, format: FormatName, row: Any, says: str) -> None:
    (fault,) = faults(as_lines(folder / "p.jsonl", row), format)
    assert says in fault


@pytest.mark.parametrize("name", ["p.txt", "p.parquet"])
def test_a_file_that_is_no_table_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("nothing")
    with pytest.raises(DataError, match=name):
        records(folder / name, "trl")
