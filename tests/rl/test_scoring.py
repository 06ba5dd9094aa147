"""Log-probs that see the images, whatever the batch around a sequence."""

import pytest
import torch

from rl.policy import load_model, load_processor, resolve_model
from rl.render import expanded_length, image_token_counts, prompt_token_ids, written_completion
from rl.scoring import ScoredSequence, collate, to_sequence, token_logps
from rl.world.prompts import evaluation_prompts
from tests.conftest import make_prompt

CPU = torch.device("cpu")


def written(prompt, text, processor) -> ScoredSequence:
    return to_sequence(prompt, written_completion(prompt, text, processor))


@pytest.fixture(scope="module")
def model():
    return load_model(resolve_model("rl/world/base"), "float32")


@pytest.fixture(scope="module")
def processor():
    return load_processor(resolve_model("rl/world/base"))


@pytest.fixture(scope="module")
def sequences(processor) -> list[ScoredSequence]:
    prompts = evaluation_prompts(4, seed=0)
    return [written(prompt, prompt.reference_answer or "", processor) for prompt in prompts]


def score(model, processor, sequences: list[ScoredSequence], run_vision: bool = False) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(token_logps(model, collate(sequences, processor, run_vision), CPU).sum(-1))


def test_padding_and_neighbours_do_not_change_a_score(model, processor, sequences: list[ScoredSequence]) -> None:
    together = score(model, processor, sequences)
    alone = [score(model, processor, [one])[0] for one in sequences]
    assert torch.allclose(torch.stack(together), torch.stack(alone), atol=1e-4)


def test_scores_match_a_plain_forward_pass(model, processor, sequences: list[ScoredSequence]) -> None:
    one = sequences[0]
    pixels = processor.image_processor(images=[image.open() for image in one.images], return_tensors="pt")
    ids = torch.tensor([[*one.prompt_token_ids, *one.token_ids]])
    with torch.no_grad():
        logps = model(input_ids=ids, **pixels).logits.log_softmax(-1)
    start = len(one.prompt_token_ids)
    expected = sum(logps[0, start + i - 1, token] for i, token in enumerate(one.token_ids))
    assert score(model, processor, [one])[0].item() == pytest.approx(float(expected), abs=1e-4)


def test_another_picture_changes_the_score(model, processor, sequences: list[ScoredSequence]) -> None:
    """Proves that the pixels are seen: the same tokens under a grey picture score otherwise."""
    from PIL import Image

    from rl.images import canonicalise

    one = sequences[0]
    grey = canonicalise(Image.new("RGB", (32, 32), "grey"), "grey")
    blinded = ScoredSequence(one.prompt_token_ids, one.token_ids, (grey,))
    assert abs(score(model, processor, [one])[0] - score(model, processor, [blinded])[0]) > 1


def test_a_batch_without_images_runs_the_tower_on_a_filler_that_changes_nothing(model, processor) -> None:
    prompt = make_prompt("Copy: b c d", None)
    sequence = written(prompt, "b c d.", processor)
    plain, filled = collate([sequence], processor, False), collate([sequence], processor, True)
    assert not plain.images
    assert filled.fillers == 1
    assert filled.images["pixel_values"].shape[0] == 1
    assert torch.allclose(
        score(model, processor, [sequence])[0], score(model, processor, [sequence], True)[0], atol=1e-5
    )


def test_a_filler_reaches_the_tower_in_backward_with_zero_gradient(processor) -> None:
    model = load_model(resolve_model("rl/world/base"), "float32")
    sequence = written(make_prompt("Copy: b c d", None), "b c d.", processor)
    token_logps(model, collate([sequence], processor, True), CPU).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "multi_modal_projector" in name]
    assert all(gradient is not None and gradient.abs().max() == 0 for gradient in gradients)


def test_expanded_prompts_have_one_placeholder_per_image_token(processor) -> None:
    prompt = make_prompt()
    plain = prompt_token_ids(prompt, processor, expand_images=False)
    expanded = prompt_token_ids(prompt, processor, expand_images=True)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert plain.count(image) == 1
    assert expanded.count(image) == image_token_counts(prompt, processor)[0] == 16
    assert len(expanded) == expanded_length(prompt, processor)
    text = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    own = processor(text=text, images=[prompt.images[0].open()], add_special_tokens=False).input_ids[0]
    assert list(expanded) == list(own), "the processor's own expansion is the same"
