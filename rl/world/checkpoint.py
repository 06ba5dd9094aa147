"""An untrained LLaVA of the tiny world: tokenizer, processor and model, in the public checkpoint layout."""

from pathlib import Path
from typing import TYPE_CHECKING

from rl.world.questions import LANGUAGE_TASKS, LETTERS
from rl.world.scenes import COLOURS, IMAGE_SIZE, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PATCH_SIZE = 8
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
WORDS = (
    *(".", ",", "?", "!", ":", "a", "an", "the", "there", "is", "are", "at", "in", "and", "of", "to", "it", "on"),
    *("top", "bottom", "left", "right", "image", "picture", "object", "objects", "nothing", "yes", "no", "not"),
    *("describe", "list", "what", "how", "many", "do", "you", "see", "plus", "can"),
)
MAX_POSITIONS = 256

# A conversation; a turn of the assistant ends with </s>. Plain strings and part lists are both accepted.
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] != 'assistant' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of whole words, lower-cased, punctuation apart."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = tuple(str(n) for n in range(19))
    words = dict.fromkeys((*SPECIAL_TOKENS, *WORDS, *COLOURS, *SHAPES, *LANGUAGE_TASKS, *LETTERS, *numbers))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def make_processor(tokenizer: "PreTrainedTokenizerFast") -> "LlavaProcessor":
    """The tokenizer beside a CLIP image processor for square pictures of `IMAGE_SIZE`."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    seed: int, tokenizer: "PreTrainedTokenizerFast", width: int = 192, layers: int = 4
) -> "LlavaForConditionalGeneration":
    """A LLaVA with random weights, by default of 3 M parameters; `width` and `layers` are its language model's."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


def write_untrained(folder: Path, seed: int) -> None:
    """Write processor and untrained model to `folder`."""
    from rl.policy import save_checkpoint

    tokenizer = make_tokenizer()
    model = make_model(seed, tokenizer)
    save_checkpoint(model, dict(model.state_dict()), make_processor(tokenizer), folder)
