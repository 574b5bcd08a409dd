"""Make the training data of a SQuAD job from its flags; a student and its teacher get the same data."""

import random
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from bertqa.squad import Example, MalformedSquad, read_squad
from bertqa.windows import WindowTokenizer
from training.distillation import Source, fingerprint
from training.encoders import load_tokenizer, longest_input
from training.options import SquadArguments, TeachSquadArguments
from training.squad_features import Feature, hold_back_articles, make_features, negatives, unlabelled, without_label

SETTINGS = (
    *("held_back_articles", "negatives", "max_questions", "unlabelled_share", "data_seed"),
    *("max_seq_len", "max_question_tokens", "overlap"),
)
"""The flags that decide the windows, in addition to the files."""

Arguments = SquadArguments | TeachSquadArguments


@dataclass(frozen=True, slots=True)
class SquadData:
    """The questions and windows of a job."""

    training: list[Example]
    held_back: list[Example]
    impossible: list[Example]  # questions of --impossible about held-back articles
    examples: int  # number of training questions, including added ones
    features: list[Feature]
    tokenizer: WindowTokenizer
    v2: bool  # whether the file itself has unanswerable questions
    negatives: float  # share of questions repeated with another paragraph
    source: Source  # the features of the soft labels

    @classmethod
    def of(cls, args: Arguments, tokenizer_of: str, config: PreTrainedConfig) -> "SquadData":
        """Make the windows of a job.

        Args:
            args: options of the job.
            tokenizer_of: directory or hub id of the encoder.
            config: config of the encoder.

        Raises:
            SystemExit: a file cannot be read, or the windows do not suit the encoder.
        """
        tokenizer = window_tokenizer(args, tokenizer_of, config)
        training, held_back = hold_back_articles(read_file(args.train, "--train"), args.held_back_articles)
        if args.max_questions:
            training = random.Random(args.data_seed).sample(training, min(args.max_questions, len(training)))
        v2 = has_impossible(training)
        share = args.negatives if args.negatives is not None else 0.0 if v2 else 0.1
        kept, tuning = read_impossible(args.impossible, {example.title for example in held_back})
        labelled = training + negatives(training, share, args.data_seed) + kept
        more = unlabelled(training, args.unlabelled_share, args.data_seed)
        for path in args.unlabelled:
            more += read_file(path, "--unlabelled")
        features = [*make_features(labelled, tokenizer), *map(without_label, make_features(more, tokenizer))]
        source = Source(
            kind="squad",
            features=fingerprint((feature.input_ids, feature.context_offset) for feature in features),
            rows=tuple(len(feature.input_ids) for feature in features),
            settings={name: getattr(args, name) for name in SETTINGS} | {"negatives": share},
        )
        return cls(training, held_back, tuning, len(labelled) + len(more), features, tokenizer, v2, share, source)


def read_file(path: Path, flag: str) -> list[Example]:
    """Read the questions of a SQuAD file.

    Raises:
        SystemExit: the file cannot be read.
    """
    try:
        return read_squad(path)
    except (OSError, MalformedSquad) as error:
        raise SystemExit(f"{flag}: {error}") from error


def read_impossible(paths: Iterable[Path], held_back: Container[str]) -> tuple[list[Example], list[Example]]:
    """Read the questions of ``--impossible``: those to train on, and those about held-back articles.

    Raises:
        SystemExit: a file cannot be read, or a question in it has an answer.
    """
    examples = [example for path in paths for example in read_file(path, "--impossible")]
    if answerable := [example.id for example in examples if example.references]:
        raise SystemExit(f"--impossible: {len(answerable)} questions have an answer, {answerable[0]!r} first")
    return (
        [example for example in examples if example.title not in held_back],
        [example for example in examples if example.title in held_back],
    )


def has_impossible(examples: Iterable[Example]) -> bool:
    """Check whether these are SQuAD v2.0 questions, some of which have no answer."""
    return any(not example.references for example in examples)


def window_tokenizer(args: Arguments, tokenizer_of: str, config: PreTrainedConfig) -> WindowTokenizer:
    """Create the job's window tokenizer, and check that it fits the encoder."""
    if args.max_seq_len > (positions := longest_input(config)):
        raise SystemExit(f"--max-seq-len {args.max_seq_len}: {args.init} has {positions} positions")
    try:
        tokenizer = WindowTokenizer(
            load_tokenizer(tokenizer_of),
            max_seq_len=args.max_seq_len,
            max_question_tokens=args.max_question_tokens,
            overlap=args.overlap,
        )
    except ValueError as error:
        raise SystemExit(f"--max-seq-len, --max-question-tokens, --overlap: {error}") from error
    if tokenizer.vocabulary_size > config.vocab_size:
        raise SystemExit(f"--init {args.init}: {tokenizer.vocabulary_size} tokens, but {config.vocab_size} embeddings")
    return tokenizer
