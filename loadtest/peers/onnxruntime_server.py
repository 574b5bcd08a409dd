"""FastAPI around ONNX Runtime: one session for all requests, which run in FastAPI's threads.

MODEL=model.onnx uvicorn loadtest.peers.onnxruntime_server:app
"""

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from loadtest.peers.onnxruntime_reader import onnxruntime_reader

app = FastAPI()
reader = onnxruntime_reader(os.environ["MODEL"])


class Query(BaseModel):
    """A question and the text that holds its answer."""

    question: str
    context: str


@app.post("/answer")
def answer(query: Query) -> dict[str, Any]:
    """Answer one question."""
    return reader.read([(query.question, query.context)])[0]
