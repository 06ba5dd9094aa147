"""Writing under restricted sight: a real engine that drops hidden embeddings, and transformers that mask them."""

import asyncio
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.connect import ActorResources, ClusterSettings, connect
from cluster.errors import WeightSyncError
from rl.masked import MaskedSettings, MaskedWorker
from rl.policy import PolicySettings, load_model, load_processor, resolve_model
from rl.render import answer_token_ids, prompt_token_ids
from rl.rollout import Blind, RolloutSettings, RolloutWorker, SamplingSettings, request_seed
from rl.sight import Continuation, Sight, view_inputs, views
from rl.types import Prompt
from rl.world.grading import hallucinated
from rl.world.prompts import evaluation_prompts
from tests.e2e.conftest import Cluster
from tests.e2e.test_rollout import send

MODEL = resolve_model("rl/world/base")
POLICY = PolicySettings(max_length=128)
PROMPTS = evaluation_prompts(25, seed=0)
SEEN = [prompt for prompt in PROMPTS if prompt.images]
DESCRIBED = [prompt for prompt in SEEN if prompt.truth and prompt.truth["kind"] == "describe"]
LIMIT = 48
GREEDY = SamplingSettings(completions=1, temperature=0, max_tokens=LIMIT)
END, PLACEHOLDER = 2, 4
FULL = Sight(0, 0, 0)


class TransparentWorker(RolloutWorker):
    """A rollout worker that also tells the log-probs from which it takes the first token."""

    def first_logps(self, requests: Sequence[Continuation]) -> list[dict[int, float]]:
        from vllm import SamplingParams

        inputs = self._sighted_requests(
            [(r.prompt, r.sight, answer_token_ids(r.prefix, self._processor)) for r in requests]
        )
        outputs = self._engine.generate(inputs, SamplingParams(max_tokens=1, temperature=0, logprobs=20))
        return [{token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()} for output in outputs]


@pytest.fixture(scope="module")
def logs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import ray

    connect(ClusterSettings(address=cluster.address))
    yield tmp_path_factory.mktemp("log")
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The checks here are many small passes beside two busy actors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(logs: Path) -> Any:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    settings = RolloutSettings(resources=ActorResources(cpus=1, threads=2), max_images=2)
    actor: Any = ray.remote(TransparentWorker).options(num_cpus=1)
    return actor.remote(settings, POLICY, MODEL, "object_store", str(logs / "rollout.log"), blind=True)


@pytest.fixture(scope="module")
def masked(logs: Path) -> Any:
    import ray

    settings = MaskedSettings(resources=ActorResources(cpus=1, threads=2), tokens_per_batch=2048)
    return ray.remote(MaskedWorker).options(num_cpus=1).remote(settings, POLICY, MODEL, str(logs / "masked.log"))


@pytest.fixture(scope="module")
def base() -> Any:
    return load_model(MODEL, "float32")


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(MODEL)


def looking(threshold: float, prompts: Sequence[Prompt] = SEEN, prefix: str = "", noise: int = 0) -> list[Continuation]:
    """Each prompt with a mask of its own."""
    return [Continuation(p, prefix, Sight(seed, threshold, noise), False) for seed, p in enumerate(prompts)]


def write(
    worker: Any, requests: Sequence[Continuation], sampling: SamplingSettings = GREEDY, seed: int = 0
) -> list[str]:
    import ray

    return ray.get(worker.go_on.remote(requests, sampling, seed), timeout=300)


def answers(worker: Any, prompts: Sequence[Prompt]) -> list[str]:
    import ray

    return [group[0].text for group in ray.get(worker.generate.remote(prompts, GREEDY, 0, 0), timeout=300)]


