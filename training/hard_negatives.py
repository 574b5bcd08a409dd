"""Make unanswerable questions that look answerable: ``bertqa train hard-negatives --train … --output …``.

A name or number in a question is replaced by another of the same kind, from the same article but not from the
paragraph: "What did Tesla build in 1891?" becomes "What did Tesla build in 1893?". Rajpurkar et al. 2018 list swapped
entities and numbers among the ways in which SQuAD v2.0's unanswerable questions were written.

A replaced question may still be answerable. With ``--teacher`` the job keeps only questions for which that checkpoint
finds no answer, at its own null threshold or at ``--null-threshold``. A teacher that never saw such questions discards
most of the hard ones, so look at the counts that the job prints. The output is a SQuAD v2.0 file for ``--impossible``
of `training.finetune_squad`, which trains on questions about its training articles and reports on the others.
"""

if __name__ == "__main__":  # before the slow imports, which --help does not need
    from bertqa.cli.command import run
    from training.commands import hard_negatives_app

    run(hard_negatives_app, "python -m training.hard_negatives")

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bertqa.manifest import Settings
from bertqa.squad import Example, as_squad
from bertqa.windows import WindowTokenizer
from training.checkpoints import save_json
from training.distributed import Workers, start_workers
from training.encoders import EncoderOptions, load_model, model_class
from training.options import HardNegativesArguments
from training.squad_data import read_file
from training.squad_evaluation import evaluate, predictor

NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?![\w]|[.,]\d)")
YEAR = re.compile(r"1\d{3}|20\d{2}")
NAME = re.compile(r"(?<![\w'’.-])[A-Z][\w'’-]+(?: [A-Z][\w'’-]+){0,3}")
NO_NAMES = frozenset(
    (
        *("What", "Which", "Who", "Whom", "Whose", "When", "Where", "Why", "How", "In", "On", "At", "The", "A", "An"),
        *("Of", "For", "To", "From", "During", "After"),
    )
)
"""Words that are capitalized at the start of a sentence but are not part of a name."""
CALENDAR = frozenset(
    (
        *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
        *("December", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    )
)
BEFORE = frozenset(("in", "of", "by", "from", "at", "to", "on", "for", "with", "and", "the", "between", "against"))
"""Words before a name that show its kind: "in Oslo" is replaced by "in Bergen", not by "by Ibsen"."""
WORD = re.compile(r"\w+")
MARK = "-exchanged"
"""Suffix of the ids of generated questions."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A name or number in a text; ``text[start:start + len(words)] == words``."""

    kind: str  # mentions are only replaced by mentions of the same kind
    words: str
    start: int


def main(args: HardNegativesArguments) -> None:
    """Make the questions, ask the teacher, and write those that it finds unanswerable."""
    examples = [example for example in read_file(args.train, "--train") if example.references]
    made = exchanged(examples, args.share, args.seed)
    workers = start_workers()
    kept = agreed(made, args.teacher, args, workers) if args.teacher else made
    if workers.rank == 0:
        save_json(args.output, as_squad(kept))
        counts = {"questions": len(examples), "made": len(made), "kept": len(kept)}
        print(json.dumps(counts | {"kept by kind": _by_kind(kept), "made by kind": _by_kind(made)}), flush=True)


def exchanged(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Make unanswerable copies of at most a share of the questions, each with one mention replaced.

    The replaced mention is in the paragraph; its replacement is in the article but not in the paragraph.
    """
    articles: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        articles[example.title].append(example)
    candidates = {title: _mentions_of_article(article) for title, article in articles.items()}
    chooser = random.Random(f"exchanged {seed}")
    made: list[Example] = []
    for example in chooser.sample(examples, len(examples)):
        if len(made) >= round(share * len(examples)):
            break
        options = list(_exchanges(example, candidates[example.title]))
        if options:
            numbers = [
                option for option in options if not option[0].kind.startswith("name")
            ]  # preferred, because they are rarer
            mention, words = chooser.choice(numbers or options)
            end = mention.start + len(mention.words)
            question = example.question[: mention.start] + words + example.question[end:]
            identifier = f"{example.id}-{mention.kind.partition(' ')[0]}{MARK}"
            made.append(replace(example, id=identifier, question=question, references=()))
    return made


def mentions(text: str) -> Iterator[Mention]:
    """Find the numbers and capitalized names in a text, without words that are only capitalized to start a sentence."""
    for match in NUMBER.finditer(text):
        digits = sum(character.isdigit() for character in match[0])
        yield Mention("year" if YEAR.fullmatch(match[0]) else f"number of {digits}", match[0], match.start())
    for match in NAME.finditer(text):
        words, start = match[0], match.start()
        while words and (words.split(" ")[0] in NO_NAMES):
            first, _, words = words.partition(" ")
            start += len(first) + 1
        before = text[:start].rstrip(' "“(')
        if words and before and not before.endswith((".", "?", "!")) and CALENDAR.isdisjoint(words.split(" ")):
            last = before.rpartition(" ")[2]
            yield Mention(f"name of {words.count(' ') + 1} after {last if last in BEFORE else ''}", words, start)


def agreed(made: Sequence[Example], teacher: Path, args: HardNegativesArguments, workers: Workers) -> list[Example]:
    """Return the questions that the teacher finds unanswerable, in order.

    Raises:
        SystemExit: the teacher cannot be used.
    """
    settings = Settings.of_checkpoint(teacher)
    limits = {name: getattr(settings, name) for name in ("max_seq_len", "max_question_tokens", "overlap")}
    threshold = settings.null_threshold if args.null_threshold is None else args.null_threshold
    source = str(teacher)
    options = EncoderOptions(0.0, 0.0, "sdpa" if args.precision == "fp32" else "eager")
    model = load_model(model_class(source, "question answering"), source, options, trained_head=True)
    model.to(workers.device)  # type: ignore[arg-type]
    predict = predictor(model, workers.device, args.precision, progress=workers.rank == 0)
    answered = evaluate(made, WindowTokenizer.from_directory(teacher, **limits), predict, workers)
    found = {example.id for example, decoded in answered if decoded.null_margin > threshold}
    return [example for example in made if example.id in found]


def _mentions_of_article(examples: Iterable[Example]) -> Mapping[str, list[str]]:
    """Collect by kind the numbers in an article's questions and paragraphs, and the names that occur at least twice."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for text in dict.fromkeys(text for example in examples for text in (example.context, example.question)):
        for mention in mentions(text):
            found[mention.kind][mention.words] += 1
    return {
        kind: [words for words, count in counts.items() if count > 1 or not kind.startswith("name")]
        for kind, counts in found.items()
    }


def _exchanges(example: Example, candidates: Mapping[str, Sequence[str]]) -> Iterator[tuple[Mention, str]]:
    """Find the mentions of a question that are also in the paragraph, each with all possible replacements.

    Mentions that share a word with the paragraph or with the replaced mention may mean the same, and are left out.
    """
    in_context = words_of(example.context)
    for mention in mentions(example.question):
        if not re.search(rf"(?<!\w){re.escape(mention.words)}(?!\w)", example.context):
            continue
        taken = in_context | words_of(example.question)
        for words in candidates.get(mention.kind, ()):
            if taken.isdisjoint(words_of(words)):
                yield mention, words


def words_of(text: str) -> set[str]:
    """Return the words of a text, in lower case."""
    return set(WORD.findall(text.casefold()))


def _by_kind(examples: Iterable[Example]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for example in examples:
        counts[example.id.removesuffix(MARK).rpartition("-")[2]] += 1
    return dict(sorted(counts.items()))
