"""Make a shard set from documents: tokenize, cut into pairs, shuffle, and write in parallel.

The row groups of all documents are shuffled and distributed to shards of similar size before anything is read. Each
shard is then a function of its row groups, the settings and its number. So the bytes do not depend on the number of
processes, and a killed run resumes with the missing shards.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencex
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer
from tqdm import tqdm

from bertqa.manifest import TOKENIZER_FILE, sha256_of
from training.data.documents import DataError, Document, DocumentGroup, document_files, document_groups, read_group
from training.data.pairs import PairMaker, Sentence
from training.data.parallel import each
from training.shards import (
    MANIFEST_FILE,
    Shard,
    ShardError,
    ShardManifest,
    Source,
    Storage,
    check_shard,
    tokenizer_sha256,
    write_shard,
)

PARTIAL_FILE = "manifest.partial.json"
"""The manifest of an incomplete set, with its finished shards."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Job(NamedTuple):
    """One shard to write."""

    directory: Path
    number: int
    groups: tuple[DocumentGroup, ...]
    settings: ShardManifest  # without sources and shards


def write_shard_set(
    documents: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    storage: Storage = "parquet",
    max_seq_len: int = 128,
    max_predictions_per_seq: int = 20,
    short_seq_prob: float = 0.1,
    duplicates: int = 1,
    language: str = "en",
    seed: int = 1,
    shard_bytes: int = 8 << 20,
    processes: int = 1,
) -> ShardManifest:
    """Write a shard set, or the shards that an earlier run did not write.

    Args:
        documents: folders of documents.
        tokenizer: a ``tokenizer.json`` of a BERT.
        output: directory of the set.
        storage: format of the shards.
        max_seq_len: tokens of the longest sequence, special tokens included.
        max_predictions_per_seq: tokens that may be masked in a sequence.
        short_seq_prob: probability that a document is cut into sequences of a random shorter length.
        duplicates: number of times that each document is cut into pairs, differently each time.
        language: language of the sentences, as a code of sentencex.
        seed: seed of the order and the pairs.
        shard_bytes: bytes of text per shard.
        processes: number of concurrent processes; does not change the result.

    Raises:
        DataError: there are fewer than two documents, the tokenizer is not BERT's, or ``output`` holds another set.
    """
    sources = document_files(documents)
    groups = [group for path in sources for group in document_groups(path)]
    text = _tokenizer_text(tokenizer)
    vocabulary = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    manifest = ShardManifest(
        storage=storage,
        tokenizer_sha256=tokenizer_sha256(text),
        vocab_size=max(vocabulary.values()) + 1,
        special_tokens={token: vocabulary[token] for token in SPECIAL_TOKENS},
        max_seq_len=max_seq_len,
        max_predictions_per_seq=max_predictions_per_seq,
        short_seq_prob=short_seq_prob,
        duplicates=duplicates,
        language=language,
        seed=seed,
        shard_bytes=shard_bytes,
        sources=tuple(
            Source(
                file=f"{path.parent.name}/{path.name}",
                documents=sum(group.documents for group in groups if group.path == path),
                sha256=sha256_of(path),
            )
            for path in sources
        ),
    )
    output.mkdir(parents=True, exist_ok=True)
    kept = _kept_shards(output, manifest)
    if not kept:
        (output / TOKENIZER_FILE).write_text(text)
        manifest.write(output / PARTIAL_FILE)  # reserves the directory before the first shard is written
    jobs = [
        Job(output, number, tuple(shard), replace(manifest, sources=()))
        for number, shard in enumerate(_dealt(groups, shard_bytes, seed))
    ]
    left = [job for job in jobs if _file_name(job) not in kept]
    with tqdm(total=len(jobs), initial=len(kept), unit="shard", disable=None) as progress:
        for job, shard in each(make_shard, left, processes):
            kept[_file_name(job)] = shard
            replace(manifest, shards=tuple(kept.values())).write(output / PARTIAL_FILE)
            progress.update()
    complete = replace(manifest, shards=tuple(kept[name] for name in sorted(kept)))
    complete.write(output / MANIFEST_FILE)
    (output / PARTIAL_FILE).unlink(missing_ok=True)
    return complete


