"""The checkpoint in torch, for the servers that bring no model code of their own."""

from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from loadtest.peers.reading import CHECKPOINT, Array, Reader


def torch_reader(threads: int = 0) -> Reader:
    """A reader whose network runs in torch on so many cores; 0 is all."""
    if threads:
        torch.set_num_threads(threads)
    model: Any = AutoModelForQuestionAnswering.from_pretrained(CHECKPOINT)
    model.train(mode=False)

    def predict(input_ids: Array, attention_mask: Array, token_type_ids: Array) -> tuple[Array, Array]:
        with torch.inference_mode():
            output = model(
                input_ids=torch.from_numpy(input_ids),
                attention_mask=torch.from_numpy(attention_mask),
                token_type_ids=torch.from_numpy(token_type_ids),
            )
        return output.start_logits.numpy(), output.end_logits.numpy()

    return Reader(predict)
