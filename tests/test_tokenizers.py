"""Tokenizers of others: those of Hugging Face, and SentencePiece models that normalize."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from runs import Fails, small_config, train
from test_export import export, library_texts, loaded, strings
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inrank_dist.commands.main import main
from inrank_dist.config import Config
from inrank_dist.data import Tokenizer, prepare
from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tokenizer import load_tokenizer
from inrank_dist.data.whole_documents import KNOWN_EOS, LossySentencePiece
from inrank_dist.runtime.errors import UserError

EOS = "<|end_of_text|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as GPT-2's and Llama 3's, saved by transformers."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[EOS, "<|start|>"])
    tokenizer.train_from_iterator(library_texts(), trainer)
    found = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token="<|start|>").save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama 2's: ids 0, 1, 2 are unk, bos, eos, and a space is put before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in library_texts() for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        minloglevel=4,
    )
    file = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def read(path: Path, vocab_size: int = 400, **settings: Any) -> Tokenizer:
    return load_tokenizer(TokenizerSettings(path=str(path), vocab_size=vocab_size, **settings))


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_ids_are_those_of_transformers(folder: Path, name: str) -> None:
    """Of the folder and of its file alone; special tokens in a text are text."""
    ours, theirs = read(folder / name), AutoTokenizer.from_pretrained(folder)
    for text in strings(500):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.decode(ids) == text
    assert (ours.eos_id, ours.eos_piece) == (theirs.eos_token_id, EOS)
    assert ours.eos_id not in ours.encode(f"a{EOS}b<|start|>")
    asked = read(folder / name, special_tokens_in_text=True).encode(f"a{EOS}b<|start|>")
    assert asked == theirs(f"a{EOS}b<|start|>", add_special_tokens=False).input_ids and ours.eos_id in asked


def test_ids_of_a_normalizing_sentencepiece_model(llama: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(str(llama))
    ours = read(llama, 500)
    assert isinstance(ours, LossySentencePiece) and (ours.eos_id, ours.eos_piece) == (2, "</s>")
    for text in strings(300):
        assert ours.encode(text) == processor.encode(text)
    documents = [["one ", "text"], ["another"]]
    ids = np.concatenate([*ours.encode_documents(documents, separate=True, threads=2)]).tolist()
    assert ids == [*processor.encode("one text"), 2, *processor.encode("another"), 2]


def config_of(corpus: Path, run: Path, path: Path, **changes: Any) -> Config:
    settings = {"tokenizer__path": path, "tokenizer__vocab_size": 400, "run__dir": run, "checkpoint__interval": 15}
    return small_config(corpus, **settings | changes)


@pytest.mark.parametrize("kind", ["hugging face", "sentencepiece"])
def test_a_run_from_text_to_export(folder: Path, llama: Path, corpus: Path, tmp_path: Path, kind: str) -> None:
    path, size = (folder, 400) if kind == "hugging face" else (llama, 500)
    config = config_of(corpus, tmp_path / "run", path, tokenizer__vocab_size=size)
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
    tokenizer = read(path, size)
    ids = {tuple(tokenizer.encode(file.read_text()))[:8] for file in (corpus / "corpus").glob("*.txt")}
    rows = np.concatenate([np.array(data.train["input_ids"])[:, :-1].ravel()])
    starts = np.flatnonzero(rows == tokenizer.eos_id) + 1
    assert len(starts) > 3
    assert sum(tuple(rows[at : at + 8].tolist()) in ids for at in starts[:-1]) >= len(starts) - 2
    train(config)
    train(config, resume=True)
    assert main(["generate", "--run", str(tmp_path / "run"), "--prompt", "def ", "--tokens", "8"]) == 0
    assert loaded(tmp_path / "run").tokenizer.fingerprint == tokenizer.fingerprint
    out = export(tmp_path / "run", tmp_path / "out")
    if kind == "hugging face":
        exported = AutoTokenizer.from_pretrained(out)
        for text in strings(2000):
            assert exported(text).input_ids == tokenizer.encode(text)
            assert exported.decode(tokenizer.encode(text)) == text
    else:
        assert (out / "tokenizer.model").read_bytes() == llama.read_bytes()


@pytest.mark.parametrize("asked", [False, True])
def test_the_exported_tokenizer_is_the_one_of_training(folder: Path, corpus: Path, tmp_path: Path, asked: bool) -> None:
    """Without the tokens that the original adds and its truncation; special tokens in a text as in training."""
    tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    adding = [("<|start|>", tokenizer.token_to_id("<|start|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=adding)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_token=EOS)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(tmp_path / "original")
    settings = {"tokenizer__special_tokens_in_text": str(asked).lower(), "train__steps": 2, "lowrank__mode": "full"}
    train(config_of(corpus, tmp_path / "run", tmp_path / "original", **settings | {"checkpoint__interval": 2}))
    ours = loaded(tmp_path / "run").tokenizer
    theirs = AutoTokenizer.from_pretrained(export(tmp_path / "run", tmp_path / "out"))
    for text in [*strings(50), f"a long text with {EOS} and <|start|> in it"]:
        assert theirs(text).input_ids == ours.encode(text)


def test_text_does_not_forge_the_separator(folder: Path, tmp_path: Path) -> None:
    """Also where the token was added as an ordinary one."""
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = read(tmp_path / "tokenizer.json")
    assert ours.eos_id not in ours.encode(f"a{EOS}b") and ours.decode(ours.encode(f"a{EOS}b")) == f"a{EOS}b"
    with pytest.raises(UserError, match=r"the text 'e' would become the separator; write another tokenizer.eos_token"):
        read(folder, eos_token="e")


def test_a_tokenizer_that_fails_on_some_text(tmp_path: Path) -> None:
    words = {"</s>": 0} | {f"w{index}": index for index in range(1, 300)}
    tokenizer = FastTokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer .*WordLevel error"):
        read(tmp_path / "tokenizer.json", 300, special_tokens_in_text=True)


def test_settings_of_hugging_face_with_a_sentencepiece_model(llama: Path) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer.eos_token is x but .* names its own special tokens; leave eos_token"
    ):
        read(llama, 500, eos_token="x")


def test_a_model_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "a.model").touch()
    os.truncate(tmp_path / "a.model", 1 << 40)
    with pytest.raises(UserError, match="is larger than 256 MiB; write the path of a tokenizer"):
        read(tmp_path / "a.model")


def test_the_token_that_ends_a_document(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(content))
    assert read(alone).eos_piece == EOS and EOS in KNOWN_EOS
    assert read(alone, eos_token="<|start|>").eos_piece == "<|start|>"
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("end_of", "no")
    alone.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"does not say which token ends a document; write tokenizer.eos_token"):
        read(alone)
    with pytest.raises(UserError, match=r"has no token '<none>' to separate documents; write tokenizer.eos_token"):
        read(folder, eos_token="<none>")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.write_text("{"), "is not JSON"),
        (lambda file: file.write_text("[1]"), "is not a JSON object"),
        (lambda file: file.write_text("{}"), "is not a tokenizer of Hugging Face"),
        (
            lambda file: file.write_text('{"model": {"type": "evil"}, "added_tokens": [{"content": "</s>"}]}'),
            "cannot be",
        ),
        (lambda file: os.truncate(file, 1 << 40), "is larger than 256 MiB"),
        (lambda file: os.truncate(file, 5000), "is not JSON"),
        (lambda file: torch.save({}, file), "is not JSON"),
    ],
)
def test_a_file_that_is_refused(folder: Path, tmp_path: Path, damage: Any, said: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((folder / "tokenizer.json").read_bytes())
    damage(file)
    with pytest.raises(UserError) as raised:
        read(file)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_added_tokens_beyond_the_vocabulary_count(folder: Path, tmp_path: Path) -> None:
    tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|later|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has 401 tokens; write tokenizer.vocab_size: 401"):
        read(tmp_path / "tokenizer.json", 400)
    assert read(tmp_path / "tokenizer.json", 401).vocab_size == 401


# A padded vocabulary ------------------------------------------------------------------------------------------------


def test_a_padded_vocabulary(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has more rows than the tokenizer has tokens, and none of them is ever sampled."""
    train(small_config(corpus, run__dir=tmp_path / "run", checkpoint__interval=30, model__vocab_size=320))
    trained = loaded(tmp_path / "run")
    assert trained.model.get_submodule("tok_embed").weight.shape == (320, 32) and trained.tokenizer.vocab_size == 301
    with torch.no_grad():
        trained.model.get_submodule("tok_embed").weight[301:] = 100.0  # tied: the largest logits
    hot = ["generate", "--run", tmp_path / "run", "--temperature", 1000, "--top-k", 0, "--tokens", 200]
    assert main([str(word) for word in hot]) == 0
    out = export(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 320


def test_a_vocabulary_that_is_too_small(corpus: Path, tmp_path: Path, fails: Fails) -> None:
    config = small_config(corpus, run__dir=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    said = fails("train", "--config", tmp_path / "config.yaml", "--model.vocab_size", 300)
    assert said == "model.vocab_size is 300 but the tokenizer has 301 tokens; write at least 301, or null"
