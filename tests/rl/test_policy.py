"""Names of weights, checked both ways; freezing; the shipped base model."""

from pathlib import Path

import pytest
import torch

from cluster.errors import DataError
from rl.policy import (
    LoraSettings,
    PolicySettings,
    adapt,
    check_public_names,
    checkpoint_names,
    load_model,
    load_processor,
    public_names,
    resolve_model,
    save_checkpoint,
)
from rl.world.checkpoint import make_model, make_processor, make_tokenizer

BASE = Path(resolve_model("rl/world/base"))


def test_memory_and_checkpoint_names_pair_off_completely() -> None:
    names = public_names(load_model(str(BASE), "float32"))
    stored = checkpoint_names(str(BASE))
    check_public_names(names, stored)
    assert sorted(names.values()) == sorted(stored)
    assert any(name.startswith("vision_tower.vision_model.") for name in stored)


@pytest.mark.parametrize(
    ("memory", "stored", "says"),
    [
        ({"a": "x", "b": "y"}, ["x"], r"without a partner in the checkpoint \['y'\]"),
        ({"a": "x"}, ["x", "z"], r"without one in memory \['z'\]"),
    ],
)
def test_a_name_without_partner_is_refused(memory: dict[str, str], stored: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_public_names(memory, stored)


def test_a_tied_head_may_be_absent_from_the_checkpoint() -> None:
    check_public_names({"embed": "embed", "lm_head.weight": "lm_head.weight"}, ["embed"], tied=["lm_head.weight"])


def test_a_saved_model_loads_with_the_same_weights(tmp_path: Path) -> None:
    model = make_model(1, make_tokenizer())
    save_checkpoint(model, model.state_dict(), make_processor(make_tokenizer()), tmp_path)
    again = load_model(str(tmp_path), "float32")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_processor(str(tmp_path)).tokenizer.chat_template


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(1, make_tokenizer())
    save_checkpoint(model, model.state_dict(), make_processor(make_tokenizer()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("language_model.model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lacks the weights"):
        load_model(str(tmp_path), "float32")


def test_the_base_model_is_small_untied_and_in_the_repository() -> None:
    model = load_model(str(BASE), "float32")
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert not model.config.tie_word_embeddings
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 15e6


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [((), set()), (("vision_tower",), {"vision"}), (("vision_tower", "projector"), {"vision", "projector"})],
)
def test_frozen_parts_take_no_gradient_and_the_rest_does(freeze: tuple, frozen: set[str]) -> None:
    model = adapt(make_model(0, make_tokenizer()), PolicySettings(freeze=freeze))
    for name, parameter in model.named_parameters():
        part = "vision" if "vision_tower" in name else "projector" if "projector" in name else "language"
        assert parameter.requires_grad == (part not in frozen), name


def test_adapters_sit_in_the_language_model_only() -> None:
    model = adapt(make_model(0, make_tokenizer()), PolicySettings(lora=LoraSettings(rank=2)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "language_model" in name for name in trained)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "justaname"])
def test_a_model_that_does_not_exist_is_refused(model: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        resolve_model(model)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert resolve_model("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
