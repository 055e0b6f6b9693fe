"""All tests: CPU, offline, a few minutes. Run with `bash run.sh test [pytest options]`.

Marks: gpu (needs a CUDA device), slow (minutes), browser (needs Chromium). Parts that need the
public data in ../shared/data skip where it is absent. Each part is held against an independent
oracle: a plain version, torch's own, transformers, regex, another batch shape, an unbroken run.
"""

from __future__ import annotations

import collections
import dataclasses
import email.utils
import errno
import functools
import gzip
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nanochat_bpe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chat
import common
import evaluate
import prepare
import pretrain
import train_tokenizer

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
STAGES = ["prepare", "train_tokenizer", "pretrain", "evaluate", "chat"]
CPU = torch.device("cpu")

# Fixtures ------------------------------------------------------------------------------------

SENTENCES = [
    f"The {animal} {verb} {place} {time_}. "
    for animal in ("cat", "dog", "old horse", "small bird")
    for verb in ("sat on", "ran to", "slept near", "looked at")
    for place in ("the mat", "a green hill", "the river", "an open door")
    for time_ in ("in the morning", "at 12 o'clock", "on 3 May 2021")
]


@functools.cache
def TOKENIZER():
    """A tokenizer of 300 merges, for tests that cannot take a fixture."""
    merges = nanochat_bpe.train(iter(SENTENCES), 512)
    return common.Tokenizer(nanochat_bpe.PATTERN, merges)


@pytest.fixture
def tokenizer():
    fresh = TOKENIZER()
    fresh.info = {}
    return fresh


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """An empty base directory of its own."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def write_texts(source, texts):
    """Write texts as the one train shard of a source, and two others as its validation."""
    folder = common.data_dir(source)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), folder / "train-00000.parquet")
    pq.write_table(pa.table({"text": ["".join(SENTENCES[i:i + 3]) for i in (0, 50)]}),
                   folder / "val.parquet")  # fmt: skip
    (folder / "manifest.json").write_text("{}")


@pytest.fixture
def text_source(base_dir):
    """A prepared source of 150 documents of 1 to 9 sentences."""
    cycle = itertools.cycle(SENTENCES)
    write_texts("tiny", ["".join(itertools.islice(cycle, i % 9 + 1)) for i in range(150)])
    return "tiny"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world_size, code, timeout_s=120):
    """Run code in world_size processes as torchrun starts them; `rank` and gloo are at hand."""
    script = "import os, sys, torch, test_all, common, pretrain\nrank = int(os.environ['RANK'])\n"
    if "main(" not in code:
        script += "torch.distributed.init_process_group('gloo')\n"
    script += textwrap.dedent(code)
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
               "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
               "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, "-c", script], cwd=HERE, env=env))
    codes = [process.wait(timeout_s) for process in processes]
    assert codes == [0] * world_size


# The house -----------------------------------------------------------------------------------


def test_no_stage_imports_a_stage_and_common_imports_none():
    import ast

    for name in ["common", *STAGES]:
        tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
        imported = {
            module.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for module in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
        }
        assert not imported & set(STAGES), name
        runtime = {
            "torch",
            "numpy",
            "tiktoken",
            "pyarrow",
            "requests",
            "nanochat_bpe",
            "common",
            "urllib3",
        }
        assert imported <= runtime | set(sys.stdlib_module_names) | {"wandb"}, imported


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_importing_prints_nothing_and_loads_no_compiler(name, tmp_path):
    code = f"""
import sys, torch
before = set(sys.modules)
import {name}
assert not any(m.startswith(("torch._dynamo", "torch._inductor")) for m in set(sys.modules) - before)
assert not torch.cuda.is_initialized()
"""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "none"), "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr.decode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_a_device_is_never_compared_with_a_string(name):
    text = (HERE / f"{name}.py").read_text("utf-8")
    assert not re.search(r"""\bdevice\s*(==|!=|in|not in)\s*["'(]""", text)


def test_every_command_in_the_readme_parses():
    text = (HERE / "README.md").read_text("utf-8")
    commands = re.findall(r"(?:python|torchrun[^\n`#]*?) (\w+)\.py([^\n`#|]*)", text)
    parsed = 0
    for name, rest in commands:
        if name in STAGES:
            cls = importlib.import_module(name).Settings
            words = shlex.split(rest.replace("~/my/notes", str(HERE)))
            assert common.parse_settings(cls, "", words), rest
            parsed += 1
    assert parsed >= 8


def test_every_action_and_tier_of_run_sh_prints_its_commands():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    tiers = ["cpu", "cpu-amx", "laptop", "mps", "gpu1", "8xa6000", "8xh100", "8xh200"]
    for words in [["test"], ["bench"], ["setup"], *([f"--tier={tier}"] for tier in tiers)]:
        done = subprocess.run(
            [bash, "run.sh", "--dry-run", *words], cwd=HERE, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for name, rest in re.findall(r"(\w+)\.py(.*)$", done.stdout, re.MULTILINE):
            if name in STAGES:
                settings_of = importlib.import_module(name).Settings
                common.parse_settings(settings_of, "", shlex.split(rest))
    wrong = subprocess.run([bash, "run.sh", "tset"], cwd=HERE, capture_output=True, check=False)
    assert wrong.returncode == 2 and b"choose one of" in wrong.stderr


def test_the_top_level_is_the_house():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {
        "tokenizer.rs", "Cargo.toml", "Cargo.lock", "pyproject.toml", "requirements.lock",
        "common.py", "prepare.py", "train_tokenizer.py", "pretrain.py", "midtrain.py", "sft.py",
        "rl.py", "evaluate.py", "chat.py", "serve.py", "run.sh", "test_all.py", "README.md",
        "README.zh-CN.md", "LICENSE", ".gitignore", ".ci",
    }  # fmt: skip
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= allowed


# tokenizer.rs --------------------------------------------------------------------------------

BYTES = [bytes([byte]) for byte in range(256)]


def plain_bpe(texts, vocab_size):
    """Merges found the slow and obvious way: count all pairs, join the best, start over."""
    words = [
        list(piece.encode()) for t in texts for piece in regex.findall(nanochat_bpe.PATTERN, t)
    ]
    tokens, merges = list(BYTES), []
    while len(tokens) < vocab_size:
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [joined(word, best, len(tokens)) for word in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
        merges.append(best)
    return merges


def joined(word, pair, new_id):
    out, i = [], 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        out.append(new_id if is_pair else word[i])
        i += 2 if is_pair else 1
    return out


CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


@functools.cache
def characters_by_tiktoken(pattern):
    """The characters that match a pattern of one character in tiktoken's regex engine."""
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    engine = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    found = set()
    for i in range(0, len(CHARACTERS), 10_000):
        found |= set(bytes(engine.encode_ordinary("".join(CHARACTERS[i : i + 10_000]))).decode())
    return found


@functools.cache
def characters_of_newer_unicode():
    """Characters that `regex` and tiktoken put in different classes: their Unicode versions differ."""
    differ = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        differ |= characters_by_tiktoken(pattern) ^ set(regex.findall(pattern, "".join(CHARACTERS)))
    assert len(differ) < 30_000, len(differ)
    return differ


def tiktoken_split(text, pieces):
    """How tiktoken splits `text`, in a vocabulary in which every candidate piece is one token.

    tiktoken first looks a whole piece up. With `pieces` and each two neighbours of them in the
    vocabulary, it returns exactly `pieces` only if it splits there and nowhere else.
    """
    candidates = {piece.encode() for piece in pieces}
    candidates |= {(one + other).encode() for one, other in itertools.pairwise(pieces)}
    tokens = BYTES + sorted(candidates - set(BYTES))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "x", pat_str=nanochat_bpe.PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return [tokens[i] for i in encoding.encode_ordinary(text)]


def text_documents(size):
    """Up to `size` characters of every file of real text."""
    if not (SHARED / "text").is_dir():
        pytest.skip(f"{(SHARED / 'text')} is not there")
    for path in sorted((SHARED / "text").iterdir()):
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            if path.suffix == ".txt":
                yield file.read(size)
                continue
            left = size
            for line in file:
                document = json.loads(line)["text"][:left]
                yield document
                left -= len(document)
                if left <= 0:
                    break


NASTY = list(
    "aZsſdmtlveréßñжΩ中の한'’\"!?.,-_/()0189٣Ⅷ½²  \t\n\r\v\f\x1c\x85\u00a0\u2009\u2028\u3000"
    "\u200b\u200d\u0301\ufeff\ufffd😀🏽𝒜𝟘\U0001f1e6\U000e0041\U0010ffff\0"
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(NASTY),
        st.sampled_from(["'s", "'LL", "'Ve", "'rE", "'ſ", "'t", "  ", " \n", "\r\n", "12", " a"]),
        st.characters(codec="utf-8"),
        st.characters(codec="utf-8", categories=["L", "N", "Z", "M", "P"]),
    ),
    max_size=40,
).map("".join)


@settings(max_examples=1500, deadline=None)
@given(TEXTS)
@example("")
@example("'ſtuff I'LL we've THEY'RE 'lL'vE'Re")
@example("a  b   \n\n  c\r\n\t d    ")
@example("12345 67٣٣٣ ½½½")
def test_split_is_the_pattern_by_regex(text):
    text = "".join(c for c in text if c not in characters_of_newer_unicode())
    assert nanochat_bpe.split(text) == regex.findall(nanochat_bpe.PATTERN, text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("'ſtuff I'LL we've THEY'RE 'lL'vE'Re  ")
def test_split_is_the_pattern_by_tiktoken(text):
    pieces = nanochat_bpe.split(text)
    assert "".join(pieces) == text
    assert tiktoken_split(text, pieces) == [piece.encode() for piece in pieces]


def test_split_puts_every_character_in_the_class_that_tiktoken_does():
    def one_piece(prefix):
        return {c for c in CHARACTERS if len(nanochat_bpe.split(prefix + c)) == 1}

    letters = one_piece("a")
    assert letters == characters_by_tiktoken(r"\p{L}")
    assert one_piece("1") == characters_by_tiktoken(r"\p{N}")
    spaces = set(CHARACTERS) - one_piece("!") - one_piece("1") | {"\r", "\n"}
    assert spaces == characters_by_tiktoken(r"\s")
    contracted = {c for c in letters if nanochat_bpe.split(f"'{c}a") == ["'" + c, "a"]}
    assert contracted == characters_by_tiktoken("(?i:[sdmt])")


def test_split_of_real_text_is_the_pattern_by_regex_and_tiktoken():
    for document in text_documents(200_000):
        pieces = nanochat_bpe.split(document)
        assert pieces == regex.findall(nanochat_bpe.PATTERN, document)
        assert tiktoken_split(document, pieces) == [piece.encode() for piece in pieces]


@pytest.mark.parametrize(
    "texts",
    [
        ["low lower lowest newer newest wider widest low low"],
        ["aaaa aaaaa aaaaaaa", "aaa", "a"],  # overlapping pairs
        ["abababab babababa aabbaabb abcabcabc bcabcab"],
        ["ab cd ef gh ij kl"],  # every count equal
        ["Über Öl, naïve café — 東京都 東京 京都 Привет 😀😀😀", "'S 'll 12345 1 12 \n\n  x"],
        ["the cat", " the", "cat", "", "\n"] * 3,
        ["antidisestablishmentarianism", "antidisestablishmentarianism is long"],  # > 15 bytes
    ],
)
def test_merges_are_those_of_plain_bpe(texts):
    for threads in (1, 2):
        assert nanochat_bpe.train(iter(texts), 400, threads) == plain_bpe(texts, 400)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc é", max_size=60), max_size=5), st.integers(256, 330))
def test_merges_are_those_of_plain_bpe_on_any_text(texts, vocab_size):
    assert nanochat_bpe.train(texts, vocab_size, 2) == plain_bpe(texts, vocab_size)


def test_merges_of_real_text_are_those_of_plain_bpe():
    texts = list(itertools.islice(text_documents(4_000), 12))
    assert nanochat_bpe.train(texts, 400) == plain_bpe(texts, 400)


def test_tokens_make_a_tiktoken_encoding_that_round_trips():
    text = (
        "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure. " * 3
    )
    merges = nanochat_bpe.train([text], 300)
    tokens = nanochat_bpe.token_bytes(merges)
    assert tokens[:256] == BYTES and len(tokens) == len(set(tokens)) == 256 + len(merges)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "x", pat_str=nanochat_bpe.PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text and len(ids) < len(text) / 2
    words = [list(piece.encode()) for piece in nanochat_bpe.split(text)]
    for i, pair in enumerate(merges):
        words = [joined(word, pair, 256 + i) for word in words]
    assert ids == list(itertools.chain(*words))


def made_up_documents(n=300):
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=rng.randint(0, 2000))) for _ in range(n)]


