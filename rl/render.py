"""From chat messages to the policy's tokens."""

from typing import TYPE_CHECKING

from rl.types import WRITTEN, Completion, Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def prompt_token_ids(prompt: Prompt, processor: "ProcessorMixin", expand_images: bool) -> tuple[int, ...]:
    """The prompt under the model's chat template, opened for the assistant's answer.

    With `expand_images` each image placeholder is repeated once per image token, as the model wants it;
    without, it stands once, as vLLM wants it.
    """
    text = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    add_special_tokens = not text.startswith(tokenizer.bos_token or "\0")
    if expand_images and prompt.images:
        counts = image_token_counts(prompt, processor)
        for count in counts:
            text = text.replace(processor.image_token, "\0" * count, 1)
        text = text.replace("\0", processor.image_token)
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def image_token_counts(prompt: Prompt, processor: "ProcessorMixin") -> list[int]:
    """How many tokens each image of the prompt takes, from its size alone."""
    sizes = [(image.height, image.width) for image in prompt.images]
    return list(processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens) if sizes else []


def placeholders(prompt: Prompt, processor: "ProcessorMixin") -> int:
    """How many image placeholders the prompt has under the chat template; a text may hold some by mistake."""
    token = getattr(processor, "image_token", None)
    text = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    return int(text.count(token)) if token else 0


def expanded_length(prompt: Prompt, processor: "ProcessorMixin") -> int:
    """Tokens of the prompt with its images, without decoding any."""
    plain = len(prompt_token_ids(prompt, processor, expand_images=False))
    return plain + sum(count - 1 for count in image_token_counts(prompt, processor))


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a line behind the last user message."""
    *before, last = prompt.messages
    content = [*last["content"], {"type": "text", "text": f"\n{suffix}"}]
    messages = [*before, {**last, "content": content}]
    return Prompt.make(messages, prompt.images, prompt.reference_answer, prompt.truth, prompt.id, prompt.source)


def answer_token_ids(text: str, processor: "ProcessorMixin") -> tuple[int, ...]:
    """The tokens of an answer, or of its beginning, that follow those of the prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def written_completion(prompt: Prompt, text: str, processor: "ProcessorMixin") -> Completion:
    """An answer that nobody sampled, as tokens closed by the end-of-turn token; it has no sampler log-probs."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return Completion(
        prompt_id=prompt.id,
        prompt_token_ids=prompt_token_ids(prompt, processor, expand_images=True),
        token_ids=(*answer_token_ids(text, processor), tokenizer.eos_token_id),
        text=text,
        logps=(),
        policy_version=0,
        finish_reason=WRITTEN,
    )
