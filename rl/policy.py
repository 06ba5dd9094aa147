"""The model: how it is loaded, adapted and frozen, what its weights are called, how it is written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.errors import DataError, first_line
from cluster.settings import Settings
from rl.adapters import LoraSettings, attach, is_adapted, plain_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

Precision = Literal["float32", "bfloat16"]


class PolicySettings(Settings):
    """The model to align."""

    model: str = "rl/world/base"
    """A Hugging Face model folder or hub id in the public layout, for transformers and vLLM alike."""
    precision: Precision = "float32"
    """Of the policy in learner, reference and sampler; bfloat16 on GPUs."""
    max_length: int = Field(256, ge=16)
    """Tokens of prompt (image tokens included) and completion together; longer prompts are refused, never cut."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights; leave out for full fine-tuning."""
    freeze: tuple[Literal["vision_tower", "projector"], ...] = ("vision_tower",)
    """Parts of the model that are not trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


def resolve_model(model: str, field: str = "policy.model") -> str:
    """The model's folder as an absolute path, or the hub id as it is.

    Raises:
        DataError: it looks like a folder and is none, or the folder has no config.json.
    """
    path = Path(model).expanduser()
    packaged = Path(__file__).resolve().parent.parent / model
    path = path if path.exists() else packaged
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{field}: folder {path} has no config.json, so it is not a Hugging Face model folder")
        return str(path.resolve())
    owner, slash, name = model.partition("/")
    is_hub_id = bool(owner and name) and "/" not in name and owner[0] not in ".~" and not Path(owner).exists()
    if slash and is_hub_id:
        return model
    raise DataError(
        f"{field}: folder {model} does not exist; give a model folder or a hub id such as llava-hf/llava-1.5-7b-hf"
    )


def load_processor(model: str) -> "ProcessorMixin":
    """The model's processor, or for a text-only model its tokenizer.

    Raises:
        DataError: it is missing or broken, or has no chat template.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    try:
        sees = takes_images(AutoConfig.from_pretrained(model))
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"policy.model: the processor of {model} cannot be loaded ({first_line(error)})") from error
    if sees and not hasattr(processor, "image_processor"):
        raise DataError(
            f"policy.model: {model} sees images but lacks preprocessor_config.json; copy it from its source"
        )
    if not processor.chat_template:
        raise DataError(f"policy.model: {model} has no chat template; use the instruction-tuned model, or add one")
    return processor


def load_model(model: str, precision: Precision) -> "PreTrainedModel":
    """The model with its language head, on the CPU, dropout off.

    Raises:
        DataError: transformers cannot load the folder, or some of its weights are missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model)
    loader = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    try:
        loaded, report = loader.from_pretrained(model, dtype=getattr(torch, precision), output_loading_info=True)
    except (OSError, ValueError) as error:
        raise DataError(f"policy.model: {model} cannot be loaded ({first_line(error)})") from error
    if report["missing_keys"]:
        raise DataError(f"policy.model: {model} lacks the weights {sorted(report['missing_keys'])[:3]}")
    return loaded.eval()


def takes_images(config: Any) -> bool:
    """Whether a model config describes a model with a vision tower."""
    return hasattr(config, "vision_config")


def adapt(model: "PreTrainedModel", settings: PolicySettings) -> "torch.nn.Module":
    """Freeze parts, attach adapters and switch on checkpointing, as the settings say."""
    for part in settings.freeze:
        for name, parameter in model.named_parameters():
            if part.removesuffix("_tower") in name:
                parameter.requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if settings.lora is None:
        return model
    modules = settings.lora.target_modules
    inside_language_model = rf".*language_model.*\.({'|'.join(modules)})"
    return attach(model, settings.lora, inside_language_model if takes_images(model.config) else list(modules))


def plain_model(model: "torch.nn.Module") -> "PreTrainedModel":
    """The transformers model itself, below any adapters."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def public_names(model: "torch.nn.Module") -> dict[str, str]:
    """Map each in-memory parameter name to the name in public checkpoints, which vLLM expects too. Of an adapted
    model, those of the model below the adapters.

    transformers 5 renames modules on load and, when it saves, undoes most but not all of it: a CLIP tower
    loses its `vision_model` level. This is the one place that knows.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    base = plain_model(model)
    saved_names = {}
    for name in plain_names(model):
        (saved,) = revert_weight_conversion(base, {name: torch.empty(0)})
        saved_names[name] = saved
    return {name: _restore_tower_level(saved) for name, saved in saved_names.items()}


def _restore_tower_level(name: str) -> str:
    tower = "vision_tower."
    rest = name.removeprefix(tower)
    if rest != name and rest.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")):
        return f"{tower}vision_model.{rest}"
    return name


def check_public_names(names: Mapping[str, str], checkpoint_names: Iterable[str], tied: Iterable[str] = ()) -> None:
    """Check, both ways, that every weight in memory has its partner in the checkpoint the sampler loaded.

    `tied` holds in-memory names that a checkpoint may leave out because they copy another weight.

    Raises:
        DataError: a name on either side has no partner.
    """
    in_checkpoint = {name for name in checkpoint_names if not name.endswith("position_ids")}
    homeless = sorted(name for memory, name in names.items() if name not in in_checkpoint and memory not in set(tied))
    orphans = sorted(in_checkpoint - set(names.values()))
    if homeless or orphans:
        raise DataError(
            f"policy.model: weights in memory without a partner in the checkpoint {homeless[:3]}, weights in the "
            f"checkpoint without one in memory {orphans[:3]}; re-save the model in the public layout of its family"
        )


def checkpoint_names(model: str) -> list[str]:
    """The weight names of a safetensors checkpoint, from its index or headers; a hub id is downloaded if need be."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text())["weight_map"])
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    return names


def save_checkpoint(
    model: "PreTrainedModel", weights: Mapping[str, "torch.Tensor"], processor: "ProcessorMixin", folder: Path
) -> None:
    """Write a plain Hugging Face folder in the public layout, which transformers and vLLM both load.

    `weights` maps in-memory names to full tensors (a ZeRO-3 model holds only shards of its own).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = public_names(model)
    tensors = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def whole_model(model: str, folder: Path, precision: Precision) -> str:
    """The model itself, or if it is a PEFT adapter its base with the adapter merged in, written to `folder`.

    Raises:
        DataError: it is neither.
    """
    path = Path(model).expanduser()
    if not (path / "adapter_config.json").is_file():
        return resolve_model(model, "model")
    base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    return str(merge_adapter(resolve_model(base, "base_model_name_or_path of the adapter"), path, folder, precision))


def merge_adapter(base: str, adapter: Path, folder: Path, precision: Precision) -> Path:
    """Write the base with a PEFT adapter merged into it to `folder`, unless that very one is there; returns it."""
    from peft import PeftModel

    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    stamp = folder / "adapter.sha256"
    if not stamp.is_file() or stamp.read_text() != digest:
        merged = PeftModel.from_pretrained(load_model(base, precision), str(adapter)).merge_and_unload()
        save_checkpoint(merged, merged.state_dict(), load_processor(base), folder)
        stamp.write_text(digest)
    return folder
