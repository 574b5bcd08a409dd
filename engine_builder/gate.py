"""Check that an engine answers like its checkpoint, by F1 and logits on the same real questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from tqdm import tqdm

from bertqa.spans import InvalidLogits, Logits
from bertqa.squad import Example, Predict, Score, answer_all, score
from bertqa.windows import OUTPUT_NAMES, Window, WindowTokenizer

MAX_UNKNOWN_SHARE = 0.05
"""Largest allowed share of [UNK] among the gate's tokens; above it, the tokenizer does not fit the text. WordPiece on
English text stays below 0.005."""


class GateFailed(Exception):
    """The engine is not good enough to publish; the message has the measured value and the limit."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores of an engine and of its float32 reference on the same questions."""

    engine: Score
    reference: Score
    same_spans: float  # share of questions with the same best span, in [0, 1]
    max_logit_error: float  # over all tokens of all windows, without padding
    logit_error: float  # root mean square over the same tokens, as a share of the reference's standard deviation


def load_onnx(path: Path, *, threads: int = 0, spinning: bool = False) -> Predict:
    """Load a graph in ONNX Runtime; the float32 graph is the reference.

    Args:
        path: the ONNX file.
        threads: number of CPU cores; 0 means all.
        spinning: let idle threads spin, which is faster if nothing else runs.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(window: Window) -> Logits:
        start, end = session.run(list(OUTPUT_NAMES), window.tensors())
        return start, end

    return predict


def check_tokenizer(tokenizer: WindowTokenizer, examples: Sequence[Example]) -> None:
    """Refuse a tokenizer that does not fit the language of the questions.

    Raises:
        GateFailed: more than `MAX_UNKNOWN_SHARE` of the tokens are [UNK].
    """
    contexts = dict.fromkeys(example.context for example in examples)
    text = "\n".join([*contexts, *(example.question for example in examples)])
    if (share := tokenizer.unknown_share(text)) > MAX_UNKNOWN_SHARE:
        raise GateFailed(
            f"tokenizer.json: {share:.1%} of the tokens of the gate's texts are [UNK], at most {MAX_UNKNOWN_SHARE:.0%} "
            "may be; is it the tokenizer that the checkpoint was trained with?"
        )


def measure(examples: Sequence[Example], tokenizer: WindowTokenizer, engine: Predict, reference: Predict) -> Measured:
    """Answer all questions with the reference, then with the engine.

    They run one after the other, because idle threads of one runtime would slow down the other.

    Raises:
        GateFailed: logits of either are not finite or have the wrong shape.
    """
    expected_logits: list[Logits] = []
    expected = _answers(examples, tokenizer, _recording(reference, expected_logits), "float32 reference")
    found_logits: list[Logits] = []
    try:
        found = _answers(examples, tokenizer, _recording(engine, found_logits), "engine")
    except GateFailed as failed:
        raise GateFailed(f"{failed}; values above 65,504 overflow fp16, so try --precision bf16") from failed
    reference_logits, engine_logits = (
        np.concatenate([np.concatenate(pair, axis=1)[0] for pair in each] or [np.zeros(1, np.float32)])
        for each in (expected_logits, found_logits)
    )
    error = np.abs(engine_logits - reference_logits)
    return Measured(
        engine=score(examples, {name: answer.text for name, answer in found.items()}),
        reference=score(examples, {name: answer.text for name, answer in expected.items()}),
        same_spans=sum(expected.get(example.id) == found.get(example.id) for example in examples) / len(examples),
        max_logit_error=float(error.max()),
        logit_error=float(np.sqrt(np.mean(np.square(error))) / max(float(reference_logits.std()), 1e-6)),
    )


class _Best(NamedTuple):
    text: str
    start: int
    end: int


def _answers(examples: Sequence[Example], tokenizer: WindowTokenizer, predict: Predict, name: str) -> dict[str, _Best]:
    answers: dict[str, _Best] = {}
    answered = answer_all(examples, tokenizer, predict)
    try:
        for example, decoded in tqdm(answered, name, len(examples), unit=" questions", mininterval=0.5):
            if best := decoded.best:
                answers[example.id] = _Best(best.text, best.start, best.end)
    except InvalidLogits as error:
        raise GateFailed(f"{name}: unusable logits, {error}") from error
    return answers


def _recording(predict: Predict, record: list[Logits]) -> Predict:
    """Wrap a runtime to record the logits of tokens, without those of padding."""

    def recorded(window: Window) -> Logits:
        start, end = predict(window)
        tokens = int(window.attention_mask.sum())
        record.append((start[:, :tokens], end[:, :tokens]))
        return start, end

    return recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyGate:
    """How far an engine may fall behind its float32 checkpoint."""

    max_f1_loss: float  # in percentage points
    max_logit_error: float  # as a share of the standard deviation of the reference's logits

    def check(self, measured: Measured, instead: Sequence[str] = ()) -> None:
        """Refuse an engine that lost too much F1, or whose logits are wrong although the answers are not.

        Args:
            measured: result of `measure`.
            instead: precisions to suggest in the message, because they may lose less.

        Raises:
            GateFailed: a limit is exceeded.
        """
        if (loss := measured.reference.f1 - measured.engine.f1) > self.max_f1_loss:
            raise GateFailed(
                f"F1 {measured.engine.f1:.2f} of the engine is {loss:.2f} below the {measured.reference.f1:.2f} of the "
                f"float32 checkpoint on the same {measured.reference.total} questions; at most {self.max_f1_loss} is "
                "allowed (--max-f1-loss)" + (f"; try --precision {' or '.join(instead)}" if instead else "")
            )
        if measured.logit_error > self.max_logit_error:
            raise GateFailed(
                f"logits of the engine differ from those of the float32 checkpoint by {measured.logit_error:.1%} of "
                f"their standard deviation; at most {self.max_logit_error:.1%} is allowed (--max-logit-error)"
            )