def model_logps(model: Any, processor: Any, request: Continuation, way: str, text: str) -> torch.Tensor:
    """Log-probs [tokens + 1, vocabulary] along an answer, by one plain pass of transformers.

    `drop` takes hidden embeddings out of the sequence; `mask` forbids attention to them in a full [1, 1, length,
    length] mask.
    """
    before = [*prompt_token_ids(request.prompt, processor, True), *answer_token_ids(request.prefix, processor)]
    start = len(before)
    ids = torch.tensor([*before, *answer_token_ids(text, processor)])
    embeddings = model.get_input_embeddings()(ids)
    visible = torch.ones(len(ids), dtype=torch.bool)
    if request.prompt.images:
        inputs = view_inputs(views(request.prompt, request.sight), processor)
        features = model.get_image_features(**inputs).pooler_output
        embeddings[ids == PLACEHOLDER] = torch.cat(list(features))
        seen = [request.sight.visible(len(one), index) for index, one in enumerate(features)]
        visible[ids == PLACEHOLDER] = torch.from_numpy(np.concatenate(seen))
    if way == "drop":
        logits = model(inputs_embeds=embeddings[visible][None]).logits[0]
        start = int(visible[:start].sum())
    else:
        allowed = torch.ones(len(ids), len(ids)).tril().bool() & visible
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~allowed, torch.finfo(torch.float32).min)
        logits = model(inputs_embeds=embeddings[None], attention_mask=mask).logits[0]
    return logits[start - 1 :].log_softmax(-1)


def check_greedy(model: Any, processor: Any, requests: Sequence[Continuation], texts: Sequence[str], way: str) -> None:
    """Every token of every text must be the one the model likes best there (ties within 1e-3 nats either way)."""
    for request, text in zip(requests, texts, strict=True):
        with torch.no_grad():
            logps = model_logps(model, processor, request, way, text)
        logps[:, PLACEHOLDER] = -torch.inf
        tokens = answer_token_ids(text, processor)
        tokens = (*tokens, END) if len(tokens) < LIMIT else tokens
        lost = [float(row.max() - row[token]) for row, token in zip(logps, tokens, strict=False)]
        assert max(lost) < 1e-3, f"{way} wrote {text!r} to {request.prompt.text!r} and lost {lost}"


