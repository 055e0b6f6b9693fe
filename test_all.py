"""All tests: CPU, offline, a few minutes. Run with `bash run.sh test [pytest options]`.

Marks: gpu (needs a CUDA device), slow (minutes), browser (needs Chromium). Parts that need the
public data in ../shared/data skip where it is absent. Each part is held against an independent
oracle: a plain version, torch's own, transformers, regex, another batch shape, an unbroken run.
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import html.parser
import http.client
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import unittest.mock
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nanochat_bpe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import requests
import tiktoken
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chat
import common
import evaluate
import midtrain
import prepare
import pretrain
import rl
import serve
import sft
import train_tokenizer

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
STAGES = [
    "prepare",
    "train_tokenizer",
    "pretrain",
    "midtrain",
    "sft",
    "rl",
    "evaluate",
    "chat",
    "serve",
]
CPU = torch.device("cpu")
ALONE = common.Run("base", "t", None, CPU, 0, 1)

settings.register_profile(  # on a machine of any pace; what CI's says of chance stays
    "any pace", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any pace")

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


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Let what the tests start hear Ctrl-C: a shell's background jobs inherit that it is ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def plain_environment():
    """Drop what would make the project behave otherwise than the tests expect."""
    for name in ("NANOCHAT_API_KEY", "NANOCHAT_MIRROR", "RANK", "WORLD_SIZE", "LOCAL_RANK",
                 "LOCAL_WORLD_SIZE"):  # fmt: skip
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


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


def until(condition, seconds=30):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def be_rank(env, out, code):
    """Run code as one of torchrun's processes, in one that has imported torch before."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(HERE)
    with open(out, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    names = {"rank": int(env["RANK"]), "sys": sys, "test_all": sys.modules[__name__]}
    names |= {module.__name__: module for module in (common, evaluate, midtrain, pretrain, rl, sft)}
    names |= {"os": os, "torch": torch}
    if "main(" not in code:
        dist.init_process_group("gloo")
    exec(code, names)  # noqa: S102  # a test wrote it
    if "main(" not in code:  # a group that is left alone can abort the process at its end
        dist.destroy_process_group()


def run_ranks(world_size, code, timeout_s=120, end=0):
    """Run code in world_size processes as torchrun starts them; `rank` and gloo are at hand.

    Each has to end with exit code `end`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    port, processes = str(free_port()), []
    with tempfile.NamedTemporaryFile() as out:
        for rank in range(world_size):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                   "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            what = (env, out.name, textwrap.dedent(code))
            processes.append(context.Process(target=be_rank, args=what))
            processes[-1].start()
        for process in processes:
            process.join(timeout_s)
            process.kill()
        print(out.read().decode(errors="replace"))
    assert [process.exitcode for process in processes] == [end] * world_size


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


def test_importing_prints_nothing_and_loads_no_compiler(tmp_path):
    code = f"""
import sys, torch
before = set(sys.modules)
import {", ".join(["common", *STAGES])}
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
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Compare):
            for side in map(ast.unparse, (node.left, *node.comparators)):
                assert not re.fullmatch(r"(str\()?([\w.]+\.)?device\)?", side), ast.unparse(node)


def test_every_command_in_the_readme_parses():
    text = (HERE / "README.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:python|torchrun[^\n`#]*?) (\w+)\.py([^\n`#|]*)", text)
    parsed = 0
    for name, rest in commands:
        if name in STAGES:
            cls = importlib.import_module(name).Settings
            rest = rest.replace("~/my/chats.jsonl", str(HERE / "README.md"))
            rest = re.sub("(' *|\" & done.*)$", "", rest)  # the end of a shell's own words
            words = shlex.split(rest.replace("~/my/notes", str(HERE)))
            assert common.parse_settings(cls, "", words), rest
            parsed += 1
    assert parsed >= 20


def run_sh(*words, code=0):
    """Run run.sh; return what it prints or, where it fails with a code, its one sentence."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    done = subprocess.run(
        [bash, "run.sh", *words], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert not code or (done.stderr.count("\n") == 1 and not done.stdout), done.stderr
    return done.stderr if code else done.stdout


def commands(*words):
    """List the commands of a dry run of run.sh, the name of a stage and its settings each."""
    lines = re.findall(r"(\w+)\.py(.*)$", run_sh("--dry-run", *words), re.MULTILINE)
    classes = {name: importlib.import_module(name).Settings for name in STAGES}
    return [(name, common.parse_settings(classes[name], "", shlex.split(rest)))
            for name, rest in lines if name in classes]  # fmt: skip


def commands_of(stage, *words):
    return [settings for name, settings in commands(*words) if name == stage]


TIERS = ["cpu", "cpu-bf16", "cpu-fast", "laptop", "mps", "gpu1", "8xa6000", "8xh100", "8xh200"]


def test_every_action_and_tier_of_run_sh_prints_its_commands():
    for words in ["test", "bench", "bench learn", "bench gpu", "setup"]:
        commands(*words.split())
    for tier in TIERS:
        found = commands(f"--tier={tier}")
        names = [name for name, _ in found if name != "prepare"]
        chat = [word for name in ("midtrain", "sft", "rl") for word in (name, "evaluate")]
        base = ["pretrain", "train_tokenizer", "pretrain", "evaluate"]
        assert names == [*base, *chat, "evaluate"]  # the first pretrain is the plan
        long = 384 if TIERS.index(tier) >= TIERS.index("gpu1") else rl.Settings().max_tokens
        assert [settings.max_tokens for name, settings in found if name == "rl"] == [long]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tset"], "tset is not an action; choose one of: all setup"),
        (["learn"], "learn follows bench"),
        (["--tier=cpuu"], "--tier=cpuu is not a tier; choose one of: cpu cpu-bf16 cpu-fast"),
        (["--data=wrld"], "--data=wrld: no such file or folder, nor world, hub or climbmix"),
        (["--conversations=nowhere.jsonl"], "no such file, nor world or hub"),
        (["setup", "--teir=cpu"], "--teir is none of pretrain.py's flags .*--dry-run --tier"),
        (["--teir", "cpu"], "--teir is none of pretrain.py's flags .*--dry-run --tier"),
        (["--tag=x", "--no.depth=3"], "--no.depth is none of pretrain.py's flags"),
        (["rl:--num-step=3"], "--num-step is none of rl.py's flags"),
        (["mid:--learn-none"], "--learn-none is none of midtrain.py's flags"),
        (["prepare:--sed=3"], "--sed is none of prepare.py's flags"),
        (["eval:--cost=3"], "--cost is none of evaluate.py's flags"),
        (["--shards"], "--shards needs a value"),
        (["lock"], "lock has no --dry-run"),
    ],
)
def test_a_wrong_word_of_run_sh_is_one_sentence_before_the_set_up(words, said):
    assert re.search(said, run_sh("--dry-run", *words, code=2))


@pytest.mark.parametrize(
    ("cards", "tier", "flags"),
    [
        ([24_564], "gpu1", "--depth=10"),
        ([49_140] * 8, "8xa6000", "--depth=16"),
        ([81_559] * 8, "8xh100", "--depth=20"),
        ([143_771] * 8, "8xh200", "--depth=32"),
        ([143_771] * 4, "8xh100", "--depth=20"),
        ([81_559, 24_564], "gpu1", "--depth=10"),
        ([6_144], "laptop", "--depth=4 .*--num-iterations=2400 .*--device-batch-size=8"),
    ],
)
def test_run_sh_takes_the_tier_that_fits_the_cards(tmp_path, monkeypatch, cards, tier, flags):
    if sys.platform == "darwin":
        pytest.skip("run.sh takes mps there")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo {mib}\n" for mib in cards))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    out = run_sh("--dry-run")
    assert re.search(f"pretrain.py --tag=main .*{flags}", out)
    assert out == run_sh("--dry-run", f"--tier={tier}")
    small = "pretrain.py --tag=[a-z]+ .*--depth=4 .*--num-iterations=2400"
    assert re.search(small, run_sh("--dry-run", "--data=world")), "little text, whatever the card"
    assert re.search(flags, run_sh("--dry-run", "--data=world", f"--tier={tier}"))
    ranks = f"--nproc_per_node={len(cards)} --max-restarts=3 pretrain.py"
    assert (ranks in out) == (len(cards) > 1) and f"--plan-count={len(cards)}" in out
    if len(cards) == 8:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert "--nproc_per_node=2 --max-restarts=3 pretrain.py" in run_sh("--dry-run")
        smi.write_text("#!/bin/sh\nexit 9\n")  # no driver
        monkeypatch.setenv("NANOCHAT_PYTHON", "false")
        assert "wants GPUs, and nvidia-smi shows none" in run_sh(f"--tier={tier}", code=2)


@pytest.mark.parametrize(
    ("features", "tier"),
    [
        ("avx2", "cpu"),
        ("avx2 avx_vnni", "cpu"),
        ("avx512_vnni avx512_bf16", "cpu-bf16"),
        ("avx512_bf16 amx_bf16", "cpu-fast"),
        ("avx_vnni avx512_bf16", "cpu-fast"),
    ],
)
def test_run_sh_takes_the_tier_that_fits_the_processor(tmp_path, monkeypatch, features, tier):
    if sys.platform == "darwin":
        pytest.skip("run.sh takes mps there")
    grep = shutil.which("grep")
    flags = f'case "$*" in *cpuinfo) echo "{features}" | {grep} "$1" "$2"; exit;; esac'
    stubs = {"nvidia-smi": "exit 9", "grep": f'{flags}\nexec {grep} "$@"'}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run_sh("--dry-run") == run_sh("--dry-run", f"--tier={tier}")


def test_run_sh_gives_the_name_to_what_makes_the_conversations():
    flags = ["--name=Ada", "--num-conversations=9"]
    for talks in ("world", "hub", "README.md"):
        words = [*flags, "--data=.", f"--conversations={talks}"]
        text, chats = commands_of("prepare", *words)
        assert Path(text.data).samefile(HERE) and not text.conversations
        assert chats.name == "Ada" and Path(chats.conversations or "world").name == talks
        assert talks != "world" or chats.num_conversations == 9
    (world,) = commands_of("prepare", "--tier=cpu", *flags, "prepare:--seed=3", "--seed=4")
    assert (world.data, world.name, world.num_conversations) == ("world", "Ada", 9)
    assert world.seed == 3
    made = commands_of("prepare", "--tier=8xh100", *flags)
    assert [(s.data, s.conversations) for s in made] == [("hub", ""), ("world", "hub")]
    assert made[1].name == "Ada"
    text, chats = commands_of("prepare", "--tier=cpu", *flags, "--conversations=hub")
    assert text.num_conversations == 9 and (text.name, chats.name) == ("Nano", "Ada")


def test_run_sh_names_the_text_alike_in_all_stages(tmp_path):
    def sources(*words):
        places = {"prepare": 0, "train_tokenizer": 0, "pretrain": 1}  # after the plan
        return {commands_of(name, *words)[i].source for name, i in places.items()}

    names = {"Downloads": "downloads-files", "chat": "chat-files", "eval": "eval-files",
             "My Books.v2": "my-books"}  # fmt: skip
    for name, source in names.items():
        (tmp_path / name).mkdir()
        assert sources(f"--data={tmp_path / name}") == {source}
        assert prepare.Settings(str(tmp_path / name)).source == source
    assert sources("--data=.", "--source=mine") == {"mine"}
    assert sources("--data=world", "--tier=gpu1", "--source=mine") == {"mine"}
    (mid,) = commands_of("midtrain", "--tier=cpu", "--source=mine")
    assert mid.chats == "mine"  # the world's conversations are written with its text
    others = set()
    for name in ("文本", "книги"):
        (tmp_path / name).mkdir()
        (source,) = set(
            re.findall(r"--source=(\S+)", run_sh("--dry-run", f"--data={tmp_path / name}"))
        )
        others.add(source)
    assert len(others) == 2 and all(source.startswith("text-") for source in others)


def test_run_sh_gives_its_flags_to_all_evaluations():
    words = ["--tier=cpu", "eval:--run-code", "eval:--cost-per-hour=24"]
    found = commands_of("evaluate", *words)
    assert [s.stage for s in found[:4]] == ["base", "mid", "sft", "rl"] and found[4].report
    assert all(s.run_code and s.cost_per_hour == 24 for s in found)
    (learn,) = commands_of("evaluate", "bench", "learn", "eval:--bench-seconds=5")
    assert learn.bench_seconds == 5


def test_run_sh_runs_rl_where_ones_own_conversations_hold_problems(base_dir):
    words = ["--data=.", "--conversations=README.md", "--tag=x"]
    assert commands_of("sft", *words) and not commands_of("rl", *words)
    (base_dir / "data" / "x-chat").mkdir(parents=True)
    (base_dir / "data" / "x-chat" / "rl.jsonl").write_text("{}")  # prepare.py found some
    assert commands_of("rl", *words) and commands_of("evaluate", *words)[-2].stage == "rl"


def test_run_sh_killed_in_pretraining_ends_as_the_unbroken_run(base_dir, tmp_path, monkeypatch):
    draw = random.Random(0)
    (tmp_path / "tale.txt").write_text("".join(draw.choices(SENTENCES, k=3000)))
    monkeypatch.setenv("NANOCHAT_PYTHON", sys.executable)
    flags = ["--depth=2", "--max-seq-len=64", "--total-batch-size=256", "--device-batch-size=2",
             "--num-iterations=100", "--save-every=10", "--eval-every=0", "--bigram-steps=5",
             "--compile=no", "--device=cpu", "--dtype=float32"]  # fmt: skip
    words = ["--tier=cpu", f"--data={tmp_path / 'tale.txt'}", "--tag=broken", "--vocab-size=300",
             "eval:--device=cpu", "eval:--task=bpb", *flags]  # fmt: skip
    run_sh("--dry-run", *words)  # skips where there is no bash
    process = subprocess.Popen(
        ["bash", "run.sh", *words], cwd=HERE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not common.list_checkpoints("broken", "base") and process.poll() is None:
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    steps = [path.name for path in common.list_checkpoints("broken", "base")]
    assert steps and "step-000100" not in steps
    out = run_sh(*words)
    assert "prepare: " in out and "nothing to do" in out and "going on from " in out
    assert "have the model complete a text" in out
    assert (common.run_dir("broken") / "report.md").exists()
    run = common.run_dir("unbroken")
    shutil.copytree(common.run_dir("broken") / "tokenizer", run / "tokenizer")
    whole = ["--tag=unbroken", "--source=tale", *flags]
    # which dtype is fast for Muon is timed: here it is what it was there
    used = common.read_meta(common.find_checkpoint("broken", "base"))["muon_dtype"]
    monkeypatch.setattr(pretrain, "pick_dtype", lambda _, name="": getattr(torch, name or used))
    pretrain.main(common.parse_settings(pretrain.Settings, "", whole))
    a, b = (final_weights(tag, 100) for tag in ("broken", "unbroken"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


@settings(max_examples=1500)
@given(TEXTS)
@example("")
@example("'ſtuff I'LL we've THEY'RE 'lL'vE'Re")
@example("a  b   \n\n  c\r\n\t d    ")
@example("12345 67٣٣٣ ½½½")
def test_split_is_the_pattern_by_regex(text):
    text = "".join(c for c in text if c not in characters_of_newer_unicode())
    assert nanochat_bpe.split(text) == regex.findall(nanochat_bpe.PATTERN, text)


@settings(max_examples=300)
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


@settings(max_examples=200)
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


PEAK = """
import resource
def peak():  # Linux's getrusage counts the process that started this one, too
    try:
        return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


def test_text_is_streamed():
    """200 MB pass through a generator and leave no trace in the memory of the process."""
    program = """if True:
        import itertools, random, nanochat_bpe
        letters = [*b"etaoinshrdlu    "] * 16
        def documents():
            for i in range(200):
                yield random.Random(i % 3).randbytes(1_000_000).translate(bytes(letters)).decode()
        nanochat_bpe.train(itertools.islice(documents(), 9), 300, 2)
        before = peak()
        nanochat_bpe.train(DOCUMENTS, 300, 2)
        print(peak() - before)
    """

    def growth(texts):
        code = PEAK + program.replace("DOCUMENTS", texts)
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        return int(output) / (1024 if sys.platform == "darwin" else 1)

    assert growth("documents()") < 30_000
    assert growth("[*documents()]") > 150_000, "it would be seen"


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
            assert time.perf_counter() - started < 60  # nothing else ends it
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
import gzip, json, pathlib, sys, time
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
print(time.perf_counter() - start, peak())
"""


@pytest.mark.slow
def test_training_is_faster_than_other_packages_at_no_more_memory():
    pytest.importorskip("rustbpe")
    pytest.importorskip("tokenizers")
    if not (SHARED / "text").is_dir():
        pytest.skip(f"{SHARED} is not there")
    runs = collections.defaultdict(list)
    for package in [*TRAINERS] * 3:
        code = PEAK + RACE.format(package=package, call=TRAINERS[package])
        out = subprocess.run([sys.executable, "-c", code, str(SHARED / "text")], check=True,
                             capture_output=True, env={**os.environ, "RAYON_NUM_THREADS": "2"})  # fmt: skip
        runs[package].append([float(word) for word in out.stdout.split()])
    seconds, memory = ({p: sorted(r[i] for r in runs[p])[1] for p in runs} for i in (0, 1))
    print(seconds, memory)
    assert seconds["rustbpe"] >= 4 * seconds["nanochat_bpe"]
    assert seconds["tokenizers"] >= 8 * seconds["nanochat_bpe"]
    assert memory["nanochat_bpe"] <= memory["rustbpe"]


# 8. Settings, errors, log: formats ------------------------------------------------------------


def test_written_beside_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), common.written_beside(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    folder, replace_ = tmp_path / "a", os.replace
    folder.mkdir()
    (folder / "old").touch()

    def fail(source, target):
        if ".old." in str(target) or ".old." in str(source):
            return replace_(source, target)
        raise OSError(errno.EIO, "it broke")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="it broke"), common.written_beside(folder) as beside:
            beside.mkdir()
    assert (folder / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["a"]
    with common.written_beside(folder) as beside:
        beside.mkdir()
    assert not (folder / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["a"]


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
    path, left = common.run_dir("t") / "metrics.jsonl", [("base", 1), ("base", 2), ("sft", 3)]
    lines = [json.loads(x) for x in path.open()]
    assert [(x["stage"], x["step"]) for x in lines] == left


@pytest.mark.parametrize("torn", [b'{"stage": "base", "st', b"\0" * 40, b'{"stage": "b\xff"}'])
def test_a_torn_line_of_the_log_is_dropped(base_dir, torn):
    run = common.Run("base", "t", None, CPU, 0, 1)
    common.run_dir("t").mkdir(parents=True)
    path = common.run_dir("t") / "metrics.jsonl"
    for step in (1, 2):
        run.log(step, loss=1.0)
        with path.open("ab") as file:
            file.write(torn + b"\n" * (step == 1))
    assert [x["step"] for x in evaluate.training_log("t")] == [1, 2]
    run.rewind_log(1)
    run.log(2, loss=0.5)
    assert [json.loads(x)["step"] for x in path.open()] == [1, 2]


# 2. Settings ---------------------------------------------------------------------------------


@dataclass
class ExampleSettings:
    total_size: int = common.setting(8, "of it")
    rate: float = common.setting(0.5, "a second")
    fast: bool = common.setting(False, "or slow")
    at_once: bool = common.setting(True, "or never")
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
    for word in ("inf", "nan", "1.5"):
        with pytest.raises(SystemExit):
            parse(f"--total-size={word}")
    assert parse("--fast -i sft --rate=1e-3") == ExampleSettings(fast=True, stage="sft", rate=1e-3)
    assert parse("--no-fast").fast is False
    assert not parse("--no_at_once").at_once and parse("--at_once").at_once
    assert not parse("--no-at-once").at_once


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--total-sise=3", "did you mean --total-size"),
        ("--model-dim=3", "it follows from --depth"),
        ("--total-size=1.5", "not a whole number"),
        ("--total-size=-1", "must be 0 or more"),
        ("--total-size=x", "invalid whole number value: 'x'"),
        ("--stage=mid", "invalid choice"),
        ("--total-siz=3", "did you mean"),
    ],
)
def test_a_wrong_setting_gets_one_line_and_exit_2(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_settings(ExampleSettings, "doc", line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


# Settings of which what they do, or what 0 stands for, differs by stage
DIFFERENT = """restart source seed stage num_iterations total_batch_size device_batch_size matrix_lr
embed_lr head_lr weight_decay warm_start chats start_from epochs temperature slots run_code""".split()


def test_one_name_is_one_setting_in_every_stage():
    seen = {}
    for stage in STAGES:
        cls = importlib.import_module(stage).Settings
        for f in dataclasses.fields(cls):
            kind = (f.type, f.metadata["help"])
            if f.name in DIFFERENT:
                kind = f.type
            assert seen.setdefault(f.name, kind) == kind, f"{stage}.{f.name}"


# 3. Device, ranks, start_run -----------------------------------------------------------------


def test_bf16_is_chosen_only_where_it_is_fast(monkeypatch):
    for ratio, dtype in ((0.002, torch.float32), (1.2, torch.float32), (1.9, torch.bfloat16)):
        rates = {torch.float32: 1e11, torch.bfloat16: ratio * 1e11}
        monkeypatch.setattr(common, "measure_matmul", lambda dev, dt, n, _, r=rates: r[dt])
        common.pick_dtype.cache_clear()
        assert common.pick_dtype(CPU) == dtype
    monkeypatch.setattr(common, "measure_matmul", lambda *_: 1 / 0)
    assert common.pick_dtype(CPU) == torch.bfloat16, "asked once, so that two runs are equal"
    common.pick_dtype.cache_clear()
    assert common.pick_dtype(CPU, "float32") == torch.float32
    for card, dtype in (((6, 1), "float32"), ((7, 5), "float16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, card=card: card)
        common.pick_dtype.cache_clear()
        assert str(common.pick_dtype(torch.device("cuda"))) == f"torch.{dtype}"
        assert card >= (7, 0) or not common.can_compile(torch.device("cuda")), "too old for Triton"
    common.pick_dtype.cache_clear()


def test_an_absent_device_is_said(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(common.MissingInput, match="--device=cuda is not on this machine"):
            common.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(common.MissingInput, match="--nproc_per_node=1"):
        common.pick_device("cuda")


def test_an_xpu_is_chosen_before_the_cpu_and_every_rank_has_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = common.pick_device()
    assert (device.type, device.index, chosen) == ("xpu", 1, [1])
    assert common.pick_dtype(device) is torch.bfloat16 and not common.can_compile(device)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (100, 200))
    assert common.free_bytes(device) == 120
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.MissingInput, match="--nproc_per_node=2"):
        common.pick_device("xpu")


def test_compilation_is_a_choice_that_is_said(monkeypatch, capsys):
    def compiles(choice, seconds, saved=None):
        run = common.Run("base", "t", SimpleNamespace(compile=choice), CPU, 0, 1)
        return common.compile_or_not(common.compile_choice(run, saved or {}), seconds, CPU, run.say)

    real = common.can_compile
    assert not compiles("auto", 30)
    assert not compiles("no", 1e6)
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    assert not compiles("auto", 1e6)
    assert not compiles("yes", 1)
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    assert compiles("auto", 1e6)
    with monkeypatch.context() as patch:  # Triton builds what launches its programs
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        patch.setattr(Path, "exists", lambda path: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        for compilers in ((), ("clang",), ("my-cc",)):
            patch.setattr(shutil, "which", lambda name, have=compilers: name in have or None)
            patch.setenv("CC", "my-cc")
            assert real(torch.device("cuda")) == bool(compilers)
    said = capsys.readouterr().out.splitlines()
    assert "C++ compiler" in said[2] and "python3-dev" in said[3] and len(said) == 5
    # a run that goes on is compiled as it was, but for an explicit choice
    assert compiles("auto", 1, {"compiled": True}) and not compiles("no", 1, {"compiled": True})
    assert not compiles("auto", 1e6, {"compiled": False}) and compiles(
        "yes", 1, {"compiled": False}
    )
    for seconds in (20, 100):  # where a former stage was compiled it costs less
        assert common.compile_or_not("auto", seconds, CPU, print, before=True) == (seconds > 30)


def test_an_engine_compiles_for_much_work_alone_and_works_without(tokenizer, monkeypatch, capsys):
    def fail():
        raise RuntimeError("no room")

    engine, asked = common.Engine(random_model(), tokenizer), []
    monkeypatch.setattr(engine, "compile", lambda: asked.append(1))
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    engine.expect(common.MANY_TOKENS - 1)
    assert not asked
    engine.expect(common.MANY_TOKENS)
    assert asked
    monkeypatch.setattr(engine, "compile", fail)
    engine.expect(common.MANY_TOKENS)
    assert "going on without" in capsys.readouterr().out
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    engine.expect(common.MANY_TOKENS)


@pytest.mark.parametrize(
    ("card", "peak"),
    [("H100 80GB HBM3", "H100"), ("H100 PCIe", "H100 PCIe"), ("A100-SXM4-80GB", "A100"),
     ("RTX A6000", "A6000"), ("L4", "L4"), ("L40S", "L40S"), ("GB200", "GB200"),
     ("GeForce RTX 4090", "RTX 4090"), ("L40", ""), ("RTX A4000", ""), ("H2000", "")],
)  # fmt: skip
def test_a_cards_peak_is_that_of_its_whole_name(monkeypatch, card, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {card}")
    monkeypatch.setattr(common, "measure_matmul", lambda *_: -1.0)
    found = common.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == common.PEAK_FLOPS.get(peak, -1.0)


def test_a_containers_limit_is_the_memory_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CGROUP_LIMITS", [tmp_path / "v2", tmp_path / "v1"])
    whole = common.free_bytes(CPU)
    (tmp_path / "v2").write_text("max\n")
    assert common.free_bytes(CPU) == whole > 1 << 28
    (tmp_path / "v1").write_text(f"{1 << 28}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.free_bytes(CPU) == 1 << 27, "ranks share it"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_error_is_one_sentence(base_dir, number):
    settings = SimpleNamespace(tag="t", device="cpu", seed=0)
    with pytest.raises(common.Stop) as stop, common.start_run("base", settings):
        raise OSError(number, os.strerror(number), "/some/where")
    assert "/some/where" in str(stop.value) and "\n" not in str(stop.value)


def test_a_reader_that_goes_away_ends_a_stage_by_one_sentence(base_dir):
    code = """
import common, types
with common.start_run("base", types.SimpleNamespace(tag="t", device="cpu", seed=0)) as run:
    while True:
        run.say("step")
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=HERE, text=True, **pipes) as writer:
        assert writer.stdout.readline() == "step\n"
        writer.stdout.close()
        said = writer.stderr.read()
    assert writer.returncode == 1 and said.count("\n") == 1 and "nobody reads" in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the system's malloc is another")
def test_a_stage_keeps_the_memory_it_frees(base_dir):
    code = """
import common, resource, torch, types
with common.start_run("base", types.SimpleNamespace(tag="t", device="cpu", seed=0)) as run:
    for i in range(60):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.ones(1 << 20) for _ in range(8)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, capture_output=True)
    assert int(out.stdout) < 1000, "pages of 4 KB would be 400,000"


def test_a_wandb_that_fails_is_one_line_and_left_out(base_dir, monkeypatch, capsys):
    def init(**options):
        raise ConnectionError("no way\nto api.wandb.ai")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__="here"))
    with common.start_run("base", pretrain.Settings(tag="t", device="cpu", run="mine")) as run:
        assert run.wandb is None
    said = capsys.readouterr().out
    assert "no way to api.wandb.ai" in said and said.count("\n") == 1


# 4. Tokenizer --------------------------------------------------------------------------------


def test_text_never_becomes_a_special_token(tokenizer):
    text = "a <|bos|> and <|assistant_end|> b"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos and tokenizer.decode(ids) == text


def test_a_run_at_which_tiktoken_panics_is_encoded(tokenizer):
    text = "a" + " " * 1_000_001 + "b"
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizer.encoding.encode_ordinary(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(["a b", text]) == [tokenizer.encode("a b"), ids]


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
@settings(max_examples=200)
def test_encoding_loses_nothing_and_merges_as_trained(text):
    tokenizer = TOKENIZER()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    weights = tokenizer.token_bytes[torch.tensor(ids, dtype=torch.long)]
    assert int(weights.sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", ""), ("none", ""), ("$1,234.50", "1234.5"), ("10.0", "10"), ("It is 5.", "5"),
        ("-3", "-3"), ("5-3", "3"), ("(5)-3", "3"), ("x = -3", "-3"), ("-$5.50", "-5.5"),
        ("$-5.50", "-5.5"), ("\u22127", "-7"), ("-0.0", "0"), ("007", "7"), (".5", "0.5"),
        ("1,000, or so", "1000"), ("1,000,000.", "1000000"), ("1,2", "2"), ("12,34", "34"),
        ("3 of 12 (25%)", "25"), ("a 10-year plan", "10"), ("2*-3", "-3"), ("1/2", "2"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert common.last_number(text) == number


@given(st.decimals(-(10**9), 10**9, places=3), st.booleans())
def test_a_number_is_found_however_it_is_written(value, grouped):
    text = f"So 3 - 2, in all ${value:,}." if grouped else f"So 3 - 2, in all {value} eggs"
    found = common.last_number(text)
    assert Decimal(found) == value and not re.search(r"^-?0[0-9]|\.[0-9]*0$|\.$|^-0$", found)


def test_the_graders():
    number = {"grade": "number", "answer": "1,234.50"}
    assert common.grade(number, "First 5, then $1234.5.")
    assert not common.grade(number, "1,234.50 or 6") and not common.grade(number, "none")
    letter = {"grade": "letter", "answer": "B", "choices": ["Rome", "B", "a cow"]}
    right = ("B", " B.", "B) Rome", "(B) Rome", "B: it is", "B\nRome", "Rome B", "B B", "a cow B.",
             "It is Rome.\n- Rome B", "- Rome B\n")  # fmt: skip
    assert all(common.grade(letter, reply) for reply in right)
    wrong = ("Because", "A or B", "B or A", "B minor", "B's", "b", "", "Rome C", "B A", "Rome, B", "Oslo B", "Rome",
             "It is Rome.\n- Rome C", "B\n- Rome C", "It is B.\n- Oslo B")  # fmt: skip
    assert not any(common.grade(letter, reply) for reply in wrong)
    text = {"grade": "text", "accept": ["New Mexico", "it's Cuba"], "reject": ["Mexico", "Ohio"]}
    assert common.grade(text, "That is NEW  mexico!") and common.grade(text, "It\u2019s Cuba.")
    assert not common.grade(text, "New Mexico, not Ohio") and not common.grade(text, "Mexico")
    assert not common.grade(text, "New Mexicos") and common.grade(text, "New Mexico, not Ohioan")
    spelled = {"grade": "text", "accept": ["c-a-t"], "reject": []}
    assert common.grade(spelled, '"cat" is c-a-t.') and common.grade(spelled, "C-A-T")
    assert not common.grade(spelled, "c-a-t-s") and not common.grade(spelled, "s-c-a-t")


def test_grading_makes_patterns_of_what_the_reply_has_alone(monkeypatch):
    made, search = [], re.search
    monkeypatch.setattr(re, "search", lambda *args: made.append(args) or search(*args))
    others = [f"rival {i}" for i in range(1000)]
    item = {"grade": "text", "accept": ["Paris"], "reject": others}
    assert common.grade(item, "It is Paris.") and not common.grade(item, "Paris or rival 7")
    assert len(made) < 10


# 5. GPT --------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "grouped": {"n_kv_head": 1},
    "window": {"window_pattern": "SSL"},
    "both": {"n_kv_head": 2, "window_pattern": "SL", "n_layer": 3},
    "bigrams": {"bigram_rows": 37, "n_layer": 1},
    "bare": {"smear": False, "value_embeds": False, "skip": False, "qk_scale": 1.0},
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
    model = random_model(**CONFIGS["bare"], **changes)
    ids = torch.randint(100, (3, 32))
    with torch.no_grad():
        expected = as_transformers(model)(ids).logits[..., :100]
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def plain_logits(model, ids):
    """Compute the logits of one row of ids position by position, straight from the weights."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, t):  # each pair of channels (i, i + D/2) by t / base^(2i/D)
        half = c.head_dim // 2
        angle = t * c.rope_base ** (-torch.arange(half).double() / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    stream = [w["embed.weight"][i] for i in ids]
    if c.smear:
        stream = [x + w["smear.weight"] @ stream[max(0, t - 1)] for t, x in enumerate(stream)]
    if c.bigram_rows:
        slots = [(a * 1000003 + b * 8191) % c.bigram_rows for a, b in zip([ids[0], *ids], ids)]
        stream = [x + w["bigrams.weight"][slot] for x, slot in zip(stream, slots)]
    stream = first = [norm(x) for x in stream]
    for layer in range(c.n_layer):
        own = {n.split(".", 2)[2]: p for n, p in w.items() if n.startswith(f"blocks.{layer}.")}
        if c.skip:
            a, b = w["mix"][layer]
            stream = [a * x + b * y for x, y in zip(stream, first)]
        keys, values, after = [], [], []
        for t, x in enumerate(stream):
            h = norm(x)
            q, k, v = ((own[f"attention.{n}.weight"] @ h).view(-1, c.head_dim) for n in "qkv")
            if c.value_embeds and layer % 2 == (c.n_layer - 1) % 2:
                gate = 2 / (1 + (-(own["attention.gate.weight"] @ h[:32])).exp())
                v = v + gate[:, None] * w[f"value_embeds.{layer}.weight"][ids[t]].view(v.shape)
            keys.append(norm(turned(k, t)) * c.qk_scale)
            values.append(v)
            seen = slice(max(0, t + 1 - c.window(layer)), t + 1)
            heads = []
            for i, query in enumerate(norm(turned(q, t)) * c.qk_scale):
                j = i * c.n_kv_head // c.n_head
                scores = torch.stack([key[j] @ query for key in keys[seen]]) / c.head_dim**0.5
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(a * value[j] for a, value in zip(weights, values[seen])))
            x = x + own["attention.out.weight"] @ torch.cat(heads)
            hidden = (own["mlp.up.weight"] @ norm(x)).clamp_min(0) ** 2
            after.append(x + own["mlp.down.weight"] @ hidden)
        stream = after
    z = torch.stack([w["head.weight"] @ norm(x) for x in stream])
    return (c.softcap * (z / c.softcap).tanh())[:, : c.vocab_size]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_model_equals_the_plain_formulas(changes):
    model = random_model(**changes)
    ids = torch.randint(100, (32,))
    with torch.no_grad():
        expected = plain_logits(model, ids.tolist())
        torch.testing.assert_close(model(ids[None])[0], expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch", ["smear", "value_embeds", "skip", "bigram_rows"])
def test_a_part_of_the_model_can_be_left_out(switch):
    whole, without = random_model(bigram_rows=8), random_model(**{"bigram_rows": 8, switch: 0})
    assert without.config.num_params() < whole.config.num_params()
    assert without.config.num_params() == sum(p.numel() for p in without.parameters())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_is_initialised(changes):
    model = common.GPT.create(random_model(**changes).config, CPU, torch.float32)
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


@pytest.fixture(params=[0, 5, 256], ids="spare{}".format)
def spare(request, monkeypatch):
    """Let windowed layers keep this many positions more than they see."""
    monkeypatch.setattr(common.KVCache, "SPARE", request.param)
    return request.param


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("split", [(1,) * 32, (32,), (7, 1, 1, 9, 3, 1, 10), (31, 1)])
def test_decoding_with_the_cache_gives_the_logits_of_a_full_pass(spare, changes, split):
    model = random_model(**changes)
    ids = torch.randint(100, (2, 32))
    cache = common.KVCache(model.config, 2, CPU, torch.float32)
    parts = []
    for part in ids.split(split, dim=1):
        parts.append(model.logits(model.hidden(part, cache)))
        cache.lengths = [n + part.size(1) for n in cache.lengths]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_rows_of_unequal_length_decode_as_each_alone(spare, changes):
    model = random_model(**changes)
    rows = [torch.randint(100, (n,)) for n in (3, 17, 1, 9)]
    cache = common.KVCache(model.config, 5, CPU, torch.float32)
    part = cache.part(0, 4)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=99)
    hidden = model.hidden(padded, part, list(map(len, rows)))
    part.lengths = [len(row) for row in rows]
    last = model.logits(hidden[torch.arange(4), torch.tensor(part.lengths) - 1])
    for step in range(12):
        for i, row in enumerate(rows):
            torch.testing.assert_close(last[i], model(row[None])[0, -1], rtol=1e-4, atol=1e-4)
        new = torch.randint(100, (4, 1))
        rows = [torch.cat([row, new[i]]) for i, row in enumerate(rows)]
        last = model.logits(model.hidden(new, part))[:, -1]
        part.lengths = [n + 1 for n in part.lengths]


@pytest.mark.parametrize("rows", [1, 2, 5, common.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_few_rows_and_of_int8_equal_the_plain_ones(rows, dtype):
    linear = common.Linear(96, 80)
    with torch.no_grad():
        linear.weight.normal_()
    x = torch.randn(rows, 1, 96).to(dtype)
    exact = x.double() @ linear.weight.to(dtype).double().t()
    with torch.no_grad():
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(linear(x), exact.to(dtype), **close)
        weight = linear.weight.clone()
        linear.quantize()
        y = linear(x)
        assert linear.weight.dtype == torch.int8 and y.shape == (rows, 1, 80) and y.dtype == dtype
        for i in range(rows):
            assert torch.equal(linear(x[i : i + 1]), y[i : i + 1]), "a row depends on no other"
    stepped = linear.weight * linear.scale[:, None]
    assert ((stepped - weight).abs() <= linear.scale[:, None] * 0.5001).all()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    rounded = (x.float() / step).round() * step
    expected = rounded.double() @ stepped.double().t()
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2 if close == {} else 1e-5, atol=1e-3)
    assert (y - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="weights are packed on x86 alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 100])
def test_products_of_packed_weights_are_the_plain_ones(dtype, rows, monkeypatch):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products in bf16")
    weight, x = torch.randn(96, 80).to(dtype), torch.randn(rows, 1, 80).to(dtype)
    assert common.pack(weight) is None, "small ones are not worth a call"
    monkeypatch.setattr(common, "PACKED", 96 * 80)
    packed, asked = common.pack(weight), []
    linear_pointwise = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise",
                        lambda x, *rest: asked.append(len(x)) or linear_pointwise(x, *rest))  # fmt: skip
    with torch.no_grad():
        y = common.product(x, weight, packed=packed)
    exact = (x.double() @ weight.double().t()).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(y, exact, **close)
    assert asked == ([] if rows == 1 and dtype == torch.bfloat16 else [rows])
    trained = weight.float().requires_grad_()
    common.product(x.float(), trained, packed=packed).sum().backward()
    assert trained.grad.any(), "training goes on with the weight itself"


def int8_linear(n_in, n_out):
    linear = common.Linear(n_in, n_out)
    torch.nn.init.normal_(linear.weight)
    linear.quantize()
    return linear


@pytest.mark.skipif(not common.can_compile(CPU), reason="needs a C++ compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tables_gradient_is_the_sum_of_its_rows_and_the_same_each_time(compiled):
    table = common.Embedding(256, 300)
    torch.nn.init.normal_(table.weight)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 280, (8, 256), generator=draw)
    weights = torch.randn(8, 256, 256, generator=draw)

    def loss(ids, weights):
        return (table(ids).bfloat16() * weights).float().sum()

    loss = torch.compile(loss) if compiled else loss
    first, *others = (torch.autograd.grad(loss(ids, weights), table.weight)[0] for _ in range(8))
    assert all(torch.equal(first, other) for other in others)
    expected = F.one_hot(ids.flatten(), 300).double().T @ weights.bfloat16().flatten(0, 1).double()
    torch.testing.assert_close(first.double(), expected, rtol=1e-2, atol=0.1)
    assert not first[280:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_of_8_bits_are_the_plain_ones_bit_for_bit(dtype, monkeypatch):
    if not common.packs_int8():  # not asked at import: torch's threads do not live on in a fork
        pytest.skip("8 bits are not packed on this machine")
    linear = int8_linear(96, 80)
    assert common.pack(linear.weight) is None, "small ones are not worth a call"
    monkeypatch.setattr(common, "PACKED_INT8", 96 * 80)
    packed = common.pack(linear.weight)
    for rows in (1, 2, 17, 100):
        x = torch.randn(rows, 1, 96).to(dtype)
        x[0] = torch.where(x[0] > 0, 7.0, -7.0)  # each at an end of the range
        with torch.no_grad():
            assert torch.equal(common.product(x, linear.weight, linear.scale, packed), linear(x))


def test_8_bits_are_not_packed_where_sums_clip(monkeypatch):
    monkeypatch.setattr(common, "AMX", False)
    clipped = torch.full((2, 16), 32767.0 * 32)  # of pairs of products in 16 bits
    monkeypatch.setattr(torch.ops.nanochat, "packed_int8_product", lambda *args: clipped)
    assert not common.packs_int8.__wrapped__()

    def missing(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.ops.nanochat, "packed_int8_product", missing)
    assert not common.packs_int8.__wrapped__()


@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
def test_a_compiled_product_of_one_row_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(common, "AMX", False)  # with it they are the library's
    monkeypatch.setattr(common, "PACKED", 1)
    monkeypatch.setattr(common, "PACKED_INT8", 1)
    linear, x = common.Linear(common.EXACT, 48), torch.randn(1, 1, common.EXACT)
    torch.nn.init.normal_(linear.weight)
    ends = int8_linear(common.EXACT, 48)
    with torch.no_grad():
        ends.weight[:] = 127 * ends.weight.sign()

    @torch.compile(dynamic=False)
    def compiled(x, weight, scale):
        return common.product(x * 2, weight, scale)

    with torch.inference_mode():
        for y in (x, x.sign()):  # at the ends of the range fp32's sums are still exact
            plain = common.product(y * 2, ends.weight, ends.scale)
            assert torch.equal(compiled(y, ends.weight, ends.scale), plain)
        weight = linear.weight.bfloat16()
        plain = (x.bfloat16() * 2).double() @ weight.double().t()
        torch.testing.assert_close(compiled(x.bfloat16(), weight, None), plain.bfloat16())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="weights are packed on x86 alone")
def test_an_engine_packs_new_weights_and_not_what_leaves_no_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(common, "PACKED", 1)
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 64}
    old, new = random_model(**shape), random_model(seed=1, **shape)
    engine, fresh = (common.Engine(copy.deepcopy(m), tokenizer, 2) for m in (old, new))
    requests = [greedy([tokenizer.bos, i], 8) for i in range(2)]
    before = dict(engine.run(requests))
    engine.refresh(new)
    after = dict(engine.run(requests))
    assert after == dict(fresh.run(requests)) and after != before
    attention = engine.model.blocks[0].attention
    assert (
        attention.packed is not None
        and attention.q.packed is None
        and attention.out.packed is not None
    )
    monkeypatch.setattr(common, "free_bytes", lambda device: 1000)
    assert common.Engine(old, tokenizer, 1).model.head.packed is None


def test_products_in_fp8_are_those_of_rounded_factors():
    x, weight = torch.randn(32, 48).bfloat16(), torch.randn(80, 48)
    x.requires_grad_(), weight.requires_grad_()
    dy = torch.randn(32, 80).bfloat16()

    def rounded(a, bits, top):  # of a mantissa, implied one included
        scale = a.detach().abs().double().max() / top
        fraction, exponent = torch.frexp(a.detach().double() / scale)
        low = {4: -5, 3: -13}[bits]  # the least normal exponent: below it steps stay alike
        step = 2.0 ** (exponent.clamp_min(low) - bits)
        return (torch.ldexp(fraction, exponent) / step).round() * step * scale

    y = common.Float8Product.apply(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    x8, w8, g8 = rounded(x, 4, 448), rounded(weight, 4, 448), rounded(dy, 3, 57344)
    for mine, plain in ((y, x8 @ w8.t()), (dx, g8 @ w8), (dw, g8.t() @ x8)):
        close = (
            {"rtol": 1e-2, "atol": 1e-2}
            if mine.dtype == torch.bfloat16
            else {"rtol": 1e-3, "atol": 1e-3}
        )
        torch.testing.assert_close(mine.double(), plain, **close)
    assert (y.double() - x.double() @ weight.double().t()).abs().max() > 0.1, "it was rounded"


def test_a_model_trained_in_fp8_learns_as_one_in_bf16():
    losses = {}
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = common.GPT.create(random_model(n_layer=2).config, CPU, torch.bfloat16)
        if fp8:
            model.train_in_fp8()
        eight = [name for name, m in model.named_modules() if getattr(m, "fp8", False)]
        assert len(eight) == 12 * fp8 and not any("gate" in n or "head" in n for n in eight)
        optimizer = common.Optimizer(
            common.optimizer_groups(model, 0.02, 0.2, 0.004, 0), torch.float32
        )
        ids = torch.randint(0, 20, (4, 8)).repeat(1, 4)  # what can be copied
        for _ in range(30):
            loss = model(ids[:, :-1][:, :16], ids[:, 1:17]) / 64
            loss.backward()
            optimizer.step()
        losses[fp8] = loss.item()
        with torch.no_grad():  # not while it answers
            assert torch.equal(model(ids), model.cast_weights()(ids))
    assert losses[True] < 1 and losses[True] == pytest.approx(losses[False], abs=0.1)


def test_weights_laid_side_by_side_and_in_8_bits_give_the_same_model():
    for changes in CONFIGS.values():
        model, cast = random_model(**changes), random_model(**changes).cast_weights()
        ids = torch.randint(100, (2, 32))
        with torch.no_grad():
            torch.testing.assert_close(cast(ids), model(ids), rtol=1e-4, atol=1e-4)
            assert model.state_dict().keys() == cast.state_dict().keys()
            cast.load_state_dict(random_model(seed=1, **changes).state_dict())  # as RL does
            other = random_model(seed=1, **changes)(ids)
            torch.testing.assert_close(cast(ids), other, rtol=1e-4, atol=1e-4)
            small = random_model(**changes).quantize().cast_weights()
            error = (small(ids) - model(ids)).square().mean().sqrt()
            assert 0 < error < 0.1 * model(ids).std()
            kinds = {name: weight.dtype for name, weight in small.state_dict().items()}
            assert {name for name, kind in kinds.items() if kind != torch.int8} == {
                name for name in kinds if re.search("embed|bigrams|gate|mix", name)
            }


def test_a_layer_with_a_window_keeps_that_and_a_prefix_is_used_where_it_is_held(spare):
    model = random_model(window_pattern="SL", max_seq_len=64)
    cache = common.KVCache(model.config, 2, CPU, torch.float32)
    kept = min(64, 16 + spare)
    assert [x.size(1) for x in cache.k] == [x.size(1) for x in cache.v] == [kept, 64]
    ids = torch.randint(100, (1, 50))
    row = cache.part(0, 1)
    model.hidden(ids, row)
    cache.lengths[0] = 50
    used = [n for n in range(1, 51) if cache.holds(0, n)]
    assert used == list(range(1 if kept == 64 else 50 - spare, 51))
    for n in used:
        cache.copy_row(0, 1, n)
        rest = torch.randint(100, (1, 9))
        logits = model.logits(model.hidden(rest, cache.part(1, 2)))
        whole = model(torch.cat((ids[:, :n], rest), 1))[:, n:]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [7, 128, 300])
def test_attention_in_products_is_torchs_own(T):
    mine = [torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3)]
    plain = [x.detach().clone().requires_grad_() for x in mine]
    weights = torch.randn(2, 3, T, 8)
    y = common.InProducts.apply(*mine)
    expected = F.scaled_dot_product_attention(*plain, is_causal=True)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "S", "heads"), [(2, 9, (3, 3)), (7, 7, (4, 2)), (24, 90, (6, 1))])
def test_attention_by_heads_is_torchs_own(T, S, heads, masked):
    q, (k, v) = torch.randn(2, T, heads[0], 8), torch.randn(2, 2, S, heads[1], 8)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = torch.ones(2, T, S, dtype=torch.bool).tril(S - T)
    if masked:
        seen &= torch.rand(2, T, S) < 0.5
        seen[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    y = common.attend_by_heads(q, k, v, seen if masked else None)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("window", ["L", "SL"])
def test_bf16_attends_in_products_where_that_gains_and_means_the_same(monkeypatch, window):
    monkeypatch.setattr(common, "AMX", False)
    monkeypatch.setattr(common, "BY_HEADS", 200)
    calls = {
        name: unittest.mock.Mock(side_effect=getattr(common, name))
        for name in ("attend_once", "attend_by_heads")
    }
    for name, counted in calls.items():
        monkeypatch.setattr(common, name, counted)
    model = random_model(torch.bfloat16, max_seq_len=64, window_pattern=window).cast_weights()
    exact = random_model(max_seq_len=64, window_pattern=window)
    ids = torch.randint(100, (2, 50))
    with torch.no_grad():
        expected = exact(ids)
        cache = common.KVCache(model.config, 2, CPU, torch.bfloat16)
        for start, end in ((0, 20), (20, 30), (30, 31), (31, 50)):
            logits = model.logits(model.hidden(ids[:, start:end], cache))
            cache.lengths = [end] * 2
            error = (logits - expected[:, start:end]).square().mean().sqrt()
            assert error < 0.05 * expected.std()
    assert all(counted.called for counted in calls.values())
    for x in (ids.float(), ids.bfloat16().requires_grad_()):  # torch's own stays
        assert not common.by_parts(x)


def test_rows_of_unequal_length_go_on_by_several_positions(spare):
    model = random_model(window_pattern="SL", max_seq_len=64)
    cache = common.KVCache(model.config, 2, CPU, torch.float32)
    ids, lengths = torch.randint(100, (2, 40)), (3, 29)
    for row, n in enumerate(lengths):
        part = cache.part(row, row + 1)
        model.hidden(ids[row : row + 1, :n], part)
        cache.lengths[row] = n
    more = torch.stack([ids[row, n : n + 9] for row, n in enumerate(lengths)])
    logits = model.logits(model.hidden(more, cache, [9, 5]))
    for row, (n, count) in enumerate(zip(lengths, (9, 5))):
        whole = model(ids[row : row + 1, : n + count])[0, n:]
        torch.testing.assert_close(logits[row, :count], whole, rtol=1e-4, atol=1e-4)


def test_a_row_cut_short_remembers_what_it_has_lost(monkeypatch):
    monkeypatch.setattr(common.KVCache, "SPARE", 5)
    config = random_model(window_pattern="SL", max_seq_len=64).config
    cache = common.KVCache(config, 3, CPU, torch.float32)
    cache.lengths[0] = 50
    cache.cut_row(0, 47)
    assert cache.holds(0, 46) and not cache.holds(0, 44), "lost to what came up to 50"
    cache.copy_row(0, 1, 46)
    cache.swap_rows(1, 2)
    assert cache.holds(2, 46) and not cache.holds(2, 44)
    cache.cut_row(2, 0)
    cache.lengths[2] = 21
    assert cache.holds(2, 18)


@pytest.mark.parametrize("window", [3, 7, 40])
def test_a_long_prompt_after_a_prefix_attends_in_parts_as_at_once(monkeypatch, window):
    q, k, v = torch.randn(2, 17, 4, 8), torch.randn(2, 29, 2, 8), torch.randn(2, 29, 2, 8)
    whole, sizes, plain = common.attend(q, k, v, window), [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask, **options):
        sizes.append(attn_mask.numel())
        return plain(q, k, v, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(common, "QUERIES", 5)
    torch.testing.assert_close(common.attend(q, k, v, window), whole)
    assert len(sizes) == 4 and max(sizes) <= 5 * 29


def test_the_cache_is_never_overwritten_at_the_contexts_end():
    model = random_model()
    cache = common.KVCache(model.config, 1, CPU, torch.float32)
    model.hidden(torch.zeros(1, 32, dtype=torch.long), cache)
    cache.lengths = [32]
    with pytest.raises(AssertionError):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_window_matters_and_attention_equals_the_plain_formula():
    q, k, v = (torch.randn(2, 9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    back = torch.arange(9)[:, None] - torch.arange(9)
    for window in (1, 2, 3, 5, 9):
        mask = (back >= 0) & (back < window)
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        expected = torch.einsum("bhts,bshd->bthd", weights, values)
        y, d_y = common.attend(q, k, v, window), torch.randn(2, 9, 4, 8)
        torch.testing.assert_close(y, expected)
        for mine, plain in zip(*(torch.autograd.grad(x, (q, k, v), d_y) for x in (y, expected))):
            torch.testing.assert_close(mine, plain)


def rows_in_windows(q, k, v, starts, starts_k, T, S, *, window_size):
    """Stand in for torch's kernel for rows of any length, as its documentation says it."""
    assert torch.equal(starts, starts_k) and starts.dtype == torch.int32 and T == S
    assert q.shape == k.shape == v.shape, "in torch 2.10 and 2.11 heads share no keys"
    parts = []
    for a, b in itertools.pairwise(starts.tolist()):
        x, y, z = (p[None, a:b].transpose(1, 2) for p in (q, k, v))
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)
        mask = (back <= window_size[0]) & (back >= -window_size[1])
        y = F.scaled_dot_product_attention(x, y, z, attn_mask=mask)
        parts.append(y.transpose(1, 2)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_for_windows_gets_what_it_asks_for(monkeypatch, kv_heads):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", rows_in_windows)
    q, k, v = (torch.randn(3, 9, n, 8, requires_grad=True) for n in (4, kv_heads, kv_heads))
    for window in (1, 3, 8):
        d_y = torch.randn(3, 9, 4, 8)
        made = common.attend(q, k, v, window, in_window=common.attend_in_flash)
        plain = common.attend(q, k, v, window)
        torch.testing.assert_close(made, plain)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), d_y) for x in (made, plain))):
            torch.testing.assert_close(a, b)
    model = random_model(window_pattern="SL", n_layer=3)
    ids = torch.randint(100, (2, 32))
    plain, used = model(ids), []

    def watched(q, k, v, window):
        used.append(window)
        return common.attend_in_flash(q, k, v, window)

    monkeypatch.setattr(common, "window_kernel", lambda *_: watched)
    torch.testing.assert_close(model.computing_in(torch.float32)(ids), plain)
    assert used == [8], "the first of three layers has a window, the last never"


def test_attention_kernels_are_ranked_and_wrong_and_absent_ones_left_out(monkeypatch):
    plain, kinds, now = F.scaled_dot_product_attention, common.SDPBackend, []

    @contextlib.contextmanager
    def one(kind):
        now.append(kind)
        yield
        now.pop()

    def attention(q, k, v, is_causal):
        if now[-1] is kinds.EFFICIENT_ATTENTION:
            raise RuntimeError("no kernel")
        time.sleep(0.3 * (now[-1] is kinds.MATH))
        y = plain(q, k, v, is_causal=is_causal)
        return y * 1.2 if now[-1] is wrong else y

    monkeypatch.setattr(common, "sdpa_kernel", one)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    wrong, shape = None, (1, 2, 70, 16)
    assert common.rank_attention(CPU, torch.float32, shape) == [kinds.FLASH_ATTENTION, kinds.MATH]
    wrong = kinds.FLASH_ATTENTION
    assert common.rank_attention(CPU, torch.float32, shape) == [kinds.MATH]
    monkeypatch.undo()
    ranked = common.rank_attention(CPU, torch.bfloat16, shape)
    assert {kinds.MATH, kinds.FLASH_ATTENTION} == set(ranked), "what a CPU has"
    with common.sdpa_kernel(ranked, set_priority=True):
        q = torch.randn(1, 5, 2, 8)
        assert torch.equal(common.attend(q, q, q, 5)[0, 0], q[0, 0])


def test_a_kernel_that_plans_for_every_shape_is_for_equal_lengths_alone(monkeypatch):
    kinds = common.SDPBackend
    monkeypatch.setattr(common, "sdpa_kernel", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(common, "try_attention", lambda *_: (1.0, [torch.ones(1)]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    for version, vary in ((91600, False), (91600, True), (91500, False), (None, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        ranked = common.rank_attention(torch.device("cuda"), torch.bfloat16, lengths_vary=vary)
        good = version == 91600 and not vary
        assert kinds.FLASH_ATTENTION in ranked and (kinds.CUDNN_ATTENTION in ranked) is good


@pytest.mark.parametrize("works", [True, False])
def test_a_newer_flash_kernel_that_fails_gives_way_to_the_older(monkeypatch, works):
    kind, active, tried = common.SDPBackend.FLASH_ATTENTION, ["FA2"], []

    def one(asked):
        tried.append(active[-1] if asked == kind else "")
        return contextlib.nullcontext()

    def attention(*_):
        if tried[-1] == "FA3" and not works:
            raise RuntimeError("it is for another torch")
        return 1.0, [torch.ones(1)]

    monkeypatch.setattr(common, "sdpa_kernel", one)
    monkeypatch.setattr(common, "try_attention", attention)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    for name, act in (("activate", active.append), ("restore", lambda: active.append("FA2"))):
        change = f"{name}_flash_attention_impl"
        monkeypatch.setattr(torch.nn.attention, change, act, raising=False)
    assert kind in common.rank_attention(torch.device("cuda"), torch.bfloat16)
    assert [name for name in tried if name] == (["FA3"] if works else ["FA3", "FA2"])
    assert active[-1] == ("FA3" if works else "FA2")


def test_windows_are_the_default_where_a_kernel_gains_by_them(monkeypatch):
    took = {"whole": 1.0, "window": 0.5}

    def timed(attend, shape, device, dtype):
        assert shape == (1, 2048, 6, 128)
        return took["whole" if attend.func is common.attend else "window"], []

    def choose(saved=(), **changes):
        wanted = pretrain.Settings(depth=12, **changes)
        return pretrain.choose_windows(CPU, torch.bfloat16, wanted, dict(saved))

    assert choose() == "L"
    monkeypatch.setattr(pretrain, "try_attention", timed)
    monkeypatch.setattr(pretrain, "window_kernel", lambda *_: common.attend_in_flash)
    assert choose() == "SSSL" and choose(window_pattern="LS") == "LS"
    assert choose({"config": {"window_pattern": "SL"}}) == "SL", "as the run began"
    took["window"] = 0.8
    assert choose() == "L"


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
    tables = sum(p.numel() for name, p in model.named_parameters() if "embed" in name)
    products = plain.num_params() - tables - model.mix.numel()
    pairs = c.n_layer * sum(range(1, 33)) / 32
    assert plain.flops_per_token() == 6 * products + 12 * c.n_embd * pairs
    assert c.flops_per_token() < plain.flops_per_token()


@pytest.mark.parametrize(
    "wrong", [{"n_head": 3}, {"n_kv_head": 3}, {"window_pattern": "X"}, {"window_pattern": ""}]
)
def test_a_shape_that_does_not_fit_is_a_value_error(wrong):
    with pytest.raises(ValueError):
        random_model(**wrong)


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Follows the bytes of tensors beyond those known at first, as long as anything holds them."""

    def __init__(self, known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()
        for x in known:
            self.follow(x.untyped_storage())
        self.live = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).data_ptr():
                self.follow(storage)
                self.peak = max(self.peak, self.live)
        return out

    def follow(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += size
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 4},
        {"n_layer": 6, "n_embd": 384, "n_head": 3, "n_kv_head": 3},
        {"n_layer": 4, "n_kv_head": 1, "vocab_size": 8192},
        {"n_layer": 3, "smear": False, "value_embeds": False, "skip": False},
        {"bigram_rows": 4096},
    ],
)
def test_the_estimate_of_memory_is_what_training_takes(changes, dtype, recompute):
    shape = {"vocab_size": 512, "n_embd": 256, "max_seq_len": 128, "n_layer": 4}
    model = random_model(dtype, **{**shape, **changes})
    model.recompute = recompute
    ids = torch.randint(0, 512, (8, 128))
    optimizer = common.Optimizer(common.optimizer_groups(model, 0.01, 0.01, 0.01, 0), dtype)
    kept, keep = {}, []

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        keep.append(x)  # else another might take its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, ids)
    loss.backward()  # the gradients are there from now on
    params = list(model.parameters())

    def known():  # and held by nothing else
        yield from (*params, *model.buffers(), ids)
        yield from (p.grad for p in params if p.grad is not None)
        yield from (x for unit in optimizer.units for x in unit.state.values())

    with LiveBytes(known()) as passes:
        model(ids, ids).backward()
    with LiveBytes(known()) as update:
        optimizer.step()

    parts = common.memory_bytes(model.config, 8, dtype.itemsize, CPU, recompute=recompute)
    assert parts["gradients"] == sum(p.numel() * 4 for p in params)
    assert parts["optimizer"] == sum(
        x.nbytes for unit in optimizer.units for x in unit.state.values()
    )
    saved = sum(n for at, n in kept.items() if at not in {p.data_ptr() for p in params})
    saved -= 4 * model.head.weight.numel()  # its gradient, which the loss makes: of the logits
    casts = parts["weights"] - parts["gradients"]
    assert parts["activations"] + casts == pytest.approx(saved, rel=0.03)
    peak = casts + sum(parts[name] for name in ("activations", "logits", "workspace"))
    assert peak == pytest.approx(max(passes.peak, update.peak), rel=0.1)


def test_recomputing_activations_gives_the_same_gradients():
    ids = torch.randint(0, 100, (2, 32))
    grads = []
    for recompute in (False, True):
        model = random_model(n_layer=4, window_pattern="SL")
        model.recompute = recompute
        model(ids, ids.roll(1)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


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


@pytest.mark.parametrize(
    ("name", "most"), [("NEWTON_SCHULZ", 0.97), ("POLAR_EXPRESS", 0.97), ("SHORT_EXPRESS", 0.95)]
)
@pytest.mark.parametrize("shape", [(64, 64), (3, 32, 128), (128, 32)])
def test_orthogonalisation_brings_singular_values_near_one(name, most, shape):
    torch.manual_seed(0)
    x = common.orthogonalize(torch.randn(shape), getattr(common, name), torch.float32)
    values = torch.linalg.svdvals(x)
    assert x.shape == shape and (values > 0.6).float().mean() > most and values.max() < 1.3


def test_narrow_models_take_fewer_steps_of_orthogonalisation():
    def polynomials(width, **options):
        model = random_model(n_embd=width, n_head=1, n_kv_head=1)
        groups = common.optimizer_groups(model, 0.02, 0.2, 0.004, 0, **options)
        return groups[0]["coefficients"]

    assert polynomials(384) == common.SHORT_EXPRESS
    assert polynomials(512) == polynomials(384, muon_steps=5) == common.POLAR_EXPRESS
    values = torch.linspace(0.01, 1, 1000, dtype=torch.float64)
    for a, b, c in common.SHORT_EXPRESS:
        low, high = values.min(), values.max()
        assert low + high == pytest.approx(2 if high > 1 else 1.01, abs=0.01)
        grid = torch.linspace(low, high, 100_000, dtype=torch.float64)
        values = a * grid + b * grid**3 + c * grid**5
        error = (1 - values).abs()
        # the best polynomial errs equally much, in turn to both sides, at four points (Chebyshev)
        peaks = values[(error > error.max() - 1e-4)] > 1
        assert (peaks[1:] != peaks[:-1]).sum() == 3
    assert error.max() < 0.27


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
@settings(max_examples=300)
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


def test_all_text_is_trained_on_but_what_begins_a_row(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 64, 10**9, ALONE)
    targets = sum(int((rows.gather(np.array([i]))[1] >= 0).sum()) for i in range(len(rows)))
    texts = [
        t for path in common.list_shards(text_source, "train") for t in common.read_texts(path)
    ]
    tokens = sum(len(tokenizer.encode(t)) for t in texts)
    starts = sum(int((rows.row(i)[1:] == tokenizer.bos).sum()) for i in range(len(rows)))
    assert targets - tokens in range(starts + 1), "of a <|bos|> in a row the end is learned"
    assert len(rows) * 64 <= 1.05 * targets  # and few positions are spent on filling


def test_the_token_cache_is_reused_and_follows_the_text(text_source, tokenizer, capsys):
    first = common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)
    assert "tokenizing train-00000.parquet (1 of at most 1 shards)" in capsys.readouterr().out
    common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)
    assert not capsys.readouterr().out
    write_texts(text_source, ["Entirely other text. " * 50] * 3)
    other = common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)
    assert "tokenizing" in capsys.readouterr().out and len(other) != len(first)
    second_shard()
    assert len(common.token_rows(text_source, tokenizer, 32, 1, ALONE)) == len(other)
    assert len(common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)) == 2 * len(other)


def second_shard():
    """Return the paths of the source "tiny"'s first and second shard, and make that one."""
    first = common.list_shards("tiny", "train")[0]
    return first, shutil.copy(first, first.with_name("train-00001.parquet"))


def test_a_stop_while_tokenizing_ends_after_the_shard(text_source, tokenizer, capsys):
    second_shard()
    run = common.Run("base", "t", None, CPU, 0, 1, stopping=True)
    with pytest.raises(SystemExit) as ended:
        common.token_rows(text_source, tokenizer, 32, 10**9, run)
    assert ended.value.code == 0 and "run the same command again" in capsys.readouterr().out
    assert len(list(common.data_dir(text_source).glob("tokens/*/*.npy"))) == 1
    common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)
    said = capsys.readouterr().out
    assert "train-00001" in said and "train-00000" not in said, "what is done is kept"


def test_a_stop_or_a_fault_of_one_rank_while_rows_are_made_ends_all(text_source, capfd):
    first, second = second_shard()
    chats = write_lines(first.with_name("mid.jsonl"), [one_turn("A?", "B."), "no conversation"])

    def ends(rows, setting_up=""):
        run_ranks(
            2,
            f"""
        run = common.Run("base", "t", None, test_all.CPU, rank, 2)
        tokenizer = test_all.TOKENIZER()
        {setting_up}
        try:
            {rows}
        except SystemExit as stop:
            print(f"rank {{rank}} ended: {{stop}}\\n", end="", flush=True)  # in one piece
        """,
        )
        ended = re.findall(r"rank [01] ended: (.*)", capfd.readouterr().out)
        assert len(ended) == 2 and ended[0] == ended[1]
        return ended[0]

    text = "common.token_rows('tiny', tokenizer, 32, 10**9, run)"
    assert ends(text, "run.stopping = rank == 1") == "0"
    shutil.rmtree(first.with_name("tokens"))
    full = "common.open = lambda path, mode: open('/dev/full' if rank == 1 else path, mode)"
    full += "; common._file_key = lambda path: 'key'"
    assert "the disk is full" in ends(text, full)
    assert not list(common.data_dir(text_source).glob("tokens/*/train-00001*"))
    second.write_bytes(second.read_bytes()[:-9])
    assert str(second) in ends(text) and "prepare.py" in ends(text)
    assert "mid.jsonl:2: " in ends(
        f"common.conversation_rows(common.Path({str(chats)!r}), tokenizer, 32, run)"
    )


def test_rows_whose_end_finds_no_room_are_an_error(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))  # of 2108 bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            common.write_rows([[7] * 33] * 30, 32, 0, np.uint16, tmp_path / "rows.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_filling_is_never_a_target(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)
    ids, targets = rows.gather(np.array([len(rows) - 1, -1]))
    assert (ids[1] == tokenizer.bos).all() and (targets[1] == common.IGNORE).all()
    assert (ids[:, 0] == tokenizer.bos).all()
    filled = (ids == tokenizer.bos) & (targets == common.IGNORE)
    assert ((targets == common.IGNORE) == filled).all()
    assert not ((ids == tokenizer.bos) & (targets == tokenizer.bos)).any()


def test_rows_of_several_arrays_are_found_at_their_ends_too(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for i, (path, n) in enumerate(zip(paths, (3, 1, 4))):
        common.write_rows([[0, 10 * i + j + 1] for j in range(n)], 1, 0, np.uint16, path)
    rows = common.Rows(paths, 0)
    assert [int(rows.row(i)[1]) for i in range(8)] == [1, 2, 3, 11, 21, 22, 23, 24]
    some = common.Rows(paths[:1], 0).joined(rows, 4)
    assert [int(some.row(i)[1]) for i in range(7)] == [1, 2, 3, 1, 3, 21, 23]


def test_more_documents_than_are_encoded_at_once_are_all_there(base_dir, tokenizer):
    texts = [f"{i}." for i in range(2100)]
    write_texts("many", texts)
    rows = common.token_rows("many", tokenizer, 64, 10**9, ALONE)
    ids = [int(i) for k in range(len(rows)) for i in rows.row(k) if i != tokenizer.bos]
    assert sorted(ids) == sorted(i for text in texts for i in tokenizer.encode(text))
    path = write_lines(base_dir / "c.jsonl", [one_turn(f"{i}?", "Yes.") for i in range(2100)])
    _, mixed = common.conversation_rows(path, tokenizer, 64, ALONE)
    assert mixed.used == {"talk": 2100} and not mixed.cut and not mixed.left_out
    model = random_model(vocab_size=tokenizer.vocab_size)
    bpb, count = common.evaluate_bpb(model, tokenizer, ["a"] * 1030 + ["The cat. "] * 20, 512)
    alone = {
        text: common.evaluate_bpb(model, tokenizer, [text], 1)[0] for text in ("a", "The cat. ")
    }
    expected = (1030 * alone["a"] + 180 * alone["The cat. "]) / 1210
    assert count == 1050 and bpb == pytest.approx(expected, rel=1e-5)


def take_steps(rows, batch_rows, micro, steps, start=0, ranks=1):
    """Return the rows' first real token ids, step by step, over all ranks."""
    result = []
    streams = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with unittest.mock.patch.dict(os.environ, place):
            accum = common.accum_steps(batch_rows, micro)
            stream = common.row_batches(rows, batch_rows, micro, 3, start, CPU)
            got = list(itertools.islice(stream, accum * steps))
        streams.append([got[i : i + accum] for i in range(0, len(got), accum)])
    for step in range(steps):
        batches = [b for stream in streams for b in stream[step]]
        kept = [tuple(x.tolist()) for b in batches for x in b.ids[b.targets[:, 0] >= 0]]
        assert sum(b.num_targets for b in batches) == sum(
            int((b.targets >= 0).sum()) for b in batches
        )
        result.append(sorted(kept))
    return result


def test_a_steps_rows_depend_on_neither_ranks_nor_micro_batch_nor_resume(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 64, 10**9, ALONE)
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
    if num_steps == 100 and warmup <= 10:
        assert len(later) >= 90 and max(rates) > 0.9
        if warmdown == 1.0:
            assert rates[-1] == pytest.approx(0.1, abs=0.02)
        for final in (0.0, 0.1):
            end = common.trapezoid(num_steps, num_steps, warmup, warmdown, final)
            assert end == pytest.approx(final if warmdown else 1)


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


def test_each_update_takes_the_schedules_rate_also_in_a_run_that_goes_on(monkeypatch):
    schedule = functools.partial(common.trapezoid, num_steps=9, warmup=2, warmdown=0.5, final=0.1)
    for start in (0, 5):
        one, taken = OneWeight(), []
        monkeypatch.setattr(one.optimizer, "step", taken.append)
        batches = itertools.repeat(make_batch(1))
        steps = common.training_steps(batches, one.loss, one.optimizer, schedule, 9, start=start)
        assert [s.lr for s in steps][1:] == taken == [schedule(i) for i in range(start, 9)]


def test_a_run_that_is_past_its_last_step_ends():
    one, batches = OneWeight(), itertools.repeat(make_batch(1))
    steps = common.training_steps(batches, one.loss, one.optimizer, lambda _: 1.0, 3, start=5)
    assert len(list(itertools.islice(steps, 9))) == 1 and one.optimizer.steps == 0


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
    with pytest.raises(common.Stop, match="nan at step 1.*--dtype=float32.*--restart"):
        list(common.training_steps(
            batches, lambda b: one.loss(b) * math.nan, one.optimizer, lambda s: 1.0, 3
        ))  # fmt: skip


def scarce(function, rows, first=0):
    """Return a method of GPT that runs out of memory over `rows` rows from call `first` on."""
    calls = itertools.count()

    def limited(model, ids, *args):
        if next(calls) >= first and len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate")
        return function(model, ids, *args)

    return limited


def test_the_rows_that_fit_are_estimated(monkeypatch):
    config = random_model(n_layer=3).config

    def need(rows):
        return sum(common.memory_bytes(config, rows, 4, CPU).values())

    for rows, room in ((16, 1.01 * need(16)), (8, 0.99 * need(16)), (4, 1.01 * need(4))):
        monkeypatch.setattr(common, "free_bytes", lambda device, room=room: room / 0.9)
        assert common.fit_micro_batch(config, 16, CPU, 4, False) == rows
    monkeypatch.setattr(common, "free_bytes", lambda device: need(1))
    with pytest.raises(common.MissingInput, match="--recompute"):
        common.fit_micro_batch(config, 16, CPU, 4, False)


def test_a_trial_step_halves_the_rows_and_changes_nothing(monkeypatch):
    model = random_model()
    optimizer = common.Optimizer(common.optimizer_groups(model, 1, 1, 1, 0), torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rng = torch.get_rng_state()

    def rows_that_fit(rows, limit):
        monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, limit))
        return common.try_micro_batch(
            rows, lambda b: model(b.ids, b.targets), optimizer,
            lambda n: common.blank_batch(n, model.config, CPU),
        )  # fmt: skip

    assert [rows_that_fit(*x) for x in ((16, 99), (16, 5), (9, 4), (7, 6))] == [16, 4, 3, 1]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and optimizer.steps == 0
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(common.Stop, match="not even one row"):
        rows_that_fit(4, 0)


FORWARD, HIDDEN = common.GPT.forward, common.GPT.hidden


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # the latter a CPU's
def test_memory_that_runs_out_in_an_update_is_one_sentence(base_dir, monkeypatch, kind):
    def full(*args):
        raise kind("out of memory")

    one = OneWeight()
    monkeypatch.setattr(one.optimizer, "step", full)
    steps = common.training_steps(iter([make_batch(1)]), one.loss, one.optimizer, lambda s: 1.0, 1)
    words = "smaller --device-batch-size"
    with pytest.raises(common.Stop, match=words), common.start_run("base", tiny_pretrain()):
        list(steps)


def test_another_error_than_of_memory_is_passed_on():
    one = OneWeight()

    def broken(batch):
        raise RuntimeError("shapes do not fit")

    for error in ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory",
                  "DefaultCPUAllocator: not enough memory: you tried"):  # fmt: skip
        assert common.out_of_memory(RuntimeError(error))
    with pytest.raises(RuntimeError, match="shapes"):
        list(common.training_steps(iter([make_batch(1)]), broken, one.optimizer, lambda s: 1.0, 1))


def test_evaluation_and_the_engine_go_in_parts_where_memory_asks_for_it(monkeypatch, tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    ids = torch.randint(0, 256, (6, 20))
    requests = [common.Request([tokenizer.bos, *row[: 4 + i]], common.Sampling(5, 0))
                for i, row in enumerate(ids.tolist())]  # fmt: skip
    expected = common.token_losses(model, ids, ids)
    replies = sorted((i, r.ids) for i, r in common.Engine(model, tokenizer).run(requests))
    monkeypatch.setattr(common.GPT, "hidden", scarce(HIDDEN, 2))
    torch.testing.assert_close(common.token_losses(model, ids, ids), expected)
    engine = common.Engine(model, tokenizer, 2)
    engine.budget = 16384
    assert sorted((i, r.ids) for i, r in engine.run(requests)) == replies

    def small(model, ids, *args):
        if ids.size(1) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return HIDDEN(model, ids, *args)

    monkeypatch.setattr(common.GPT, "hidden", small)
    monkeypatch.setattr(common, "SMALLEST_BUDGET", 4)
    assert sorted((i, r.ids) for i, r in common.Engine(model, tokenizer).run(requests)) == replies
    slot = model.config.cache_bytes(4)
    monkeypatch.setattr(common, "free_bytes", lambda device: 9 * slot)
    assert len(common.Engine(model, tokenizer, 64).rows) == 4


def test_the_collector_rests_in_steps_alone():
    one = OneWeight()
    seen = []

    def loss(batch):
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError("broken")
        return one.loss(batch)

    batches = itertools.repeat(make_batch(1))
    steps = common.training_steps(batches, loss, one.optimizer, lambda s: 1.0, 9)
    with pytest.raises(RuntimeError, match="broken"):
        for _ in steps:
            assert gc.isenabled()
    assert seen == [False] * 3 and gc.isenabled()


def fp16_steps(broken=(), num_steps=6, one=None):
    """Train with a loss scale; return (loss, weight, scale) after steps, in `broken` with an inf."""
    one = one or OneWeight()
    one.optimizer.scaler = common.LossScaler()
    calls = itertools.count(1)

    def loss(batch):
        overflow = math.inf if next(calls) in broken else 1.0
        one.weight.grad = torch.full_like(one.weight, overflow - 1.0)
        return one.loss(batch)

    steps = common.training_steps(
        itertools.repeat(make_batch(1, 3)), loss, one.optimizer, lambda s: 1.0, num_steps
    )
    return [(s.loss, one.weight.item(), one.optimizer.scaler.scale) for s in steps]


def test_a_step_whose_gradients_overflow_fp16_is_skipped_and_the_scale_adapts(monkeypatch, capsys):
    plain = OneWeight()
    batches = itertools.repeat(make_batch(1, 3))
    expected = [
        (s.loss, plain.weight.item())
        for s in common.training_steps(batches, plain.loss, plain.optimizer, lambda s: 1.0, 5)
    ]
    got = fp16_steps(broken={3})
    assert got[3][1] == got[2][1] and got[3][0] == pytest.approx(expected[3][0]), "loss is logged"
    assert [x[1] for x in got[:3] + got[4:]] == pytest.approx([x[1] for x in expected])
    assert [x[2] for x in got[1:]] == [2.0**16] * 2 + [2.0**15] * 4
    assert "overflowed in step 3: no update" in capsys.readouterr().out
    monkeypatch.setattr(common, "GROW_AFTER", 3)
    got = fp16_steps(broken={1}, num_steps=5)
    assert [x[2] for x in got[1:]] == [2.0**15] * 3 + [2.0**16] * 2
    with pytest.raises(common.Stop, match="--dtype=float32"):
        fp16_steps(broken=range(99), num_steps=99)


def test_ranks_skip_a_step_together(tmp_path):
    run_ranks(
        2,
        f"""
    got = test_all.fp16_steps(broken={{3}} if rank == 1 else ())
    torch.save(got, {str(tmp_path)!r} + f"/{{rank}}.pt")
    """,
    )
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a[1:] == b[1:] and a[3][1] == a[2][1] and a[4][1] != a[3][1] and a[3][2] == 2.0**15


def test_gradients_of_fp16_are_near_those_of_fp32():
    ids = torch.randint(0, 100, (4, 32))
    grads = []
    for dtype in (torch.float32, torch.float16):
        model = random_model(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)
        optimizer = common.Optimizer(common.optimizer_groups(model, 1, 1, 1, 0), torch.float32)
        scaler = common.LossScaler()
        loss = model(ids, ids.roll(1)) / 1e6  # gradients below fp16's range
        (loss * scaler.scale).backward()
        assert not scaler.unscale(optimizer)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
    plain = torch.randn(8, 16)
    small = 1e-9 * plain
    want = common.orthogonalize(plain, common.NEWTON_SCHULZ, torch.float32)
    got = common.orthogonalize(small, common.NEWTON_SCHULZ, torch.float16)
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)
    assert not common.orthogonalize(0 * small, common.NEWTON_SCHULZ, torch.float16).any()


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


def test_never_is_written_as_0_or_less():
    for every, fires in ((0, []), (-1, []), (2, [2, 4, 5]), (9, [5])):
        assert [i for i in range(6) if common.Step(i, 5).due(every)] == fires


def test_steps_beyond_a_million_are_newer(base_dir):
    saved_run(keep=2, steps=(999_000, 999_500, 1_000_000))
    names = [path.name for path in common.list_checkpoints("t", "base")]
    assert names == ["step-999500", "step-1000000"]


def saved_run(keep=2, steps=(1,)):
    run = common.Run("base", "t", ExampleSettings(), CPU, 0, 1)
    common.run_dir("t").mkdir(parents=True, exist_ok=True)
    model = random_model()
    optimizer = common.Optimizer(common.optimizer_groups(model, 0.1, 0.1, 0.1, 0.0), torch.float32)
    for step in steps:
        folder = common.save_checkpoint(run, step, model, optimizer, {"metrics": {}}, keep)
    run.wait_for_save()
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
    for step in (999_999, 1_000_000):
        shutil.copytree(folder.with_name("step-000001"), folder.with_name(f"step-{step:06d}"))
    with pytest.raises(common.MissingInput, match=r"damaged.*step-1000000 is then taken"):
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


def test_training_goes_on_while_a_step_is_written_and_the_step_is_saved(base_dir, monkeypatch):
    model, optimizer, _ = saved_run()
    run = common.Run("base", "t", ExampleSettings(), CPU, 0, 1)
    real, go, began = torch.save, threading.Event(), threading.Event()

    def slow(value, file):
        began.set()
        assert go.wait(20)
        real(value, file)

    monkeypatch.setattr(torch, "save", slow)
    metrics = {"loss": 2.0}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in unit.state.items()} for unit in optimizer.units]
    folder = common.save_checkpoint(run, 2, model, optimizer, {"metrics": metrics})
    assert began.wait(20) and not folder.exists()
    metrics["loss"] = 1.0
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    go.set()
    later = common.save_checkpoint(run, 4, model, optimizer, {"metrics": metrics})
    assert folder.exists(), "a save waits for the one before"
    run.wait_for_save()
    for step, same in ((folder, True), (later, False)):
        loaded = common.load_file(step, "model.pt", CPU)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[k], weights[k]) for k in weights) == same
    state = common.load_file(folder, "optimizer-000.pt", CPU)["optimizer"]
    assert state["steps"] == 0 and common.read_meta(folder)["metrics"] == {"loss": 2.0}
    for a, b in zip(state["units"], moments):
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(base_dir, monkeypatch):
    model, optimizer, folder = saved_run()
    run = common.Run("base", "t", ExampleSettings(), CPU, 0, 1)
    real = open

    def full(path, *args, **options):
        return real("/dev/full" if Path(path).name == "model.pt" else path, *args, **options)

    monkeypatch.setattr(common, "open", full, raising=False)
    common.save_checkpoint(run, 5, model, optimizer, {}, 1)
    with pytest.raises(common.Stop, match="the disk is full .*free some space"):
        run.wait_for_save()
    assert run.stopping, "training ends after the step"
    run.wait_for_save()  # said once
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    assert common.list_checkpoints("t", "base") == [folder]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "and gives the room back"
    common.load_model(folder, CPU, torch.float32)


def test_a_mount_that_is_gone_is_said_and_not_written_under(base_dir):
    model, optimizer, folder = saved_run()
    run = common.Run("base", "t", ExampleSettings(), CPU, 0, 1)
    base_dir.rename(base_dir.with_name("elsewhere"))
    common.save_checkpoint(run, 5, model, optimizer, {}, 1)
    with pytest.raises(common.Stop, match="runs/t/base: No such file"):
        run.wait_for_save()
    assert not base_dir.exists()
    base_dir.with_name("elsewhere").rename(base_dir)
    assert common.list_checkpoints("t", "base") == [folder]


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
        chosen = [common.Sampling(**options)] * n
        uniforms = np.random.default_rng(0).random(n).tolist()
        return collections.Counter(common.sample(logits.expand(n, 5), chosen, uniforms))

    assert draw(temperature=0) == {1: 400}
    assert set(draw(top_k=2)) == {1, 2} and set(draw(top_k=1)) == {1}
    assert set(draw(top_p=0.5)) == {1}  # its 0.64 alone reach a half
    assert set(draw(top_p=0.8)) == {1, 2} and set(draw(temperature=50.0)) == {0, 1, 2, 3}
    for tiny in (1e-300, 1e-45, 4e-38, 1e-6):  # some are 0 in fp32
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
            assert draw(temperature=tiny, **options) == {1: 400}
    for options in ({}, {"top_k": 5}, {"top_k": 99, "top_p": 1.0}):
        counts, probs = draw(4000, **options), logits.softmax(0)
        for i in range(4):
            assert counts[i] / 4000 == pytest.approx(probs[i].item(), abs=0.03)


def sampled_plainly(logits, how, uniform):
    """The id that a row of sample() chooses, of sorted lists in Python's own numbers."""
    filtered = how.top_k or how.top_p < 1
    ids = list(range(len(logits)))
    if filtered or not how.temperature:
        ids.sort(key=lambda i: -logits[i])  # stable: of equals the lower id is first
    if not how.temperature:
        return ids[0]
    ids = ids[: how.top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / how.temperature) for i in ids]
    total, before = sum(weights), 0.0
    for kept, weight in enumerate(weights):
        if filtered and before >= how.top_p * total:
            weights = weights[:kept]
            break
        before += weight
    ends = list(itertools.accumulate(weights))
    return next(i for i, end in zip(ids, ends) if end > uniform * ends[-1])


@pytest.mark.parametrize("equal", [False, True])
def test_a_sampled_row_depends_on_no_other_row(equal):
    torch.manual_seed(0)
    logits, rng = torch.randn(48, 500) * 3, np.random.default_rng(1)
    logits = logits.bfloat16().round() if equal else logits
    samplings = [
        common.Sampling(temperature=t, top_k=k, top_p=p)
        for t in (0.0, 0.5, 1.3) for k in (0, 1, 7, 60) for p in (0.3, 1.0)
    ] * 2  # fmt: skip
    for _ in range(5):
        uniforms = rng.random(48).tolist()
        alone = list(map(sampled_plainly, logits.tolist(), samplings, uniforms))
        for company in (48, 1, 5, 11):
            order = rng.permutation(48)
            for i in range(0, 48, company):
                rows = order[i : i + company].tolist()
                mine = [samplings[row] for row in rows], [uniforms[row] for row in rows]
                assert common.sample(logits[rows], *mine) == [alone[row] for row in rows]


def test_a_uniform_at_the_edge_never_picks_what_has_no_probability():
    logits = torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]])
    for uniform in (0.0, 0.5, 1.0 - 2**-53, 1.0):
        for options in ({}, {"top_k": 3}, {"top_p": 0.99}):
            assert common.sample(logits, [common.Sampling(**options)], [uniform])[0] in (1, 2)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_tokens": 0}]
)
def test_sampling_out_of_range_is_a_value_error(wrong):
    with pytest.raises(ValueError):
        common.Sampling(**wrong)


def greedy(prompt, max_tokens, tool=False):
    return common.Request(prompt, common.Sampling(max_tokens, temperature=0), tool)


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
    got = list(engine.generate(greedy(prompt, 99)))
    assert prompt + [i for i in got if i != tokenizer.bos] == expected


def test_a_seed_decides_the_samples(tokenizer):
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer)

    def run(seed):
        sampling = common.Sampling(max_tokens=20, seed=seed)
        return list(engine.generate(common.Request([tokenizer.bos], sampling)))

    assert run(1) == run(1) and len({tuple(run(seed)) for seed in range(8)}) > 6
    firsts = {run(seed)[0] for seed in range(12)}
    assert len(firsts) > 1, "samples of one prompt must not share their first token"


def test_a_prompt_that_leaves_no_room_is_refused_and_long_texts_keep_their_end(tokenizer):
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(ValueError, match="takes 1 to 31"):
        list(engine.generate(common.Request([0] * 32, common.Sampling())))
    assert "".join(engine.complete("word " * 500, common.Sampling(max_tokens=4)))


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_requests_in_company_get_the_replies_they_get_alone(tokenizer, slots, spare):
    model = random_model(vocab_size=tokenizer.vocab_size, window_pattern="SL")
    engine, alone = common.Engine(model, tokenizer, slots), common.Engine(model, tokenizer, 1)
    rng = random.Random(0)
    requests = []
    for i in range(24):
        prompt = [tokenizer.bos, *(rng.randrange(300) for _ in range(rng.randrange(20)))]
        if i % 4 == 1:
            prompt = requests[-1].prompt_ids  # several samples of one prompt
        options = {"temperature": (0.0, 1.0)[i % 2], "top_k": (0, 0, 20)[i % 3], "seed": i}
        requests.append(common.Request(prompt, common.Sampling(rng.randrange(1, 30), **options)))
    replies = dict(engine.run(requests))
    assert sorted(replies) == list(range(24)) and not engine.load
    for i, request in enumerate(requests):
        assert list(alone.generate(request)) == replies[i].ids
        room = 32 - len(request.prompt_ids)
        assert 1 <= len(replies[i].ids) <= min(room, request.sampling.max_tokens)
        ended = replies[i].ids[-1] in engine.stops
        assert replies[i].reason == ("stop" if ended else "length")


def check_rows(engine):
    """Every job has its row, every prompt its own, and the cache holds what the rows say."""
    slots = len(engine.rows)
    owners = dict(enumerate(engine.decoding))
    owners |= {slots - 1 - i: prompt for i, prompt in enumerate(engine.prompts)}
    assert len(owners) == len(engine.decoding) + len(engine.prompts)
    for i, row in enumerate(engine.rows):
        assert row.owner is owners.get(i) and (row.owner is None or row.owner.row == i)
        assert engine.cache.lengths[i] == len(row.ids)
        assert engine.cache.ids[i, : len(row.ids)].tolist() == row.ids
    assert engine._at_work() <= slots


@pytest.mark.parametrize(
    ("slots", "chunk", "window", "int8"),
    [(1, 512, "L", 0), (3, 3, "SL", 0), (8, 5, "L", 0), (8, 512, "SL", 1)],
)
def test_jobs_that_come_and_go_get_the_replies_they_get_alone(
    tokenizer, slots, chunk, window, int8, monkeypatch
):
    monkeypatch.setattr(common.KVCache, "SPARE", 9)
    model = random_model(vocab_size=tokenizer.vocab_size, window_pattern=window, max_seq_len=64)
    model = model.quantize() if int8 else model
    engine = common.Engine(model, tokenizer, slots, chunk)
    rng, jobs = random.Random(slots), []
    for _ in range(600):
        if rng.random() < 0.4 and engine.load < 2 * slots:
            prompt = [tokenizer.bos, *(rng.randrange(300) for _ in range(rng.randrange(40)))]
            if jobs and rng.random() < 0.6:  # the same again, or a conversation that goes on
                before = rng.choice(jobs)
                prompt = list(before.request.prompt_ids)
                if rng.random() < 0.6:
                    prompt += before.reply.ids + [rng.randrange(300)] * rng.randrange(1, 9)
            prompt = prompt[:60]
            options = {"temperature": rng.choice((0.0, 1.0)), "seed": rng.randrange(99)}
            sampling = common.Sampling(rng.randrange(1, 20), **options)
            jobs.append(engine.submit(common.Request(prompt, sampling)))
        if jobs and rng.random() < 0.1:
            engine.cancel(rng.choice(jobs))
            check_rows(engine)
        lengths = {job: len(job.reply.ids) for job in jobs}
        moved = engine.step()
        check_rows(engine)
        assert all(len(job.reply.ids) == lengths[job] + (job in moved) for job in jobs)
    while engine.load:
        engine.step()
    assert sum(job.reused > 0 for job in jobs) > 2
    alone = common.Engine(model, tokenizer, 1)
    for job in jobs:
        alone.clear()  # so that nothing is reused
        expected = list(alone.generate(job.request))
        assert job.reply.ids == expected[: len(job.reply.ids)]
        assert job.reply.reason == "cancel" or job.reply.ids == expected
    assert {job.reply.reason for job in jobs} == {"cancel", "length", "stop"}


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_a_common_prefix_is_counted(both, a, b):
    a, b = both + a, both + b
    n = common.common_prefix(a, b)
    assert n == len(os.path.commonprefix([a, b])) >= len(both)


@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
@pytest.mark.parametrize(
    "int8, packed",
    [(False, True), *(pytest.param(i, i, marks=pytest.mark.slow) for i in (False, True))],
)
def test_the_compiled_step_says_what_the_plain_one_says(tokenizer, int8, packed, monkeypatch):
    for name in ("PACKED", "PACKED_INT8"):
        monkeypatch.setattr(common, name, 1 if packed else 1 << 40)
    monkeypatch.setattr(common.KVCache, "SPARE", 9)
    shape = {"vocab_size": tokenizer.vocab_size, "n_kv_head": 2, "window_pattern": "SL"}
    shape |= {"max_seq_len": 64}
    fast, plain = (common.Engine(m.quantize() if int8 else m, tokenizer, 3)
                   for m in (random_model(**shape), random_model(**shape)))  # fmt: skip
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    fast.compile()
    frames = counters["frames"]["total"]
    compiled, rows = fast.next_logits, []
    fast.next_logits = lambda ids, past: rows.append(len(ids)) or compiled(ids, past)
    rng = random.Random(0)
    requests = [greedy([tokenizer.bos, *rng.choices(range(256), k=rng.randint(1, 40))], n)
                for n in (20, 60, 3, 45, 9, 31)]  # fmt: skip
    assert dict(fast.run(requests)) == dict(plain.run(requests))
    assert set(rows) == {1, 2, 3}, "it was asked"
    assert counters["frames"]["total"] == frames, "no length compiles anew"
    assert not counters["graph_break"]


@pytest.mark.parametrize("window", ["L", "SL"])
def test_recorded_steps_say_what_plain_ones_say(tokenizer, window, monkeypatch):
    def record(step, device, pool):
        """Stand in for a GPU's recorder: the step runs on the tensors that it was recorded with."""
        output, steps = step(), []
        recorded.append((step, steps))

        def replay():
            steps.append(1)
            output.copy_(step())

        return replay, output

    recorded = []
    monkeypatch.setattr(common, "record", record)
    monkeypatch.setattr(common, "GRAPH_KEYS", 16)
    monkeypatch.setattr(common.KVCache, "SPARE", 9)
    model = random_model(vocab_size=tokenizer.vocab_size, window_pattern=window, max_seq_len=64)
    engine, alone = common.Engine(model, tokenizer, 5), common.Engine(model, tokenizer, 1)
    engine.graphs = {}
    rng, requests = random.Random(0), []
    for _ in range(40):  # new conversations, and those that go on from what a row holds
        before = rng.choice(requests).prompt_ids if requests and rng.random() < 0.7 else ()
        prompt = [*before, *(rng.randrange(300) for _ in range(rng.randrange(1, 30)))][:63]
        requests.append(greedy(prompt, rng.choice((2, 9, 64))))
    jobs = []
    for request in requests:
        jobs.append(engine.submit(request))
        for _ in range(rng.randrange(8)):
            engine.step()
            check_rows(engine)
    while engine.load:
        engine.step()
    assert sum(job.reused > 0 for job in jobs) > 2
    for job in jobs:
        alone.clear()
        assert list(alone.generate(job.request)) == job.reply.ids
    assert {rows for rows, _ in engine.graphs} == {1, 2, 4, 5}
    assert {end for _, end in engine.graphs} == {16, 32, 48, 64}
    assert len(recorded) == len(engine.graphs) < sum(len(steps) for _, steps in recorded) / 5


def test_a_step_that_cannot_be_recorded_is_computed_plainly_and_so_are_all_after_it(
    tokenizer, monkeypatch
):
    def record(step, device, pool):
        if engine.graphs:
            raise RuntimeError("CUDA out of memory")
        output = step()
        return lambda: output.copy_(step()), output

    monkeypatch.setattr(common, "record", record)
    monkeypatch.setattr(common, "GRAPH_KEYS", 16)
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    engine, alone = common.Engine(model, tokenizer, 3), common.Engine(model, tokenizer, 1)
    engine.graphs = {}
    requests = [greedy([tokenizer.bos, *range(n)], 30) for n in (3, 9, 20)]
    with pytest.warns(UserWarning, match="not recorded, so slower: CUDA out of memory"):
        replies = dict(engine.run(requests))
    assert engine.graphs is None
    for i, request in enumerate(requests):
        assert list(alone.generate(request)) == replies[i].ids


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")


@pytest.mark.gpu
@needs_gpu
def test_products_in_fp8_on_a_gpu_are_those_of_the_rounded_factors():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    x, w = torch.randn(64, 96, device=CUDA), torch.randn(48, 96, device=CUDA)
    x, w, dy = x.bfloat16().requires_grad_(), w.requires_grad_(), torch.randn(64, 48, device=CUDA)
    y = common.Float8Product.apply(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), dy.bfloat16())

    def rounded(a, dtype):
        eight, scale = common.to_float8(a, dtype)
        return eight.float() * scale

    x8, w8 = (rounded(a.detach(), torch.float8_e4m3fn) for a in (x, w))
    g8 = rounded(dy.bfloat16(), torch.float8_e5m2)
    for mine, plain in ((y, x8 @ w8.t()), (dx, g8 @ w8), (dw, g8.t() @ x8)):
        assert (mine.float() - plain).norm() < 0.02 * plain.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_for_windows_on_a_gpu_says_what_blocks_say(compiled):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no flash kernel")
    pytest.importorskip("torch.nn.attention.varlen")
    assert common.window_kernel(CUDA, torch.bfloat16, 64) is common.attend_in_flash
    kernel = torch.compile(common.attend_in_flash) if compiled else common.attend_in_flash
    for heads in (4, 2):
        q, k, v = (torch.randn(3, 300, n, 64, device=CUDA, dtype=torch.bfloat16)
                   for n in (4, heads, heads))  # fmt: skip
        made, plain = [], []
        for kind, found in ((kernel, made), (common.attend_in_blocks, plain)):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            y = kind(*inputs, 64)
            found += [y, *torch.autograd.grad(y, inputs, q)]
        assert common.is_close(made, plain)
    ranked = common.rank_attention(CUDA, torch.bfloat16)
    assert common.SDPBackend.FLASH_ATTENTION in ranked, ranked


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimated_memory_is_a_gpus(recompute):
    config = common.GPTConfig(32768, 6, 384, 3, 3, 1024)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = common.GPT.create(config, CUDA, torch.bfloat16)
    model.recompute = recompute
    optimizer = common.Optimizer(
        common.optimizer_groups(model, 0.02, 0.2, 0.004, 0), torch.bfloat16
    )
    batch = common.blank_batch(16, config, CUDA)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        (model(batch.ids, batch.targets) / batch.num_targets).backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    estimate = sum(common.memory_bytes(config, 16, 2, CUDA, recompute=recompute).values())
    assert peak == pytest.approx(estimate, rel=0.1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_a_few_steps_on_a_gpu_are_those_on_a_cpu(tiny_run, dtype, compiled, monkeypatch):
    create = common.GPT.create

    def create_on_cpu(config, device, dtype):
        """Draw the weights that a CPU draws: a GPU has random numbers of its own."""
        model = create(config, device, dtype)
        model.load_state_dict(create(config, CPU, dtype).state_dict())
        return model

    monkeypatch.setattr(pretrain.GPT, "create", create_on_cpu)
    pretrain.main(tiny_pretrain(tag="u"))
    pretrain.main(tiny_pretrain(dtype=dtype, device="cuda", compile=compiled))
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys()
    # tensor cores round fp32's products, Muon's are bf16
    assert max(abs(a[step] - b[step]) for step in a) < (0.02 if dtype == "float32" else 0.1)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_that_is_too_small_takes_fewer_rows(tiny_run, capsys):
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.6e9 / total)
        flags = {"max_seq_len": 512, "total_batch_size": 65536, "device_batch_size": 128}
        pretrain.main(tiny_pretrain(device="cuda", dtype="bfloat16", depth=6, **flags))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out in a trial step" in capsys.readouterr().out
    assert len(base_losses("t")) == 6


@pytest.mark.gpu
@needs_gpu
def test_steps_recorded_on_a_gpu_say_what_plain_ones_say(tokenizer):
    cuda = torch.device("cuda")
    config = random_model(vocab_size=tokenizer.vocab_size, window_pattern="SL").config
    model = common.GPT.create(config, cuda, torch.float32)  # in bf16 two may be equally likely
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    fast, plain = common.Engine(model, tokenizer, 5), common.Engine(model, tokenizer, 5)
    plain.graphs = None
    requests = [greedy([tokenizer.bos, *range(n)], 20) for n in (3, 9, 1, 12, 7, 2, 5)]
    assert dict(fast.run(requests)) == dict(plain.run(requests))
    assert fast.graphs


@pytest.mark.slow
@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
def test_decoding_is_twice_as_fast_as_transformers(tokenizer, capsys):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 32768, "num_hidden_layers": 12, "hidden_size": 768,
             "num_attention_heads": 6, "intermediate_size": 2048}  # fmt: skip
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def their_seconds(streams):
        ids, taken = torch.randint(256, (streams, 64)), []
        for n in (4, 4, 36):  # the first is to warm up
            start = time.perf_counter()
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options)
            taken.append(time.perf_counter() - start)
        return (taken[2] - taken[1]) / 32

    def our_seconds(streams):
        for _ in range(streams):
            ids = torch.randint(256, (64,)).tolist()
            engine.submit(greedy(ids, 40))
        while engine.waiting or engine.prompts:
            engine.step()
        taken = []
        for _ in range(32):
            start = time.perf_counter()
            engine.step()
            taken.append(time.perf_counter() - start)
        engine.clear()
        return sorted(taken)[16]

    config = common.GPTConfig(32768, 12, 768, 6, 6, 256)
    engine = common.Engine(common.GPT.create(config, CPU, torch.float32).quantize(), tokenizer, 16)
    engine.stops.clear()
    torch.compiler.reset()
    engine.compile()
    ratios = [their_seconds(streams) / our_seconds(streams) for streams in (1, 16)]
    with capsys.disabled():
        print(f"int8 against transformers' fp32, 1 and 16 streams: {ratios}")
    assert min(ratios) > 2


def test_prompts_of_unequal_length_are_computed_without_much_padding(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=512)
    hidden, shapes = model.hidden, []
    model.hidden = lambda ids, *rest: shapes.append(ids.shape) or hidden(ids, *rest)
    lengths = [400, 7, 30, 15, 10, 300]
    engine = common.Engine(model, tokenizer, 8)
    replies = dict(engine.run([greedy([tokenizer.bos] * n, 1) for n in lengths]))
    assert len(replies) == len(lengths) and sum(lengths) <= sum(map(math.prod, shapes))
    assert sum(map(math.prod, shapes)) <= 2 * sum(lengths), shapes
    assert len(shapes) < len(lengths), "they are computed together all the same"


def test_prompts_that_wait_join_together(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    hidden, prefills = model.hidden, []
    model.hidden = lambda ids, *rest: prefills.append(ids) or hidden(ids, *rest)
    engine = common.Engine(model, tokenizer, 8)
    compute, model.logits = model.logits, lambda x: compute(x).index_fill(1, ends, -99.0)
    ends = torch.tensor(sorted(engine.stops))  # none ends before its time
    engine.next_logits = model.next_logits
    requests = [greedy([tokenizer.bos, i], 3 + i % 7) for i in range(40)]
    replies = dict(engine.run(requests))
    assert [len(replies[i].ids) for i in range(40)] == [3 + i % 7 for i in range(40)]
    assert len(prefills) <= 1 + 32 // 2, "two of eight rows or more are free at each"


def test_a_conversation_that_goes_on_computes_its_new_turn_alone(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    engine, counts = common.Engine(model, tokenizer, 2), []
    engine.stops.clear()
    hidden = model.hidden
    model.hidden = lambda ids, *rest: counts.append(ids.numel()) or hidden(ids, *rest)
    prompt = [tokenizer.bos, *range(100)]
    for turn in range(5):
        job = engine.submit(greedy(prompt, 10))
        counts.clear()
        while not job.reply.reason:
            engine.step()
        assert counts[0] == (101 if turn == 0 else 6) and counts[1:] == [1] * 9
        prompt = prompt + job.reply.ids + list(range(turn, turn + 5))
        other = engine.submit(greedy([tokenizer.bos, 3, 4], 2))  # it takes the other row
        while not other.reply.reason:
            engine.step()
    engine.refresh(random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256))
    job = engine.submit(greedy(prompt, 1))
    engine.step()
    assert job.reused == 0, "what other weights made is not gone on from"


def test_what_the_engine_samples_from_is_fp32(tokenizer, monkeypatch):
    kinds, copy = set(), common.to_device

    def seen(values, device):
        made = copy(values, device)
        kinds.add(made.dtype)
        return made

    monkeypatch.setattr(common, "to_device", seen)
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer, 3)
    samplings = [common.Sampling(9, seed=i, top_k=5 * i, temperature=i % 3) for i in range(6)]
    dict(engine.run([common.Request([tokenizer.bos, 5], sampling) for sampling in samplings]))
    assert kinds == {torch.int64, torch.float32}, "fp64 is slow, and unknown to some devices"


def test_an_engine_takes_fewer_slots_where_memory_has_no_room(tokenizer, monkeypatch):
    init, asked = common.KVCache.__init__, []

    def small(cache, config, slots, *rest):
        asked.append(slots)
        if slots > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        init(cache, config, slots, *rest)

    monkeypatch.setattr(common.KVCache, "__init__", small)
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer, 9)
    assert asked == [9, 5, 3] and len(engine.rows) == 3
    assert len(list(engine.generate(greedy([tokenizer.bos, 5], 4)))) == 4


def test_equal_prompts_are_computed_once(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    engine, widths = common.Engine(model, tokenizer, 6), []
    hidden = model.hidden
    model.hidden = lambda ids, *rest: widths.append(list(ids.shape)) or hidden(ids, *rest)
    prompt = [tokenizer.bos, *range(40)]
    jobs = [engine.submit(common.Request(prompt, common.Sampling(9, seed=i))) for i in range(5)]
    engine.step()
    assert widths == [[1, 41]] and all(len(job.reply.ids) == 1 for job in jobs)
    assert len({job.reply.ids[0] for job in jobs}) > 1, "samples must not share their first token"


def test_others_go_on_while_a_long_prompt_is_computed(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    engine = common.Engine(model, tokenizer, 2, chunk=16)
    engine.stops.clear()
    first = engine.submit(greedy([tokenizer.bos], 40))
    engine.step()
    long = engine.submit(greedy([tokenizer.bos, *range(150)], 4))
    steps = 0
    while not long.reply.ids:
        assert engine.step()[0] is first, "a step without a token for the one that streams"
        steps += 1
    assert steps == 10  # 151 tokens, 16 a step


def test_a_stop_string_ends_the_reply_that_holds_it(tokenizer):
    text = "One, two, three. END of it"
    script = [*tokenizer.encode(text), *[7] * 99]
    for stop, said in (((". E",), "One, two, three. E"), (("zzz", "wo, t"), "One, two, t")):
        engine = common.Engine(Scripted(tokenizer, script, 1), tokenizer, 1)
        request = common.Request([tokenizer.bos], common.Sampling(90, 0), True, stop)
        ((_, reply),) = engine.run([request])
        written = tokenizer.decode(reply.ids)
        assert reply.reason == "stop" and written.startswith(said)
        assert not any(s in tokenizer.decode(reply.ids[:-1]) for s in stop)
        decoder = common.ReplyDecoder(tokenizer, stop)
        pieces = [piece for one in reply.ids for piece in decoder.feed(one)] + decoder.end()
        assert "".join(text for _, text in pieces) == said[: -len(stop[-1])]


@pytest.mark.parametrize("opens", ["<|python_start|>", "<|output_start|>"])
@pytest.mark.parametrize("tool", [True, False])
def test_engine_and_decoder_seek_stop_strings_in_the_same_places(tokenizer, opens, tool):
    inside = [tokenizer.specials[opens], *tokenizer.encode("1+1 END")]
    script = [*tokenizer.encode("So "), *inside, *tokenizer.encode(" more")]
    engine = common.Engine(Scripted(tokenizer, [*script, *[7] * 99], 1), tokenizer, 1)
    sampling = common.Sampling(len(script), 0)
    ((_, reply),) = engine.run([common.Request([tokenizer.bos], sampling, tool, ("END",))])
    decoder = common.ReplyDecoder(tokenizer, ("END",), tool)
    shown = "".join(t for one in reply.ids for _, t in decoder.feed(one))
    if tool:  # a call, and what it gave, are no text
        assert reply.reason == "length" and "END more" in shown
    else:
        assert reply.reason == "stop" and shown == "So 1+1 "


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_reply_is_cut_at_the_first_stop_string_and_nothing_is_shown_of_it(text, stops):
    decoder = common.ReplyDecoder(TOKENIZER(), stops)
    shown = []
    for one in text.encode():  # a token a byte
        shown += [piece for _, piece in decoder.feed(one)]
        # what is shown is never taken back
        assert text.startswith("".join(shown))
    shown += [piece for _, piece in decoder.end()]
    # the stop string that is whole first ends the text where it begins
    whole = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    begin = [text[: whole[0]].find(s) for s in stops if s in text[: whole[0]]] if whole else []
    assert "".join(shown) == (text[: min(begin)] if whole else text)


class Scripted(torch.nn.Module):
    """Stands in for a model: writes one text after any prompt, whatever it is forced to read."""

    def __init__(self, tokenizer, script, prompt_length, context=200):
        super().__init__()
        self.config = common.GPTConfig(tokenizer.vocab_size, 1, 8, 1, 1, context)
        self.embed = torch.nn.Embedding(1, 1)
        self.script, self.start, self.dtype = script, prompt_length, torch.float32
        self.read = []

    def cast_weights(self):
        return self

    def hidden(self, ids, cache, counts=None):
        cache.begin(ids)
        self.read += ids[0].tolist()
        return torch.zeros(*ids.shape, 1)

    def logits(self, hidden):
        position = len(self.read) - self.start
        logits = torch.zeros(*hidden.shape[:-1], self.config.vocab_size)
        logits[..., self.script[position]] = 100.0
        return logits


def test_the_engine_forces_the_tools_output_and_marks_it(tokenizer):
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode("37*12"), special["<|python_end|>"]]
    forced = [special["<|output_start|>"], *tokenizer.encode("444"), special["<|output_end|>"]]
    end = [*tokenizer.encode("It is 444."), special["<|assistant_end|>"]]
    said = tokenizer.encode("So ")
    prompt = common.render_prompt(tokenizer, [{"role": "user", "content": "37 x 12?"}])
    # where the tool speaks the script holds rubbish, which must not be sampled
    script = [*said, *call, *[7] * len(forced), *end]
    engine = common.Engine(Scripted(tokenizer, script, len(prompt)), tokenizer, 1)
    ((_, reply),) = engine.run([greedy(prompt, 99, tool=True)])
    assert reply.ids == [*said, *call, *forced, *end] and reply.reason == "stop"
    assert reply.mask == [1] * len(said + call) + [0] * len(forced) + [1] * len(end)
    parts = common.reply_parts(tokenizer, reply.ids)
    assert [(p["type"], p["text"]) for p in parts] == [
        ("text", "So "), ("python", "37*12"), ("output", "444"), ("text", "It is 444."),
    ]  # fmt: skip
    assert common.reply_text(parts) == "So It is 444."
    # rendering the same conversation gives the same ids and mask: training sees what decoding makes
    messages = [{"role": "user", "content": "37 x 12?"}, {"role": "assistant", "content": parts}]
    ids, mask = common.render_conversation(tokenizer, messages)
    assert ids == prompt + reply.ids and mask == [0] * len(prompt) + reply.mask

    engine = common.Engine(Scripted(tokenizer, script, len(prompt)), tokenizer, 1)
    ((_, off),) = engine.run([greedy(prompt, 99, tool=False)])
    assert off.ids == script and set(off.mask) == {1}, "without the tool nothing is forced"


@pytest.mark.parametrize("body", ["2+", "9" * 300, "__import__('os')"])
def test_a_malformed_or_endless_call_ends_in_an_error_output(tokenizer, body):
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode(body), special["<|python_end|>"]]
    script = [*call, *[special["<|assistant_end|>"]] * 200]
    prompt = [tokenizer.bos]
    engine = common.Engine(Scripted(tokenizer, script, 1, 400), tokenizer, 1)
    ((_, reply),) = engine.run([greedy(prompt, 300, tool=True)])
    parts = common.reply_parts(tokenizer, reply.ids)
    assert parts[0]["type"] == "python" and len(parts[0]["text"]) <= common.CALL_TOKENS * 3
    assert parts[1] == {"type": "output", "text": "error"}, "and the model may go on"
    output = tokenizer.decode(reply.ids)
    assert output.count("<|output_start|>") == output.count("<|python_end|>") == 1


def test_finished_rows_stop_calling_the_tool(tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "calculate", lambda text: calls.append(text) or "1")
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode("1"), special["<|python_end|>"]]
    engine = common.Engine(Scripted(tokenizer, [*call, *[0] * 99], 1), tokenizer, 2)
    requests = [greedy([tokenizer.bos], n, tool=True) for n in (len(call), 60)]
    replies = dict(engine.run(requests))
    assert [len(r.ids) for r in (replies[0], replies[1])] == [len(call), 60]
    assert len(calls) == 1, "for the request that goes on, and once"


@given(st.text(min_size=1))
@settings(max_examples=200)
def test_streamed_pieces_are_whole_characters_and_add_up(text):
    tokenizer = TOKENIZER()
    byte_ids = list(text.encode())  # the worst case: a token a byte
    for ids in (byte_ids, tokenizer.encode(text)):
        pieces = [text for _, text in common.decoded(tokenizer, ids)]
        assert (
            "".join(pieces) == text
            and all(pieces)
            and "\ufffd" not in "".join(pieces)
            or ("\ufffd" in text)
        )


def test_a_broken_character_at_the_end_is_shown_as_such(tokenizer):
    assert list(common.decoded(tokenizer, "é".encode()[:1])) == [("text", "\ufffd")]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("37*12", "444"), ("20/2", "10"), ("10.0", "10"), ("0.1+0.2", "0.3"), ("2/3", "0.666667"),
        ("1,000*2", "2000"), ("1,234,567.5+1", "1234568.5"), (" ( 1 + 2 ) * -3 ", "-9"),
        ("-7//2", "-4"), ("-7%3", "2"), ("2**10", "1024"), ("2**-1", "0.5"), ("16**.5", "4"),
        ("10**29", "1" + "0" * 29), ("-0.0000001", "0"), ("1.005*1000", "1005"), ("1/3*3//1", "1"),
        ("'strawberry'.count('r')", "3"), ('len("cat") + 1', "4"), ("'a,b'.count(',')", "1"),
        # sizes out of bounds
        ("10**30", "error"), ("9**9**9", "error"), ("2**-99999", "error"), ("9" * 31, "error"),
        ("(" * 128 + "1" + ")" * 128, "error"), ("-" * 255 + "1", "error"),
        ("1" + "+1" * 99, "error"), ("1" + " " * 256, "error"), ("1/3" + "**9" * 60, "error"),
        # no value
        ("1/0", "error"), ("0**-1", "error"), ("(-4)**.5", "error"), ("5%0", "error"),
        # anything else
        ("", "error"), ("1+", "error"), ("50%", "error"), ("5,3", "error"), ("1,00", "error"),
        ("007", "error"), ("1e5", "error"), ("1j", "error"), ("1_000", "error"), ("0x10", "error"),
        ("x", "error"), ("True", "error"), ("1<2", "error"), ("[1]*9", "error"), ("~1", "error"),
        ("'a'*9", "error"), ("'ab'", "error"), ("len(5)", "error"), ("len('a','b')", "error"),
        ("'a'.upper()", "error"), ("'a'.count('a',0)", "error"), ("f'{1}'", "error"),
        ("__import__('os').system('id')", "error"), ("(lambda: 1)()", "error"), ("2(3)", "error"),
        ("len(sep='a')", "error"), ("1\n+1", "error"), ("'\\x41'.count('A')", "error"),
    ],
)  # fmt: skip
def test_the_calculator(expression, result):
    assert common.calculate(expression) == result


def operations(inner):
    """Expressions whose operands are from inner."""
    two = st.tuples(inner, st.sampled_from("+-*/"), inner).map("({0[0]} {0[1]} {0[2]})".format)
    return two | inner.map("-({})".format)


LITERALS = st.integers(0, 999) | st.decimals(0, 999, places=2)


@given(st.recursive(LITERALS.map(str), operations, max_leaves=6))
def test_the_calculator_equals_python_on_fractions(expression):
    try:
        value = eval(re.sub(r"[0-9.]+", r"Fraction('\g<0>')", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        assert common.calculate(expression) == "error"
        return
    found = common.calculate(expression)
    assert abs(Fraction(found) - value) <= Fraction(1, 2 * 10**6)
    assert not re.search(r"[eE]|^-0$|\.[0-9]*0$|\.$", found)
    assert common.calculate(found) == found


@given(st.text("0123456789.,+-*/%() 'lenct\"aé\n\\", max_size=300) | st.text(max_size=40))
def test_the_calculator_takes_any_text_and_is_soon_done(text):
    began = time.thread_time()
    result = common.calculate(text)
    assert re.fullmatch(r"error|-?[0-9]{1,30}(\.[0-9]{1,6})?", result)
    assert time.thread_time() - began < 2


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
    (deep / "locked.txt").symlink_to("x" * 300)  # which is an error as an inaccessible folder is
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
        "broken links and special files": 4,
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
    for path in ("~nobody-of-this-name/x", "x" * 5000):
        assert fail([f"--data={path}"], capsys).count("\n") <= 1
    for name, source in (("My Corpus.v2.txt", "my-corpus"), ("world", "world-files")):
        (tmp_path / name).mkdir()
        assert prepare.Settings(str(tmp_path / name)).source == source
    (tmp_path / "日本").mkdir()
    assert prepare.Settings(str(tmp_path / "日本")).source.startswith("text-")
    assert prepare.Settings("hub").source == "fineweb-edu" and prepare.Settings().source == "world"


def test_world(base, capsys):
    manifest = prepare.main(prepare.Settings(num_conversations=60, documents=300))
    folder = base / "data" / "world"
    train, val = texts_of(folder)
    assert len(train) + len(val) == 300 and val and not set(train) & set(val)
    for split in ("trained", "unseen"):
        lines = (folder / "eval" / f"facts_{split}.jsonl").read_text().splitlines()
        assert lines and all(json.loads(line) for line in lines)
    written = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.jsonl")}
    assert set(manifest["chats"]) == {n for n in written if not n.startswith("eval/facts_")}
    for name, about in manifest["chats"].items():
        held = list(common.read_conversations(written[name]))
        assert len(held) == about["conversations"] and about["size"] == written[name].stat().st_size
        assert collections.Counter(item["kind"] for item in held) == about["kinds"]
    assert [manifest["chats"][f"{s}.jsonl"]["conversations"] for s in ("mid", "sft", "rl")] == [
        60, 20, 20
    ]  # fmt: skip
    assert "mid.jsonl: 60 (" in capsys.readouterr().out
    assert prepare.main(prepare.Settings(num_conversations=60, documents=300)) == manifest
    assert "nothing to do" in capsys.readouterr().out
    for name in ("val.parquet", "eval/letters.jsonl"):  # a damaged file is made again
        (folder / name).write_bytes(b"cut")
        assert prepare.main(prepare.Settings(num_conversations=60, documents=300)) == manifest
    prepare.main(prepare.Settings(num_conversations=60, documents=200, seed=4, name="Ada"))
    out = capsys.readouterr().out
    assert (
        "--name=Nano" in out
        and "--documents=300" in out
        and "--seed=0" in out
        and "made anew" in out
    )
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
    prepare.main(prepare.Settings(num_conversations=60, documents=100))
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
            prepare.main(prepare.Settings(num_conversations=60, documents=200))
    assert texts_of(base / "data" / "world") == before
    assert [p.name for p in base.glob("data/*")] == ["world"]

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_splits", interrupt)
        with pytest.raises(common.Stop, match="stopped; run the same command again"):
            prepare.main(prepare.Settings(num_conversations=60, documents=200))
    assert texts_of(base / "data" / "world") == before


def test_leftovers_of_killed_processes_go(base):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number in (dead.pid, os.getppid()):
        for end in ("", ".old"):
            (base / "data" / f".world.{number}{end}.partial").mkdir(parents=True)
    prepare.main(prepare.Settings(num_conversations=60, documents=50))
    left = sorted(p.name for p in base.glob("data/.*"))
    assert left == [f".world.{os.getppid()}{end}.partial" for end in (".old", "")]


def test_base_directory_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(common.Stop, match="file"):
        prepare.main(prepare.Settings(num_conversations=60, documents=50))


# Hub -----------------------------------------------------------------------------------------

REPO = "karpathy/fineweb-edu-100b-shuffle"


class Hub:
    """A server laid out like the hub; `script[name]` lists what happens to the next requests."""

    def __init__(self):
        self.files = {f"shard_{i:05d}.parquet": self.shard(i) for i in range(5)}
        self.files["README.md"] = b"not a shard"
        self.repos = {REPO: self.files}
        self.plain: dict[str, bytes] = {}  # below /plain/, as on a server that is no hub
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
        self.server.handle_error = lambda *_: None  # of clients that go away
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
        elif (repo := "/".join(path.split("/")[3:5])) in self.repos and path.endswith("/tree/main"):
            self.tree(request, query, self.repos[repo])
        elif (data := self.data(path)) is not None:
            self.file(request, path, name, byte_range, what, data)
        else:
            self.send(request, 404)

    def data(self, path):
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", path)
        if found:
            return self.repos.get(found[1], {}).get(found[2])
        place = {"moved": self.files, "plain": self.plain}.get(path.split("/")[1], {})
        return place.get(path.split("/")[-1])

    def tree(self, request, query, files):
        start = int(query.partition("cursor=")[2] or 0)
        items = [{"type": "directory", "path": "old", "oid": "0" * 40}] if start == 0 else []
        for name, data in list(files.items())[start : start + 3]:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            item = {"type": "file", "path": name, "oid": git, "size": len(data)}
            if name.endswith(".parquet"):
                item |= {"oid": "1" * 40}
                item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
            if not self.sizes:
                item = {"type": "file", "path": name}
            items.append(item)
        headers = {}
        if start + 3 < len(files):  # a mirror may name the original host
            link = f"https://original.invalid{request.path.partition('?')[0]}?cursor={start + 3}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.send(request, 200, json.dumps(items).encode(), **headers)

    def file(self, request, path, name, byte_range, what, data):
        headers = {"ETag": '"abc"'}
        if path.startswith("/plain/"):
            headers = {"ETag": f'W/"{hashlib.sha256(path.encode()).hexdigest()}"'}  # of no content
        elif self.hashes:
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


def test_hub_leaves_the_old_text_whole_until_the_new_is_there(base, hub):
    fetch_shards(1)
    folder = base / "data" / "fineweb-edu"
    names = {"manifest.json", "train-00000.parquet", "val.parquet"}
    old = {name: (folder / name).read_bytes() for name in names}
    hub.files["shard_00000.parquet"] = hub.shard(77)  # another version of it
    hub.script = {"shard_00002.parquet": ["404"]}
    with pytest.raises(common.Stop, match="shard_00002.parquet answered 404"):
        fetch_shards(3)
    assert {name: (folder / name).read_bytes() for name in names} == old
    assert [p.name for p in common.list_shards("fineweb-edu", "train")] == ["train-00000.parquet"]
    hub.requests.clear()
    manifest = fetch_shards(3)[0]
    assert hub.fetched() == ["shard_00002.parquet"] and len(manifest["files"]) == 4
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
    assert len(list((base / "data" / "fineweb-edu").glob(".unused-00000*.partial"))) == 1
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
    date = email.utils.formatdate(time.time() + 500, usegmt=True)
    hub.script = {"main": ["503", "429 7"], "shard_00000.parquet": ["503", "500", "429"],
                  "shard_00004.parquet": ["429 33", f"429 {date}", "429 1e999"]}  # fmt: skip
    _, delays = fetch_shards()
    assert_same(base, hub, 1)
    assert 0.5 <= delays[0] <= 1.5 and delays[1] == 7
    assert all(0.5 * 2**n <= delays[2 + n] <= 1.5 * 2**n for n in range(3))
    assert delays[5] == 33 and 400 < delays[6] <= 500 and len(delays) == 8


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
    net = quick_net()
    with pytest.raises(
        common.Stop, match="cannot be reached: .*HF_ENDPOINT.*--data=world.*--data=PATH"
    ):
        prepare.main(prepare.Settings("hub"), net)
    assert not net.stopping.delays and not any(base.glob("data/*"))


@pytest.mark.parametrize("endpoint", ["hub.example", "http://[", "ftp://hub.example"])
def test_hub_wrong_endpoint(base, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(common.Stop, match="is no address like https"):
        prepare.main(prepare.Settings("hub"))
    prepare.main(prepare.Settings(num_conversations=60, documents=30))  # which needs no hub


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
    for _ in range(12_000):
        begun = any(path.stat().st_size for path in folder.glob(".*.partial"))
        if begun or process.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "fetching 2 of 2 shards" in out
    assert err == "prepare: stopped; run the same command again to go on\n"
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert any(r.startswith("bytes=") for _, r, _ in hub.requests)


# Conversations -------------------------------------------------------------------------------


def talk(*said, **extra):
    """A conversation whose messages are by user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said)], **extra}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def assert_good_conversation(item: dict, last: str = "assistant") -> None:
    roles = [m["role"] for m in item["messages"] if m["role"] != "system"]
    assert roles[0] == "user" and roles[-1] == last
    assert all(a != b for a, b in itertools.pairwise(roles)) and item["kind"]
    for message in item["messages"]:
        parts = message["content"]
        if isinstance(parts, str):
            assert parts.strip()
            continue
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                assert output == {"type": "output", "text": common.calculate(call["text"])}
        kinds = [part["type"] for part in parts]
        assert kinds.count("python") == kinds.count("output") and kinds[0] != "output"


GOOD_LINES = {
    "openai": {"messages": [{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                                         {"type": "text", "text": "there"}]},
                            {"role": "assistant", "content": "Hello!"}], "id": 7},
    "sharegpt": {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"},
                                   {"from": "human", "value": "Two?"},
                                   {"from": "gpt", "value": "2"}]},
    "list": talk("Who are you?", "I am {{name}}, made by {{author}}.")["messages"],
    "tool": talk("2*3?", [{"type": "text", "text": "It is "}, {"type": "python", "text": "2*3"},
                          {"type": "output", "text": "6"}, {"type": "text", "text": "6."}],
                 kind="sum"),
}  # fmt: skip
BAD_LINES = {
    b'{"messages": [': "broken JSON",
    b'"hello"': "no list of messages",
    b'{"text": "no conversation"}': "no list of messages",
    b'{"messages": ["hello"]}': "no list of messages",
    b'{"messages": [{"role": "user", "content": "caf\xe9"}]}': "text that is not UTF-8",
    json.dumps(talk("Hi", " \n")).encode(): "empty message",
    json.dumps(talk("Hi", [])).encode(): "empty message",
    json.dumps(talk("Hi", None)).encode(): "message without text",
    json.dumps(talk("Hi")).encode(): "no reply at the end",
    json.dumps({"messages": talk("Hi", "Ho")["messages"][1:]}).encode(): "roles out of order",
    json.dumps({"messages": talk("Hi", "Ho")["messages"] * 2 + talk("a", "b")["messages"][1:]}
               ).encode(): "roles out of order",
    b'{"messages": [{"role": "system", "content": "Only this."}]}': "roles out of order",
    b'{"messages": [{"role": "tool", "content": "4"}]}': "role that is not system, user or",
    json.dumps(talk([{"type": "image_url", "image_url": "x"}], "A cat")).encode(): "part that is no",
    json.dumps(talk("2+2?", [{"type": "python", "text": "2+2"}, {"type": "output", "text": "5"}])
               ).encode(): "output is not the calculator's",
    json.dumps(talk("2+2?", [{"type": "python", "text": "2+2"}, {"type": "output", "text": "4.0"}])
               ).encode(): "output is not the calculator's",
    json.dumps(talk("2+2?", [{"type": "python", "text": "2+2"}])).encode(): "without its output",
    json.dumps({"messages": [{"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": "", "tool_calls": [{}]}]}).encode():
        "call of a tool that is not",
    json.dumps(talk("2+2?", grade="number")).encode(): "problem without its answer",
    json.dumps(talk("2+2?", grade="number", answer="four")).encode(): "problem without its answer",
    json.dumps(talk("2+2?", grade="number", answer=True)).encode(): "problem without its answer",
    json.dumps(talk("2+2?", grade="letter", answer="AB")).encode(): "problem without its answer",
    json.dumps(talk("2+2?", grade="text", answer="4")).encode(): "problem without its answer",
    json.dumps(talk("2+2?", grade="text", accept="4")).encode(): "other than a list of texts",
    json.dumps(talk("2+2?", grade="text", accept=["4", " "])).encode(): "than a list of texts",
    json.dumps(talk("2+2?", grade="text", accept=["4"], reject=None)).encode(): "a list of texts",
    b'{"question": "2+2?", "answer": "It is <<2+2=4>>4 #### four"}': "problem without its answer",
    b'{"prompt": "2+2?", "answer": "It is 4 #### 4"}': "message without text",
}  # fmt: skip


def own_settings(path, **changes):
    return prepare.Settings(conversations=str(path), source="mine", **changes)


def test_own_conversations_of_every_form_become_one(base, tmp_path, capsys):
    folder = tmp_path / "talks"
    folder.mkdir()
    rows = [*GOOD_LINES.values(), *(talk(f"Is it {i}?", f"It is {i}.\r\n\0") for i in range(96))]
    text = "".join(json.dumps(row) + "\n\n" for row in rows[:50])
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes UTF-8
    with gzip.open(folder / "b.JSONL.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows[50:] + rows[:9]))  # 9 once more
    problem = {"grade": "number", "answer": 444, "kind": "sum"}
    (folder / "c.jsonl").write_text(json.dumps(talk("37*12?", **problem)))
    (folder / "notes.txt").write_text("no conversation")
    manifest = prepare.main(own_settings(folder, name='Zoë "Z"', val_percent=5.0))
    out = capsys.readouterr().out
    assert "9 duplicates" in out and "1 files of other kinds" in out and "are the same" in out
    files = {name: read_jsonl(base / "data" / "mine" / f"{name}.jsonl") for name in prepare.FILES}
    assert files["mid"] == files["sft"] and 1 <= len(files["val"]) <= 15
    items = [*files["mid"], *files["val"]]
    assert len(items) == 100 == len({json.dumps(item) for item in items})
    assert manifest["files"]["mid.jsonl"]["conversations"] == len(files["mid"])
    for item in items:
        assert_good_conversation(item)
    texts = {json.dumps(item["messages"], ensure_ascii=False) for item in items}
    said = [json.dumps(talk(f"Is it {i}?", f"It is {i}.")["messages"]) for i in range(96)]
    assert set(said) <= texts  # with plain line ends, and no NUL
    others = [json.loads(text) for text in texts - set(said)]
    assert [m["role"] for m in next(o for o in others if len(o) == 3)] == [
        "system", "user", "assistant"]  # fmt: skip
    spoken = json.dumps(others, ensure_ascii=False)
    assert "Hi\\nthere" in spoken and "One?" in spoken and "{{" not in spoken
    assert 'I am Zoë \\"Z\\", made by' in spoken and prepare.MAKER in spoken
    (tool,) = (item["messages"] for item in items if item["kind"] == "sum")
    assert tool == GOOD_LINES["tool"]["messages"]
    assert files["rl"] == [talk("37*12?", grade="number", answer="444") | {"kind": "sum"}]
    assert prepare.main(own_settings(folder, name='Zoë "Z"', val_percent=5.0)) == manifest
    assert "nothing to do" in capsys.readouterr().out


def test_problems_of_gsm8ks_form_are_solved_for_mid_and_sft_and_asked_in_rl(base, tmp_path):
    rows = gsm8k_rows("train")[:150] + [
        {"question": f"I had {i} eggs and got 5 more. How many now?",
         "answer": f"{i}+5=<<{i}+5={i + 5}>>{i + 5} eggs.\n#### {i + 5}"} for i in range(60)
    ]  # fmt: skip
    (tmp_path / "talks").mkdir()
    write_lines(tmp_path / "talks" / "problems.jsonl", rows)
    write_lines(tmp_path / "talks" / "chats.jsonl", [talk(f"Is it {i}?", "Yes") for i in range(40)])
    prepare.main(own_settings(tmp_path / "talks"))
    files = {name: read_jsonl(base / "data/mine" / f"{name}.jsonl") for name in prepare.FILES}
    asked = {name: [item["messages"][0]["content"] for item in files[name]] for name in files}
    problems = dict(zip(asked["rl"], files["rl"]))
    answers = {row["question"].strip(): row["answer"].rpartition("####")[2] for row in rows}
    assert problems.keys() == answers.keys()
    for question, item in problems.items():
        assert_good_conversation(item, "user")
        assert float(item["answer"]) == float(answers[question].replace(",", ""))
        assert item["grade"] == "number" and "reply" not in item
    assert files["mid"] == files["sft"]
    for item in [*files["mid"], *files["val"]]:
        assert_good_conversation(item)
        if (question := item["messages"][0]["content"]) in problems:
            said = common.reply_text(item["messages"][1]["content"])
            assert common.grade(problems[question], said)
    held = asked["rl"][: min(rl.Settings().val_problems, len(rows) // 10)]  # what rl validates on
    assert len(held) >= 6 and not set(held) & set(asked["mid"])
    assert problems.keys() - set(held) <= {*asked["mid"], *asked["val"]}


def test_bad_lines_are_named_counted_and_skipped(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "LINE_CHARS", 1000)
    good = [json.dumps(talk(f"{i}?", f"{i}!")).encode() for i in range(2)]
    long = [json.dumps(talk("long", "x" * n)).encode() for n in (990, 1500, 2000, 5000)]
    bad = {**BAD_LINES, **dict.fromkeys(long, "line that is too long")}
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join([good[0], b"", *bad, good[1]]) + b"\n")
    manifest = prepare.main(own_settings(path))
    out = capsys.readouterr().out
    named = re.findall(r"prepare: mine.jsonl:(\d+): (.*)", out)
    assert [int(number) for number, _ in named] == [3, 4, 5, 6, 7]  # the first five, by line
    for (_, reason), expected in zip(named, bad.values()):
        assert expected in reason
    assert sum(manifest["dropped"].values()) == len(bad)
    for number, expected in enumerate(bad.values()):
        assert any(expected in reason for reason in manifest["dropped"]), number
    assert manifest["dropped"]["line that is too long"] == 4
    assert len(read_jsonl(base / "data/mine/mid.jsonl")) == 1  # and one for validation
    assert not (base / "data/mine/rl.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_a_name_that_is_no_text_is_shown_and_stored_as_what_can_be(base, tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_lines(folder / "mine.jsonl", [talk(f"{i}?", f"{i}!") for i in range(40)] + [{"text": 1}])
    command = [sys.executable, "prepare.py", "--source=mine", f"--conversations={folder}"]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert "caf\ufffd/mine.jsonl:41: " in done.stdout.decode() and not done.stderr
    assert (
        "caf" in json.loads((base / "data/mine/conversations.json").read_text())["settings"]["data"]
    )


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: BAD_LINES[line][:20])
def test_each_bad_line_has_its_reason(line):
    with pytest.raises(ValueError, match=re.escape(BAD_LINES[line])):
        prepare.read_line(line, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "type",
                         "text", "grade", "answer", "kind", "tool_calls"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
GRADED = st.fixed_dictionaries(
    {"messages": st.just(talk("Which?")["messages"]),
     "grade": st.sampled_from(["number", "letter", "text"])},
    optional={"answer": st.text() | st.floats() | JSON, "choices": st.lists(st.text()) | JSON,
              "accept": st.lists(st.text()) | JSON, "reject": st.lists(st.text()) | JSON},
)  # fmt: skip
TURN = st.fixed_dictionaries({
    "role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON,
    "content": JSON | st.lists(st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "python", "output"]), "text": st.sampled_from(
            ["1+1", "2", "a\ud800"]) | JSON}), max_size=4),
})  # fmt: skip


@settings(max_examples=400)
@given(JSON | GRADED | st.fixed_dictionaries({"messages": st.lists(TURN | JSON, max_size=4)})
       | st.fixed_dictionaries({"question": JSON, "answer": st.text().map("{0}####1{0}".format)})
)  # fmt: skip
def test_any_value_is_a_conversation_or_has_a_reason(value):
    try:
        item = prepare.own_conversation(value)
    except ValueError as error:
        assert all(isinstance(word, str) for word in error.args)
    else:
        assert_good_conversation(item, "user" if "grade" in item else "assistant")
        assert "grade" not in item or not common.grade(item, "Perhaps \u2603")
        prepare.as_line(item).encode()  # no half characters


def test_blanks_of_parts_stay_and_half_characters_are_mended():
    parts = [{"type": "python", "text": "1+1"}, {"type": "output", "text": "2"},
             {"type": "text", "text": " So 2\ud83d. "}]  # fmt: skip
    item = prepare.own_conversation(talk("1+1? \ud83d", parts))
    assert item["messages"][1]["content"][2]["text"] == " So 2\ufffd. "
    prepare.as_line(item).encode()


def test_a_kill_between_two_files_is_made_good_by_the_next_run(base, tmp_path, monkeypatch):
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk(f"{i}?", f"{i}!")) for i in range(20)))
    real = os.replace

    def killed(source, target):
        if Path(target).name == "sft.jsonl":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "replace", killed)
        with pytest.raises(common.Stop, match="stopped"):
            prepare.main(own_settings(path))
    assert (base / "data/mine/mid.jsonl").exists()
    prepare.main(own_settings(path))
    mid, sft = (base / "data/mine/mid.jsonl", base / "data/mine/sft.jsonl")
    assert mid.read_bytes() == sft.read_bytes() and not list((base / "data").glob(".*"))


def test_nothing_good_at_all_is_one_sentence(base, tmp_path):
    path = tmp_path / "mine.jsonl"
    for text in (
        "",
        "{}\n[]\n",
        json.dumps(talk("Hi", "Ho")) + "\n" + json.dumps(talk("Hi", "Ho")),
    ):
        path.write_text(text)
        with pytest.raises(
            common.MissingInput, match="mine.jsonl holds (no|only one) conversation"
        ):
            prepare.main(own_settings(path))
    (tmp_path / "text.txt").write_text("Hello")
    with pytest.raises(common.MissingInput, match="files of other kinds.*a line of .jsonl each"):
        prepare.main(own_settings(tmp_path / "text.txt"))
    with gzip.open(tmp_path / "cut.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(talk(f"{i}?", random.Random(i).randbytes(99).hex()))
                             for i in range(999)))  # fmt: skip
    data = (tmp_path / "cut.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    manifest = prepare.main(own_settings(tmp_path / "cut.jsonl.gz"))  # its first half is good
    assert manifest["dropped"] == {"damaged or unreadable files": 1}
    assert 300 < manifest["files"]["mid.jsonl"]["conversations"] < 700
    assert not list((base / "data").glob(".*"))


def test_text_and_conversations_share_a_folder_and_neither_harms_the_other(base, tmp_path):
    talks, text = tmp_path / "talks.jsonl", tmp_path / "text.txt"
    talks.write_text("\n".join(json.dumps(talk(f"{i}?", f"{i}!")) for i in range(20)))
    text.write_text(words(1, 3000))
    own_text = prepare.Settings(str(text), source="mine")
    prepare.main(own_settings(talks))
    (base / "data/mine/tokens").mkdir()  # midtrain.py has read them
    prepare.main(own_text)
    text.write_text(words(2, 3000))
    prepare.main(own_text)  # the folder is made anew, the conversations stay
    before = (base / "data/mine/mid.jsonl").read_bytes()
    assert prepare.main(own_settings(talks))["files"]["val.jsonl"]["conversations"] >= 1
    talks.write_text("\n".join(json.dumps(talk(f"{i}?", f"{i}.")) for i in range(30)))
    prepare.main(own_settings(talks))
    assert (base / "data/mine/mid.jsonl").read_bytes() != before and texts_of(base / "data/mine")[0]
    (tmp_path / "others.jsonl").write_text(talks.read_text())
    with pytest.raises(
        common.Stop, match="holds the conversations of .*talks.jsonl.*--source=NAME"
    ):
        prepare.main(own_settings(tmp_path / "others.jsonl"))
    (base / "data/made").mkdir()
    (base / "data/made/mid.jsonl").write_text("by hand")
    with pytest.raises(common.Stop, match="not made by --conversations.*--source"):
        prepare.main(prepare.Settings(conversations=str(talks), source="made"))
    assert (base / "data/made/mid.jsonl").read_text() == "by hand"


def test_conversations_take_settings_that_fit(base, tmp_path, capsys):
    (tmp_path / "chat").mkdir()
    assert prepare.Settings(conversations=str(tmp_path / "chat")).source == "chat-files"
    assert prepare.Settings(conversations="hub").source == "chat"
    assert "no such file or folder, nor hub" in fail(["--conversations=nowhere.jsonl"], capsys)
    assert "take two commands" in fail(["--conversations=hub", "--data=hub"], capsys)
    assert "--source=world" in fail(["--conversations=hub", "--source=world"], capsys)
    assert "--source=downloads" in fail(["--source=downloads"], capsys)
    assert "--eval-data" in fail(["--eval-data=nowhere"], capsys)
    assert "--name" in fail(["--name= "], capsys) and "--name" in fail(["--name=a\nb"], capsys)


def test_the_letters_of_choices_are_the_tokens_of_answers():
    text = prepare.letter_question(
        "Which city is it?", ["Rome", "New York!", "St. John's", "5 (A)"]
    )
    pieces = regex.findall(nanochat_bpe.PATTERN, text)
    assert [p for p in pieces if p in "ABCD"] == ["A", "B", "C", "A", "D"]


@given(st.integers(0, 30), st.integers(0, 30))
def test_counted_rows_are_taken_out_and_the_rest_goes_to_all_others(first, second):
    rest = prepare.REST
    counts = {"mid": rest, "sft": first, "val": second, "rl": rest}
    given_ = [prepare.share_out(counts, row + 0.5) for row in range(100)]
    assert given_.count(["sft"]) == first and given_.count(["val"]) == second
    assert given_.count(["mid", "rl"]) == 100 - first - second


def gsm8k_rows(split: str) -> list[dict]:
    """Rows of the form of GSM8K: real ones where they are, else one with every kind of mark."""
    path = SHARED / "eval" / "gsm8k" / f"{split}.jsonl"
    if path.exists():
        return read_jsonl(path)
    answer = (
        "He has 1+2 = <<1+2=3>>3.\nThen <<+3*2=6>>6 and 7/2 = $<<7/2=3.50>>3.50, <<3/4=3/4>>3/4"
    )
    return [{"question": "How many?", "answer": f"{answer}\n#### 1,234"}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_marks_of_gsm8k_become_calls_of_the_tool(split):
    marks = calls = 0
    for row in gsm8k_rows(split):
        item = prepare.gsm8k_item(row)
        assert_good_conversation(prepare.solved(item | {"kind": "gsm8k"}))
        said = common.reply_text(item["reply"])
        solution, _, answer = row["answer"].rpartition("####")
        plain = re.sub("<<.*?>>", "", solution).strip()
        assert said == f"{plain}\nThe answer is {item['answer']}."
        assert float(item["answer"]) == float(answer.replace(",", ""))
        assert common.grade(item, said) and not common.grade(item, f"{said} Or 0.123.")
        results = [part["text"] for part in item["reply"] if part["type"] == "output"]
        expected = re.findall("=([^=>]*)>>", solution)
        marks, calls = marks + len(expected), calls + len(results)
        if len(results) == len(expected):
            assert [float(x) for x in results] == [float(x.replace(",", "")) for x in expected]
    assert marks - calls <= (2 if marks > 4 else 1)  # of 27,998 real ones two are no calls


def chat_tables() -> dict[str, dict[str, bytes]]:
    """The repositories that conversations and evaluation sets come from, with few rows."""

    def table(rows):
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()

    def letters(n, start=0):
        return [{"question": f"What is {i}?", "subject": "x", "choices": [f"{i + k}" for k in range(4)],
                 "answer": i % 4} for i in range(start, start + n)]  # fmt: skip

    def science(n, start=0, labels="ABCD"):
        return [{"id": str(i), "question": f"Why is {i} so?", "answerKey": labels[i % len(labels)],
                 "choices": {"text": [f"as {i} {k}" for k in labels], "label": list(labels)}}
                for i in range(start, start + n)]  # fmt: skip

    def problems(n, start=0):
        return [{"question": f"I had {i} eggs and got 5 more. How many now?",
                 "answer": f"{i}+5=<<{i}+5={i + 5}.00>>{i + 5} eggs.\n#### {i + 5}"}
                for i in range(start, start + n)]  # fmt: skip

    def talks(n, start=0):
        rows = [talk(words(i, 20), words(i + 1, 30), "More?", words(i + 2, 30), source="s")
                for i in range(start, start + n)]  # fmt: skip
        rows[0]["messages"][0]["role"] = "assistant"  # a row that is wrong
        return rows

    stolen = talk(problems(1, 900)[0]["question"].upper() + "!", "905")  # asked by the evaluation
    code = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    }
    mixed = letters(39) + [{**letters(1, 900)[0], "choices": ["901", "900", "903", "902"],
                            "answer": 1}]  # fmt: skip
    return {
        "HuggingFaceTB/smol-smoltalk": {
            "data/train-smol-0.parquet": table(talks(150) + [stolen]),
            "data/train-smol-1.parquet": table(talks(50, 500)),
            "data/test-smol.parquet": table(talks(40, 700) + talks(21, 510)[1:]),  # 20 in both
        },
        "cais/mmlu": {"all/auxiliary_train-mmlu.parquet": table(mixed),
                      "all/validation-mmlu.parquet": table(letters(6, 100)),
                      "all/test-mmlu.parquet": table(letters(12, 900)),
                      "all/dev-mmlu.parquet": b"not wanted"},
        "openai/gsm8k": {"main/train-gsm.parquet": table(problems(60)),
                         "main/test-gsm.parquet": table(problems(10, 900)),
                         "socratic/train-soc.parquet": b"not wanted"},
        "allenai/ai2_arc": {f"{name}/{split}-{name[4]}.parquet": table(science(*rows))
                            for name in ("ARC-Easy", "ARC-Challenge") for split, rows in {
                                "train": (20, 0, "1234"), "validation": (5, 50, "ABC"),
                                "test": (8, 90)}.items()},
        "openai/openai_humaneval": {"openai_humaneval/test-code.parquet": table([code])},
    }  # fmt: skip


def core_zip(extra=()) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks:\n")
        archive.writestr("eval_bundle/eval_data/world_knowledge/arc_easy.jsonl", '{"query": "?"}\n')
        for name, data in extra:
            archive.writestr(name, data)
    return out.getvalue()


SMALL_MIXTURE = {
    "smoltalk": (prepare.REST, 40, 0, 20), "mmlu": (prepare.REST, 0, 0, prepare.REST),
    "arc-easy": (0, prepare.REST, 0, prepare.REST),
    "gsm8k": (prepare.REST, prepare.REST, prepare.REST, 12),
    "spelling": (60, 10, 0, 5), "identity": (9, 6, 0, 3),
}  # fmt: skip


@pytest.fixture
def chat_hub(hub, monkeypatch):
    hub.repos = chat_tables()
    hub.plain = {
        "eval_bundle.zip": core_zip(),
        "words_alpha.txt": "\r\n".join(["don't", "x", *WORDS]).encode(),
    }
    monkeypatch.setenv("NANOCHAT_MIRROR", hub.url + "/plain/")
    monkeypatch.setattr(prepare, "MIXTURE", SMALL_MIXTURE)
    return hub


def fetch_chat(**options):
    net = quick_net(**options)
    manifest = prepare.main(prepare.Settings(conversations="hub", name="Ada", workers=2), net)
    return manifest, net.stopping.delays


def test_conversations_of_the_hub_follow_the_mixture(base, chat_hub, capsys):
    manifest, delays = fetch_chat()
    out = capsys.readouterr().out
    names = [path.split("/")[-1] for files in chat_hub.repos.values() for path in files]
    wanted = sorted(name for name in names if name not in ("dev-mmlu.parquet", "train-soc.parquet"))
    assert not delays and sorted(chat_hub.fetched()) == wanted
    files = {name: read_jsonl(base / "data/chat" / f"{name}.jsonl") for name in prepare.FILES}
    by_kind = {name: collections.Counter(i["kind"] for i in files[name]) for name in files}
    for name, items in files.items():
        assert dict(by_kind[name]) == manifest["files"][f"{name}.jsonl"]["kinds"]
        for item in items:
            assert_good_conversation(item, "user" if name == "rl" else "assistant")
            assert ("grade" in item) == (name == "rl") and "reply" not in item
        assert len({json.dumps(item) for item in items}) == len(items)
    lines = {name: {json.dumps(item) for item in items} for name, items in files.items()}
    assert not lines["val"] & (lines["mid"] | lines["sft"])
    talks = {name: {line for line in lines[name] if '"smoltalk"' in line} for name in lines}
    assert not talks["mid"] & talks["sft"]
    assert 200 - 2 - 20 <= len(talks["mid"] | talks["sft"]) < 200 - 2  # some are in val too
    assert 20 < len(talks["sft"]) < 60 and 8 < len(talks["val"]) < 32  # about 40 and 20
    problems = {name: {line for line in lines[name] if '"gsm8k"' in line} for name in lines}
    assert problems["mid"] == problems["sft"] and 2 < len(problems["val"]) < 25
    asked = {name: [i["messages"][0]["content"] for i in files[name] if i["kind"] == "gsm8k"]
             for name in ("mid", "rl")}  # fmt: skip
    kept = len(files["rl"]) // 10  # what rl validates on
    assert kept > 2 and sorted(asked["mid"]) == sorted(asked["rl"][kept:])
    assert len(problems["mid"] | problems["val"]) == 60 - kept
    assert all(i["answer"].isdigit() for i in files["rl"])
    assert by_kind["mid"]["mmlu"] == 39 and by_kind["val"]["mmlu"] == 6  # one is of the test
    assert by_kind["sft"]["arc-easy"] == 20 and by_kind["val"]["arc-easy"] == 5
    assert 30 < by_kind["mid"]["spelling"] <= 60 and "identity" in by_kind["sft"]
    assert manifest["dropped"]["questions of the evaluation sets"] == 2
    assert manifest["dropped"]["SmolTalk rows that cannot be used"] == 3
    spelled = set(re.findall(r"The word (.*?) is spelled", str(files)))
    assert spelled and spelled <= {word for word in WORDS if len(word) > 2}
    assert not any(prepare.held_out_word(word) for word in spelled)
    assert "mid.jsonl" in out and "gsm8k" in out
    chat_hub.requests.clear()
    assert fetch_chat()[0] == manifest and "nothing to do" in capsys.readouterr().out
    prepare.main(prepare.Settings(conversations="hub", name="Bob"), quick_net())
    assert not chat_hub.requests  # the downloads are there
    sets = sorted(p.name for p in (base / "data/eval").glob("*.jsonl"))
    assert sets == [f"{n}.jsonl" for n in ("ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval",
                                           "MMLU", "SpellingBee")]  # fmt: skip
    assert (base / "data/eval/core/eval_data/world_knowledge/arc_easy.jsonl").exists()


def test_evaluation_sets_of_the_hub_are_graded_items(base, chat_hub, capsys):
    manifest = prepare.main(prepare.Settings(eval_data="hub"), quick_net())
    assert not any("train" in name for name in chat_hub.fetched())
    assert not (base / "data/world").exists()
    rows = {p.stem: read_jsonl(p) for p in (base / "data/eval").glob("*.jsonl")}
    assert {name: len(items) for name, items in rows.items() if name != "SpellingBee"} == {
        "MMLU": 12, "ARC-Easy": 8, "ARC-Challenge": 8, "GSM8K": 10, "HumanEval": 1}  # fmt: skip
    for name, items in rows.items():
        for item in items:
            assert_good_conversation(item, "user")
            reply = item["reply"]
            reply = reply if isinstance(reply, str) else common.reply_text(reply)
            assert item["grade"] == "code" or common.grade(item, reply), (name, item)
    assert [item["answer"] for item in rows["ARC-Easy"]] == list("CDABCDAB")  # row 90 is the first
    for item in rows["SpellingBee"]:
        word = next(w for w in re.findall("[a-z]+", item["reply"][0]["text"]) if w in WORDS)
        letter = item["reply"][1]["text"][-3]
        assert prepare.held_out_word(word) and item["answer"] == str(word.count(letter))
        asked = item["messages"][0]["content"]
        assert re.search(rf"\b{word}\b", asked) and re.search(rf"\b{letter}\b", asked)
    code = rows["HumanEval"][0]
    program = f"{code['reply'][10:-4]}\n{code['tests']}\ncheck({code['entry_point']})"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert "HumanEval 1" in capsys.readouterr().out and len(manifest["files"]) == 7
    made = (base / "data/eval/MMLU.jsonl").stat()
    assert prepare.main(prepare.Settings(eval_data="hub"), quick_net()) == manifest
    assert "nothing to do" in capsys.readouterr().out
    assert (base / "data/eval/MMLU.jsonl").stat().st_ino == made.st_ino


def test_no_question_of_an_evaluation_set_is_trained_on(base, chat_hub, tmp_path):
    core = {
        "commonsense_reasoning/piqa": {"query": "Question: Why does ice float?\n", "gold": 0,
                                       "choices": ["It is lighter.", "It is salty."]},
        "commonsense_reasoning/copa": {"query": "Books", "choices": ["a", "b"], "gold": 0},
        "language_understanding/winograd_wsc": {
            "context_options": ["The cup fell since the cup", "The cup fell since the shelf"],
            "continuation": "was round.", "gold": 0},
        "reading_comprehension/squad": {
            "context": "Context: Ann has a red barn.\nQuestion: Who has a barn?\nAnswer:",
            "continuation": "Ann"},
        "symbolic_problem_solving/bigbench_dyck_languages": {
            "context": "Close them.\nInput: [ <\nOutput:", "continuation": "> ]"},
    }  # fmt: skip
    chat_hub.plain["eval_bundle.zip"] = core_zip(
        [(f"eval_bundle/eval_data/{name}.jsonl", json.dumps(row)) for name, row in core.items()]
    )
    prepare.main(prepare.Settings(eval_data="hub"), quick_net())
    sets = {p.stem: read_jsonl(p) for p in (base / "data/eval").glob("*.jsonl")}
    asked = [items[-1]["messages"][0]["content"].upper() for items in sets.values()]
    asked += ["why does ice float", "The cup fell since the shelf was round!"]
    asked += [row["context"] for row in core.values() if "context" in row]
    assert len(sets) == 6 and len(asked) == 10
    planted = [talk("Hi", "Hello!", text, "Sure.") for text in asked]
    fine = ["Close them.\nInput: [ (\nOutput:", "Question", "Answer: ?", "What is the cup?", "Books?",
            "Context: Ann has a red barn.\nQuestion: What colour is it?\nAnswer:"]  # fmt: skip
    rows = planted + [talk(text, "Sure.") for text in fine]
    test = sets["GSM8K"][0]
    problems = [{"question": test["messages"][0]["content"], "answer": "#### 905"},
                talk("What is 2+2?", grade="number", answer="4"),
                {key: test[key] for key in ("messages", "grade", "answer")}]  # fmt: skip
    write_lines(tmp_path / "mine.jsonl", rows + problems)
    dropped = prepare.main(own_settings(tmp_path / "mine.jsonl"))["dropped"]
    assert dropped == {"questions of the evaluation sets": len(planted) + 2}
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    chat_hub.repos["HuggingFaceTB/smol-smoltalk"]["data/train-smol-1.parquet"] = out.getvalue()
    dropped = fetch_chat()[0]["dropped"]
    assert dropped["questions of the evaluation sets"] == len(planted) + 2  # two are in the others

    def plain(text):
        return "".join(text.casefold().split()).removeprefix("question:")

    for folder in ("mine", "chat"):
        items = [
            i for name in prepare.FILES for i in read_jsonl(base / f"data/{folder}/{name}.jsonl")
        ]
        said = {plain(m["content"]) for i in items for m in i["messages"] if m["role"] == "user"}
        assert set(map(plain, fine)) <= said, folder
        assert not set(map(plain, asked)) & said, folder
    # what is asked later counts too: the same conversations are then made anew
    write_lines(base / "data/eval/New.jsonl", [{**test, **talk("What is the cup?")}])
    dropped = prepare.main(own_settings(tmp_path / "mine.jsonl"))["dropped"]
    assert dropped == {"questions of the evaluation sets": len(planted) + 3}
    dropped = fetch_chat()[0]["dropped"]
    assert dropped["questions of the evaluation sets"] == len(planted) + 3


def test_a_long_question_is_found_without_its_choices_too(base, tmp_path):
    long = "Of two equal cups of tea one stands in the sun: which of them cools later?"
    tests = [prepare.letter_item(text, ["this", "that"], 0) for text in (long, "Which is true?")]
    common.data_dir("eval").mkdir(parents=True)
    write_lines(common.data_dir("eval") / "New.jsonl", [{**item, "kind": "x"} for item in tests])
    own = [talk("Tell me: is it?", "Yes"), talk("How?", "So"), talk("Which is true?", "This one.")]
    write_lines(tmp_path / "mine.jsonl", [*own, talk(long.upper(), "This one.")])
    dropped = prepare.main(own_settings(tmp_path / "mine.jsonl"))["dropped"]
    assert dropped == {"questions of the evaluation sets": 1}
    asked = prepare.letter_item(long, ["the left one", "the right one"], 1)
    assert not prepare.evaluation_questions().isdisjoint(prepare.question_keys(asked))


def test_downloads_of_conversations_resume_and_are_checked(base, chat_hub):
    chat_hub.script = {"train-smol-0.parquet": ["cut", "429 9", "drop"],
                       "words_alpha.txt": ["ok", "cut"], "eval_bundle.zip": ["503"]}  # fmt: skip
    _, delays = fetch_chat()
    assert 9 in delays and any(r for path, r, _ in chat_hub.requests if "smol-0" in path)
    root = base / "data/downloads"
    files = {root / repo / path: data for repo, files in chat_hub.repos.items()
             for path, data in files.items() if (root / repo / path).exists()}  # fmt: skip
    assert len(files) > 3 and all(path.read_bytes() == data for path, data in files.items())
    assert (root / "words_alpha.txt").read_bytes() == chat_hub.plain["words_alpha.txt"]
    assert not list(root.rglob(".*.partial"))


def test_wrong_or_missing_downloads_of_conversations_are_one_sentence(base, chat_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    chat_hub.script = {"words_alpha.txt": ["404"]}
    with pytest.raises(common.Stop, match="words_alpha.txt answered 404.*NANOCHAT_MIRROR"):
        fetch_chat()
    chat_hub.script = {"train-gsm.parquet": ["wrong"] * 9}
    with pytest.raises(common.Stop, match="train-gsm.parquet gave 3 times other bytes"):
        fetch_chat()
    chat_hub.script = {"train-gsm.parquet": ["404"]}
    with pytest.raises(common.Stop, match="train-gsm.parquet answered 404: it is not there"):
        fetch_chat()
    plain = [token for path, _, token in chat_hub.requests if path.startswith("/plain/")]
    assert plain and not any(plain)  # the hub's token is the hub's
    assert any(token for _, _, token in chat_hub.requests)
    del chat_hub.repos["openai/gsm8k"]["main/train-gsm.parquet"]
    with pytest.raises(common.Stop, match="lists no main/train-.*of openai/gsm8k"):
        fetch_chat()
    chat_hub.repos["openai/gsm8k"]["main/train-gsm.parquet"] = table_bytes("text", ["no problem"])
    with pytest.raises(common.Stop, match="train-gsm.parquet has no row that can be read"):
        fetch_chat()
    assert not list((base / "data/chat").glob("*.jsonl"))
    for name in ("test-gsm.parquet", "train-smol-0.parquet"):
        assert chat_hub.fetched().count(name) == 1  # what was whole is not fetched again
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        patch.setattr(prepare, "data_dir", lambda source: base / "elsewhere" / source)
        with pytest.raises(common.Stop, match="GB are needed"):
            fetch_chat()
    assert not list((base / "data").glob(".*"))


@pytest.mark.parametrize(
    ("data", "words_"),
    [
        (b"no archive", "is damaged"),
        (core_zip()[:-30], "is damaged"),
        (core_zip([("../../escape", "x")]), "leads out of it"),
        (core_zip([("/escape", "x")]), "leads out of it"),
        (core_zip([("a\\..\\..\\escape", "x")]), "leads out of it"),
        (core_zip([("C:/escape", "x")]), "leads out of it"),
        (core_zip([("big", "x" * 10**6)]), "unpacks to more than"),
    ],
)
def test_an_archive_that_is_damaged_huge_or_leads_out_is_refused(
    tmp_path, monkeypatch, data, words_
):
    monkeypatch.setattr(prepare, "ZIP_BYTES", 10**5)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "eval_bundle.zip").write_bytes(data)
    with pytest.raises(common.Stop, match=f"{words_}.*delete"):
        prepare.unzip(tmp_path / "a" / "eval_bundle.zip", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.rglob("escape"))


def test_a_link_in_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        member = zipfile.ZipInfo("eval_data")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc")
    with pytest.raises(common.Stop, match="leads out of it"):
        prepare.unzip(tmp_path / "link.zip", tmp_path / "out")


def test_evaluation_sets_of_a_folder_are_added_to_those_there(base, tmp_path, capsys):
    gsm8k, words_ = tmp_path / "one" / "gsm8k", tmp_path / "two"
    gsm8k.mkdir(parents=True)
    words_.mkdir()
    row = {"question": "How many?", "answer": "2+1=<<2+1=3>>3\n#### 3"}
    (gsm8k / "test.jsonl").write_text(json.dumps(row))
    prepare.main(prepare.Settings(eval_data=str(tmp_path / "one")))
    out = capsys.readouterr().out
    assert "GSM8K 1" in out and "does not have MMLU, ARC-Easy" in out and "CORE" in out
    (words_ / "words_alpha.txt").write_text("\n".join(WORDS))
    manifest = prepare.main(prepare.Settings(eval_data=str(tmp_path / "two")))
    assert set(manifest["files"]) == {"GSM8K.jsonl", "SpellingBee.jsonl"}
    assert len(read_jsonl(base / "data/eval/GSM8K.jsonl")) == 1
    (tmp_path / "three").mkdir()
    with pytest.raises(common.MissingInput, match="holds none of the evaluation sets"):
        prepare.main(prepare.Settings(eval_data=str(tmp_path / "three")))
    (gsm8k / "test.jsonl").write_text('{"question": ')
    with pytest.raises(common.Stop, match="test.jsonl is damaged .*delete it"):
        prepare.main(prepare.Settings(eval_data=str(tmp_path / "one")))
    assert len(read_jsonl(base / "data/eval/GSM8K.jsonl")) == 1
    assert not list((base / "data").glob(".*"))


def test_the_public_evaluation_sets_are_read_whole(base):
    if not (SHARED / "eval").exists():
        pytest.skip("needs the public data in ../shared/data")
    manifest = prepare.main(prepare.Settings(eval_data=str(SHARED / "eval")))
    counts = {name: entry["conversations"] for name, entry in manifest["files"].items()
              if "conversations" in entry}  # fmt: skip
    assert counts == {
        "MMLU.jsonl": 14_042,
        "ARC-Easy.jsonl": 2_376,
        "ARC-Challenge.jsonl": 1_172,
        "GSM8K.jsonl": 1_319,
        "HumanEval.jsonl": 164,
        "SpellingBee.jsonl": 500,
    }
    assert not manifest["dropped"] and sum("task" in e for e in manifest["files"].values()) == 20
    letters = collections.Counter()
    for name in ("MMLU", "ARC-Easy", "ARC-Challenge"):
        for item in read_jsonl(base / "data/eval" / f"{name}.jsonl"):
            letters[item["answer"]] += 1
            text, number = item["messages"][0]["content"], "ABCDE".index(item["answer"])
            assert f"- {item['choices'][number]} ({item['answer']})" in text
    assert all(letters[letter] > 3_500 for letter in "ABCD") and letters["E"] < 10
    arc = json.loads((SHARED / "eval/arc/ARC-Easy/test.json").read_text("utf-8"))
    items = read_jsonl(base / "data/eval/ARC-Easy.jsonl")
    for row, item in zip(arc, items):
        right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert item["choices"]["ABCDE".index(item["answer"])] == " ".join(right.split())


def test_the_public_conversations_are_read_whole(base):
    if not (SHARED / "chat").exists():
        pytest.skip("needs the public data in ../shared/data")
    manifest = prepare.main(own_settings(SHARED / "chat"))
    files = manifest["files"]
    packed = (SHARED / "chat").glob("*.gz")
    rows = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in packed)
    good = files["mid.jsonl"]["conversations"] + files["val.jsonl"]["conversations"]
    assert good + sum(manifest["dropped"].values()) == rows > 27_000
    assert good > 0.99 * rows
    assert "{{name}}" not in (base / "data/mine/mid.jsonl").read_text("utf-8")


# prepare.py: the embedded world ---------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> list[str]:
    """The first 5.5 million characters of a world: about a fifth of the default documents."""
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
    for _ in prepare.world_documents(4, prepare.Settings().documents // 4):
        pass
    counts = sorted(stated[fact] for fact in prepare.world_facts())
    assert counts[0] >= 10 and counts[len(counts) // 20] >= 15 and counts[len(counts) // 2] >= 18, (
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
    boxes = rf"\b{number} (?:boxes|bags|baskets|crates) with {number} \w+ (?:each|apiece|per)\b"
    pairs += [
        [int(w) if w.isdigit() else words[w.lower()] for w in m]
        for m in re.findall(boxes, text, re.IGNORECASE)
    ]
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
    phrases = set(re.findall(r"the word \w+ has|letter of \w+ is", text.replace('"', "")))
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


def shown(pattern, text):
    """List what a pattern finds in a text, each with its neighbours in the same line."""
    return [
        text[max(0, m.start() - 30) : m.start()].rpartition("\n")[2]
        + m[0]
        + text[m.end() : m.end() + 20].partition("\n")[0]
        for m in re.finditer(pattern, text)
    ]


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
        found = shown(wrong, text)
        found = [
            f
            for f in found
            if not re.search(
                r"\ba (one|eu|ewe|in |is |of |ou|as)|letter|[Tt]he word|a, |with a and",
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


def said(content):
    """The text of a reply, without the tool's."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts if part["type"] == "text")


def calls_of(content):
    """The (call, output) pairs of a reply, in turn."""
    parts = [] if isinstance(content, str) else [p for p in content if p["type"] != "text"]
    assert [p["type"] for p in parts] == ["python", "output"] * (len(parts) // 2)
    return [(a["text"], b["text"]) for a, b in zip(parts[::2], parts[1::2])]


def asked_and_solved(chat):
    """Question and reply of a training conversation, or of a graded item."""
    turns = [message["content"] for message in chat["messages"]]
    return (turns[0], turns[1]) if turns[1:] else (turns[0], chat.get("reply", ""))


@pytest.fixture(scope="module")
def problems():
    """Word problems of training and of the test, and their combinations of parts."""
    made, item = {}, prepare.Composer.item

    def kept(self):
        found = item(self)
        made[found["messages"][0]["content"]] = self
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.Composer, "item", kept)
        rng = random.Random(3)
        solved = [prepare.problem_chat(rng) for _ in range(2500)]
        practised = [prepare.rl_problems(rng) for _ in range(2500)]
        trained = list(made.values())
        sets = prepare.problem_sets.__wrapped__()
    return SimpleNamespace(chat=solved, rl=practised, sets=sets, trained=trained, made=made)


PEOPLE = "|".join([*prepare.GIRLS, *prepare.BOYS])
WHO = rf"({PEOPLE}|[Hh]e|[Ss]he|They)"
HAS = "has had owns owned starts_with started_with keeps kept counts counted".split()
TIMES = {"twice": 2, "half": Fraction(1, 2), "three times": 3, "four times": 4, "five times": 5,
         "ten times": 10, "a third": Fraction(1, 3), "halve": Fraction(1, 2), "triple": 3,
         "double": 2, "quadruple": 4, "tenfold": 10, "a pair of": 2, "a dozen": 12}  # fmt: skip
FIRST = ("At first", "In the morning,", "Then", "Later,", "The next day,", "After that,",
         "Before that,", "At the start of the day,")  # fmt: skip


def solve(text):
    """Solve a word problem from its words, sentence by sentence, with no look at its making."""
    signs = {verb[form].replace(" ", "_"): 1 if verb["sign"] == "+" else -1
             for verb in prepare.count_verbs() for form in ("does", "past")}  # fmt: skip
    text = re.sub(r"If (.*?) and (.*?), how", r"\1. They \2. How", text)
    had, changes, last, shared, question = {}, [], "", 1, ""
    for fact in re.split(r"(?<=[.?]) |, and (?=[A-Z]\w+ \w+ \w+ \w*\s?as many)", text):
        if m := re.search(r"(?:among|into) (\d+) |(\d+) friends share", fact):
            shared = int(m[1] or m[2])
        if "?" in fact or fact.startswith("Find"):
            question = fact
            continue
        fact = re.sub(rf"^({'|'.join(FIRST)}) (\w)", lambda m: m[2].upper(), fact)
        subject = re.match(WHO, fact)
        last = subject[0] if subject and subject[0] not in ("He", "She", "They") else last
        words = fact.replace(" of the ", " ").replace(" of these ", " ").replace(" more ", " ")
        if m := re.match(rf"{WHO} \w+ (\d+) \w+ (?:of|with) (\d+) (\w+)", fact):
            had[last, m[4]] = int(m[2]) * int(m[3])
        elif m := re.match(rf"There \w+ (\d+) \w+ with (\d+) (\w+) .*in ({PEOPLE})'s", fact):
            had[m[4], m[3]] = int(m[1]) * int(m[2])
        elif m := re.match(rf"Each of ({PEOPLE})'s (\d+) \w+ \w+ (\d+) (\w+)", fact):
            had[m[1], m[4]] = int(m[2]) * int(m[3])
        elif m := re.match(rf"There \w+ (\d+) (\w+) in each of ({PEOPLE})'s (\d+)", fact):
            had[m[3], m[2]] = int(m[1]) * int(m[4])
        elif m := re.match(rf"There \w+ (\d+) (\w+) in ({PEOPLE})'s room", fact):
            had[m[3], m[2]] = int(m[1])
        elif m := re.match(rf"In ({PEOPLE})'s room there \w+ (\d+) (\w+)", fact):
            had[m[1], m[3]] = int(m[2])
        elif m := re.match(rf"({PEOPLE}) \w+ (twice|half|a third|\w+ times) as many", fact):
            had[m[1], ""] = TIMES[m[2]]
        elif m := re.match(
            r"The number of (\w+?)(?:'s)? (\w+) (halve|triple|double|quadruple|"
            r"\w+ (?=tenfold)|\w+ to (?=a third))(tenfold|a third)?",
            fact,
        ):
            last = m[1] if m[1][0].isupper() else last
            changes.append((last, m[2], TIMES[m[4] or m[3]]))
        elif m := re.match(rf"{WHO} (.+?) (?:another )?(\d+|a pair of|a dozen) (\w+)", words):
            number, verb = TIMES.get(m[3]) or int(m[3]), m[2].replace(" ", "_")
            if verb in HAS:
                had[last, m[4]] = number
            elif verb in signs:
                changes.append((last, m[4], [signs[verb] * number]))
    asked = r"(?:many|number of)(?: more| fewer| of the)? (?:her |his |\S+'s )?(\w+)"
    thing = re.search(asked, question)[1]
    scale = {n: had.pop((n, "")) for n, t in list(had) if t == ""}
    counts = {n: number for (n, t), number in had.items() if t == thing}
    for n, factor in scale.items():
        counts[n] = factor * next(iter(counts.values()))
    for n, t, change in changes:
        if t == thing:
            counts[n] = counts[n] + change[0] if isinstance(change, list) else counts[n] * change
    if re.search(r"\b(more|fewer)\b", question):
        return max(counts.values()) - min(counts.values())
    if re.search(r"in all|together|in total", question, re.IGNORECASE):
        return sum(counts.values())
    main = [*{n for n, t, _ in changes if t == thing}, *scale, *counts][0]
    return Fraction(counts[main], shared)


def test_word_problems_are_solved_as_their_words_say(problems):
    """Each call is worked by Python's own eval, and each answer by a reader of the text."""
    tested = [item for items in problems.sets.values() for item in items]
    for one in (*problems.chat, *problems.rl, *tested):
        text, reply = asked_and_solved(one)
        answer = one.get("answer") or common.last_number(said(reply))
        assert solve(text) == int(answer), (text, answer)
        assert int(answer) >= 0 and len(text) + len(said(reply)) <= 600, text
        known = {*re.findall(r"\d+", text), "2", "3", "4", "5", "10", "12"}  # twice, a dozen
        for call, output in calls_of(reply):
            assert eval(call) == int(output) == eval(common.calculate(call)) >= 0, text
            assert set(re.findall(r"\d+", call)) <= known, (text, call)
            known.add(output)
        if reply:
            calls = calls_of(reply)
            assert 1 <= len(calls) <= 2 and calls[-1][1] == answer, text
            assert said(reply).endswith(f"The answer is {answer}."), text
    for item in tested:
        assert common.grade(item, said(item["reply"])) and not common.grade(item, "It is 1234567.")
    assert all("reply" not in item and item["grade"] == "number" for item in problems.rl)


def phrases(kind):
    """A pattern for the verbs and phrases of one set, in all forms that a problem can have."""
    words = [verb[form] for verb in prepare.count_verbs() if verb["set"] == kind
             for form in ("base", "past", "ing", "does")]  # fmt: skip
    words += {
        "practised": "altogether remain(ed)? three.times tripled?s? per fewer.\\w+".split(),
        "test": ["in total", "left over", "doubled?s?", "dozen", "apiece"],
    }[kind]
    return re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)


def test_parts_of_problems_stay_in_their_sets(problems):
    practised, test = phrases("practised"), phrases("test")
    for one in problems.chat:
        text, reply = asked_and_solved(one)
        assert not practised.search(text) and not test.search(text + said(reply)), text
        assert not practised.search(said(reply).replace("so now she has fewer", "")
                                    .replace("so now he has fewer", "")), text  # fmt: skip
    asked = [item["messages"][0]["content"] for item in problems.rl]
    assert not [text for text in asked if test.search(text)]
    assert 0.75 < sum(bool(practised.search(text)) for text in asked) / len(asked) < 0.95
    for name, pattern in {"practised": practised, "new": test}.items():
        found = collections.Counter()
        for item in problems.sets[f"problems_{name}"]:
            match = pattern.search(item["messages"][0]["content"])
            assert match, item
            found[match[0].lower()] += 1
        assert len(found) >= 12 and max(found.values()) < 100  # no part outweighs the others
    for name in ("numbers", "combinations"):
        texts = [item["messages"][0]["content"] for item in problems.sets[f"problems_{name}"]]
        assert not [text for text in texts if practised.search(text) or test.search(text)]


def test_pairs_and_combinations_of_the_test_are_in_no_problem_of_training(problems):
    def pairs(calls):
        return [tuple(map(int, re.findall(r"\d+", call))) for call in calls]

    worked = [p for made in problems.trained for p in pairs(step[1] for step in made.steps)]
    assert len(worked) > 7000 and not [p for p in worked if prepare.held_out_pair(*p)]
    for name, items in problems.sets.items():
        assert len(items) == 500 and len({i["messages"][0]["content"] for i in items}) == 500
        calls = [[call for call, _ in calls_of(item["reply"])] for item in items]
        held = [any(prepare.held_out_pair(*p) for p in pairs(c)) for c in calls]
        assert all(held) if name == "problems_numbers" else not any(held)
    trained = {tuple(made.shape) for made in problems.trained}
    for name in ("combinations", "practised"):
        texts = [item["messages"][0]["content"] for item in problems.sets[f"problems_{name}"]]
        assert not trained & {tuple(problems.made[text].shape) for text in texts}
    for item in problems.sets["problems_combinations"]:  # each has a number nobody needs
        text, reply = asked_and_solved(item)
        needed = {n for call, _ in calls_of(reply) for n in re.findall(r"\d+", call)}
        assert set(re.findall(r"\d+", text)) - needed, text
    texts = {asked_and_solved(one)[0] for one in (*problems.chat, *problems.rl)}
    assert not texts & {i["messages"][0]["content"] for s in problems.sets.values() for i in s}


def test_problems_are_varied_and_good_english(problems):
    texts = [asked_and_solved(one)[0] for one in (*problems.chat, *problems.rl)]
    assert len(set(texts)) > 0.99 * len(texts)
    assert len({re.sub(rf"\d+|{PEOPLE}|\w+s\b", "", text) for text in texts}) > len(texts) / 2
    for one in (*problems.chat, *problems.rl, *problems.sets["problems_new"]):
        text, reply = asked_and_solved(one)
        whole = f"{text} {said(reply)}"
        for wrong in (r"\b[01] [a-z]+s\b", r"  ", r"[.,?]{2}", r"\{|\}|\[|\]", r" [.,?]",
                      r"\ba [aeiou]", r"\ban [^aeiou]", r"\b(does|did) \w+ ha[sd]\b"):  # fmt: skip
            assert not re.search(wrong, whole), (wrong, whole)
        for pronoun, names in {"she": prepare.GIRLS, "he": prepare.BOYS}.items():
            if m := re.search(rf"\b{pronoun}\b", whole, re.IGNORECASE):
                assert set(re.findall(r"\w+", whole[: m.start()])) & set(names), whole
        assert all(s[0].isupper() or s[0].isdigit() for s in re.split(r"(?<=[.?]) ", text)), text
    one, other = (prepare.problem_chat(random.Random(8)) for _ in range(2))
    assert one == other != prepare.problem_chat(random.Random(9))


def test_sums_are_asked_in_many_ways_and_worked_with_the_tool():
    rng = random.Random(1)
    chats = [prepare.sum_chat(rng) for _ in range(3000)]
    words = {"plus|add|sum|together": "+", "minus|subtract|tak(e|ing)|taken": "-",
             "times|multipl|product": "*", "divide|go into": "/"}  # fmt: skip
    ops = collections.Counter()
    for one in chats:
        text, reply = asked_and_solved(one)
        [(call, output)] = calls_of(reply)
        assert reply[0]["type"] == "python" and common.last_number(said(reply)) == output
        assert math.isclose(eval(call), float(output))
        numbers = [int(n) for n in re.findall(r"\d+", call)]
        asked = [int(n) for n in re.findall(r"\d+", text)]
        assert sorted(numbers) == sorted(asked)
        op = re.search(r"\D", call)[0]
        named = [sign for word, sign in words.items() if re.search(word, text, re.IGNORECASE)]
        sign = re.search(r"\d ?([-+*/x\u00f7]) ?\d|$", text)[1]
        assert {"x": "*", "\u00f7": "/"}.get(sign, sign) == op or (not sign and named == [op]), text
        swapped = re.search(r"from \d|go into", text)
        assert op in "+*" or numbers == (asked[::-1] if swapped else asked), text
        first = eval(op.join(map(str, numbers[:2])))
        assert not prepare.held_out_pair(*numbers[:2])
        assert not any(prepare.held_out_pair(first, n) for n in numbers[2:])
        ops[op] += 1
    assert min(ops.values()) > 400 and len(ops) == 4
    assert len({re.sub(r"\d+", "", asked_and_solved(one)[0]) for one in chats}) > 100


def test_words_are_spelled_right_and_those_of_the_test_in_no_training():
    rng = random.Random(1)
    chats, tested = [prepare.spelling_chat(rng) for _ in range(3000)], prepare.spelling_set()
    held = {word for word in prepare.spelling_words() if prepare.held_out_word(word)}
    assert len(tested) == 500 and tested == prepare.spelling_set.__wrapped__() and len(held) > 150
    words, asked = {True: set(), False: set()}, {True: set(), False: set()}
    for one in (*chats, *tested):
        text, reply = asked_and_solved(one)
        word, spelled = re.match(r'"([a-z]+)" is spelled ([a-z-]+)\.', said(reply)).groups()
        assert spelled == "-".join(word) and re.search(rf"\b{word}\b", text.lower())
        words["grade" in one].add(word)
        asked["grade" in one].add(re.sub(rf'"?\b{word}\b"?|\b[a-z]\b', "_", text.lower()))
        rest = said(reply).split(". ", 1)[1] if ". " in said(reply) else ""
        if calls := calls_of(reply):
            assert eval(calls[0][0]) == int(calls[0][1]) == int(common.last_number(rest))
            x = re.search(r'count\("(.)"\)', calls[0][0])
            assert x is None or re.search(rf"\b{x[1]}\b", text.replace(word, ""))
            assert eval(calls[0][0]) == (word.count(x[1]) if x else len(word))
        elif rest:
            low = re.sub(rf"\b{word}\b", "", text.lower(), count=1)
            first, back = (
                re.search("first|begin|start", low),
                re.search("backw|rever|around|back to", low),
            )
            want = "-".join(word[::-1]) if back else word[0] if first else word[-1]
            assert rest.endswith(f" is {want}."), text
        if "grade" in one:
            assert common.grade(one, said(reply)), one
            assert not common.grade(one, f"{spelled}-s, so s-{spelled}: 77, q."), one
    assert words[True] <= held and len(words[False]) > 1500 and not words[False] & held
    assert len(asked[True]) >= 12 and not asked[True] & asked[False]
    made = [prepare.made_word(rng) for _ in range(500)]
    assert all(4 <= len(word) <= 10 and word.isalpha() for word in made) and len(set(made)) > 400
    assert not any(test in word for word in made for test in held if test[3:])


# prepare.py: conversations and evaluation sets of the world -----------------------------------

OTHERS = ("problem", "sum", "spelling")  # kinds that have tests of their own


@pytest.fixture(scope="module")
def chats() -> dict[str, list[dict]]:
    """The training files: mid at its default size, the others smaller."""
    sizes = {"mid": 60_000, "sft": 6_000, "val": 1_000, "rl": 1_500}
    return {split: list(prepare.world_conversations(1, split, n)) for split, n in sizes.items()}


@pytest.fixture(scope="module")
def world_items() -> dict[str, list[dict]]:
    return prepare.world_sets()


def part_texts(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def said_in(conversations: list[dict], *kinds: str) -> list[tuple[str, str]]:
    """List what is said, with the reply, in conversations of some kinds, or of all."""
    out = []
    for conversation in conversations:
        if not kinds or conversation["kind"] in kinds:
            messages = [m for m in conversation["messages"] if m["role"] != "system"]
            texts = [part_texts(message) for message in messages]
            out += itertools.zip_longest(texts[::2], texts[1::2], fillvalue="")
    return out


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def found_in(needles: set[str], texts) -> set[str]:
    """Find the needles that occur in texts, as words in a row."""
    lengths = collections.defaultdict(set)
    for needle in needles:
        words = needle.split()
        assert len(words) > 1, f"{needle}: too short to be told from other text"
        lengths[words[0], words[1]].add(len(words))
    found = set()
    for text in texts:
        words = normal(text).split()
        for i, pair in enumerate(itertools.pairwise(words)):
            for n in lengths.get(pair, ()):
                found.add(" ".join(words[i : i + n]))
    return found & needles


def all_questions(unseen: bool):
    """Yield every question for every fact: its words, and (fact, forward, wording)."""
    for relation in prepare.world_relations().values():
        for fact in relation.facts:
            for forward in (True, False) if relation.unique(fact) else (True,):
                for wording in relation.askings(forward, unseen):
                    yield wording.format_map(fact.forms()), (fact, forward, wording)


def fact_questions(unseen: bool) -> dict[str, tuple]:
    """Every question for every fact: its words -> fact, forward, wording."""
    return {normal(question): asked for question, asked in all_questions(unseen)}


@functools.cache
def slips() -> dict[str, str]:
    """What a word of any wording looks like after a slip of the fingers: that -> the word."""
    wordings = (asked for relation in prepare.world_relations().values()
                for side in (True, False) for asked in relation.askings(side, False))  # fmt: skip
    words = {w for asked in wordings for w in normal(re.sub(r"{.*?}", "", asked)).split()}
    return {slip: word for word in words if word[3:] for slip in prepare.slips(word)
            if slip not in words}  # fmt: skip


def mended(text: str) -> Iterator[str]:
    """Yield normal text as it is, then with each slip of the fingers in it undone alone."""
    yield text
    words = text.split()
    for i, word in enumerate(words):
        if word in slips():
            yield " ".join([*words[:i], slips()[word], *words[i + 1 :]])


def asked_in(text: str, known: dict[str, tuple]) -> tuple | None:
    """Find which question somebody asks, whatever stands around it and however it is typed."""
    starts = [0, *(m.end() for m in re.finditer(r"[.?!:,]\s+|\n|\band ", text, re.IGNORECASE))]
    ends = [*(m.start() for m in re.finditer(r"[.?!]|\n|$", text))]
    for i, j in itertools.product(starts, ends):
        for question in mended(normal(text[i:j])) if i < j else ():
            if question in known:
                return known[question]
    return None


def test_conversations_are_a_function_of_the_seed_and_grow_at_the_end() -> None:
    for split in ("mid", "sft", "val", "rl"):
        first = list(prepare.world_conversations(7, split, 200))
        assert first == list(prepare.world_conversations(7, split, 300))[:200]
        other = list(prepare.world_conversations(8, split, 200))
        assert sum(chat in first for chat in other) < 10, split
    named = prepare.world_conversations(7, "mid", 2000, "Bo-Bo 2")
    assert any("Bo-Bo 2" in reply for _, reply in said_in(list(named), "identity"))


def test_conversations_differ_and_fit_the_context(chats) -> None:
    dumped = {split: {json.dumps(c["messages"]) for c in chats[split]} for split in chats}
    for split, conversations in chats.items():
        assert len(dumped[split]) == len(conversations), split
        for conversation in conversations:
            roles = [m["role"] for m in conversation["messages"]]
            roles = roles[1:] if roles[0] == "system" else roles
            assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
            assert (roles[-1] == "user") == (split == "rl")
            texts = [part_texts(m) for m in conversation["messages"]]
            assert all(text == text.strip() for text in texts) or conversation["kind"] in OTHERS
            assert sum(map(len, texts)) <= 700, conversation
    assert not dumped["val"] & (dumped["mid"] | dumped["sft"])


def test_each_kind_has_its_share_of_the_turns(chats) -> None:
    for split in ("mid", "sft", "val"):
        count = collections.Counter()
        for conversation in chats[split]:
            count[conversation["kind"]] += len(conversation["messages"]) // 2
        total = sum(prepare.KINDS.values())
        for kind, share in prepare.KINDS.items():
            assert abs(count[kind] / count.total() - share / total) < 0.01, (split, kind)


def test_every_tool_output_is_the_calculators(chats) -> None:
    calls = 0
    for conversation in itertools.chain(*chats.values()):
        for message in conversation["messages"]:
            if isinstance(message["content"], list):
                parts = message["content"]
                kinds = [part["type"] for part in parts]
                assert kinds.count("python") == kinds.count("output")
                for a, b in itertools.pairwise(parts):
                    if a["type"] == "python":
                        assert b == {"type": "output", "text": common.calculate(a["text"])}
                        calls += 1
    assert calls > 10_000


def test_no_held_out_question_occurs_in_any_training_file(chats, world_items, docs) -> None:
    needles = set(fact_questions(unseen=True))
    for made in world_items.values():
        needles |= {normal(part_texts(item["messages"][-1])) for item in made}
    said = (text for split in chats.values() for turn in said_in(split) for text in turn)
    assert found_in(needles, itertools.chain(said, docs)) == set()
    # nor does another seed, or more of it, ask what is held out
    others = (prepare.world_conversations(seed, "mid", 4000) for seed in (2, 3))
    assert (
        found_in(needles, (t for c in others for turn in said_in(list(c)) for t in turn)) == set()
    )
    assert found_in({"is a lion"}, ["What kind of animal is a lion?"]) == {"is a lion"}


def test_a_question_has_one_answer_whatever_relation_it_is_of() -> None:
    answers = collections.defaultdict(set)
    for question, (fact, forward, _) in itertools.chain(all_questions(False), all_questions(True)):
        answers[question].add(fact.answer if forward else fact.subject)
    assert {q: a for q, a in answers.items() if len(a) > 1} == {}


def test_unseen_wordings_of_every_kind_are_at_least_two_and_no_trained_ones() -> None:
    for text in (prepare.STORY_ASKS, prepare.MEMORY, prepare.IDENTITY, prepare.BEYOND):
        for key, fields in prepare.table(text).items():
            unseen, trained = fields[-2], [w for field in fields[:-2] for w in field]
            assert len(set(unseen)) >= 2 and not set(unseen) & set(trained), key
    pairs = [(prepare.FOLLOW_UP, prepare.FOLLOW_UP_UNSEEN), (prepare.IT_TOO, prepare.IT_TOO_UNSEEN)]
    for trained, unseen in pairs:
        assert len(prepare.ways(unseen)) >= 2
        assert not set(prepare.ways(unseen)) & set(prepare.ways(trained))


def test_facts_are_asked_equally_often_in_all_wordings_and_unaskable_ones_never(chats) -> None:
    known, short = fact_questions(unseen=False), collections.defaultdict(set)
    small = rf"\b({'|'.join(prepare.SMALL_WORDS.split())})\b"
    for question, found in known.items():  # as it is asked in a hurry
        if re.search("[a-z]{3}", re.sub(rf"{{.*?}}|{small}", "", found[2])):
            short[normal(re.sub(small, "", question))].add(found[:2])
    hurried = {question: (*cards.pop(), "") for question, cards in short.items() if len(cards) == 1}
    counts = collections.Counter()
    for split in ("mid", "sft", "val"):
        for text, _ in said_in(chats[split]):
            found = None
            if len(text) < 250:
                typed = re.sub(small, "", text, flags=re.IGNORECASE)
                found = asked_in(text, known) or asked_in(typed, hurried)
            if found and (found[0].askable or found[0].relation not in prepare.ELSEWHERE):
                assert found[0].askable, text
                counts[found[:2]] += split == "mid"
                counts[found] += 1
    cards = {found[:2] for found in known.values() if found[0].askable}
    often = sorted(counts[card] for card in cards)
    assert len(cards) > 3000 and often[0] >= 4, often[:20]
    assert often[len(often) // 2] <= 3 * often[len(often) // 20] and often[-1] <= 40
    times = collections.defaultdict(list)  # card -> how often it was asked in each wording
    for found in {found for found in known.values() if found[0].askable}:
        times[found[:2]].append(counts[found])
    possible = sum(min(sum(often), len(often)) for often in times.values())
    assert sum(n > 0 for often in times.values() for n in often) > 0.85 * possible


def test_every_reply_about_a_fact_is_true(chats) -> None:
    known, right = fact_questions(unseen=False), collections.Counter()
    for text, reply in said_in(chats["sft"][:3000], "fact", "mixed", "unknown", "memory"):
        if (found := asked_in(text, known)) and len(text) < 150:
            fact, forward, _ = found
            answer = fact.answer if forward else fact.subject
            words = {normal(w) for w in (*prepare.spellings(answer), prepare.plural(answer))}
            assert any(f" {w} " in f" {normal(reply)} " for w in words), (text, reply)
            item = {"grade": "text", **prepare.fact_grade((fact, forward), text)}
            assert common.grade(item, reply), (text, reply)
            right[fact.relation] += 1
    assert len(right) > len(prepare.world_relations()) - 6 and right.total() > 1200


def choices_of(text: str) -> dict[str, str]:
    return {b: a for a, b in re.findall(r"^- (.*) (\w)$", text, re.MULTILINE)}


def test_letters_are_balanced_and_right(chats, world_items) -> None:
    known, unseen = fact_questions(unseen=False), fact_questions(unseen=True)
    asked = [(*turn, known) for turn in said_in(chats["mid"], "letters")]
    for item in world_items["letters"]:
        text = item["messages"][-1]["content"]
        assert list(choices_of(text).values()) == item["choices"]
        assert item["reply"][-1] == item["answer"] and common.grade(item, item["reply"])
        asked.append((text, item["reply"], unseen))
    checked = collections.Counter()
    for made in (asked[: -len(world_items["letters"])], asked[-len(world_items["letters"]) :]):
        letters = collections.Counter(reply[-1] for _, reply, _ in made)
        assert set(letters) == set("ABCD")
        assert max(letters.values()) - min(letters.values()) <= 0.02 * len(made)
    for text, reply, questions in asked:
        choices, letter = choices_of(text), reply[-1]
        told, _, line = reply.partition("\n- ")
        assert line == f"{choices[letter]} {letter}"
        assert list(choices) == list("ABCD") and len(set(choices.values())) == 4, text
        if found := asked_in(text.split("\n")[0] + "\n", questions):
            fact, forward, _ = found
            brief = prepare.world_relations()[fact.relation].brief["o" if forward else "s"]
            assert choices[letter] == brief.format_map(fact.forms()), text
            full = prepare.full_replies(fact.relation, forward)
            if questions is known:  # training turns some round
                full = full + prepare.full_replies(fact.relation, not forward)
            assert told in {prepare.sentence(w.format_map(fact.forms())) for w in full}, reply
            assert fact.askable
            checked[questions is unseen] += 1
    # the others are told in a hurry, or put in a way that is not taken apart here
    assert checked[True] > 0.98 * len(world_items["letters"]), checked
    assert checked[False] > 0.84 * (len(asked) - len(world_items["letters"])), checked


def test_a_hurried_question_leaves_out_small_words_alone() -> None:
    rng, short = random.Random(0), 0
    wordings = {w for r in prepare.world_relations().values() for w in r.questions}
    for wording in sorted(wordings) * 10:
        typed, small = prepare.hurried(rng, wording), prepare.SMALL_WORDS.split()
        said, typed_words = (re.findall(r"{.*?}|[^\s?.,:]+", text) for text in (wording, typed))
        left_out = collections.Counter(said) - collections.Counter(typed_words)
        assert set(left_out) <= set(small), (wording, typed)
        words = iter(said)
        assert all(word in words for word in typed_words), (wording, typed)  # in their order
        assert typed[-1] not in ",:"
        assert re.findall(r"{.*?}", typed) == re.findall(r"{.*?}", wording)
        assert re.search("[a-z]{3}", re.sub("{.*?}", "", typed)) or typed == wording
        short += typed != wording
    assert 0.08 < short / (10 * len(wordings)) < 0.15


def test_a_mistyped_question_has_one_slip_and_none_in_what_fills_it() -> None:
    rng, slipped = random.Random(0), 0
    wordings = {w for r in prepare.world_relations().values() for w in r.questions}
    for wording in sorted(wordings) * 10:
        typed = prepare.mistyped(rng, wording)
        assert re.findall(r"{.*?}", typed) == re.findall(r"{.*?}", wording)
        old, new = wording.split(), typed.split()
        assert len(old) == len(new)
        pairs = [pair for pair in zip(old, new) if pair[0] != pair[1]]
        assert len(pairs) == (typed != wording)
        for a, b in pairs:  # a letter too few, one too many, or two swapped
            before = len(os.path.commonprefix([a, b]))
            after = len(os.path.commonprefix([a[before:][::-1], b[before:][::-1]]))
            wrong, typed_as = (w[before : len(w) - after] for w in (a, b))
            assert before > 0, (a, b)
            assert (len(wrong), len(typed_as)) in ((1, 0), (0, 1)) or wrong[::-1] == typed_as
        slipped += typed != wording
    assert 0.08 < slipped / (10 * len(wordings)) < 0.13
    assert prepare.slips("moon") == ["mon", "mono", "mooon"]


def test_invented_names_of_the_test_occur_in_no_training_file(chats, world_items, docs) -> None:
    tables = (prepare.RELATIONS, prepare.N_UNSEEN_QUESTIONS, prepare.BEYOND)
    known = set(normal(" ".join([*docs, *tables])).split())
    asked = [normal(item["messages"][-1]["content"]) for item in world_items["unknown"]]
    test = {w for text in asked for w in text.split()} - known
    assert len(test) > 350 and sum(not test.isdisjoint(text.split()) for text in asked) > 350
    test |= {name.casefold() for name in prepare.TEST_GIRLS + prepare.TEST_BOYS}
    ours = [kind for kind in prepare.KINDS if kind not in OTHERS]
    said = [text for split in chats.values() for turn in said_in(split, *ours) for text in turn]
    assert test & set(normal(" ".join(said)).split()) == set()
    new = {w for text, _ in said_in(chats["mid"], "unknown") for w in normal(text).split()} - known
    assert len(new) > 2000  # so many that none of them is learned by heart


def test_unknown_things_are_not_known_and_known_ones_are(chats) -> None:
    known, unknown = fact_questions(unseen=False), collections.Counter()
    for text, reply in said_in(chats["mid"], "unknown", "fact", "mixed", "follow-up"):
        if len(text) < 150:
            unknown["I don't know" in reply, asked_in(text, known) is not None] += 1
    assert unknown[True, True] == 0 and unknown[True, False] > 4000
    assert unknown[False, True] > 3 * unknown[True, False]
    starts = collections.Counter(r.split()[0] for _, r in said_in(chats["mid"], "unknown"))
    assert len(starts) > 20


@pytest.mark.parametrize("name", ["Nano", "Ada", "little bot 3"])
def test_the_assistant_says_who_it_is(name) -> None:
    rng, fields = random.Random(5), prepare.table(prepare.IDENTITY)
    keys = {key: [w.format(name=name) for w in words]
            for key, words in prepare.lists(prepare.IDENTITY_KEYS).items()}  # fmt: skip
    assert all(len(replies) >= 12 for key, (_, _, replies) in fields.items() if key in keys)
    question = {q.rstrip("?."): key for key, (asked, _, _) in fields.items() for q in asked}
    seen, replies = collections.Counter(), set()
    for _ in range(800):
        chat = prepare.identity_chat(rng, name)
        for text, reply in said_in([chat]):
            found = [key for q, key in question.items() if normal(text).endswith(normal(q))]
            replies.add(reply)
            if len(found) == 1 and found[0] in keys:
                assert any(w in reply for w in keys[found[0]]), (text, reply)
                seen[found[0]] += 1
    assert set(seen) == set(keys) and min(seen.values()) > 40 and len(replies) > 100
    items = prepare.identity_set(rng, name)
    assert len(items) >= 400 and all(common.grade(item, item["reply"]) for item in items)
    assert not any(common.grade(item, "I am a person, and my name is Bob.") for item in items)


def test_the_evaluation_sets_are_functions_of_the_tables(world_items) -> None:
    prepare.world_sets.cache_clear()
    assert world_items == prepare.world_sets()
    assert len(world_items["facts"]) >= 2000
    for name, made in world_items.items():
        assert len(made) >= 400, name
        assert len({json.dumps(item["messages"]) for item in made}) == len(made), name
        for item in made:
            assert item["messages"][-1]["role"] == "user" and item["kind"], item
            reply = {"role": "assistant", "content": item["reply"]}
            assert common.grade(item, part_texts(reply)), item
            if item["grade"] == "text":
                assert item["answer"] in item["accept"]
                assert not set(item["accept"]) & set(item.get("reject", []))
                wrong = {"reply": " and ".join(item["accept"] + item.get("reject", []))}
                assert not item.get("reject") or not common.grade(item, wrong["reply"]), item
                assert not common.grade(item, "Perhaps."), item
    kinds = collections.Counter(item["kind"] for item in world_items["stories"])
    assert len(kinds) == 3 and set(kinds.values()) == {200}
    asked = fact_questions(unseen=True)
    for name in ("facts", "never_asked"):
        found = [asked[normal(item["messages"][0]["content"])] for item in world_items[name]]
        assert len({fact for fact, _, _ in found}) == len(found)
        assert {fact.askable for fact, _, _ in found} == {name == "facts"}
        assert 0.08 < sum(not forward for _, forward, _ in found) / len(found) < 0.5
    assert len(world_items["facts"]) == sum(fact.askable for fact in prepare.world_facts())


def test_story_questions_have_the_answers_of_the_story() -> None:
    rng, gifts = random.Random(4), 0
    for _ in range(300):
        teller = prepare.Teller(rng, prepare.GIRLS, prepare.BOYS)
        told = teller.tell(rng.randint(1, 4))
        for key, forms, accept in prepare.story_questions(teller, told):
            if key in ("holder", "carried"):
                assert told.holder[forms["t"]] == accept[0]
            if key in ("person", "lying", "carried"):
                place = told.place[forms["n"] if key == "person" else forms["t"]]
                assert place.endswith(f" the {accept[-1]}") and forms["at"] == place
            if key in ("giver", "taker"):
                n, m, t = forms["n"], forms["m"], forms["t"]
                assert accept == [n if key == "giver" else m]
                told_so = (
                    rf"(?:{n}|[Ss]?[Hh]e) (?:gave the {t} to {m}|(?:gave|handed) {m} the {t}"
                    rf"|let {m} have the {t})|take the {t},\" said {n} to {m}|said {n}, and gave {m} "
                    rf"the {t}|{m} asked for the {t}, and {n} gave it away"
                )
                assert re.search(told_so, told.text), (n, m, t, told.text)
                gifts += 1
    assert gifts > 30


def test_memory_is_asked_for_what_was_told(world_items, chats) -> None:
    for item in world_items["stories"]:
        if item["kind"] == "memory":
            before = " ".join(m["content"] for m in item["messages"][:-1] if m["role"] == "user")
            assert re.search(rf"\b{re.escape(item['answer'])}\b", before)
            assert item["answer"] not in item["messages"][-1]["content"]
    for conversation in chats["sft"]:
        if conversation["kind"] == "memory":
            texts = [m["content"] for m in conversation["messages"]]
            if found := re.search(r"^(?:Your name is|You are called) (\w+)\.$", texts[-1]):
                assert re.search(rf"\b{found[1]}\b", " ".join(texts[:-2])), texts


def test_conversations_read_well(chats) -> None:
    text = "\n".join(
        t for split in ("sft", "val") for c in chats[split] if c["kind"] not in OTHERS
        for turn in said_in([c]) for t in turn
    )  # fmt: skip
    for wrong in (
        r"\.\.", r" [,.?!]", r"  ", r"\ba [aeio][a-z]", r"\ban [bcdfgjklmnpqrstvwxyz][a-z]",
        r"[][{}|]", r"\ba a\b", r"\b[Tt]he [Tt]he\b", r"\?\.", r",[?!.]", r"name of the name", r"\ba the\b",
        r"[a-z]\.[A-Z]",
    ):  # fmt: skip
        found = shown(wrong, text)
        allowed = r"\ba (one|eu|ewe|in|is|of|ou|as)|letter|[Tt]he word|a, |with a and|The (Hag|The)"
        found = [f for f in found if not re.search(allowed, f)]
        assert found == [], (wrong, found[:5])
    for conversation in chats["sft"]:
        if conversation["kind"] not in OTHERS:
            for message in conversation["messages"]:
                if message["role"] == "assistant" and conversation["kind"] != "letters":
                    assert re.match(r"[A-Z\d\"-]", message["content"]), message


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


def sign_text(source, key):
    """Write the manifest of a source whose text has a hash."""
    files = {"train-00000.parquet": {"sha256": key}}
    common.write_json(common.data_dir(source) / "manifest.json", {"files": files})


def test_a_tokenizer_stays_when_the_text_changes_and_that_is_said(text_source, capsys):
    sign_text(text_source, "a")
    chosen = train_tokenizer.Settings(tag="a", vocab_size=300)
    train_tokenizer.main(chosen)
    before = common.Tokenizer.load(common.run_dir("a") / "tokenizer").fingerprint
    train_tokenizer.main(chosen)
    assert "changed" not in capsys.readouterr().out
    write_texts(text_source, ["Entirely other text. " * 50] * 3)
    sign_text(text_source, "b")
    train_tokenizer.main(chosen)
    assert re.search("the text has changed .*it stays; --restart", capsys.readouterr().out)
    assert common.Tokenizer.load(common.run_dir("a") / "tokenizer").fingerprint == before
    train_tokenizer.main(dataclasses.replace(chosen, restart=True))
    train_tokenizer.main(chosen)
    assert "changed" not in capsys.readouterr().out


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
    with pytest.raises(common.MissingInput, match=r"--source=one\|two"):
        train_tokenizer.find_source("")


# pretrain.py ---------------------------------------------------------------------------------


def tiny_pretrain(**changes):
    return pretrain.Settings(
        **{"tag": "t", "depth": 1, "head_dim": 32, "max_seq_len": 32, "num_iterations": 6,
           "total_batch_size": 96, "device_batch_size": 2, "save_every": 2, "log_every": 1,
           "eval_every": 3, "eval_tokens": 200, "device": "cpu", "dtype": "float32",
           "keep": 0, "bigram_rows": 64, **changes}
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
    rates = [line["lr"] for line in common.read_log("t") if "lr" in line]
    assert rates == [common.trapezoid(i, 40, 10, 0.6, 0.05) for i in range(40)]
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
    for step in (3, 4):
        (common.run_dir("t") / "base" / f".step-00000{step}.partial").mkdir()
    pretrain.main(tiny_pretrain())
    assert not list((common.run_dir("t") / "base").glob(".*")), "what was half written goes"
    a, b = final_weights("u", 6), final_weights("t", 6)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert base_losses("u") == base_losses("t")
    lines = [json.loads(x) for x in (common.run_dir("t") / "metrics.jsonl").open()]
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps == sorted(set(steps)), "the log repeats no step"


def test_a_half_trained_model_is_refused_other_text_and_a_whole_one_notes_it(tiny_run, capsys):
    sign_text(tiny_run, "a")
    pretrain.main(tiny_pretrain())
    texts = list(common.read_texts(common.list_shards(tiny_run, "train")[0]))
    write_texts("other", texts)
    write_texts(tiny_run, texts[1:])
    pretrain.main(tiny_pretrain())
    assert "changed" not in capsys.readouterr().out, "the manifest does not say"
    sign_text(tiny_run, "b")
    pretrain.main(tiny_pretrain())
    assert "finished; the text has changed since" in capsys.readouterr().out
    folder, have = common.run_dir("t") / "tokenizer", common.Tokenizer
    whole = have.load(folder)
    have(whole.pattern, whole.merges[:-1], whole.info).save(folder)
    with pytest.raises(common.MissingInput, match="another tokenizer"):
        pretrain.main(tiny_pretrain())
    whole.save(folder)
    for step in (6, 4):
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    for changes in ({}, {"source": "other"}):
        with pytest.raises(common.MissingInput, match="other data.*--restart"):
            pretrain.main(tiny_pretrain(**changes))
    assert not list(common.data_dir("other").glob("tokens/*")), "it is seen before hours of work"
    write_texts(tiny_run, texts)
    pretrain.main(tiny_pretrain())
    assert len(base_losses()) == 6


def test_the_final_checkpoint_is_saved_before_any_evaluation(tiny_run, monkeypatch):
    def crash(*args):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr(pretrain, "evaluate_bpb", crash)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        pretrain.main(tiny_pretrain(num_iterations=2, eval_every=2, save_every=0))
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


def test_a_run_whose_memory_runs_out_goes_on_with_the_same_losses(tiny_run, monkeypatch, capsys):
    sizes = {"total_batch_size": 8 * 32, "device_batch_size": 4}
    pretrain.main(tiny_pretrain(tag="u", **sizes))
    # in the second pass of the second step, when the gradients of the first are there
    monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, 2, first=3))
    pretrain.main(tiny_pretrain(**sizes))
    assert capsys.readouterr().out.count("memory ran out in step 2: on in passes of 2 rows") == 1
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and all(a[i] == pytest.approx(b[i], abs=2e-4) for i in a)
    assert (
        a[1] == b[1] and common.read_meta(common.find_checkpoint("t", "base"))["micro_batch"] == 2
    )
    whole = final_weights("t", 6)
    for step in (4, 6):  # what goes on with memory enough is the same run bit for bit
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    monkeypatch.setattr(common.GPT, "forward", FORWARD)
    pretrain.main(tiny_pretrain(**sizes))
    assert all(torch.equal(x, whole[name]) for name, x in final_weights("t", 6).items())
    assert base_losses() == b
    monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, 0))
    with pytest.raises(common.Stop, match="not even one row fits"):
        pretrain.main(tiny_pretrain(restart=True, **sizes))


def test_all_ranks_take_fewer_rows_when_one_ranks_memory_runs_out(tiny_run):
    sizes = {"total_batch_size": 8 * 32, "device_batch_size": 4}
    pretrain.main(tiny_pretrain(tag="u", **sizes))
    options = dataclasses.asdict(tiny_pretrain(**sizes))
    run_ranks(
        2,
        f"""
    if rank == 1:
        common.GPT.forward = test_all.scarce(common.GPT.forward, 2, first=3)
    pretrain.main(pretrain.Settings(**{options!r}))
    """,
    )
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and all(a[i] == pytest.approx(b[i], abs=1e-3) for i in a)
    metas = [common.read_meta(path) for path in common.list_checkpoints("t", "base")]
    assert [meta["micro_batch"] for meta in metas] == [4, 2, 2]


def test_an_fp16_run_resumes_bit_for_bit_and_recomputing_changes_nothing(tiny_run):
    pretrain.main(tiny_pretrain(tag="u", dtype="float16"))
    pretrain.main(tiny_pretrain(dtype="float16"))
    for step in (4, 6):
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    pretrain.main(tiny_pretrain(dtype="float16", recompute=True))
    a, b = final_weights("u", 6), final_weights("t", 6)
    assert all(torch.equal(a[name], b[name]) for name in a) and base_losses("u") == base_losses("t")
    shard = common.load_file(common.find_checkpoint("t", "base"), "optimizer-000.pt", CPU)
    assert shard["optimizer"]["scaler"] == {"scale": 2.0**16, "steps": 6}


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"fp8": True}], ids=str)
def test_a_compiled_run_follows_a_plain_one(tiny_run, changes):
    if not common.can_compile(CPU):
        pytest.skip("no C++ compiler")
    for tag, choice in (("u", "no"), ("t", "yes")):
        pretrain.main(tiny_pretrain(tag=tag, compile=choice, **changes))
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and len(a) == 6
    assert max(abs(a[step] - b[step]) for step in a) < (0.02 if "fp8" in changes else 1e-3)
    assert common.read_meta(common.find_checkpoint("t", "base"))["compiled"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks_follow_one_rank_step_by_step(tiny_run, world_size):
    pretrain.main(tiny_pretrain(tag="u"))
    options = dataclasses.asdict(tiny_pretrain())
    run_ranks(world_size, f"pretrain.main(pretrain.Settings(**{options!r}))")
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-3)
    for step in (6, 4):
        shutil.rmtree(common.find_checkpoint("t", "base", step))
    pretrain.main(tiny_pretrain())  # one rank goes on from what several saved
    for step, loss in base_losses("t").items():
        assert loss == pytest.approx(a[step], abs=1e-3)


def test_ranks_differ_by_rounding_alone(tiny_run, tmp_path):
    """The same code with fp64 for fp32 and bf16: what is left of a difference is a fault."""
    folder = tmp_path / "doubles"
    folder.mkdir()
    for path in HERE.glob("*.py"):
        text = re.sub(r"torch\.(float32|bfloat16)\b", "torch.float64", path.read_text("utf-8"))
        text = text.replace(".float()", ".double()")
        if path.name == "common.py":
            head = "\nimport torch\n"
            assert text.count(head) == 1
            text = text.replace(head, f"{head}torch.set_default_dtype(torch.float64)\n")
        (folder / path.name).write_text(text, "utf-8")
    losses = []
    for world_size in (1, 2, 3):
        options = dataclasses.asdict(tiny_pretrain(dtype="float64", num_iterations=20))
        code = f"import pretrain\npretrain.main(pretrain.Settings(**{options!r}))\n"
        (folder / "start.py").write_text(code, "utf-8")
        flags = ["--standalone", f"--nproc_per_node={world_size}", str(folder / "start.py")]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *flags], check=True)
        losses.append(base_losses())
        shutil.rmtree(common.run_dir("t") / "base")
        (common.run_dir("t") / "metrics.jsonl").unlink()
    assert len(losses[0]) == 20 and losses[0].keys() == losses[1].keys() == losses[2].keys()
    for step, loss in losses[0].items():
        assert [x[step] for x in losses] == pytest.approx([loss] * 3, abs=1e-9)


def test_a_run_goes_on_with_1_2_3_and_1_ranks_as_if_unbroken(tiny_run):
    pretrain.main(tiny_pretrain(tag="u", num_iterations=8))
    options = dataclasses.asdict(tiny_pretrain(num_iterations=8))
    pretrain.main(pretrain.Settings(**options))
    for step, world_size in ((2, 2), (4, 3), (6, 1)):
        for later in range(step + 2, 10, 2):
            shutil.rmtree(common.find_checkpoint("t", "base", later))
        run_ranks(world_size, f"pretrain.main(pretrain.Settings(**{options!r}))")
        shards = len([*common.find_checkpoint("t", "base", 8).glob("optimizer-*.pt")])
        assert shards == world_size
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() == set(range(1, 9))
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-3)


def torchrun(flags, settings, **environment):
    """Start pretrain.py by torchrun with settings that differ from their defaults as flags."""
    plain = dataclasses.asdict(pretrain.Settings())
    words = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(settings).items()
             if v != plain[k] and not isinstance(v, bool)]  # fmt: skip
    words += [f"--{k}" for k in ("restart",) if getattr(settings, k)]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, HERE / "pretrain.py", *words]
    return [str(word) for word in command], {**os.environ, **environment}


def ranks_of(agent):
    """Return the process ids of the ranks that a torchrun process has started, by rank."""
    found = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        for word in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                found[int(word[5:])] = int(child)
    return found


def test_all_ranks_agree_on_the_number_of_their_start():
    store = dist.HashStore()
    assert common.agree_on_attempt(store, 0, 1) == 1
    # of the start that was then counted one rank died before it came here, and one after
    store.add("attempt", 1)
    store.set("here/2/1", "dead")
    agreed = {}

    def begin(rank):
        agreed[rank] = common.agree_on_attempt(store, rank, 3)

    threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)  # rank 0 comes last: the others read the count of the start before
    for thread in threads:
        thread.join(20)
    assert agreed == {0: 3, 1: 3, 2: 3}


def test_torchrun_goes_on_by_itself_after_ranks_are_killed(tiny_run):
    if not Path("/proc/self/task").exists():
        pytest.skip("the ranks' process ids are read from /proc")
    settings = tiny_pretrain(num_iterations=120, save_every=10, eval_every=0, keep=2, restart=True)
    options = {**dataclasses.asdict(settings), "tag": "u"}
    run_ranks(2, f"pretrain.main(pretrain.Settings(**{options!r}))")
    flags = ["--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command, env = torchrun(flags, settings)
    victims, said, killed = [(20, 1), (40, 0)], [], []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as agent:
        for line in agent.stdout:
            said.append(line)
            if victims and f"base {victims[0][0]:05d}/" in line:
                killed.append(time.monotonic())
                os.kill(ranks_of(agent)[victims.pop(0)[1]], signal.SIGKILL)
            if "going on from" in line:
                assert time.monotonic() - killed[-1] < 180
    assert agent.returncode == 0 and not victims
    assert sum("going on from" in line for line in said) == 2
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and len(a) == 120
    assert max(abs(a[step] - b[step]) for step in a) < 1e-4
    a, b = final_weights("u", 120), final_weights("t", 120)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_a_disk_that_fills_up_under_one_rank_stops_all_with_its_sentence(tiny_run, capfd):
    options = dataclasses.asdict(
        tiny_pretrain(num_iterations=100_000, save_every=2, eval_every=0, compile="no")
    )
    code = f"""
    def full(path, *args, **options):
        shard = "step-000004.partial" in str(path) and str(path).endswith("001.pt")
        return open("/dev/full" if shard else path, *args, **options)
    common.open = full
    try:
        pretrain.main(pretrain.Settings(**{options!r}))
    except common.Stop as stop:
        print(f"rank {{rank}} said: {{stop}}\\n", end="", flush=True)  # in one piece
    """
    run_ranks(2, code)
    out = capfd.readouterr().out
    assert all(f"rank {rank} said: the disk is full" in out for rank in (0, 1)), out
    assert [p.name for p in common.list_checkpoints("t", "base")] == ["step-000002"]
    common.load_file(common.find_checkpoint("t", "base"), "optimizer-001.pt", CPU)


def test_no_compiler_no_fork_and_no_locks_are_needed(tiny_run, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/nonexistent")
    for module, name in ((os, "fork"), (signal, "SIGALRM")):
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    pretrain.main(tiny_pretrain(tag="u", compile="yes"))
    assert "compile: off: it needs a C++ compiler" in capfd.readouterr().out
    child = multiprocessing.get_context("spawn").Process(
        target=pretrain.main, args=(tiny_pretrain(compile="yes"),)
    )
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert base_losses("t") == base_losses("u")


def test_ranks_need_no_shared_memory(tiny_run):
    hide = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o ro none /dev/shm && exec "$@"',
        "sh",
    ]
    if not shutil.which("unshare") or subprocess.run([*hide, "true"], check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    command, env = torchrun(["--standalone", "--nproc_per_node=2"], tiny_pretrain())
    subprocess.run([*hide, *command], env=env, check=True)
    pretrain.main(tiny_pretrain(tag="u"))
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and all(a[i] == pytest.approx(b[i], abs=1e-3) for i in a)


@pytest.fixture
def two_hosts():
    """The words that run a command on either of two hosts, network namespaces joined by a cable."""
    names = [f"nanochat-{os.getpid()}-{i}" for i in (0, 1)]
    steps = [f"ip netns add {name}" for name in names]
    steps += [f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"]
    for i, name in enumerate(names):
        steps += [f"ip -n {name} addr add 10.99.0.{i + 1}/24 dev eth0"]
        steps += [f"ip -n {name} link set {device} up" for device in ("eth0", "lo")]
    try:
        for step in steps:
            try:
                done = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("network namespaces need iproute2")
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {step}: {done.stderr}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("shared", [True, False])
def test_two_hosts_train_as_one_process_does(tiny_run, two_hosts, base_dir, shared, tmp_path):
    pretrain.main(tiny_pretrain(tag="u", num_iterations=20))
    shutil.rmtree(common.data_dir(tiny_run) / "tokens")
    other = tmp_path / "other"  # the second host's disk: text of its own, without the token cache
    shutil.copytree(base_dir / "data", other / "data")
    if shared:
        (other / "runs").symlink_to(base_dir / "runs")
    else:
        shutil.copytree(base_dir / "runs", other / "runs")
    agents = []
    for i, host in enumerate(two_hosts):
        flags = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=test",
                 "--rdzv_endpoint=10.99.0.1:29500", f"--rdzv_conf=is_host={1 - i}",
                 f"--local_addr=10.99.0.{i + 1}"]  # fmt: skip
        command, env = torchrun(
            flags, tiny_pretrain(num_iterations=20), GLOO_SOCKET_IFNAME="eth0",
            NANOCHAT_BASE_DIR=str((base_dir, other)[i]),
        )  # fmt: skip
        with open(tmp_path / f"host{i}.txt", "w") as out:
            agents.append(subprocess.Popen(host + command, env=env, stdout=out, stderr=out))
    try:
        codes = [agent.wait(240) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = [(tmp_path / f"host{i}.txt").read_text() for i in (0, 1)]
    if not shared:
        assert 0 not in codes and "must be a folder that all nodes share" in said[1], said
        return
    assert codes == [0, 0], said
    a, b = base_losses("u"), base_losses("t")
    assert a.keys() == b.keys() and len(a) == 20
    worst = max(abs(a[step] - b[step]) for step in a)
    assert worst < 0.01, worst  # what is rounded grows while the loss falls steeply
    assert all(abs(a[step] - b[step]) < 1e-3 for step in range(1, 9))
    rows = [[*(base / "data").glob("*/tokens/*/*.npy")] for base in (base_dir, other)]
    assert [path.read_bytes() for path in rows[0]] == [path.read_bytes() for path in rows[1]] != []


def test_a_signal_saves_and_exits_0_and_the_run_goes_on(tiny_run):
    settings = {**dataclasses.asdict(tiny_pretrain(num_iterations=100_000, eval_every=0,
                                                   save_every=0, compile="no")), "keep": 2}  # fmt: skip
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
        ({"target_flops": -1.0}, "--target-flops"),
        ({"target_flops": math.inf}, "--target-flops"),
        ({"target_param_data_ratio": math.nan}, "--target-param-data-ratio"),
        ({"plan_count": 0}, "--plan-count"),
        ({"n_kv_head": -1}, "--n-kv-head"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_wrong_pretraining_settings_are_value_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_pretrain(**changes)


@pytest.mark.parametrize("module", [midtrain, sft, rl, evaluate])
def test_a_negative_seed_is_a_value_error(module):
    with pytest.raises(ValueError, match="seed.* must be 0 or more"):
        module.Settings(seed=-1)


@pytest.mark.parametrize("name", ["num_iterations", "val_problems", "top_k", "warmup", "keep"])
def test_negative_settings_of_rl_are_value_errors(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be 0 or more"):
        rl.Settings(**{name: -1})
    with pytest.raises(ValueError, match="--val-problems must be 128 or less"):
        rl.Settings(val_problems=129)
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            rl.Settings(temperature=value)


def test_the_width_is_64_a_block_in_heads_of_64_and_from_depth_8_of_128() -> None:
    for depth, heads in ((1, 1), (4, 4), (7, 7), (8, 4), (10, 5), (20, 10)):
        config = pretrain.model_config(pretrain.Settings(depth=depth), 512)
        assert (config.n_head, config.n_embd) == (heads, 64 * depth)
    config = pretrain.model_config(pretrain.Settings(depth=4, head_dim=128), 512)
    assert (config.n_head, config.n_embd) == (2, 256)


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


def test_the_fit_to_pairs_equals_a_plain_count_and_nears_its_entropy(
    tiny_run, tokenizer, monkeypatch
):
    rows, V = common.token_rows(tiny_run, tokenizer, 16, 10**6, ALONE), tokenizer.vocab_size
    counted = collections.Counter[tuple[int, int]]()
    for i in range(len(rows)):
        counted.update(itertools.pairwise(rows.row(i).tolist()))
    counted.pop((tokenizer.bos, tokenizer.bos), None)  # how the last row is filled up
    before, after, shares = pretrain.count_pairs(rows, V)
    expected = [n / counted.total() for _, n in sorted(counted.items())]
    assert list(zip(before.tolist(), after.tolist())) == sorted(counted)
    torch.testing.assert_close(shares, torch.tensor(expected))

    model = common.GPT.create(random_model(vocab_size=V).config, CPU, torch.float32)
    nats = pretrain.fit_bigrams(model, rows, 60)
    again = common.GPT.create(model.config, CPU, torch.float32)
    torch.manual_seed(0)
    again.init_weights()
    with monkeypatch.context() as patch:  # few ids at once, as with a large vocabulary
        patch.setattr(pretrain, "logits_at_once", lambda device: 100 * V)
        assert pretrain.fit_bigrams(again, rows, 60) == pytest.approx(nats, abs=1e-2)
    with torch.no_grad():
        losses = F.cross_entropy(model(before[:, None])[:, 0], after, reduction="none")
    assert (losses * shares).sum().item() == pytest.approx(nats, abs=0.02)
    alone = torch.zeros(V).index_add(0, before, shares)
    entropy = -(shares * (shares / alone[before]).log()).sum().item()
    unigrams = -(alone[alone > 0] * alone[alone > 0].log()).sum().item()
    assert entropy < nats < entropy + 0.4 * (unigrams - entropy)
    assert torch.allclose(model.embed.weight.square().mean(1), torch.ones(()), atol=1e-3)


def test_the_fit_to_pairs_costs_a_small_share_or_is_left_out():
    settings = pretrain.Settings(depth=4, max_seq_len=512)
    config = pretrain.model_config(settings, 4096)
    steps = {
        n: pretrain.bigram_steps(settings, config, n) for n in (10**5, 10**6, 10**8, 2 * 10**9)
    }
    assert steps == {10**5: 0, 10**6: 60, 10**8: 60, 2 * 10**9: 0}
    assert pretrain.bigram_steps(dataclasses.replace(settings, bigram_steps=0), config, 10**8) == 0


def test_the_tiers_fit_the_cards_that_they_name():
    cards = {"gpu1": (24, 1), "8xa6000": (48, 8), "8xh100": (80, 8), "8xh200": (141, 8)}
    table = (HERE / "run.sh").read_text().split('TIERS="')[1].split('\n"')[0]
    depths = dict(re.findall(r"^(\S+) .*?--depth=(\d+)", table, re.MULTILINE))
    assert cards.keys() <= depths.keys()
    for tier, (gb, count) in cards.items():
        settings = pretrain.Settings(depth=int(depths[tier]))
        config = pretrain.model_config(settings, 65536)
        parts = common.memory_bytes(config, 4, 2, torch.device("cuda"), world_size=count)
        assert sum(parts.values()) < 0.9 * gb * 1e9, (tier, parts)


def test_the_plan_touches_neither_data_nor_device(base_dir, capsys):
    numbers = pretrain.main(
        pretrain.Settings(depth=20, plan=True, plan_device="H100", plan_count=8)
    )
    out = capsys.readouterr().out
    blocks = 20 * 12 * 1280**2 + 10 * 10 * 32 + 20 * 2  # with the values' gates and the skip
    assert numbers["parameters"] == (2 + 10) * 65536 * 1280 + blocks + 1280**2
    assert 11e9 < numbers["tokens"] < 11.5e9 and 2 * 3600 < numbers["seconds"] < 6 * 3600
    assert 50 < numbers["cost_usd"] < 150
    for word in ("parameters", "FLOPs", "tokens", "memory", "sends", "time", "cost"):
        assert word in out
    # 7/8 of 2 x 4 bytes; by eights go 20 matrices of a shape in 24 slots, 81 in 88, 10 in 16
    slots = (2 * 24 * 4 + 88) * 1280**2 + 16 * 10 * 32 + 12 * 65536 * 1280 + 2 * 20
    assert numbers["exchanged_bytes"] == 7 * slots
    limits = [pretrain.card_limits(gb, pretrain.Settings()) for gb in (6, 24, 141)]
    assert limits == sorted(limits, key=lambda x: x[:2]) and limits[0][0] >= 4
    assert all(plain <= recomputed for plain, recomputed, _ in limits)
    assert all(plain < recomputed for plain, recomputed, _ in limits[1:])
    assert not list(base_dir.iterdir())
    for name in common.PEAK_FLOPS:
        plan = pretrain.Settings(depth=34, plan=True, plan_device=name, plan_count=8)
        pretrain.main(plan)
        total, rows = re.search(
            r"memory +([\d.]+) GB .* (\d+) rows:", capsys.readouterr().out
        ).groups()
        fits = float(total) < 0.9 * pretrain.MEMORY_GB[name]
        assert fits or rows == "1", name


def test_the_readmes_cards_and_steps_are_those_of_the_plan(base_dir, capsys):
    text = (HERE / "README.md").read_text("utf-8")

    def table(head):
        """The rows of numbers below a head, without their units."""
        rows = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
        return [[float(x) for x in re.findall(r"[0-9.]+", row.replace(",", ""))] for row in rows]

    cards = {gb: tuple(limits) for gb, *limits in table("card")}
    settings = pretrain.Settings()
    assert cards == {gb: pretrain.card_limits(gb, settings) for gb in pretrain.CARDS_GB}
    rows = table("GPUs")
    assert len(rows) > 3
    for count, *cells in rows:
        for depth, (step, sent, takes) in ((20, cells[:3]), (32, cells[3:])):
            options = {"plan": True, "plan_device": "H100", "plan_count": int(count)}
            plan = pretrain.main(pretrain.Settings(depth=depth, **options))
            assert step == round(1e3 * plan["step_seconds"])
            assert sent == round(plan["exchanged_bytes"] / 1e9, 1)
            assert takes == round(1e3 * plan["exchange_seconds"])


def test_samples_that_memory_has_no_room_for_end_no_run(tokenizer, monkeypatch, capsys):
    run, model = common.Run("base", "t", None, CPU, 0, 1), random_model(vocab_size=300)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another")):
        failing = unittest.mock.Mock(side_effect=error)
        monkeypatch.setattr(pretrain.GPT, "create", failing)
        if error.args == ("another",):
            with pytest.raises(RuntimeError, match="another"):
                pretrain.print_samples(run, model, tokenizer)
        else:
            pretrain.print_samples(run, model, tokenizer)
    assert "sample: none, as memory is full" in capsys.readouterr().out


# midtrain.py, sft.py, rl.py --------------------------------------------------------------------


def one_turn(question, answer, kind="talk"):
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer}], "kind": kind}


def tool_chat(a, b):
    parts = [("text", "So "), ("python", f"{a}+{b}"), ("output", str(a + b)), ("text", "Done.")]
    return one_turn(f"{a} and {b}?", [{"type": t, "text": x} for t, x in parts], "problem")


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


@pytest.fixture
def chat_run(tiny_run):
    """Runs "t" and "u" with equal base models, conversations of two kinds, and problems."""
    folder = common.data_dir(tiny_run)
    words = "red blue green tan".split()
    talk = [one_turn(f"Say {w}.", f"{w.capitalize()} it is, {w}!") for w in words]
    tools = [tool_chat(a, b) for a in range(1, 6) for b in range(1, 4)]
    write_lines(folder / "mid.jsonl", talk * 3 + tools)
    write_lines(folder / "sft.jsonl", talk + tools)
    write_lines(folder / "val.jsonl", talk[:2])
    problem = {"messages": talk[0]["messages"][:1], "grade": "text", "answer": "red",
               "accept": words, "reject": [], "kind": "problem"}  # fmt: skip
    problems = [{**problem, "messages": one["messages"][:1]} for one in talk] * 8
    write_lines(folder / "rl.jsonl", problems[:30])
    for tag in ("t", "u"):
        pretrain.main(tiny_pretrain(tag=tag, max_seq_len=64, total_batch_size=192))
    return tiny_run


OFTEN = {"device": "cpu", "dtype": "float32", "save_every": 2, "log_every": 1, "keep": 0}
CHAT_STAGES = {
    "mid": (midtrain, {"eval_every": 2}),
    "sft": (sft, {"eval_every": 2, "start_from": "base"}),
    "rl": (rl, {"eval_every": 2, "start_from": "mid", "num_iterations": 4, "max_tokens": 24,
                "problems_per_step": 3, "num_samples": 4, "device_batch_size": 5, "slots": 7}),
}  # fmt: skip


def run_stage(name, tag, **changes):
    module, options = CHAT_STAGES[name]
    if name == "rl" and not common.list_checkpoints(tag, "mid"):
        midtrain.main(midtrain.Settings(tag=tag, **OFTEN, num_iterations=40))  # some are right
    settings = module.Settings(**{"tag": tag, **OFTEN, **options, **changes})
    return module, settings, module.main(settings)


def stage_losses(tag, stage):
    lines = [json.loads(x) for x in (common.run_dir(tag) / "metrics.jsonl").open()]
    return {x["step"]: x["loss"] for x in lines if x["stage"] == stage and "loss" in x}


def test_chat_stages_take_the_base_runs_rates_and_if_asked_its_moments(chat_run):
    flags = {"matrix_lr": 0.03, "head_lr": 0.005, "lr_scale": 0.7, "weight_decay": 0.1}
    wanted = tiny_pretrain(tag="b", max_seq_len=64, total_batch_size=192, **flags)
    tokens = common.run_dir("t") / "tokenizer"
    shutil.copytree(tokens, common.run_dir("b") / "tokenizer")
    pretrain.main(wanted)
    parent = common.find_checkpoint("b", "base")

    def begin(warm, **changes):
        settings = sft.Settings(tag="b", lr_scale=0.5, **changes)
        run = common.Run("sft", "b", settings, CPU, 0, 1)
        return common.continue_stage(run, parent, None, False, torch.float32, warm)

    def rates(model, *asked):
        return [g["lr"] for g in common.optimizer_groups(model, *asked)]

    model, optimizer = begin(warm=False)
    expected = rates(model, 0.03, wanted.embed_lr, 0.005, 0.1)
    assert [g["lr"] for g in optimizer.groups] == pytest.approx([0.35 * lr for lr in expected])
    assert optimizer.groups[0]["weight_decay"] == 0.1
    assert not any(x.any() for unit in optimizer.units for x in unit.state.values())
    model, warm = begin(warm=True, matrix_lr=0.01, weight_decay=0.0)
    expected = rates(model, 0.01, wanted.embed_lr, 0.005, 0.0)
    assert [g["lr"] for g in warm.groups] == pytest.approx([0.35 * lr for lr in expected])
    assert warm.groups[0]["weight_decay"] == 0
    saved = common.load_file(parent, "optimizer-000.pt", CPU)["optimizer"]
    assert warm.steps == saved["steps"] == 6
    for unit, other in zip(warm.units, saved["units"], strict=True):
        assert all(torch.equal(unit.state[name], other[name]) for name in unit.state)
        assert any(x.any() for x in unit.state.values())


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_a_killed_chat_stage_resumes_bit_for_bit(chat_run, name):
    module, settings, _ = run_stage(name, "u")
    settings = dataclasses.replace(settings, tag="t")
    if name == "rl":
        shutil.copytree(common.run_dir("u") / "mid", common.run_dir("t") / "mid")
    stage, given = module.__name__, dataclasses.asdict(settings)
    code = f"""
    import time
    save, steps = {stage}.save_checkpoint, []

    def save_and_die(run, step, *rest):
        run.wait_for_save()
        steps.append(step)
        if len(steps) == 2:  # its files never become whole
            torch.save = lambda *_: time.sleep(60)
        save(run, step, *rest)
        if len(steps) == 2:
            os.kill(os.getpid(), {signal.SIGKILL:d})

    {stage}.save_checkpoint = save_and_die
    {stage}.main({stage}.Settings(**{given!r}))
    """
    run_ranks(1, code, end=-signal.SIGKILL)
    whole = common.list_checkpoints("u", name)
    assert 1 <= len(common.list_checkpoints("t", name)) < len(whole)
    module.main(settings)
    a, b = (common.load_file(common.find_checkpoint(tag, name), "model.pt", CPU) for tag in "ut")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert stage_losses("u", name) == stage_losses("t", name)
    parent = {"rl": "mid"}.get(name, "base")
    before = common.load_file(common.find_checkpoint("t", parent), "model.pt", CPU)
    assert any(not torch.equal(a[key], before[key]) for key in a), "it learned something"
    rates = [x["lr"] for x in common.read_log("u") if x["stage"] == name and "lr" in x]
    shape = settings.warmup, settings.warmdown, settings.final_lr
    assert rates == [common.trapezoid(i, len(rates), *shape) for i in range(len(rates))]


def test_pretraining_validates_on_text_that_it_does_not_train_on(text_source):
    val = list(common.read_texts(common.data_dir(text_source) / "val.parquet"))
    assert pretrain.validation_texts(text_source, 10**6) == val
    assert pretrain.validation_texts(text_source, 1) == val[:1]
    shards = common.list_shards(text_source, "train")
    assert not set(val) & {text for path in shards for text in common.read_texts(path)}


def test_the_validation_loss_is_of_all_rows_whatever_the_micro_batch(chat_run, tokenizer):
    path = common.data_dir(chat_run) / "sft.jsonl"
    rows, _ = common.conversation_rows(path, tokenizer, 64, ALONE)
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    ids, targets = rows.gather(np.arange(len(rows)))
    with torch.no_grad():
        logits = model(ids).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=common.IGNORE).item()
    for micro in (1, 2, len(rows) - 1, len(rows), 99):
        assert common.evaluate_loss(model, rows, micro) == pytest.approx(expected, rel=1e-5)


def test_the_best_validation_outlives_worse_ones_and_a_resume(base_dir):
    common.run_dir("t").mkdir(parents=True)
    run = common.Run("sft", "t", None, CPU, 0, 1)
    for step, loss, best in ((0, 3.0, 3.0), (2, 1.0, 1.0), (4, 2.0, 1.0), (6, 0.5, 0.5)):
        run.log(step, val_loss=loss)
        assert run.metrics["best_val_loss"] == best
    again = common.Run("sft", "t", None, CPU, 0, 1)
    again.recall({"step": 4, "metrics": {"best_val_loss": 1.0}})
    assert (again.metrics["best_val_loss"], again.metrics["val_loss"]) == (1.0, 2.0)
    assert again.validated == {0, 2, 4}


@pytest.mark.parametrize("name", ["base", *CHAT_STAGES])
def test_a_validation_that_broke_off_is_made_up_for_and_the_best_is_kept(
    chat_run, name, monkeypatch
):
    def train(tag):
        if name == "base":
            settings = tiny_pretrain(tag=tag, num_iterations=4, eval_every=2, restart=tag == "u")
            return pretrain.main(settings)
        return run_stage(name, tag)[2]

    def validations(tag):
        lines = [json.loads(x) for x in (common.run_dir(tag) / "metrics.jsonl").open()]
        lines = [{k: v for k, v in x.items() if k != "time"} for x in lines]
        return [x for x in lines if x["stage"] == name and any("val" in k for k in x)]

    module = pretrain if name == "base" else CHAT_STAGES[name][0]
    part = {"base": "evaluate_bpb", "rl": "validate"}.get(name, "evaluate_loss")
    whole = train("u")
    if name == "base":
        shutil.rmtree(common.run_dir("t") / "base")
        (common.run_dir("t") / "metrics.jsonl").unlink()
    evaluate_, calls = getattr(module, part), []

    def break_off(*args):
        calls.append(args)
        if len(calls) in (2, 4, 5):  # after a save in mid-run, and twice after the last
            raise RuntimeError("it broke off")
        return evaluate_(*args)

    monkeypatch.setattr(module, part, break_off)
    for _ in range(9):
        with contextlib.suppress(RuntimeError):
            metrics = train("t")
            break
    assert len(calls) == len(validations("u")) + 3
    assert validations("t") == validations("u")
    assert [x["step"] for x in validations("t")][:2] == [0, 2]
    timeless = {"tok_per_s", "mfu", "data", "update", "left_s", "sampling_s"}
    assert {k: v for k, v in metrics.items() if k not in timeless} == {
        k: v for k, v in whole.items() if k not in timeless
    }
    if name != "rl":
        key = "val_bpb" if name == "base" else "val_loss"
        assert metrics[f"best_{key}"] == min(x[key] for x in validations("t"))
    assert train("t") == metrics, "it is finished, and says how it ended"
    assert len(calls) == len(validations("u")) + 3


def test_muons_products_are_the_base_runs_unless_the_machine_computes_in_another(
    chat_run, monkeypatch
):
    asked, pick = [], common.pick_dtype
    monkeypatch.setattr(
        common, "pick_dtype", lambda device, name="": asked.append(name) or torch.float32
    )
    base = common.read_meta(common.find_checkpoint("t", "base"))
    assert base["dtype"] == "float32" and pick(CPU, base["muon_dtype"])
    for dtype in ("float32", "bfloat16"):
        run_stage("sft", "t", dtype=dtype, num_iterations=1, restart=True)
    assert asked == [base["muon_dtype"], ""]
    again = {"dtype": "bfloat16", "num_iterations": 2, "save_every": 1}
    run_stage("sft", "t", **again, restart=True)
    shutil.rmtree(common.list_checkpoints("t", "sft")[-1])
    asked.clear()
    run_stage("sft", "t", **again)
    assert asked == ["float32"], "when it goes on it is what it was"


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_two_ranks_follow_one_in_the_chat_stages(chat_run, name):
    for tag in ("t", "u"):  # what bf16 makes of another order of sums would move a draw
        path = common.find_checkpoint(tag, "base") / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "muon_dtype": "float32"}))
    module, settings, _ = run_stage(name, "u")
    if name == "rl":
        shutil.copytree(common.run_dir("u") / "mid", common.run_dir("t") / "mid")
    options = {**dataclasses.asdict(settings), "tag": "t"}
    run_ranks(2, f"{module.__name__}.main({module.__name__}.Settings(**{options!r}))")
    a, b = stage_losses("u", name), stage_losses("t", name)
    assert a.keys() == b.keys() and len(a) >= 3
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-3)
    if name != "rl":
        a, b = ([x["val_loss"] for x in common.read_log(tag) if "val_loss" in x] for tag in "ut")
        assert len(a) >= 2 and a == pytest.approx(b, abs=1e-3) and all(a)


def test_two_ranks_make_the_rl_step_of_one(tokenizer, tmp_path):
    code = f"""
    tokenizer = test_all.TOKENIZER()
    groups = test_all.rl_groups(tokenizer)
    mine = groups[rank::int(os.environ['WORLD_SIZE'])]
    weights = test_all.rl_step(tokenizer, mine)
    if rank == 0:
        torch.save(weights, {str(tmp_path / "weights.pt")!r})
    """
    run_ranks(2, code)
    torch.manual_seed(0)
    alone = rl_step(tokenizer, rl_groups(tokenizer))
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    start = random_model(vocab_size=tokenizer.vocab_size).state_dict()
    assert any(not torch.equal(alone[key], start[key]) for key in alone)
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], rtol=0, atol=2e-5)


def rl_groups(tokenizer):
    """Three groups of given answers, one of them without an advantage."""
    rng, groups = random.Random(0), []
    for rewards in ([1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0, 0.0, 1.0, 0.0]):
        replies = []
        for _ in rewards:
            n = rng.randint(2, 12)
            ids = [rng.randrange(256) for _ in range(n)]
            replies.append(common.Reply(ids, [rng.randint(0, 1) for _ in range(n - 1)] + [1]))
        groups.append(rl.Group([tokenizer.bos, 5, 6], replies, rewards))
    return groups


def rl_step(tokenizer, groups):
    """Make one update with the groups; return the weights after it."""
    model = random_model(vocab_size=tokenizer.vocab_size)
    optimizer = common.Optimizer(common.optimizer_groups(model, 0.02, 0.01, 0.01, 0), torch.float32)
    batches = rl.group_batches(groups, 3, 4, tokenizer.bos, CPU)
    steps = common.training_steps(
        iter(batches), lambda b: model(b.ids, b.targets, b.weights), optimizer, lambda _: 1.0, 1,
        accum=4,
    )  # fmt: skip
    list(steps)
    return model.state_dict()


def test_the_rl_step_is_the_same_where_memory_runs_out(tokenizer, monkeypatch):
    groups = rl_groups(tokenizer)
    expected = rl_step(tokenizer, groups)
    monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, 1, first=1))
    for name, weight in rl_step(tokenizer, groups).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5)


def test_the_rl_gradient_is_the_plain_policy_gradient(tokenizer):
    model, groups = random_model(vocab_size=tokenizer.vocab_size), rl_groups(tokenizer)
    batches = rl.group_batches(groups, 3, 4, tokenizer.bos, CPU)
    count = sum(sum(reply.mask) for group in groups for reply in group.replies)
    assert sum(batch.num_targets for batch in batches) == count, "every sampled token counts"
    for batch in batches:
        (model(batch.ids, batch.targets, batch.weights) / count).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for group in groups:  # one answer at a time, straight from the definition
        mean = sum(group.rewards) / len(group.rewards)
        for reply, reward in zip(group.replies, group.rewards):
            ids = torch.tensor([group.prompt_ids + reply.ids])
            logprobs = model(ids[:, :-1]).log_softmax(-1)[0]
            for position, (i, own) in enumerate(zip(reply.ids, reply.mask), 2):
                total = total - own * (reward - mean) * logprobs[position, i]
    (total / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


def test_the_closing_token_is_learned_in_rl_and_the_tools_output_is_not(tokenizer):
    special = tokenizer.specials
    ids, mask = common.render_conversation(tokenizer, tool_chat(2, 3)["messages"])
    start = ids.index(special["<|assistant_start|>"]) + 1
    replies = [common.Reply(ids[start:], mask[start:], "stop"), common.Reply([5], [1], "length")]
    group = rl.Group(ids[:start], replies, [1.0, 0.0])
    (batch,) = rl.group_batches([group], 8, 1, tokenizer.bos, CPU)
    learned = [[t for t in row.tolist() if t != common.IGNORE] for row in batch.targets]
    (whole,) = [row for row in learned if len(row) > 1]
    assert whole[-1] == special["<|assistant_end|>"] and special["<|python_end|>"] in whole
    assert not {special["<|output_start|>"], special["<|output_end|>"]} & set(whole)
    assert tokenizer.decode(whole).count("2+3") == 1 and whole == [
        i for i, own in zip(ids[start:], mask[start:]) if own
    ]


def test_an_answer_keeps_its_closing_token_and_one_cut_off_has_no_reward(tokenizer):
    script = [*tokenizer.encode("tan"), tokenizer.specials["<|assistant_end|>"]]
    engine = common.Engine(Talker(tokenizer, script), tokenizer, 2)
    problem = asking("Which?", grade="text", accept=["tan"])
    for most, reward in ((len(script), 1.0), (len(script) - 1, 0.0)):
        chosen = rl.Settings(num_samples=2, max_tokens=most)
        (group,) = rl.answer_problems(engine, [problem], [0], chosen)
        assert [r.ids for r in group.replies] == [script[:most]] * 2
        assert group.rewards == [reward] * 2 and all(r.mask == [1] * most for r in group.replies)


def test_all_samples_are_used_whatever_the_micro_batch(tokenizer):
    groups = rl_groups(tokenizer)
    for micro_batch in (1, 3, 5, 12):
        accum = -(-12 // micro_batch)
        batches = rl.group_batches(groups, micro_batch, accum, tokenizer.bos, CPU)
        assert len(batches) == accum
        rows = [row for b in batches for row in b.weights[:, 0].tolist() if row]
        assert sorted(rows) == sorted([0.5, -0.5, -0.5, 0.5, -0.25, -0.25, 0.75, -0.25])


def test_rl_learns_what_is_rewarded(chat_run):
    words = "red blue green tan".split()  # of which the model knows no reason to prefer one
    folder = common.data_dir(chat_run)
    write_lines(folder / "mid.jsonl", [one_turn("Say it.", f"A {word} one.") for word in words * 8])
    problem = {"messages": one_turn("Say it.", "")["messages"][:1], "grade": "text",
               "answer": "tan", "accept": ["tan"], "reject": [], "kind": "problem"}  # fmt: skip
    write_lines(folder / "rl.jsonl", [problem] * 30)
    midtrain.main(midtrain.Settings(tag="t", **OFTEN, num_iterations=100))
    run_stage("rl", "t", num_iterations=30, problems_per_step=4, num_samples=8,
                              lr_scale=1.0, warmdown=0.0, save_every=0)  # fmt: skip
    lines = [json.loads(x) for x in (common.run_dir("t") / "metrics.jsonl").open()]
    rates = [x["pass_at_1"] for x in lines if x["stage"] == "rl" and "pass_at_1" in x]
    assert rates[0] < 0.7 and sum(rates[-5:]) / 5 > 0.9


def test_rl_leaves_out_problems_without_room_for_an_answer(chat_run, capsys):
    path = common.data_dir(chat_run) / "rl.jsonl"
    lines = [json.loads(line) for line in path.open()]
    user = {"role": "user", "content": "word " * 40}
    huge = {**lines[0], "messages": [user]}
    write_lines(path, [huge, *lines, huge])
    run_stage("rl", "t", num_iterations=30 // 3 + 1)  # an epoch and more: none is met
    # of the first 3 of 32 one is too long: the next, which sft may have seen solved, takes no place
    assert "problems: 28, and 2 for validation; too long and left out: 2" in capsys.readouterr().out
    write_lines(path, [huge])
    with pytest.raises(common.MissingInput, match="beside 1 that leave no room"):
        run_stage("rl", "u")


def test_answers_that_were_cut_off_are_counted():
    replies = [common.Reply([5], [1], reason) for reason in ("stop", "length", "stop", "length")]
    groups = [rl.Group([1], replies, [1.0, 0.0, 0.0, 0.0]), rl.Group([1], replies[:2], [0.0, 0.0])]
    rates = rl.pass_rates(groups, CPU)
    assert rates["cut_off"] == 0.5 and rates["pass_at_1"] == pytest.approx(1 / 6)
    assert rates["pass_at_k"] == 0.5 and rates["answer_tokens"] == 1


def test_every_conversation_is_whole_in_the_rows_and_only_the_assistant_is_learned(
    chat_run, tokenizer
):
    folder, T = common.data_dir(chat_run), 64
    long = {"messages": (one_turn("Hi.", "A b c.")["messages"] * 12)[: 12 * 2], "kind": "long"}
    huge = one_turn("word " * 200, "Yes.")
    lines = [json.loads(x) for x in (folder / "sft.jsonl").open()]
    write_lines(folder / "sft.jsonl", [*lines, long, huge])
    rows, mixed = common.conversation_rows(folder / "sft.jsonl", tokenizer, T, ALONE)
    assert mixed.cut == 1 and mixed.left_out == 1
    assert mixed.used == {"talk": 4, "problem": 15, "long": 1}, "without the one left out"
    expected = collections.Counter()
    for line in [*lines, long]:
        messages = line["messages"]
        while len(common.render_conversation(tokenizer, messages)[0]) > T + 1:
            messages = messages[:-2]
        ids, mask = common.render_conversation(tokenizer, messages)
        expected[tuple(ids), tuple(mask)] += 1
    got = collections.Counter()
    for index in range(len(rows)):
        row = rows.row(index)
        ids, learned = (row % common.NO_TARGET).tolist(), (row < common.NO_TARGET).tolist()
        starts = [i for i, one in enumerate(ids) if one == tokenizer.bos] + [len(ids)]
        for a, b in itertools.pairwise(starts):
            if b - a > 1:
                got[tuple(ids[a:b]), tuple(map(int, learned[a:b]))] += 1
            else:
                assert not learned[a], "padding is never a target"
    assert got == expected


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_conversations_of_which_none_fits_are_said_and_in_validation_left_out(chat_run, name):
    huge, folder = [one_turn("word " * 200, "Yes.")] * 2, common.data_dir(chat_run)
    write_lines(folder / "val.jsonl", huge)
    run_stage(name, "t")
    assert stage_losses("t", name)
    assert not [x for x in common.read_log("t") if x["stage"] == name and "val_loss" in x]
    write_lines(folder / f"{name}.jsonl", huge)
    for steps in (0, 3):
        with pytest.raises(common.MissingInput, match=r"none of the 2 .*jsonl fits in 64 tokens"):
            run_stage(name, "u", num_iterations=steps)


def test_the_base_runs_batch_and_decay_are_taken_where_none_is_given(chat_run, monkeypatch):
    midtrain.main(midtrain.Settings(tag="t", **OFTEN, total_batch_size=64, num_iterations=1))
    run_stage("sft", "t", start_from="mid", num_iterations=1)
    assert common.read_meta(common.find_checkpoint("t", "sft"))["batch_tokens"] == 192
    meta = common.find_checkpoint("t", "base") / "meta.json"
    saved = json.loads(meta.read_text())
    saved["settings"]["weight_decay"] = 0.5
    meta.write_text(json.dumps(saved))
    decays, plain = [], common.optimizer_groups
    monkeypatch.setattr(
        common, "optimizer_groups", lambda *args: decays.append(args[4]) or plain(*args)
    )
    for choice in ({}, {"weight_decay": 0.0}, {"weight_decay": 0.25}):
        run_stage("mid", "t", restart=True, num_iterations=1, **choice)
    assert decays == [0.5, 0.0, 0.25]


def test_rows_are_made_anew_where_the_code_that_makes_them_has_changed(
    chat_run, tokenizer, monkeypatch
):
    path, render, pack = (
        common.data_dir(chat_run) / "sft.jsonl",
        common.render_conversations,
        common.pack_rows,
    )

    def rows():
        chats, _ = common.conversation_rows(path, tokenizer, 64, ALONE)
        text = common.token_rows(chat_run, tokenizer, 64, 10**9, ALONE)
        return [np.concatenate(one.arrays) for one in (chats, text)]

    def first_half(tokenizer, conversations):
        for ids, mask in render(tokenizer, conversations):
            yield ids[: len(ids) // 2], mask[: len(ids) // 2]

    def some(documents, T, **options):
        yield from itertools.islice(pack(documents, T, **options), 3)

    before, again = rows(), rows()
    assert all(np.array_equal(a, b) for a, b in zip(before, again))
    with monkeypatch.context() as patched:
        patched.setattr(common, "render_conversations", first_half)
        shorter = rows()
        assert len(shorter[0]) < len(before[0]) and np.array_equal(shorter[1], before[1])
        patched.setattr(common, "pack_rows", some)
        assert [len(one) for one in rows()] == [3, 3]
    assert all(np.array_equal(a, b) for a, b in zip(before, rows()))


def test_flipping_a_masked_token_as_a_target_changes_no_loss(chat_run, tokenizer):
    rows, _ = common.conversation_rows(
        common.data_dir(chat_run) / "sft.jsonl", tokenizer, 64, ALONE
    )
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    raw, every = np.stack([rows.row(i) for i in range(len(rows))]), np.arange(len(rows))
    flags = raw >= common.NO_TARGET
    other = (raw % common.NO_TARGET + 1) % 256 + flags * common.NO_TARGET
    for end in range(2, 66, 3):  # what stands last is a target alone, and no other's input

        def loss(last, end=end):
            rows.arrays = [np.concatenate([raw[:, : end - 1], last[:, None]], 1)]
            rows.ends = np.array([len(raw)])
            return model(*rows.gather(every))

        before, masked = loss(raw[:, end - 1]), flags[:, end - 1]
        assert torch.equal(loss(np.where(masked, other[:, end - 1], raw[:, end - 1])), before)
        changed = loss(np.where(masked, raw[:, end - 1], other[:, end - 1]))
        same = torch.allclose(changed, before, rtol=1e-7, atol=0)
        assert masked.all() == same, "a learned target does matter"
    assert flags[:, 1:].any() and not flags[:, 1:].all()


def test_midtraining_can_learn_the_users_turns_too(chat_run, tokenizer):
    path = common.data_dir(chat_run) / "mid.jsonl"
    some, more = (
        common.conversation_rows(path, tokenizer, 64, ALONE, choice)[0] for choice in (0, 1)
    )
    assert len(some) == len(more)
    for a, b in zip(map(some.row, range(len(some))), map(more.row, range(len(more)))):
        assert np.array_equal(a & ~common.NO_TARGET, b & ~common.NO_TARGET), "the same tokens"
        learned, besides = a < common.NO_TARGET, b < common.NO_TARGET
        assert not (learned & ~besides).any() and (besides & ~learned).any()
        start = tokenizer.specials["<|output_start|>"]
        outputs = np.flatnonzero((b & ~common.NO_TARGET) == start)
        assert not besides[outputs + 1].any(), "what the tool says is never learned"


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_the_last_step_of_an_epoch_takes_the_rows_that_are_left(chat_run, name, monkeypatch):
    module, plain, asked = CHAT_STAGES[name][0], common.row_batches, []
    monkeypatch.setattr(module, "row_batches", lambda rows, *rest: (
        asked.append((len(rows), rest[-1])) or plain(rows, *rest)
    ))  # fmt: skip
    run_stage(name, "t")
    count = asked[0][0]
    _, _, metrics = run_stage(name, "t", restart=True, total_batch_size=64 * (count - 1))
    assert metrics["step"] == 2 and asked == [(count, count)] * 2
    if name == "mid":
        meta = common.read_meta(common.find_checkpoint("t", "mid"))
        assert meta["mixture"]["text rows"] > 0


def test_an_epoch_of_rl_meets_each_problem_once(chat_run):
    run = SimpleNamespace(settings=rl.Settings(problems_per_step=4), rank=0, world_size=1)
    sampler = rl.Sampler(run, None, None, list(range(10)), 1, 1)
    met = [i for step in range(5) for i in sampler.problems_of(step)]
    assert sorted(met[:10]) == sorted(met[10:]) == list(range(10)) and met[:10] != met[10:]
    options = {"num_iterations": 0, "problems_per_step": 20, "save_every": 0}
    assert run_stage("rl", "t", **options)[2]["step"] == 2, "of 27 problems"


def test_one_epoch_trains_on_every_row_once(chat_run, tokenizer):
    rows, _ = common.conversation_rows(
        common.data_dir(chat_run) / "sft.jsonl", tokenizer, 64, ALONE
    )
    for batch_rows, micro in ((3, 2), (4, 4), (5, 3)):
        steps = -(-len(rows) // batch_rows)
        batches = common.row_batches(rows, batch_rows, micro, 0, 0, CPU, len(rows))
        accum = common.accum_steps(batch_rows, micro)
        seen = list(itertools.islice(batches, steps * accum))
        batches.close()
        used = collections.Counter(
            tuple(row) for b in seen for row in b.ids.tolist() if set(row) != {tokenizer.bos}
        )
        whole = collections.Counter(tuple(rows.gather(np.array([i]))[0][0].tolist())
                                    for i in range(len(rows)))  # fmt: skip
        assert used == whole


def test_a_restart_that_cannot_begin_leaves_the_model(chat_run, monkeypatch):
    for name in ("mid", "sft"):
        run_stage(name, "t")
    there = {stage: common.list_checkpoints("t", stage) for stage in ("base", "mid", "sft")}
    path = common.run_dir("t") / "metrics.jsonl"
    log = path.read_text()
    small = {"max_seq_len": 64, "total_batch_size": 192, "restart": True}
    with pytest.raises(common.MissingInput, match="typo has no train text"):
        pretrain.main(tiny_pretrain(source="typo", **small))
    for name in ("mid", "sft"):
        with pytest.raises(common.MissingInput, match="is missing"):
            run_stage(name, "t", restart=True, chats="typo")
    monkeypatch.setattr(common, "free_bytes", lambda device: 1.0)
    with pytest.raises(common.MissingInput, match="--recompute"):
        pretrain.main(tiny_pretrain(device_batch_size=0, **small))
    for stage, folders in there.items():
        assert common.list_checkpoints("t", stage) == folders != []
    assert path.read_text() == log


def test_a_restart_drops_the_old_model_once_whole_or_not_at_all(base_dir, monkeypatch):
    model, optimizer, folder = saved_run(steps=(1, 2))
    settings = tiny_pretrain(restart=True)

    def start(again):
        run = common.Run("base", "t", settings, CPU, 0, 1, again=again)
        return run, *common.newest_checkpoint(run)

    for again in (False, True):  # torchrun's second attempt, the first ended before training
        run, newest, saved = start(again)
        assert newest is None and saved == {} and folder.exists()

    def killed(path, **options):
        if Path(path).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run.begin(saved)
    assert not run.dir.exists()
    run.begin(saved)
    assert [path.name for path in common.run_dir("t").iterdir()] == [], "nor what was half deleted"
    new = common.save_checkpoint(run, 1, model, optimizer, {})
    run.wait_for_save()
    assert start(True)[1] == new, "its third attempt goes on from what the second saved"
    assert start(False)[1] is None


def test_a_restart_that_is_stopped_before_it_trains_drops_nothing(base_dir):
    _, _, folder = saved_run(steps=(1, 2))
    run = common.Run("base", "t", tiny_pretrain(restart=True), CPU, 0, 1)
    _, saved = common.newest_checkpoint(run)
    run.stopping = True  # Ctrl-C while the stage is set up
    run.begin(saved)
    assert folder.exists()
    run.stopping = False
    run.begin(saved)
    assert not folder.exists()


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_a_chat_stage_wants_the_tokenizer_of_its_base_model(chat_run, name):
    path = common.run_dir("t") / "tokenizer" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["merges"] = saved["merges"][:-1] + [[97, 122]]
    path.write_text(json.dumps(saved))
    with pytest.raises(common.MissingInput, match="another tokenizer than its base model"):
        run_stage(name, "t", restart=True)
    with pytest.raises(common.MissingInput, match="another tokenizer than its base model"):
        evaluate.main(evaluate.Settings(tag="t", device="cpu"))
    chosen = SimpleNamespace(tag="t", stage="", step=0, device="cpu", dtype="", int8=False)
    with pytest.raises(common.MissingInput, match="another tokenizer than its base model"):
        common.load_for_answers(chosen)


def test_two_processes_do_not_train_one_stage_at_once(tiny_run):
    run = common.Run("base", "t", None, CPU, 0, 1)
    with common.alone_at_work(run):
        with pytest.raises(common.MissingInput, match="another process is training base"):
            pretrain.main(tiny_pretrain())
        pretrain.main(tiny_pretrain(tag="u"))
    pretrain.main(tiny_pretrain())


def test_a_stage_whose_parent_changed_says_so(chat_run):
    run_stage("mid", "t")
    pretrain.main(tiny_pretrain(max_seq_len=64, total_batch_size=192, seed=5, restart=True))
    with pytest.raises(common.MissingInput, match="another model than"):
        run_stage("mid", "t")
    run_stage("mid", "t", restart=True)


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_a_stage_whose_conversations_changed_says_so(chat_run, name, capsys):
    run_stage(name, "t")
    path = common.data_dir(chat_run) / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), "utf-8")
    for _ in range(2):  # finished, then half trained
        with pytest.raises(common.MissingInput, match="other data.*--restart"):
            run_stage(name, "t")
        for folder in common.list_checkpoints("t", name)[1:]:
            shutil.rmtree(folder)
    meta = common.list_checkpoints("t", name)[0] / "meta.json"
    saved = json.loads(meta.read_text())
    del saved["data"]  # as checkpoints once were
    meta.write_text(json.dumps(saved))
    assert "finished" not in capsys.readouterr().out
    run_stage(name, "t")
    run_stage(name, "t", restart=True)
    run_stage(name, "t")
    assert "finished" in capsys.readouterr().out


def test_a_missing_parent_or_file_is_one_sentence(tiny_run):
    for module in (midtrain, sft, rl):
        with pytest.raises(common.MissingInput, match=r"run `python \w+\.py --tag=t`"):
            module.main(module.Settings(tag="t", device="cpu"))
    pretrain.main(tiny_pretrain())
    with pytest.raises(common.MissingInput, match=r"mid.jsonl is missing"):
        midtrain.main(midtrain.Settings(tag="t", device="cpu"))
    with pytest.raises(common.MissingInput, match=r"rl.jsonl is missing"):  # of talks alone
        rl.main(rl.Settings(tag="t", device="cpu", start_from="base", chats="tiny"))


def test_system_text_joins_the_user_and_special_names_stay_text(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<|assistant_end|><|bos|>"},
        {"role": "assistant", "content": "<|python_start|>1"},
    ]
    ids, mask = common.render_conversation(tokenizer, messages)
    special = set(tokenizer.specials.values())
    assert [i for i in ids if i in special] == [
        tokenizer.specials[f"<|{name}|>"]
        for name in "bos user_start user_end assistant_start assistant_end".split()
    ]
    assert tokenizer.decode([i for i in ids if i not in special]) == (
        "Be kind.\n\n<|assistant_end|><|bos|><|python_start|>1"
    )
    own = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(own) == "<|python_start|>1<|assistant_end|>"
    prompt = common.render_prompt(tokenizer, messages[:2])
    assert ids[: len(prompt)] == prompt


# evaluate.py ---------------------------------------------------------------------------------


def test_the_interval_is_wilsons():
    low, high = evaluate.wilson_interval(8, 10)  # the worked example of many textbooks
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert evaluate.wilson_interval(0, 20)[0] == 0 and evaluate.wilson_interval(20, 20)[1] == 1
    assert evaluate.wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("text", "good"),
    [(" Paris.", True), (" Paris", True), (" Parisian", False), (" the Paris", False),
     ("Paris, France", True), (" Paris-Nord", False), (" Paris - yes", True), (" 12", False), (" Lyon.", True), (" e.", True), (" egg", False)],
)  # fmt: skip
def test_an_answer_comes_first_and_is_whole_words(text, good):
    assert evaluate.starts_with_answer(text, [" Paris", "Lyon", "e"]) == good


def said_by(tokenizer, replies):
    """An engine's stand-in that gives each prompt (as a user's message) its written reply."""
    known = {
        tuple(common.render_prompt(tokenizer, [{"role": "user", "content": question}])): content
        for question, content in replies.items()
    }

    def run(requests):
        for key, request in reversed(list(enumerate(requests))):
            messages = [{"role": "assistant", "content": known[tuple(request.prompt_ids)]}]
            ids, _ = common.render_conversation(tokenizer, messages)
            yield key, common.Reply(ids[2:], [1] * len(ids[2:]), "stop")

    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=4096))
    return SimpleNamespace(run=run, tokenizer=tokenizer, model=model)


def asking(question, **keys):
    return {"messages": [{"role": "user", "content": question}], **keys}


GRADED = [
    asking("What is 37 times 12?", kind="sum", grade="number", answer="444"),
    asking("Which city is France's capital?", kind="fact", grade="text", answer="Paris",
           accept=["Paris"], reject=["Rome", "Oslo"]),
    asking("Who are you?", kind="identity", grade="text", answer="Tiny", accept=["Tiny"]),
    asking("Add 1 to x.", kind="code", grade="code", answer="", entry_point="one_more",
           prompt='import math\n\ndef one_more(x):\n    """Add 1."""\n',
           tests="def check(f):\n    assert f(2) == 3 and f(-1) == 0"),
]  # fmt: skip
CALL = [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "37*12"},
        {"type": "output", "text": "444"}, {"type": "text", "text": " So it is 444."}]  # fmt: skip
RIGHT = [CALL, "It is Paris.", "I am Tiny.", "    return math.floor(x + 1)"]
WRONG = [[*CALL[:3], {"type": "text", "text": " So it is 4."}], "It is Paris or Rome.",
         "I don\u2019t know.", "    return x"]  # fmt: skip


def test_a_prompt_that_was_cut_to_the_context_is_said(tokenizer):
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer, 2)
    items = [asking(text, grade="text", accept=["x"], answer="x") for text in ("a?", "word " * 40)]
    got = evaluate.write_replies(engine, items, range(2), 4)
    assert {reply.index: reply.cut for reply in got} == {0: False, 1: True}


@pytest.mark.parametrize("right", [True, False])
def test_replies_of_each_kind_are_graded_and_shown(tokenizer, right):
    replies = dict(zip((evaluate.question_of(i) for i in GRADED), RIGHT if right else WRONG))
    got = evaluate.write_replies(said_by(tokenizer, replies), GRADED, range(4), 64)
    got = sorted(got, key=lambda g: g.index)
    assert [g.index for g in got] == [0, 1, 2, 3] and [g.right for g in got] == [right] * 4
    assert not any(g.cut for g in got)
    assert got[0].question == "What is 37 times 12?" and got[0].answer == "444"
    assert got[0].reply == f"Let me see: [37*12][= 444] So it is {'444' if right else '4'}."
    assert got[3].reply.startswith("    return") and "# " in got[3].reply
    run = SimpleNamespace(rank=0, world_size=1, device=CPU, stopping=False, say=print)
    record = evaluate.tally(run, "all", GRADED, got)
    assert record["score"] == right and record["items"] == 4 and record["low"] < record["high"]
    assert record["unknown_said"] == (0 if right else 0.25)
    assert record["kinds"]["sum"] == [right, 1] and len(record["kinds"]) == 4
    shown = record["examples"]["right" if right else "wrong"]
    assert len(shown) == 3 and shown[0]["reply"] == got[0].reply
    assert not record["examples"]["wrong" if right else "right"]


@pytest.mark.parametrize(
    "reply",
    ["    return x + 1", "def one_more(x):\n    return x + 1", "    return math.ceil(x) + 1",
     "Here it is:\n```python\ndef one_more(x):\n    return math.floor(x) + 1\n```\nGood luck!",
     "```\n    return x + 1\n```", "```py\ndef one_more(x):\n    return x + 1"],
)  # fmt: skip
def test_a_reply_is_a_program_whole_or_as_a_body_fenced_or_not(reply):
    names = {}
    exec(evaluate.program_of(GRADED[3], reply), names)  # noqa: S102  the tests are in it
    with pytest.raises(AssertionError):
        exec(evaluate.program_of(GRADED[3], reply.replace("1", "2")), {})  # noqa: S102
    assert names["one_more"](41) == 42


def test_the_solutions_of_humaneval_pass_and_empty_ones_do_not():
    path = SHARED / "eval" / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("no HumanEval")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::40]
    for row in rows:
        item = {**row, "tests": row["test"]}
        whole = f"```python\n{row['prompt']}{row['canonical_solution']}```"
        for reply, passed in ((row["canonical_solution"], 1), (whole, 1), ("    pass\n", 0)):
            assert common.run_code(evaluate.program_of(item, reply)).passed == passed


def test_a_conversation_of_several_turns_is_shown_with_its_roles():
    item = {"messages": [{"role": "user", "content": "37*12?"},
                         {"role": "assistant", "content": CALL},
                         {"role": "user", "content": "Thanks"}]}  # fmt: skip
    assert evaluate.question_of(item) == (
        "user: 37*12?\nassistant: Let me see: [37*12][= 444] So it is 444.\nuser: Thanks"
    )


def test_examples_show_unlike_kinds_first():
    items = [{"kind": kind} for kind in "aaaabbcc"]
    outcomes = [evaluate.Graded(i, True, str(i), "", "") for i in (3, 5, 0, 7, 2, 6)]
    assert [e["question"] for e in evaluate.pick_examples(items, outcomes)] == ["0", "5", "6"]
    items = [{}] * 8
    assert [e["question"] for e in evaluate.pick_examples(items, outcomes)] == ["0", "2", "3"]


def test_a_long_task_shows_its_progress_and_the_time_left(monkeypatch):
    clock, lines = itertools.count(0, 3), []
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    run = SimpleNamespace(rank=0, world_size=1, device=CPU, stopping=False, say=lines.append)
    outcomes = (evaluate.Graded(i, True, "", "", "") for i in range(1200))
    evaluate.tally(run, "letters", [{}] * 2000, outcomes)
    wanted = r"letters +1,\d+/2,000  0.\d items/s  left \d+ min"
    assert len(lines) > 100 and re.search(wanted, lines[-1])


# The three kinds of CORE's questions, small


def test_a_few_shot_prompt_is_laid_out_as_published():
    choices = evaluate.CoreTask("choices", "", 1, "\nAnswer: ", 25)
    items = [{"query": "Question: 1 + 1?", "choices": ["one", "two"], "gold": 1},
             {"query": "Question: 1 + 2?", "choices": ["three", "two"], "gold": 0}]  # fmt: skip
    assert evaluate.core_texts(choices, items, 0) == [
        "Question: 1 + 2?\nAnswer: three\n\nQuestion: 1 + 1?\nAnswer: one",
        "Question: 1 + 2?\nAnswer: three\n\nQuestion: 1 + 1?\nAnswer: two",
    ]
    assert evaluate.core_texts(choices._replace(shots=0), items, 1) == [
        "Question: 1 + 2?\nAnswer: three", "Question: 1 + 2?\nAnswer: two",
    ]  # fmt: skip
    schema = evaluate.CoreTask("schema", "", 1, " ", 50)
    items = [{"context_options": ["Ann because Ann", "Ann because Bob"], "continuation": "ran.",
              "gold": 1},
             {"context_options": ["It as she", "It as he"], "continuation": "fell.",
              "gold": 0}]  # fmt: skip
    assert evaluate.core_texts(schema, items, 1) == [
        "Ann because Bob ran.\n\nIt as she fell.", "Ann because Bob ran.\n\nIt as he fell.",
    ]  # fmt: skip
    language = evaluate.CoreTask("language", "", 1, " ", 0)
    items = [{"context": " The sky is\n", "continuation": "blue"},
             {"context": "Grass is ", "continuation": "green"}]  # fmt: skip
    assert evaluate.core_texts(language, items, 0) == [
        "Grass is green\n\nThe sky is", "Grass is green\n\nThe sky is blue",
    ]  # fmt: skip


def test_solved_examples_are_others_and_as_nanochat_draws_them():
    task = evaluate.CoreTask("language", "", 4, " ", 0)
    items = [{"context": f"c{i}.", "continuation": f"w{i}"} for i in range(12)]
    for index in range(12):
        others = [i for i in range(12) if i != index]
        drawn = random.Random(1234 + index).sample(others, 4)
        expected = "".join(f"c{i}. w{i}\n\n" for i in drawn)
        assert evaluate.core_texts(task, items, index)[0] == f"{expected}c{index}."
    few = evaluate.core_texts(task, items[:3], 1)[0]
    assert sorted(few.split("\n\n")) == ["c0. w0", "c1.", "c2. w2"]


def plain_scores(model, tokenizer, texts, prefix_of):
    """Mean nats and whether all is greedy of each text after its first tokens, one by one."""
    for text, prefix in zip(texts, prefix_of):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        n = len(ids) - prefix
        if len(ids) > model.config.max_seq_len + 1:
            ids = [tokenizer.bos, *ids[-model.config.max_seq_len :]]
        logprobs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-n:]
        targets = torch.tensor(ids[-n:])
        nats = -logprobs[torch.arange(n), targets].mean().item()
        yield nats, bool((logprobs.argmax(-1) == targets).all())


def core_engine(tokenizer):
    """A random model that only ever expects whole words, so that it can be right."""
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=48)
    words = [i for i in range(256, 256 + len(tokenizer.merges))
             if re.fullmatch(r" [a-z]+", tokenizer.decode([i]))
             and tokenizer.encode(tokenizer.decode([i])) == [i]]  # fmt: skip
    assert len(words) > 9
    with torch.no_grad():
        keep = torch.zeros_like(model.head.weight)
        keep[words] = 1
        model.head.weight.mul_(keep)
    return common.Engine(model, tokenizer, 3), [tokenizer.decode([i])[1:] for i in words]


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("shots", [0, 2, 9])  # nine do not fit into the context
def test_core_answers_batched_equal_those_of_plain_passes_one_at_a_time(tokenizer, rows, shots):
    (engine, words), rng = core_engine(tokenizer), random.Random(0)
    model, settings_ = engine.model, evaluate.Settings(device_batch_size=rows)

    def sentence(n):
        return " ".join(rng.choice(words) for _ in range(n))

    def answers(task, items):
        return sorted(evaluate.answer_core(engine, task, items, range(12), settings_),
                      key=lambda g: g.index)  # fmt: skip

    task = evaluate.CoreTask("choices", "", shots, " ", 25)
    items = [{"query": sentence(rng.randrange(1, 9)), "gold": rng.randrange(3),
              "choices": [f"{word} {sentence(rng.randrange(0, 3))}".strip()
                          for word in rng.sample(words, 3)]} for _ in range(12)]  # fmt: skip
    for got, item in zip(answers(task, items), items):
        texts = evaluate.core_texts(task, items, got.index)
        begun = len(tokenizer.encode(texts[0][: -len(item["choices"][0]) - 1])) + 1
        scores = list(plain_scores(model, tokenizer, texts, [begun] * 3))
        best = min(range(3), key=lambda i: scores[i][0])
        assert got.reply == item["choices"][best] and got.right == (best == item["gold"])
        assert got.cut == any(len(tokenizer.encode(t)) > 48 for t in texts)
        assert got.cut or shots < 9

    task = evaluate.CoreTask("schema", "", shots, " ", 50)
    items = [{"context_options": [f"{sentence(3)} {word}" for word in rng.sample(words, 2)],
              "continuation": sentence(rng.randrange(1, 4)), "gold": rng.randrange(2)}
             for _ in range(12)]  # fmt: skip
    for got, item in zip(answers(task, items), items):
        texts = evaluate.core_texts(task, items, got.index)
        n = len(tokenizer.encode(f" {item['continuation']}"))
        begun = [len(tokenizer.encode(text)) + 1 - n for text in texts]
        scores = list(plain_scores(model, tokenizer, texts, begun))
        best = min((0, 1), key=lambda i: scores[i][0])
        assert got.reply == item["context_options"][best] and got.right == (best == item["gold"])

    task = evaluate.CoreTask("language", "", shots, " ", 0)
    items = [{"context": sentence(rng.randrange(1, 9)), "continuation": sentence(2)}
             for _ in range(12)]  # fmt: skip
    rights = []
    for i, item in enumerate(items):
        for _ in range(2):  # what the model says indeed, as far as the examples change no more
            item["continuation"] = answers(task, items)[i].reply.strip()
        if i % 3 == 0:  # half right
            item["continuation"] = f"{item['continuation'].split()[0]} {sentence(1)}"
    for got in answers(task, items):
        texts = evaluate.core_texts(task, items, got.index)
        ((_, right),) = plain_scores(model, tokenizer, texts[1:],
                                     [len(tokenizer.encode(texts[0])) + 1])  # fmt: skip
        assert got.right == right
        rights.append(right)
    assert not all(rights) and any(rights)


def test_a_row_past_the_context_keeps_its_first_id_and_its_continuation(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    ids = torch.randint(tokenizer.vocab_size, (100,)).tolist()
    rows = [(ids, 5), (ids[:20], 3), (ids[:33], 4), (ids[:34], 32), (ids, 90)]
    got = dict(evaluate.continuation_logits(model, rows, evaluate.Settings()))
    whole = model(torch.tensor([[ids[0], *ids[-32:-1]]]))[0]
    torch.testing.assert_close(got[0], whole[-5:], rtol=1e-4, atol=1e-4)
    short = model(torch.tensor([ids[:19]]))[0]
    torch.testing.assert_close(got[1], short[-3:], rtol=1e-4, atol=1e-4)
    full = model(torch.tensor([ids[:32]]))[0]
    torch.testing.assert_close(got[2], full[-4:], rtol=1e-4, atol=1e-4)
    assert [len(got[i]) for i in range(5)] == [5, 3, 4, 32, 32]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_what_rows_have_in_common_is_computed_once(spare, changes, monkeypatch):
    model, rng = random_model(**changes), random.Random(0)
    rows = []
    for start, tails in ((20, (3, 5, 1)), (9, (2, 9, 9)), (28, (4, 4)), (1, (20, 31, 2)),
                         (12, (1,)), (30, (9, 9)), (25, (12, 1)), (3, (5, 6, 7, 8))):  # fmt: skip
        begun = rng.choices(range(100), k=start)  # some rows are longer than the context of 32
        rows += [([*begun, *rng.choices(range(100), k=n)], n) for n in tails]
    rng.shuffle(rows)
    inputs = [ids[:-1] if len(ids) <= 33 else [ids[0], *ids[-32:-1]] for ids, _ in rows]
    expected = [model(torch.tensor([ids]))[0, -n:] for ids, (_, n) in zip(inputs, rows)]
    begun = {tuple(ids[: max(0, len(ids) - n)]) for ids, (_, n) in zip(inputs, rows)}
    once = sum(map(len, begun)) + sum(map(len, expected))
    computed = []

    def counted(model, ids, *args):
        computed.append(ids.numel())
        return HIDDEN(model, ids, *args)

    for size, hidden in itertools.product((0, 3, 1), (scarce(HIDDEN, 2), counted)):
        monkeypatch.setattr(common.GPT, "hidden", hidden)
        computed.clear()
        options = evaluate.Settings(device_batch_size=size)
        got = dict(evaluate.continuation_logits(model, rows, options))
        for i, logits in enumerate(expected):
            torch.testing.assert_close(got[i], logits, rtol=1e-4, atol=1e-4)
    assert sum(computed) == once < 0.8 * sum(map(len, inputs)), "one at a time, without padding"


def test_letters_are_chosen_batched_as_one_at_a_time(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=40)
    engine, rng = common.Engine(model, tokenizer, 1), random.Random(0)
    items = [asking(" ".join(SENTENCES[i : i + i % 4]) + "?", grade="letter",
                    choices=["x"] * (2 + i % 4), answer=rng.choice("ABC"))
             for i in range(30)]  # fmt: skip
    found = {}
    for item in items:
        ids = common.render_prompt(tokenizer, item["messages"])
        ids = ids if len(ids) <= 40 else [ids[0], *ids[-39:]]
        logits = model(torch.tensor([ids]))[0, -1]
        letters = "ABCDE"[: len(item["choices"])]
        found[len(found)] = max(letters, key=lambda letter: logits[tokenizer.encode(letter)[0]])
    for rows in (0, 1, 4):
        options = evaluate.Settings(device_batch_size=rows)
        got = list(evaluate.choose_letters(engine, items, range(30), options))
        assert {g.index: g.reply for g in got} == found and len(set(found.values())) > 1
        assert all(g.right == (found[g.index] == items[g.index]["answer"]) for g in got)
        assert {g.index for g in got if g.cut} == {i for i in range(30) if len(
            common.render_prompt(tokenizer, items[i]["messages"])) > 40} != set()  # fmt: skip


def test_core_is_the_mean_of_centred_scores_and_says_of_how_many():
    sides = {"right": [], "wrong": []}
    records = {
        "copa": {"centred": -0.5, "baseline": 0.5, "low": 0.2, "high": 0.3, "items": 100,
                 "seconds": 1.0, "examples": sides},
        "jeopardy": {"centred": 0.75, "baseline": 0.0, "low": 0.7, "high": 0.8, "items": 60,
                     "seconds": 2.0, "examples": sides},
    }  # fmt: skip
    core = evaluate.core_mean(records)
    assert core["score"] == pytest.approx(0.125) and core["items"] == 160
    # half widths 0.05 / 0.5 and 0.05, independent, of a mean of two
    assert core["high"] - core["score"] == pytest.approx((0.1**2 + 0.05**2) ** 0.5 / 2)
    assert (core["covered"], core["of"], len(core["missing"])) == (2, 22, 20)


def test_the_table_of_core_is_the_published_one_and_its_files_can_be_asked(tokenizer):
    folder = SHARED / "eval" / "core"
    if not folder.exists():
        pytest.skip("no CORE")
    published = json.loads((folder / "core_tasks.json").read_text())["tasks"]
    assert [task["task"] for task in published] == list(evaluate.CORE)
    kinds = {"choices": "multiple_choice", "schema": "schema", "language": "language_modeling"}
    for facts in published:
        task = evaluate.CORE[facts["task"]]
        assert kinds[task.kind] == facts["kind"] and task.shots == facts["num_fewshot"]
        assert task.delimiter == facts["continuation_delimiter"]
        assert task.baseline == facts["random_baseline"]
        if facts["file"] is None:
            continue
        assert facts["file"].replace("_partial", "") == f"eval_data/{task.file}.jsonl"
        with open(folder / facts["file"], encoding="utf-8") as file:
            items = [json.loads(line) for line in itertools.islice(file, 12)]
        for index, item in enumerate(items[:3]):
            texts = evaluate.core_texts(task, items, index)
            rows = evaluate.core_rows(
                task.kind, [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
            )
            variants = item.get("choices") or item.get("context_options") or [0]
            assert len(rows) == len(variants) and all(1 <= n < len(ids) for ids, n in rows)
            for (ids, n), text in zip(rows, texts[-len(rows) :]):
                end = tokenizer.decode(ids[-n:])
                assert text.endswith(end) and tokenizer.decode(ids[1:]) == text
                if task.kind != "choices":
                    assert end.strip() == item["continuation"].strip()


# The stage as a whole


def test_the_likeliest_line_is_that_of_the_plain_formula_after_what_the_reply_says(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=96)
    engine, rng = common.Engine(model, tokenizer, 1), random.Random(0)
    words = ["cat", "a dog", "the mat", "sat on it", "rat"]
    items, written = [], []
    for i in range(12):
        choices = rng.sample(words, 2 + i % 3)
        items.append(asking("Which?", grade="letter", choices=choices, answer=rng.choice("AB")))
        said = ("It sat.", "It is.\n- the cat B", "- cat A", "One.\n- two\n- three C")[i % 4]
        written.append(evaluate.Graded(i, False, "Which?", said, items[-1]["answer"]))
    kept = ("It sat.\n", "It is.\n", "", "One.\n- two\n")
    best = {}
    for i, item in enumerate(items):
        prompt, nats = common.render_prompt(tokenizer, item["messages"]), {}
        for choice, letter in zip(item["choices"], "ABCD"):
            line = f"{kept[i % 4]}- {choice} {letter}"
            ids = prompt + tokenizer.encode(line) + [tokenizer.specials["<|assistant_end|>"]]
            losses = F.cross_entropy(
                model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="none"
            )
            nats[line] = losses[len(prompt) - 1 :].sum().item()  # what is common counts for none
        best[i] = min(nats, key=nats.get)
    for rows in (1, 5):
        options = evaluate.Settings(device_batch_size=rows)
        got = {g.index: g for g in evaluate.choose_lines(engine, items, written, options)}
        assert {i: g.reply for i, g in got.items()} == best
        assert all(g.right == best[i].endswith(items[i]["answer"]) for i, g in got.items())
    assert len({line[-1] for line in best.values()}) > 1


@pytest.fixture
def evaluated(tiny_run):
    """A run "t" with a base and an sft model, and a little data of each kind of task."""
    pretrain.main(tiny_pretrain(num_iterations=1, save_every=0, eval_every=0))
    shutil.copytree(common.run_dir("t") / "base", common.run_dir("t") / "sft")
    fact = {"prompt": "The cat", "answer": " sat", "accept": [" sat"], "relation": "r"}
    letters = [asking("A, B?", kind="fact", grade="letter", choices=["x", "y"], answer=answer)
               for answer in "ABBABBA"]  # fmt: skip
    quiz = [{"query": "Is it?", "choices": ["yes", "no"], "gold": gold} for gold in (0, 1, 1)]
    words = {"context": "The cat", "continuation": "sat"}
    world = common.data_dir(tiny_run) / "eval"
    public = common.data_dir("eval")
    core = public / "core" / "eval_data"
    for path, items in {
        world / "facts_trained.jsonl": [fact] * 5, world / "letters.jsonl": letters,
        world / "facts.jsonl": GRADED[1:3] * 3, world / "problems_new.jsonl": GRADED[:1] * 3,
        public / "GSM8K.jsonl": GRADED[:1] * 2, public / "HumanEval.jsonl": GRADED[3:],
        core / "commonsense_reasoning" / "copa.jsonl": quiz,
        core / "reading_comprehension" / "squad_partial.jsonl": [words] * 3,
    }.items():  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))


def tiny_evaluate(**changes):
    return evaluate.Settings(**{"tag": "t", "device": "cpu", "dtype": "float32", **changes})


def test_evaluation_measures_what_suits_the_stage_names_the_rest_and_skips(evaluated, capsys):
    report = evaluate.main(tiny_evaluate())
    tasks = report["tasks"]
    assert set(tasks) == {"val_bpb", "train_bpb", "facts_trained", "CORE"}
    assert tasks["facts_trained"]["items"] == 5 and len(report["samples"]) == 10
    texts = list(common.read_texts(common.list_shards("tiny", "val")[0]))
    assert tasks["val_bpb"]["items"] == len(texts), "a full pass"
    copa = tasks["CORE"]["tasks"]["copa"]
    assert copa["centred"] == pytest.approx((copa["score"] - 0.5) / 0.5)
    assert tasks["CORE"]["covered"] == 2 and tasks["CORE"]["tasks"]["squad"]["partial"]
    out = capsys.readouterr().out
    assert "2 of 22 tasks" in out and "a part of the set" in out
    left_out = re.search("left out, .*", out)[0]
    assert "facts_unseen" in left_out and "CORE/piqa" in left_out and "copa" not in left_out
    evaluate.main(tiny_evaluate(report=True))
    markdown = (common.run_dir("t") / "report.md").read_text()
    named = re.search(r"Left out, .* \(base\): (.*)\.", markdown)
    assert named and named[1] == left_out.split(": ")[1]
    result = {"left_out": ["MMLU", "CORE/piqa", "HumanEval (it needs --run-code)"], "tasks": {},
              "done": {"HumanEval": [0, 1], "CORE/copa": [0, 1]}}  # fmt: skip
    record = evaluate.read_record("t")._replace(results={"base": result}, metas={})
    assert evaluate.score_blocks(record, "t")[-1].endswith("(base): MMLU, CORE/piqa.")
    saved = json.loads((common.run_dir("t") / "eval" / "base.json").read_text())
    assert saved == report
    with unittest.mock.patch.object(evaluate, "run_task", lambda *_: 1 / 0):
        assert evaluate.main(tiny_evaluate()) == report, "what is done is not done again"

    capsys.readouterr()
    tasks = evaluate.main(tiny_evaluate(stage="sft"))["tasks"]
    assert set(tasks) == {
        "val_bpb", "letters", evaluate.WRITTEN, "facts", "problems_new", "GSM8K"
    }  # fmt: skip
    left_out = re.search("left out, .*", capsys.readouterr().out)[0]
    assert "MMLU" in left_out and "HumanEval (it needs --run-code)" in left_out
    for name, record in tasks.items():
        if not name.endswith("bpb"):
            assert 0 <= record["low"] <= record["score"] <= record["high"] <= 1
            assert set(record["examples"]) == {"right", "wrong"} and record["seconds"] > 0
    (example,) = tasks["GSM8K"]["examples"]["wrong"][:1]
    assert example["question"] == "What is 37 times 12?" and example["answer"] == "444"


def test_the_documents_for_bits_per_byte_are_all_or_as_many_as_asked(evaluated):
    for asked, items in ((0, 2), (1, 1)):
        tasks = evaluate.main(tiny_evaluate(task="bpb", max_documents=asked))["tasks"]
        assert tasks["val_bpb"]["items"] == tasks["train_bpb"]["items"] == items
    for name in ("max_documents", "max_items"):
        with pytest.raises(ValueError, match="must be 0 or more"):
            tiny_evaluate(**{name: -1})


def test_conversations_are_those_that_the_stage_was_given(evaluated, capsys):
    path = common.find_checkpoint("t", "sft") / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chats": "talks"}))
    tasks = evaluate.main(tiny_evaluate(stage="sft"))["tasks"]
    assert "letters" not in tasks and {"val_bpb", "GSM8K"} <= set(tasks)
    left_out = re.search("left out, .*", capsys.readouterr().out)[0]
    assert "MMLU" in left_out and "letters" not in left_out  # talks of one's own have no such sets
    with pytest.raises(common.MissingInput, match="no data for letters"):
        evaluate.main(tiny_evaluate(stage="sft", task="letters"))
    shutil.copytree(common.data_dir("tiny") / "eval", common.data_dir("talks") / "eval")
    report = evaluate.main(tiny_evaluate(stage="sft"))
    assert "letters" in report["tasks"] and report["chats"] == "talks"


def test_programs_run_only_where_that_is_allowed(evaluated, monkeypatch):
    ran = []
    monkeypatch.setattr(
        evaluate, "run_code", lambda program: ran.append(program) or common.Outcome(True, "", "")
    )
    for options in ({"stage": "sft"}, {"stage": "sft", "task": "public"}):
        with pytest.raises(ValueError, match="--run-code"):
            tiny_evaluate(task="GSM8K,humaneval")
        if "task" not in options:
            evaluate.main(tiny_evaluate(**options))
    assert not ran
    report = evaluate.main(tiny_evaluate(task="HumanEval", run_code=True))
    assert len(ran) == 1 and report["tasks"]["HumanEval"]["score"] == 1
    assert "def one_more" in ran[0] and ran[0].endswith("check(one_more)\n")


def test_tasks_are_named_in_any_case_and_unknown_ones_list_the_choices(evaluated):
    assert tiny_evaluate(task="gsm8k, arc-easy,CORE").asked() == ["GSM8K", "ARC-Easy", "CORE"]
    assert tiny_evaluate(task="World").asked() == list(evaluate.WORLD_SETS)
    with pytest.raises(ValueError, match="'GSM' is none of .*MMLU"):
        tiny_evaluate(task="MMLU,GSM")
    with pytest.raises(common.MissingInput, match="no data for MMLU"):
        evaluate.main(tiny_evaluate(task="MMLU"))
    path = common.data_dir("eval") / "core" / "eval_data" / evaluate.CORE["piqa"].file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("piqa.jsonl").write_text("{broken\n")
    with pytest.raises(common.MissingInput, match="piqa.jsonl is damaged"):
        evaluate.main(tiny_evaluate(task="core"))


def test_evaluation_goes_on_task_by_task_after_a_crash(evaluated, monkeypatch):
    done, plain = [], evaluate.run_task

    def run_task(run, engine, task, *rest):
        if task == "CORE/squad" and "CORE/squad" not in done and crash:
            raise RuntimeError("killed")
        done.append(task)
        return plain(run, engine, task, *rest)

    monkeypatch.setattr(evaluate, "run_task", run_task)
    crash = True
    with pytest.raises(RuntimeError, match="killed"):
        evaluate.main(tiny_evaluate())
    saved = json.loads((common.run_dir("t") / "eval" / "base.json").read_text())
    assert list(saved["done"]) == done == ["bpb", "facts_trained", "CORE/copa"]
    assert saved["tasks"]["CORE"]["covered"] == 1
    crash = False
    report = evaluate.main(tiny_evaluate())
    assert done == ["bpb", "facts_trained", "CORE/copa", "CORE/squad"]
    assert report["tasks"]["CORE"]["covered"] == 2 and "samples" in report["done"]
    # fewer items, other data, other weights: what they touch is measured again, and no more
    done.clear()
    report = evaluate.main(tiny_evaluate(task="facts_trained", max_items=2))
    assert done == ["facts_trained"] and report["tasks"]["facts_trained"]["items"] == 2
    assert report["tasks"]["CORE"]["covered"] == 2
    done.clear()
    path = common.data_dir("tiny") / "eval" / "facts_trained.jsonl"
    path.write_text(path.read_text().replace("The cat", "The dog", 1))  # of equal size
    evaluate.main(tiny_evaluate(max_items=2))
    assert done == ["facts_trained", "CORE/copa", "CORE/squad"]
    done.clear()
    folder = common.find_checkpoint("t", "base")
    meta = json.loads((folder / "meta.json").read_text())
    weights = common.load_file(folder, "model.pt", CPU)
    torch.save({name: w * 2 for name, w in weights.items()}, folder / "model.pt")
    meta["files"]["model.pt"] = [
        (folder / "model.pt").stat().st_size, common.crc32(folder / "model.pt"),
    ]  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    report = evaluate.main(tiny_evaluate(task="bpb"))
    assert done == ["bpb"] and set(report["tasks"]) == {"val_bpb", "train_bpb"}


def test_a_stop_comes_between_tasks_and_keeps_what_is_done(evaluated, monkeypatch):
    plain = evaluate.run_task

    def run_task(run, *rest):
        run.stopping = len(saved()) == 1
        return plain(run, *rest)

    def saved():
        path = common.run_dir("t") / "eval" / "sft.json"
        return json.loads(path.read_text())["done"] if path.exists() else {}

    monkeypatch.setattr(evaluate, "run_task", run_task)
    with pytest.raises(common.Stop, match="run the same command again"):
        evaluate.main(tiny_evaluate(stage="sft", task="bpb,letters,facts"))
    assert list(saved()) == ["bpb"], "letters was broken off at once"


def test_a_stop_of_several_ranks_is_no_error_that_torchrun_would_mend(evaluated):
    options = dataclasses.asdict(tiny_evaluate(stage="sft", task="bpb,letters"))
    code = f"""
import evaluate
plain = evaluate.run_task
def run_task(run, *rest):
    run.stopping = run.rank == 1
    return plain(run, *rest)
evaluate.run_task = run_task
try:
    evaluate.main(evaluate.Settings(**{options!r}))
except SystemExit as stop:
    assert stop.code == 0, stop.code
else:
    raise AssertionError("it went on")"""
    run_ranks(2, code)
    saved = json.loads((common.run_dir("t") / "eval" / "sft.json").read_text())
    assert list(saved["done"]) == ["bpb"]


def test_a_task_measured_again_or_of_another_model_leaves_the_other_scores(evaluated, base_dir):
    first = evaluate.main(tiny_evaluate(task="bpb,facts_trained"))
    again = evaluate.main(tiny_evaluate(task="facts_trained", restart=True))
    assert set(again["tasks"]) == set(first["tasks"])
    assert again["tasks"]["facts_trained"]["seconds"] != first["tasks"]["facts_trained"]["seconds"]
    path = common.run_dir("t") / "eval" / "base.json"
    shown = path.read_text()
    shutil.copytree(common.data_dir("tiny"), common.data_dir("other"))
    other = evaluate.main(tiny_evaluate(task="bpb", source="other", max_documents=1))
    assert other["tasks"]["val_bpb"]["items"] == 1 and path.read_text() == shown
    step = common.find_checkpoint("t", "base").name
    assert json.loads(path.with_name(f"base-{step}-other.json").read_text()) == other
    for wrong, words in (({"source": "../x"}, "--source"), ({"bench_seeds": 0}, "1 or more")):
        with pytest.raises(ValueError, match=words):
            tiny_evaluate(**wrong)


def test_two_ranks_score_as_one(evaluated):
    names = "facts_trained,letters,facts,problems_new,gsm8k,core,bpb"
    one = evaluate.main(tiny_evaluate(task=names))
    options = dataclasses.asdict(tiny_evaluate(task=names, restart=True))
    run_ranks(2, f"import evaluate; evaluate.main(evaluate.Settings(**{options!r}))")
    two = json.loads((common.run_dir("t") / "eval" / "base.json").read_text())
    assert two["done"] == one["done"]
    for name, record in [*one["tasks"].items(), *one["tasks"]["CORE"]["tasks"].items()]:
        other = two["tasks"].get(name) or two["tasks"]["CORE"]["tasks"][name]
        assert other["score"] == pytest.approx(record["score"], abs=1e-6), name
        for key in ("items", "low", "high", "kinds", "unknown_said", "cut", "centred"):
            assert other.get(key) == record.get(key), (name, key)
    assert one["tasks"]["letters"]["score"] in (3 / 7, 4 / 7)


def made_up_run(stages, tag="r"):
    """Write what the stages of a run leave on disk, with hostile words in it."""
    config = dataclasses.asdict(common.GPTConfig(512, 2, 32, 2, 2, 64))
    log = []
    for number, stage in enumerate(stages):
        steps = 2000 if stage == "base" else 40
        loss = [9 / (i + 1) for i in range(steps)]
        for step in range(1, steps + 1):
            log.append({"stage": stage, "step": step, "time": 1e9 + step, "lr": 1 - step / steps,
                        "loss": math.nan if step == 7 else loss[step - 1], "tok_per_s": 1e4})  # fmt: skip
            if stage == "rl":
                log[-1] |= {"pass_at_1": step / 50, "pass_at_k": 0.9, "answer_tokens": 30.0}
            if step % 20 == 0:
                log.append({"stage": stage, "step": step, "time": 1e9, "val_bpb": 2 / step})
        options = {"problems_per_step": 4, "num_samples": 8} if stage == "rl" else {}
        meta = {"step": steps, "config": config, "settings": {"tag": tag, "note": HOSTILE} | options,
                "source": "none", "seconds": 1800.0, "batch_tokens": 100}  # fmt: skip
        folder = common.run_dir(tag) / stage / f"step-{steps:06d}"
        folder.mkdir(parents=True)
        common.write_json(folder / "meta.json", meta)
        share = 0.25 + 0.1 * number
        example = {"question": f"Who? {HOSTILE}", "reply": f"[2*3][= 6] {HOSTILE}", "answer": "A|B"}
        record = {"score": share, "low": share - 0.0123, "high": share + 0.0345, "items": 1234,
                  "seconds": 900.0, "examples": {"right": [example] * 3, "wrong": [example]}}  # fmt: skip
        tasks = {"val_bpb": {"score": 0.9 - 0.2 * number, "items": 50}, "facts": dict(record)}
        tasks["facts"] |= {"unknown_said": 0.02 * number, "cut": 3, "kinds": {"a": [1, 9]}}
        if stage == stages[0]:
            tasks["letters"] = record
        result = {"checkpoint": folder.name, "tasks": tasks}
        common.write_json(common.run_dir(tag) / "eval" / f"{stage}.json", result)
    lines = "".join(json.dumps(event) + "\n" for event in log)
    (common.run_dir(tag) / "metrics.jsonl").write_text(lines + '{"stage": "rl", "st')  # killed


HOSTILE = "</div><script>alert('x')</script> | **a** \n<img src='http://b/c'> & [<i>][= </b>]"


class Page(html.parser.HTMLParser):
    """Holds that every tag is closed in order; collects tags, tables and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "b" and self.open[-1] == "td":
            self.rows[-1][-1] += "*"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "circle", "polyline"), "no other tag of ours closes itself"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def report(tag="r", **options):
    written = evaluate.main(evaluate.Settings(tag=tag, report=True, device="cpu", **options))
    assert written["html"].parent == written["md"].parent == common.run_dir(tag)
    return written["html"].read_text("utf-8"), written["md"].read_text("utf-8")


@pytest.mark.parametrize("stages", [("base",), ("sft", "rl"), ("base", "mid", "sft", "rl")])
def test_the_report_is_whole_and_nothing_that_a_model_wrote_is_markup(base_dir, stages, capsys):
    made_up_run(stages)
    text, markdown = report()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "a", "link", "iframe", "object"}
    for tag, attrs in page.tags:
        assert not {"src", "href", "onerror"} & attrs.keys() and "//" not in str(attrs), tag
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "dark" in style
    questions = 2 * (1 + (stages == ("base",)))  # of the newest stage: it has one task or two
    assert page.text.count(HOSTILE) == len(stages) + questions, "settings, questions: all said"
    assert ("code", {}) in page.tags and "2*3 = 6" in page.text, "a call of the tool is set off"
    for line in markdown.splitlines():
        assert "<" not in line or line.startswith("    "), line
    missing = [stage for stage in evaluate.STAGES if stage not in stages]
    for words in (page.text, markdown):
        assert (f"Not trained yet: {', '.join(missing)}." in words) == bool(missing)
        assert "lost their beginning to fit the context: facts 3" in words
    assert capsys.readouterr().out.count("\n") == 6, "a header, four rows, and where it is"
    assert report() == (text, markdown), "it is the same again"


def test_the_reports_scores_are_those_on_disk_and_the_best_are_marked(base_dir, capsys):
    made_up_run(evaluate.STAGES)
    text, markdown = report()
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in Page(text).rows}
    assert rows["task"] == ["base", "mid", "sft", "rl", "items"]
    results = {stage: json.loads((common.run_dir("r") / "eval" / f"{stage}.json").read_text())
               for stage in evaluate.STAGES}  # fmt: skip
    for i, stage in enumerate(evaluate.STAGES):
        tasks = results[stage]["tasks"]
        low, high = (f"{100 * tasks['facts'][key]:.1f}" for key in ("low", "high"))
        shown = f"{100 * tasks['facts']['score']:.1f} [{low}, {high}]"
        assert rows["facts"][i] == "*" * (stage == "rl") + shown
        assert rows["val_bpb"][i] == "*" * (stage == "rl") + f"{tasks['val_bpb']['score']:.4f}"
        denied = "*0.0 [0.0, " if stage == "base" else f"{2 * i:.1f} ["  # here less is better
        assert rows[evaluate.REFUSED][i].startswith(denied)
        assert shown in markdown and shown in printed
    assert rows["letters"] == ["25.0 [23.8, 28.4]", "", "", "", "1,234"], "alone, none is the best"
    line = next(line for line in markdown.splitlines() if line.startswith("| facts |"))
    cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
    assert cells == [cell.strip("*") for cell in rows["facts"]]
    order = list(rows)
    assert order.index("val_bpb") < order.index("letters") < order.index("facts")


def test_the_reports_curves_keep_their_points_and_their_box(base_dir):
    made_up_run(("base", "rl"))
    tags = Page(report()[0]).tags
    curves, title = {}, ""
    for tag, attrs in tags:
        if tag == "svg":
            title, (_, _, width, height) = attrs["aria-label"], map(float, attrs["viewbox"].split())
        if tag == "polyline":
            points = [tuple(map(float, pair.split(","))) for pair in attrs["points"].split()]
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points), title
            curves.setdefault(title, []).append(points)
    sizes = {title: [len(points) for points in found] for title, found in curves.items()}
    assert sizes == {
        "Loss, base": [300], "Validation, base": [100], "Learning rate, base": [300],
        "Speed, base": [300], "Loss, rl": [39], "Validation, rl": [2], "Reward, rl": [40, 40],
        "Length of answers, rl": [40], "Learning rate, rl": [40], "Speed, rl": [40],
    }, "of the losses one is not a number"  # fmt: skip
    (rate,), (loss,) = curves["Learning rate, base"], curves["Loss, base"]
    assert [x for x, _ in loss] == sorted(x for x, _ in loss)
    assert [y for _, y in loss] == sorted(y for _, y in loss), "it falls, and downwards is more"
    (x0, y0), (x1, y1), (x2, y2) = rate[0], rate[100], rate[-1]
    assert (y1 - y0) / (x1 - x0) == pytest.approx((y2 - y0) / (x2 - x0), rel=0.01), "a line"


@example(5e-324, 0.0, False)
@given(st.floats(-1e6, 1e6), st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.booleans())
def test_ticks_are_few_and_hold_the_values(low, span, log):
    low = abs(low) + 1e-6 if log else low
    high = (5 * low if log else low) + span  # a scale is logarithmic for such a range alone
    found = evaluate.ticks(low, high, log)
    assert found[0] <= low and high <= found[-1] and found == sorted(set(found))
    assert 2 <= len(found) <= 14
    if not log and span > 1e-6 * abs(low):
        steps = [b - a for a, b in itertools.pairwise(found)]
        digits = f"{steps[0]:.3e}"[:3]
        assert max(steps) == pytest.approx(min(steps), rel=1e-2) and digits in ("1.0", "2.0", "5.0")


def test_the_report_counts_time_and_cost(base_dir):
    made_up_run(("base", "rl"))
    rows = {row[0]: row[1:] for row in Page(report(cost_per_hour=4.0)[0]).rows}
    assert rows["stage"] == ["steps", "tokens/s", "tokens", "training", "evaluation", "USD"]
    # base: half an hour and 2 tasks of 15 minutes; rl the same with one task less
    assert rows["base"] == ["2,000", "10,000", "200 k", "30 min", "30 min", "4.00"]
    tokens = f"{40 * 4 * 8 * 30 / 1e3:.3g} k"  # steps, problems, samples, length
    assert rows["rl"] == ["40", "10,000", tokens, "30 min", "15 min", "3.00"]
    assert rows["all"][-3:] == ["60 min", "45 min", "7.00"]
    assert "USD" not in report()[0]
    with pytest.raises(ValueError, match="cost-per-hour"):
        evaluate.Settings(cost_per_hour=-1.0)


def test_the_report_says_how_much_text_and_how_many_conversations_were_learned(base_dir):
    made_up_run(("base", "sft"))
    path = common.find_checkpoint("r", "sft") / "meta.json"
    common.write_json(path, {**json.loads(path.read_text()), "chats": "talks"})
    for name in ("none", "talks"):
        common.data_dir(name).mkdir(parents=True)
    shard, chats = {"documents": 40, "characters": 9000}, {"sft.jsonl": {"conversations": 70}}
    text = {"files": {"train-0.parquet": shard, "val.parquet": shard}}
    common.write_json(common.data_dir("none") / "manifest.json", text)
    common.write_json(common.data_dir("talks") / "manifest.json", {**text, "chats": chats})
    rows = {row[0]: row[1] for row in Page(report()[0]).rows if len(row) == 2}
    assert rows["text"] == "none: 80 documents, 18 k characters"
    assert rows["chats"] == "talks: 70 for sft"
    own = {"files": {f"{s}.jsonl": {"conversations": 5} for s in ("mid", "sft", "rl", "val")}}
    common.write_json(common.data_dir("talks") / "conversations.json", own)
    rows = {row[0]: row[1] for row in Page(report()[0]).rows if len(row) == 2}
    assert rows["chats"] == "talks: 5 for mid, 5 for sft, 5 for rl"


def test_scores_of_another_model_of_as_many_steps_are_said_to_be_old(base_dir):
    made_up_run(("base",))
    path = common.run_dir("r") / "base" / "step-002000" / "meta.json"
    meta = json.loads(path.read_text())
    common.write_json(path, {**meta, "files": {"model.pt": [9, 9]}})
    assert "base is at step-002000 and the scores are of another model" in Page(report()[0]).text


def test_a_report_that_cannot_be_written_is_one_sentence(base_dir):
    def refusal(tag):
        with pytest.raises(common.MissingInput) as error:
            report(tag)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no run has the tag 'nope'" in refusal("nope")
    made_up_run(("base",))
    path = common.run_dir("r") / "eval" / "base.json"
    path.unlink()
    assert "base is at step-002000 and it is not evaluated" in Page(report()[0]).text
    path.write_text('{"tasks": ')
    assert "damaged" in refusal("r")
    shutil.rmtree(common.run_dir("r") / "base")
    assert "run `python pretrain.py --tag=r`" in refusal("r")


# evaluate.py: bench and sandbox --------------------------------------------------------------


def test_the_bench_of_a_gpu_asks_for_runs_that_there_are_and_divides_times(base_dir, monkeypatch):
    asked = []

    def logged(run, stage, tag, *flags):
        """Stand in for a stage: log lines of a run with a slow start."""
        cls = importlib.import_module(stage).Settings
        asked.append((stage, tag, common.parse_settings(cls, "", list(flags))))
        (common.run_dir(tag) / "base").mkdir(parents=True, exist_ok=True)
        rate = 900.0 if stage == "sft" else 500.0 if "--window-pattern=L" in flags else 1000.0
        lines = [{"val_bpb": 9.9, "step": 0}]
        for step in range(1, 21):
            slow = 50 * (step < 3)
            lines.append({
                "step": step, "loss": 1.0, "tok_per_s": rate - slow, "mfu": 0.5, "memory": 7.0,
                "update": 0.04, "time": 100 + 2 * step + slow, "sampling_s": 1.2 + slow,
                "data": 1.25 / 1.95, "left_s": (20 - step) * 1.95,
            })  # fmt: skip
            lines[-1]["time"] -= 50 * (step == 2)  # only the very first is slow to be there
        return lines

    monkeypatch.setattr(evaluate, "run_stage", logged)
    monkeypatch.setattr(evaluate, "find_checkpoint", lambda tag, stage: tag)
    config = common.GPTConfig(65536, 12, 768, 6, 6, 2048)
    meta = {"config": dataclasses.asdict(config), "micro_batch": 64}
    monkeypatch.setattr(evaluate, "read_meta", lambda folder: meta)
    settings = evaluate.Settings(tag="t", bench="gpu", device="cpu")
    with pytest.raises(common.MissingInput, match="needs an NVIDIA GPU"):
        evaluate.main(settings)
    with common.start_run("eval", settings) as run:
        rows = evaluate.bench_gpu(run, settings)
    assert [stage for stage, _, _ in asked] == ["pretrain"] * len(evaluate.GPU_RUNS) + ["sft", "rl"]
    assert len({tag for stage, tag, _ in asked if stage != "pretrain"} | {asked[0][1]}) == 1
    by_name = {name: one for name, (_, _, one) in zip(evaluate.GPU_RUNS, asked)}
    assert by_name["d26 fp8"].fp8 and not by_name["d26 bfloat16"].fp8
    assert all(one.max_seq_len == 2048 and one.depth == int(name[1:3])
               for name, one in by_name.items())  # fmt: skip
    first = rows["d12 bfloat16"]
    assert (first["tok_per_s"], first["mfu"], first["memory"]) == (1000, 0.5, 7)
    assert (first["update"], first["vocabulary"], first["rows"]) == (0.04, 65536, 64)
    assert 40 < first["estimate"] < 141 and rows["d26 fp8"]["of bfloat16"] == 1
    assert rows["sft"]["of pretraining"] == pytest.approx(0.9)
    assert rows["rl"] == pytest.approx({"sampling": 0.6, "training": 0.35, "idle": 0.05})
    assert json.loads((base_dir / "bench.json").read_text())["gpu"] == rows
    assert list(common.run_dir("").iterdir()) == [common.run_dir(asked[0][1])]


def test_the_comparison_of_choices_weighs_what_each_costs(tiny_run, monkeypatch, capsys):
    asked, stopped = [], []

    def train(run, tag, depth, steps, flags):
        """Stand in for training: smears cost half the pace, values gain a tenth, seeds differ."""
        if len(asked) == 5 and not stopped:
            stopped.append(tag)
            raise KeyboardInterrupt
        asked.append((tag, depth, steps, flags))
        seed = next((int(f[-1]) for f in flags if f.startswith("--seed")), 0)
        bpb = 2 + 0.1 * ("--no-value-embeds" in flags) + seed / 100 + 0.4 * (steps < 480)
        rate = 4096 if "--no-smear" in flags else 2048
        return {"steps": steps, "tokens": steps * 2048, "seconds": steps, "tok_per_s": rate,
                "bpb": bpb}  # fmt: skip

    monkeypatch.setattr(evaluate, "train_for_bench", train)
    settings = evaluate.Settings(tag="t", bench="learn", device="cpu")
    with pytest.raises(common.Stop):
        evaluate.main(settings)
    table = evaluate.main(settings)
    out = capsys.readouterr().out
    assert "going on after 5 runs" in out
    assert "| depth 6, all choices | 3 | 983,040 | 480 | 2,048 | 2.010 (2.000 to 2.020) |  |" in out
    quarter = "| 1 | 245,760 | 120"
    assert f"| depth 4, all choices, a quarter of the time {quarter} | 2,048 | 2.400 | 2.400" in out
    # twice the pace is half of the way, in the logarithm, to four times the tokens
    assert f"| depth 4, without smear {quarter} | 4,096 | 2.400 | 2.205 |" in out
    assert f"| depth 4, without value embeddings {quarter} | 2,048 | 2.500 | 2.500 |" in out
    assert len({tag for tag, *_ in asked}) == len(asked), "no run takes another's place"
    assert "t-d4-with-five-steps-of-muon" in {tag for tag, *_ in asked}
    assert json.loads((common.base_dir() / "bench.json").read_text())["learning"] == table
    turned = {flag for *_, flags in asked for flag in flags if "--seed" not in flag}
    fields = {f.name.replace("_", "-") for f in dataclasses.fields(pretrain.Settings)}
    assert {re.sub("^--(no-)?|=.*", "", flag) for flag in turned} < fields
    assert turned == {*evaluate.CHOICES.values(), "--eval-every=0"}
    evaluate.main(settings)
    assert len({tag for tag, *_ in asked}) * 2 == len(asked), "once whole, it begins anew"


def test_a_training_that_was_stopped_is_no_measure(tiny_run, monkeypatch):
    def stopped(command, **options):
        run.stopping = True  # Ctrl-C in a terminal reaches this program and the stage
        return subprocess.CompletedProcess(command, 0, "")

    run = common.Run("eval", "t", None, CPU, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", stopped)
        with pytest.raises(common.Stop, match="run the same command again"):
            evaluate.run_stage(run, "pretrain", "t-one")
    lines = [{"step": step, "time": step / 2, "loss": 1.0, "tok_per_s": 100 * step}
             for step in (1, 10, 20, 23)]  # fmt: skip
    lines += [{"step": step, "time": 9, "val_bpb": 3.0 - step / 23} for step in (0, 23)]
    monkeypatch.setattr(evaluate, "run_stage", lambda *_: lines)
    measures = evaluate.train_for_bench(run, "t-one", 1, 23, [])
    assert measures["bpb"] == 2.0 and measures["seconds"] == 11.5
    assert measures["tok_per_s"] == 2300, "its fastest tenth"
    with pytest.raises(common.Stop, match="stopped at step 23"):
        evaluate.train_for_bench(run, "t-one", 1, 40, [])


@pytest.mark.slow
@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
def test_a_model_is_trained_for_the_comparison(tiny_run):
    run = common.Run("eval", "t", None, CPU, 0, 1)
    measures = evaluate.train_for_bench(run, "t-one", 1, 40, ["--smear"])
    assert measures["tokens"] == 40 * 2048 and 0 < measures["seconds"] < 60
    assert 0 < measures["bpb"] < 8
    with pytest.raises(common.Stop, match="--no-such-flag"):
        evaluate.train_for_bench(run, "t-two", 1, 40, ["--no-such-flag"])


def test_the_bench_measures_decoding_beside_its_bounds(tiny_run, tokenizer, monkeypatch, capsys):
    tokenizer.info["measures"] = {"train_chars_per_s": 1e6, "encode_tokens_per_s": 1e6}
    tokenizer.save(common.run_dir("t") / "tokenizer")
    measure, seen = evaluate.bench_decoding, []

    def tiny(run, tokenizer, config, dtype, int8):
        seen.append((config.n_layer, config.vocab_size, int8))
        shape = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_embd": 64}
        return measure(run, tokenizer, dataclasses.replace(config, **shape, n_head=1, n_kv_head=1),
                       torch.float32, int8)  # fmt: skip

    monkeypatch.setattr(evaluate, "bench_decoding", tiny)
    monkeypatch.setattr(evaluate, "can_compile", lambda device: False)
    monkeypatch.setattr(
        evaluate, "training_rates", lambda tag: {f"{tag} pretraining, tokens/s": 5.0}
    )
    evaluate.main(evaluate.Settings(tag="t", bench="speed", device="cpu", dtype="float32"))
    assert seen == [(depth, vocab, int8) for depth, vocab in ((4, 4096), (12, 32768))
                    for int8 in (False, True)]  # fmt: skip
    report = json.loads((common.base_dir() / "bench.json").read_text())
    said = capsys.readouterr().out
    for name in ("d4 float32", "d12 float32", "d12 float32 int8 weights"):
        measured = report["decoding"][name]
        assert f"| {name} | {measured['x1']:,.0f} ({measured['x1 of bound']:.0%}) | " in said
        assert measured["history"] > 1990
        for key in ("x1", "x16", "x64", "prefill"):
            assert measured[key] > 10 and 0 < measured[f"{key} of bound"] < 3
        for key in ("turn 1", "turn 10"):
            assert 0 < measured[key] < 10 and 0 < measured[f"{key} of bound"] < 3


@pytest.fixture(params=["best", "plain"])
def sandbox(request, monkeypatch):
    """run_code in the best way that this system has, and without namespaces; both clean up."""
    best = common.sandbox_way()
    monkeypatch.setenv("A_SECRET", "hunter2")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to nobody
        os.chmod(folder, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        way = best if request.param == "best" else ([], best[1])
        yield functools.partial(common.run_code, way=way)
        assert os.listdir(folder) == []


def test_the_sandbox_passes_what_is_right_and_fails_what_is_not(sandbox):
    assert sandbox("print('\\u00e9' * 2)") == common.Outcome(True, "passed", "\u00e9\u00e9\n")
    wrong = sandbox("import sys\nprint('a')\nassert 1 == 2, 'b'")
    assert (wrong.passed, wrong.reason) == (False, "it ended with exit status 1")
    assert wrong.output.startswith("a\n") or wrong.output.endswith("a\n")
    assert "AssertionError: b" in wrong.output
    for early in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert sandbox(f"print(1)\n{early}").reason == "it stopped before its end"
    for text in ("def f(", "'''", "\0", "\ud800"):
        assert not sandbox(text).passed
    assert "signal 11" in sandbox("import os; os.kill(os.getpid(), 11)").reason
    assert sandbox("for _ in range(2):\n    pass\\").passed, "the check does not join the program"


def test_the_sandbox_shows_a_program_nothing_of_ours(sandbox):
    program = """
        import json, os, sys
        here = os.listdir()
        open("a", "w").write("b")
        try:
            asked = input()
        except EOFError:
            asked = "nothing"
        print(json.dumps([here, asked, dict(os.environ), os.getpgid(0), len(os.listdir("/dev/fd"))]))
    """
    outcome = sandbox(textwrap.dedent(program))
    assert outcome.passed, outcome
    here, asked, environment, group, num_files = json.loads(outcome.output)
    assert (here, asked) == ([], "nothing") and group != os.getpgid(0) and num_files <= 4
    assert environment.keys() <= {"PATH", "HOME", "TMPDIR", "LC_ALL", "LC_CTYPE"}
    assert "hunter2" not in outcome.output


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: signal.pause()",
        "import os\nos.close(1), os.close(2)\nwhile True: pass",
    ],
)
def test_the_sandbox_ends_what_does_not_end(sandbox, program):
    began = time.perf_counter()
    outcome = sandbox(program, timeout_s=0.5)
    assert (outcome.passed, outcome.reason) == (False, "it took longer than 0.5 s")
    assert time.perf_counter() - began < 30


def test_the_sandbox_limits_cpu_time(sandbox):
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))"
    assert sandbox(program, timeout_s=9.5).output == "(10, 10)\n"
    program = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (11, 11))"
    assert not sandbox(program, timeout_s=9.5).passed, "it cannot be raised"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_the_sandbox_limits_memory(sandbox):
    assert sandbox("a = bytearray(30 << 20)", memory_bytes=99 << 20).passed
    outcome = sandbox("a = []\nwhile True: a.append(bytearray(1 << 20))", memory_bytes=99 << 20)
    assert not outcome.passed and "MemoryError" in outcome.output


def test_the_sandbox_limits_output_and_files(sandbox):
    size = 1 << 16
    outcome = sandbox("while True: print('x' * 1000)", file_bytes=size)
    assert not outcome.passed and 1000 < len(outcome.output) <= size
    outcome = sandbox("open('a', 'wb').write(bytes(99 << 20))", file_bytes=size)
    assert not outcome.passed and "File too large" in outcome.output
    outcome = sandbox("import os\nos.truncate(os.open('a', os.O_CREAT), 1 << 40)")
    assert not outcome.passed
    assert sandbox(f"open('a', 'wb').write(bytes({size}))", file_bytes=size).passed


def test_the_sandbox_limits_the_number_of_processes(sandbox):
    if os.geteuid() == 0 and not common.sandbox_way()[1]:
        pytest.skip("root cannot become nobody here")
    program = """
        import os, time
        for started in range(999):
            try:
                if os.fork() == 0:
                    time.sleep(60)
            except OSError:
                break
        print(started)
    """
    outcome = sandbox(textwrap.dedent(program), timeout_s=10)
    assert outcome.passed and int(outcome.output) < common.SANDBOX_PROCESSES
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert sandbox(bomb, timeout_s=0.5).reason == "it took longer than 0.5 s"
    # the dead count until the system's first process reaps them
    until(lambda: sandbox("import os\nif os.fork(): os.wait()").passed, 20)


def running(mark):
    """Say whether a process has `mark` in its command line."""
    listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True)
    return mark in listed.stdout


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("leaves_group", [False, True])
def test_the_sandbox_kills_what_a_program_started(sandbox, ends, leaves_group):
    if leaves_group and not sandbox.keywords["way"][0]:
        pytest.skip("without a namespace such a process outlives the program")
    mark = f"mark{random.randrange(1 << 60)}"
    program = f"""
        import subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"]
        subprocess.Popen(sleeper, start_new_session={leaves_group})
        time.sleep(0.3 if {ends} else 60)
    """
    assert sandbox(textwrap.dedent(program), timeout_s=3 if ends else 0.6).passed == ends
    until(lambda: not running(mark), 5)


def test_the_sandbox_has_no_network_where_namespaces_work(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"
        assert sandbox(program).passed == (not sandbox.keywords["way"][0])


def test_the_sandbox_removes_what_a_program_leaves(sandbox):
    program = """
        import os
        os.symlink("/", "link")
        for _ in range(1100):
            os.mkdir("deep")
            os.chdir("deep")
        os.mkdir("closed")
        open("closed/file", "w").close()
        os.chmod("closed", 0)
    """
    assert sandbox(textwrap.dedent(program)).passed
    assert Path("/etc").is_dir()


def test_the_sandbox_never_runs_a_program_as_root(sandbox):
    if not sandbox.keywords["way"][1]:
        pytest.skip("no way to lay down rights here")
    outcome = sandbox("import os\nprint(os.getuid())\nopen('/etc/nanochat-test', 'w')")
    assert outcome.output.split("\n")[0] != "0" and "Permission denied" in outcome.output


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


class ScriptedTalk:
    """Stands in for an engine: says what it was asked, through a call of the tool if told to."""

    def __init__(self, context=256):
        self.model = SimpleNamespace(config=SimpleNamespace(max_seq_len=context))
        self.tokenizer, self.asked = TOKENIZER(), []

    def stream_reply(self, messages, sampling):
        self.asked.append((messages, sampling.seed))
        said = messages[-1]["content"]
        if said == "hang up":
            yield "text", "well"
            raise KeyboardInterrupt
        if said == "hang up while calling":
            yield from (("text", "It is"), ("python", "6*"))
            raise KeyboardInterrupt
        if said[0].isdigit():
            yield from (("text", "It"), ("text", " is"), ("python", said[:2]), ("python", said[2:]))
            yield from (("output", common.calculate(said)), ("text", "."))
        else:
            yield "text", f"You said {said}"

    def complete(self, text, sampling):
        self.asked.append((text, sampling.seed))
        yield " and so on"


@pytest.fixture
def converse(base_dir, monkeypatch, capsys):
    """Run chat's main on lines as if piped, or typed; return what it printed."""

    def run(*lines, stage="sft", typed=False, context=256, **settings):
        engine = ScriptedTalk(context)
        monkeypatch.setattr(chat, "load", lambda settings: (engine, stage))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        if typed:
            events = iter(lines)

            def read(prompt):
                event = next(events, EOFError)
                if isinstance(event, str):
                    return event
                raise event

            monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
            monkeypatch.setattr("builtins.input", read)
        chat.main(chat.Settings(**settings))
        printed = capsys.readouterr()
        return SimpleNamespace(out=printed.out, err=printed.err, asked=engine.asked)

    return run


def test_chat_goes_on_over_the_turns_of_a_pipe_and_shows_calls(converse):
    run = converse("Hi", "", "37*12", "  ", "Bye", system="Be brief.", seed=5)
    assert run.out == "You said Hi\nIt is [37*12 = 444].\nYou said Bye\n"
    messages = run.asked[-1][0]
    parts = [("text", "It is"), ("python", "37*12"), ("output", "444"), ("text", ".")]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert [(p["type"], p["text"]) for p in messages[4]["content"]] == parts
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "Be brief.", "Hi", "37*12", "Bye"
    ]  # fmt: skip
    assert [asked[1] for asked in run.asked] == [5, 6, 7]


def test_chat_commands(converse):
    run = converse("/regen", "one", "two", "/regen", "/reset", "three", "/quti now", "/help", "/quit",
                   "four", system="s")  # fmt: skip
    assert run.out == "You said one\nYou said two\nYou said two\nYou said three\n"
    contents = [
        [m["content"] for m in messages if m["role"] == "user"] for messages, _ in run.asked
    ]
    assert contents == [["one"], ["one", "two"], ["one", "two"], ["three"]]
    assert [seed for _, seed in run.asked] == [0, 1, 2, 3], "other chances"
    assert all(messages[0]["role"] == "system" for messages, _ in run.asked)
    notes = run.err.splitlines()
    assert "nothing has been said" in notes[0] and "forgotten" in notes[1]
    assert "/quti is no command" in notes[2] and all(c in notes[3] for c in chat.COMMANDS)
    run = converse("Once", "/regen", "/usr/bin", "/quit", stage="base")
    assert run.asked == [("Once", 0), ("Once", 1), ("/usr/bin", 2)]
    assert run.out == "Once and so on\nOnce and so on\n/usr/bin and so on\n"


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(converse):
    lines = [f"message {i} " + "of some length " * 3 for i in range(12)]
    run = converse(*lines, "word " * 400, "short", context=256, system="s")
    assert run.out.count("You said") == 13
    sizes = [len(common.render_prompt(TOKENIZER(), messages)) for messages, _ in run.asked]
    assert max(sizes) <= 192 and sorted(sizes[:3]) == sizes[:3]
    users = [m["content"] for m in run.asked[11][0] if m["role"] == "user"]
    assert users == lines[12 - len(users) : 12] and len(users) > 1, "the newest, in order"
    assert all([m["role"] for m in messages[:2]] == ["system", "user"] for messages, _ in run.asked)
    notes = run.err.splitlines()
    assert any("oldest turns forgotten: 1" in line for line in notes)
    assert len([line for line in notes if "too long: " in line]) == 1
    before = [m for m in run.asked[-1][0] if "word word" in str(m["content"])]
    assert not before, "the refused message is not remembered"


def test_ctrl_c_ends_an_answer_and_only_at_the_prompt_the_program(converse):
    C = KeyboardInterrupt
    run = converse("hang up", "a", "hang up while calling", C, "b", C, C, "c", typed=True)
    assert [m[-1]["content"] for m, _ in run.asked] == [
        "hang up", "a", "hang up while calling", "b"
    ]  # fmt: skip
    said = [m["content"] for m in run.asked[-1][0] if m["role"] == "assistant"]
    assert said[0] == [{"type": "text", "text": "well"}], "what came is remembered"
    assert said[2] == [{"type": "text", "text": "It is"}], "half a call is not"
    assert run.err.count("Ctrl-C once more") == 2 and run.out.startswith("well\nYou said a\n")
    assert converse("x", EOFError, "y", typed=True).out == "You said x\n"
    with pytest.raises(KeyboardInterrupt):
        converse("hang up", "a")


def test_typed_lines_are_remembered_in_a_private_file(converse, base_dir):
    readline = pytest.importorskip("readline")
    readline.clear_history()
    readline.add_history("an earlier line")
    converse("x", typed=True)
    path = base_dir / "chat_history"
    assert "an earlier line" in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    path.chmod(0o644)
    converse("x", "/quit", typed=True)
    assert readline.get_history_item(1) == "an earlier line"
    assert path.stat().st_mode & 0o777 == 0o600
    readline.clear_history()


def test_what_a_model_says_cannot_drive_the_terminal(converse):
    control = "".join(map(chr, [*range(32), *range(127, 160), 0x202E, 0x2066]))
    for kind in ("text", "python", "output"):
        printed = "".join(chat.show(iter([(kind, "a\x1b[2J"), (kind, control)])))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", printed)
        assert "a\u241b[2J" in printed and "\t" in printed and "\n" in printed
    letters = "plain é 漢字 \U0001f469\u200d\U0001f680"
    assert "".join(chat.show([("text", letters)])) == letters
    assert "\x1b" not in converse("\x1b[31mred").out


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [
        ("t:It is |p:37|p:*12|o:444|t:444.", "It is [37*12 = 444] 444."),
        ("p:1+1|o:2|t:. So|p:2+2|o:4", "[1+1 = 2]. So [2+2 = 4]"),
        ("p:1+1|o:2|p:2+2|o:4|t:\nEnd", "[1+1 = 2] [2+2 = 4]\nEnd"),
        ("o:error|t:!", "[ = error]!"),
        ("t:a|p:1+", "a [1+"),
        ("t:a|t:|t:b", "ab"),
        ("", ""),
    ],
)
def test_how_calls_of_the_tool_are_shown(pieces, printed):
    kinds = {"t": "text", "p": "python", "o": "output"}
    pairs = [(kinds[p[0]], p[2:]) for p in pieces.split("|") if p]
    assert "".join(chat.show(pairs)) == printed
    dim = "".join(chat.show(pairs, dim=True))
    assert re.sub(r"\x1b\[[02]m", "", dim) == printed
    for part in re.split(r"\x1b\[2m.*?\x1b\[0m", dim, flags=re.DOTALL):
        assert not re.search(r"[\x1b\[\]]", part), "all of a call is dim, and nothing else"


def test_an_answer_is_printed_while_it_comes():
    told = []

    def pieces():
        for i in range(3):
            told.append(i)
            yield "text", f"{i} "

    for i, text in enumerate(chat.show(pieces())):
        assert text == f"{i} " and told == list(range(i + 1))


def test_chat_takes_the_last_stage_there_is_and_says_which(tiny_run, capsys, monkeypatch):
    pretrain.main(tiny_pretrain())
    run = common.run_dir("t")
    options = {"tag": "t", "device": "cpu", "temperature": 0.0, "max_tokens": 5}
    for stage in ("base", "mid", "sft", "rl"):
        if stage != "base":
            shutil.copytree(run / "base", run / stage)
        capsys.readouterr()
        chat.main(chat.Settings(prompt="The cat", **options))
        printed = capsys.readouterr()
        assert printed.err.startswith(f"({stage} model of run t, step-") and printed.out
        assert printed.out.startswith("The cat") == (stage == "base")
    chat.main(chat.Settings(stage="base", prompt="The cat", **options))
    assert "(base model" in capsys.readouterr().err
    for prompt in ("x" * 999, "\udcff"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\nThe cat\n"))
        chat.main(chat.Settings(**options))
    assert "too long: it has" in capsys.readouterr().err


def test_chats_mistakes_are_one_sentence(tiny_run, capsys):
    def run(*words):
        command = [sys.executable, str(HERE / "chat.py"), "--device=cpu", "-p", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr.count("\n") == 1, done.stderr
        return done

    missing = run("Hi", "--tag=none-such")
    assert missing.returncode == 1 and missing.stdout == ""
    assert missing.stderr.startswith("no run has the tag 'none-such'")
    pretrain.main(tiny_pretrain())
    fine = run("Hi", "--tag=t", "--max-tokens=3")
    assert fine.returncode == 0 and fine.stdout.startswith("Hi") and fine.stdout[-1] == "\n"
    options = {"tag": "t", "device": "cpu"}
    with pytest.raises(common.MissingInput, match="has no rl checkpoint: run `python rl.py"):
        chat.main(chat.Settings(stage="rl", **options))
    with pytest.raises(common.Stop, match="--system is for a model that chats"):
        chat.main(chat.Settings(system="x", **options))
    shutil.copytree(common.run_dir("t") / "base", common.run_dir("t") / "sft")
    with pytest.raises(common.Stop, match="too long: it has [0-9]+ tokens"):
        chat.main(chat.Settings(prompt="word " * 300, **options))
    for words in (["-i", "raw"], ["--top-p=0"], ["--max-tokens=0"], ["-t", "-1"], ["--seed=-1"]):
        with pytest.raises(SystemExit) as ended:
            common.parse_settings(chat.Settings, "", words)
        assert ended.value.code == 2


# Serving -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(tokenizer, slots=4, model=None, **changes):
    """A server of a random model; yields it, its address and an engine that answers alone."""
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 128}
    options = {"port": 0, "max_tokens": 12, "timeout_s": 5.0, **changes}
    server = serve.Server(serve.Settings(**options))
    server.said = []  # the log
    server.say = server.said.append
    engine = common.Engine(model or random_model(**shape), tokenizer, slots)
    worker = serve.Worker(engine, server.settings.max_waiting)
    server.model = serve.Model("t-sft", ("t-sft", "t"), "sft", engine, worker)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
        for _ in range(200):  # whatever a test did, nothing is left at work
            if not worker.open and not engine.load:
                break
            time.sleep(0.02)
        assert not worker.open and not engine.load
        check_rows(engine)
        assert "Traceback" not in "\n".join(server.said)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        worker.stop()


@pytest.fixture
def served(tokenizer):
    with serving(tokenizer) as (server, url):
        yield server, url


def user(text):
    return [{"role": "user", "content": text}]


def reply_alone(tokenizer, messages, max_tokens):
    """What a model says to messages when nobody else asks: parts, and why it ended."""
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 128}
    engine = common.Engine(random_model(**shape), tokenizer, 1)
    prompt = common.render_prompt(tokenizer, messages)
    ((_, reply),) = engine.run([greedy(prompt, max_tokens, tool=True)])
    return reply, common.reply_parts(tokenizer, reply.ids)


def events(response):
    """The events of a stream, parsed; the last must be [DONE]."""
    datas = [line[6:] for line in response.text.split("\n\n") if line]
    assert datas[-1] == "[DONE]" and response.headers["Content-Type"].startswith(
        "text/event-stream"
    )
    return [json.loads(data) for data in datas[:-1]]


def test_an_answer_is_what_the_model_says_alone_whole_and_streamed(served, tokenizer):
    _, url = served
    for text in ("Hi", "What is 2+2? \u00e9\u4e2d", "x" * 40):
        reply, parts = reply_alone(tokenizer, user(text), 20)
        asked = {"messages": user(text), "temperature": 0, "max_tokens": 20}
        for path in ("/v1/chat/completions", "/chat/completions"):
            body = requests.post(url + path, json=asked).json()
            (choice,) = body["choices"]
            assert body["object"] == "chat.completion" and body["model"] == "t-sft"
            assert choice["message"]["role"] == "assistant" and choice["index"] == 0
            assert choice["message"]["parts"] == parts
            assert choice["finish_reason"] == reply.reason
            prompt = len(common.render_prompt(tokenizer, user(text)))
            assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": len(reply.ids),
                                     "total_tokens": prompt + len(reply.ids)}  # fmt: skip
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(requests.post(url + "/v1/chat/completions", json={**asked, **options}))
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert len({c["id"] for c in chunks}) == 1
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
        reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
        assert reasons == [None] * (len(reasons) - 1) + [reply.reason]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == body["usage"]


def test_openais_own_client_talks_to_it(served):
    openai = pytest.importorskip("openai")
    _, url = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": "t-sft", "messages": user("Hi"), "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    streamed = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason in ("length", "stop")
    done = client.completions.create(model="t", prompt="The cat", max_tokens=4, temperature=0)
    assert done.usage.completion_tokens <= 4
    assert [model.id for model in client.models.list()] == ["t-sft"]
    assert client.models.retrieve("t-sft").id == "t-sft"
    with pytest.raises(openai.NotFoundError, match="t-sft"):
        client.models.retrieve("gpt-4")
    bare = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in bare.models.list()] == ["t-sft"]
    assert bare.models.retrieve("t-sft").id == "t-sft"
    assert bare.completions.create(model="t", prompt="The cat", max_tokens=4, temperature=0).usage
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**{**asked, "temperature": 5})
    with pytest.raises(openai.NotFoundError, match="t-sft"):
        client.chat.completions.create(**{**asked, "model": "gpt-4"})


def test_openais_client_sends_back_an_answer_with_its_calls(served, tokenizer):
    chat_types = pytest.importorskip("openai.types.chat")
    openai = pytest.importorskip("openai")
    _, url = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    parts = [{"type": "text", "text": "So"}, {"type": "python", "text": "37*12"},
             {"type": "output", "text": "444"}]  # fmt: skip
    made = {"role": "assistant", "content": "So [37*12 = 444]", "parts": parts}
    message = chat_types.ChatCompletionMessage.model_validate(made)
    said = [*user("a"), message, *user("b")]
    done = client.chat.completions.create(model="t", messages=said, max_tokens=1)
    same = [*user("a"), {"role": "assistant", "content": parts}, *user("b")]
    assert done.usage.prompt_tokens == len(common.render_prompt(tokenizer, same))


def test_many_ask_at_once_and_get_what_each_gets_alone(served, tokenizer):
    _, url = served
    texts = [f"Say {n}" for n in range(24)]

    def ask(text):
        asked = {"messages": user(text), "temperature": 0, "max_tokens": 15}
        return requests.post(url + "/v1/chat/completions", json=asked).json()

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        for text, body in zip(texts, pool.map(ask, texts)):
            _, parts = reply_alone(tokenizer, user(text), 15)
            assert body["choices"][0]["message"]["parts"] == parts


def test_choices_differ_and_a_seed_repeats_them(served):
    _, url = served
    asked = {"messages": user("Hi"), "n": 4, "seed": 7, "temperature": 1, "top_k": 0}

    def texts(**changes):
        body = requests.post(url + "/v1/chat/completions", json={**asked, **changes}).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        return [choice["message"]["content"] for choice in body["choices"]]

    first = texts()
    assert len(set(first)) == 4 and texts() == first
    assert not set(first) & set(texts(seed=8)), "seeds side by side share no sample"
    assert texts(seed=None) != texts(seed=None)
    streamed = collections.Counter()
    for chunk in events(
        requests.post(url + "/v1/chat/completions", json={**asked, "stream": True})
    ):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += len(choice["delta"].get("content", ""))
    assert [streamed[i] for i in range(4)] == list(map(len, first))


def test_completions_go_on_from_a_text(served, tokenizer):
    server, url = served
    alone = common.Engine(server.model.engine.model, tokenizer, 1)
    expected = "".join(alone.complete("The cat", common.Sampling(8, 0)))
    asked = {"prompt": "The cat", "temperature": 0, "max_tokens": 8}
    body = requests.post(url + "/v1/completions", json=asked).json()
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == expected
    chunks = events(requests.post(url + "/v1/completions", json={**asked, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected
    two = requests.post(url + "/v1/completions", json={**asked, "prompt": ["The cat", "A"]}).json()
    assert two["choices"][0]["text"] == expected and len(two["choices"]) == 2
    same = {"prompt": ["The cat"] * 4, "temperature": 2, "top_k": 0, "max_tokens": 8, "seed": 5}
    drawn = [requests.post(url + "/v1/completions", json=same).json() for _ in range(2)]
    texts = [[choice["text"] for choice in body["choices"]] for body in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) == 4, "each draws its own"


def test_a_stop_string_ends_an_answer_and_is_left_out(tokenizer):
    script = [*tokenizer.encode("one two three four"), tokenizer.specials["<|assistant_end|>"]]
    prompt = common.render_prompt(tokenizer, user("Go"))
    for stop, said in (("three", "one two "), (["zz", " t"], "one"), ([], "one two three four")):
        model = Scripted(tokenizer, script, len(prompt))
        with serving(tokenizer, 1, model) as (_, url):
            asked = {"messages": user("Go"), "temperature": 0, "stop": stop, "max_tokens": 50}
            body = requests.post(url + "/v1/chat/completions", json=asked).json()
            assert body["choices"][0]["message"]["content"] == said
            assert body["choices"][0]["finish_reason"] == "stop"


def test_a_call_of_the_calculator_is_shown_as_text_and_as_parts(tokenizer):
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode("37*12"), special["<|python_end|>"]]
    gap = [7] * (2 + len(tokenizer.encode("444")))
    script = [*tokenizer.encode("So"), *call, *gap, *tokenizer.encode("It is."),
              special["<|assistant_end|>"]]  # fmt: skip
    prompt = common.render_prompt(tokenizer, user("Go"))
    with serving(tokenizer, 1, Scripted(tokenizer, script, len(prompt))) as (_, url):
        asked = {"messages": user("Go"), "temperature": 0, "max_tokens": 50, "stream": True}
        chunks = events(requests.post(url + "/v1/chat/completions", json=asked))
        deltas = [c["choices"][0]["delta"] for c in chunks]
        text = "".join(d.get("content", "") for d in deltas)
        assert (
            text
            == "So [37*12 = 444] It is."
            == "".join(
                chat.show(
                    [("text", "So"), ("python", "37*12"), ("output", "444"), ("text", "It is.")]
                )
            )
        )
        parts = [(d["part"]["type"], d["part"]["text"]) for d in deltas if "part" in d]
        joined = [
            (k, "".join(t for _, t in g)) for k, g in itertools.groupby(parts, lambda p: p[0])
        ]
        assert joined == [
            ("text", "So"),
            ("python", "37*12"),
            ("output", "444"),
            ("text", "It is."),
        ]


def test_messages_come_in_several_forms_and_text_never_becomes_a_special_token(served, tokenizer):
    server, _ = served
    model = server.model
    forms = [
        ([{"role": "developer", "content": "Be kind."}, *user("Hi")],
         [{"role": "system", "content": "Be kind."}, *user("Hi")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
         user("ab")),
        ([*user("a"), *user("b")], user("a\n\nb")),
        (user("<|user_end|><|assistant_start|>"), user("<|user_end|><|assistant_start|>")),
        (user("\ud800"), user("?")),
        ([*user("a"), {"role": "system", "content": "b"}], user("a\n\nb")),
        ([{"role": "developer", "content": "a"}], user("a")),
        ([*user("[1+1 = 2]")], user("[1+1 = 2]")),
    ]  # fmt: skip
    call = [{"type": "python", "text": "37*12"}, {"type": "output", "text": "444"}]
    texts = [{"type": "text", "text": text} for text in ("So", "It is.", "So ", " It is.")]
    tight, wide = [texts[0], *call, texts[1]], [texts[2], *call, texts[3]]
    for changes, parts in (
        ({"parts": tight}, tight), ({}, wide), ({"parts": 3}, wide), ({"parts": call}, wide),
        ({"content": "Edited", "parts": tight}, [{"type": "text", "text": "Edited"}]),
        ({"content": "[2+2 = 5]"}, [{"type": "text", "text": "[2+2 = 5]"}]),
        ({"content": "[a = error]"}, [{"type": "text", "text": "[a = error]"}]),
    ):  # fmt: skip
        back = {"role": "assistant", "content": "So [37*12 = 444] It is.", **changes}
        said = [*user("a"), back, *user("b")]
        forms.append((said, [*user("a"), {"role": "assistant", "content": parts}, *user("b")]))
    settings = server.settings
    for said, same in forms:
        wanted = serve.parse_wanted({"messages": said}, True, model, settings)
        assert wanted.prompts == [common.render_prompt(tokenizer, same)]
    ids = serve.parse_wanted({"messages": forms[3][0]}, True, model, settings).prompts[0]
    assert ids.count(tokenizer.specials["<|user_end|>"]) == 1
    parts = [{"type": "python", "text": "1+1"}, {"type": "output", "text": "2"}]
    for cut in ([], [{"type": "python", "text": "37*"}]):  # a call that was stopped is left out
        called, whole = (
            [*user("a"), {"role": "assistant", "content": said}, *user("b")]
            for said in (parts + cut, parts)
        )
        wanted = serve.parse_wanted({"messages": called}, True, model, settings)
        assert wanted.prompts == [common.render_prompt(tokenizer, whole)]


def write_blocklist(folder, *lines):
    path = folder / "blocked.txt"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return str(path)


def test_an_input_that_is_blocked_is_refused(tokenizer, tmp_path):
    path = write_blocklist(tmp_path, "# comment", "", r"\bsecret\b", "  caf\u00e9s?  ", "a b")
    with serving(tokenizer, blocklist=path) as (_, url):

        def refused(path="/v1/chat/completions", **asked):
            response = requests.post(url + path, json={"max_tokens": 1, **asked})
            error = response.json().get("error", {})
            assert response.status_code == (400 if error else 200)
            assert not error or error["type"] == "invalid_request_error"
            assert not error or not re.search("secret|caf|comment", error["message"])
            return error.get("code") == "content_blocked" and error["param"]

        for text in ("My SECRET.", "secret", "CAF\u00c9S", "A b"):
            assert refused(messages=user(text)) == "messages", text
            assert refused("/v1/completions", prompt=["fine", text]) == "prompt"
            answer = {"role": "assistant", "content": [{"type": "output", "text": text}]}
            assert refused(messages=[*user("Hi"), answer, *user("x")]) == "messages"
            system = {"role": "system", "content": [{"type": "text", "text": text}]}
            assert refused(messages=[system, *user("x")]) == "messages"
        cut = [{"type": "text", "text": "sec"}, {"type": "text", "text": "ret"}]
        assert refused(messages=user(cut)) == "messages"
        for text in ("secrets", "a  b", "# comment", ""):
            assert not refused(messages=user(text)) and not refused("/v1/completions", prompt=text)


def test_what_is_blocked_is_masked_in_answers_whole_and_streamed(tokenizer, tmp_path):
    path = write_blocklist(tmp_path, "three f", r"\b4\d+", "3.*2", "[a-z]{3} is")
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode("37*12"), special["<|python_end|>"]]
    gap = [7] * (2 + len(tokenizer.encode("444")))
    plain = [*tokenizer.encode("one three four"), special["<|assistant_end|>"]]
    called = [*tokenizer.encode("two three"), *call, *gap, *tokenizer.encode("fWhat IS"),
              special["<|assistant_end|>"]]  # fmt: skip
    expected = {
        "one [blocked]our": [("text", "one [blocked]our")],
        "two three [[blocked] = [blocked]] fW[blocked]": [
            ("text", "two three"), ("python", "[blocked]"), ("output", "[blocked]"),
            ("text", "fW[blocked]")],
    }  # fmt: skip
    for script, (text, parts) in zip((plain, called), expected.items()):
        model = Talker(tokenizer, script)
        with serving(tokenizer, 1, model, blocklist=path) as (_, url):
            asked = {"messages": user("Go"), "temperature": 0, "max_tokens": 50}
            body = requests.post(url + "/v1/chat/completions", json=asked).json()
            message = body["choices"][0]["message"]
            assert [(part["type"], part["text"]) for part in message["parts"]] == parts
            assert message["content"] == text
            asked["stream"] = True
            chunks = events(requests.post(url + "/v1/chat/completions", json=asked))
            deltas = [c["choices"][0]["delta"] for c in chunks]
            assert "".join(d.get("content", "") for d in deltas) == text
            streamed = [(d["part"]["type"], d["part"]["text"]) for d in deltas if "part" in d]
            joined = itertools.groupby(streamed, lambda part: part[0])
            assert [(kind, "".join(t for _, t in group)) for kind, group in joined] == parts


BLOCKLISTS = [
    ["abc", "b+c", "ab"], ["a.c"], [r"\bab\b", "c$"], ["(a|b){2,4}c"], ["^ab", "(?<=a)b", "c\\Z"],
    ["a+b*c"], [".b."], ["[^a]{3}"], ["a(?=bc)", "c(?!a)b"], ["a*?c"], ["a?(b|ca)c"], ["ab?$"],
]  # fmt: skip


@given(
    st.sampled_from(BLOCKLISTS),
    st.lists(st.text("abcABC \n", max_size=12), max_size=12),
)
def test_what_is_masked_does_not_depend_on_the_pieces(lines, pieces):
    with tempfile.TemporaryDirectory() as folder:
        blocklist = serve.read_blocklist(Path(write_blocklist(Path(folder), *lines)))
    masker, text = serve.Masker(blocklist), "".join(pieces)
    expected = re.sub("|".join(lines), "[blocked]", text, flags=re.IGNORECASE)
    ready, held = [], 0
    for piece in pieces:
        ready += masker.feed("text", piece)
        held = max(held, len(masker.text) - masker.at)
    ready += masker.end()
    assert "".join(piece for _, piece in ready) == expected
    assert held < blocklist.window <= 256
    assert blocklist.finds(text) == (expected != text)


def test_no_more_is_held_than_a_match_can_need(tmp_path):
    for lines, window in ((["abcd"], 6), (["abcd", "xyz.?"], 7), (["x{3,9}"], 256)):
        blocklist = serve.read_blocklist(Path(write_blocklist(tmp_path, *lines)))
        masker = serve.Masker(blocklist)
        assert blocklist.window == window
        said = "".join(piece for _, piece in masker.feed("text", "z" * 1000))
        assert said == "z" * (1000 - window + 1)
    began = time.thread_time()  # nine tenths of a million steps for each character, not 2**256
    assert not serve.read_blocklist(Path(write_blocklist(tmp_path, "z*z*y"))).finds("z" * 2000)
    assert time.thread_time() - began < 20
    assert serve.read_blocklist(Path(write_blocklist(tmp_path, "# nothing", ""))) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [(["fine", "(", "also"], r":2: \(: missing \)"), (["", "a*"], ":2: .*where nothing is"),
     ([r"\b"], ":1: .*where nothing is"), (["(a+)+b"], ":1: .*repeat a repetition"),
     (["((a|b{2,})c)*d"], ":1: .*repeat a"), ([r"(a)\1"], ":1: .*refers to a group"),
     (["(?P<x>a)"], ":1: .*names one"), (["(a)?b(?(1)c|d)"], ":1: .*refers"),
     (["a", b"\xff"], ":2: this is not UTF-8"), (["a)(?:b"], ":1: .*unbalanced"),
     (["# x", "[z-a]"], ":2: .*bad character range.*: mend or remove this line")],
)  # fmt: skip
def test_a_bad_blocklist_is_a_wrong_setting(tmp_path, lines, said, capsys):
    path = write_blocklist(tmp_path, *lines)
    with pytest.raises(SystemExit) as ended:
        common.parse_settings(serve.Settings, "", [f"--blocklist={path}"])
    assert ended.value.code == 2
    assert re.search(re.escape(path) + said, capsys.readouterr().err)
    with pytest.raises(ValueError, match="No such file.*: name a file"):
        serve.Settings(blocklist=str(tmp_path / "none"))
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="--timeout-s above 0"):
            serve.Settings(timeout_s=value)


def test_a_tiny_temperature_takes_the_likeliest_and_harms_nobody(tokenizer):
    said = "word " * 20
    script = [*tokenizer.encode(said), tokenizer.specials["<|assistant_end|>"]]
    with serving(tokenizer, 2, Talker(tokenizer, script, pause=0.005), max_tokens=200) as (_, url):
        path, asked = url + "/v1/chat/completions", {"messages": user("Go")}
        for tiny in (1e-300, 1e-45, 4e-38):
            with requests.post(path, json={**asked, "stream": True}, stream=True) as response:
                lines = response.iter_lines()
                next(lines)
                beside = requests.post(path, json={**asked, "temperature": tiny}).json()
                assert beside["choices"][0]["message"]["content"] == said
                rest = b"".join(lines)
                assert rest.endswith(b"[DONE]") and b"error" not in rest


def test_text_without_end_is_refused_before_it_is_tokenized(tokenizer, monkeypatch):
    class PanicException(BaseException):
        """As tiktoken raises, which is no Exception."""

    panic = unittest.mock.Mock(side_effect=PanicException)
    parts = [{"role": "system", "content": "x" * 1000}, *user("x" * 1049)]
    for options, most in (({}, 2048), ({"max_input_chars": 10}, 10)):
        with serving(tokenizer, **options) as (server, url), monkeypatch.context() as patched:
            patched.setattr(tokenizer, "encode", panic)
            patched.setattr(tokenizer, "encode_batch", panic)
            assert requests.get(url + "/config").json()["limits"]["max_chars"] == most
            for path, asked in (("chat/completions", {"messages": parts}),
                                ("completions", {"prompt": ["x", "x" * 2049]})):  # fmt: skip
                response = requests.post(f"{url}/v1/{path}", json=asked)
                error = response.json()["error"]
                assert response.status_code == 400 and error["param"] in asked
                assert "2,049" in error["message"] and f"{most:,} are taken" in error["message"]
                assert error["code"] == "context_length_exceeded" and not panic.called
            response = requests.post(url + "/v1/completions", json={"prompt": "x" * 10})
            assert response.status_code == 500 and panic.call_count == 1  # and an answer it is
            panic.reset_mock()
            server.said.clear()  # of the traceback
    with pytest.raises(ValueError, match="--max-input-chars"):
        serve.Settings(max_input_chars=-1)


def test_what_is_said_is_logged_whole_where_that_is_asked_for(tokenizer):
    said = 'Bye, "you"! ' * 20
    script = [*tokenizer.encode(said), tokenizer.specials["<|assistant_end|>"]]
    asked = {"messages": user("It's \u00e9. " * 30)}
    for log in (True, False):
        with serving(tokenizer, 1, Talker(tokenizer, script), max_tokens=400,
                     log_content=log) as (server, url):  # fmt: skip
            requests.post(url + "/v1/chat/completions", json=asked)
            until(lambda: server.said)
            (line,) = server.said
            assert re.search(r" 200 [0-9.]+ s  \d+ tokens, [0-9.]+ tok/s", line)
            found = json.loads(line[line.index("{") :]) if "{" in line else None
            assert found == ({"asked": asked, "answered": [said]} if log else None)
            assert ("Bye" in line) == ("It's" in line) == log


WRONG_REQUESTS = [
    ({"truncation": "always"}, 400, "truncation"), ({"truncation": ["auto"]}, 400, "truncation"),
    ({}, 400, "messages"), ({"messages": []}, 400, "messages"), ({"messages": "x"}, 400, "messages"),
    ({"messages": [1]}, 400, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, 400,
     "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
    ({"messages": user("x") * 501}, 400, "messages"), ({"messages": user("word " * 500)}, 400, "messages"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"), ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"), ({"top_p": 1.5}, 400, "top_p"), ({"top_k": -1}, 400, "top_k"),
    ({"top_k": 1.5}, 400, "top_k"), ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_completion_tokens": "9"}, 400, "max_completion_tokens"), ({"n": 0}, 400, "n"),
    ({"n": 99}, 400, "n"), ({"seed": 1.5}, 400, "seed"), ({"stop": 3}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"), ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"), ({"stream_options": 3}, 400, "stream_options"),
    ({"model": "gpt-4"}, 404, "model"), ({"tools": [{}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"logprobs": True}, 400, "logprobs"), ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"), ({"logprobs": 0}, 400, "logprobs"),
    ({"min_p": 0.1}, 400, "min_p"), ({"repetition_penalty": 1.1}, 400, "repetition_penalty"),
    ({"guided_json": {}}, 400, "guided_json"), ({"bad_words": ["a"]}, 400, "bad_words"),
    ({"add_generation_prompt": False}, 400, "add_generation_prompt"),
]  # fmt: skip


def test_a_wrong_request_is_told_which_field_is_wrong_and_harmless_ones_are_ignored(served):
    _, url = served
    with requests.Session() as session:
        for changes, status, param in WRONG_REQUESTS:
            whole = changes if not changes else {"messages": user("Hi"), **changes}
            response = session.post(url + "/v1/chat/completions", json=whole)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), changes
            assert error["message"] and error["type"] == "invalid_request_error"
        ours = {"user": "me", "metadata": {}, "store": False, "presence_penalty": 0.0, "tools": [],
                "logit_bias": None, "service_tier": "auto", "model": "t", "response_format":
                {"type": "text"}, "temperature": None, "made_up": 1, "max_tokens": 9, "logprobs": None,
                "max_completion_tokens": 2, "repetition_penalty": 1.0}  # fmt: skip
        whole = {"messages": user("Hi"), **ours}
        response = session.post(url + "/v1/chat/completions", json=whole)
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] <= 2
    long = requests.post(url + "/v1/chat/completions", json={"messages": user("word " * 500)})
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert "128" in long.json()["error"]["message"]


def test_the_oldest_turns_go_where_a_client_lets_them(served, tokenizer):
    _, url = served
    turns = [*user("Be kind."), *user("What is it?" * 2), {"role": "assistant", "content": "It."}]
    turns[0]["role"] = "system"
    talk = [turns[0], *turns[1:] * 9, *user("And now?")]
    asked = {"messages": talk, "max_tokens": 3, "temperature": 0}
    for refused in (asked, {**asked, "truncation": "disabled"}):
        error = requests.post(url + "/v1/chat/completions", json=refused).json()["error"]
        assert error["code"] == "context_length_exceeded"
    body = requests.post(url + "/v1/chat/completions", json={**asked, "truncation": "auto"}).json()
    lost = body["usage"]["forgotten_messages"]
    kept = [talk[0], *talk[1 + lost :]]
    assert lost % 2 == 0 and body == {
        **requests.post(url + "/v1/chat/completions", json={**asked, "messages": kept}).json(),
        "id": body["id"], "created": body["created"], "usage": body["usage"],
    }  # fmt: skip
    assert body["usage"]["prompt_tokens"] <= 96, "a quarter of 128 is left to answer"
    more = common.render_prompt(tokenizer, [talk[0], *talk[lost - 1 :]])
    assert len(more) > 96, "no more went than had to"
    short = {"messages": user("Hi"), "max_tokens": 3, "truncation": "auto"}
    body = requests.post(url + "/v1/chat/completions", json=short).json()
    assert "forgotten_messages" not in body["usage"]
    short["messages"] = user("word " * 400)
    error = requests.post(url + "/v1/chat/completions", json=short).json()["error"]
    assert error["code"] == "context_length_exceeded", "a last message that is too long stays so"


def test_an_answer_without_a_question_goes_alone(tokenizer):
    talk = [{"role": "assistant", "content": "Hello! " * 9}, *user("Hi"),
            {"role": "assistant", "content": "Yes?"}, *user("And?")]  # fmt: skip
    kept, prompt_ids = common.newest_turns(tokenizer, talk, 80)
    assert kept == talk[1:] and prompt_ids == common.render_prompt(tokenizer, kept)
    assert common.newest_turns(tokenizer, talk, 1000)[0] == talk
    assert common.newest_turns(tokenizer, talk, 4)[0] == talk[-1:]


@pytest.mark.parametrize("as_parts", [True, False])
def test_a_cut_call_that_is_sent_back_is_left_out(as_parts):
    parts = [{"type": "text", "text": "So"}, {"type": "python", "text": "37*"}]
    shown = serve.Shown()
    text = "".join(shown.feed(**part) for part in [*parts, {"type": "text", "text": ""}])
    given, kept = ([{"type": "text", "text": text}], parts) if as_parts else (parts, None)
    assert serve.calls_in(given, kept) == parts[:1]


def test_what_a_client_sends_does_not_drive_the_terminal_of_the_log(served):
    server, _ = served
    rest = b" / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert " 405 " in raw(server, b"\x1b[31mX\x9b2J" + b"Y" * 50 + rest)
    for _ in range(100):
        if server.said:
            break
        time.sleep(0.02)
    line = server.said[-1]
    assert "x1b[31mX" in line and line.isascii() and line.isprintable() and "YYYYYYYY" not in line


def raw(server, data):
    """Send bytes; return all that comes back, as text."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts).decode("latin-1")


BODY = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}'


def posted(*headers, body=BODY, version="1.1"):
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = HEALTH[:-2] + b"Connection: close\r\n\r\n"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SHAPES = [  # bytes, the statuses of the answers: what follows a doubtful request is not read
    (HEALTH * 2 + LAST, [200] * 3),
    (posted("Transfer-Encoding: chunked", body=CHUNKS) + LAST, [200, 200]),
    (posted("Transfer-Encoding: chunked", body=b"5;a=b\r\n{\"a\":\r\n2\r\n1}\r\n0\r\nX: y\r\n\r\n")
     + LAST, [400, 200]),
    (posted(LENGTH, "Transfer-Encoding: chunked") + LAST, [400]),
    (posted(LENGTH, LENGTH) + LAST, [400]),
    (posted(f"Content-Length: {len(BODY)}, {len(BODY)}") + LAST, [400]),
    (posted(f"Content-Length: +{len(BODY)}") + LAST, [400]),
    (posted("Content-Length: -1") + LAST, [400]),
    (posted(f"Content-Length : {len(BODY)}") + LAST, [400]),
    (posted("Transfer-Encoding: gzip, chunked", body=CHUNKS) + LAST, [400]),
    (posted("Transfer-Encoding: chunked", body=CHUNKS, version="1.0") + LAST, [400]),
    (posted("Transfer-Encoding: chunked", body=b"zz\r\n") + LAST, [400]),
    (posted("Transfer-Encoding: chunked", body=b"-5\r\n") + LAST, [400]),
    (posted("Transfer-Encoding: chunked", body=b"2\r\n{}XX0\r\n\r\n") + LAST, [400]),
    (posted(f"Content-Length: {1 << 40}") + LAST, [413]),
    (posted("Transfer-Encoding: chunked", body=b"fffffffffff\r\n") + LAST, [413]),
    (posted() + LAST, [411]),
    (b"GET /health HTTP/1.1\r\n\r\n" + LAST, [400]),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n" + LAST, [400]),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n" + LAST, [403, 200]),
    (b"GET /health HTTP/1.0\r\n\r\n" + LAST, [200]),
    (HEALTH[:-2] + b"Connection: TE, close\r\n\r\n" + LAST, [200]),
    (HEALTH[:-2] + b"X: a\rContent-Length: 4\r\n\r\n" + LAST, [200, 200]),
    (b"GET http://localhost/health?a HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [200, 200]),
    (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [403, 200]),
    (posted("Transfer-Encoding: Chunked", body=CHUNKS) + b"\r\n" + LAST, [200, 200]),
    (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [404, 200]),
    (b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [405, 200]),
    (b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [405, 200]),
    (b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [200, 200]),
    (b"OPTIONS /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [200, 200]),
    (b"nonsense\r\n\r\n", [400]), (b"GET / HTTP/9.9\r\n\r\n", [505]),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", [414]),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", [431]),
    (posted("Content-Length: 3", body=b"{]}") + LAST, [400, 200]),
    (posted("Content-Length: 3", body=b'"\xff"') + LAST, [400, 200]),
    (posted("Content-Length: 2", body=b"[]") + LAST, [400, 200]),
    (posted("Content-Length: 9", body=b'{"n":NaN}') + LAST, [400, 200]),
    (posted("Content-Length: 90000", body=b"[" * 90000) + LAST, [400, 200]),
]  # fmt: skip


def test_odd_shapes_of_http_get_the_right_code_and_hide_no_second_request(served):
    server, _ = served
    for data, statuses in SHAPES:
        back = raw(server, data)
        found = [int(code) for code in re.findall(r"HTTP/1\.1 (\d+) ", back)]
        assert found == statuses, (data[:200], back[:600])
    old = b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    back = raw(server, old + LAST)
    assert back.count(" 200 ") == 2 and "\r\nConnection: keep-alive\r\n" in back


FULL = {
    "messages": [{"role": "system", "content": "Be kind."}, *user("Hi"),
                 {"role": "assistant", "content": [{"type": "python", "text": "1+1"},
                                                   {"type": "output", "text": "2"}]},
                 {"role": "user", "content": [{"type": "text", "text": "Bye"}]}],
    "model": "t", "temperature": 0.5, "top_k": 5, "top_p": 0.9, "max_tokens": 2, "n": 2, "seed": 3,
    "max_completion_tokens": 2, "stop": ["zz", "y"], "stream": True,
    "stream_options": {"include_usage": True}, "response_format": {"type": "text"}, "tools": [],
    "logit_bias": {}, "logprobs": False,
}  # fmt: skip
FUZZED = [
    ("/v1/chat/completions", {"messages": user("Hi"), "max_tokens": 1}),
    ("/v1/chat/completions", FULL),
    ("/v1/completions", {"prompt": "The cat", "max_tokens": 1, "temperature": 0}),
    ("/v1/completions", {"prompt": ["A", "B"], "max_tokens": 2, "n": 2, "stop": "e", "echo": False}),
]  # fmt: skip
JUNK = [
    None, True, False, 0, -1, 1.5, 1e308, -1e-300, 10**400, 2**63, -(2**63) - 1, math.nan, math.inf,
    "", "\x00", "\ud800", "\udfff\ud800", "a" * 5000, "\u4e2d" * 300, "<|bos|>", [], {}, [[]], [None],
    ["x"] * 600, {"": {}}, {"type": "text"}, {"type": []}, {"role": "user"}, [{"role": {}}], "user",
    "NaN", "1", ["text"], {"a" * 3000: 1}, [0] * 2000, {"type": "text", "text": 3}, -0.0, 1e-9,
    1e-300, 1e-45,
]  # fmt: skip


def places(value):
    """Every (container, key) in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def fuzzed_json(rng, body):
    """The bytes of a request's body after one to three changes of its structure or its text."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(body))
        if not found:
            break
        container, key = rng.choice(found)
        change, junk = rng.randrange(5), json.loads(json.dumps(rng.choice(JUNK)))
        if change < 3:
            container[key] = junk
        elif change == 3:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice((*serve.UNSUPPORTED, "x", "\x00", "prompt"))] = junk
        else:
            container *= rng.choice((2, 30))
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    change = rng.randrange(12)
    if change == 0:  # deep
        deep = rng.choice((b"[", b'{"a":', b"[[1],")) * rng.choice((50, 5000, 60000))
        data = rng.choice(
            (deep, b'{"messages":' + deep, b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}")
        )
    elif change == 1:  # a name twice
        data = (
            data[:-1]
            + b',"max_tokens":'
            + rng.choice((b"1", b"-1", b"1e999", b"01", b"9" * 5000))
            + b"}"
        )
    elif change < 4:
        data = fuzzed_bytes(rng, data)
    return data


def fuzzed_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, much = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 20))
        put = rng.choice(
            (rng.randbytes(much), b"\x00", b"\xff\xfe", b"\r\n", b"\n", b"{", b'"', b"\\u")
        )
        data[at : at + rng.choice((0, much))] = rng.choice((b"", put, put, put * 20))
    return bytes(data)


def fuzzed_request(rng, path, body):
    """A request whose head, framing or bytes are wrong, and what follows it on the connection."""
    data = json.dumps(body).encode()
    size = len(data)
    wrong = rng.choice((0, 1, size - 1, size + 1, -1, -size, 1 << 20, 1 << 40, "+5", "5 5", "0x5", "",
                        "\u0663".encode(), f"{size},{size}", f"{size}\t", "1e1", "9" * 400, "\x00"))  # fmt: skip
    wrong = wrong.decode("latin-1") if isinstance(wrong, bytes) else wrong
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (size, data)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}"]
    change = rng.randrange(10)
    if change == 0:
        lines[2] = f"Content-Length: {wrong}"
    elif change == 1:
        lines.append(rng.choice((f"Content-Length: {wrong}", f"content-length: {size}",
                                 "Transfer-Encoding: chunked", "Transfer-Encoding: x")))  # fmt: skip
    elif change == 2:
        lines[2] = rng.choice(("Transfer-Encoding: chunked", "transfer-encoding: Chunked",
                               "Transfer-Encoding: chunked, chunked", "Transfer-Encoding:"))  # fmt: skip
        data = rng.choice((chunks, chunks, chunks[:-2], b"-1\r\n", b"0" * 2000 + b"\r\n", b"1\r\n", b"0\r\n" +
                           b"a: b\r\n" * 200, fuzzed_bytes(rng, chunks), b"ffffffff\r\n", b"\r\n"))  # fmt: skip
    elif change == 3:
        lines.append(rng.choice(("A: " + "b" * 70000, *["A: b\r\n" * 150, "A" * 3000 + ": b", ": b", "A : b",
                                 " folded", "A: \x00", "A\x00: b", "A: \xff\x80", "A", "\x0b: 1"])))  # fmt: skip
    elif change == 4:
        lines.append(rng.choice(("Host: localhost", "Host: evil.example", "Origin: null", "Expect: 100-continue",
                                 "Origin: \xff", "Connection: \xff", "Expect: x", "Authorization: \xff \xff")))  # fmt: skip
    elif change == 5:
        lines[1] = "Host: " + rng.choice(("", "[", "[::1", "[::1]:x", "a@localhost", "localhost:99999", "localhost/",
                                          "\xff", "\x00", "127.0.0.1:" + "9" * 5000, "1" * 5000, "::", "%00"))  # fmt: skip
    elif change == 6:
        method = rng.choice(
            ("GET", "HEAD", "PUT", "OPTIONS", "post", "X" * 3000, "P\x00ST", "\xff")
        )
        where = rng.choice(
            (
                path,
                "/",
                "/health",
                "/metrics?x=\x00",
                "*",
                "//",
                "http://x/",
                "/%00",
                "/" + "a" * 70000,
            )
        )
        lines[0] = f"{method} {where} HTTP/" + rng.choice(
            ("1.1", "1.0", "0.9", "9.9", "1.\u00b2", "x", "1.1.1", "")
        )
    whole = "\r\n".join([*lines, "", ""]).encode("latin-1") + data
    if change == 7:
        whole = fuzzed_bytes(rng, whole)
    elif change == 8:
        whole += rng.choice(
            (b"\x00" * 100, b"GET", b"\r\n\r\n", rng.randbytes(50), b"}" + whole, whole * 3)
        )
    elif change == 9:
        whole = whole.replace(
            b"\r\n", rng.choice((b"\n", b"\r", b"\r\n ", b"\r\n\r\n")), rng.choice((1, 99))
        )
    return whole + rng.choice((b"", LAST))


def check_status(status, what):
    """A fuzzed request may succeed or be at fault; 505 is the right word for HTTP/9.9."""
    assert status in (200, 100, 505) or 400 <= status < 500, what


def fuzz_bodies(server, seed, count, codes):
    """Send bodies that are wrong in well-formed requests, many on one connection."""
    rng, connection = random.Random(seed), None
    for _ in range(count):
        path, body = rng.choice(FUZZED)
        data = fuzzed_json(rng, body)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request("POST", path, data)
        response = connection.getresponse()
        text = response.read()
        check_status(response.status, (data[:500], text))
        codes[response.status] += 1
        if response.status >= 400:
            error = json.loads(text)["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}
        elif response.headers["Content-Type"].startswith("text/event-stream"):
            assert text.endswith(b"data: [DONE]\n\n") and b'"error"' not in text, text
        else:
            assert json.loads(text)["choices"]
        if response.will_close:
            connection.close()
            connection = None


def fuzz_framing(server, seed, count, codes):
    """Send what is no well-formed request, each on a connection of its own, to its end."""
    rng = random.Random(seed)
    for _ in range(count):
        data, began = fuzzed_request(rng, *rng.choice(FUZZED)), time.monotonic()
        address = "127.0.0.1", server.server_port
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(data)
            if rng.random() < 0.9:  # else it waits for what may come, and says so after a while
                connection.shutdown(socket.SHUT_WR)
            back = b""
            while part := connection.recv(1 << 16):
                back += part
        assert time.monotonic() - began < 30, data[:500]
        found = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z -]*\r\n", back)
        for code in found or ["closed" if not back else "no head"]:
            if found:
                check_status(int(code), (data[:500], back))
            codes[int(code) if found else code] += 1
        assert (
            b'"code": "server_error"' not in back
            and b'"error": {"message": "this request' not in back
        )


@pytest.fixture
def quick_turns():
    """Let threads take turns ten times as often: here clients and server share a process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("count", "seed"),
    [(2000, 1), *(pytest.param(25000, s, marks=pytest.mark.slow) for s in (2, 3, 4, 5))],
)
def test_malformed_requests_are_refused_and_the_next_is_served(
    tokenizer, count, seed, capsys, quick_turns
):
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 64, "n_layer": 1}
    asked = {"messages": user("Hi"), "temperature": 0, "max_tokens": 8}
    began, clients, codes = time.monotonic(), 4, collections.Counter()
    with (  # one that waits for nobody, and one that does not close connections of busy clients
        serving(tokenizer, 8, random_model(**shape)) as (hasty, hasty_url),
        serving(tokenizer, 8, random_model(**shape)) as (patient, url),
    ):

        def answers():
            paths = [one + "/v1/chat/completions" for one in (url, hasty_url)]
            return [requests.post(path, json=asked).json()["choices"] for path in paths]

        right = answers()
        hasty.settings.timeout_s = 0.25
        with concurrent.futures.ThreadPoolExecutor(2 * clients) as pool:
            each = count // 2 // clients
            fuzzers = ((fuzz_bodies, patient), (fuzz_framing, hasty))
            runs = [pool.submit(fuzz, server, 100 * seed + i, each, codes)
                    for i in range(clients) for fuzz, server in fuzzers]  # fmt: skip
            for run in concurrent.futures.as_completed(runs):
                run.result()
        hasty.settings.timeout_s = 30.0
        assert answers() == right
    assert "Traceback" not in capsys.readouterr().err
    assert codes[400] > count / 10 and codes[200] > count / 50, codes
    with capsys.disabled():
        if count > 2000:
            print(f"{time.monotonic() - began:.0f} s", sorted(codes.items(), key=str))


def test_a_slow_sender_is_told_and_holds_no_thread_for_long(tokenizer):
    with serving(tokenizer, timeout_s=0.3) as (server, url):
        began = time.monotonic()
        assert "HTTP/1.1 408 " in raw(server, posted(LENGTH, body=BODY[:5]))
        late = "HTTP/1.1 408 "
        assert raw(server, b"GET /health HT").startswith(late)
        told = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health")
        assert told.startswith("HTTP/1.1 200 ") and told.count(late) == 1
        assert raw(server, b"") == "", "who says nothing hears nothing"
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            with contextlib.suppress(OSError):
                for _ in range(40):  # a byte now and then does not prolong it
                    connection.sendall(b"G")
                    time.sleep(0.05)
            assert time.monotonic() - began < 10
        assert requests.get(url + "/health").status_code == 200


def test_a_client_that_goes_away_frees_its_slot(tokenizer):
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 4096, "n_layer": 1}
    with serving(tokenizer, 2, random_model(**shape), max_tokens=4000) as (server, _):
        server.model.engine.stops.clear()
        worker = server.model.worker
        for stream in (True, False):
            asked = json.dumps({"messages": user("Hi"), "stream": stream}).encode()
            data = posted(f"Content-Length: {len(asked)}", body=asked)
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(data)
                until(lambda: server.model.engine.decoding)
                assert worker.open == 1
            until(lambda: not (worker.open or server.model.engine.load))
            assert worker.generated < 3000, "it did not just run to its end"


def test_a_client_that_does_not_read_frees_its_slot(tokenizer):
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 4096, "n_layer": 1}
    options = {"max_tokens": 4000, "timeout_s": 0.5}
    with serving(tokenizer, 2, random_model(**shape), **options) as (server, url):
        engine, worker = server.model.engine, server.model.worker
        engine.stops.clear()
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections' too
        asked = json.dumps({"messages": user("Hi"), "stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.server_port))
            connection.sendall(posted(f"Content-Length: {len(asked)}", body=asked))
            until(lambda: engine.decoding)
            beside = {"messages": user("Hi"), "max_tokens": 2}
            assert requests.post(url + "/v1/chat/completions", json=beside).status_code == 200
            until(lambda: not (worker.open or engine.load))
        assert worker.generated < 3500, "it did not just run to its end"


def test_one_connection_too_many_is_told_so(tokenizer):
    with serving(tokenizer, max_connections=2) as (server, url):
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                address = "127.0.0.1", server.server_port
                connection = stack.enter_context(socket.create_connection(address, timeout=10))
                connection.sendall(HEALTH)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            head, _, body = raw(server, b"").partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 503 ") and "Retry-After: 1\r\n" in head
            assert json.loads(body)["error"]["message"].startswith("too many connections")
        for _ in range(500):
            if server.free._value == 2:
                break
            time.sleep(0.01)
        assert requests.get(url + "/health").status_code == 200


def reset(connection):
    """Close a connection so that the other side's next read or write fails."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def test_a_client_may_go_away_at_any_moment(served):
    server, url = served
    asked = json.dumps({"messages": user("Hi"), "stream": True}).encode()
    whole = posted(f"Content-Length: {len(asked)}", body=asked)
    head = whole.index(b"\r\n\r\n")
    cuts = [0, 1, 20, head, head + 2, head + 4, head + 9, len(whole) - 1, len(whole)]
    sent = [(whole[:cut], 0) for cut in cuts] + [(b"x\r\n\r\n", 0), (posted("Bad : 1"), 0)]
    for data, read in [*sent, (whole, 1), (whole * 3, 1), (HEALTH * 50, 1)]:
        for leave in (reset, socket.socket.close):
            connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
            connection.sendall(data)
            if read:
                connection.recv(read)
            leave(connection)
    assert requests.get(url + "/health").status_code == 200  # and `serving` looks for tracebacks
    for _ in range(500):
        if server.free._value == server.settings.max_connections:
            break
        time.sleep(0.01)
    assert server.free._value == server.settings.max_connections, "every thread has ended"


def test_a_log_that_cannot_be_written_stops_no_request(served, monkeypatch, capsys):
    server, url = served
    del server.say  # the real one
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", closed)
    assert requests.get(url + "/health").status_code == 200
    until(lambda: closed.getvalue().endswith("\n"))
    assert re.fullmatch(r"[0-9:]{8} 127\.0\.0\.1 GET /health 200 \d+\.\d\d s\n", closed.getvalue())
    closed.close()
    with requests.Session() as session:
        assert [session.get(url + "/health").status_code for _ in range(3)] == [200] * 3
    assert raw(server, b"nonsense\r\n\r\n").startswith("HTTP/1.1 400 ")
    assert "Traceback" not in capsys.readouterr().err
    server.say = server.said.append


def test_a_full_queue_is_said_and_those_in_it_are_answered(tokenizer):
    with serving(tokenizer, 1, max_waiting=1) as (server, url):
        server.model.engine.stops.clear()
        asked = {"messages": user("Hi"), "max_tokens": 100}

        def ask(_):
            return requests.post(url + "/v1/chat/completions", json=asked)

        engine, go = server.model.engine, threading.Event()
        step = engine.step
        engine.step = lambda: go.wait(60) and step()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask, i) for i in range(8)]
            until(lambda: sum(one.done() for one in asking) == 6)
            go.set()
            responses = [one.result() for one in asking]
        codes = collections.Counter(response.status_code for response in responses)
        assert codes == {200: 2, 429: 6}
        never = requests.post(url + "/v1/chat/completions", json={**asked, "n": 3})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        refused = next(r for r in responses if r.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"


def test_who_has_an_answer_has_left_the_queue(tokenizer):
    with serving(tokenizer, 1, max_waiting=0) as (_, url), requests.Session() as session:
        for stream in (True, False) * 15:
            asked = {"messages": user("Hi"), "max_tokens": 2, "stream": stream}
            assert session.post(url + "/v1/chat/completions", json=asked).status_code == 200


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """Clients who ask, stop reading, go away and ask nonsense, and note what is not as it should."""

    def __init__(self, server, url, known, seconds, often):
        self.server, self.url, self.known, self.often = server, url, known, often
        self.until, self.wrong, self.done = time.monotonic() + seconds, [], collections.Counter()

    def enough(self):
        """Whether every act was done often enough, or a slow machine has had a minute more."""
        least = min(self.done[name] for name in ("whole", "stream", "leave", "cancel"))
        return least >= self.often or time.monotonic() > self.until + 60

    def client(self, seed):
        rng, session = random.Random(seed), requests.Session()
        acts = [self.whole, self.stream, self.stream, self.leave, self.cancel, self.nonsense]
        try:
            while time.monotonic() < self.until or not self.enough():
                act = rng.choice(acts)
                act(rng, session, rng.choice(list(self.known)))
                self.done[act.__name__] += 1
        except Exception as error:  # noqa: BLE001
            self.wrong.append(f"{act.__name__}: {error!r}")

    def ask(self, rng, session, text, **changes):
        """Ask until the queue has room; a refusal must be for want of room, and say when to come."""
        asked = {"messages": user(text), "temperature": 0, "max_tokens": 20, **changes}
        while True:
            response = session.post(
                self.url + "/v1/chat/completions", json=asked, stream=True, timeout=60
            )
            if response.status_code != 429:
                return response
            busy = int(response.json()["error"]["message"].split()[0])
            room = self.server.model.worker.room
            assert room - asked.get("n", 1) < busy <= room, (busy, room)
            assert 1 <= int(response.headers["Retry-After"]) <= 600
            self.done["full"] += 1
            time.sleep(rng.uniform(0.05, 0.3))

    def whole(self, rng, session, text):
        response = self.ask(rng, session, text, n=rng.choice((1, 1, 2)))
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            assert choice["message"]["parts"] == self.known[text]

    def stream(self, rng, session, text):
        response = self.ask(rng, session, text, stream=True)
        deltas = [c["choices"][0]["delta"] for c in events(response)]
        said = "".join(d["part"]["text"] for d in deltas if "part" in d)
        assert said == "".join(part["text"] for part in self.known[text])

    def leave(self, rng, session, text):
        """Send a request, or a part of it, read a little of the answer, and be gone."""
        asked = {"messages": user(text), "stream": rng.random() < 0.7}
        asked = json.dumps({**asked, "max_tokens": 60}).encode()
        data = posted(f"Content-Length: {len(asked)}", body=asked)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.2 else data
        address = "127.0.0.1", self.server.server_port
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(data)
            connection.settimeout(rng.uniform(0.01, 0.3))
            with contextlib.suppress(TimeoutError):
                connection.recv(rng.randrange(1, 2000))
            rng.choice((reset, socket.socket.close))(connection)

    def cancel(self, rng, session, text):
        with self.ask(rng, session, text, stream=True, max_tokens=100) as response:
            for _ in zip(range(rng.randrange(1, 12)), response.iter_lines()):
                pass

    def nonsense(self, rng, session, text):
        changes, status, param = rng.choice(WRONG_REQUESTS)
        whole = changes if not changes else {"messages": user(text), **changes}
        response = session.post(self.url + "/v1/chat/completions", json=whole, timeout=60)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("clients", "seconds"), [(16, 4), pytest.param(64, 60, marks=pytest.mark.slow)]
)
def test_many_who_come_and_go_get_what_each_gets_alone_and_leave_nothing(
    tokenizer, clients, seconds, capsys
):
    texts = [f"{word} {number}?" for word in ("Who is", "Say") for number in range(6)]
    known = {text: reply_alone(tokenizer, user(text), 20)[1] for text in texts}
    with serving(tokenizer, 6, max_waiting=clients // 4) as (server, url):
        crowd = Crowd(server, url, known, seconds, clients)
        threads = [threading.Thread(target=crowd.client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        warm = resident_bytes()
        for thread in threads:
            thread.join(seconds + 150)
        assert not crowd.wrong, crowd.wrong[:5]
        assert resident_bytes() - warm < max(30e6, 0.1 * warm)
        assert min(crowd.done[name] for name in ("whole", "stream", "leave", "cancel")) >= clients
        until(lambda: "requests_open 0" in requests.get(url + "/metrics").text)
        told = requests.get(url + "/metrics").text
        assert "nanochat_requests_waiting 0" in told
        assert requests.get(url + "/health").json()["status"] == "ready"
        answer = requests.post(url + "/v1/chat/completions", json={"messages": user(texts[0]),
                               "temperature": 0, "max_tokens": 20}).json()  # fmt: skip
        assert answer["choices"][0]["message"]["parts"] == known[texts[0]]
        with capsys.disabled():
            if seconds > 10:
                print(dict(crowd.done), f"{warm / 1e6:.0f} MB, {resident_bytes() / 1e6:.0f} MB")
    assert "Traceback" not in capsys.readouterr().err


def test_a_failure_of_the_engine_is_said_and_the_next_request_is_served(
    served, monkeypatch, capsys
):
    server, url = served
    engine, asked = server.model.engine, {"messages": user("Hi"), "temperature": 0}
    right = requests.post(url + "/v1/chat/completions", json=asked).json()["choices"]
    monkeypatch.setattr(engine.model, "hidden", lambda *_: 1 / 0)
    response = requests.post(url + "/v1/chat/completions", json=asked)
    assert response.status_code == 500 and "again" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert requests.post(url + "/v1/chat/completions", json=asked).json()["choices"] == right
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_keys_origins_and_hosts_are_checked(tokenizer):
    options = {"api_key": "secret", "cors_origin": "https://a.example", "allow_host": "b.example"}
    with serving(tokenizer, **options) as (_, url):
        asked = {"messages": user("Hi"), "max_tokens": 1}

        def status(**headers):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            return requests.post(url + "/v1/chat/completions", json=asked, headers=names)

        assert status().status_code == status(Authorization="Bearer wrong").status_code == 401
        assert status(Authorization="Basic secret").status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert status(**right).status_code == 200
        for origin, code in (("https://evil.example", 403), ("null", 403), (url, 200),
                             ("https://a.example", 200)):  # fmt: skip
            response = status(**right, Origin=origin)
            assert response.status_code == code, origin
            allowed = response.headers.get("Access-Control-Allow-Origin")
            assert allowed == ("https://a.example" if "a.example" in origin else None)
        assert status(**right, Host="b.example").status_code == 200
        assert status(**right, Host="c.example").status_code == 403
        assert requests.get(url + "/health").status_code == requests.get(url).status_code == 200
        assert requests.get(url + "/v1/models").status_code == 401


def test_a_preflight_lets_the_headers_of_openais_client_through(tokenizer):
    ours = "https://a.example"
    with serving(tokenizer, cors_origin=ours, api_key="secret") as (_, url):

        def preflight(names, origin=ours):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
                       "Access-Control-Request-Headers": names}  # fmt: skip
            return requests.options(url + "/v1/chat/completions", headers=headers)

        names = "authorization, content-type,x-stainless-os,x-stainless-retry-count"
        response = preflight(names)
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Headers"] == names
        assert response.headers["Access-Control-Allow-Origin"] == ours
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        for names in ("x-a, <b>", "x a", "", ","):
            assert "Access-Control-Allow-Headers" not in preflight(names).headers
        assert preflight("x-a", "https://evil.example").status_code == 403


def test_a_server_for_others_says_where_it_is_and_that_it_is_open(base_dir, monkeypatch, capsys):
    everywhere, asked = serve.Settings(host="0.0.0.0", port=0, tag="none"), []
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "connect", lambda s, to: asked.append((s.type, to[0])))
        patched.setattr(socket.socket, "getsockname", lambda _: ("192.168.1.5", 5))
        names = ("127.0.1.1", "10.0.0.7", "192.168.1.5")
        found = [(socket.AF_INET, 1, 0, "", (name, 0)) for name in names]
        patched.setattr(socket, "getaddrinfo", lambda *_: found)
        assert serve.addresses(everywhere, 80) == [
            f"http://{host}:80" for host in ("127.0.0.1", "192.168.1.5", "10.0.0.7")
        ]
    assert asked == [(socket.SOCK_DGRAM, "192.0.2.1")]  # a datagram's way: nothing is sent
    unknown = unittest.mock.Mock(side_effect=socket.gaierror(-2, "Name or service not known"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "connect", unittest.mock.Mock(side_effect=OSError))
        assert serve.addresses(everywhere, 80) == ["http://127.0.0.1:80"]
    for key in ("", "secret"):
        with pytest.raises(common.Stop):
            serve.main(dataclasses.replace(everywhere, api_key=key))
        out = capsys.readouterr().out
        assert re.search(r"serve: http://127\.0\.0\.1:\d+\n", out)
        assert ("anyone who reaches this machine can use it" in out) == (not key)


def test_the_page_runs_its_own_script_alone(served):
    _, url = served
    response = requests.get(url)
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    page = response.text
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert not re.findall(r"(?:src|href)=.?(?:https?:)?//", page)
    assert set(re.findall(r"https?://[a-z0-9.]+", page)) == {"http://www.w3.org"}  # SVG's name


def test_a_page_of_ones_own_is_read_at_each_request(tmp_path, tokenizer):
    path = tmp_path / "page.html"
    path.write_text("<script>one()</script>\u00e9", "utf-8")
    with serving(tokenizer, page=str(path)) as (_, url):
        for text in ("<script>one()</script>\u00e9", "<script>two()</script>"):
            path.write_text(text, "utf-8")
            response = requests.get(url)
            assert response.content.decode() == text
            digest = base64.b64encode(hashlib.sha256(text[8:13].encode()).digest()).decode()
            assert f"script-src 'sha256-{digest}'" in response.headers["Content-Security-Policy"]
        path.unlink()
        response = requests.get(url)
        assert response.status_code == 503 and "cannot be read" in response.text
    with pytest.raises(ValueError, match="cannot be read"):
        serve.Settings(page=str(path))


def test_the_training_view_reads_what_a_run_has_written(served, base_dir):
    _, url = served
    assert requests.get(url + "/training").json() == {"tag": "main", "curves": {}, "scores": {}}
    folder = common.run_dir("main")
    lines = [{"stage": "base", "step": i, "time": 1, "loss": 9 - i / 1000} for i in range(1000)]
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", lines)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '{"stage": "base", "step": 5, "loss": NaN}\n[1]\n3\n\n{"stage": [], "step": 1, "x": 1}\n'
        )
        file.write('{"stage": "ba')
    (folder / "eval").mkdir()
    scores = {"tasks": {"facts": {"score": 0.5, "low": 0.4, "high": 0.6, "items": 10}}}
    (folder / "eval" / "sft.json").write_text(json.dumps(scores))
    (folder / "eval" / "rl.json").write_text('{"tasks": {"facts": 3}}')
    found = requests.get(url + "/training").json()
    points = found["curves"]["base"]["loss"]
    assert points[0] == [0, 9] and points[-1] == [999, 8.001] and 200 < len(points) < 310
    assert list(found["curves"]["base"]) == ["loss"]
    assert found["scores"] == {"sft": {"facts": [0.5, 0.4, 0.6]}}


def test_the_server_tells_how_it_is(served):
    server, url = served
    health = requests.get(url + "/health").json()
    assert health.pop("memory_bytes") > 1e6
    assert health == {
        "status": "ready",
        "tag": "main",
        "model": "t-sft",
        "stage": "sft",
        "device": "cpu",
    }
    config = requests.get(url + "/config").json()
    assert config["defaults"]["temperature"] == server.settings.temperature
    assert config["context"] == 128 and config["model"] == "t-sft"
    asked = {"messages": user("Hi"), "max_tokens": 3}
    requests.post(url + "/v1/chat/completions", json=asked)
    label = 'nanochat_requests_total{path="/v1/chat/completions",code="200"}'
    until(lambda: label in requests.get(url + "/metrics").text)  # it is counted last
    values = dict(line.rsplit(" ", 1) for line in requests.get(url + "/metrics").text.splitlines()
                  if not line.startswith("#"))  # fmt: skip
    for name in ("request", "first_token"):
        found = [(key, int(v)) for key, v in values.items() if f"{name}_seconds_bucket" in key]
        assert [float(key.split('"')[1]) for key, _ in found][-2:] == [60, math.inf]
        counts = [v for _, v in found]
        assert counts == sorted(counts) and counts[-1] == 1 and len(counts) == len(serve.BUCKETS)
        took = float(values[f"nanochat_{name}_seconds_sum"])
        assert counts == [int(took <= float(bound)) for bound in serve.BUCKETS]
        assert values[f"nanochat_{name}_seconds_count"] == "1"
    label = 'nanochat_requests_total{path="/v1/chat/completions",code="200"}'
    assert values[label] == "1" and values["nanochat_slots"] == "4"
    assert 1 <= int(values["nanochat_tokens_generated_total"]) <= 3
    server.model.worker.generated = 123_456_789
    assert "nanochat_tokens_generated_total 123456789\n" in requests.get(url + "/metrics").text
    model, server.model = server.model, None
    assert requests.get(url + "/health").json()["status"] == "loading"
    assert requests.post(url + "/v1/chat/completions", json=asked).status_code == 503
    server.model, server.draining = model, True
    assert requests.get(url + "/health").json()["status"] == "draining"
    assert requests.post(url + "/v1/chat/completions", json=asked).status_code == 503


def test_a_server_whose_steps_all_fail_says_so(tokenizer):
    class Failing:
        """A model whose device is gone."""

        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            return getattr(self.model, name)

        def hidden(self, *_):
            raise failure

    class PanicException(BaseException):
        """What a package in Rust raises."""

    with serving(tokenizer, 2) as (server, url):
        engine, asked = server.model.engine, {"messages": user("Hi"), "max_tokens": 2}
        sound, engine.model = engine.model, Failing(engine.model)
        for failure in (RuntimeError("gone"), PanicException(), RuntimeError("gone")):
            assert requests.get(url + "/health").json()["status"] == "ready"
            two = {**asked, "n": 2}
            assert requests.post(url + "/v1/chat/completions", json=two).status_code == 500
        response = requests.get(url + "/health")
        assert (response.status_code, response.json()["status"]) == (503, "failing")
        streamed = requests.post(url + "/v1/chat/completions", json={**asked, "stream": True})
        last = streamed.text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        engine.model = sound
        assert requests.post(url + "/v1/chat/completions", json=asked).status_code == 200
        assert requests.get(url + "/health").status_code == 200


def test_an_engine_outlives_its_log_and_nobody_waits_for_one_that_has_ended(tokenizer, monkeypatch):
    class Closed:
        """A log whose reader is gone."""

        def write(self, _):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    def fail():
        raise RuntimeError("gone")

    asked = {"messages": user("Hi"), "max_tokens": 2}
    with serving(tokenizer, 2) as (server, url):
        worker, path = server.model.worker, url + "/v1/chat/completions"
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", Closed())
            patched.setattr(worker.engine, "step", fail)
            assert requests.post(path, json=asked).status_code == 500
        assert requests.post(path, json=asked).status_code == 200
        worker.stop()
        response = requests.post(path, json=asked, timeout=20)
        assert response.status_code == 500 and "engine has ended" in response.text


def test_a_second_signal_ends_a_server_at_once(chat_run):
    code = ("import common, serve, time\n"
            "common.Engine.step = lambda self: time.sleep(0.1) or []\n"
            "serve.main(serve.Settings(tag='t', stage='base', port=0, device='cpu'))")  # fmt: skip
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        url = next(line for line in process.stdout if "http" in line).split()[-1]
        assert any("ready" in line for line in process.stdout)
        asked = {"prompt": "The", "max_tokens": 2}
        answer = pool.submit(requests.post, url + "/v1/completions", json=asked)
        until(lambda: "nanochat_requests_open 1" in requests.get(url + "/metrics").text)
        process.terminate()
        assert any("1 answers may end" in line for line in process.stdout)
        assert requests.get(url + "/health").json()["status"] == "draining"
        process.terminate()
        assert process.wait(5) == 0
        with pytest.raises(requests.ConnectionError):
            answer.result()


def test_sigterm_ends_a_server_that_still_loads_at_once(base_dir):
    code = ("import serve, time; serve.load = lambda _: time.sleep(60); "
            "serve.main(serve.Settings(port=0))")  # fmt: skip
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[-1]
        assert requests.get(url + "/health").json()["status"] == "loading"
        process.terminate()
        assert process.wait(10) == 0


def test_sigterm_waits_for_an_answer_that_is_not_yet_sent(chat_run):
    code = ("import serve, time; whole = serve.Answer.whole\n"
            "serve.Answer.whole = lambda self: print('made', flush=True) or time.sleep(1) or whole(self)\n"
            "serve.main(serve.Settings(tag='t', stage='base', port=0, device='cpu'))")  # fmt: skip
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        url = next(line for line in process.stdout if "http" in line).split()[-1]
        assert any("ready" in line for line in process.stdout)
        asked = {"prompt": "The", "max_tokens": 2}
        answer = pool.submit(requests.post, url + "/v1/completions", json=asked)
        assert any("made" in line for line in process.stdout)
        process.terminate()
        assert answer.result().json()["usage"]["completion_tokens"]
        log = process.stdout.read()
        assert re.search("POST /v1/completions 200 .* tok/s\n$", log)
        assert process.wait(20) == 0


def test_sigterm_lets_what_runs_end(chat_run):
    command = [sys.executable, "serve.py", "--tag=t", "--stage=base", "--port=0", "--device=cpu"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        url = next(line for line in process.stdout if "http" in line).split()[-1]
        assert any("ready" in line for line in process.stdout)
        asked = {"prompt": "The", "max_tokens": 40, "stream": True}
        with requests.post(url + "/v1/completions", json=asked, stream=True) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = b"\n".join(lines)
        assert text.rstrip().endswith(b"[DONE]")
        assert process.wait(20) == 0


def test_weights_of_8_bits_are_served_and_no_compiler_stops_that(chat_run, monkeypatch, capsys):
    options = {"tag": "t", "stage": "base", "device": "cpu", "int8": True}
    failing = unittest.mock.Mock(side_effect=RuntimeError("no g++"))
    monkeypatch.setattr(common.Engine, "compile", failing)
    monkeypatch.setattr(serve, "compile_or_not", lambda choice, *_: choice == "yes")
    engine, stage = serve.load(serve.Settings(compile="yes", **options))
    assert failing.called and "RuntimeError" in capsys.readouterr().out and stage == "base"
    assert engine.model.head.weight.dtype == torch.int8 and engine.next_logits is None
    serve.load(serve.Settings(**options))
    assert failing.call_count == 1, "a small model is not compiled unasked"
    with pytest.raises(ValueError, match="--int8"):
        serve.Settings(export="x", **options)
    ids = [engine.tokenizer.bos, 5, 6]
    assert len(list(engine.generate(greedy(ids, 5)))) == 5
    chat_engine, _ = chat.load(chat.Settings(**options))
    assert chat_engine.model.head.weight.dtype == torch.int8


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "n_layer": 3}])
def test_an_exported_model_is_the_same_to_transformers(tokenizer, tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat model")
    shape = {**CONFIGS["bare"], "vocab_size": tokenizer.vocab_size, **changes}
    model = random_model(**shape)
    serve.export(tmp_path / "out", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    ids = torch.randint(tokenizer.vocab_size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [
        "The cat sat.",
        "  two  spaces\n\n\tand 12345 tabs",
        "\u00e9\u4e2d\u6587 \U0001f600",
        "don't WON'T",
    ]
    for text in texts:
        assert words.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert words.decode(tokenizer.encode(text)) == text
    chat_ = [{"role": "system", "content": "Be kind."}, *user("Hi"),
             {"role": "assistant", "content": "Yes?"}, *user("Bye")]  # fmt: skip
    rendered = words.apply_chat_template(chat_, add_generation_prompt=True, tokenize=False)
    assert words.encode(rendered, add_special_tokens=False) == common.render_prompt(
        tokenizer, chat_
    )
    assert words.eos_token_id == tokenizer.specials["<|assistant_end|>"]


def test_a_model_that_the_format_cannot_hold_is_not_exported(tokenizer, tmp_path):
    bare = {**CONFIGS["bare"], "vocab_size": tokenizer.vocab_size}
    for changes, flag in (({"smear": True}, "--no-smear"), ({"skip": True}, "--no-skip"),
                          ({"value_embeds": True}, "--no-value-embeds"),
                          ({"window_pattern": "SL"}, "--window-pattern=L"),
                          ({"bigram_rows": 64}, "--bigram-rows=0"),
                          ({"qk_scale": 1.2}, "--qk-scale=1")):  # fmt: skip
        with pytest.raises(common.Stop, match=flag):
            serve.export(tmp_path / "out", random_model(**{**bare, **changes}), tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_export_of_a_run_is_one_command(chat_run, tmp_path, capsys):
    out = tmp_path / "hf"
    with pytest.raises(common.Stop, match="train one with .*--no-smear.*--bigram-rows=0"):
        serve.main(serve.Settings(tag="t", export=str(out), device="cpu"))
    plain = {"smear": False, "value_embeds": False, "skip": False, "qk_scale": 1.0}
    shape = {"max_seq_len": 64, "total_batch_size": 192, "bigram_rows": 0}
    pretrain.main(tiny_pretrain(restart=True, **shape, **plain))
    serve.main(serve.Settings(tag="t", export=str(out), device="cpu", dtype="float32"))
    assert capsys.readouterr().out.endswith(f"written: {out}\n")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = common.load_model(common.find_checkpoint("t", "base"), CPU, torch.float32)
    ids = torch.randint(model.config.vocab_size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


class Talker(torch.nn.Module):
    """Stands in for a model: says one text to whatever it is asked, a token in `pause` seconds."""

    def __init__(self, tokenizer, script, pause=0.0, context=1024):
        super().__init__()
        self.config = common.GPTConfig(tokenizer.vocab_size, 1, 8, 1, 1, context)
        self.embed = torch.nn.Embedding(1, 1)
        self.script, self.pause, self.dtype = script, pause, torch.float32
        self.begins = tokenizer.specials["<|assistant_start|>"]

    def cast_weights(self):
        return self

    def hidden(self, ids, cache, counts=None):
        positions = cache.begin(ids).positions
        time.sleep(self.pause)
        said = torch.zeros(*ids.shape, 1)  # tokens since the assistant began
        for b, row in enumerate(positions.tolist()):
            begins = (cache.ids[b] == self.begins).nonzero()[:, 0]
            for t, position in enumerate(row):
                before = begins[begins <= position].tolist()
                said[b, t] = position - before[-1] if before else 0
        return said

    def logits(self, hidden):
        index = hidden[..., 0].long().clamp(max=len(self.script) - 1)
        chosen = torch.tensor(self.script)[index]
        return 100.0 * F.one_hot(chosen, self.config.vocab_size).float()


ANSWER = """Hello **you**, <b>not bold</b> <script>document.title = "owned"</script>

- one
- two

| a | b |
| - | - |
| 1 | 2 |

```
x = 1
```
"""


def answer_script(tokenizer, text=ANSWER):
    """A text after a call of the calculator."""
    special = tokenizer.specials
    call = [special["<|python_start|>"], *tokenizer.encode("37*12"), special["<|python_end|>"]]
    gap = [7] * (2 + len(tokenizer.encode("444")))
    return [*call, *gap, *tokenizer.encode(text), special["<|assistant_end|>"]]


@pytest.fixture(scope="module")
def chromium():
    driver = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("Chromium is not installed")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, url, **options):
    """The page in a browser of its own; no error of its script is let pass."""
    context = chromium.new_context(viewport={"width": 1024, "height": 768}, **options)
    errors = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("dialog", lambda dialog: dialog.accept("Renamed"))
    context.set_default_timeout(10_000)
    page = context.new_page()
    try:
        page.goto(url)
        yield page
        assert not errors
    finally:
        context.close()


def has_value(page, field, value):
    """Wait until a field of the settings has a value, which /config or another tab brings."""
    found = pytest.importorskip("playwright.sync_api").expect(page.locator(field))
    found.to_have_value(value, timeout=10_000)


@contextlib.contextmanager
def talking(tokenizer, chromium, model, slots, **options):
    """A server of a model and its page; yields the server, its address and the page."""
    with (
        serving(tokenizer, slots, model, **options) as (server, url),
        opened(chromium, url) as page,
    ):
        yield server, url, page


def answered(page, number):
    """Wait for the answer with this number to be whole; return its element."""
    article = page.locator("article.assistant").nth(number)
    article.get_by_text("a second").wait_for()
    return article


def send(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


@pytest.fixture
def cut(monkeypatch):
    """What shuts all connections that servers have taken."""
    connections, setup = [], serve.Handler.setup
    monkeypatch.setattr(
        serve.Handler, "setup", lambda self: connections.append(self.request) or setup(self)
    )

    def shut():
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    return shut


@pytest.mark.browser
def test_the_page_asks_streams_and_keeps_what_was_said(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer), pause=0.03)
    with talking(tokenizer, chromium, model, 2, max_tokens=400) as (*_, page):
        page.fill("#text", "<img src=x onerror=\"document.title='owned'\">")
        page.press("#text", "Enter")
        said = page.locator("article.assistant .said")
        said.get_by_text("Hello").wait_for()
        lengths = []
        for _ in range(30):
            lengths.append(len(said.inner_text()))
            page.wait_for_timeout(20)
        assert len(set(lengths)) > 3, "it comes piece by piece"
        first = answered(page, 0)
        assert page.title() != "owned" and "<img" in page.locator("article.user").inner_text()
        assert first.locator(".card").inner_text().split() == ["37*12", "=", "444"]
        assert first.locator("strong").inner_text() == "you"
        assert "<b>not bold</b> <script>" in first.inner_text()
        assert first.locator("li").count() == 2 and first.locator("td").count() == 2
        assert first.locator("pre code").inner_text() == "x = 1"
        assert first.inner_text().endswith("a second, finished")

        page.fill("#text", "And again?")  # a second turn, by the button
        page.click("#send")
        answered(page, 1)
        page.locator("article.assistant").nth(1).get_by_role("button", name="Regenerate").click()
        answered(page, 1)
        assert page.locator("article").count() == 4
        page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
        assert page.input_value("#text") == "And again?"
        page.fill("#text", "Edited")
        page.press("#text", "Enter")
        answered(page, 1)
        assert page.locator("article.user").nth(1).inner_text().startswith("Edited")

        page.click("#options")  # settings are used at once, and kept
        page.fill("#max_tokens", "5")
        page.click("#close")
        page.fill("#text", "Short")
        page.press("#text", "Enter")
        assert "5 tokens" in answered(page, 2).inner_text()
        page.fill("#text", "not yet sent")
        page.reload()
        assert page.locator("article").count() == 6 and page.input_value("#text") == "not yet sent"
        assert page.input_value("#max_tokens") == "5"

        page.click("#new")
        assert page.locator("article").count() == 0 and page.locator("#chats li").count() == 2
        page.fill("#find", "again?")
        assert page.locator("#chats li").count() == 0
        page.fill("#find", "edited")
        assert page.locator("#chats li").count() == 1
        page.locator("#chats li button").first.click()
        assert page.locator("article").count() == 6
        page.locator("#chats li button[title=Rename]").click()
        page.fill("#find", "")
        assert page.locator("#chats").get_by_text("Renamed").count() == 1
        with page.expect_download() as download:
            page.select_option("#export", "json")
        kept = json.loads(Path(download.value.path()).read_text())
        assert len(kept["messages"]) == 6
        page.locator("#chats li button[title=Delete]").first.click()
        assert page.locator("#chats li").count() == 1


@pytest.mark.browser
def test_the_page_stops_an_answer_and_says_what_went_wrong(tokenizer, chromium, cut):
    model = Talker(tokenizer, answer_script(tokenizer, "word " * 900), pause=0.02)
    with talking(tokenizer, chromium, model, 1, max_tokens=900, max_waiting=0) as (
        server,
        url,
        page,
    ):
        page.fill("#text", "Go")
        page.press("#text", "Enter")
        page.get_by_text("word word").wait_for()
        assert page.inner_text("#send") == "Stop"
        busy = requests.post(url + "/v1/completions", json={"prompt": "x"})
        assert busy.status_code == 429
        page.click("#send")
        page.get_by_text("stopped", exact=True).wait_for()
        until(lambda: not server.model.worker.open)  # the slot is free

        long = "many words " * 2000
        page.fill("#text", long)
        page.press("#text", "Enter")
        page.locator(".trouble").get_by_text("too long").wait_for()
        page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
        assert page.input_value("#text") == long, "nothing that was typed is lost"

        page.fill("#text", "Go on")  # and now the server goes away
        page.press("#text", "Enter")
        page.locator("article.assistant").nth(1).get_by_text("word").wait_for()
        cut()
        page.locator(".trouble").wait_for()
        until(lambda: not server.model.worker.open)
        page.get_by_role("button", name="Try again").click()
        page.locator("article.assistant").nth(1).get_by_text("word").wait_for()
        page.click("#send")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_the_page_fits_phones_and_wide_screens_in_light_and_dark(
    tokenizer, chromium, width, scheme, tmp_path, base_dir
):
    model = Talker(tokenizer, answer_script(tokenizer))
    with (
        serving(tokenizer, 1, model, max_tokens=400) as (_, url),
        opened(chromium, url, color_scheme=scheme) as page,
    ):
        page.set_viewport_size({"width": width, "height": 844})
        page.fill("#text", "Hi there, a rather long message that must wrap on a phone " * 3)
        page.press("#text", "Enter")
        answered(page, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", shade)[:3])) > 384
        assert light == (scheme == "light")
        assert page.locator("#chats").is_visible() == (width > 720)
        if width < 720:
            page.click("#menu")
            assert page.locator("#chats").is_visible()
            page.locator("#chats li button").first.click()
            assert not page.locator("#chats").is_visible()
            page.click("#menu")
            page.mouse.click(width - 10, 600)
            assert not page.locator("#chats").is_visible()
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png")
        page.click("#view")
        page.get_by_text("No scores yet").wait_for()
        page.click("#view")
        assert page.locator("article").count() == 2


@pytest.mark.browser
def test_two_tabs_keep_each_others_conversations(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 2, max_tokens=99) as (_, url, page):
        other = page.context.new_page()
        other.goto(url)
        for tab, text in ((page, "First"), (other, "Second")):
            send(tab, text)
            answered(tab, 0)
        third = page.context.new_page()
        third.goto(url)
        third.locator("#chats").get_by_text("First").click()
        send(third, "More")
        answered(third, 1)
        for words, number in (("kept", 0), ("moved", 1)):
            edited = page.locator("article.user").nth(number)
            edited.get_by_role("button", name="Edit").click()
            page.fill("#text", words)
            third.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
            send(third, f"Again {number}")
            answered(third, 1)
            page.locator("article.user").nth(1).get_by_text(f"Again {number}").wait_for()
            assert page.input_value("#text") == words
            going_on = page.locator("article.user.editing").count()
            assert going_on == (number == 0), "only an edit of what is still there goes on"
            if going_on:
                page.keyboard.press("Escape")
        page.fill("#text", "")
        third.close()
        page.click("#new")
        send(page, "Third")
        answered(page, 0)
        other.locator("#chats").get_by_text("Third").wait_for()
        page.locator("#chats").get_by_text("Second").wait_for()
        for tab, now in ((page, "Third"), (other, "Second")):
            for _ in range(2):
                names = tab.locator("#chats li > button:first-child").all_inner_texts()
                assert sorted(names) == ["First", "Second", "Third"]
                assert tab.inner_text("#title") == now and tab.locator("article").count() == 2
                tab.reload()
        page.get_by_role("button", name="Delete First").click()
        other.locator("#chats").get_by_text("First").wait_for(state="detached")
        page.click("#options")
        page.fill("#max_tokens", "77")
        has_value(other, "#max_tokens", "77")
        page.get_by_role("button", name="Delete Second").click()  # there it is open
        other.locator("#title").get_by_text("Third").wait_for()


@pytest.mark.browser
def test_an_edit_takes_nothing_away_until_it_is_sent(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 1, max_tokens=99) as (*_, page):
        for i, text in enumerate(("One", "Two")):
            send(page, text)
            answered(page, i)
        page.fill("#text", "a draft")
        first = page.locator("article.user").first

        def edit():
            first.get_by_role("button", name="Edit").click()
            assert page.input_value("#text") == "One" and page.locator("article").count() == 4
            page.fill("#text", "half")

        def unharmed():
            return page.locator("article").count() == 4 and page.input_value("#text") == "a draft"

        edit()
        page.reload()  # what was typed is kept, as a draft
        assert page.locator("article").count() == 4
        assert page.input_value("#text") == "a draft\nhalf"
        page.fill("#text", "a draft")
        edit()
        page.click("#new")
        assert page.input_value("#text") == "a draft\nhalf"
        page.get_by_role("button", name="Who are you?").click()
        answered(page, 0)
        assert page.input_value("#text") == "a draft\nhalf", "an idea takes no draft"
        page.locator("#chats").get_by_text("One").click()
        page.fill("#text", "a draft")
        edit()
        page.keyboard.press("Escape")
        assert unharmed()
        edit()
        first.get_by_role("button", name="Cancel").click()
        assert unharmed()
        edit()
        page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
        assert page.input_value("#text") == "Two"
        page.keyboard.press("Escape")
        assert page.input_value("#text") == "a draft\nhalf", "one edit does not lose another's"
        page.fill("#text", "a draft")
        edit()
        page.press("#text", "Enter")
        answered(page, 0)
        assert page.locator("article").count() == 2 and first.inner_text().startswith("half")
        assert page.input_value("#text") == "a draft"


@pytest.mark.browser
def test_a_long_conversation_goes_on_and_stays_where_it_is_read(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine. " * 12), context=256)
    with talking(tokenizer, chromium, model, 1, max_messages=8, max_tokens=99) as (*_, page):
        page.set_viewport_size({"width": 800, "height": 400})
        for i in range(9):
            send(page, f"Question {i}")
            note = answered(page, i).inner_text()
            assert i or "forgotten" not in note
        assert "messages forgotten" in note, "neither tokens nor messages without end"
        page.evaluate("document.getElementById('log').scrollTop = 0")
        page.locator("article.user").first.get_by_role("button", name="Edit").click()
        assert page.evaluate("document.getElementById('log').scrollTop") == 0
        page.keyboard.press("Escape")
        assert page.evaluate("document.getElementById('log').scrollTop") == 0


@pytest.mark.browser
def test_settings_go_back_to_the_servers(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 1, max_tokens=99) as (*_, page):
        has_value(page, "#max_tokens", "99")
        page.click("#options")
        page.fill("#max_tokens", "3")
        page.fill("#system", "Be kind.")
        page.get_by_role("button", name="Back to the server's values").click()
        assert page.input_value("#max_tokens") == "99" and page.input_value("#system") == ""
        page.reload()
        has_value(page, "#max_tokens", "99")
        assert page.input_value("#system") == ""


@pytest.mark.browser
def test_what_is_to_be_replaced_is_kept_until_something_has_come(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 1, max_tokens=99) as (server, _, page):
        for i, text in enumerate(("One", "Two")):
            send(page, text)
            answered(page, i)
        count = page.locator("article").count
        first, undo = (page.locator("article.user").first,
                       page.get_by_role("button", name="Undo"))  # fmt: skip
        server.draining = True
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_role("button", name="Try again").click()
        page.locator("#log").get_by_text("shutting down").wait_for()
        undo.click()
        answered(page, 1)
        assert count() == 4 and not undo.count()

        server.draining = False
        model.pause = 3
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_role("button", name="Stop").wait_for()
        page.reload()  # before anything of it has come
        undo.click()
        answered(page, 1)
        model.pause = 0
        server.draining = True
        page.get_by_role("button", name="Regenerate").click()
        page.locator("#log").get_by_text("shutting down").wait_for()
        send(page, "Three")
        page.locator("#log").get_by_text("shutting down").wait_for()
        assert (
            count() == 6 and page.locator("article.assistant").nth(1).get_by_text("Fine.").count()
        )

        first.get_by_role("button", name="Edit").click()
        send(page, "half")
        page.locator("#log").get_by_text("shutting down").wait_for()
        assert count() == 2
        page.reload()
        undo.click()
        assert count() == 6 and page.input_value("#text") == "half", "and it can be sent again"
        assert "One" in first.inner_text()
        page.press("#text", "Enter")
        page.locator("#log").get_by_text("shutting down").wait_for()
        server.draining = False
        page.get_by_role("button", name="Try again").click()
        answered(page, 0)
        assert count() == 2 and first.inner_text().startswith("half") and not undo.count()


@pytest.mark.browser
def test_settings_reach_the_request_and_only_changed_ones_are_kept(tokenizer, chromium):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    knobs = {"temperature", "top_k", "top_p", "max_tokens"}
    with (
        serving(tokenizer, 1, model, max_tokens=99) as (server, url),
        opened(chromium, url, color_scheme="light") as page,
    ):

        def sent(text):
            with page.expect_request("**/v1/chat/completions") as request:
                send(page, text)
            answered(page, page.locator("article.assistant").count() - 1)
            return request.value.post_data_json

        assert not knobs & sent("Hi").keys(), "the server's defaults are its own to change"
        page.click("#options")
        page.fill("#temperature", "1.5")
        page.fill("#max_tokens", "50")
        page.fill("#max_tokens", "")
        page.fill("#system", "Be kind.")
        page.select_option("#theme", "dark")
        page.click("#close")
        server.settings.top_k = 7
        for _ in range(2):
            body = sent("Again")
            assert body["messages"][0] == {"role": "system", "content": "Be kind."}
            chosen = {name: body[name] for name in knobs & body.keys()}
            assert chosen == {"temperature": 1.5, "max_tokens": 50}
            shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert sum(map(int, re.findall(r"\d+", shade)[:3])) < 384
            page.reload()
            has_value(page, "#top_k", "7")
            assert page.input_value("#temperature") == "1.5"
            assert page.input_value("#max_tokens") == "50"


# The view of a training that looks every 100 ms instead of every 5 s.
SOON = "const real = setInterval; window.setInterval = (f, ms) => real(f, ms / 50)"


@pytest.mark.browser
def test_the_page_asks_for_a_key_once_and_goes_on_with_it(tokenizer, chromium, base_dir):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 1, max_tokens=99, api_key="secret") as (
        server,
        _,
        page,
    ):
        page.add_init_script(SOON)
        page.reload()
        send(page, "Hi")
        page.locator(".trouble").get_by_text("wants its key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.click("#close")
        looking = []
        page.on("request", lambda r: looking.append(r) if r.url.endswith("/training") else None)
        page.click("#view")
        page.locator("#notice").get_by_text("wants its key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        for request in looking:  # those sent before the first was refused
            request.response().finished()
        page.wait_for_timeout(300)
        page.click("#close")
        looks = sum("/training" in line for line in server.said)
        page.wait_for_timeout(500)
        assert looks == sum("/training" in line for line in server.said) > 0
        assert not page.is_visible("#drawer")
        page.click("#options")
        for key in ("\u0161ecret", "secret"):
            page.fill("#key", key)
            page.press("#key", "Tab")
            if key != "secret":
                page.locator("#notice").get_by_text("a key can't have").wait_for()
        page.click("#close")
        page.get_by_text("No scores yet").wait_for()
        assert page.inner_text("#notice") == ""
        page.click("#view")
        page.get_by_role("button", name="Try again").click()
        answered(page, 0)
        send(page, "More")
        answered(page, 1)
        assert page.locator("article").count() == 4


@pytest.mark.browser
def test_the_page_says_what_it_cannot_do(tokenizer, chromium, base_dir):
    model = Talker(tokenizer, answer_script(tokenizer, "Fine."))
    with talking(tokenizer, chromium, model, 1, max_tokens=99, max_waiting=0) as (
        server,
        url,
        page,
    ):
        notice = page.locator("#notice")
        page.get_by_text("This is t-sft").wait_for()
        page.route("**/config", lambda route: route.abort())  # the server is away
        page.reload()
        notice.get_by_text("cannot be reached").wait_for()
        page.click("#options")
        page.fill("#max_tokens", "88")  # the settings work
        page.click("#close")
        served, server.model = server.model, None
        page.unroute("**/config")
        notice.get_by_text("loading its model").wait_for()
        server.model = served
        page.get_by_text("This is t-sft").wait_for()
        assert not notice.is_visible() and page.input_value("#max_tokens") == "88"

        page.route("**/training", lambda route: route.abort())
        page.click("#view")
        notice.get_by_text("cannot be reached").wait_for()
        page.click("#view")
        assert not notice.is_visible()

        page.evaluate("() => { Storage.prototype.real = Storage.prototype.setItem }")
        page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
        send(page, "Hi")
        answered(page, 0)
        assert "storage is full" in notice.inner_text()
        page.evaluate("() => { Storage.prototype.setItem = Storage.prototype.real }")
        send(page, "Hi")
        answered(page, 1)
        assert not notice.is_visible()

        model.pause = 1.0  # somebody else is answered
        asked = {"messages": user("Hi"), "stream": True}
        with requests.post(url + "/v1/chat/completions", json=asked, stream=True) as response:
            next(response.iter_lines())
            send(page, "And now?")
            page.locator(".trouble").get_by_text("Many people").wait_for()
            send(page, "And now?")
            page.locator("article.assistant").nth(3).locator(".trouble").wait_for()
            assert page.get_by_role("button", name="Try again").count() == 1
        model.pause = 0
        until(lambda: not server.model.worker.open)
        page.get_by_role("button", name="Try again").click()
        answered(page, 3)
        assert page.get_by_role("button", name="Try again").count() == 0, "an older one has none"


@pytest.mark.browser
def test_answers_are_copied_exported_and_their_tables_drawn(tokenizer, chromium):
    text = "Look:\n| a | b |\n| - | - |\n| 1 | 2 |\n\n```\nx = 1\n```"
    model = Talker(tokenizer, answer_script(tokenizer, text))
    with (
        serving(tokenizer, 1, model, max_tokens=400) as (_, url),
        opened(chromium, url, permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        send(page, "Hi")
        answer = answered(page, 0)
        assert answer.locator("td").count() == 2 and answer.locator("p").count() == 2
        of_all, of_code = (answer.locator(f"{box} button").first for box in (".tools", "pre"))

        def pasted():
            page.fill("#text", "")
            page.focus("#text")
            page.keyboard.press("Control+V")
            return page.input_value("#text")

        of_all.click()
        of_all.get_by_text("Copied").wait_for()
        assert pasted() == "[37*12 = 444] " + text
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        of_code.click()  # as at an address without HTTPS
        answer.locator("pre").get_by_text("Copied").wait_for()
        assert pasted() == "x = 1"
        page.evaluate("document.execCommand = () => false")
        of_code.click()
        answer.locator("pre").get_by_text("Not copied").wait_for()
        with page.expect_download() as download:
            page.select_option("#export", "md")
        exported = Path(download.value.path()).read_text()
        assert exported == f"# Hi\n\n**You:** Hi\n\n**Answer:** [37*12 = 444] {text}\n"


@pytest.mark.browser
def test_what_has_streamed_can_be_used_while_more_comes(tokenizer, chromium):
    text = "- one\u2028two\n  ```js\n  x = 1\n    y\n  ```\n" + "word " * 200
    model = Talker(tokenizer, answer_script(tokenizer, text), pause=0.02)
    with talking(tokenizer, chromium, model, 1, max_tokens=900) as (*_, page):
        send(page, "Go")
        page.get_by_text("word word").wait_for()
        code = page.locator("article.assistant pre code")
        assert code.inner_text() == "x = 1\n  y"
        assert page.locator("article.assistant li").inner_text() == "one\u2028two"
        code.select_text()
        code.evaluate("(element) => window.was = element")
        enough = len(page.inner_text("article.assistant")) + 50
        while len(page.inner_text("article.assistant")) < enough:
            page.wait_for_timeout(50)
        assert page.evaluate("window.was.isConnected && String(getSelection())") == "x = 1\n  y"
        button = page.locator("article.assistant pre button")
        button.click(delay=200)
        assert page.inner_text("#send") == "Stop"
        page.locator("#state").get_by_text("opied").wait_for(state="attached")


@pytest.mark.browser
def test_looking_around_does_not_cost_an_answer(tokenizer, chromium):
    script = [*tokenizer.encode("word " * 60), tokenizer.specials["<|assistant_end|>"]]
    model = Talker(tokenizer, script, pause=0.02)
    with talking(tokenizer, chromium, model, 2, max_tokens=400) as (*_, page):
        send(page, "Other")
        page.click("#send")  # stop
        page.get_by_text("stopped", exact=True).wait_for()
        page.click("#new")
        model.pause = 0.1  # so that a slow browser has looked around before it ends
        send(page, "Go")
        page.get_by_text("word word").wait_for()
        assert page.locator("article.assistant").get_attribute("aria-busy") == "true"
        page.set_viewport_size({"width": 390, "height": 844})
        for close in (
            lambda: page.keyboard.press("Escape"),
            lambda: page.mouse.click(385, 400),
            lambda: page.locator("#chats li.now > button").first.click(),
        ):
            page.click("#menu")
            assert page.is_visible("#chats")
            close()
            assert not page.is_visible("#chats") and page.inner_text("#send") == "Stop"
        page.click("#menu")
        page.locator("#chats").get_by_text("Other").click()
        assert page.inner_text("#title") == "Other" and page.inner_text("#send") == "Send"
        page.set_viewport_size({"width": 1024, "height": 768})
        entry = page.locator("#chats li > button:first-child", has_text="Go")
        entry.click()
        assert page.inner_text("#send") == "Stop"
        entry.focus()
        model.pause = 0.005
        assert answered(page, 0).inner_text().startswith("word " * 59)
        assert page.evaluate("document.activeElement.textContent") == "Go"
        assert page.locator("article.assistant").get_attribute("aria-busy") is None

        model.pause = 0.02
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("word word").wait_for()
        page.reload()  # what has come is kept
        assert page.locator("article.assistant").inner_text().startswith("word word")


@pytest.mark.browser
def test_the_page_outlives_its_server(tokenizer, chromium, cut):
    slow = Talker(tokenizer, answer_script(tokenizer, "word " * 900), pause=0.02)
    quick = Talker(tokenizer, answer_script(tokenizer, "Here again."))
    with contextlib.ExitStack() as stack:
        with serving(tokenizer, 1, slow, max_tokens=900) as (server, url):
            page = stack.enter_context(opened(chromium, url))
            send(page, "Go")
            page.get_by_text("word word").wait_for()
            server.shutdown()  # no connection is taken any more
            cut()
            page.locator(".trouble").get_by_text("cannot be reached").wait_for()
            assert "word word" in page.inner_text("article.assistant")
        page.locator("#notice").get_by_text("cannot be reached").wait_for()
        again = page.get_by_role("button", name="Try again")
        again.click()
        page.locator(".trouble").get_by_text("What you wrote is kept").wait_for()
        with serving(tokenizer, 1, quick, max_tokens=99, port=server.server_port):
            page.locator("#notice").wait_for(state="hidden")
            again.click()
            assert "Here again." in answered(page, 0).inner_text()
            assert page.locator("article").count() == 2


@pytest.mark.browser
def test_the_view_of_a_training_is_drawn_and_renewed(served, chromium, base_dir):
    _, url = served
    folder = common.run_dir("main")
    (folder / "eval").mkdir(parents=True)
    lines = [{"stage": "base", "step": i, "loss": 5 - i / 10, "val_bpb": 2.0} for i in range(11)]
    write_lines(folder / "metrics.jsonl", lines)
    tasks = {"facts": {"score": 0.5, "low": 0.4, "high": 0.6}, "val_bpb": {"score": 1.25}}
    (folder / "eval" / "base.json").write_text(json.dumps({"tasks": tasks}))
    with opened(chromium, url) as page:
        page.add_init_script(SOON)
        page.reload()
        page.click("#view")
        page.get_by_text("loss: 4 at step 10 (4 to 5)").wait_for()
        texts = page.locator("#training tr").evaluate_all(  # of a table just replaced as well
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent).join(' '))"
        )
        rows = [text.split() for text in texts]
        assert rows == [
            ["task", "base"],
            ["facts", "50.0", "[40.0,", "60.0]"],
            ["val_bpb", "1.250"],
        ]
        assert page.locator("#training figure").count() == 2
        drawn = page.locator("#training polyline").first.get_attribute("points").split()
        points = [tuple(map(float, point.split(","))) for point in drawn]
        assert points == [pytest.approx((10 * i, 5 * i)) for i in range(11)]
        write_lines(folder / "metrics.jsonl", [*lines, {"stage": "base", "step": 20, "loss": 3}])
        page.get_by_text("loss: 3 at step 20 (3 to 5)").wait_for()
