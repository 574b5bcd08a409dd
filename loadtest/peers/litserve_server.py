"""LitServe around the checkpoint in torch: a worker for each core, with one thread.

Its batching is off: on a CPU a padded batch takes longer than its questions one by one.

python -m loadtest.peers.litserve_server --port 8000
"""

import argparse
import os
from typing import Any

import litserve as ls

from loadtest.peers.torch_reader import torch_reader


class ReaderAPI(ls.LitAPI):
    """What LitServe calls."""

    def setup(self, device: str) -> None:
        """Load the model in the worker's process."""
        self.reader = torch_reader(threads=1)

    def decode_request(self, request: dict[str, str]) -> tuple[str, str]:
        """JSON to question and context."""
        return request["question"], request["context"]

    def predict(self, x: tuple[str, str]) -> dict[str, Any]:
        """Answer one question."""
        return self.reader.read([x])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """An answer is JSON."""
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    server = ls.LitServer(ReaderAPI(), accelerator="cpu", workers_per_device=len(os.sched_getaffinity(0)))
    server.run(port=parser.parse_args().port, generate_client_file=False, log_level="warning")