def make_shard(job: Job) -> Shard:
    """Write one shard."""
    made = job.settings
    tokenizer = _tokenizer(job.directory / TOKENIZER_FILE)
    documents = [
        sentences
        for group in job.groups
        for document in read_group(group)
        if (sentences := list(_sentences(document, tokenizer, made.language)))
    ]
    chooser = random.Random(f"{made.seed} {job.number}")  # strings seed the same in every Python version
    maker = PairMaker(
        cls_id=made.special_tokens["[CLS]"],
        sep_id=made.special_tokens["[SEP]"],
        max_seq_len=made.max_seq_len,
        short_seq_prob=made.short_seq_prob,
        random=chooser,
    )
    if len(documents) < 2:
        raise DataError(f"{_file_name(job)}: fewer than two of its documents hold text, the first {job.groups[0].path}")
    pairs = [
        pair for _ in range(made.duplicates) for number in range(len(documents)) for pair in maker(documents, number)
    ]
    chooser.shuffle(pairs)
    return write_shard(job.directory / _file_name(job), pairs, made.storage, made.vocab_size)


def train_tokenizer(documents: Sequence[Path], output: Path, *, vocab_size: int, lowercase: bool) -> int:
    """Learn a WordPiece vocabulary from documents and write it as the ``tokenizer.json`` of a BERT.

    Returns:
        The size of the vocabulary; less than ``vocab_size`` if the text is too short for that many pieces.

    Raises:
        DataError: a folder contains no documents.
    """
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    groups = [group for path in document_files(documents) for group in document_groups(path)]
    texts = (document.paragraphs for group in tqdm(groups, disable=None) for document in read_group(group))
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, SPECIAL_TOKENS.index(token)) for token in ("[SEP]", "[CLS]")]  # the trainer numbers them first
    tokenizer.post_processor = BertProcessing(*ends)
    tokenizer.decoder = WordPieceDecoder()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    tokenizer.save(str(partial))
    os.replace(partial, output)
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _tokenizer_text(path: Path) -> str:
    """Load a ``tokenizer.json`` unchanged, after checking that it is a BERT tokenizer."""
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the binding raises bare Exception for every cause
        raise DataError(f"--tokenizer {path}: not a readable tokenizer.json ({error})") from error
    for token in SPECIAL_TOKENS:
        if tokenizer.token_to_id(token) is None:
            raise DataError(f"--tokenizer {path}: has no {token} token; BERT needs it")
    return text


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the work is parallel by process; threads would compete
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
    return tokenizer


def _sentences(document: Document, tokenizer: Tokenizer, language: str) -> Iterator[Sentence]:
    texts = [text for paragraph in document.paragraphs for text in sentencex.segment(language, paragraph)]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        if ids := encoding.ids:
            words = np.array(encoding.word_ids, dtype=np.int32)
            starts = np.ones(len(ids), dtype=bool)
            starts[1:] = words[1:] != words[:-1]
            yield Sentence(np.array(ids, dtype=np.int32), starts)


def _file_name(job: Job) -> str:
    return f"part-{job.number:05}.{job.settings.storage}"


def _dealt(groups: Sequence[DocumentGroup], shard_bytes: int, seed: int) -> list[list[DocumentGroup]]:
    """Assign row groups to shards at random, with at least two documents per shard."""
    if sum(group.documents for group in groups) < 2:
        raise DataError("--documents: at least two documents are needed, for the random segments of pairs")
    shuffled = list(groups)
    random.Random(f"{seed} groups").shuffle(shuffled)
    shards: list[list[DocumentGroup]] = [[]]
    for group in shuffled:
        shard = shards[-1]
        if sum(other.bytes for other in shard) >= shard_bytes and sum(other.documents for other in shard) > 1:
            shards.append([])
        shards[-1].append(group)
    if len(shards) > 1 and sum(group.documents for group in shards[-1]) < 2:
        shards[-2] += shards.pop()
    return shards


def _kept_shards(output: Path, manifest: ShardManifest) -> dict[str, Shard]:
    """Return the shards that an earlier run with these settings finished, by name, after checking each."""
    kept: dict[str, Shard] = {}
    for name in (MANIFEST_FILE, PARTIAL_FILE):
        if not (output / name).exists():
            continue
        found = ShardManifest.read(output / name)
        ours, theirs = manifest.settings(), found.settings()
        for field, value in ours.items():
            if theirs[field] != value:
                raise DataError(
                    f"{output}: holds shards made with another {field}"
                    + ("" if field in ("sources", "special_tokens") else f", {theirs[field]} and not {value}")
                    + "; give another --output"
                )
        for shard in found.shards:
            try:
                check_shard(output, shard)
            except ShardError as error:
                print(f"made anew: {error}", flush=True)
            else:
                kept[shard.file] = shard
    return kept
