"""FastAPI around the Hugging Face question-answering pipeline.

As "Using pipelines for a webserver" of the Transformers documentation has it: the web server takes requests, and one
loop runs the pipeline for one of them after the other, with all cores.

    uvicorn loadtest.peers.pipeline_server:app
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

from loadtest.peers.reading import CHECKPOINT


class Query(BaseModel):
    """A question and the text that holds its answer."""

    question: str
    context: str


Queue = asyncio.Queue[tuple[Query, "asyncio.Future[Any]"]]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the loop while the server runs."""
    app.state.queue = Queue()
    loop = asyncio.create_task(_answer_all(app.state.queue))
    yield
    loop.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/answer")
async def answer(query: Query) -> Any:
    """Answer one question, in turn."""
    result = asyncio.get_running_loop().create_future()
    await app.state.queue.put((query, result))
    return await result


async def _answer_all(queue: Queue) -> None:
    pipe: Any = pipeline("question-answering", model=str(CHECKPOINT))
    while True:
        query, result = await queue.get()
        result.set_result(await asyncio.to_thread(pipe, question=query.question, context=query.context))
