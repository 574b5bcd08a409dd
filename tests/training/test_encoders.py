"""Test that transformers reads a checkpoint written by training, and tokenizes like its tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from bertqa.cli.command import parse
from tests.support.paths import CHECKPOINT as SHIPPED
from training.encoders import (
    EncoderOptions,
    attention_implementation,
    bert_flops,
    load_model,
    longest_input,
    model_class,
    tokenizer_config,
    write_checkpoint,
)
from training.finetune_squad import span_loss
from training.options import JobArguments, Precision
from training.squad_features import Feature, collate

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "École",
    "ecole",
    "école",
    "USA",
    "usa",
    "who",
    "Who",
    "##s",
    "漢",
)
TEXTS = st.lists(st.sampled_from((*WORDS, "ÉCOLE", "Who's", "漢字", "\u200b", "e\u0301", "?")), max_size=12).map(
    " ".join
)
Both = tuple[Tokenizer, Any]


@pytest.fixture(scope="module", params=["shipped", "cased", "uncased with accents"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A checkpoint's own tokenizer, and what transformers makes of its directory."""
    directory = SHIPPED
    if request.param != "shipped":
        directory = tmp_path_factory.mktemp("checkpoint")
        tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.add_special_tokens([*WORDS[:5]])
        tokenizer.normalizer = BertNormalizer(lowercase=request.param != "cased", strip_accents=False)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=40,
        )
        model = BertForQuestionAnswering(config)
        write_checkpoint(directory, type(model).__name__, config, model.state_dict(), tokenizer.to_str())
        BertForQuestionAnswering.from_pretrained(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json")), AutoTokenizer.from_pretrained(directory)


@given(
    TEXTS | st.text(max_size=60), (TEXTS | st.text(max_size=60)).map("in ".__add__)
)  # transformers takes "" for none
def test_transformers_gives_the_same_ids(both: Both, question: str, context: str) -> None:
    own, theirs = both
    encoded, found = own.encode(question, context), theirs(question, context, return_offsets_mapping=True)
    assert found["input_ids"] == encoded.ids
    assert found["token_type_ids"] == encoded.type_ids
    assert found["offset_mapping"] == encoded.offsets
    assert theirs(question)["input_ids"] == own.encode(question).ids


def test_what_else_transformers_reads(both: Both) -> None:
    own, theirs = both
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(theirs, f"{role}_token_id") == own.token_to_id(f"[{role.upper()}]")
    assert theirs.model_max_length in (40, 512)


def test_the_shipped_file_is_what_training_writes() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    written = tokenizer_config((SHIPPED / "tokenizer.json").read_text(), config["max_position_embeddings"])
    assert json.loads((SHIPPED / "tokenizer_config.json").read_text()) == written
    assert written["do_lower_case"]


@pytest.mark.parametrize(
    ("gpu", "precision", "dropout", "chosen"),
    [
        (False, "fp32", 0.0, "sdpa"),
        (False, "fp32", 0.1, "sdpa"),
        (False, "bf16", 0.1, "sdpa"),
        (False, "bf16", 0.0, "eager"),
        (True, "bf16", 0.0, "sdpa"),
    ],
)
def test_the_attention_by_default(
    gpu: bool, precision: Precision, dropout: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert attention_implementation("auto", precision, dropout) == chosen
    assert attention_implementation("eager", precision, dropout) == "eager"


@pytest.mark.parametrize(
    ("flags", "dropout", "attention_dropout"),
    [([], 0.1, 0.1), (["--dropout", "0.2"], 0.2, 0.2), (["--attention-dropout", "0"], 0.1, 0.0)],
)
def test_dropout_of_attention_is_that_of_all_by_default(
    flags: list[str], dropout: float, attention_dropout: float
) -> None:
    options = EncoderOptions.of(parse(JobArguments, ["--precision", "fp32", *flags]))
    assert (options.dropout, options.attention_dropout, options.attention) == (dropout, attention_dropout, "sdpa")


SIZES: dict[str, Any] = {"vocab_size": 32, "num_attention_heads": 2, "max_position_embeddings": 34}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(**SIZES, hidden_size=16, num_hidden_layers=2, intermediate_size=24), 34),
        (ElectraConfig(**SIZES, hidden_size=16, num_hidden_layers=2, intermediate_size=24, embedding_size=16), 34),
        (DistilBertConfig(**SIZES, dim=16, n_layers=2, hidden_dim=24), 34),
        (MPNetConfig(**SIZES, hidden_size=16, num_hidden_layers=2, intermediate_size=24), 32),
        (RobertaConfig(**SIZES, hidden_size=16, num_hidden_layers=2, intermediate_size=24), 32),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_every_family_is_loaded_and_trained(config: PreTrainedConfig, positions: int, tmp_path: Path) -> None:
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    kind = model_class(str(tmp_path), "question answering")
    model = load_model(kind, str(tmp_path), EncoderOptions(0.25, 0.125, "eager"), trained_head=True)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert 0.25 in rates
    assert rates <= {0.25, 0.125, 0.0}
    assert longest_input(model.config) == positions
    model.eval()  # type: ignore[no-untyped-call]
    batch = collate([Feature(np.arange(4, 4 + 16, dtype=np.int32), 5, 6, 7)] * 3)
    with FlopCounterMode(display=False) as counter:
        loss = span_loss(model, batch)
        loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite().all()
    assert bert_flops(model.config, batch.lengths, 2 * 16 * 48) == counter.get_total_flops()
