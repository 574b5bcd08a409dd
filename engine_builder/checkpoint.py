"""A BERT question-answering checkpoint on disk: configuration and weights, read without torch and never unpickled."""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then reads
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bertqa.manifest import SETTINGS_FILE, TOKENIZER_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.json"

GATE_FILE = "gate.json"
CALIBRATION_FILE = "calibration.json"

FloatArray = NDArray[np.float32]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "tf_model.h5", "pytorch_model.bin.index.json")
_LAYER_NORM_OF_TENSORFLOW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_UNUSED = re.compile(r"(bert\.)?(pooler\..*|embeddings\.(position|token_type)_ids)|cls\..*")


class InvalidCheckpoint(ValueError):
    """A checkpoint cannot be built from; the message names the file and, where there is one, the field or tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """The fields of ``config.json`` that shape the graph."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Read and check ``config.json``.

        Raises:
            InvalidCheckpoint: it is missing, malformed, or of a model other than BERT for question answering.
        """
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidCheckpoint(f"{path}: not readable ({error})") from error
        if not isinstance(values, dict):
            raise InvalidCheckpoint(f"{path}: must be a JSON object")
        for field, known, default in (
            ("model_type", "bert", "bert"),
            ("architectures", ["BertForQuestionAnswering"], None),
            ("hidden_act", "gelu", "gelu"),
            ("position_embedding_type", "absolute", "absolute"),
        ):
            if (found := values.get(field, default)) != known:
                raise InvalidCheckpoint(f"{path}: {field} is {reprlib.repr(found)}; only {known!r} is supported")
        numbers: dict[str, int] = {}
        for field in cls.__dataclass_fields__:
            if field == "layer_norm_eps":
                continue
            number = values.get(field)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise InvalidCheckpoint(f"{path}: {field} must be a positive whole number, not {reprlib.repr(number)}")
            numbers[field] = number
        epsilon = values.get("layer_norm_eps", 1e-12)
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise InvalidCheckpoint(f"{path}: layer_norm_eps must lie between 0 and 1, not {reprlib.repr(epsilon)}")
        if numbers["hidden_size"] % numbers["num_attention_heads"]:
            raise InvalidCheckpoint(
                f"{path}: hidden_size {numbers['hidden_size']} is no multiple of num_attention_heads "
                f"{numbers['num_attention_heads']}"
            )
        if numbers["type_vocab_size"] < 2:
            raise InvalidCheckpoint(f"{path}: type_vocab_size must be at least 2, for question and context")
        return cls(layer_norm_eps=epsilon, **numbers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the graph needs and its shape; names without the ``bert.`` prefix."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "embeddings.position_embeddings.weight": (self.max_position_embeddings, hidden),
            "embeddings.token_type_embeddings.weight": (self.type_vocab_size, hidden),
            "embeddings.LayerNorm.weight": (hidden,),
            "embeddings.LayerNorm.bias": (hidden,),
        }
        for n in range(self.num_hidden_layers):
            for name, rows, columns in (
                ("attention.self.query", hidden, hidden),
                ("attention.self.key", hidden, hidden),
                ("attention.self.value", hidden, hidden),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", inner, hidden),
                ("output.dense", hidden, inner),
            ):
                shapes[f"encoder.layer.{n}.{name}.weight"] = (rows, columns)
                shapes[f"encoder.layer.{n}.{name}.bias"] = (rows,)
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                shapes[f"encoder.layer.{n}.{name}.weight"] = (hidden,)
                shapes[f"encoder.layer.{n}.{name}.bias"] = (hidden,)
        shapes["qa_outputs.weight"] = (2, hidden)
        shapes["qa_outputs.bias"] = (2,)
        return shapes


def find_checkpoint(checkpoint: str) -> Path:
    """A local checkpoint directory as it is, or a snapshot of a hub checkpoint; never a pickle.

    Raises:
        InvalidCheckpoint: there is no such directory and no such hub checkpoint.
    """
    directory = Path(checkpoint)
    if directory.is_dir():
        return directory
    if not _HUB_ID.fullmatch(checkpoint) or directory.exists():
        raise InvalidCheckpoint(f"{checkpoint}: no such directory, and not a hub id of the form OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415  needed for hub ids only
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise InvalidCheckpoint(
            f"{checkpoint}: no such directory; to load it from the hub, `pip install huggingface_hub`"
        ) from error
    wanted = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, SETTINGS_FILE, GATE_FILE, CALIBRATION_FILE]
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidCheckpoint(f"{checkpoint}: no such directory, and the hub did not give it ({error})") from error


def read_weights(directory: Path, config: BertConfig) -> dict[str, FloatArray]:
    """Read ``model.safetensors``, stored in any float type, as float32.

    Returns:
        The tensors of ``config.shapes()`` under those names. Poolers, pretraining heads and position buffers of the
        file are left out.

    Raises:
        InvalidCheckpoint: the file is missing, truncated or no safetensors file, or a tensor is missing, unknown, not
            finite, or of another shape than the configuration says.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = next((name for name in _PICKLES if (directory / name).exists()), None)
        also = f"; {pickled} is not read, because loading it can run code: save as safetensors" if pickled else ""
        raise InvalidCheckpoint(f"{path}: is missing{also}")
    weights: dict[str, FloatArray] = {}
    shapes = config.shapes()
    try:
        with safe_open(path, framework="np") as file:
            for stored in file.keys():  # noqa: SIM118  not a mapping
                if _UNUSED.fullmatch(stored):
                    continue
                name = _graph_name(stored)
                if name not in shapes:
                    raise InvalidCheckpoint(
                        f"{path}: tensor {stored} has no place in the model that {CONFIG_FILE} describes"
                    )
                found = tuple(file.get_slice(stored).get_shape())
                if found != shapes[name]:
                    raise InvalidCheckpoint(
                        f"{path}: tensor {stored} has shape {found}; {CONFIG_FILE} expects {shapes[name]}"
                    )
                if (kind := file.get_slice(stored).get_dtype()) not in _FLOATS:
                    raise InvalidCheckpoint(f"{path}: tensor {stored} is of type {kind}; only {_FLOATS} can be read")
                with np.errstate(over="ignore"):  # becomes infinite, which is refused below
                    weights[name] = file.get_tensor(stored).astype(np.float32)
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpoint(f"{path}: truncated, or no safetensors file ({error})") from error
    _check_values(path, weights, shapes)
    return weights


def _graph_name(stored: str) -> str:
    name = stored.removeprefix("bert.")
    for old, new in _LAYER_NORM_OF_TENSORFLOW.items():
        name = name.replace(old, new)
    return name


def _check_values(path: Path, weights: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise InvalidCheckpoint(f"{path}: tensor {name} of shape {shape} is missing")
        if not np.isfinite(weights[name]).all():
            raise InvalidCheckpoint(f"{path}: tensor {name} holds NaN or infinite values")
