"""Invariants of windows, spans and replies for any input, shared by the property tests and the fuzzers."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import regex
from tokenizers import Regex, Tokenizer, pre_tokenizers

from bertqa.spans import Decoded, Logits, best_of_each_window, decode
from bertqa.windows import Windows

_CODECS = {"codepoint": None, "utf16": "utf-16-le", "byte": "utf-8"}
_UNIT_BYTES = {"codepoint": 1, "utf16": 2, "byte": 1}
_ONIGURUMA = pre_tokenizers.Split(Regex(r"\X"), "isolated")
_NEIGHBOURS = (
    ("a", "b"),
    ("\u0915", "\u0915"),
    ("\U0001f468\u200d", "b"),
)  # letters, an Indic conjunct, an emoji to join


def check_windows(windows: Windows, *, max_seq_len: int, overlap: int | None, buckets: Sequence[int]) -> None:
    """Check that windows cover all tokens in order, match their fields, and have offsets inside the context."""
    tokens, context = len(windows.starts), windows.context
    assert len(windows.ends) == len(windows.words) == tokens
    assert bool(windows.windows) == bool(tokens)
    covered = np.zeros(tokens, bool)
    for number, window in enumerate(windows.windows):
        assert window.tokens >= 1
        assert window.length in buckets
        used = int(window.attention_mask.sum())
        assert used == window.offset + window.tokens + 1 <= max_seq_len
        assert used <= window.length
        assert window.attention_mask[0, :used].all()
        assert int(window.token_type_ids.sum()) == window.tokens + 1
        for tensor in window.tensors().values():
            assert tensor.dtype == np.int32
            assert tensor.shape == (1, window.length)
        covered[window.first_token : window.first_token + window.tokens] = True
        if number:
            before = windows.windows[number - 1]
            shared = before.first_token + before.tokens - window.first_token
            assert 0 <= shared < window.tokens, "a window repeats the end of the one before"
            assert overlap is None or shared == overlap
    assert covered.all()
    if tokens:
        assert windows.starts.min() >= 0
        assert windows.ends.max() <= len(context)
        assert (windows.starts < windows.ends).all()
        assert (np.diff(windows.starts) >= 0).all()
        assert (np.diff(windows.ends) >= 0).all()
        assert (np.diff(windows.words) >= 0).all()


def check_tokens_are_where_they_say(windows: Windows, tokenizer: Tokenizer) -> None:
    """Check that the characters of each token, normalized alone, contain the token's text."""
    for window in windows.windows:
        ids = window.input_ids[0, window.offset : window.offset + window.tokens].tolist()
        for number, token in enumerate(ids, window.first_token):
            piece = str(tokenizer.id_to_token(token))
            if piece == "[UNK]":
                continue
            characters = windows.context[windows.starts[number] : windows.ends[number]]
            shown = tokenizer.normalizer.normalize_str(characters) if tokenizer.normalizer else characters
            assert piece.removeprefix("##") in shown, (piece, characters, shown)


def check_decoded(
    documents: Sequence[Windows], logits: Sequence[Sequence[Logits]], *, top_k: int, max_answer_tokens: int, words: bool
) -> Decoded:
    """Check that answers are exact, distinct, ranked spans, with scores and null score from one softmax."""
    decoded = decode(documents, logits, top_k=top_k, max_answer_tokens=max_answer_tokens, align_to_words=words)
    contexts = [windows.context for windows in documents]
    places = {(answer.context_index, answer.start, answer.end) for answer in decoded.answers}
    assert len(places) == len(decoded.answers) <= top_k
    assert bool(decoded.answers) == any(windows.windows for windows in documents)
    for answer in decoded.answers:
        assert 0 <= answer.start < answer.end <= len(contexts[answer.context_index])
        assert contexts[answer.context_index][answer.start : answer.end] == answer.text
    scores = [answer.score for answer in decoded.answers]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in (*scores, decoded.null_score))
    assert math.fsum((*scores, decoded.null_score)) <= 1 + 1e-5
    for span in best_of_each_window(documents, logits, max_answer_tokens=max_answer_tokens):
        assert 0 <= span.start < span.end <= len(contexts[span.context_index])
        assert math.isfinite(span.logit)
    return decoded


def wrong_offsets(asked: Mapping[str, Any], reply: Mapping[str, Any]) -> list[str]:
    """Describe what is wrong with the spans of a ``/v1/answer`` reply; empty if nothing is."""
    contexts: Sequence[str] = asked.get("contexts") or [asked["context"]]
    unit = asked.get("offset_unit", "codepoint")
    wrong = [] if reply["offset_unit"] == unit else [f"unit {reply['offset_unit']}"]
    for answer in reply["answers"]:
        found = cut(contexts[answer["context_index"]], answer["start"], answer["end"], unit)
        if found != answer["text"] or not found:
            wrong.append(f"{answer} is {found!r}")
    for window in (reply.get("explain") or {"windows": []})["windows"]:
        if not cut(contexts[window["context_index"]], window["start"], window["end"], unit):
            wrong.append(f"{window} is empty")
    return wrong


def cut(text: str, start: int, end: int, unit: str) -> str | None:
    """Return the piece of a text between two offsets in a unit, or None if an offset is inside a character."""
    codec = _CODECS[unit]
    if codec is None:
        return text[start:end] if 0 <= start <= end <= len(text) else None
    units, size = text.encode(codec), _UNIT_BYTES[unit]
    if not 0 <= start <= end <= len(units) // size:
        return None
    try:
        return units[size * start : size * end].decode(codec)
    except UnicodeDecodeError:
        return None


def wrong_scores(asked: Mapping[str, Any], reply: Mapping[str, Any]) -> list[str]:
    """Describe what is wrong with the ranking of a ``/v1/answer`` reply."""
    scores = [answer["score"] for answer in reply["answers"]]
    problems = {
        "not ranked": scores != sorted(scores, reverse=True),
        "no probabilities": not all(0 <= score <= 1 for score in (*scores, reply["null_score"])),
        "their sum is above 1": math.fsum((*scores, reply["null_score"])) > 1 + 1e-5,
        "more than were asked for": len(scores) > asked.get("top_k", 1),
    }
    return [name for name, holds in problems.items() if holds]


def cluster_bounds(text: str) -> list[int]:
    """Return the bounds of a text's grapheme clusters, from another library than `bertqa.graphemes` uses."""
    return [0, *(match.end() for match in regex.finditer(r"\X", text))]


@functools.cache
def of_either_unicode(character: str) -> bool:
    """Check whether Oniguruma and `cluster_bounds`, with different Unicode versions, treat a character the same.

    The later version has new marks and pictographs, and rule GB9c, by which a virama joins two consonants.
    """
    texts = [before + character + after for before, after in _NEIGHBOURS]
    return all(
        [0, *(end for _, (_, end) in _ONIGURUMA.pre_tokenize_str(text))] == cluster_bounds(text) for text in texts
    )
