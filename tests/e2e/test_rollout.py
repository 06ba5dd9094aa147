"""A real engine in a real actor: what it samples, scores, and does when its weights change."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from cluster.connect import ActorResources, ClusterSettings, connect
from cluster.errors import WeightSyncError
from rl.policy import PolicySettings, load_model, load_processor, public_names, resolve_model
from rl.rollout import Rollouts, RolloutSettings, RolloutWorker, SamplingSettings
from rl.scoring import collate, to_sequence, token_logps
from rl.types import Completion, Prompt
from rl.weights import Probe, RolloutClient, prove
from rl.world.prompts import evaluation_prompts
from tests.e2e.conftest import Cluster

CPU = torch.device("cpu")
PROMPTS = evaluation_prompts(6, seed=0)
GREEDY = SamplingSettings(completions=1, temperature=0, max_tokens=48)


@pytest.fixture(scope="module")
def worker(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray

    connect(ClusterSettings(address=cluster.address))
    settings = RolloutSettings(resources=ActorResources(cpus=1, threads=2))
    log = str(tmp_path_factory.mktemp("log") / "rollout.log")
    actor: Any = ray.remote(RolloutWorker).options(num_cpus=1)
    yield actor.remote(settings, PolicySettings(max_length=128), resolve_model("rl/world/base"), "object_store", log)
    ray.shutdown()


def ask(worker: Any, prompts: list[Prompt], sampling: SamplingSettings, seed: int = 0) -> list[list[Completion]]:
    import ray

    return ray.get(worker.generate.remote(prompts, sampling, seed, 5), timeout=300)


def trainer_logps(model: Any, pairs: list[tuple[Prompt, Completion]]) -> list[torch.Tensor]:
    processor = load_processor(resolve_model("rl/world/base"))
    sequences = [to_sequence(prompt, completion) for prompt, completion in pairs]
    with torch.no_grad():
        logps = token_logps(model, collate(sequences, processor, False), CPU)
    return [row[len(s.prompt_token_ids) - 1 : len(s) - 1] for row, s in zip(logps, sequences, strict=True)]


def difference(ours: list[torch.Tensor], theirs: list[Any]) -> float:
    return max(float((a - torch.tensor(b)).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def base() -> Any:
    return load_model(resolve_model("rl/world/base"), "float32")


def test_trainer_and_engine_agree_on_every_token_and_only_with_the_pixels(worker: Any, base: Any) -> None:
    import ray

    sampled = [
        (p, one) for p, group in zip(PROMPTS, ask(worker, PROMPTS, SamplingSettings()), strict=True) for one in group
    ]
    ours = trainer_logps(base, sampled)
    assert difference(ours, [one.logps for _, one in sampled]) <= 1e-4
    scored = ray.get(worker.score.remote([(p, one.token_ids) for p, one in sampled]), timeout=300)
    assert difference(ours, scored) <= 1e-4

    completion = next(one for p, one in sampled if p.images and len(one.token_ids) > 10)
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        blind = base(input_ids=ids).logits.log_softmax(-1)[0, len(completion.prompt_token_ids) - 1 : -1]
    blind_logps = blind.gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).squeeze(-1)
    assert difference([blind_logps], [completion.logps]) > 0.05, "scoring without pixels must be seen to be wrong"


def test_completions_carry_version_tokens_and_reason(worker: Any) -> None:
    (group,) = ask(worker, PROMPTS[:1], SamplingSettings(completions=3, max_tokens=4))
    assert len(group) == 3
    for one in group:
        assert one.policy_version == 5
        assert len(one.logps) == len(one.token_ids) == 4
        assert one.finish_reason == "length"
        assert one.prompt_token_ids.count(4) == 16, "image placeholders are expanded as the engine saw them"


def test_a_prompt_s_answers_depend_on_seed_and_prompt_alone(worker: Any) -> None:
    hot = SamplingSettings(temperature=1.8)
    whole = ask(worker, PROMPTS[:6], hot, seed=3)
    parts = [*ask(worker, PROMPTS[3:6], hot, seed=3), *ask(worker, PROMPTS[:3], hot, seed=3)]
    assert [[c.token_ids for c in g] for g in whole] == [[c.token_ids for c in g] for g in parts[3:] + parts[:3]]
    assert [[c.token_ids for c in g] for g in whole] != [
        [c.token_ids for c in g] for g in ask(worker, PROMPTS[:6], hot, 4)
    ]


def test_the_image_placeholder_is_never_sampled(worker: Any, base: Any) -> None:
    """Not even by a policy that prefers it to everything else."""
    tempted = load_model(resolve_model("rl/world/base"), "float32")
    image, there = tempted.config.image_token_id, 15
    with torch.no_grad():
        tempted.lm_head.weight[image] = 2 * tempted.lm_head.weight[there]
    send(worker, tempted)
    described = [prompt for prompt in PROMPTS if prompt.truth and prompt.truth["kind"] == "describe"]
    groups = ask(worker, described, SamplingSettings(completions=8))
    wanted = trainer_argmax(tempted, described[0], groups[0][0])
    assert image in wanted, "the policy must want the placeholder, or this test shows nothing"
    assert not any(image in one.token_ids for group in groups for one in group)
    send(worker, base)


def trainer_argmax(model: Any, prompt: Prompt, completion: Completion) -> set[int]:
    """The tokens the model likes best along a completion."""
    pixels = load_processor(resolve_model("rl/world/base")).image_processor(
        images=[image.open() for image in prompt.images], return_tensors="pt"
    )
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits[0, len(completion.prompt_token_ids) - 1 :]
    return set(logits.argmax(-1).tolist())


def test_several_workers_give_answers_in_the_prompts_order(worker: Any) -> None:
    import asyncio

    rollouts = Rollouts([worker, worker, worker])
    groups = asyncio.run(rollouts.generate(PROMPTS, GREEDY, 0))
    assert [group[0].prompt_id for group in groups] == [prompt.id for prompt in PROMPTS]


def test_new_weights_are_sampled_from_at_once_and_wrong_ones_are_caught(worker: Any, base: Any) -> None:
    """The same prompts before and after, so that any stale cache would be used."""
    probes = [Probe(p, to_sequence(p, g[0])) for p, g in zip(PROMPTS, ask(worker, PROMPTS, GREEDY), strict=True)]
    before = [
        row.tolist()
        for row in trainer_logps(base, [(p, g[0]) for p, g in zip(PROMPTS, ask(worker, PROMPTS, GREEDY), strict=True)])
    ]
    assert prove(0, [worker], probes, before, 1e-4) <= 1e-4

    changed = load_model(resolve_model("rl/world/base"), "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    send(worker, changed)
    sampled = [(p, g[0]) for p, g in zip(PROMPTS, ask(worker, PROMPTS, GREEDY), strict=True)]
    assert difference(trainer_logps(changed, sampled), [one.logps for _, one in sampled]) <= 1e-4
    with pytest.raises(WeightSyncError, match="policy version 1, rollout worker 0 scores the probe batch"):
        prove(1, [worker], probes, before, 1e-4)

    send(worker, base)
    assert prove(2, [worker], probes, before, 1e-4) <= 1e-4


def send(worker: Any, model: Any) -> None:
    names = public_names(model)
    client = RolloutClient([worker], 1)
    client.start_weight_update()
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items()}
    half = len(tensors) // 2
    for part in (list(tensors.items())[:half], list(tensors.items())[half:]):
        client.update_weights({"tensors": dict(part)})
    client.finish_weight_update()


def test_the_nccl_source_yields_what_its_metadata_declares(base: Any) -> None:
    """Checked by vLLM's own iterator over it; the transfer itself needs GPUs."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from rl.weights import NcclSender

    class Whole:
        """An engine whose weights are not sharded."""

        def full_weights(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((name, base.state_dict()[name]) for name in names)

    sender = NcclSender(base, RolloutClient([], 2), rank=0)
    sender._engine = Whole()  # type: ignore[assignment]
    sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(sender, sender.metadata()))  # type: ignore[arg-type]
    assert len(sent) == len(base.state_dict())
    assert "vision_tower.vision_model.embeddings.class_embedding" in sent


@pytest.mark.gpu
def test_nccl_publication_on_gpus(tmp_path: Any, small_config: Any) -> None:
    from tests.e2e.conftest import logs, raylign, summary

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, one for the engine and one for the learner")
    outcome = raylign(
        "align", str(small_config), f"run.dir={tmp_path / 'run'}", "weights.transfer=nccl", "learner.workers=1",
        "rollout.resources={cpus: 1, gpus: 1}", "learner.resources={cpus: 1, gpus: 1}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.output + logs(tmp_path / "run")
    assert summary(tmp_path / "run")["probe_max_abs_diff"] <= 1e-3
