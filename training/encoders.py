"""Find and load the encoder of ``--init``, run it, save it, and count its FLOPs.

The families are those of transformers that read BERT's windows: WordPiece ids, one vector per token. Only this module
knows the differences between them: the names of two settings, token types, and where positions begin.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from bertqa.manifest import TOKENIZER_FILE, WEIGHTS_FILE
from training.checkpoints import save_json, save_tensors
from training.options import JobArguments, Precision

_Model = TypeVar("_Model", bound=PreTrainedModel)

CONFIG_FILE = "config.json"
Attention = Literal["sdpa", "eager"]  # transformers' names of fused attention and plain matrix products
Head = Literal["question answering", "sequence classification"]
HEADS = {
    "question answering": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "sequence classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}

FIRST_POSITION = {"mpnet": 2, "roberta": 2, "xlm-roberta": 2, "camembert": 2}
"""Number of unused first rows of the position embeddings, for families that have them."""


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How an encoder computes in training, from the options of a job."""

    dropout: float  # of embeddings and layers
    attention_dropout: float  # of the attention weights
    attention: Attention

    @classmethod
    def of(cls, args: JobArguments) -> "EncoderOptions":
        """Take the settings from the options of a job."""
        attention_dropout = args.dropout if args.attention_dropout is None else args.attention_dropout
        attention = attention_implementation(args.attention, args.precision, attention_dropout)
        return cls(args.dropout, attention_dropout, attention)

    def identity(self) -> dict[str, object]:
        """Return the settings that decide a step's result; the kind of attention only changes rounding."""
        return {"dropout": self.dropout, "attention_dropout": self.attention_dropout}


def encoder_source(init: str) -> str:
    """Resolve ``--init``: a directory, else the ``model/`` folder of an installed package, else a hub id."""
    if Path(init).is_dir():
        return init
    spec = find_spec(init) if init.isidentifier() else None
    if spec and spec.origin and (model := Path(spec.origin).parent / "model").is_dir():
        return str(model)
    return init


def model_class(source: str, head: Head) -> type[PreTrainedModel]:
    """Return the transformers class of an encoder's family with a given head.

    Raises:
        SystemExit: config.json cannot be read, or its family has no such head.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"--init {source}: config.json or {WEIGHTS_FILE} cannot be used ({error})") from error
    if type(config) not in HEADS[head]:
        raise SystemExit(f"--init {source}: config.json: the family {config.model_type!r} has no head for {head}")
    kind: Any = HEADS[head][type(config)]
    found: type[PreTrainedModel] = kind
    return found


def load_model(
    kind: type[_Model], source: str, options: EncoderOptions, *, trained_head: bool = False, **config: Any
) -> _Model:
    """Load an encoder from safetensors, never from a pickle, with a new head or its own.

    Args:
        kind: class of the model, which decides the head.
        source: result of `encoder_source`.
        options: dropout and attention.
        trained_head: whether the files must contain the head too, as for a teacher.
        config: more fields of the model's config, such as ``num_labels``.

    Raises:
        SystemExit: there is no such encoder, or its files are corrupt, are not safetensors, or do not match.
    """
    load: Any = kind.from_pretrained
    try:
        model, loaded = load(
            source,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=options.attention if kind._supports_sdpa else "eager",  # MPNet has no fused attention
            **_dropout(kind, options),
            **config,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError, ZeroDivisionError) as error:
        raise SystemExit(f"--init {source}: config.json or {WEIGHTS_FILE} cannot be used ({error})") from error
    encoder = "" if trained_head else f"{kind.base_model_prefix}."  # else the head and the pooler may be new
    if missing := sorted(x for x in loaded["missing_keys"] if x.startswith(encoder) and ".pooler." not in x):
        raise SystemExit(f"--init {source}: {WEIGHTS_FILE} has no tensor {missing[0]}, which config.json requires")
    if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise SystemExit(f"--init {source}: {WEIGHTS_FILE}: tensor {broken[0]} contains NaN or infinite values")
    assert isinstance(model, kind)
    torch.nn.Module.float(model)  # fp32 master weights, whatever the file's dtype
    return model


def _dropout(kind: type[PreTrainedModel], options: EncoderOptions) -> dict[str, float]:
    """Return the dropout settings under the names that the family's config uses."""
    if getattr(kind.config_class, "model_type", None) == "distilbert":
        everywhere = dict.fromkeys(("dropout", "qa_dropout", "seq_classif_dropout"), options.dropout)
        return everywhere | {"attention_dropout": options.attention_dropout}
    return {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.attention_dropout}


