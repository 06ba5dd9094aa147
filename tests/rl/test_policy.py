"""Names of weights, checked both ways; freezing; the shipped base model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from cluster.errors import DataError
from rl.adapters import AdapterKind, adapters_off, plain_names
from rl.policy import (
    LoraSettings,
    PolicySettings,
    adapt,
    check_public_names,
    checkpoint_names,
    load_model,
    load_processor,
    merge_adapter,
    public_names,
    resolve_model,
    save_checkpoint,
)
from rl.weights import export_policy, merged_weights
from rl.world.checkpoint import make_model, make_processor, make_tokenizer

BASE = Path(resolve_model("rl/world/base"))
KINDS = get_args(AdapterKind)


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


class Unsharded:
    """The weights of a model that no engine has sharded."""

    def __init__(self, model: torch.nn.Module):
        self._weights = dict(model.named_parameters()) | dict(model.named_buffers())

    def full_weights(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, self._weights[name].data) for name in names)


def adapted(kind: AdapterKind) -> Any:
    return adapt(load_model(str(BASE), "float32"), PolicySettings(lora=LoraSettings(kind=kind, rank=3, alpha=4)))


def trained(kind: AdapterKind) -> Any:
    """An adapted model whose adapter has moved far."""
    model = adapted(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).unsqueeze(0)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_sit_in_the_language_model_only(kind: AdapterKind) -> None:
    model = adapt(make_model(0, make_tokenizer()), PolicySettings(lora=LoraSettings(kind=kind, rank=2)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "language_model" in name for name in trained)
    assert plain_names(model).keys() == make_model(0, make_tokenizer()).state_dict().keys()
    assert public_names(model) == public_names(make_model(0, make_tokenizer()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_starts_as_the_base(kind: AdapterKind) -> None:
    torch.testing.assert_close(logits(adapted(kind)), logits(load_model(str(BASE), "float32")), atol=1e-4, rtol=0)


def test_pissa_starts_alike_in_every_process_whatever_the_seed() -> None:
    torch.manual_seed(3)
    first = adapted("pissa").state_dict()
    torch.manual_seed(4)
    again = adapted("pissa").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_on_the_untouched_base_is_the_trained_model(kind: AdapterKind, tmp_path: Path) -> None:
    """Merged as serving does, and of DoRA also as published to the engines."""
    model = trained(kind)
    export_policy(model, Unsharded(model), load_processor(str(BASE)), tmp_path / "adapter")  # type: ignore[arg-type]
    merged = load_model(str(merge_adapter(str(BASE), tmp_path / "adapter", tmp_path / "merged", "float32")), "float32")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    assert (logits(merged) - logits(load_model(str(BASE), "float32"))).abs().max() > 0.1
    if kind == "dora":
        published = dict(merged_weights(model, Unsharded(model)))  # type: ignore[arg-type]
        assert published.keys() == merged.state_dict().keys()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(published[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_with_adapters_off_a_trained_model_is_the_base_and_then_itself_again(kind: AdapterKind) -> None:
    model = trained(kind)
    before, takes_gradient = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with adapters_off(model):
        assert torch.equal(logits(model), logits(load_model(str(BASE), "float32")))
    assert torch.equal(logits(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == takes_gradient


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "justaname"])
def test_a_model_that_does_not_exist_is_refused(model: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        resolve_model(model)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert resolve_model("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
