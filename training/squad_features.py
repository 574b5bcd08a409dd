"""Convert SQuAD questions to labelled training windows, and these to batches.

A window that contains the whole answer is labelled with its tokens; any other with [CLS], the null answer (Devlin et
al. 2018, section 4.3). SQuAD v1.1 has no unanswerable questions, so a share of *negatives* can be added: questions
paired with another paragraph of their article, which has the same subject but not the answer.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bertqa.squad import Example
from bertqa.windows import WindowTokenizer

UNLABELLED = -100
"""Label that torch's cross entropy ignores."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One training window without its padding, and the positions in it of the answer's first and last token."""

    input_ids: NDArray[np.int32]  # (tokens,)
    context_offset: int  # position of the first context token
    start: int  # 0, the position of [CLS], if the window does not contain the answer; UNLABELLED if unknown
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Features padded to one length; int64 of shape (features, length) and (features,)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    allowed: torch.Tensor  # bool: the positions an answer may have, [CLS] and the context
    starts: torch.Tensor
    ends: torch.Tensor
    soft: torch.Tensor | None  # float32 (features, length, 2), the teacher's start and end logits
    lengths: tuple[int, ...]  # tokens of each feature


def hold_back_articles(examples: Sequence[Example], articles: int) -> tuple[list[Example], list[Example]]:
    """Split the questions by article, chosen by the hash of the title; return training and held-back questions."""
    titles = sorted({example.title for example in examples}, key=lambda title: hashlib.sha256(title.encode()).digest())
    held = set(titles[:articles])
    return (
        [example for example in examples if example.title not in held],
        [example for example in examples if example.title in held],
    )


def negatives(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Make unanswerable copies of a share of the questions, each with another paragraph of the same article.

    Paragraphs that contain the text of a reference answer are not used; a question without a suitable one is left out.
    """
    paragraphs = _paragraphs(examples)
    chooser = random.Random(seed)
    made = []
    for example in chooser.sample(examples, round(share * len(examples))):
        others = [
            context
            for context in paragraphs[example.title]
            if context != example.context
            and not any(reference.text.lower() in context.lower() for reference in example.references)
        ]
        if others:
            made.append(replace(example, id=f"{example.id}-negative", context=chooser.choice(others), references=()))
    return made


def unlabelled(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Make copies of a share of the questions, each with another paragraph of the same article.

    A teacher must say whether that paragraph has an answer. A share above 1 uses every question more than once.
    """
    paragraphs = _paragraphs(examples)
    chooser = random.Random(f"unlabelled {seed}")
    order = chooser.sample(examples, len(examples))
    made = []
    for number in range(round(share * len(examples))):
        example = order[number % len(order)]
        if others := [context for context in paragraphs[example.title] if context != example.context]:
            identifier = f"{example.id}-unlabelled-{number // len(order)}"
            made.append(replace(example, id=identifier, context=chooser.choice(others), references=()))
    return made


def without_label(feature: Feature) -> Feature:
    """Return the same window without its label."""
    return replace(feature, start=UNLABELLED, end=UNLABELLED)


def _paragraphs(examples: Iterable[Example]) -> Mapping[str, Sequence[str]]:
    """Return the paragraphs of each article, by title."""
    paragraphs: dict[str, dict[str, None]] = defaultdict(dict)
    for example in examples:
        paragraphs[example.title][example.context] = None
    return {title: list(contexts) for title, contexts in paragraphs.items()}


def make_features(examples: Iterable[Example], tokenizer: WindowTokenizer) -> Iterator[Feature]:
    """Label the windows of each question with its first reference answer."""
    for example in examples:
        windows = tokenizer(example.question, example.context)
        span = None
        if example.references:
            answer = example.references[0]
            span = windows.token_span(answer.start, answer.start + len(answer.text))
        for window in windows.windows:
            tokens = window.offset + window.tokens + 1
            start = end = 0
            if span and window.first_token <= span[0] and span[1] < window.first_token + window.tokens:
                start, end = (window.offset + token - window.first_token for token in span)
            yield Feature(window.input_ids[0, :tokens].copy(), window.offset, start, end)


def collate(
    features: Sequence[Feature], multiple: int = 16, soft: Sequence[NDArray[np.float16]] | None = None
) -> Batch:
    """Pad features to a common length; [PAD] is token 0 as in every BERT.

    Args:
        features: features of the batch.
        multiple: round the length up to a multiple of this, in tokens.
        soft: a teacher's logits of each feature, (tokens, 2).
    """
    longest = max(len(feature.input_ids) for feature in features)
    length = -(-longest // multiple) * multiple
    input_ids = np.zeros((len(features), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    token_type_ids = np.zeros_like(input_ids)
    allowed = np.zeros(input_ids.shape, dtype=bool)
    for row, feature in enumerate(features):
        tokens = len(feature.input_ids)
        input_ids[row, :tokens] = feature.input_ids
        attention_mask[row, :tokens] = 1
        token_type_ids[row, feature.context_offset : tokens] = 1
        allowed[row, 0] = True
        allowed[row, feature.context_offset : tokens - 1] = True
    teacher = None
    if soft is not None:
        teacher = torch.zeros((*input_ids.shape, 2))
        for row, logits in enumerate(soft):
            teacher[row, : len(logits)] = torch.from_numpy(logits)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        token_type_ids=torch.from_numpy(token_type_ids),
        allowed=torch.from_numpy(allowed),
        starts=torch.tensor([feature.start for feature in features]),
        ends=torch.tensor([feature.end for feature in features]),
        soft=teacher,
        lengths=tuple(len(feature.input_ids) for feature in features),
    )
