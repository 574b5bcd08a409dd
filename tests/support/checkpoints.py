"""Small checkpoints with random weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from engine_builder.architectures import read_architecture

_TEXT = "Ada Lovelace wrote the first program in London. Who wrote it? Where was it written? Horovod was made at Uber."


def write_checkpoint(directory: Path, *, prefix: str = "bert.", text: str = _TEXT, **fields: object) -> Path:
    """Write a BERT for question answering with two small layers and random weights, and a tokenizer that knows the
    words of ``text``; ``fields`` replace those of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    words = dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(text.lower().replace(".", " .").replace("?", " ?").split())]
    )
    tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["BertForQuestionAnswering"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    } | fields
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "bertqa.json").write_text(
        json.dumps({"name": "tiny", "max_seq_len": 128, "overlap": 16, "max_question_tokens": 16})
    )
    random = np.random.default_rng(0)
    shapes = read_architecture(directory).shapes()
    weights = {
        name if name.startswith("qa_outputs") else prefix + name: random.normal(
            "LayerNorm.weight" in name, 0.2, shape
        ).astype(np.float16)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    return directory