def attention_implementation(attention: Attention | Literal["auto"], precision: Precision, dropout: float) -> Attention:
    """Resolve ``--attention``; ``auto`` takes the faster kind for this attention dropout."""
    if attention != "auto":
        return attention
    # Without dropout, torch uses flash attention on CPUs too. In bf16 its backward pass costs more than it saves: steps
    # take 1.2 times as long, and 1.4 times with AMX. In all other cases fused attention is faster.
    slow = not torch.cuda.is_available() and precision != "fp32" and not dropout
    return "eager" if slow else "sdpa"


def load_tokenizer(source: str) -> Tokenizer:
    """Load the fast tokenizer of a directory or a hub id.

    Raises:
        SystemExit: the tokenizer is missing or corrupt.
    """
    path = Path(source) / TOKENIZER_FILE
    try:
        return Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(source)
    except Exception as error:  # the binding raises a bare Exception for every error
        raise SystemExit(f"--init {source}: {TOKENIZER_FILE} cannot be used ({error})") from error


def half(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights in fp16, the format of fine-tuned checkpoints."""
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def write_checkpoint(
    directory: Path,
    architecture: str,
    config: PreTrainedConfig,
    weights: Mapping[str, torch.Tensor],
    tokenizer: str,
) -> None:
    """Write a checkpoint directory that ``--init``, the engine builder and transformers can read.

    Args:
        directory: output directory; created if missing.
        architecture: class name of the model in transformers; the weights have its tensor names.
        config: config of the model.
        weights: tensors to store, in their final dtype.
        tokenizer: the contents of tokenizer.json.

    Raises:
        CheckpointError: the weights cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_tensors(directory / WEIGHTS_FILE, contiguous, {"format": "pt"})
    save_json(directory / CONFIG_FILE, config.to_diff_dict() | {"architectures": [architecture]})
    (directory / TOKENIZER_FILE).write_text(tokenizer)
    described = tokenizer_config(tokenizer, longest_input(config), token_types=has_token_types(config))
    save_json(directory / "tokenizer_config.json", described)


def longest_input(config: PreTrainedConfig) -> int:
    """Return the longest input that an encoder has positions for, in tokens."""
    return int(config.max_position_embeddings) - FIRST_POSITION.get(config.model_type, 0)


def has_token_types(config: PreTrainedConfig) -> bool:
    """Check whether an encoder uses ``token_type_ids`` to separate question and context."""
    return getattr(config, "type_vocab_size", 0) > 1


class TokenBatch(Protocol):
    """The inputs of an encoder; each int64 of shape (sequences, length)."""

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids, padded with [PAD]."""

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 for a token and 0 for padding."""

    @property
    def token_type_ids(self) -> torch.Tensor:
        """1 for the second text."""


def forward(model: torch.nn.Module, batch: TokenBatch, **options: Any) -> Any:
    """Run a transformers model on a batch; ``options`` are passed to its ``forward``."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    config: Any = model.config
    if has_token_types(config):
        inputs["token_type_ids"] = batch.token_type_ids
    return model(**inputs, **options)


def tokenizer_config(tokenizer: str, max_length: int, *, token_types: bool = True) -> dict[str, Any]:
    """Build the ``tokenizer_config.json`` with which transformers' ``AutoTokenizer`` gives the same token ids.

    Without it, transformers uses only the vocabulary and guesses the rest; version 5.2 does not lower-case. The class
    named here uses tokenizer.json unchanged; ``do_lower_case`` is for other readers.

    Args:
        tokenizer: the contents of tokenizer.json.
        max_length: longest input of the model, in tokens.
        token_types: whether the model uses token types.
    """
    normalizer = json.loads(tokenizer).get("normalizer") or {}
    token_to_id = Tokenizer.from_str(tokenizer).token_to_id
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": bool(normalizer.get("lowercase")),
        "model_max_length": max_length,
        "model_input_names": ["input_ids", *["token_type_ids"][: int(token_types)], "attention_mask"],
        **{role: token for role, token in roles.items() if token_to_id(token) is not None},
    }


def bert_flops(config: PreTrainedConfig, lengths: Sequence[int], head_weights: float = 0.0) -> float:
    """Count the FLOPs of one forward and backward pass of a BERT encoder, without padding.

    A multiply-add counts as two, and the backward pass as two forward passes. That is 6 N per token, where N is the
    number of weights in the encoder's matrices, plus 12 L H S for its attention to S tokens in L layers of width H
    (Chowdhery et al. 2022, appendix B; the same as Narayanan et al. 2021 without recomputation). Embedding look-ups
    count as zero.

    Args:
        config: config with hidden_size, intermediate_size and num_hidden_layers.
        lengths: length of each sequence, in tokens.
        head_weights: multiplications of the heads for the whole batch: weights of a head times its input vectors.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    weights = layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 12 * layers * hidden * sum(length * length for length in lengths)
    return float(6 * (weights * sum(lengths) + head_weights) + attention)