def test_full_sight_through_embeddings_is_plain_sight(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    import ray

    everything = looking(0, PROMPTS)
    plain = answers(engine, PROMPTS)
    assert write(engine, everything) == plain
    assert write(masked, everything) == plain
    assert asyncio.run(Blind([engine, masked]).go_on(everything, GREEDY, 0)) == plain
    assert (
        first_token_difference(ray.get(engine.first_logps.remote(everything[:60])), base, processor, everything[:60])
        <= 1e-4
    )


def first_token_difference(measured: list[dict[int, float]], model: Any, processor: Any, requests: Any) -> float:
    """Largest difference, over the engine's 20 likeliest tokens, to transformers without the hidden embeddings."""
    with torch.no_grad():
        ours = [model_logps(model, processor, request, "drop", "")[0] for request in requests]
    return max(abs(float(o[t]) - logp) for o, row in zip(ours, measured, strict=True) for t, logp in row.items())


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_engine_writes_as_if_hidden_embeddings_were_not_in_the_sequence(
    engine: Any, base: Any, processor: Any, threshold: float
) -> None:
    import ray

    requests = looking(threshold, SEEN[:60])
    assert first_token_difference(ray.get(engine.first_logps.remote(requests)), base, processor, requests) <= 1e-4
    check_greedy(base, processor, requests, write(engine, requests), "drop")


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_masked_worker_keeps_places_and_attends_to_nothing_hidden(
    masked: Any, base: Any, processor: Any, threshold: float
) -> None:
    requests = [*looking(threshold, SEEN[:60]), *looking(threshold, PROMPTS[::3], prefix="there is")]
    check_greedy(base, processor, requests, write(masked, requests), "mask")


def test_dropping_masking_and_seeing_differ(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    requests = looking(0.75)  # about 4 of 16 embeddings seen
    seen, dropped, hidden = answers(engine, SEEN), write(engine, requests), write(masked, requests)
    assert min(unequal(seen, dropped), unequal(seen, hidden), unequal(dropped, hidden)) > 0.2
    with torch.no_grad():
        pairs = [[model_logps(base, processor, r, way, "")[0] for way in ("drop", "mask")] for r in requests[:40]]
    assert np.mean([float((one - other).abs().mean()) for one, other in pairs]) > 0.3


def unequal(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)


def test_a_blind_writer_names_more_absent_objects(engine: Any, masked: Any) -> None:
    def inventions(texts: Sequence[str]) -> int:
        return sum(len(hallucinated(text, p.truth or {})) for text, p in zip(texts, DESCRIBED, strict=True))

    seeing = inventions(answers(engine, DESCRIBED))
    blind = looking(0.9, DESCRIBED, prefix="there is a")
    prefixed = [[f"there is a {text}" for text in write(worker, blind)] for worker in (engine, masked)]
    assert min(map(inventions, prefixed)) > seeing + len(DESCRIBED) / 3


def test_an_answer_goes_on_from_its_prefix_to_the_full_stop(engine: Any, masked: Any) -> None:
    many = [p for p in DESCRIBED if p.truth and len(p.truth["objects"]) > 1]
    whole = answers(engine, many)
    for worker in (engine, masked):
        one = [Continuation(p, "", FULL, True) for p in many]
        assert write(worker, one) == [text[: text.index(".") + 1] for text in whole]
        cut = [
            Continuation(p, text[: text.index("at")], FULL, end)
            for p, text in zip(many, whole, strict=True)
            for end in (True, False)
        ]
        rest = [text[text.index("at") :] for text in whole]
        assert write(worker, cut) == [part for text in rest for part in (text[: text.index(".") + 1], text)]
        dim = [Continuation(p, "there is a", Sight(0, 0.5, 0), True) for p in many]
        assert all(text.find(".") == len(text) - 1 for text in write(worker, dim))


def test_two_sights_of_one_image_in_one_batch_do_not_mix(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    prompt = next(p for p in DESCRIBED if p.truth and len(p.truth["objects"]) > 1)
    sights = [Continuation(prompt, "", Sight(seed, 0.6, 0), False) for seed in range(8)] + [looking(0, [prompt])[0]]
    sights += [Continuation(prompt, "", Sight(seed, 0, 900), False) for seed in range(3)]
    for worker, way in ((engine, "drop"), (masked, "mask")):
        together, alone = write(worker, sights), [write(worker, [one])[0] for one in sights]
        assert together == alone
        assert write(worker, sights[::-1]) == alone[::-1]
        assert len(set(alone)) > 3
        check_greedy(base, processor, sights, together, way)


def test_each_image_of_a_prompt_is_hidden_on_its_own(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    first, second = DESCRIBED[0].images[0], DESCRIBED[1].images[0]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe the image."}]
    prompt = Prompt.make([{"role": "user", "content": content}], [first, second])
    requests = [
        Continuation(prompt, "", Sight(seed, threshold, noise), False)
        for seed in range(4)
        for threshold in (0.9, 0.96)
        for noise in (0, 500)
    ]
    seen = [[int(r.sight.visible(16, image).sum()) for image in (0, 1)] for r in requests]
    assert any(0 in counts and max(counts) for counts in seen), "one image must be hidden altogether beside another"
    check_greedy(base, processor, requests, write(engine, requests), "drop")
    check_greedy(base, processor, requests, write(masked, requests), "mask")


def test_drawn_continuations_depend_on_seed_and_request_alone(engine: Any, masked: Any) -> None:
    hot = SamplingSettings(completions=1, temperature=1.3, top_p=0.95, max_tokens=24)
    requests = looking(0.9, SEEN[:12]) + looking(0.9, SEEN[:12], prefix="there is")
    for worker in (engine, masked):
        drawn = write(worker, requests, hot, 3)
        assert write(worker, requests[6:], hot, 3) == drawn[6:]
        assert write(worker, requests, hot, 4) != drawn
        assert write(worker, requests, GREEDY) != drawn
        assert asyncio.run(Blind([worker, worker, worker]).go_on(requests, hot, 3)) == drawn
    cold = SamplingSettings(completions=1, temperature=0.01, max_tokens=LIMIT)
    assert unequal(write(masked, requests, cold), write(masked, requests)) < 0.1


def test_drawing_by_gumbel_noise_follows_the_policy(masked: Any, base: Any, processor: Any) -> None:
    request = Continuation(DESCRIBED[0], "there is a", Sight(1, 0.9, 0), False)
    one_token = SamplingSettings(completions=1, temperature=1.5, max_tokens=1)
    many = [
        dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, id=str(index))) for index in range(600)
    ]
    draws = write(masked, many, one_token)
    with torch.no_grad():
        wanted = (model_logps(base, processor, request, "mask", "")[0] / 1.5).softmax(-1)
    for token in wanted.topk(3).indices:
        share = draws.count(processor.tokenizer.decode([token])) / len(draws)
        assert share == pytest.approx(float(wanted[token]), abs=0.06)


def test_new_weights_are_written_with_at_once(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    """The same requests before and after, so that stale embeddings or caches would be used."""
    import ray

    requests = looking(0.5, SEEN[:24])
    before = write(engine, requests), write(masked, requests)
    changed = load_model(MODEL, "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "multi_modal_projector" in name:
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    projector = {name: weight for name, weight in changed.state_dict().items() if "multi_modal_projector" in name}
    send(engine, changed)
    ray.get(masked.load.remote(projector))
    after = write(engine, requests), write(masked, requests)
    assert after[0] != before[0]
    assert after[1] != before[1]
    check_greedy(changed, processor, requests, after[0], "drop")
    check_greedy(changed, processor, requests, after[1], "mask")
    with pytest.raises(WeightSyncError, match="no weights"):
        ray.get(masked.load.remote({"lm_heat.weight": torch.zeros(1)}))
    send(engine, base)
    ray.get(masked.load.remote(base.state_dict()))
    assert (write(engine, requests), write(masked, requests)) == before


def test_distortion_keeps_sure_words_and_changes_them_as_the_picture_fades(
    engine: Any, base: Any, processor: Any
) -> None:
    import ray

    def distort(noise: int, seed: int = 0) -> list[tuple[int, ...]]:
        return ray.get(engine.distort.remote(DESCRIBED, own, noise, seed), timeout=300)

    own = [(*answer_token_ids(text, processor), END) for text in answers(engine, DESCRIBED)]
    assert distort(0) == own, "the greedy answer is the likeliest at each place"
    faded = distort(900)
    assert faded == distort(900)
    assert faded != distort(900, seed=1)
    assert faded != own
    for before, after in zip(own, faded, strict=True):
        assert len(after) == len(before)
        assert after[-1] == END
        assert not set(after[:-1]) & (set(processor.tokenizer.all_special_ids) - {END})
    assert 0.5 < share_kept(own, faded) < 0.99
    for prompt, before, after in zip(DESCRIBED, own, faded, strict=True):
        dim = Continuation(prompt, "", Sight(request_seed(0, prompt.id), 0, 900), False)
        with torch.no_grad():
            logps = model_logps(base, processor, dim, "drop", processor.tokenizer.decode(before[:-1]))
        assert all(row[token] > row.max() - 1e-3 for row, token in zip(logps[:-1], after[:-1], strict=True))
    written = [(*answer_token_ids(p.reference_answer or "", processor), END) for p in DESCRIBED]
    sure = ray.get(engine.distort.remote(DESCRIBED, written, 0, 0))
    assert share_kept(written, sure) > 0.9


def share_kept(before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]]) -> float:
    """The share of tokens that stayed."""
    tokens = zip(itertools.chain(*before), itertools.chain(*after), strict=True)
    return float(np.mean([one == other for one, other in tokens]))


def test_a_placeholder_liked_best_is_never_written(engine: Any, masked: Any, base: Any, processor: Any) -> None:
    import ray

    tempted = load_model(MODEL, "float32")
    with torch.no_grad():
        tempted.lm_head.weight[PLACEHOLDER] = 2 * tempted.lm_head.weight[15]
    send(engine, tempted)
    ray.get(masked.load.remote(tempted.state_dict()))
    requests = looking(0.5, DESCRIBED)
    check_greedy(tempted, processor, requests, write(engine, requests), "drop")
    check_greedy(tempted, processor, requests, write(masked, requests), "mask")
    own = [(*answer_token_ids(p.reference_answer or "", processor), END) for p in DESCRIBED]
    assert not any(PLACEHOLDER in one for one in ray.get(engine.distort.remote(DESCRIBED, own, 500, 0)))
    send(engine, base)
    ray.get(masked.load.remote(base.state_dict()))
