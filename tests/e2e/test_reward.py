"""Reward models as judges: real sequence-classification checkpoints in real actors, small and untrained."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.connect import ClusterSettings, connect
from cluster.errors import ConfigError, DataError, RaylignError, root_cause
from rl.judges import JudgeContext
from rl.judges.reward import RewardSettings
from rl.policy import resolve_model
from rl.types import Judgement, Prompt
from rl.world.scenes import Scene
from tests.conftest import make_completion, make_prompt
from tests.e2e.conftest import Cluster

ANSWERS = ("yes.", "there is a red circle at the top left.", "no.")
IMAGE_TOKENS = ("<boi>", "<soft>", "<eoi>")
OTHER = Scene((("top right", "blue square"),))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text_model(tmp_path_factory.mktemp("text"), outputs=1)


def write_text_model(folder: Path, outputs: int) -> str:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("rl/world/base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=outputs, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Gemma 3 is the family of which transformers has a classifier that sees."""
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForSequenceClassification, Gemma3ImageProcessor
    from transformers import Gemma3Processor as Processor

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vision")
    names = dict(zip(("boi_token", "image_token", "eoi_token"), IMAGE_TOKENS, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("rl/world/base"), extra_special_tokens=names)
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    boi, soft, eoi = (tokenizer.convert_tokens_to_ids(name) for name in IMAGE_TOKENS)
    pictures = Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    template = tokenizer.chat_template.replace("<image>", "<boi>")
    Processor(pictures, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    attention = {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    config = Gemma3Config(
        text_config={**small, **attention, "vocab_size": len(tokenizer)},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4, boi_token_index=boi, image_token_index=soft, eoi_token_index=eoi, num_labels=1,
    )  # fmt: skip
    model = Gemma3ForSequenceClassification(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero, untrained
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster(cluster: Cluster) -> Iterator[None]:
    import ray

    connect(ClusterSettings(address=cluster.address))
    yield
    ray.shutdown()


def grade(model: str, prompts: list[Prompt], logs: Path, **more: Any) -> list[list[Judgement]]:
    judge = RewardSettings(kind="reward", model=model, **more).build(JudgeContext(logs))
    groups = [[make_completion(answer, prompt_id=prompt.id) for answer in ANSWERS] for prompt in prompts]
    try:
        return asyncio.run(judge.grade(prompts, groups))
    except Exception as error:
        raise root_cause(error) from None


def test_every_answer_gets_the_reward_that_the_model_gives_it_alone(text_model: str, tmp_path: Path) -> None:
    """Whatever batch, padding and worker it falls into."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    prompts = [make_prompt(text, None) for text in ("What is 3 plus 4?", "Copy: g j b", "How many objects are there?")]
    verdicts = grade(text_model, prompts, tmp_path, workers=2, tokens_per_batch=64)
    model = AutoModelForSequenceClassification.from_pretrained(text_model)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    for prompt, group in zip(prompts, verdicts, strict=True):
        for answer, verdict in zip(ANSWERS, group, strict=True):
            turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                expected = model(ids).logits.item()
            assert verdict.score == pytest.approx(expected, abs=1e-5)
            assert verdict.attributes is None
    assert len({one.score for group in verdicts for one in group}) == 9


def test_a_vision_language_reward_model_sees_the_picture(vision_model: str, tmp_path: Path) -> None:
    """The same words about another picture get another reward; prompts without a picture may stand beside them."""
    prompts = [make_prompt(), make_prompt(scene=OTHER), make_prompt("What is 3 plus 4?", None), make_prompt()]
    one, other, text, again = ([v.score for v in group] for group in grade(vision_model, prompts, tmp_path))
    assert one == pytest.approx(again, abs=1e-6)
    assert all(abs(a - b) > 1e-4 for a, b in zip(one, other, strict=True))
    assert len(set(text)) == 3


def test_a_text_model_is_never_asked_about_a_picture(text_model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would judge without looking"):
        grade(text_model, [make_prompt()], tmp_path)


def test_a_classifier_of_several_classes_is_no_reward_model(tmp_path: Path) -> None:
    model = write_text_model(tmp_path / "classes", outputs=3)
    with pytest.raises(ConfigError, match="a head of several outputs"):
        grade(model, [make_prompt("Copy: g j b", None)], tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RaylignError, match=r"judge\.model: folder"):
        grade(str(tmp_path / "nothing"), [], tmp_path)
