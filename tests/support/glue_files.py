"""Toy sets of the GLUE tasks, in the layout of the benchmark's archives."""

from pathlib import Path

from training.glue import TASKS

SIGNS = {  # a word that gives away the label of a toy example
    "0": "bad",
    "1": "good",
    "entailment": "yes",
    "not_entailment": "no",
    "neutral": "perhaps",
    "contradiction": "never",
    **{f"{number}.000": word for number, word in enumerate(("zero", "one", "two", "three", "four", "five"))},
}

# The first lines of the official files, with long fields shortened.
HEADERS: dict[str, dict[str, str]] = {
    "CoLA": {"train": "", "test": "index\tsentence"},
    "SST-2": {"train": "sentence\tlabel", "test": "index\tsentence"},
    "MRPC": {
        "train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "test": "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    },
    "STS-B": {
        "train": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "test": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
    },
    "QQP": {"train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "test": "id\tquestion1\tquestion2"},
    "MNLI": {
        "train": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "dev": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
        "test": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2",
    },
    "QNLI": {"train": "index\tquestion\tsentence\tlabel", "test": "index\tquestion\tsentence"},
    "RTE": {"train": "index\tsentence1\tsentence2\tlabel", "test": "index\tsentence1\tsentence2"},
}


def write_set(path: Path, name: str, examples: int) -> None:
    """Write a toy set in the archive's layout; the last text has a word that gives away the label."""
    task, kind = TASKS[name], path.stem.partition("_")[0]
    headers = HEADERS[name]
    header = headers.get(kind, headers["train"])
    columns = header.strip("\ufeff").split("\t") if header else list(task.header)
    labels = list(task.labels) or [f"{number}.000" for number in range(6)]
    lines = [header] if header else []
    for number in range(examples):
        label = labels[number % len(labels)]
        row = dict.fromkeys(columns, "-") | {"index": str(number), "id": str(number), task.label: label}
        row |= dict.fromkeys(task.texts, f'it is "said {number}') | {
            task.texts[-1]: f"a {SIGNS[label]} day\u2028{number}"
        }
        lines.append("\t".join(row[column] for column in columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", newline="\n")


def write_task(directory: Path, name: str) -> None:
    write_set(directory / name / "train.tsv", name, 96)
    for section in TASKS[name].sections:
        write_set(directory / name / f"dev{section}.tsv", name, 30)
        write_set(directory / name / f"test{section}.tsv", name, 13)
