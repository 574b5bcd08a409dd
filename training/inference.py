"""Run a model over many sequences in batches of similar length, for evaluation and teachers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from training.encoders import TokenBatch, forward
from training.loop import Batch, autocast, to_device
from training.options import Precision

TOKENS_AT_ONCE = 4096
"""Largest batch in tokens, padding included."""


class Sequenced(Protocol):
    """A feature of a job."""

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """Token ids without padding, (tokens,)."""


class EncoderBatch(Batch, TokenBatch, Protocol):
    """A batch of the training loop that an encoder reads."""


_Feature = TypeVar("_Feature", bound=Sequenced)
_EncoderBatch = TypeVar("_EncoderBatch", bound=EncoderBatch)

ReadOut = Callable[[object], torch.Tensor]
"""Extracts the logits from a model's output, (sequences, rows, columns)."""


def batches_by_length(lengths: Sequence[int], tokens: int = TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Cut sequences into batches of similar length, longest first, so that a lack of memory shows at once.

    Args:
        lengths: lengths of the sequences, in tokens.
        tokens: most tokens in a batch, with padding to its longest sequence; a longer sequence is its own batch.

    Yields:
        Indexes of the sequences of one batch.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    begin = 0
    while begin < len(order):
        end = begin + max(tokens // lengths[order[begin]], 1)
        yield order[begin:end]
        begin = end


def predict(
    model: torch.nn.Module,
    features: Sequence[_Feature],
    collate: Callable[[Sequence[_Feature]], _EncoderBatch],
    read_out: ReadOut,
    device: torch.device,
    precision: Precision,
    *,
    progress: str | None = None,
) -> list[NDArray[np.float32]]:
    """Compute the logits of all features, in order; the model is in evaluation mode afterwards.

    Args:
        model: the model, already on the device.
        features: inputs of the model.
        collate: makes a batch of some features.
        read_out: extracts the logits from the model's output.
        device: device of the model.
        precision: precision of the matrix products.
        progress: unit of the progress bar; None shows no bar.

    Returns:
        For each feature, float32 logits of shape (rows, columns), without the rows of padding.
    """
    model.eval()
    found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(features)
    with tqdm(total=len(features), unit=progress or "", disable=progress is None, mininterval=5) as bar:
        for indexes in batches_by_length([len(feature.input_ids) for feature in features]):
            batch = to_device(collate([features[index] for index in indexes]), device)
            with torch.inference_mode(), autocast(precision, device):
                logits = read_out(forward(model, batch)).float().cpu().numpy()
            for row, index in enumerate(indexes):
                found[index] = logits[row, : len(features[index].input_ids)].copy()
            bar.update(len(indexes))
    return found