def test_merges_do_not_depend_on_threads_or_the_order_of_documents():
    documents = made_up_documents()
    merges = nanochat_bpe.train(documents, 3000, 1)
    assert len(merges) == 3000 - 256
    for threads in (0, 2, 3, 16):
        assert nanochat_bpe.train(iter(documents), 3000, threads=threads) == merges
    assert nanochat_bpe.train(reversed(documents), 3000) == merges


@pytest.mark.parametrize(
    "sample", ["many words, it's 1234 \n\n done. ", "東京都、大阪府。", "no-cut" * 9]
)
def test_a_document_larger_than_a_batch_gives_the_merges_of_its_words(sample):
    document = sample * (5_000_000 // len(sample.encode()))
    pieces = collections.Counter(nanochat_bpe.split(document))
    assert nanochat_bpe.train([document], 300, 2) == nanochat_bpe.train(pieces.elements(), 300, 1)


def test_documents_are_boundaries_and_short_text_gives_fewer_merges():
    assert nanochat_bpe.train(["a", "b"] * 9, 300) == []
    assert nanochat_bpe.train(["ab"] * 9, 300) == [(97, 98)]
    assert nanochat_bpe.train(["ab"] * 9, 256) == []
    assert nanochat_bpe.train([], 300) == nanochat_bpe.train(["", ""], 300, 3) == []


def test_text_is_streamed():
    """200 MB pass through a generator and leave no trace in the memory of the process."""
    program = """if True:
        import random, resource, nanochat_bpe
        letters = [*b"etaoinshrdlu    "] * 16
        def documents():
            for i in range(200):
                yield random.Random(i % 3).randbytes(1_000_000).translate(bytes(letters)).decode()
        nanochat_bpe.train(itertools.islice(documents(), 9), 300, 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nanochat_bpe.train(documents(), 300, 2)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", "import itertools\n" + program],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    kilobytes = int(output) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 30_000, kilobytes


def test_an_error_in_the_iterator_comes_out():
    def documents():
        yield "text " * 100_000
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        nanochat_bpe.train(documents(), 300)


@pytest.mark.parametrize(
    "documents",
    [
        "itertools.repeat('the same few words ' * 1000)",  # stopped while it counts
        "itertools.repeat('')",
        "itertools.chain([noise], say())",  # stopped while it merges
    ],
)
def test_ctrl_c_stops_training(documents):
    program = f"""if True:
        import itertools, random, time, nanochat_bpe
        letters = bytes([*b"abcdefghijklmno "] * 16)
        noise = random.Random(0).randbytes(20_000_000).translate(letters).decode()
        def say():
            print("go", flush=True)
            yield "the end"
        try:
            nanochat_bpe.train(itertools.chain(say(), {documents}), 1 << 30, 2)
        except KeyboardInterrupt:
            print("stopped")
    """
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(2 if "say" in documents else 1):
            assert child.stdout.readline() == "go\n"
        time.sleep(1)
        started = time.perf_counter()
        child.send_signal(signal.SIGINT)
        try:
            assert child.stdout.read() == "stopped\n"
            assert time.perf_counter() - started < 1.5
        finally:
            child.kill()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nanochat_bpe.train([], 255), "vocab_size must be an integer from 256 .* not 255"),
        (lambda: nanochat_bpe.train([], -1), "vocab_size must be"),
        (lambda: nanochat_bpe.train([], 1 << 70), "vocab_size must be"),
        (lambda: nanochat_bpe.train([], "1000"), "vocab_size must be .* not '1000'"),
        (lambda: nanochat_bpe.train([], 300.0), "vocab_size must be"),
        (lambda: nanochat_bpe.train([], 300, -1), "threads must be an integer from 0 .* not -1"),
        (lambda: nanochat_bpe.train([], 300, 100_000), "threads must be"),
        (lambda: nanochat_bpe.train(["one", 2], 300), "texts item 1 must be str, not int"),
        (lambda: nanochat_bpe.train([b"one"], 300), "texts item 0 must be str, not bytes"),
        (lambda: nanochat_bpe.train("one text", 300), "texts must be an iterable of strings"),
        (lambda: nanochat_bpe.train(5, 300), "texts must be an iterable of strings"),
        (lambda: nanochat_bpe.train(["a", "b\ud800c"], 300), "texts item 1 is not Unicode.*ud800"),
        (lambda: nanochat_bpe.split("\udfff"), "text is not Unicode.*udfff"),
        (lambda: nanochat_bpe.split(None), "text must be str, not NoneType"),
        (lambda: nanochat_bpe.token_bytes([(97, 98), (257, 1)]), "merges item 1 joins a later id"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TRAINERS = {
    "nanochat_bpe": "nanochat_bpe.train(texts, 32768, 2)",
    "rustbpe": "rustbpe.Tokenizer().train_from_iterator(iter(texts), 32768, pattern=P)",
    "tokenizers": "t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32768,"
    " show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))",
}
RACE = """
import gzip, json, pathlib, resource, sys, time
import nanochat_bpe, {package}
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
P = nanochat_bpe.PATTERN
t = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(P.replace("?+", "?").replace("++", "+")), "isolated")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
t.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
texts, size = [], 0
while size < 1e8:
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl.gz")):
        for line in gzip.open(path, "rt"):
            if size < 1e8:
                texts.append(json.loads(line)["text"])
                size += len(texts[-1])
start = time.perf_counter()
{call}
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_training_is_faster_than_other_packages_at_no_more_memory():
    pytest.importorskip("rustbpe")
    pytest.importorskip("tokenizers")
    if not (SHARED / "text").is_dir():
        pytest.skip(f"{SHARED} is not there")
    runs = collections.defaultdict(list)
    for package in [*TRAINERS] * 3:
        code = RACE.format(package=package, call=TRAINERS[package])
        out = subprocess.run([sys.executable, "-c", code, str(SHARED / "text")], check=True,
                             capture_output=True, env={**os.environ, "RAYON_NUM_THREADS": "2"})  # fmt: skip
        runs[package].append([float(word) for word in out.stdout.split()])
    seconds, memory = ({p: sorted(r[i] for r in runs[p])[1] for p in runs} for i in (0, 1))
    print(seconds, memory)
    assert seconds["rustbpe"] >= 4 * seconds["nanochat_bpe"]
    assert seconds["tokenizers"] >= 8 * seconds["nanochat_bpe"]
    assert memory["nanochat_bpe"] <= memory["rustbpe"]


# 1. Formats, paths, errors, log --------------------------------------------------------------


def test_written_beside_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), common.written_beside(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x\n"])
def test_names_never_become_paths(name):
    with pytest.raises(ValueError, match="--tag"):
        common.check_name(name, "--tag")


def test_a_log_line_has_one_form():
    values = {"loss": 3.41271, "lr": 1.0, "tok_per_s": 512e3, "mfu": 0.412, "left_s": 720.0}
    line = common.format_log("base", 250, 5000, values)
    expected = "base 00250/05000  loss 3.4127  lr 1.00x  512.0 ktok/s  mfu 41.2 %  left 12 min"
    assert line == expected


def test_the_log_is_rewound_for_a_resumed_run(base_dir):
    run = common.Run("base", "t", None, CPU, 0, 1, num_steps=9)
    common.run_dir("t").mkdir(parents=True)
    for step in (1, 2, 3):
        run.log(step, loss=float(step))
    common.Run("sft", "t", None, CPU, 0, 1).log(3, loss=9.0)
    run.rewind_log(2)
    lines = [json.loads(x) for x in (common.run_dir("t") / "metrics.jsonl").open()]
    assert [(x["stage"], x["step"]) for x in lines] == [("base", 1), ("base", 2), ("sft", 3)]


# 2. Settings ---------------------------------------------------------------------------------


@dataclass
class ExampleSettings:
    total_size: int = common.setting(8, "of it")
    rate: float = common.setting(0.5, "a second")
    fast: bool = common.setting(False, "or slow")
    stage: str = common.setting("base", "which", short="i", choices=("base", "sft"))
    derived: ClassVar = {"model_dim": "it follows from --depth"}

    def __post_init__(self):
        if self.total_size < 0:
            raise ValueError("--total-size must be 0 or more")


def test_settings_take_both_spellings_and_round_numbers():
    def parse(line):
        return common.parse_settings(ExampleSettings, "doc", line.split())

    assert parse("--total-size=3") == parse("--total_size 3") == ExampleSettings(total_size=3)
    assert parse("--total-size=2e9").total_size == 2_000_000_000
    assert parse("--fast -i sft --rate=1e-3") == ExampleSettings(fast=True, stage="sft", rate=1e-3)
    assert parse("--no-fast").fast is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--total-sise=3", "did you mean --total-size"),
        ("--model-dim=3", "it follows from --depth"),
        ("--total-size=1.5", "not a whole number"),
        ("--total-size=-1", "must be 0 or more"),
        ("--stage=mid", "invalid choice"),
        ("--total-siz=3", "did you mean"),
    ],
)
def test_a_wrong_setting_gets_one_line_and_exit_2(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_settings(ExampleSettings, "doc", line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_one_name_is_one_setting_in_every_stage():
    seen = {}
    for stage in STAGES:
        cls = importlib.import_module(stage).Settings
        for f in dataclasses.fields(cls):
            kind = (f.type, f.metadata["help"])
            if f.name in ("restart", "source", "seed", "stage"):  # what they do differs by stage
                kind = f.type
            assert seen.setdefault(f.name, kind) == kind, f"{stage}.{f.name}"


# 3. Device, ranks, start_run -----------------------------------------------------------------


def test_bf16_is_chosen_only_where_it_is_fast(monkeypatch):
    for ratio, dtype in ((0.002, torch.float32), (1.5, torch.float32), (4, torch.bfloat16)):
        rates = {torch.float32: 1e11, torch.bfloat16: ratio * 1e11}
        monkeypatch.setattr(common, "measure_matmul", lambda dev, dt, n, r=rates: r[dt])
        assert common.pick_dtype(CPU) == dtype
    assert common.pick_dtype(CPU, "float32") == torch.float32


def test_an_absent_device_is_said(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(common.MissingInput, match="--device=cuda is not on this machine"):
            common.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(common.MissingInput, match="--nproc_per_node=1"):
        common.pick_device("cuda")


def test_compilation_is_a_choice_that_is_said(monkeypatch):
    said = []
    assert not common.compile_or_not("auto", 30, CPU, said.append)
    assert not common.compile_or_not("no", 1e6, CPU, said.append)
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    assert not common.compile_or_not("auto", 1e6, CPU, said.append)
    assert not common.compile_or_not("yes", 1, CPU, said.append)
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    assert common.compile_or_not("auto", 1e6, CPU, said.append)
    assert "C++ compiler" in said[2] and "python3-dev" in said[3] and len(said) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_error_is_one_sentence(base_dir, number):
    settings = SimpleNamespace(tag="t", device="cpu", seed=0)
    with pytest.raises(common.Stop) as stop, common.start_run("base", settings):
        raise OSError(number, os.strerror(number), "/some/where")
    assert "/some/where" in str(stop.value) and "\n" not in str(stop.value)


# 4. Tokenizer --------------------------------------------------------------------------------


def test_text_never_becomes_a_special_token(tokenizer):
    text = "a <|bos|> and <|assistant_end|> b"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos and tokenizer.decode(ids) == text


def test_the_tokenizer_file_is_readable_and_complete(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = common.Tokenizer.load(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert len(saved["merges"]) == again.vocab_size - 256 - len(common.SPECIAL_TOKENS)
    assert again.fingerprint == tokenizer.fingerprint and saved["pattern"] == tokenizer.pattern
    text = "It's 1234 o'clock — naïve 北京 🙂\n\n\tx"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text


def test_a_damaged_tokenizer_is_said(tokenizer, tmp_path):
    with pytest.raises(common.MissingInput, match="train_tokenizer.py"):
        common.Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(common.MissingInput, match="damaged"):
        common.Tokenizer.load(tmp_path)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_encoding_loses_nothing_and_merges_as_trained(text):
    tokenizer = TOKENIZER()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    weights = tokenizer.token_bytes[torch.tensor(ids, dtype=torch.long)]
    assert int(weights.sum()) == len(text.encode())


# 5. GPT --------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "grouped": {"n_kv_head": 1},
    "window": {"window_pattern": "SSL"},
    "both": {"n_kv_head": 2, "window_pattern": "SL", "n_layer": 3},
}


def random_model(dtype=torch.float32, seed=0, **changes):
    shape = {"vocab_size": 100, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 4}
    config = common.GPTConfig(**{**shape, "max_seq_len": 32, **changes})
    torch.manual_seed(seed)
    model = common.GPT.create(config, CPU, dtype)
    with torch.no_grad():
        for weight in model.parameters():  # the zeros and the tiny head would hide mistakes
            weight.normal_(std=0.2)
    return model


def as_transformers(model):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat model")
    c = model.config
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=c.padded_vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head, max_position_embeddings=c.max_seq_len,
            final_logit_softcapping=c.softcap, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        )
    )  # fmt: skip

    def swap_halves(weight):  # they turn the other way round
        halves = weight.view(-1, 2, c.head_dim // 2, c.n_embd)
        return halves.flip(1).reshape(weight.shape)

    state = {"model.embed_tokens.weight": model.embed.weight, "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        at = block.attention
        state |= {
            f"model.layers.{i}.self_attn.q_proj.weight": swap_halves(at.q.weight),
            f"model.layers.{i}.self_attn.k_proj.weight": swap_halves(at.k.weight),
            f"model.layers.{i}.self_attn.v_proj.weight": at.v.weight,
            f"model.layers.{i}.self_attn.o_proj.weight": at.out.weight,
            f"model.layers.{i}.mlp.fc1.weight": block.mlp.up.weight,
            f"model.layers.{i}.mlp.fc2.weight": block.mlp.down.weight,
        }
    theirs.load_state_dict({k: v.detach() for k, v in state.items()})
    return theirs.eval()


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2}, {"n_layer": 3, "n_head": 2, "n_kv_head": 1}]
)
def test_the_model_equals_transformers_nanochat(changes):
    model = random_model(**changes)
    ids = torch.randint(100, (3, 32))
    with torch.no_grad():
        expected = as_transformers(model)(ids).logits[..., :100]
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_initialised():
    model = common.GPT.create(random_model().config, CPU, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    torch.manual_seed(0)
    model.init_weights()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert (p.std() > 0) == (before[name].std() > 0), name
    assert model.cos.isfinite().all() and model.sin.isfinite().all()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_later_tokens_and_other_rows_change_no_logit(changes):
    model = random_model(**changes)
    ids = torch.randint(100, (3, 32))
    logits = model(ids)
    other = ids.clone()
    other[0, 20:], other[1] = 1, 2
    torch.testing.assert_close(model(other)[0, :20], logits[0, :20])
    torch.testing.assert_close(model(other)[2], logits[2])
    torch.testing.assert_close(model(ids[:1, :11]), logits[:1, :11])


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("split", [(1,) * 32, (32,), (7, 1, 1, 9, 3, 1, 10), (31, 1)])
def test_decoding_with_the_cache_gives_the_logits_of_a_full_pass(changes, split):
    model = random_model(**changes)
    ids = torch.randint(100, (2, 32))
    cache = common.KVCache(model.config, 2, CPU, torch.float32)
    parts = [model.logits(model.hidden(part, cache)) for part in ids.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)


def test_the_cache_is_never_overwritten_at_the_contexts_end():
    model = random_model()
    cache = common.KVCache(model.config, 1, CPU, torch.float32)
    model.hidden(torch.zeros(1, 32, dtype=torch.long), cache)
    with pytest.raises(AssertionError):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_window_matters_and_attention_equals_the_plain_formula():
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
    back = torch.arange(9)[:, None] - torch.arange(9)
    for window in (3, 9):
        mask = (back >= 0) & (back < window)
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        expected = torch.einsum("bhts,bshd->bthd", weights, values)
        torch.testing.assert_close(common.attend(q, k, v, window), expected)


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(cap):
    model = random_model(softcap=cap)
    ids, targets = torch.randint(100, (2, 4, 32))
    targets[0, :9] = common.IGNORE
    weights = torch.randn(4, 32)
    nats = F.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=common.IGNORE, reduction="none"
    )
    for chosen in (None, weights):
        expected = (nats * (1 if chosen is None else chosen.flatten())).sum()
        want = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
        loss = model(ids, targets, chosen)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(common.token_losses(model, ids, targets).flatten(), nats.detach())


def test_the_loss_is_the_same_in_one_chunk_and_in_many(monkeypatch):
    model = random_model(vocab_size=1 << 14)  # 2^21 / 2^14 = 128 positions a chunk
    ids, targets = torch.randint(1 << 14, (2, 8, 32))
    loss = model(ids, targets)
    parts = sum(model(ids[i : i + 1], targets[i : i + 1]) for i in range(8))
    torch.testing.assert_close(loss, parts)


def test_a_masked_target_changes_no_loss_and_none_at_all_gives_zero():
    model = random_model()
    ids, targets = torch.randint(100, (2, 2, 32))
    targets[:, ::2] = common.IGNORE
    none = torch.full_like(targets, common.IGNORE)
    loss = model(ids, none)
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())
    flipped = targets.clone()
    flipped[0, 0] = 5
    assert model(ids, targets).item() != model(ids, flipped).item()


