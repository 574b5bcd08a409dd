"""Find a question-answering checkpoint and read its weights, without torch and without unpickling anything."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

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
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class InvalidCheckpoint(ValueError):
    """The checkpoint cannot be used; the message names the file and, if there is one, the field or tensor."""


class Tensors(Protocol):
    """The tensors that a model needs; a part of `engine_builder.architectures.Architecture`."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""

    def tensor_name(self, stored: str) -> str | None:
        """Map the name of a stored tensor to its name in ``shapes()``, or to None if it is not needed."""


def find_checkpoint(checkpoint: str) -> Path:
    """Return a local checkpoint directory, or download a hub checkpoint without its pickle files.

    Raises:
        InvalidCheckpoint: there is neither such a directory nor such a hub checkpoint.
    """
    directory = Path(checkpoint)
    if directory.is_dir():
        return directory
    if not _HUB_ID.fullmatch(checkpoint) or directory.exists():
        raise InvalidCheckpoint(f"{checkpoint}: no such directory, and not a hub id such as OWNER/NAME")
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
        raise InvalidCheckpoint(f"{checkpoint}: no such directory, and the hub download failed ({error})") from error


def read_weights(directory: Path, wanted: Tensors) -> dict[str, FloatArray]:
    """Read ``model.safetensors``, stored in any float type, as float32.

    Returns:
        The tensors of ``wanted.shapes()`` under those names.

    Raises:
        InvalidCheckpoint: the file is missing, truncated or not a safetensors file, or a tensor is missing, unknown or
            not finite, or has another shape than ``config.json`` says.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = next((name for name in _PICKLES if (directory / name).exists()), None)
        also = f"; {pickled} is not read, because loading it can run code; save it as safetensors" if pickled else ""
        raise InvalidCheckpoint(f"{path}: is missing{also}")
    weights: dict[str, FloatArray] = {}
    shapes = wanted.shapes()
    try:
        with safe_open(path, framework="np") as file:
            for stored in file.keys():  # noqa: SIM118  not a mapping
                if (name := wanted.tensor_name(stored)) is None:
                    continue
                if name not in shapes:
                    raise InvalidCheckpoint(
                        f"{path}: tensor {stored} does not belong to the model that {CONFIG_FILE} describes"
                    )
                found = tuple(file.get_slice(stored).get_shape())
                if found != shapes[name]:
                    raise InvalidCheckpoint(
                        f"{path}: tensor {stored} has shape {found}, but {CONFIG_FILE} expects {shapes[name]}"
                    )
                if (kind := file.get_slice(stored).get_dtype()) not in _FLOATS:
                    raise InvalidCheckpoint(f"{path}: tensor {stored} has type {kind}; supported: {', '.join(_FLOATS)}")
                with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
                    weights[name] = file.get_tensor(stored).astype(np.float32)
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpoint(f"{path}: truncated, or not a safetensors file ({error})") from error
    _check_values(path, weights, shapes)
    return weights


def _check_values(path: Path, weights: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise InvalidCheckpoint(f"{path}: tensor {name} of shape {shape} is missing")
        if not np.isfinite(weights[name]).all():
            raise InvalidCheckpoint(f"{path}: tensor {name} contains NaN or infinite values")
