"""Similarity of texts, by words and by a sentence encoder with random weights."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from cluster.errors import DataError
from rl.similarity import EmbeddingSimilarity, Encoder, LexicalSimilarity, SimilaritySettings, mean_pool

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "circle", "cross", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder of a few thousand random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(path)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    return path


def build(folder: Path, **more: object) -> Encoder:
    return Encoder(EmbeddingSimilarity(kind="embedding", model=str(folder), **more))  # type: ignore[arg-type]


def lexical(text: str, other: str) -> float:
    (value,) = LexicalSimilarity().build()([text], [other])
    return value


def test_the_same_words_in_the_same_order_are_the_same_whatever_their_case() -> None:
    assert lexical("A red circle.", "a  RED circle!") == 1.0


def test_texts_without_a_common_word_have_nothing_in_common() -> None:
    assert lexical("A red circle.", "Two blue crosses.") == 0.0


def test_the_order_of_words_counts() -> None:
    assert lexical("red above blue", "blue above red") == pytest.approx(3 / 5)


def test_one_other_word_in_a_sentence_is_below_the_papers_threshold() -> None:
    assert (
        lexical("There is a red circle in the top left corner.", "There is a red circle in the top right corner.")
        < 0.97
    )


def test_texts_without_words_are_the_same_only_to_each_other() -> None:
    assert lexical("", "...") == 1.0
    assert lexical("", "yes") == lexical("yes", "") == 0.0


def test_the_kind_chooses_the_similarity() -> None:
    adapter: TypeAdapter[SimilaritySettings] = TypeAdapter(SimilaritySettings)
    assert adapter.validate_python({"kind": "lexical"}) == LexicalSimilarity()
    chosen = adapter.validate_python({"kind": "embedding"})
    assert isinstance(chosen, EmbeddingSimilarity)
    assert chosen.model == "sentence-transformers/all-mpnet-base-v2"


def test_the_encoder_finds_a_text_the_same_as_itself_and_another_less_so(folder: Path) -> None:
    same, other = build(folder)(["a red circle.", "a red circle."], ["a red circle.", "a blue cross."])
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0 <= other < 0.999


def test_padding_changes_nothing(folder: Path) -> None:
    encoder = build(folder)
    (alone,) = encoder(["a red circle"], ["a blue cross"])
    beside, _ = encoder(["a red circle", "a " * 20], ["a blue cross", "red " * 30])
    assert alone == pytest.approx(beside, abs=1e-5)


def test_the_size_of_the_batches_changes_nothing(folder: Path) -> None:
    texts, others = ["a red", "blue cross circle", "a"], ["red a", "circle", "a a a"]
    assert build(folder, batch_size=1)(texts, others) == pytest.approx(build(folder)(texts, others), abs=1e-5)


def test_the_mean_is_over_real_tokens_only() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 50.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_a_text_longer_than_the_encoder_takes_is_cut(folder: Path) -> None:
    (value,) = build(folder, max_tokens=16)(["a " * 14 + "red"], ["a " * 14 + "blue"])
    assert value == pytest.approx(1.0, abs=1e-5)


def test_no_texts_have_no_similarities_and_unequal_numbers_are_refused(folder: Path) -> None:
    assert build(folder)([], []) == []
    with pytest.raises(ValueError, match="1 texts cannot be compared with 2"):
        build(folder)(["a"], ["a", "a"])


def test_an_encoder_that_is_not_there_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        EmbeddingSimilarity(kind="embedding", model=str(tmp_path / "none")).build()
    said = str(refused.value)
    assert said.startswith(f"similarity.model: {tmp_path / 'none'} cannot be loaded (")
    assert said.endswith("; give a local folder that holds it as similarity.model, or set similarity.kind=lexical")
    assert "\n" not in said


def test_an_encoder_with_missing_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.1" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks the weights .*layer\.1"):
        EmbeddingSimilarity(kind="embedding", model=str(tmp_path)).build()


def test_a_checkpoint_without_a_pooler_will_do(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert build(tmp_path)(["a"], ["a"]) == pytest.approx([1.0], abs=1e-5)
