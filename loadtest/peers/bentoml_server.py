"""BentoML around the checkpoint in torch: one worker with all cores.

Its adaptive batching is off: on a CPU a padded batch takes longer than its questions one by one.

bentoml serve loadtest.peers.bentoml_server:QuestionAnswering
"""

from typing import Any

import bentoml

from loadtest.peers.torch_reader import torch_reader


@bentoml.service(workers=1)
class QuestionAnswering:
    """The endpoint and its model."""

    def __init__(self) -> None:
        self.reader = torch_reader()

    @bentoml.api
    def answer(self, question: str, context: str) -> dict[str, Any]:
        """Answer one question."""
        return self.reader.read([(question, context)])[0]
