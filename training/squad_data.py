"""What a SQuAD job trains on, decided by its flags: the same for a student and for the teacher of its soft labels."""

import argparse
import random
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from bertqa.squad import Example, MalformedSquad, read_squad
from bertqa.windows import MAX_QUESTION_TOKENS, MAX_SEQ_LEN, OVERLAP, WindowMaker
from training.distillation import Source, fingerprint
from training.encoders import load_tokenizer, longest_input
from training.loop import at_least_one, fraction, not_negative
from training.squad_features import Feature, hold_back_articles, make_features, negatives, unlabelled, without_label

SETTINGS = (
    *("held_back_articles", "negatives", "max_questions", "unlabelled_share", "data_seed"),
    *("max_seq_len", "max_question_tokens", "overlap"),
)
"""The flags that decide the windows, beside the files."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that decide what is trained on."""
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, required=True, help="SQuAD training file, v1.1 or v2.0")
    add("--held-back-articles", type=int, default=20, help="training articles kept for tuning")
    add("--negatives", type=fraction, help="unanswerable questions added, as a share; default: 0.1, for v2.0 none")
    add("--max-questions", type=at_least_one, help="train on a random part of the questions")
    impossible_help = "questions without an answer, in the layout of SQuAD v2.0, as training.hard_negatives makes them"
    add("--impossible", type=Path, nargs="+", default=[], metavar="FILE", help=impossible_help)
    unlabelled_help = (
        "questions put to other paragraphs of their article, as a share, with soft labels alone; default: 0"
    )
    add("--unlabelled-share", type=not_negative, default=0.0, help=unlabelled_help)
    file_help = "more questions, in the layout of SQuAD, with soft labels alone; answers may be empty and are not read"
    add("--unlabelled", type=Path, nargs="+", default=[], metavar="FILE", help=file_help)
    add("--data-seed", type=int, help="of the questions that are drawn; default: that of --seed")
    add("--max-seq-len", type=int, default=MAX_SEQ_LEN, help="tokens of a full window")
    add("--max-question-tokens", type=int, default=MAX_QUESTION_TOKENS, help="longer ones are cut")
    add("--overlap", type=int, default=OVERLAP, help="context tokens that neighbouring windows share")


@dataclass(frozen=True, slots=True)
class SquadData:
    """The questions and windows of a job."""

    training: list[Example]
    held_back: list[Example]
    impossible: list[Example]  # questions of --impossible about the held-back articles
    examples: int  # questions that are trained on, with those added
    features: list[Feature]
    maker: WindowMaker
    v2: bool  # whether the file has unanswerable questions of its own
    source: Source  # of the soft labels

    @classmethod
    def of(cls, args: argparse.Namespace, tokenizer_of: str, config: PreTrainedConfig) -> "SquadData":
        """Make the windows of a command line; sets the defaults of ``args`` that depend on the data.

        Args:
            args: as `add_data_arguments` has them.
            tokenizer_of: directory or hub id of the encoder.
            config: of the encoder.

        Raises:
            SystemExit: a file cannot be read, or the windows do not suit the encoder.
        """
        maker = window_maker(args, tokenizer_of, config)
        training, held_back = hold_back_articles(read_file(args.train, "--train"), args.held_back_articles)
        if args.max_questions:
            training = random.Random(args.data_seed).sample(training, min(args.max_questions, len(training)))
        v2 = has_impossible(training)
        if args.negatives is None:
            args.negatives = 0.0 if v2 else 0.1
        kept, tuning = read_impossible(args.impossible, {example.title for example in held_back})
        labelled = training + negatives(training, args.negatives, args.data_seed) + kept
        more = unlabelled(training, args.unlabelled_share, args.data_seed)
        for path in args.unlabelled:
            more += read_file(path, "--unlabelled")
        features = [*make_features(labelled, maker), *map(without_label, make_features(more, maker))]
        source = Source(
            kind="squad",
            features=fingerprint((feature.input_ids, feature.context_offset) for feature in features),
            rows=tuple(len(feature.input_ids) for feature in features),
            settings={name: getattr(args, name) for name in SETTINGS},
        )
        return cls(training, held_back, tuning, len(labelled) + len(more), features, maker, v2, source)


def read_file(path: Path, flag: str) -> list[Example]:
    """The questions of a SQuAD file.

    Raises:
        SystemExit: it cannot be read.
    """
    try:
        return read_squad(path)
    except (OSError, MalformedSquad) as error:
        raise SystemExit(f"{flag}: {error}") from error


def read_impossible(paths: Iterable[Path], held_back: Container[str]) -> tuple[list[Example], list[Example]]:
    """The questions of ``--impossible``: those to train on, and those about articles that are held back.

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
    """Whether these are questions of SQuAD v2.0, of which some have no answer."""
    return any(not example.references for example in examples)


def window_maker(args: argparse.Namespace, tokenizer_of: str, config: PreTrainedConfig) -> WindowMaker:
    """The maker of the job's windows, refused where it does not suit the encoder."""
    if args.max_seq_len > (positions := longest_input(config)):
        raise SystemExit(f"--max-seq-len {args.max_seq_len}: {args.init} has {positions} positions")
    try:
        maker = WindowMaker(
            load_tokenizer(tokenizer_of),
            max_seq_len=args.max_seq_len,
            max_question_tokens=args.max_question_tokens,
            overlap=args.overlap,
        )
    except ValueError as error:
        raise SystemExit(f"--max-seq-len, --max-question-tokens, --overlap: {error}") from error
    if maker.vocabulary_size > config.vocab_size:
        raise SystemExit(f"--init {args.init}: {maker.vocabulary_size} tokens, but {config.vocab_size} embeddings")
    return maker