def test_parameter_and_flop_counts_are_those_of_the_model():
    model = random_model(n_kv_head=2, window_pattern="SL", n_layer=4)
    c = model.config
    assert c.num_params() == sum(p.numel() for p in model.parameters())
    plain = dataclasses.replace(c, window_pattern="L")
    products = plain.num_params() - c.padded_vocab_size * c.n_embd
    pairs = c.n_layer * sum(range(1, 33)) / 32
    assert plain.flops_per_token() == 6 * products + 12 * c.n_embd * pairs
    assert c.flops_per_token() < plain.flops_per_token()


@pytest.mark.parametrize(
    "wrong", [{"n_head": 3}, {"n_kv_head": 3}, {"window_pattern": "X"}, {"window_pattern": ""}]
)
def test_a_shape_that_does_not_fit_is_a_value_error(wrong):
    with pytest.raises(ValueError):
        random_model(**wrong)


# 6. Optimizer --------------------------------------------------------------------------------


def test_muon_equals_torchs_own(monkeypatch):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 32), (48, 48), (32, 64)]
    real = torch.Tensor.to  # torch's works in bf16, whose rounding would hide errors: take fp32

    def to(self, *args, **options):
        if options.get("dtype") is torch.bfloat16:
            options["dtype"] = torch.float32
        return real(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"kind": "muon", "params": ours, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1,
             "coefficients": common.NEWTON_SCHULZ}  # fmt: skip
    optimizer = common.Optimizer([group], torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_adamw_equals_torchs_own():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in [(33, 5), (7,), (4, 4, 4)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"kind": "adamw", "params": ours, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8,
             "weight_decay": 0.1}  # fmt: skip
    optimizer = common.Optimizer([group], torch.float32)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(6):
        scale = 1 - step / 10
        reference.param_groups[0]["lr"] = 0.01 * scale
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step(scale)
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["NEWTON_SCHULZ", "POLAR_EXPRESS"])
@pytest.mark.parametrize("shape", [(64, 64), (3, 32, 128), (128, 32)])
def test_orthogonalisation_brings_singular_values_near_one(name, shape):
    torch.manual_seed(0)
    x = common.orthogonalize(torch.randn(shape), getattr(common, name), torch.float32)
    values = torch.linalg.svdvals(x)
    assert x.shape == shape and (values > 0.6).float().mean() > 0.97 and values.max() < 1.3


