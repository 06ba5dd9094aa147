"""Our own Ray Serve endpoint as an OpenAI-compatible judge, its replies constrained by the schema."""

import asyncio
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.connect import ClusterSettings, connect
from rl.judges import JudgeContext, JudgeSettings
from rl.policy import save_checkpoint
from rl.types import Judgement
from rl.world.checkpoint import CHAT_TEMPLATE, SPECIAL_TOKENS, make_model, make_processor
from serve.app import running_app
from serve.settings import ServeSettings
from serve.versions import Registry, Version, weights_digest
from tests.conftest import make_completion, make_prompt
from tests.e2e.conftest import Cluster, free_port

POSITIONS = 8192


def byte_tokenizer() -> Any:
    """Every byte is a token, so that any JSON can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"], chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
    )  # fmt: skip


def test_an_untrained_model_behind_our_endpoint_gives_valid_verdicts(cluster: Cluster, tmp_path: Path) -> None:
    """It knows nothing, so that only the schema can have made its replies valid."""
    tokenizer = byte_tokenizer()
    model = make_model(0, tokenizer)
    save_checkpoint(model, dict(model.state_dict()), make_processor(tokenizer), tmp_path / "judge")
    port = free_port()
    connect(ClusterSettings(address=cluster.address))
    folder = str(tmp_path / "judge")
    served = Registry(Version("base", folder, weights_digest(folder)), "float32", POSITIONS, max_images=1)
    with running_app(ServeSettings(dir=str(tmp_path), port=port), served, ["<image>"]):
        fields = {
            "kind": "openai", "model": "base", "base_url": f"http://127.0.0.1:{port}/v1", "temperature": 1.0,
            "max_output_tokens": 4000, "cache": None, "timeout_s": 300, "retries": 0,
        }  # fmt: skip
        graded, pairwise = asyncio.run(ask(fields, tmp_path))
    assert all(one.attributes is not None and one.score == sum(one.attributes[:3]) for one in graded), graded
    assert all(one.score is not None for one in pairwise), pairwise


async def ask(fields: dict[str, Any], logs: Path) -> tuple[list[Judgement], list[Judgement]]:
    answers = [make_completion("a red circle"), make_completion("a blue cross")]
    verdicts = []
    for mode in ("graded", "pairwise"):
        judge = TypeAdapter[Any](JudgeSettings).validate_python({**fields, "mode": mode}).build(JudgeContext(logs))
        verdicts.append((await judge.grade([make_prompt()], [answers]))[0])
    return verdicts[0], verdicts[1]
