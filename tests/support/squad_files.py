"""A SQuAD file with two questions about one sentence, with words that the small checkpoints know."""

import json
from pathlib import Path

CONTEXT = "Ada Lovelace wrote the first program in London."
QUESTIONS = {"Who wrote it?": "Ada Lovelace", "Where was it written?": "London"}


def write_squad(path: Path, context: str = CONTEXT) -> Path:
    questions = [
        {"id": str(n), "question": question, "answers": [{"text": text, "answer_start": context.index(text)}]}
        for n, (question, text) in enumerate(QUESTIONS.items())
    ]
    article = {"title": "Ada", "paragraphs": [{"context": context, "qas": questions}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    return path
