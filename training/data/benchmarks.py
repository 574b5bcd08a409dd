"""Download the official files of SQuAD and GLUE, checked by SHA-256.

Neither benchmark publishes checksums. Those below are recorded for the same addresses in Hugging Face's ``datasets``
(datasets/squad, squad_v2 and glue, dataset_infos.json). Other projects pin them too: ParlAI those of SQuAD,
Transformers.jl those of GLUE.
"""

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from training.data.documents import DataError
from training.data.downloads import Checksum, download

SQUAD_MIRROR = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
SQUAD = {
    "train-v1.1.json": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    "train-v2.0.json": "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
    "dev-v2.0.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
}

GLUE_MIRROR = "https://dl.fbaipublicfiles.com"
GLUE = {
    "CoLA": ("glue/data/CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2": ("glue/data/SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "STS-B": ("glue/data/STS-B.zip", "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "QQP": ("glue/data/QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "MNLI": ("glue/data/MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLI": ("glue/data/QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE": ("glue/data/RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
}
"""GLUE's archives: the task (also the folder in the archive), its path on the mirror, and its SHA-256."""
_SENTEVAL = "senteval/senteval_data/msr_paraphrase_"
MRPC = {
    f"{_SENTEVAL}train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    f"{_SENTEVAL}test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    "glue/data/mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}
"""MRPC, which GLUE does not distribute: Microsoft's corpus as hosted by SentEval, and GLUE's choice of a dev set."""
TASKS = (*GLUE, "MRPC")


def download_squad(client: httpx.Client, output: Path, mirror: str = SQUAD_MIRROR) -> None:
    """Download the four files of SQuAD v1.1 and v2.0.

    Raises:
        DownloadError: a file cannot be had or is not the official one.
    """
    for name, digest in SQUAD.items():
        download(client, f"{mirror.rstrip('/')}/{name}", output / name, Checksum("sha256", digest))


def download_glue(client: httpx.Client, output: Path, tasks: Sequence[str], mirror: str = GLUE_MIRROR) -> None:
    """Download tasks of GLUE, each into its own folder: ``output/CoLA/train.tsv`` and so on, as in the archives.

    Raises:
        DownloadError: a file cannot be had or is not the official one.
        DataError: an archive holds no such folder.
    """
    downloads = output / "downloads"
    for task in tasks:
        if (output / task).is_dir():
            continue
        files = MRPC if task == "MRPC" else dict([GLUE[task]])
        paths = [downloads / address.rpartition("/")[2] for address in files]
        for (address, digest), path in zip(files.items(), paths, strict=True):
            download(client, f"{mirror.rstrip('/')}/{address}", path, Checksum("sha256", digest))
        partial = output / f".{task}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if task == "MRPC":
            train, test, dev_ids = paths
            write_mrpc(train, test, dev_ids, partial)
        else:
            unpack(paths[0], task, partial)
        os.replace(partial, output / task)


def unpack(archive: Path, folder: str, output: Path) -> None:
    """Extract the ``.tsv`` files of a folder from an archive.

    Raises:
        DataError: there are none.
    """
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.rpartition("/")[0] == folder and name.endswith(".tsv")]
        for name in names:
            with file.open(name) as member, (output / name.rpartition("/")[2]).open("wb") as copy:
                shutil.copyfileobj(member, copy)
    if not names:
        raise DataError(f"{archive}: holds no {folder}/*.tsv")


def write_mrpc(train: Path, test: Path, dev_ids: Path, output: Path) -> None:
    """Lay out MRPC like GLUE's other tasks; the pairs that GLUE chose from Microsoft's training file become dev.tsv.

    Raises:
        DataError: a file does not have the columns of MRPC.
    """
    chosen = {tuple(line.split("\t")) for line in dev_ids.read_text(encoding="utf-8").split("\n") if line}
    header, *rows = _rows(train)
    _write_tsv(output / "train.tsv", [header, *(row for row in rows if (row[1], row[2]) not in chosen)])
    _write_tsv(output / "dev.tsv", [header, *(row for row in rows if (row[1], row[2]) in chosen)])
    header, *rows = _rows(test)
    # GLUE's test file does not show the labels.
    _write_tsv(output / "test.tsv", [["index", *header[1:]], *([str(n), *row[1:]] for n, row in enumerate(rows))])


def _rows(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8-sig")
    rows = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line]
    for number, row in enumerate(rows, 1):
        if len(row) != 5:
            raise DataError(f"{path}:{number}: {len(row)} columns where MRPC has 5")
    return rows


def _write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
