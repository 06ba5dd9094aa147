"""Config: strict, and every refusal one sentence that helps."""

from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from cluster.settings import Settings, located
from jobs.config import CONFIGS, check_same_settings, describe_fields, dump_config, flatten, load_config
from rl.annotate import AnnotateConfig
from rl.config import AlignConfig, LoopSettings
from rl.policy import LoraSettings, PolicySettings
from rl.reference import ReferenceSettings
from rl.regimes import parts
from rl.supervised import SftConfig


@pytest.fixture
def empty(tmp_path: Path) -> str:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return str(path)


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(AlignConfig, path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_need_no_field(empty: str) -> None:
    assert load_config(AlignConfig, empty, []) == AlignConfig()


def test_dotted_overrides_reach_nested_fields_with_yaml_values(empty: str) -> None:
    config = load_config(
        AlignConfig, empty, ["loop.steps=7", "policy.lora.rank=4", "policy.freeze=[]", "loss.kind=ipo"]
    )
    assert config.loop.steps == 7
    assert config.policy.lora is not None
    assert config.policy.lora.rank == 4
    assert config.policy.freeze == ()
    assert config.loss.kind == "ipo"


def test_a_dumped_config_loads_as_the_same_config(empty: str, tmp_path: Path) -> None:
    config = load_config(
        AlignConfig, empty, ["seed=3", "policy.lora={rank: 2}", "learner.optimizer.learning_rate=1e-5"]
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(AlignConfig, str(tmp_path / "again.yaml"), []) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    is_sft = "output" in yaml.safe_load(path.read_text())
    model = SftConfig if is_sft else AnnotateConfig if "annotate" in path.name else AlignConfig
    load_config(model, str(path), [])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loop.stepz=3", "loop.stepz is not a field of the config; did you mean loop.steps?"),
        ("learner.optimizer.lr=3", "did you mean learner.optimizer"),
        ("loop.steps='3'", "loop.steps is '3', but: a whole number is expected"),
        ("loop.steps=true", "loop.steps is True, but: a number is expected"),
        ("policy.gradient_checkpointing='yes'", "policy.gradient_checkpointing is 'yes', but: true or false"),
        (
            "judge.kind=gemni",
            "judge.kind is 'gemni', but must be one of oracle, gemini, ",
        ),
        ("judge.kind=gemni", "did you mean gemini?"),
        ("judge.kind=implicit", "set reference.model to the one that policy.model was aligned from"),
        ("policy.precision=bfloat16", "weights.tolerance is"),
        ("pairs.rule=best_vs_reference judge.kind=implicit reference.model=x", "nobody sampled the reference answers"),
        ("loop.steps=many", "loop.steps is 'many'"),
        ("loop.steps=0", "loop.steps is 0"),
        ("loss.kind=dpo", "did you mean sigmoid?"),
        ("data.kind=web", "data.kind is 'web', but must be one of world, files, image_folder, mixed; did you mean "),
        ("data={kind: files}", "data.train is required"),
        ("data={kind: files, train: a, heldout: b, prompts: 3}", "data.prompts is a field of another kind"),
        ("loop.steps", "not of the form key=value"),
        ("loop.steps.more=3", "contradict one another"),
        ("loop.sync_every=3", "set loop.max_lag to 2 or more"),
        ("rollout.sampling.completions=1", "a pair needs two"),
        ("rollout.sampling.temperature=0", "set it above 0"),
        ("weights.transfer=nccl", "use object_store on CPUs"),
        ("rollout.sampling.max_tokens=5000", "leaves no room for a prompt"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(empty: str, override: str, says: str) -> None:
    base = ["loop.steps=3"] if override == "loop.steps.more=3" else []
    assert says in refusal(empty, *base, *([override] if "{" in override else override.split()))


def test_another_kind_drops_the_fields_of_the_one_before(tmp_path: Path) -> None:
    """Whatever the order of the overrides; fields that both kinds have stay."""
    path = tmp_path / "c.yaml"
    path.write_text("data: {kind: files, train: a.jsonl, heldout_share: 0.2, limit: 4}")
    config = load_config(
        AlignConfig, str(path), ["data.path=pictures", "data.question=What?", "data.kind=image_folder"]
    )
    assert config.data.model_dump(exclude_defaults=True) == {
        "kind": "image_folder", "path": "pictures", "question": "What?", "heldout_share": 0.2,
    }  # fmt: skip


def test_help_shows_the_default_that_a_section_has_where_it_is_used() -> None:
    text = "\n".join(describe_fields(AlignConfig))
    for role, cpus in (("rollout", "0.5"), ("learner", "0.25"), ("reference", "0.25")):
        assert f"{role}.resources.cpus  (float, default {cpus})" in text


def test_a_parameter_that_the_loss_does_not_heed_is_refused(empty: str) -> None:
    assert "choose from cdpo, robust" in refusal(empty, "loss.kind=ipo", "loss.label_smoothing=0.1")


def test_losses_are_combined_with_weights(empty: str) -> None:
    config = load_config(AlignConfig, empty, ["loss.kind={sigmoid: 0.8, sft: 1}"])
    assert config.loss.terms == {"sigmoid": 0.8, "sft": 1.0}


@pytest.mark.parametrize(
    ("pairs", "needs_engines", "roles"),
    [
        ("{kind: offline, path: x}", False, ["reference worker", "learner worker"]),
        ("{kind: mixed, stored: {path: x}}", True, ["rollout worker", "reference worker", "learner worker"]),
        ("{kind: povid}", True, ["rollout worker", "reference worker", "learner worker"]),
        ("{kind: bdhs}", True, ["rollout worker", "reference worker", "learner worker"]),
        ("{kind: bdhs, sight: mask}", True, ["rollout worker", "reference worker", "masked policy", "learner worker"]),
        (
            "{kind: averaged, stored: {path: x}, second: {kind: bdhs}}",
            True,
            ["rollout worker", "reference worker", "learner worker"],
        ),
    ],
)
def test_each_regime_starts_what_it_needs(empty: str, pairs: str, needs_engines: bool, roles: list[str]) -> None:
    config = load_config(AlignConfig, empty, [f"pairs={pairs}"])
    assert parts(config.pairs).needs_engines == needs_engines
    assert [role.name for role in config.roles] == roles


def test_no_reference_is_started_for_a_loss_that_needs_none(empty: str) -> None:
    config = load_config(AlignConfig, empty, ["loss.kind=simpo", "loss.beta=2"])
    assert [role.name for role in config.roles] == ["rollout worker", "learner worker"]


def test_rounds_publish_at_their_end_and_sample_from_the_version_they_began_with(empty: str) -> None:
    rounds = "pairs={kind: iterative, steps_per_round: 3, epochs: 2}"
    config = load_config(AlignConfig, empty, [rounds, "loop.stale=weight"])
    assert config.sync_every == 6
    assert [config.sampled_from(step) for step in (1, 6, 7, 12, 13)] == [0, 0, 6, 6, 12]
    assert "set loop.max_lag to 5, or loop.stale to weight" in refusal(empty, rounds)


@pytest.mark.parametrize(
    ("max_lag", "sync_every", "versions"),
    [(0, 1, [0, 1, 2, 3, 4]), (1, 1, [0, 0, 1, 2, 3]), (4, 1, [0, 0, 0, 0, 0]), (1, 2, [0, 0, 1, 2, 3])],
)
def test_how_old_the_engines_may_be_before_a_step(
    empty: str, max_lag: int, sync_every: int, versions: list[int]
) -> None:
    config = load_config(AlignConfig, empty, [f"loop.max_lag={max_lag}", f"loop.sync_every={sync_every}"])
    assert [config.sampled_from(step) for step in range(1, 6)] == versions


@pytest.mark.parametrize("kind", ["bdhs", "povid"])
def test_pairs_that_no_sampler_gave_log_probs_cannot_be_weighted_by_them(empty: str, kind: str) -> None:
    said = refusal(empty, f"pairs={{kind: {kind}}}", "loop.stale=weight")
    assert said == (
        f"loop.stale is weight, but pairs.kind {kind} has no log-probs of a sampler to weigh by: leave it out"
    )
    seldom = refusal(empty, f"pairs={{kind: {kind}}}", "loop.sync_every=3", "loop.max_lag=0")
    assert seldom.endswith("set loop.max_lag to 2 or more"), "nothing is advised that would be refused"


def test_the_base_of_an_adapter_is_no_reference_for_a_loss_that_needs_none(empty: str) -> None:
    said = refusal(empty, "policy.lora={rank: 8}", "reference=base-of-adapter", "loss.kind=simpo")
    assert said == "reference is base-of-adapter, but with loss.kind simpo nothing needs a reference: leave it out"


def test_an_override_of_a_section_is_not_lost_beside_one_of_its_fields(empty: str) -> None:
    contradictory = ["policy.lora={rank: 8}", "reference.update=average", "reference=base-of-adapter"]
    for overrides in (contradictory, contradictory[::-1]):
        said = refusal(empty, *overrides)
        assert said.startswith("overrides reference=base-of-adapter and reference.update=… contradict one another")
    load_config(AlignConfig, empty, ["policy.lora={rank: 8}", "policy.lora.alpha=8"])


def test_with_stale_pairs_weighted_weights_may_be_published_seldom(empty: str) -> None:
    config = load_config(AlignConfig, empty, ["loop.sync_every=4", "loop.stale=weight"])
    assert config.max_lag == 3
    assert [config.sampled_from(step) for step in (1, 4, 5, 8, 9)] == [0, 0, 3, 4, 7], "never one yet to be published"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss.kind=poft", "loss.beta=1"], "set reference.model to one"),
        (["loss.kind=d2o", "pairs={kind: bdhs}"], "needs a pairs.kind that samples some"),
        (["loss.kind=cut", "pairs={kind: povid}"], "pairs.kind povid asks none"),
        (["loss.kind=simpo", "reference.update=average"], "with loss.kind simpo nothing needs a reference"),
        (["reference.every=3"], "belong to reference.update average"),
        (["pairs={kind: bdhs, temperature: 3}"], "pairs.temperature is 3"),
        (["pairs={kind: povid, noise: 1000}"], "pairs.noise is 1000"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(empty: str, overrides: list[str], says: str) -> None:
    assert says in refusal(empty, *overrides)


def test_what_only_engines_need_is_not_asked_of_an_offline_run(empty: str) -> None:
    offline = ["pairs={kind: offline, path: x}", "policy.precision=bfloat16", "loop.sync_every=5"]
    assert [role.name for role in load_config(AlignConfig, empty, offline).roles][-1] == "learner worker"


def test_the_reference_is_renewed_when_the_settings_say(empty: str) -> None:
    average = load_config(AlignConfig, empty, ["reference.update=average", "reference.every=3"])
    assert [version for version in range(1, 8) if average.renews_reference(version)] == [3, 6]
    rounds = "pairs={kind: iterative, steps_per_round: 2}"
    each = load_config(AlignConfig, empty, [rounds, "reference.update=round"])
    assert [version for version in range(1, 8) if each.renews_reference(version)] == [2, 4, 6]
    fixed = load_config(AlignConfig, empty, [])
    assert not any(fixed.renews_reference(version) for version in range(1, 8))
    assert "only pairs.kind iterative has rounds" in refusal(empty, "reference.update=round")


def test_the_reference_may_be_the_policy_without_its_adapter(empty: str) -> None:
    config = load_config(AlignConfig, empty, ["reference=base-of-adapter", "policy.lora={kind: dora, rank: 4}"])
    assert config.reference == "base-of-adapter"
    assert "reference worker" not in [role.name for role in config.roles]
    assert located(config, [Path()]) == config
    stored = dump_config(config)
    assert "\nreference: base-of-adapter\n" in stored
    check_same_settings(stored, config, "runs/x")
    with pytest.raises(ConfigError, match="but the run in runs/x has 'base-of-adapter'"):
        check_same_settings(stored, config.model_copy(update={"reference": ReferenceSettings()}), "runs/x")
    assert "base-of-adapter" in "\n".join(describe_fields(AlignConfig))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reference=base-of-adapter"], "there is no adapter to switch off: set policy.lora"),
        (["reference=base-of-adapter", "policy.lora.kind=pissa"], "not the model it started from"),
        (
            ["reference=base-of-adapter", "policy.lora.rank=4", "judge.kind=implicit"],
            "judge.kind implicit needs reference workers",
        ),
        (["reference=base-of-adaptor"], "reference is 'base-of-adaptor', but: input should be 'base-of-adapter'"),
        (["reference={workrs: 2}"], "reference.workrs is not a field of the config; did you mean reference.workers?"),
        (["policy.lora={kind: pissa, rank: 300}"], "policy.lora.rank is 300"),
        (["policy.lora.kind=qlora"], "policy.lora.kind is 'qlora'"),
    ],
)
def test_adapters_that_cannot_be_used_so_are_refused(empty: str, overrides: list[str], says: str) -> None:
    assert says in refusal(empty, *overrides)


def test_several_faults_are_all_named(empty: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(AlignConfig, empty, ["loop.steps=0", "sed=1"])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "says"), [("[1, 2]", "must hold a mapping"), ("a: [", "is not YAML"), ("\x00", "is not YAML")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert says in refusal(str(path))


def test_a_missing_file_names_the_shipped_ones() -> None:
    assert "demo.yaml" in refusal("nothing.yaml")


def test_every_field_of_every_section_is_documented() -> None:
    sections = set(Settings.__subclasses__())
    while more := {sub for one in sections for sub in one.__subclasses__()} - sections:
        sections |= more
    assert {AlignConfig, AnnotateConfig, SftConfig} < sections
    fields = [(one.__name__, name, field) for one in sections for name, field in one.model_fields.items()]
    assert [(section, name) for section, name, field in fields if not field.description] == []


def test_help_names_every_field() -> None:
    text = "\n".join(describe_fields(AlignConfig))
    full = AlignConfig(policy=PolicySettings(lora=LoraSettings()))
    for name, _ in flatten(full.model_dump(mode="json")):
        assert f"\n  {name}  (" in f"\n{text}" or f"\n{name}: " in text, name
    assert "judge.members[].judge.kind" in text, "of lists of sections too"


def test_the_config_in_the_readme_is_valid(tmp_path: Path) -> None:
    readme = (CONFIGS.parents[1] / "README.md").read_text()
    (tmp_path / "my.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    config = load_config(AlignConfig, str(tmp_path / "my.yaml"), [])
    assert config.judge.kind == "gemini"


def members(budget: int, weight: int) -> AlignConfig:
    judge = {"kind": "openai", "model": "m", "base_url": "http://x/v1", "input_price": 1.0, "budget": budget}
    judges = [{"judge": judge, "weight": weight}, {"judge": {"kind": "oracle"}}]
    return AlignConfig.model_validate({"judge": {"kind": "ensemble", "members": judges}, "loop": {"steps": 4}})


def test_a_run_goes_on_with_a_larger_budget_and_more_steps_and_nothing_else() -> None:
    before = dump_config(members(20, 1))
    check_same_settings(before, members(40, 1), "runs/x")
    check_same_settings(before, members(20, 1).model_copy(update={"loop": LoopSettings(steps=9)}), "runs/x")
    with pytest.raises(ConfigError, match=r"judge\.members\.0\.weight is 2\.0, but the run in runs/x has 1\.0"):
        check_same_settings(before, members(20, 2), "runs/x")
    with pytest.raises(ConfigError, match=r"seed is 1, but the run"):
        check_same_settings(before, members(20, 1).model_copy(update={"seed": 1}), "runs/x")


def test_paths_are_found_in_the_first_folder_that_has_them(tmp_path: Path) -> None:
    here, runs = tmp_path / "here", tmp_path / "runs"
    for file in (here / "a.jsonl", runs / "a.jsonl", runs / "judged/x", here / "pictures/y"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    parts = [
        {"data": {"kind": "files", "train": "a.jsonl", "images": "pictures", "heldout": "gone.jsonl"}},
        {"data": {"kind": "image_folder", "path": "pictures", "question": "What?"}},
    ]
    fields = {"data": {"kind": "mixed", "parts": parts}, "pairs": {"kind": "offline", "path": "judged"}}
    config = located(AlignConfig.model_validate(fields), [here, runs])
    first, second = (part.data.model_dump() for part in config.data.parts)  # type: ignore[union-attr]
    assert first["train"] == str(here / "a.jsonl")
    assert first["images"] == second["path"] == str(here / "pictures")
    assert first["heldout"] == "gone.jsonl", "what is nowhere keeps its name for the error"
    assert config.pairs.path == str(runs / "judged")  # type: ignore[union-attr]


def test_a_yaml_fault_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("loop:\n  steps: [1\nseed: 2\n")
    assert "is not YAML: line 3: " in refusal(str(path))