def optimizer_trace(rank=0, world_size=1, steps=3):
    """Run a few updates of awkward shapes; every rank gives its part of the same gradient."""
    torch.manual_seed(1)
    matrices = [torch.nn.Parameter(torch.randn(s)) for s in [(8, 16)] * 5 + [(16, 8), (7, 7)]]
    rest = [torch.nn.Parameter(torch.randn(s)) for s in [(13, 3), (1,), (5,)]]
    groups = [
        {"kind": "muon", "params": matrices, "lr": 0.02, "momentum": 0.95, "weight_decay": 0.01,
         "coefficients": common.POLAR_EXPRESS},
        {"kind": "adamw", "params": rest, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10,
         "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = common.Optimizer(groups, torch.float32)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in matrices + rest[:2]:  # rest[2] never has a gradient
            p.grad = torch.randn(p.shape, generator=generator) / world_size
        optimizer.step(0.7)
    return matrices + rest, optimizer


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks_update_as_one_does_and_their_state_is_cut_anew(world_size, tmp_path):
    run_ranks(
        world_size,
        f"""
        params, optimizer = test_all.optimizer_trace(rank, {world_size})
        torch.save([p.data for p in params], r"{tmp_path}/params-%d.pt" % rank)
        torch.save(optimizer.state_dict(), r"{tmp_path}/state-%d.pt" % rank)
        """,
    )
    expected, whole = optimizer_trace()
    shards = [torch.load(tmp_path / f"state-{r}.pt") for r in range(world_size)]
    for rank in range(world_size):
        for a, b in zip(torch.load(tmp_path / f"params-{rank}.pt"), expected):
            torch.testing.assert_close(a, b.data)
    _, again = optimizer_trace(steps=1)
    again.load_state_dicts(shards)
    assert again.steps == whole.steps == 3
    for a, b in zip(again.units, whole.units):
        for name, value in a.state.items():
            torch.testing.assert_close(value, b.state[name])


# 7. Rows -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 24), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_packing_loses_no_token_and_begins_every_row_with_bos(lengths, T, buffer):
    serial = itertools.count(1)
    documents = [[0, *itertools.islice(serial, n)] for n in lengths]  # every token is its own
    rows = list(common.pack_rows(documents, T, buffer))
    assert all(len(row) == T + 1 for row in rows[:-1]) and all(row[0] == 0 for row in rows)
    tokens = [i for row in rows for i in row[1:] if i]
    assert sorted(tokens) == list(range(1, sum(lengths) + 1))
    for row in rows:  # a piece is a run of its document
        for a, b in itertools.pairwise(row):
            assert b == a + 1 or b == 0 or a == 0


def test_packing_prefers_whole_documents():
    rows = list(common.pack_rows([[0] + [1] * n for n in (9, 4, 4, 9)], T=9))
    assert rows == [[0] + [1] * 9, [0] + [1] * 9, [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]]


def test_nearly_all_text_is_trained_on(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 64, 10**9, print)
    targets = sum(int((rows.gather(np.array([i]))[1] >= 0).sum()) for i in range(len(rows)))
    texts = [
        t for path in common.list_shards(text_source, "train") for t in common.read_texts(path)
    ]
    assert targets >= 0.95 * sum(len(tokenizer.encode(t)) for t in texts)
    assert len(rows) * 64 <= 1.05 * targets  # and few positions are spent on filling


def test_the_token_cache_is_reused_and_follows_the_text(text_source, tokenizer):
    said = []
    first = common.token_rows(text_source, tokenizer, 32, 10**9, said.append)
    assert said
    said.clear()
    common.token_rows(text_source, tokenizer, 32, 10**9, said.append)
    assert not said
    write_texts(text_source, ["Entirely other text. " * 50] * 3)
    other = common.token_rows(text_source, tokenizer, 32, 10**9, said.append)
    assert said and len(other) != len(first)
    assert len(common.token_rows(text_source, tokenizer, 32, 1, print)) <= len(other)


def test_filling_is_never_a_target(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 32, 10**9, print)
    ids, targets = rows.gather(np.array([len(rows) - 1, -1]))
    assert (ids[1] == tokenizer.bos).all() and (targets[1] == common.IGNORE).all()
    assert (ids[:, 0] == tokenizer.bos).all()
    filled = (ids == tokenizer.bos) & (targets == common.IGNORE)
    assert ((targets == common.IGNORE) == filled).all()


def take_steps(rows, batch_rows, micro, steps, start=0, ranks=1):
    """Return the rows' first real token ids, step by step, over all ranks."""
    result = []
    streams = []
    for rank in range(ranks):
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(ranks)
        accum = common.accum_steps(batch_rows, micro)
        stream = common.row_batches(rows, batch_rows, micro, 3, start, CPU)
        got = list(itertools.islice(stream, accum * steps))
        streams.append([got[i : i + accum] for i in range(0, len(got), accum)])
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    for step in range(steps):
        batches = [b for stream in streams for b in stream[step]]
        kept = [tuple(x.tolist()) for b in batches for x in b.ids[b.targets[:, 0] >= 0]]
        assert sum(b.num_targets for b in batches) == sum(
            int((b.targets >= 0).sum()) for b in batches
        )
        result.append(sorted(kept))
    return result


def test_a_steps_rows_depend_on_neither_ranks_nor_micro_batch_nor_resume(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 64, 10**9, print)
    assert len(rows) > 20
    steps = len(rows) // 5 + 4  # on into the second epoch
    expected = take_steps(rows, 5, 5, steps)
    assert all(len(step) == 5 for step in expected)
    for micro, ranks in ((1, 1), (2, 1), (2, 2), (1, 3), (4, 3), (8, 1)):
        assert take_steps(rows, 5, micro, steps, ranks=ranks) == expected
    assert take_steps(rows, 5, 2, steps - 3, start=3) == expected[3:]
    epoch = [row for step in expected for row in step][: len(rows)]
    assert len(set(epoch)) == len(rows), "an epoch takes each row once"
    second = take_steps(rows, len(rows), len(rows), 2)
    assert second[0] == second[1]


def test_prefetch_keeps_order_raises_and_ends():
    assert list(common.prefetch(iter(range(100)), 3)) == list(range(100))

    def broken():
        yield 1
        raise MemoryError("gone")

    stream = common.prefetch(broken(), 2)
    assert next(stream) == 1
    with pytest.raises(MemoryError, match="gone"):
        next(stream)


# 8. training_steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 10, 200])
@pytest.mark.parametrize("warmdown", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_the_learning_rate_never_rises_after_the_warmup(num_steps, warmup, warmdown):
    rates = [common.trapezoid(s, num_steps, warmup, warmdown, 0.1) for s in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    later = rates[warmup:]
    assert all(b <= a for a, b in itertools.pairwise(later))
    if warmdown == 1.0 and num_steps == 100 and warmup <= 10:
        assert rates[-1] == pytest.approx(0.1, abs=0.02)


class OneWeight:
    """The smallest thing to train: a weight pulled to the mean of its targets."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        group = {"kind": "adamw", "params": [self.weight], "lr": 0.1, "betas": (0.9, 0.9),
                 "eps": 1e-8, "weight_decay": 0.0}  # fmt: skip
        self.optimizer = common.Optimizer([group], torch.float32)

    def loss(self, batch):
        used = batch.targets[batch.targets >= 0].float()
        return (self.weight - used).square().sum()


def make_batch(*targets):
    values = torch.tensor([targets])
    return common.Batch(values, values, int((values >= 0).sum()))


def test_steps_are_yielded_before_each_update_and_after_the_last():
    one = OneWeight()
    batches = itertools.cycle([make_batch(1, 2)])
    seen = []
    for s in common.training_steps(batches, one.loss, one.optimizer, lambda step: 1.0, 5, start=2):
        seen.append((s.step, s.due(2), s.due(3), s.due(0), s.due(100)))
    assert [x[0] for x in seen] == [2, 3, 4, 5]
    assert [x[1] for x in seen] == [True, False, True, True]
    assert [x[4] for x in seen] == [False, False, False, True]
    assert not any(x[3] for x in seen) and one.optimizer.steps == 3
    first = common.Step(0, 10)
    assert not first.due(5) and first.due(5, first=True)


def test_the_loss_divides_by_the_targets_of_the_whole_step():
    split, whole = OneWeight(), OneWeight()
    parts = iter([make_batch(1, -1, -1), make_batch(4, 5, 9), make_batch(-1, -1, -1)])
    one = iter([make_batch(1, 4, 5, 9)])
    a = list(common.training_steps(parts, split.loss, split.optimizer, lambda s: 1.0, 1, accum=3))
    b = list(common.training_steps(one, whole.loss, whole.optimizer, lambda s: 1.0, 1))
    assert a[-1].loss == pytest.approx(b[-1].loss) == pytest.approx((1 + 16 + 25 + 81) / 4)
    torch.testing.assert_close(split.weight, whole.weight)


def test_a_step_without_targets_counts_zero():
    one = OneWeight()
    batches = iter([make_batch(-1, -1)])
    last = list(common.training_steps(batches, one.loss, one.optimizer, lambda s: 1.0, 1))[-1]
    assert last.loss == 0 and one.weight.isfinite().all()


def test_a_loss_that_is_not_finite_stops_with_a_remedy():
    one = OneWeight()
    batches = itertools.repeat(make_batch(1))
    with pytest.raises(common.Stop, match="nan at step 1.*--lr-scale"):
        list(common.training_steps(
            batches, lambda b: one.loss(b) * math.nan, one.optimizer, lambda s: 1.0, 3
        ))  # fmt: skip


def test_a_request_to_stop_ends_after_the_step():
    one = OneWeight()
    asked = []
    batches = itertools.repeat(make_batch(1))
    seen = []
    for s in common.training_steps(
        batches, one.loss, one.optimizer, lambda s: 1.0, 99, stop=lambda: bool(asked)
    ):
        seen.append((s.step, s.stopping))
        if s.step == 3:
            asked.append(1)
    assert seen[-1] == (4, True) and not any(x[1] for x in seen[:-1])


# 9. Checkpoints, bits per byte ---------------------------------------------------------------


def saved_run(keep=2, steps=(1,)):
    settings = ExampleSettings()
    run = common.Run("base", "t", settings, CPU, 0, 1)
    model = random_model()
    optimizer = common.Optimizer(common.optimizer_groups(model, 0.1, 0.1, 0.1, 0.0), torch.float32)
    for step in steps:
        folder = common.save_checkpoint(run, step, model, optimizer, {"metrics": {}}, keep)
    return model, optimizer, folder


def test_a_checkpoint_comes_back_whole_and_old_ones_go(base_dir):
    model, _, folder = saved_run(keep=2, steps=(1, 2, 10))
    assert [p.name for p in common.list_checkpoints("t", "base")] == ["step-000002", "step-000010"]
    assert common.find_checkpoint("t", "base") == folder
    again = common.load_model(folder, CPU, torch.float32)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b) and b.requires_grad, name
    ids = torch.randint(100, (1, 8))
    assert torch.equal(model(ids), again(ids))
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["step"] == 10 and meta["settings"]["total_size"] == 8


@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
@pytest.mark.parametrize("name", ["model.pt", "meta.json"])
def test_a_damaged_checkpoint_is_said(base_dir, harm, name):
    _, _, folder = saved_run(steps=(1, 2))
    path = folder / name
    data = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "lose":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(common.MissingInput, match=r"damaged.*step-000001 is then taken"):
        common.load_model(folder, CPU, torch.float32)


def test_a_missing_stage_or_tag_is_said(base_dir):
    with pytest.raises(common.MissingInput, match="bash run.sh"):
        common.find_checkpoint("t", "base")
    saved_run()
    with pytest.raises(common.MissingInput, match="there are t"):
        common.find_checkpoint("other", "base")
    with pytest.raises(common.MissingInput, match="python midtrain.py --tag=t"):
        common.find_checkpoint("t", "mid")
    with pytest.raises(common.MissingInput, match="step 7"):
        common.find_checkpoint("t", "base", 7)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(base_dir, monkeypatch):
    model, optimizer, folder = saved_run()
    real = torch.save

    def full(value, path):
        real(value, path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    run = common.Run("base", "t", ExampleSettings(), CPU, 0, 1)
    with pytest.raises(OSError):
        common.save_checkpoint(run, 5, model, optimizer, {}, 1)
    monkeypatch.undo()
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)
    assert common.list_checkpoints("t", "base") == [folder]
    common.load_model(folder, CPU, torch.float32)


def test_bits_per_byte_by_documents_equal_one_document_at_a_time(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    texts = ["Hello.", "The cat sat on the mat. " * 9, "é北京🙂", "a"]
    nats = 0.0
    for text in texts:
        ids = tokenizer.encode(text)
        for i in range(0, len(ids), 32):
            part = torch.tensor([[tokenizer.bos, *ids[i : i + 32]]])
            logprobs = model(part[:, :-1]).log_softmax(-1)
            nats -= logprobs.gather(-1, part[:, 1:, None]).sum().item()
    expected = nats / math.log(2) / sum(len(t.encode()) for t in texts)
    for rows in (1, 2, 16):
        bpb, count = common.evaluate_bpb(model, tokenizer, texts, rows)
        assert bpb == pytest.approx(expected, rel=1e-5) and count == 4


def test_bits_per_byte_of_a_uniform_model_are_known(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    torch.nn.init.zeros_(model.head.weight)
    text = "Some words, and more of them."
    bpb, _ = common.evaluate_bpb(model, tokenizer, [text], 4)
    expected = len(tokenizer.encode(text)) * math.log2(tokenizer.vocab_size) / len(text)
    assert bpb == pytest.approx(expected, rel=1e-5)


# 10. Engine ----------------------------------------------------------------------------------


def test_sampling_follows_the_probabilities_and_the_limits():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, -math.inf])

    def draw(n=400, **options):
        generator = torch.Generator().manual_seed(0)
        chosen = common.Sampling(**options)
        return collections.Counter(common.sample(logits, chosen, generator) for _ in range(n))

    assert draw(temperature=0) == {1: 400}
    assert set(draw(top_k=2)) == {1, 2} and set(draw(top_k=1)) == {1}
    assert set(draw(top_p=0.5)) == {1}  # its 0.64 alone reach a half
    assert set(draw(top_p=0.8)) == {1, 2} and set(draw(temperature=50.0)) == {0, 1, 2, 3}
    counts, probs = draw(4000), logits.softmax(0)
    for i in range(4):
        assert counts[i] / 4000 == pytest.approx(probs[i].item(), abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_tokens": 0}]
)
def test_sampling_out_of_range_is_a_value_error(wrong):
    with pytest.raises(ValueError):
        common.Sampling(**wrong)


def test_generation_equals_a_plain_loop_without_a_cache(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, window_pattern="SL")
    prompt = [tokenizer.bos, *tokenizer.encode("The cat")]
    expected = list(prompt)
    while len(expected) < 32:
        chosen = int(model(torch.tensor([expected]))[0, -1].argmax())
        if chosen == tokenizer.bos:
            break
        expected.append(chosen)
    engine = common.Engine(model, tokenizer)
    got = list(engine.generate(prompt, common.Sampling(max_tokens=99, temperature=0)))
    assert prompt + got == expected


def test_a_seed_decides_the_samples(tokenizer):
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer)

    def run(seed):
        return list(engine.generate([tokenizer.bos], common.Sampling(max_tokens=20, seed=seed)))

    assert run(1) == run(1) and len({tuple(run(seed)) for seed in range(8)}) > 6
    firsts = {run(seed)[0] for seed in range(12)}
    assert len(firsts) > 1, "samples of one prompt must not share their first token"


def test_a_prompt_that_leaves_no_room_is_refused_and_long_texts_keep_their_end(tokenizer):
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(ValueError, match="takes 1 to 31"):
        list(engine.generate([0] * 32, common.Sampling()))
    assert "".join(engine.complete("word " * 500, common.Sampling(max_tokens=4)))


@given(st.text(min_size=1))
@settings(max_examples=200, deadline=None)
def test_streamed_pieces_are_whole_characters_and_add_up(text):
    tokenizer = TOKENIZER()
    byte_ids = list(text.encode())  # the worst case: a token a byte
    for ids in (byte_ids, tokenizer.encode(text)):
        pieces = list(common.stream_text(tokenizer, ids))
        assert (
            "".join(pieces) == text
            and all(pieces)
            and "\ufffd" not in "".join(pieces)
            or ("\ufffd" in text)
        )


def test_a_broken_character_at_the_end_is_shown_as_such(tokenizer):
    assert "".join(common.stream_text(tokenizer, "é".encode()[:1])) == "\ufffd"


# prepare.py: own files and hub ----------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An empty base directory, no hub and no token."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "base"


WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "rs", "lla")]


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def texts_of(folder: Path) -> tuple[list[str], list[str]]:
    train = [t for p in sorted(folder.glob("train-*.parquet")) for t in common.read_texts(p)]
    return train, list(common.read_texts(folder / "val.parquet"))


def table_bytes(column: str, values: list) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({column: values}), out)
    return out.getvalue()


# Documents -----------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=80), max_size=20), st.integers(1, 50))
def test_cut_pieces_keeps_every_character(chunks, limit):
    pieces = list(prepare.cut_pieces(chunks, limit))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cut_pieces_ends_at_paragraphs_and_headings():
    paragraphs = [words(i, 60) + "." for i in range(100)]
    pieces = list(prepare.cut_pieces(["\n\n".join(paragraphs)], 2000))
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert min(len(piece) for piece in pieces) > 500
    chapters = "".join(f"CHAPTER {i}\n{words(i, 100)}\n\n{words(-i, 90)}\n" for i in range(9))
    assert all(p.startswith("CHAPTER") for p in prepare.cut_pieces([chapters], 1500))
    accents = "e\u0301" * 500  # an accent stays with its letter
    assert all(len(p) % 2 == 0 for p in prepare.cut_pieces([accents], 301))


def test_endless_line_needs_little_memory():
    line = words(1, 300_000)[: 1 << 20]
    tracemalloc.start()
    count = sum(len(p) for p in prepare.cut_pieces((line for _ in range(100)), 20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100 << 20 and peak < 8 << 20, peak


def test_sorter_shuffles_the_same_way_with_any_number_of_buckets(tmp_path, monkeypatch):
    texts = [words(i, 20) for i in range(500)]
    orders = []
    for bucket_bytes in (1 << 26, 500):
        monkeypatch.setattr(prepare, "BUCKET_BYTES", bucket_bytes)
        sorter = prepare.Sorter(tmp_path / str(bucket_bytes), 3, 50_000)
        for text in texts + texts[:7]:
            sorter.add(text)
        orders.append([text for _, text in sorter.documents()])
        assert sorter.duplicates == 7
    assert orders[0] == orders[1] and orders[0] != texts and sorted(orders[0]) == sorted(texts)


def test_shards_and_manifest(base, tmp_path):
    source = tmp_path / "big.txt"
    source.write_text("\n\n".join(words(i, 140) for i in range(5000)))
    manifest = prepare.main(
        prepare.Settings(str(source), shard_mb=1, doc_chars=1000, val_percent=10)
    )
    folder = base / "data" / "big"
    train, val = texts_of(folder)
    assert len(list(folder.glob("train-*.parquet"))) == 3
    assert not set(train) & set(val) and 0.07 < len(val) / len(train) < 0.15
    assert collections.Counter(" ".join(train + val).split()) == collections.Counter(
        source.read_text().split()
    )
    for name, entry in manifest["files"].items():
        data, texts = (folder / name).read_bytes(), list(common.read_texts(folder / name))
        assert entry == {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "bytes": sum(len(t.encode()) for t in texts),
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    metadata = pq.ParquetFile(folder / "train-00000.parquet").metadata
    assert metadata.row_group(0).num_rows == 1000
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert sorted(p.name for p in base.glob("data/*")) == ["big"]  # nothing left beside


def test_validation_text_has_an_upper_bound(base, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(words(i, 140) for i in range(5000)))
    settings = prepare.Settings(str(tmp_path / "a.txt"), val_mb=1, val_percent=50)
    files = prepare.main(settings)["files"]
    assert 1e6 <= files["val.parquet"]["bytes"] < 1.03e6


# Own files -----------------------------------------------------------------------------------


def make_folder(root: Path) -> None:
    """A folder with every kind of file, good and bad; the documents say where they are from."""
    root.mkdir()
    record = [json.dumps({"text": f"jsonl {i} " + words(i, 50)}) for i in range(30)]
    record[3:3] = [
        "{broken",
        "[" * 100_000,
        "",
        '{"other": 1}',
        '{"text": null}',
        '"a bare string"',
    ]
    (root / "a.jsonl").write_text("\n".join(record) + "\n")
    (root / "b.jsonl.gz").write_bytes(gzip.compress(("\r\n".join(record[9:])).encode()))
    (root / "c.parquet").write_bytes(table_bytes("content", ["parquet " + words(99, 50), None]))
    (root / "d.md").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\nmarkdown\r\ntext\r")
    (root / "e.txt").write_bytes("Grüße utf-16 日本語".encode("utf-16"))
    (root / "f.py").write_text("def python():\n    return 1\n")
    (root / "g.txt").write_bytes(b"caf\xe9 is not valid here, nor is this: \xff " + b"x" * 100)
    (root / "h.txt").write_bytes(b"a NUL \0 inside of a longer text that goes on")
    (root / "i.txt").write_bytes(b"")
    (root / "j.txt").write_text(" \n\n ")
    (root / "k.txt").write_bytes(random.Random(0).randbytes(5000))
    (root / "l.png").write_bytes(b"\x89PNG")
    damaged = "".join(f'{{"text": "damaged {os.urandom(40).hex()}"}}\n' for i in range(500))
    (root / "m.jsonl.gz").write_bytes(gzip.compress(damaged.encode())[:-20])
    (root / "n.parquet").write_bytes(b"PAR1 no parquet")
    (root / "o.parquet").write_bytes(table_bytes("title", ["x"]))
    (root / "q.csv").write_text("id,value\n1,2\n")
    (root / "s.json").write_text('{"name": "settings"}')
    (root / "t.jsonl").write_text('{"text": "a half \\ud83d of an emoji, whole \\ud83d\\ude00"}\n')
    (root / "u.TXT.GZ").write_bytes(gzip.compress("русский текст".encode()))
    (root / "v.parquet").write_bytes(table_bytes("text", [1, 2]))
    (root / "README").write_text("readme without a suffix")
    (root / ".hidden.txt").write_text("hidden file")
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("hidden folder")
    deep = root / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / "copy.py").write_text("def python():\n    return 1\n")
    (deep / "loop").symlink_to(root)
    (deep / "self").symlink_to(deep / "self")
    (deep / "gone.txt").symlink_to(root / "nowhere.txt")
    os.mkfifo(deep / "pipe.txt")


def test_every_kind_of_file(base, tmp_path, capsys):
    make_folder(tmp_path / "mine")
    manifest = prepare.main(prepare.Settings(str(tmp_path / "mine")))
    train, val = texts_of(base / "data" / "mine")
    texts = train + val
    joined = "\n".join(texts)
    assert len(set(texts)) == len(texts) and not set(train) & set(val) and val
    for part in ("jsonl 29", "parquet ", "Grüße utf-16 日本語", "a bare string", "readme without",
                 "# Title\n\nmarkdown\ntext", "caf\ufffd is", "a NUL  inside",
                 "id,value\n1,2", '{"name": "settings"}',
                 "русский текст", "a half \ufffd of an emoji, whole 😀", "damaged"):  # fmt: skip
        assert part in joined, part
    assert "hidden" not in joined and "\r" not in joined and "\ufeff" not in joined
    dropped = manifest["dropped"]
    assert dropped.pop("duplicates") > 27
    assert dropped == {
        "hidden files and folders": 2,
        "broken links and special files": 3,
        "files of other kinds": 1,
        "lines of broken JSON": 2,
        "records without `text` or `content`": 2 + 1,
        "empty files": 1,
        "empty documents": 1,
        "binary files": 1,
        "damaged or unreadable files": 3,
        "tables without `text` or `content` (has title)": 1,
    }
    out = capsys.readouterr().out
    assert "broken JSON (mine/a.jsonl:4)" in out and "binary files (mine/k.txt)" in out
    assert out.count("\n") <= 6


def test_order_depends_on_content_and_seed_alone(base, tmp_path):
    texts = [words(i, 30) for i in range(200)]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, order in ((one, texts), (two, texts[::-1])):
        folder.mkdir()
        for i in range(0, 200, 20):
            lines = [json.dumps({"text": t}) + "\n" for t in order[i : i + 20]]
            (folder / f"{i}.jsonl").write_text("".join(lines))
    first, second = (prepare.main(prepare.Settings(str(p)))["files"] for p in (one, two))
    assert first == second
    other = prepare.main(prepare.Settings(str(two), source="other", seed=1))["files"]
    assert other["train-00000.parquet"]["sha256"] != first["train-00000.parquet"]["sha256"]


def test_one_small_file_has_both_splits(base, tmp_path, capsys):
    for count in (60, 3000):
        path = tmp_path / f"small{count}.txt"
        path.write_text(". ".join(words(i, 10) for i in range(count // 10)))
        prepare.main(prepare.Settings(str(path)))
        train, val = texts_of(base / "data" / path.stem)
        assert train and val and not set(train) & set(val)
        assert count == 60 or len("".join(val)) < 0.1 * len("".join(train))
    assert "few documents" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "Only one sentence.", "Only this.\n" * 3])
def test_too_small_input_is_one_sentence(base, tmp_path, text):
    (tmp_path / "tiny.txt").write_text(text)
    with pytest.raises(common.Stop, match="tiny.txt holds (no text|only [0-9]+ characters)"):
        prepare.main(prepare.Settings(str(tmp_path / "tiny.txt")))
    assert not any(base.glob("data/*"))


def test_nothing_usable_says_why(base, tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.jpg").write_bytes(b"x")
    (tmp_path / "pics" / "b.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(common.Stop, match="no text .*other kinds .*a.jpg.*`text`.*b.jsonl:1"):
        prepare.main(prepare.Settings(str(tmp_path / "pics")))


def test_gigantic_lines_are_cut_or_left_out(base, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LINE_CHARS", 10_000)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.txt").write_text(words(1, 400_000))
    long = json.dumps({"text": words(2, 20_000)})
    good = json.dumps({"text": "short enough"})
    (tmp_path / "g" / "b.jsonl").write_text(f"{long}\n{good}\n{long}")
    manifest = prepare.main(prepare.Settings(str(tmp_path / "g")))
    train, val = texts_of(base / "data" / "g")
    assert max(map(len, train + val)) <= 20_000 and "short enough" in train + val
    assert manifest["dropped"]["lines that are too long"] == 2


def test_unreadable_files_are_counted(base, tmp_path, monkeypatch):
    (tmp_path / "u").mkdir()
    for name in "ab":
        (tmp_path / "u" / f"{name}.txt").write_text(words(ord(name), 3000))
    real = open

    def deny(path, *args, **options):
        if str(path).endswith("a.txt"):
            raise PermissionError(errno.EACCES, "denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(prepare, "open", deny, raising=False)
    manifest = prepare.main(prepare.Settings(str(tmp_path / "u")))
    assert manifest["dropped"]["damaged or unreadable files"] == 1


def test_output_inside_the_input_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "out"))
    (tmp_path / "a.txt").write_text(words(1, 3000))
    settings = prepare.Settings(str(tmp_path), source="mine")
    assert prepare.main(settings) == prepare.main(settings)


# Main ----------------------------------------------------------------------------------------


def fail(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        common.parse_settings(prepare.Settings, "doc", argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_settings(base, tmp_path, capsys):
    assert "no such file or folder, nor one of world, hub" in fail(["--data=wrld"], capsys)
    assert "--val-percent" in fail(["--val_percent=0"], capsys)
    assert "--shards must be 1" in fail(["--shards=0"], capsys)
    assert "--source" in fail(["--source=../x"], capsys)
    assert "--source=eval" in fail(["--source=eval"], capsys)
    for name, source in (("My Corpus.v2.txt", "my-corpus"), ("world", "world-files")):
        (tmp_path / name).mkdir()
        assert prepare.Settings(str(tmp_path / name)).source == source
    (tmp_path / "日本").mkdir()
    assert prepare.Settings(str(tmp_path / "日本")).source.startswith("text-")
    assert prepare.Settings("hub").source == "fineweb-edu" and prepare.Settings().source == "world"


def test_world(base, capsys):
    manifest = prepare.main(prepare.Settings(documents=300))
    folder = base / "data" / "world"
    train, val = texts_of(folder)
    assert len(train) + len(val) == 300 and val and not set(train) & set(val)
    for split in ("trained", "unseen"):
        lines = (folder / "eval" / f"facts_{split}.jsonl").read_text().splitlines()
        assert lines and all(json.loads(line) for line in lines)
    capsys.readouterr()
    assert prepare.main(prepare.Settings(documents=300)) == manifest
    assert "nothing to do" in capsys.readouterr().out
    (folder / "val.parquet").write_bytes(b"cut")  # a damaged file is made again
    assert prepare.main(prepare.Settings(documents=300)) == manifest
    prepare.main(prepare.Settings(documents=200, seed=4))
    out = capsys.readouterr().out
    assert "--documents=300" in out and "--seed=0" in out and "made anew" in out
    assert sum(map(len, texts_of(folder))) == 200


def test_changed_input_is_prepared_anew_and_other_text_never_overwritten(base, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(words(1, 3000))
    prepare.main(prepare.Settings(str(path)))
    path.write_text(words(2, 3500))
    prepare.main(prepare.Settings(str(path)))
    assert "other files" in capsys.readouterr().out
    (tmp_path / "sub").mkdir()
    other = tmp_path / "sub" / "text.txt"
    other.write_text(words(3, 3000))
    for chosen in (prepare.Settings(str(other)), prepare.Settings("world", source="text")):
        with pytest.raises(common.Stop, match="holds the text of .*text.txt: .*--source=NAME"):
            prepare.main(chosen)
    (base / "data" / "notes").mkdir()
    (base / "data" / "notes" / "precious.txt").write_text("mine")
    with pytest.raises(common.Stop, match="not made from"):
        prepare.main(prepare.Settings("world", source="notes"))
    assert (base / "data" / "notes" / "precious.txt").exists()


def test_a_failure_leaves_the_old_text_whole(base, tmp_path, monkeypatch):
    prepare.main(prepare.Settings(documents=100))
    before = texts_of(base / "data" / "world")
    real, count = open, [0]

    def full(path, mode="r", *args, **options):
        count[0] += "w" in mode or "a" in mode
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", full, raising=False)
        with pytest.raises(common.Stop, match="the disk is full at .*free some space"):
            prepare.main(prepare.Settings(documents=200))
    assert texts_of(base / "data" / "world") == before
    assert [p.name for p in base.glob("data/*")] == ["world"]

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_splits", interrupt)
        with pytest.raises(common.Stop, match="stopped; run the same command again"):
            prepare.main(prepare.Settings(documents=200))
    assert texts_of(base / "data" / "world") == before


def test_leftovers_of_killed_processes_go(base):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number in (dead.pid, os.getppid()):
        (base / "data" / f".world.{number}.partial").mkdir(parents=True)
    prepare.main(prepare.Settings(documents=50))
    left = sorted(p.name for p in base.glob("data/.*"))
    assert left == [f".world.{os.getppid()}.partial"]


def test_base_directory_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(common.Stop, match="file"):
        prepare.main(prepare.Settings(documents=50))


# Hub -----------------------------------------------------------------------------------------

REPO = "karpathy/fineweb-edu-100b-shuffle"


class Hub:
    """A server laid out like the hub; `script[name]` lists what happens to the next requests."""

    def __init__(self):
        self.files = {f"shard_{i:05d}.parquet": self.shard(i) for i in range(5)}
        self.files["README.md"] = b"not a shard"
        self.script: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str]] = []  # path, Range, Authorization
        self.sizes = self.hashes = self.ranges = True
        self.redirect = ""  # another server's address, which gets the files' requests
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def shard(seed: int) -> bytes:
        return table_bytes("text", [words(1000 * seed + i, 200) for i in range(300)])

    def fetched(self) -> list[str]:
        return [path.split("/")[-1] for path, _, _ in self.requests if "/resolve/" in path]

    def send(self, request, code, body=b"", cut=None, **headers):
        request.send_response(code)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body[:cut])
        if cut is not None:
            request.close_connection = True

    def answer(self, request):
        path, _, query = request.path.partition("?")
        byte_range = request.headers.get("Range", "")
        self.requests.append((path, byte_range, request.headers.get("Authorization", "")))
        name = path.split("/")[-1]
        what = self.script[name].pop(0) if self.script.get(name) else "ok"
        if what == "drop":
            request.close_connection = True
        elif what[:3] in ("404", "401", "429", "500", "503", "416"):
            code, _, after = what.partition(" ")
            self.send(request, int(code), **({"Retry_After": after} if after else {}))
        elif what == "html":
            self.send(request, 200, b"<html>a login page</html>")
        elif path == f"/api/datasets/{REPO}/tree/main":
            self.tree(request, query)
        elif path.startswith(("/moved/", f"/datasets/{REPO}/resolve/main/")):
            self.file(request, path, name, byte_range, what)
        else:
            self.send(request, 404)

    def tree(self, request, query):
        start = int(query.partition("cursor=")[2] or 0)
        items = [{"type": "directory", "path": "old", "oid": "0" * 40}] if start == 0 else []
        for name, data in list(self.files.items())[start : start + 3]:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            item = {"type": "file", "path": name, "oid": git, "size": len(data)}
            if name.endswith(".parquet"):
                item |= {"oid": "1" * 40}
                item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
            if not self.sizes:
                item = {"type": "file", "path": name}
            items.append(item)
        headers = {}
        if start + 3 < len(self.files):  # a mirror may name the original host
            link = f"https://original.invalid{request.path.partition('?')[0]}?cursor={start + 3}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.send(request, 200, json.dumps(items).encode(), **headers)

    def file(self, request, path, name, byte_range, what):
        data = self.files[name]
        headers = {"ETag": '"abc"'}
        if self.hashes:
            digest = hashlib.sha256(data).hexdigest()
            headers = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if self.redirect and not path.startswith("/moved/"):
            return self.send(request, 302, Location=f"{self.redirect}/moved/{name}", **headers)
        if what == "wrong":
            data = data[:-5] + b"wrong"
        start = int(byte_range[6:-1]) if byte_range and self.ranges else 0
        if byte_range and self.ranges:
            if start >= len(data):
                return self.send(request, 416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if what == "slow":
            self.send(request, 200, body, cut=len(body) // 2)
            time.sleep(20)
        code = 206 if byte_range and self.ranges else 200
        self.send(request, code, body, len(body) // 2 if what == "cut" else None, **headers)


class Waits:
    """Stands for the Event that prepare.Net waits on: notes the delays instead of waiting."""

    def __init__(self):
        self.delays, self.stopped = [], False

    def wait(self, delay):
        self.delays.append(delay)
        return self.stopped

    def is_set(self):
        return self.stopped

    def set(self):
        self.stopped = True


@pytest.fixture
def hub(base, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1 << 10)
    yield server
    server.server.shutdown()
    server.server.server_close()


def quick_net(**options) -> prepare.Net:
    return prepare.Net(
        **{"backoff_s": 1.0, "timeout_s": 2.0, "tries": 4, "stopping": Waits(), **options}
    )


def fetch_shards(shards=1, workers=1, **options):
    """Run prepare on the hub; return the manifest and the delays between tries."""
    net = quick_net(**options)
    manifest = prepare.main(prepare.Settings("hub", shards=shards, workers=workers), net)
    return manifest, net.stopping.delays


def assert_same(base: Path, hub: Hub, shards: int) -> None:
    folder = base / "data" / "fineweb-edu"
    names = [f"train-{i:05d}.parquet" for i in range(shards)]
    for i, name in enumerate(names):
        assert (folder / name).read_bytes() == hub.files[f"shard_{i:05d}.parquet"]
    assert (folder / "val.parquet").read_bytes() == hub.files["shard_00004.parquet"]
    assert sorted(p.name for p in folder.glob("train-*")) == names
    assert not list(folder.glob(".*.partial"))


def test_hub_fetches_each_file_once(base, hub, capsys):
    manifest, delays = fetch_shards(2, workers=4)
    assert_same(base, hub, 2)
    assert not delays and sorted(hub.fetched()) == [f"shard_0000{i}.parquet" for i in (0, 1, 4)]
    assert manifest["files"]["val.parquet"]["documents"] == 300
    hub.requests.clear()
    assert fetch_shards(2)[0] == manifest
    assert not hub.requests and "nothing to do" in capsys.readouterr().out
    fetch_shards(3)
    assert hub.fetched() == ["shard_00002.parquet"]
    assert_same(base, hub, 3)
    hub.requests.clear()
    assert fetch_shards(1)[0]["files"].keys() == {"train-00000.parquet", "val.parquet"}
    assert_same(base, hub, 1)  # the others are kept under another name
    fetch_shards(3)
    assert_same(base, hub, 3)
    assert not hub.fetched()
    (base / "data" / "fineweb-edu" / "manifest.json").unlink()  # as after a kill
    path = base / "data" / "fineweb-edu" / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    fetch_shards(3)
    assert hub.fetched() == ["shard_00001.parquet"]
    assert_same(base, hub, 3)


def test_hub_resumes_a_cut_connection(base, hub):
    hub.script = {"shard_00000.parquet": ["cut", "drop", "cut", "ok"]}
    size = len(hub.files["shard_00000.parquet"])
    _, delays = fetch_shards()
    assert_same(base, hub, 1)
    ranges = [r for path, r, _ in hub.requests if path.endswith("shard_00000.parquet")]
    starts = [int(r[6:-1] or 0) for r in ranges]  # what is read in one block may be lost
    block = prepare.BLOCK_BYTES
    assert starts[0] == 0 and starts[1] == starts[2] == size // 2 // block * block
    assert size // 2 < starts[3] <= size * 3 // 4
    assert len(delays) == 3 and delays[1] > 1.0  # progress makes the back-off start anew


def test_hub_resumes_what_an_earlier_process_left(base, hub):
    hub.script = {"shard_00000.parquet": ["cut"]}
    with pytest.raises(common.Stop, match="failed 1 times in a row .*run the same command again"):
        fetch_shards(tries=1)
    assert len(list((base / "data" / "fineweb-edu").glob(".train-00000*.partial"))) == 1
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert any(r.startswith("bytes=") for _, r, _ in hub.requests)


def test_hub_starts_over_when_the_file_changed(base, hub):
    hub.script = {"shard_00000.parquet": ["cut"]}
    with pytest.raises(common.Stop):
        fetch_shards(tries=1)
    hub.files["shard_00000.parquet"] = hub.shard(77)
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert [r for path, r, _ in hub.requests if path.endswith("00000.parquet")] == [""]


@pytest.mark.parametrize("sizes, hashes", [(False, True), (False, False)])
def test_hub_that_hides_sizes(base, hub, sizes, hashes):
    hub.sizes, hub.hashes = sizes, hashes
    hub.script = {"shard_00000.parquet": ["ok", "cut"]}
    fetch_shards()
    assert_same(base, hub, 1)
    assert any(r.startswith("bytes=") for _, r, _ in hub.requests)


def test_hub_that_ignores_ranges(base, hub):
    hub.ranges = False
    hub.script = {"shard_00000.parquet": ["cut", "ok"]}
    fetch_shards()
    assert_same(base, hub, 1)


def test_hub_that_refuses_a_range(base, hub):
    hub.script = {"shard_00000.parquet": ["cut", "416", "ok"]}
    fetch_shards()
    assert_same(base, hub, 1)


def test_hub_backs_off(base, hub):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    hub.script = {"main": ["503", "429 7"], "shard_00000.parquet": ["503", "500", "429"],
                  "shard_00004.parquet": ["429 33", f"429 {date}", "429 1e999"]}  # fmt: skip
    _, delays = fetch_shards()
    assert_same(base, hub, 1)
    assert 0.5 <= delays[0] <= 1.5 and delays[1] == 7
    assert all(0.5 * 2**n <= delays[2 + n] <= 1.5 * 2**n for n in range(3))
    assert delays[5] == 33 and 90 < delays[6] <= 100 and len(delays) == 8


def test_hub_gives_up_in_the_end(base, hub):
    hub.script = {"shard_00000.parquet": ["503"] * 9}
    with pytest.raises(
        common.Stop, match="shard_00000.parquet failed 4 times in a row .it answered 503"
    ):
        fetch_shards()
    hub.script = {"main": ["drop"] * 9}
    with pytest.raises(common.Stop, match="failed 4 times in a row .the connection broke"):
        fetch_shards()


def test_hub_that_stalls_times_out(base, hub):
    hub.script = {"shard_00000.parquet": ["slow"]}
    fetch_shards(timeout_s=0.2)
    assert_same(base, hub, 1)


def test_hub_wrong_bytes(base, hub):
    hub.script = {"shard_00000.parquet": ["wrong", "ok"]}
    fetch_shards()
    assert_same(base, hub, 1)
    hub.script = {"shard_00001.parquet": ["wrong"] * 9}
    with pytest.raises(common.Stop, match="shard_00001.parquet gave 3 times other bytes"):
        fetch_shards(2)
    assert not list((base / "data" / "fineweb-edu").glob(".*"))
    assert not (base / "data" / "fineweb-edu" / "train-00001.parquet").exists()


def test_hub_token_stays_with_the_endpoint(base, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    other = Hub()
    hub.redirect = other.url
    hub.script = {"shard_00000.parquet": ["ok", "ok"]}
    other.script = {"shard_00000.parquet": ["cut"]}
    fetch_shards()
    assert_same(base, hub, 1)
    assert {token for _, _, token in hub.requests} == {"Bearer secret"}
    assert {token for _, _, token in other.requests} == {""} and len(other.requests) == 3
    other.server.shutdown()
    other.server.server_close()
    hub.redirect = hub.url  # another path of the same host
    fetch_shards(2)
    assert_same(base, hub, 2)


def test_hub_checks_small_files_by_gits_hash(base, hub, tmp_path):
    net = quick_net()
    remote = prepare.hub_files(net, REPO)["README.md"]
    assert len(remote.digest) == 40
    hub.script = {"README.md": ["wrong"]}
    prepare.download(net, remote, tmp_path / "new" / "README.md")
    assert (tmp_path / "new" / "README.md").read_bytes() == b"not a shard"
    assert [name for name in hub.fetched()] == ["README.md"] * 2


def test_hub_unreachable_names_the_other_choices(base):
    start = time.monotonic()
    with pytest.raises(
        common.Stop, match="cannot be reached: .*HF_ENDPOINT.*--data=world.*--data=PATH"
    ):
        prepare.main(prepare.Settings("hub"))
    assert time.monotonic() - start < 2 and not any(base.glob("data/*"))


@pytest.mark.parametrize("endpoint", ["hub.example", "http://[", "ftp://hub.example"])
def test_hub_wrong_endpoint(base, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(common.Stop, match="is no address like https"):
        prepare.main(prepare.Settings("hub"))
    prepare.main(prepare.Settings(documents=30))  # which needs no hub


def test_hub_other_answers(base, hub, monkeypatch):
    for what, sentence in (("html", "else than a hub"), ("401", "HF_TOKEN"), ("404", "not there")):
        hub.script = {"main": [what]}
        with pytest.raises(common.Stop, match=sentence):
            fetch_shards()
    with pytest.raises(common.Stop, match="has 4 train shards: --shards=4 at most"):
        fetch_shards(5)
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(common.Stop, match="GB are needed .*fewer --shards"):
            fetch_shards()
    hub.files["shard_00000.parquet"] = table_bytes("story", ["no text column"])
    with pytest.raises(common.Stop, match="no column `text`, only story"):
        fetch_shards()
    hub.files["shard_00000.parquet"] = b"no parquet at all"
    with pytest.raises(common.Stop, match="no whole parquet file"):
        fetch_shards()


def test_hub_disk_full_while_fetching(base, hub, monkeypatch):
    real = open

    def full(path, mode="r", *args, **options):
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(prepare, "open", full, raising=False)
    with pytest.raises(common.Stop, match="the disk is full"):
        fetch_shards(3, workers=2)


def test_hub_is_interrupted_and_resumed(base, hub):
    noise = [random.Random(i).randbytes(2000).hex() for i in range(1000)]
    hub.files["shard_00000.parquet"] = table_bytes("text", noise)
    hub.script = {"shard_00000.parquet": ["slow"]}
    command = [sys.executable, prepare.__file__, "--data=hub", "--shards=1", "--workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = base / "data" / "fineweb-edu"
    for _ in range(3000):
        if list(folder.glob(".*.partial")) or process.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1 and "fetching 2 of 2 shards" in out
    assert err == "prepare: stopped; run the same command again to go on\n"
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert any(r.startswith("bytes=") for _, r, _ in hub.requests)


# prepare.py: the embedded world ---------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> list[str]:
    """About 5.5 MB of text: what the smallest tier sees, at most, in its first 1.5 million tokens."""
    out, size = [], 0
    for text in prepare.world_documents(1):
        out.append(text)
        size += len(text)
        if size > 5_500_000:
            return out
    raise AssertionError("the world ended")


def test_documents_are_a_function_of_the_seed_and_grow_at_the_end() -> None:
    first = list(prepare.world_documents(7, 300))
    assert first == list(prepare.world_documents(7, 600))[:300] and len(first) == 300
    other = list(prepare.world_documents(8, 300))
    assert not set(first) & set(other)
    assert list(prepare.world_documents(7, 0)) == []


def test_documents_differ_and_keep_their_length(docs: list[str]) -> None:
    texts = list(prepare.world_documents(2, 20_000))
    assert len(set(texts)) == 20_000
    assert len(set(texts) & set(docs)) < 20  # a short rhyme or recipe may come twice
    lengths = [len(text) for text in texts]
    assert min(lengths) >= 150 and max(lengths) <= 1600
    assert 300 < sum(lengths) / len(lengths) < 600


def test_facts_are_many_and_do_not_contradict() -> None:
    facts = prepare.world_facts()
    assert 2000 <= len(facts) <= 4000
    assert len({(f.relation, f.subject) for f in facts}) == len(facts)
    assert 0.15 < sum(not f.askable for f in facts) / len(facts) < 0.25
    for fact in facts:
        text = fact.subject + fact.answer
        assert (
            fact.answer not in ("", "-")
            and text == text.strip()
            and not re.search(r"[|/{}\[\];]", text)
        ), fact
    known = {(f.relation, f.subject): f.answer for f in facts}
    for key, answer in {
        ("capital", "Kenya"): "Nairobi",
        ("atomic number", "gold"): "79",
        ("symbol", "tin"): "Sn",
        ("continent", "Peru"): "South America",
        ("currency", "Japan"): "yen",
        ("Roman", "49"): None,
        ("next", "December"): "January",
        ("previous", "Monday"): "Sunday",
        ("days", "June"): "30",
        ("planet", "Saturn"): "sixth",
        ("opposite", "cold"): "hot",
        ("German", "water"): "Wasser",
        ("atomic number", "lead"): "82",
        ("letter place", "Z"): "26",
        ("Roman", "14"): "XIV",
        ("nationality", "France"): "French",
        ("language", "Brazil"): "Portuguese",
    }.items():
        assert known.get(key) == answer, key
    assert ("continent", "Russia") not in known and ("opposite", "right") not in known


def test_every_relation_has_wordings_to_train_and_to_hold_out() -> None:
    for relation in prepare.world_relations().values():
        told, unseen = set(relation.statements), set(relation.unseen)
        leads = len(prepare.items(prepare.LEADS))
        assert len(told) >= 6 and len(told) * leads >= 12, relation.name
        assert len(told) == len(relation.statements) and not told & unseen
        ending = [w for w in relation.unseen if prepare.ends_in(w, "o")]
        assert len(ending) >= 2, relation.name
        assert len(relation.questions) >= 2 and len(relation.unseen_questions) >= 2, relation.name
        assert not set(relation.questions) & set(relation.unseen_questions)
        for fact in relation.facts:
            forms = fact.forms() | {"x": "a", "y": "b"}
            for wording in (
                *told,
                *unseen,
                *relation.follow,
                *relation.questions,
                *relation.unseen_questions,
                *relation.shared,
            ):
                assert "{" not in wording.format_map(forms), wording


@pytest.mark.parametrize("split", ["trained", "unseen"])
def test_prompts_ask_for_one_answer(split: str) -> None:
    prompts = list(prepare.fact_prompts(split))
    facts = prepare.world_facts()
    assert len(facts) <= len(prompts) <= 2 * len(facts)
    answers = collections.defaultdict(set)
    for p in prompts:
        answers[p["prompt"].lower()].add(p["answer"])
        assert p["prompt"] == p["prompt"].strip() and re.fullmatch(r" \S(.*[^.])?", p["answer"]), p
        assert p["answer"][1:] in p["accept"]
    assert not [p for p, a in answers.items() if len(a) > 1]
    relations = {p["relation"] for p in prompts}
    assert relations == set(prepare.world_relations())


def test_unseen_prompts_occur_in_no_text(docs: list[str]) -> None:
    text = "\n".join(docs[::3]).lower()
    assert [
        p["prompt"] for p in prepare.fact_prompts("unseen") if p["prompt"].lower() in text
    ] == []


def test_unseen_questions_and_unasked_facts_occur_in_no_text(docs: list[str]) -> None:
    told = {
        s.strip().lower().rstrip(",.")
        for d in docs
        for s in re.split(r'(?<=[.?!])\s|"|\n|Question: |Q: ', d)
    }
    asked = 0
    for relation in prepare.world_relations().values():
        for fact, forward in itertools.product(relation.facts, (True, False)):
            forms = fact.forms()
            for unseen in (True, False):
                for question in (
                    relation.askings(forward, unseen) if forward or relation.unique(fact) else ()
                ):
                    found = prepare.sentence(question.format_map(forms)).lower().rstrip(".") in told
                    asked += found
                    assert not found or (fact.askable and not unseen), (question, fact)
    assert asked > 3000


def test_every_fact_is_stated_often(monkeypatch: pytest.MonkeyPatch) -> None:
    stated, distinct, clause = (
        collections.Counter(),
        collections.defaultdict(set),
        prepare.FactWriter.clause,
    )

    def count(self: prepare.FactWriter, card: prepare.Card) -> str:
        text = clause(self, card)
        stated[card[0]] += 1
        distinct[card[0]].add(text)
        return text

    monkeypatch.setattr(prepare.FactWriter, "clause", count)
    size = 0
    for text in prepare.world_documents(4):
        size += len(text)
        if size > 5_500_000:
            break
    counts = sorted(stated[fact] for fact in prepare.world_facts())
    assert counts[0] >= 9 and counts[len(counts) // 20] >= 12 and counts[len(counts) // 2] >= 16, (
        counts[:40]
    )
    assert min(len(distinct[fact]) for fact in prepare.world_facts()) >= 5


def test_no_held_out_pair_is_worked(docs: list[str]) -> None:
    text = " ".join(docs).replace(",", "")
    words = {prepare.number_word(n): n for n in range(145)}
    number = r"(\d+|" + "|".join(sorted(words, key=len, reverse=True)) + r")"
    pattern = rf"\b{number} (?:\+|-|x|plus|minus|times|divided by) {number}\b"
    pairs = [
        [int(w) if w.isdigit() else words[w.lower()] for w in m]
        for m in re.findall(pattern, text, re.IGNORECASE)
    ]
    pairs += [[int(a), int(b)] for a, b in re.findall(r"dd (\d+) (?:and|to) (\d+)", text)]
    pairs += [[int(a), int(b)] for a, b in re.findall(r"(\d+) boxes of (\d+)", text)]
    pairs += [[int(b), int(a)] for a, b in re.findall(r"ake (\d+) away from (\d+)", text)]
    assert len(pairs) > 3000
    assert [p for p in pairs if prepare.held_out_pair(*p)] == []
    assert (
        0.07
        < sum(prepare.held_out_pair(a, b) for a in range(100) for b in range(a + 1)) / 5050
        < 0.13
    )


def test_held_out_words_are_not_spelled(docs: list[str]) -> None:
    text = "\n".join(docs).lower()
    held = [w for w in prepare.spelling_words() if prepare.held_out_word(w)]
    assert len(held) >= 80 and len(prepare.shown_words()) >= 700
    spelled = {s.replace("-", "") for s in re.findall(r"\b[a-z](?:-[a-z])+\b", text)}
    assert not spelled & set(held) and len(spelled) > 700
    phrases = set(re.findall(r"the word \w+ has|letter of \w+ is", text))
    for word in held:
        assert not {f"the word {word} has", f"letter of {word} is"} & phrases, word


def test_names_and_parts_of_problems_are_disjoint(docs: list[str]) -> None:
    train, test = set(prepare.GIRLS + prepare.BOYS), set(prepare.TEST_GIRLS + prepare.TEST_BOYS)
    assert len(train) >= 100 and len(test) >= 40 and not train & test
    assert not set(prepare.GIRLS) & set(prepare.BOYS)
    found = set(re.findall(r"[A-Z][a-z]+", " ".join(docs)))
    assert train <= found and not test & found, test & found
    sets = collections.defaultdict(set)
    for verb in prepare.count_verbs():
        sets[verb["set"]].add(verb["base"])
        assert f"o {verb['base']} " in " ".join(docs)
    assert set(sets) == {"shown", "practised", "test"} and min(map(len, sets.values())) >= 8
    assert all(not a & b for a, b in itertools.combinations(sets.values(), 2))


def test_split_is_a_function_of_the_item() -> None:
    assert 70 < sum(prepare.held_out(f"item {i}") for i in range(1000)) < 130
    assert 160 < sum(prepare.held_out(f"item {i}", 5) for i in range(1000)) < 240
    assert prepare.held_out_pair(12, 37) == prepare.held_out_pair(37, 12)


def test_english() -> None:
    assert [
        prepare.with_article(w) for w in ("owl", "unicorn", "hour", "dog", "ewe", "ukulele")
    ] == ["an owl", "a unicorn", "an hour", "a dog", "a ewe", "a ukulele"]
    assert [
        prepare.plural(w)
        for w in ("fox", "wolf", "city", "key", "piece of clothing", "mouse", "fly", "sheep")
    ] == ["foxes", "wolves", "cities", "keys", "pieces of clothing", "mice", "flies", "sheep"]
    assert (
        prepare.number_word(342) == "three hundred and forty-two"
        and prepare.number_word(1005) == "one thousand and five"
    )
    assert [prepare.roman(n) for n in (4, 9, 14, 40, 90, 1999)] == [
        "IV",
        "IX",
        "XIV",
        "XL",
        "XC",
        "MCMXCIX",
    ]
    assert prepare.join_and(["a"]) == "a" and prepare.join_and([1, 2, 3]) == "1, 2 and 3"


def test_text_reads_well(docs: list[str]) -> None:
    text = "\n".join(docs)
    for wrong in (
        r"\.\.",
        r" ,",
        r"  ",
        r"\ba [aeio][a-z]",
        r"\ban [bcdfgjklmnpqrstvwxyz][a-z]",
        r"\{",
        r"\}",
        r"\bis are\b",
        r"\bPeople from [A-Z]\w+ is\b",
        r"\ba a\b",
        r"\bthe the\b",
        r"\bThe The\b",
        r"\?\.",
        r"[a-z]\n[a-z]",
    ):
        found = [m.group(0) for m in re.finditer(r".{0,30}" + wrong + r".{0,20}", text)]
        found = [
            f
            for f in found
            if not re.search(
                r"\ba (one|eu|ewe|in |is |of |ou|as)|letter|[Tt]he word|a, |s a [aeio]|with a and",
                f,
            )
        ]
        assert found == [], (wrong, found[:5])
    lines = [line for line in text.split("\n") if line]
    assert all(line[0] in '"-' or line[0].isupper() or line[0].isdigit() for line in lines)


def test_stories_keep_their_state() -> None:
    rng = random.Random(3)
    for _ in range(300):
        teller = prepare.Teller(rng, prepare.TEST_GIRLS, prepare.TEST_BOYS)
        story = teller.tell()
        assert set(teller.he) <= set(prepare.TEST_GIRLS + prepare.TEST_BOYS)
        for thing, name in story.holder.items():
            assert story.place[thing] == story.place[name], (thing, story)
        assert set(story.place) == {*teller.he, *teller.reason}


# train_tokenizer.py --------------------------------------------------------------------------


def test_the_tokenizer_stage_trains_saves_measures_and_skips(text_source, base_dir, capsys):
    chosen = train_tokenizer.Settings(tag="a", vocab_size=300)
    measures = train_tokenizer.main(chosen)
    assert measures["vocab_size"] == 300 and measures["bytes_per_token"] > 1
    assert "bytes per token" in capsys.readouterr().out
    assert train_tokenizer.main(chosen) == measures
    assert "is there" in capsys.readouterr().out
    with pytest.raises(common.MissingInput, match="--restart"):
        train_tokenizer.main(dataclasses.replace(chosen, vocab_size=320))
    again = train_tokenizer.main(dataclasses.replace(chosen, vocab_size=320, restart=True))
    assert again["vocab_size"] == 320


def test_limits_of_text_and_vocabulary(text_source):
    texts = list(train_tokenizer.texts_up_to(text_source, 1000, 30))
    assert sum(map(len, texts)) == 1000 and max(map(len, texts)) == 30
    assert train_tokenizer.fit_vocab_size(65536, 2_000_000) < 65536
    assert train_tokenizer.fit_vocab_size(65536, 2 * 10**9) == 65536
    assert train_tokenizer.fit_vocab_size(300, 10**9) == 300
    with pytest.raises(ValueError, match="265 or more"):
        train_tokenizer.Settings(vocab_size=264)


def test_the_source_is_found_or_asked_for(base_dir):
    with pytest.raises(common.MissingInput, match="prepare.py"):
        train_tokenizer.find_source("")
    write_texts("one", ["a text"])
    assert train_tokenizer.find_source("") == "one"
    write_texts("two", ["a text"])
    with pytest.raises(common.MissingInput, match="--source=one|two"):
        train_tokenizer.find_source("")


# pretrain.py ---------------------------------------------------------------------------------


def tiny_pretrain(**changes):
    return pretrain.Settings(
        **{"tag": "t", "depth": 1, "head_dim": 32, "max_seq_len": 32, "num_iterations": 6,
           "total_batch_size": 96, "device_batch_size": 2, "save_every": 2, "log_every": 1,
           "eval_every": 3, "eval_tokens": 200, "device": "cpu", "dtype": "float32",
           "keep": 0, **changes}
    )  # fmt: skip


def base_losses(tag="t"):
    lines = [json.loads(x) for x in (common.run_dir(tag) / "metrics.jsonl").open()]
    return {x["step"]: x["loss"] for x in lines if x["stage"] == "base" and "loss" in x}


def final_weights(tag, step):
    folder = common.find_checkpoint(tag, "base", step)
    return common.load_file(folder, "model.pt", CPU)


@pytest.fixture
def tiny_run(text_source, tokenizer):
    """A data source and a run "t" with a tokenizer."""
    for tag in ("t", "u"):
        tokenizer.info = {"source": text_source, "settings": {}, "measures": {}}
        tokenizer.save(common.run_dir(tag) / "tokenizer")
    return text_source


def test_pretraining_learns_saves_and_says_when_it_is_finished(tiny_run, capsys):
    metrics = pretrain.main(tiny_pretrain(num_iterations=40, eval_every=20, matrix_lr=0.05))
    assert metrics["step"] == 40 and base_losses()[40] < base_losses()[1] - 0.5
    out = capsys.readouterr().out
    assert "mfu" in out and "compile: off" in out and "left" in out
    pretrain.main(tiny_pretrain(num_iterations=40, eval_every=20, matrix_lr=0.05))
    assert "finished" in capsys.readouterr().out
    with pytest.raises(common.MissingInput, match="--depth=1, not 2"):
        pretrain.main(tiny_pretrain(num_iterations=40, depth=2, matrix_lr=0.05))


def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tiny_run):
    pretrain.main(tiny_pretrain(tag="u"))
    pretrain.main(tiny_pretrain())
    for step in (6, 4):  # as if killed after step 2, half of a later save written
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    (common.run_dir("t") / "base" / ".step-000004.partial").mkdir()
    pretrain.main(tiny_pretrain())
    a, b = final_weights("u", 6), final_weights("t", 6)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert base_losses("u") == base_losses("t")
    lines = [json.loads(x) for x in (common.run_dir("t") / "metrics.jsonl").open()]
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps == sorted(set(steps)), "the log repeats no step"


def test_the_final_checkpoint_is_saved_before_any_evaluation(tiny_run, monkeypatch):
    def crash(*args):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr(pretrain, "evaluate_bpb", crash)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        pretrain.main(tiny_pretrain(eval_every=0, sample_every=0) if False else
                      tiny_pretrain(num_iterations=2, eval_every=2, save_every=0))  # fmt: skip
    assert not common.list_checkpoints("t", "base"), "the crash came before the first step"
    calls = []

    def crash_at_the_end(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("evaluation failed")
        return 1.0, 1

    monkeypatch.setattr(pretrain, "evaluate_bpb", crash_at_the_end)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        pretrain.main(tiny_pretrain(num_iterations=2, eval_every=2, save_every=0))
    assert common.find_checkpoint("t", "base").name == "step-000002"


def test_micro_batches_change_nothing_but_rounding(tiny_run):
    pretrain.main(tiny_pretrain(tag="u", device_batch_size=3))
    pretrain.main(tiny_pretrain(device_batch_size=1))
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=2e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks_follow_one_rank_step_by_step(tiny_run, world_size):
    pretrain.main(tiny_pretrain(tag="u"))
    options = dataclasses.asdict(tiny_pretrain())
    run_ranks(world_size, f"pretrain.main(pretrain.Settings(**{options!r}))")
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=2e-4)
    for step in (6, 4):
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    pretrain.main(tiny_pretrain())  # one rank goes on from what several saved
    for step, loss in base_losses("t").items():
        assert loss == pytest.approx(a[step], abs=2e-4)


def test_a_signal_saves_and_exits_0_and_the_run_goes_on(tiny_run):
    settings = {**dataclasses.asdict(tiny_pretrain(num_iterations=100_000, eval_every=0,
                                                   save_every=0)), "keep": 2}  # fmt: skip
    code = f"import pretrain; pretrain.main(pretrain.Settings(**{settings!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "base 00003" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "run the same command again" in out
    step = int(common.find_checkpoint("t", "base").name[-6:])
    assert step >= 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"total_batch_size": 100}, "would"),
        ({"depth": 0}, "--depth"),
        ({"depth": 999}, "--depth"),
        ({"head_dim": 33}, "must divide"),
        ({"n_kv_head": 3}, "must divide"),
        ({"window_pattern": "Q"}, "letters"),
        ({"tag": "../x"}, "--tag"),
        ({"lr_scale": 0.0}, "--lr-scale"),
        ({"warmdown": 1.5}, "--warmdown"),
    ],
)
def test_wrong_pretraining_settings_are_value_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_pretrain(**changes)


def test_the_horizon_follows_from_steps_flops_or_ratio():
    def horizon(**changes):
        chosen = pretrain.Settings(depth=20, **changes)
        return pretrain.derive_horizon(chosen, pretrain.model_config(chosen, 65536))

    d20 = horizon()
    assert d20.batch_rows * 2048 == 2**19 and 20_000 < d20.num_steps < 22_000
    assert horizon(num_iterations=300).num_steps == 300
    assert horizon(num_iterations=21_362).batch_rows == d20.batch_rows
    config = pretrain.model_config(pretrain.Settings(depth=20), 65536)
    flops = horizon(target_flops=1e19).tokens(2048) * config.flops_per_token()
    assert flops == pytest.approx(1e19, rel=0.01)
    half = horizon(target_param_data_ratio=10.0)
    assert half.tokens(2048) == pytest.approx(d20.tokens(2048) / 2, rel=0.01)


def test_the_plan_touches_neither_data_nor_device(base_dir, capsys):
    numbers = pretrain.main(
        pretrain.Settings(depth=20, plan=True, plan_device="H100", plan_count=8)
    )
    out = capsys.readouterr().out
    assert numbers["parameters"] == 2 * 65536 * 1280 + 20 * 12 * 1280**2
    assert 11e9 < numbers["tokens"] < 11.5e9 and 2 * 3600 < numbers["seconds"] < 6 * 3600
    assert 50 < numbers["cost_usd"] < 150
    for word in ("parameters", "FLOPs", "tokens", "memory", "time", "cost"):
        assert word in out
    assert not list(base_dir.iterdir())


# evaluate.py ---------------------------------------------------------------------------------


def test_the_interval_is_wilsons():
    low, high = evaluate.wilson_interval(8, 10)  # the worked example of many textbooks
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert evaluate.wilson_interval(0, 20)[0] == 0 and evaluate.wilson_interval(20, 20)[1] == 1
    assert evaluate.wilson_interval(0, 0) == (0, 1)


def test_batched_greedy_completions_equal_the_engines(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    prompts = ["The cat", "A", "Once upon a time", "The dog", "word " * 4]
    got = dict(evaluate.complete_greedily(model, tokenizer, prompts, 6))
    engine = common.Engine(model, tokenizer)
    for i, prompt in enumerate(prompts):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        expected = engine.generate(ids, common.Sampling(max_tokens=6, temperature=0))
        assert got[i] == tokenizer.decode(list(expected))


@pytest.mark.parametrize(
    ("text", "good"),
    [(" Paris.", True), (" Paris", True), (" Parisian", False), (" the Paris", False),
     ("Paris, France", True), (" 12", False), (" Lyon.", True), (" e.", True), (" egg", False)],
)  # fmt: skip
def test_an_answer_comes_first_and_is_whole_words(text, good):
    assert evaluate.starts_with_answer(text, [" Paris", "Lyon", "e"]) == good


def test_evaluation_measures_saves_and_skips(tiny_run, capsys):
    pretrain.main(tiny_pretrain())
    folder = common.data_dir(tiny_run) / "eval"
    fact = {"prompt": "The cat", "answer": " sat", "accept": [" sat"], "relation": "r"}
    folder.mkdir()
    (folder / "facts_trained.jsonl").write_text(f"{json.dumps(fact)}\n" * 5)
    options = evaluate.Settings(tag="t", device="cpu", dtype="float32")
    report = evaluate.main(options)
    assert {"val_bpb", "train_bpb", "facts_trained"} <= report["tasks"].keys()
    assert report["tasks"]["facts_trained"]["items"] == 5 and len(report["samples"]) == 10
    texts = list(common.read_texts(common.list_shards(tiny_run, "val")[0]))
    assert report["tasks"]["val_bpb"]["items"] == len(texts), "a full pass"
    saved = json.loads((common.run_dir("t") / "eval" / "base.json").read_text())
    assert saved == report
    before = time.perf_counter()
    assert evaluate.main(options) == report and time.perf_counter() - before < 5


# chat.py -------------------------------------------------------------------------------------


def test_chat_completes_from_a_flag_and_from_a_pipe(tiny_run, capsys, monkeypatch):
    pretrain.main(tiny_pretrain())
    capsys.readouterr()
    chat.main(chat.Settings(tag="t", prompt="The cat", temperature=0.0, max_tokens=5, device="cpu"))
    first = capsys.readouterr().out
    assert first.startswith("The cat") and first.endswith("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n\nA dog\n"))
    chat.main(chat.Settings(tag="t", temperature=0.0, max_tokens=5, device="cpu"))
    out = capsys.readouterr().out
    assert out.startswith(first) and "A dog" in out
    with pytest.raises(ValueError, match="temperature"):
        chat.Settings(temperature=-1.0)
