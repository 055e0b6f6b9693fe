"""All tests: CPU, offline, a few minutes. Run with `bash run.sh test [pytest options]`.

Marks: gpu (needs a CUDA device), slow (minutes), browser (needs Chromium). Parts that need the
public data in ../shared/data skip where it is absent. Each part is held against an independent
oracle: a plain version, torch's own, transformers, regex, another batch shape, an unbroken run.
"""

from __future__ import annotations

import ast
import base64
import bz2
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import doctest
import errno
import functools
import gzip
import hashlib
import html.parser
import http.client
import http.server
import importlib
import importlib.util
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
    """Return a tokenizer of 300 merges, for tests that cannot take a fixture."""
    merges = nanochat_bpe.train(iter(SENTENCES), 512)
    return common.Tokenizer(nanochat_bpe.PATTERN, merges)


@pytest.fixture(scope="session", autouse=True)
def plain_environment():
    """Drop what would make the project behave otherwise than the tests expect."""
    for name in ("NANOCHAT_API_KEY", "NANOCHAT_MIRROR", "RANK", "WORLD_SIZE", "LOCAL_RANK",
                 "LOCAL_WORLD_SIZE"):  # fmt: skip
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tokenizer():
    fresh = TOKENIZER()
    fresh.info = {}
    return fresh


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """Make an empty base directory of the test's own."""
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


def write_tiny_source():
    """Prepare a source "tiny" of 150 documents of 1 to 9 sentences."""
    cycle = itertools.cycle(SENTENCES)
    write_texts("tiny", ["".join(itertools.islice(cycle, i % 9 + 1)) for i in range(150)])
    return "tiny"


@pytest.fixture
def text_source(base_dir):
    return write_tiny_source()


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
    """Run code as one of torchrun's processes, in a process that has imported torch before."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(HERE)
    with open(out, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    names = {"rank": int(env["RANK"]), "os": os, "sys": sys, "torch": torch}
    names |= {module.__name__: module for module in (common, evaluate, midtrain, pretrain, rl, sft)}
    names["test_all"] = sys.modules[__name__]
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
    # a model's first tensor imports the second, in seconds
    context.set_forkserver_preload(["test_all", "torch.fx.experimental.symbolic_shapes"])
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


def train_ranks(world_size, settings, first="", end=0):
    """Run a stage's main in world_size processes, after code that each of them runs first."""
    module = type(settings).__module__
    code = f"{textwrap.dedent(first)}\n{module}.main({module}.{settings!r})"
    run_ranks(world_size, code, end=end)


# The house -----------------------------------------------------------------------------------

BUDGETS = {  # lines of a file, section or `main`: at most, and where it is over its goal, the goal
    "common.py": (4144, 3100), "common.py GPT": 420, "common.py Fast paths": (480, 400),
    "prepare.py": (4308, 2400), "train_tokenizer.py": 180, "tokenizer.rs": 700, "pretrain.py": 520,
    "pretrain.py main": 90, "midtrain.py": 150, "midtrain.py main": 45, "sft.py": 140,
    "sft.py main": 45, "rl.py": 330, "evaluate.py": (1390, 1150), "chat.py": (276, 230),
    "serve.py": (1820, 1700), "run.sh": (390, 350), "test_all.py": (9106, 6300), "README.md": 250,
    "CONTRIBUTING.md": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_keeps_its_budget_of_lines(name):
    file, _, part = name.partition(" ")
    text = (HERE / file).read_text("utf-8")
    titles = re.split(r"^# \d+\. (.+?) -+$", text, flags=re.MULTILINE)
    sections = {title: body.count("\n") for title, body in zip(titles[1::2], titles[2::2])}
    found = sections[part] if part in sections else text.count("\n")
    if part == "main":
        (main,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
        found = main.end_lineno - main.lineno + 1
    most, goal = (BUDGETS[name], 0) if isinstance(BUDGETS[name], int) else BUDGETS[name]
    assert goal < found <= most and part in ("", "main", *sections), "lower the budget with it"


def syntax(name):
    return ast.parse((HERE / f"{name}.py").read_text("utf-8"))


def test_a_file_imports_no_stage_and_only_what_pyproject_declares():
    def imported(name):
        nodes = list(ast.walk(syntax(name)))
        found = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        return {module.split(".")[0] for module in found} - sys.stdlib_module_names

    text = (HERE / "pyproject.toml").read_text("utf-8")
    tables = dict(re.findall(r"^(\w+) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL))
    declared = {table: {package.replace("-", "_") for package in re.findall(r'"([\w-]+)', rest)}
                for table, rest in tables.items()}  # fmt: skip
    allowed = declared["dependencies"] | declared["wandb"] | {"nanochat_bpe", "common"}
    assert not {name: imported(name) - allowed for name in ["common", *STAGES]
                if imported(name) - allowed}  # fmt: skip
    assert imported("test_all") - allowed - set(STAGES) <= declared["dev"]


def test_what_common_holds_is_run_by_two_stages_or_more():
    """A stage runs what it imports of common.py, what that refers to, and what registers itself."""
    refers, registered, runs = {}, set(), collections.Counter()
    for node in syntax("common").body:
        words = [x for x in ast.walk(node) if isinstance(x, ast.Name)]
        names = {x.id for x in words if isinstance(x.ctx, ast.Store)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = {node.name}
            makers = [ast.unparse(x) for x in node.decorator_list if isinstance(x, ast.Call)]
            registered |= names if any("dataclass" not in x for x in makers) else set()
        refers |= {name: {x.id for x in words} for name in names}
    for stage in STAGES:
        nodes = [x for x in ast.walk(syntax(stage)) if isinstance(x, ast.ImportFrom)]
        seen, todo = set(), {x.name for y in nodes if y.module == "common" for x in y.names}
        todo |= registered
        while todo:
            seen.add(name := todo.pop())
            todo |= refers.get(name, set()) - seen
        runs.update(seen)
    assert len(refers) > 200 and not {name: runs[name] for name in refers if runs[name] < 2}


def call(*words, **options):
    return subprocess.run(
        words, **{"cwd": HERE} | options, capture_output=True, text=True, check=False
    )


def test_importing_prints_nothing_and_loads_no_compiler(tmp_path):
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import {", ".join(["common", *STAGES])}
        new = set(sys.modules) - before
        assert not [m for m in new if m.startswith(("torch._dynamo", "torch._inductor"))]
        assert not torch.cuda.is_initialized()"""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "none"), "PYTHONPATH": str(HERE)}
    done = call(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout + done.stderr and not list(tmp_path.iterdir())


def test_the_top_level_is_the_house():
    allowed = {f"{name}.py" for name in ["common", "test_all", *STAGES]} | {
        "tokenizer.rs", "Cargo.toml", "Cargo.lock", "pyproject.toml", "requirements.lock", "run.sh",
        "README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "world.txt",
        "docs", "findings", ".ci", ".gitignore", ".gitattributes",
    }  # fmt: skip
    assert {line.split("/")[0] for line in call("git", "ls-files").stdout.splitlines()} <= allowed


def run_sh(*words, code=0):
    """Run run.sh; return what it prints or, where it fails with a code, what it complains of."""
    done = call("bash", "run.sh", *words)
    assert done.returncode == code, done.stderr
    assert not code or (done.stderr.count("\n") <= 2 and not done.stdout), done.stderr
    return done.stderr if code else done.stdout


def commands(*words):
    """List the commands of a dry run of run.sh, the name of a stage and its settings each."""
    out = run_sh("--dry-run", *words).replace("=SHARDS", "=9")
    lines = re.findall(r"(\w+)\.py(.*)$", out, re.MULTILINE)
    classes = {name: importlib.import_module(name).Settings for name in STAGES}
    return [(name, common.parse_settings(classes[name], "", shlex.split(rest)))
            for name, rest in lines if name in classes]  # fmt: skip


def commands_of(stage, *words):
    return [settings for name, settings in commands(*words) if name == stage]


TIERS = ["cpu", "cpu-bf16", "cpu-fast", "laptop", "mps", "gpu1", "8xa6000", "8xh100", "8xh200"]


def test_every_tier_and_action_of_run_sh_prints_its_commands():
    for tier in TIERS:
        found = commands(f"--tier={tier}")
        chat = [word for name in ("midtrain", "sft", "rl") for word in (name, "evaluate")]
        base = ["pretrain", "train_tokenizer", "pretrain", "evaluate"]  # the first is the plan
        assert [name for name, _ in found if name != "prepare"] == [*base, *chat, "evaluate"]
        long = 384 if TIERS.index(tier) >= TIERS.index("gpu1") else rl.Settings().max_tokens
        assert [settings.max_tokens for name, settings in found if name == "rl"] == [long]
    for words in ("bench", "bench learn", "bench gpu"):
        (text,) = commands_of("prepare", *words.split())
        assert text.source == f"{words.split()[-1]}-world", "away from what the main job prepares"
        assert commands(*words.split())[-1][1].bench == "runs"
    assert not commands("setup") + commands("check")
    assert "-m pytest" in run_sh("--dry-run", "test", "-k", "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tset", "tset is not an action; choose one of: all setup"),
        ("learn", "learn is not an action"),
        ("nid:--seed=1", "nid:--seed=1 is not an action"),
        ("--tier=cpuu", "--tier=cpuu is not a tier; choose one of: cpu cpu-bf16 cpu-fast"),
        ("--tag", "--tag needs a value"),
        ("bench gpu --data=.", "bench gpu trains on the world"),
        ("--tier=cpu all rl:--num-step 3", "rl.py: '--num-step=3' is not a setting: did you mean"),
    ],
)
def test_a_wrong_word_of_run_sh_is_told_before_any_stage_runs(base_dir, monkeypatch, words, said):
    monkeypatch.setenv("NANOCHAT_PYTHON", sys.executable)
    assert said in run_sh(*words.split(), code=2)
    assert not list(base_dir.iterdir())


@pytest.mark.skipif(sys.platform == "darwin", reason="run.sh takes mps there")
@pytest.mark.parametrize(
    ("cards", "features", "tier"),
    [
        ([24_564], "", "gpu1"), ([49_140] * 8, "", "8xa6000"), ([81_559] * 8, "", "8xh100"),
        ([143_771] * 8, "", "8xh200"), ([143_771] * 4, "", "8xh100"), ([6_144], "", "laptop"),
        ([81_559, 24_564], "", "gpu1"), ([], "AuthenticAMD avx2", "cpu"),
        ([], "AuthenticAMD avx512_bf16", "cpu-bf16"), ([], "AuthenticAMD avx_vnni avx512_bf16",
        "cpu-fast"), ([], "GenuineIntel avx_vnni avx512_bf16 amx_bf16", "cpu-fast"),
        ([], "GenuineIntel avx_vnni avx512_bf16", "cpu"),
    ],
)  # fmt: skip
def test_run_sh_takes_the_tier_that_fits_cards_and_processor(
    tmp_path, monkeypatch, cards, features, tier
):
    vendor, _, flags = features.partition(" ")
    grep, said = shutil.which("grep"), rf"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n"
    flags = f"case $* in *cpuinfo) printf '{said}' | {grep} $1 $2 $3 $4; exit;; esac"
    stubs = {"nvidia-smi": "".join(f"echo {mib}\n" for mib in cards) or "exit 9\n",
             "grep": f'{flags}\nexec {grep} "$@"\n'}  # fmt: skip
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (out := run_sh("--dry-run")) == run_sh("--dry-run", f"--tier={tier}")
    if cards:  # little text, whatever the card
        small = "pretrain.py --tag=[a-z]+ .*--depth=4 .*--num-iterations=2400"
        assert re.search(small, run_sh("--dry-run", "--data=world"))
        ranks = f"--nproc_per_node={len(cards)} --max-restarts=3 /.*/pretrain.py"
        assert bool(re.search(ranks, out)) == (len(cards) > 1)
        assert f"--plan-count={len(cards)}" in out
    if len(cards) == 8:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert "--nproc_per_node=2 --max-restarts=3 " in run_sh("--dry-run")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        monkeypatch.setenv("NANOCHAT_PYTHON", "false")
        assert "wants GPUs, and nvidia-smi shows none" in run_sh(f"--tier={tier}", code=2)


def test_run_sh_gives_each_flag_to_its_stage_and_the_last_one_counts():
    words = ["--name=Ada", "--num_conversations", "9", "prepare:--seed=3", "--seed=4"]
    (world,) = commands_of("prepare", "--tier=cpu", *words)
    assert (world.data, world.name, world.num_conversations, world.seed) == ("world", "Ada", 9, 3)
    for talks in ("world", "hub", "README.md"):
        text, chats = commands_of("prepare", *words, "--data=.", f"--conversations={talks}")
        assert Path(text.data).samefile(HERE) and not text.conversations
        assert chats.name == "Ada" and Path(chats.conversations or "world").name == talks
        assert talks != "world" or chats.num_conversations == 9
    text, chats = commands_of("prepare", "--tier=8xh100", "prepare:--shards=7")
    assert (text.data, text.shards, chats.conversations) == ("hub", 7, "hub")
    small = ["--tier=cpu", "--vocab-size=300", "tokenizer:--threads=1", "rl:--eval-every", "7"]
    (made,) = commands_of("train_tokenizer", *small)
    assert (made.vocab_size, made.threads) == (300, 1)
    assert commands_of("pretrain", *small)[0].plan_vocab_size == 300
    assert [s.eval_every for s in commands_of("rl", *small)] == [7]
    found = commands_of("evaluate", "--tier=cpu", "eval:--run-code", "eval:--cost-per-hour=24")
    assert [s.stage for s in found[:4]] == ["base", "mid", "sft", "rl"] and found[4].report
    assert all(s.run_code and s.cost_per_hour == 24 for s in found)


def test_run_sh_names_the_text_alike_in_all_stages(tmp_path):
    def source(*words):
        found = collections.defaultdict(list)
        for name, one in commands(*words):
            found[name].append(getattr(one, "source", ""))
        (name,) = {found["prepare"][0], found["train_tokenizer"][0], *found["pretrain"][1:]}
        return name

    for name in ("Downloads", "chat", "eval", "My Books.v2", "文本", "книги"):
        (tmp_path / name).mkdir()
    found = [source(f"--data={path}") for path in sorted(tmp_path.iterdir())]
    assert found[:4] == ["downloads-files", "my-books", "chat-files", "eval-files"]
    assert found[:4] == [prepare.Settings(str(x)).source for x in sorted(tmp_path.iterdir())[:4]]
    assert len(set(found)) == 6 and all(name.startswith("text-") for name in found[4:])
    assert source("--data=.", "--source=mine") == "mine"
    assert source("--data=world", "--tier=gpu1", "--source=mine") == "mine"
    (mid,) = commands_of("midtrain", "--tier=cpu", "--source=mine")
    assert mid.chats == "mine"  # the world's conversations are written with its text


def test_run_sh_runs_rl_where_ones_own_conversations_hold_problems(base_dir):
    words = ["--data=.", "--conversations=README.md", "--tag=x"]
    assert commands_of("sft", *words) and not commands_of("rl", *words)
    (base_dir / "data" / "x-chat").mkdir(parents=True)
    (base_dir / "data" / "x-chat" / "rl.jsonl").write_text("{}")  # prepare.py found some
    assert commands_of("rl", *words) and commands_of("evaluate", *words)[-2].stage == "rl"


def test_a_full_disk_and_a_card_that_torch_cannot_use_are_said_before_anything_is_fetched(
    base_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("NANOCHAT_PYTHON", sys.executable)
    (tmp_path / "df").write_text("#!/bin/sh\necho x\necho /dev/x 9 9 2000000 1% /\n")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 24564\n")
    (tmp_path / "df").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = call("bash", "run.sh", "--tier=cpu", "--data=world", "--num-iterations=2e6")
    assert done.returncode == 1 and "room for 2 GB" in done.stderr and "prepare" not in done.stdout
    (tmp_path / "nvidia-smi").chmod(0o755)
    if not torch.cuda.is_available():
        assert "of which torch can use none" in run_sh("--tier=gpu1", code=1)
    assert not [*base_dir.rglob("*.parquet")]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_stage_outlives_run_sh_and_a_stopped_one_ends_first(tmp_path, monkeypatch, how):
    """A script stands in for Python: its pretraining waits, and saves when it is told to stop."""
    saves = f"trap 'sleep 0.3; echo saved >{tmp_path}/log; exit 0' TERM INT"
    waits = f"{saves}; echo $$ >{tmp_path}/pid; while :; do sleep 0.05; done"
    stub = f'case "$*" in -c*) cat >/dev/null ;; *pretrain.py*--tag*) {waits} ;; esac'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{stub}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("NANOCHAT_PYTHON", str(tmp_path / "python"))
    command = ["bash", "run.sh", "--tier=cpu", "--data=world"]
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until((tmp_path / "pid").exists)
    until(lambda: (tmp_path / "pid").read_text().strip())
    process.send_signal(how)
    said = process.communicate()[1].decode()
    assert process.returncode == {15: 143, 2: 130, 9: -9}[how]
    pid = int((tmp_path / "pid").read_text())
    if how != signal.SIGKILL:
        assert "stopped in base; the same command goes on from there" in said
        assert (tmp_path / "log").read_text() == "saved\n"
    elif shutil.which("setpriv"):
        until(lambda: not Path(f"/proc/{pid}").exists())
    else:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_run_sh_makes_a_base_model_of_ones_own_text_and_then_has_nothing_to_do(
    base_dir, tmp_path, monkeypatch
):
    (tmp_path / "tale.txt").write_text("".join(random.Random(0).choices(SENTENCES, k=3000)))
    monkeypatch.setenv("NANOCHAT_PYTHON", sys.executable)
    words = [f"--data={tmp_path / 'tale.txt'}", "--vocab-size=300", "eval:--task=bpb", "--depth=2",
             "--max-seq-len=64", "--total-batch-size=256", "--num-iterations=20", "--compile=no",
             "--bigram-steps=5", "--device=cpu", "eval:--device=cpu"]  # fmt: skip
    out = run_sh("--tier=cpu", *words)
    assert "chat.py --tag=tale -i base" in out and common.read_log("tale")[-1]["step"] == 20
    assert (common.run_dir("tale") / "report.md").exists()
    again = run_sh("--tier=cpu", *words)
    assert "prepare: " in again and "nothing to do" in again and "is there, finished" in again


DOCUMENTS = [HERE / "README.md", HERE / "CHANGELOG.md", *sorted((HERE / "docs").glob("*.md"))]


def code_of(document):
    """List the lines of a document's code blocks, continued ones joined, and its code spans."""
    parts = re.split(r"(?m)^```.*$", document.read_text("utf-8").replace("\\\n", " "))
    lines = [re.sub(r"\s#.*", "", line) for block in parts[1::2] for line in block.splitlines()]
    spans = [" ".join(x.split()) for prose in parts[::2] for x in re.findall("`([^`]+)`", prose)]
    return [*lines, *spans]


def parse_stages(text):
    """Parse every command in a text that runs a stage, alone or by torchrun; return how many."""
    from torch.distributed.run import get_args_parser

    found = re.findall(r"(?:python|torchrun(.*?)) (?:\S*/)?(\w+)\.py\b(.*)", text)
    for launcher, name, rest in found:
        get_args_parser().parse_args([*launcher.split(), f"{name}.py"])
        words = shlex.split(re.sub(r"('|\" & done.*)$", "", rest))  # the end of a shell's own words
        cls = importlib.import_module(name).Settings
        assert common.parse_settings(cls, "", [word for word in words if word != "--help"]), text
    return len(found)


def test_every_command_in_the_documents_parses(tmp_path, monkeypatch):
    """Those of run.sh too: what they would run is printed and parsed, wherever they are typed."""
    for folder in ("books", "TEXT", "CHATS"):
        (tmp_path / folder).mkdir()
    (tmp_path / "chats.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tests, stages = [name for name in globals() if name.startswith("test_")], 0
    code = {line for document in DOCUMENTS for line in code_of(document)}
    shell = {word for line in code for word in re.findall(r"bash run\.sh([^;|)]*)", line)}
    for line in code:
        line = re.sub(r"\$\w+", "1", re.sub(r"\$\(.*?\)", "host", line))  # $seed, $(scontrol ...)
        stages += parse_stages(line)
    assert stages >= 20 and len(shell) >= 12, (stages, shell)
    for words in map(shlex.split, shell):
        done = call("bash", HERE / "run.sh", "--dry-run", *words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        for line in done.stdout.replace("=SHARDS", "=9").splitlines():
            if re.match(rf"\S+python .*\b({'|'.join(STAGES)})\.py", line):
                assert parse_stages(line.replace("-m torch.distributed.run", "torchrun")), line
        if "-k" in words:
            assert any(words[words.index("-k") + 1] in name for name in tests), words


def test_every_flag_that_the_documents_name_exists():
    from torch.distributed.run import get_args_parser

    fields = {
        f.name for n in STAGES for f in dataclasses.fields(importlib.import_module(n).Settings)
    }
    fields |= {option.lstrip("-").replace("-", "_") for action in get_args_parser()._actions
               for option in action.option_strings}  # fmt: skip
    fields |= {name.replace("-", "_") for name in
               re.findall(r"--([a-z-]+)[=)|]", (HERE / "run.sh").read_text("utf-8"))}  # fmt: skip
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # it names what is gone
            continue
        for span in code_of(document):
            for name in re.findall(r"--([a-z][\w-]*)", span) if span.startswith("--") else ():
                name = name.replace("-", "_")
                assert {name, name.removeprefix("no_")} & fields, (document.name, span)


def test_every_link_of_the_documents_leads_somewhere():
    """A link to a file, a heading, or what a file defines: [`GPT` in common.py](common.py)."""
    slugs = {}
    for document in DOCUMENTS:
        headings = re.findall(r"^#+ (.*)", document.read_text("utf-8"), re.MULTILINE)
        slugs[document] = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    count = 0
    for document in DOCUMENTS:
        for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", document.read_text("utf-8")):
            if target.startswith("https://"):
                continue
            path, _, heading = target.partition("#")
            path = (document.parent / path).resolve() if path else document
            assert path.is_file() and path.is_relative_to(HERE), (document.name, target)
            assert not heading or heading in slugs[path], (document.name, target)
            for name in re.findall("`(\\w+)`", words):
                source = path.read_text("utf-8")
                assert re.search(rf"^(class |def )?{name}\b", source, re.MULTILINE), (words, target)
            count += 1
    assert count >= 30


# tokenizer.rs --------------------------------------------------------------------------------

BYTES = [bytes([byte]) for byte in range(256)]
PATTERN = nanochat_bpe.PATTERN


def plain_bpe(texts, vocab_size):
    """Merges found the slow and obvious way: count all pairs, join the best, start over."""
    words = [list(piece.encode()) for text in texts for piece in regex.findall(PATTERN, text)]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [joined(word, merges[-1], 255 + len(merges)) for word in words]
    return merges


def joined(word, pair, new_id):
    out, i = [], 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        out.append(new_id if is_pair else word[i])
        i += 2 if is_pair else 1
    return out


CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def encoding_of(tokens, pattern=PATTERN):
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def characters_by_tiktoken(pattern):
    """The characters that match a pattern of one character in tiktoken's regex engine."""
    engine, found = encoding_of(BYTES, pattern), set()
    for i in range(0, len(CHARACTERS), 10_000):
        found |= set(bytes(engine.encode_ordinary("".join(CHARACTERS[i : i + 10_000]))).decode())
    return found


@functools.cache
def characters_of_newer_unicode():
    """Characters that `regex` and tiktoken class differently: their Unicode versions differ."""
    differ = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        differ |= characters_by_tiktoken(pattern) ^ set(regex.findall(pattern, "".join(CHARACTERS)))
    assert len(differ) < 30_000, len(differ)
    return differ


def check_split(text):
    """Hold the split of a text to what regex and tiktoken make of the pattern.

    tiktoken first looks a whole piece up. With the pieces and each two neighbours of them in the
    vocabulary, it returns exactly the pieces only if it splits there and nowhere else.
    """
    pieces = nanochat_bpe.split(text)
    assert "".join(pieces) == text
    encoded = [piece.encode() for piece in pieces]
    candidates = {*encoded, *(one + other for one, other in itertools.pairwise(encoded))}
    tokens = BYTES + sorted(candidates - set(BYTES))
    assert [tokens[i] for i in encoding_of(tokens).encode_ordinary(text)] == encoded
    text = "".join(c for c in text if c not in characters_of_newer_unicode())
    assert nanochat_bpe.split(text) == regex.findall(PATTERN, text)


def real_texts(size):
    """The first characters of every file of real text; lines that JSON escapes are lines again."""
    if not (SHARED / "text").is_dir():
        pytest.skip(f"{SHARED / 'text'} is not there")
    for path in sorted((SHARED / "text").iterdir()):
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            yield file.read(size).replace("\\n", "\n")


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            "aZsſdmtlveréßñжΩ中の한'’\"!?.,-_/()0189٣Ⅷ½²  \t\n\r\v\f\x1c\x85\u00a0\u2009\u2028\u3000"
            "\u200b\u200d\u0301\ufeff\ufffd😀🏽𝒜𝟘\U0001f1e6\U000e0041\U0010ffff\0"
        ),
        st.sampled_from(["'s", "'LL", "'Ve", "'rE", "'ſ", "'t", "  ", " \n", "\r\n", "12", " a"]),
        st.characters(codec="utf-8"),
        st.characters(codec="utf-8", categories=["L", "N", "Z", "M", "P"]),
    ),
    max_size=40,
).map("".join)


@settings(max_examples=800)
@given(TEXTS)
@example("")
@example("'ſtuff I'LL we've THEY'RE 'lL'vE'Re  ")
@example("a  b   \n\n  c\r\n\t d    ")
@example("12345 67٣٣٣ ½½½")
def test_split_is_the_pattern_of_tiktoken(text):
    check_split(text)


def test_split_of_real_text_is_the_pattern():
    for text in real_texts(200_000):
        check_split(text)


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


@settings(max_examples=200)
@given(st.lists(st.text("abc é", max_size=60), max_size=5), st.integers(256, 330))
@example(["low lower lowest newer newest wider widest low low"], 400)
@example(["aaaa aaaaa aaaaaaa", "aaa", "a"], 400)  # overlapping pairs
@example(["abababab babababa aabbaabb abcabcabc bcabcab"], 400)
@example(["ab cd ef gh ij kl"], 400)  # every count equal
@example(["Über Öl, naïve café — 東京都 東京 京都 Привет 😀😀😀", "'S 'll 12345 1 \n\n  x"], 400)
@example(["the cat", " the", "cat", "", "\n"] * 3, 400)
@example(["antidisestablishmentarianism", "antidisestablishmentarianism"], 400)  # > 15 bytes
@example(["a", "b"] * 9, 300)  # documents are boundaries
@example(["ab"] * 9, 256)
@example([], 300)
def test_merges_are_those_of_plain_bpe(texts, vocab_size):
    for threads in (1, 2):
        assert nanochat_bpe.train(iter(texts), vocab_size, threads) == plain_bpe(texts, vocab_size)


def test_merges_of_real_text_are_those_of_plain_bpe():
    texts = list(itertools.islice(real_texts(2_500), 12))
    assert nanochat_bpe.train(texts, 400) == plain_bpe(texts, 400)


def test_merges_do_not_depend_on_threads_or_the_order_of_documents():
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(2000)]
    documents = [" ".join(rng.choices(words, k=rng.randint(0, 2000))) for _ in range(300)]
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


def test_text_is_streamed():
    """200 MB pass through a generator and leave no trace in the memory of the process."""
    program = """if True:
        import itertools, random, resource, sys, nanochat_bpe
        def peak():  # Linux's getrusage counts the process that started this one, too
            if sys.platform == "linux":
                return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        letters = bytes([*b"etaoinshrdlu    "] * 16)
        def documents():
            for i in range(200):
                yield random.Random(i % 3).randbytes(1_000_000).translate(letters).decode()
        nanochat_bpe.train(itertools.islice(documents(), 9), 300, 2)
        for whole in (iter, list):  # that a list is seen shows that a trace would be
            before = peak()
            nanochat_bpe.train(whole(documents()), 300, 2)
            print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    streamed, held = map(int, done.stdout.split())
    assert streamed < 30_000 and held > 150_000


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
        import itertools, random, nanochat_bpe
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
        child.send_signal(signal.SIGINT)
        try:
            assert child.communicate(timeout=60)[0] == "stopped\n"
        finally:
            child.kill()


def broken_documents():
    yield "text " * 100_000
    raise ValueError("the disk is gone")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        *(("train", ([], n), "vocab_size must be an integer from 256") for n in (255, -1, 1 << 70,
                                                                               "1000", 300.0)),
        ("train", ([], 300, -1), "threads must be an integer from 0 .* not -1"),
        ("train", ([], 300, 100_000), "threads must be"),
        ("train", (["one", 2], 300), "texts item 1 must be str, not int"),
        ("train", ([b"one"], 300), "texts item 0 must be str, not bytes"),
        ("train", ("one text", 300), "texts must be an iterable of strings"),
        ("train", (5, 300), "texts must be an iterable of strings"),
        ("train", (["a", "b\ud800c"], 300), "texts item 1 is not Unicode.*ud800"),
        ("train", (broken_documents(), 300), "the disk is gone"),
        ("split", ("\udfff",), "text is not Unicode.*udfff"),
        ("split", (None,), "text must be str, not NoneType"),
        ("token_bytes", ([(97, 98), (257, 1)],), "merges item 1 joins a later id"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(name, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(nanochat_bpe, name)(*args)


# 8. Settings, errors, log ----------------------------------------------------------------------


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


@pytest.mark.parametrize("torn", [b"", b'{"stage": "base", "st', b"\0" * 40, b'{"stage": "b\xff"}'])
def test_a_resumed_run_drops_later_lines_of_its_log_and_torn_ones(base_dir, torn):
    run, path = common.Run("base", "t", None, CPU), common.run_dir("t") / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    for step in (1, 2, 3):
        run.log(step, loss=float(step))
        with path.open("ab") as file:
            file.write(torn + b"\n" * (step == 1))
    common.Run("sft", "t", None, CPU).log(3, loss=9.0)
    common.drop_replaced(run, 1)
    run.log(2, loss=0.5)
    events = [(x["stage"], x["step"]) for x in map(json.loads, path.open())]
    sft = [("sft", 3)] * (torn == b"")  # the line after a torn one without an end is lost with it
    assert events == [("base", 1), *sft, ("base", 2)]


@dataclass
class ExampleSettings:
    total_size: int = common.setting(8, "of it", group="data")
    rate: float = common.setting(0.5, "a second")
    fast: bool = common.setting(False, "or slow", group="device")
    at_once: bool = common.setting(True, "or never")
    stage: str = common.setting("base", "which", short="i", choices=("base", "sft"))
    derived: ClassVar = {"model_dim": "it follows from --depth"}

    def __post_init__(self):
        common.at_least(self, 0, "total_size")


def test_settings_take_both_spellings_and_round_numbers(capsys):
    def parse(line):
        return common.parse_settings(ExampleSettings, "doc", line.split())

    assert parse("--total-size=3") == parse("--total_size 3") == ExampleSettings(total_size=3)
    assert parse("--total-size=2e9").total_size == 2_000_000_000
    assert parse("--fast -i sft --rate=1e-3") == ExampleSettings(fast=True, stage="sft", rate=1e-3)
    assert parse("--no-fast").fast is False
    assert not parse("--no_at_once").at_once and parse("--at_once").at_once
    assert not parse("--no-at-once").at_once
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out.split("options:")[1]
    places = list(map(said.index, ("--rate", "data:", "--total-size", "device:", "--fast")))
    assert places == sorted(places), "help is in groups"


# settings of which what they do, or what 0 stands for, differs by stage
DIFFERENT = """restart source seed stage num_iterations total_batch_size device_batch_size
matrix_lr embed_lr head_lr weight_decay warm_start chats start_from epochs temperature slots
run_code compile""".split()


def test_one_name_is_one_setting_in_every_stage():
    seen = {}
    for stage in STAGES:
        cls = importlib.import_module(stage).Settings
        for f in dataclasses.fields(cls):
            shared = issubclass(cls, common.RunSettings) and f.name not in DIFFERENT
            kind = (f.type, f.metadata["help"]) if shared else f.type
            assert seen.setdefault((f.name, shared), kind) == kind, f"{stage}.{f.name}"
            assert seen.setdefault(f.name, f.type) == f.type and f.metadata["help"]
    plain = dataclasses.asdict(sft.Settings())
    assert (plain["lr_scale"], plain["warmup"], plain["warmdown"]) == (0.05, 0, 1.0)
    assert (midtrain.Settings().lr_scale, rl.Settings().warm_start) == (0.7, False)


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        (sys.modules[__name__], "--total-sise=3", "did you mean --total-size"),
        (sys.modules[__name__], "--model-dim=3", "it follows from --depth"),
        (sys.modules[__name__], "--total-size=1.5", "not a whole number"),
        (sys.modules[__name__], "--total-size=inf", "not a whole number"),
        (sys.modules[__name__], "--total-size=-1", "--total-size must be 0 or more"),
        (sys.modules[__name__], "--total-size=x", "invalid whole number value: 'x'"),
        (sys.modules[__name__], "--stage=mid", "invalid choice"),
        (pretrain, "--total-batch-size=100", "2048 would"),
        (pretrain, "--depth=0", "--depth=0 must be from 1 to 128"),
        (pretrain, "--depth=999", "--depth=999 must be"),
        (pretrain, "--head-dim=33", "must divide"),
        (pretrain, "--n-kv-head=5", "must divide"),
        (pretrain, "--max-seq-len=1", "--max-seq-len must be 2 or more"),
        (pretrain, "--window-pattern=Q", "letters"),
        (pretrain, "--tag=../x", "--tag"),
        (pretrain, "--lr-scale=0", "--lr-scale must be above 0"),
        (pretrain, "--warmdown=1.5", "--warmdown must be from 0 to 1"),
        (pretrain, "--target-flops=-1", "--target-flops must be"),
        (pretrain, "--target-flops=inf", "--target-flops must be"),
        (pretrain, "--target-param-data-ratio=nan", "--target-param-data-ratio must be above 0"),
        (pretrain, "--plan-count=0", "--plan-count must be 1 or more"),
        (pretrain, "--muon-steps=4", "--muon-steps must be 3, 5 or 0"),
        (pretrain, "--model-dim=256", "derived from --depth"),
        (pretrain, "--seed=-1", "--seed must be 0 or more"),
        (midtrain, "--seed=-1", "--seed must be 0 or more"),
        (midtrain, "--text-share=1", "--text-share must be from 0"),
        (sft, "--seed=-1", "--seed must be 0 or more"),
        (sft, "--epochs=0", "--epochs must be 1 or more"),
        (sft, "--total-batch-size=-1", "--total-batch-size must be 0 or more"),
        (evaluate, "--seed=-1", "must be 0 or more"),
        (rl, "--seed=-1", "--seed must be 0 or more"),
        (rl, "--compile=yes", "is not a setting"),
        (rl, "--num-iterations=-1", "--num-iterations must be 0 or more"),
        (rl, "--warmup=-1", "--warmup must be 0 or more"),
        (rl, "--keep=-1", "--keep must be 0 or more"),
        (rl, "--top-k=-1", "top"),
        (rl, "--num-samples=1", "--num-samples must be 2 or more"),
        (rl, "--val-problems=-1", "--val-problems must be 0 or more"),
        (rl, "--val-problems=129", "--val-problems must be 128 or less"),
        (rl, "--temperature=0", "temperature"),
        (rl, "--temperature=inf", "temperature"),
    ],
    ids=lambda x: "" if isinstance(x, type(sys)) else None,
)
def test_a_wrong_setting_gets_one_line_and_exit_2(module, words, sentence, capsys):
    cls = ExampleSettings if module is sys.modules[__name__] else module.Settings
    with pytest.raises(SystemExit) as stop:
        common.parse_settings(cls, "doc", words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in err and err.count("\n") == 1


# 9. Devices, ranks, start_run ------------------------------------------------------------------


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


def test_compilation_is_a_choice_that_is_said(monkeypatch, capsys):
    def compiles(choice, seconds, before=False):
        return common.compile_or_not(choice, seconds, CPU, common.say, before)

    real = common.can_compile
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    assert not any([compiles("auto", 30), compiles("no", 1e6), compiles("auto", 1e6)])
    said = capsys.readouterr().out.splitlines()
    assert "C++ compiler" in said[2] and "python3-dev" in said[2] and len(said) == 3
    assert not compiles("yes", 1)
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    assert compiles("auto", 1e6) and compiles("yes", 1) and not compiles("no", 1e6)
    for seconds in (20, 100):  # where a former stage was compiled it costs less
        assert compiles("auto", seconds, before=True) == (seconds > 30)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setenv("CC", "my-cc")  # Triton builds what launches its programs
    for compilers in ((), ("clang",), ("my-cc",)):
        monkeypatch.setattr(shutil, "which", lambda name, have=compilers: name in have or None)
        assert real(torch.device("cuda")) == bool(compilers)


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
    found = common.peak_flops.__wrapped__(torch.device("cuda"), torch.bfloat16)
    assert found == common.PEAK_FLOPS.get(peak, -1.0)


def test_a_containers_limit_is_the_memory_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CGROUP", tmp_path)
    whole = common.free_bytes(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert common.free_bytes(CPU) == whole > 1 << 28
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{1 << 28}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.free_bytes(CPU) == 1 << 27, "ranks share it"


def test_a_containers_quota_is_the_cores_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    (tmp_path / "cpu").mkdir()
    for v2, quota, cores in (("max 100000", -1, 16), ("250000 100000", -1, 2),
                             ("50000 100000", -1, 1), ("max 100000", 400_000, 4)):  # fmt: skip
        (tmp_path / "cpu.max").write_text(f"{v2}\n")
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert common.own_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.own_cores() == 2, "ranks share them"
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    common.limit_threads()
    assert asked == [2]


def begun():
    return common.start_run("base", pretrain.Settings(tag="t", device="cpu"))


BEGUN = "import common, pretrain\nwith common.start_run('base', pretrain.Settings()) as run:\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_error_is_one_sentence(base_dir, number):
    with pytest.raises(common.Stop) as stop, begun():
        raise OSError(number, os.strerror(number), "/some/where")
    assert "/some/where" in str(stop.value) and "\n" not in str(stop.value)


def test_a_reader_that_goes_away_ends_a_stage_by_one_sentence(base_dir):
    code = BEGUN + "    while True: run.say('step')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=HERE, text=True, **pipes) as writer:
        assert writer.stdout.readline() == "step\n"
        writer.stdout.close()
        said = writer.stderr.read()
    assert writer.returncode == 1 and said.count("\n") == 1 and "nobody reads" in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the system's malloc is another")
def test_a_stage_keeps_the_memory_it_frees(base_dir):
    code = f"""import resource, torch
{BEGUN}
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

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = pretrain.Settings(tag="t", device="cpu", run="mine")
    with common.start_run("base", settings) as run:
        assert run.wandb is None
    said = capsys.readouterr().out
    assert "no way to api.wandb.ai" in said and said.count("\n") == 1


def test_plain_switches_the_fast_paths_off_in_stages_and_for_answers(base_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "use_plain", asked.append)
    with common.start_run("base", pretrain.Settings(tag="t", device="cpu", plain=True)), begun():
        pass
    for changes in ({"plain": True}, {}):
        with pytest.raises(common.MissingInput):
            common.load_for_answers(common.ModelSettings(tag="t", **changes))
    assert asked == [True, False, True, False]


# 4. Tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [
    common.Tokenizer, common.render_conversation, common.render_call, common.last_number,
    common.pack_rows, train_tokenizer.fit_vocab_size,
])  # fmt: skip
def test_the_examples_of_docstrings_are_true(item):
    tests = doctest.DocTestFinder(recurse=False).find(
        item, globs=vars(common) | vars(train_tokenizer)
    )
    assert tests[0].examples and not any(doctest.DocTestRunner().run(one).failed for one in tests)


@given(st.text())
@example("a <|bos|> and <|assistant_end|> b")  # no special token is made from text
@example("It's 1234 o'clock — naïve 北京 🙂\n\n\tx")
@settings(max_examples=200)
def test_encoding_loses_nothing_and_merges_as_trained(text):
    tokenizer = TOKENIZER()
    words = [list(piece.encode()) for piece in nanochat_bpe.split(text)]
    for i, pair in enumerate(tokenizer.merges):
        words = [joined(word, pair, 256 + i) for word in words]
    ids = tokenizer.encode(text)
    assert ids == list(itertools.chain(*words)) and tokenizer.decode(ids) == text
    tokens = nanochat_bpe.token_bytes(tokenizer.merges)
    assert b"".join(tokens[i] for i in ids) == text.encode()
    assert [len(token) for token in tokens] == tokenizer.token_bytes.tolist()[: tokenizer.bos]
    assert not tokenizer.token_bytes[tokenizer.bos :].any()


def test_text_at_which_the_encoder_panics_is_encoded_in_halves(tokenizer, monkeypatch):
    class PanicException(BaseException):
        """As Rust's panics arrive: no Exception."""

    def encode(text):
        if len(text) > 30:
            raise PanicException
        return tokenizer.encode(text)

    other, text = copy.copy(tokenizer), "".join(SENTENCES[:4])
    monkeypatch.setattr(other, "encoding", SimpleNamespace(encode_ordinary=encode))
    assert tokenizer.decode(other.encode(text)) == text
    assert other.encode_batch(["a b", text]) == [tokenizer.encode("a b"), other.encode(text)]
    monkeypatch.setattr(other.encoding, "encode_ordinary", unittest.mock.Mock(side_effect=KeyError))
    with pytest.raises(KeyError):
        other.encode("a")


def test_the_tokenizer_file_is_complete_and_damage_is_said(tokenizer, tmp_path):
    with pytest.raises(common.MissingInput, match="train_tokenizer.py"):
        common.Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    again, path = common.Tokenizer.load(tmp_path), tmp_path / "tokenizer.json"
    assert (again.fingerprint, again.merges) == (tokenizer.fingerprint, tokenizer.merges)
    assert json.loads(path.read_text("utf-8"))["pattern"] == tokenizer.pattern
    path.write_text(path.read_text()[:-100])
    with pytest.raises(common.MissingInput, match="damaged"):
        common.Tokenizer.load(tmp_path)


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


@pytest.mark.parametrize(("item", "right", "wrong"), [
    ({"grade": "number", "answer": "1,234.50"},
     ["First 5, then $1234.5."], ["1,234.50 or 6", "none"]),
    ({"grade": "letter", "answer": "B", "choices": ["Rome", "B", "a cow"]},
     ["B", " B.", "B) Rome", "(B) Rome", "B: it is", "B\nRome", "Rome B", "B B", "a cow B.",
      "It is Rome.\n- Rome B", "- Rome B\n"],
     ["Because", "A or B", "B or A", "B minor", "B's", "b", "", "Rome C", "B A", "Rome, B",
      "Oslo B", "Rome", "It is Rome.\n- Rome C", "B\n- Rome C", "It is B.\n- Oslo B"]),
    ({"grade": "text", "accept": ["New Mexico", "it's Cuba"], "reject": ["Mexico", "Ohio"]},
     ["That is NEW  mexico!", "It\u2019s Cuba.", "New Mexico, not Ohioan"],
     ["New Mexico, not Ohio", "Mexico", "New Mexicos"]),
    ({"grade": "text", "accept": ["c-a-t"], "reject": []},
     ['"cat" is c-a-t.', "C-A-T"], ["c-a-t-s", "s-c-a-t"]),
])  # fmt: skip
def test_the_graders(item, right, wrong):
    assert [text for text in right if not common.grade(item, text)] == []
    assert [text for text in wrong if common.grade(item, text)] == []


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


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("split", [(1,) * 32, (32,), (7, 1, 1, 9, 3, 1, 10), (31, 1)])
def test_decoding_with_the_cache_gives_the_logits_of_a_full_pass(changes, split):
    model = random_model(**changes)
    ids = torch.randint(100, (2, 32))
    cache = common.KVCache(model.config, 2, CPU, torch.float32)
    parts = [model.logits(model.trunk(part, cache.extend(part))) for part in ids.split(split, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):  # nothing is overwritten at the context's end
        cache.extend(ids[:, :1])


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_rows_of_unequal_length_decode_as_each_alone(changes):
    model = random_model(**changes, max_seq_len=64)
    rows = [torch.randint(100, (n,)) for n in (3, 17, 1, 9)]
    cache = common.KVCache(model.config, 5, CPU, torch.float32)
    part = cache.part(0, 4)
    for step in range(12):
        counts = [3, 17, 1, 9] if step == 0 else [(step + i) % 3 + 1 for i in range(4)]
        new = rows if step == 0 else [torch.randint(100, (n,)) for n in counts]
        rows = [torch.cat(pair) for pair in zip(rows, new)] if step else rows
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=99)
        h = model.trunk(padded, part.extend(padded, counts))
        last = model.logits(h[torch.arange(4), torch.tensor(counts) - 1])
        for i, row in enumerate(rows):
            torch.testing.assert_close(last[i], model(row[None])[0, -1], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [*map(len, rows), 0], "rows of a part are those of the whole"
    cache.copy_row(1, 4, 10)
    cache.swap_rows(4, 2)
    one = torch.randint(100, (1, 1))
    logits = model.logits(model.trunk(one, cache.part(2, 3).extend(one)))[0, -1]
    whole = model(torch.cat((rows[1][:10], one[0]))[None])[0, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not common.can_compile(CPU), reason="needs a C++ compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tables_gradient_is_the_sum_of_its_rows_and_the_same_each_time(compiled):
    table = common.Embedding(300, 256)
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


def test_an_engine_takes_over_new_weights_and_packs_none_where_memory_is_short(
    tokenizer, monkeypatch
):
    monkeypatch.setattr(common, "LARGE", 1)
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 64}
    old, new = random_model(**shape), random_model(seed=1, **shape)
    engine, fresh = (common.Engine(copy.deepcopy(m), tokenizer, 2) for m in (old, new))
    requests = [greedy([tokenizer.bos, i], 8) for i in range(2)]
    before = dict(engine.run(requests))
    engine.refresh(new)
    after = dict(engine.run(requests))
    assert after == dict(fresh.run(requests)) and after != before
    packed = isinstance(engine.model.head, common.PackedLinear)
    assert packed == common.PackedLinear.pays(engine.model.head.weight)
    monkeypatch.setattr(common, "free_bytes", lambda device: 1000)
    assert type(common.Engine(old, tokenizer, 1).model.head) is common.Linear


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
            common.train_in_fp8(model)
        eight = [name for name, m in model.named_modules() if isinstance(m, common.Float8Linear)]
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
            assert torch.equal(model(ids), common.for_decoding(model)(ids))
    assert losses[True] < 1 and losses[True] == pytest.approx(losses[False], abs=0.1)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_model_laid_out_for_decoding_or_in_8_bits_is_the_same_model(changes):
    model, fast = random_model(**changes), common.for_decoding(random_model(**changes))
    ids = torch.randint(100, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
        small = common.for_decoding(common.quantize(random_model(**changes)))
        error = (small(ids) - model(ids)).square().mean().sqrt()
        assert 0 < error < 0.1 * model(ids).std()
    wide = {name for name, weight in small.state_dict().items() if weight.dtype != torch.int8}
    assert wide == {
        name for name in small.state_dict() if re.search("embed|bigrams|gate|mix", name)
    }


def attend_by_formula(q, k, v, mask):
    """Attend as a textbook has it; mask (B, T, S)."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) / q.size(3) ** 0.5
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.double())


@contextlib.contextmanager
def plain():
    common.use_plain(True)
    yield
    common.use_plain(False)


# (T, S, heads, heads of keys, window, given mask) and the fast path of attention that is for it
ATTENDED = {
    "rows": (300, 300, 4, 4, 512, False, common.attend_short_row),
    "short rows": (7, 7, 2, 2, 7, False, common.attend_short_row),
    "windows": (9, 9, 4, 2, 3, False, None),
    "a row that goes on": (5, 23, 4, 2, 7, False, None),
    "a masked row": (5, 23, 4, 1, 23, True, None),
    "one query": (1, 40, 4, 2, 64, False, common.attend_one_query),
    "one masked query": (1, 40, 6, 3, 64, True, common.attend_one_query),
}


@pytest.mark.parametrize("case", ATTENDED.values(), ids=ATTENDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_fast_paths_equal_the_formula(case, dtype):
    T, S, H, K, window, masked, path = case
    q, k, v = (torch.randn(2, n, heads, 8, requires_grad=True) for n, heads in
               ((T, H), (S, K), (S, K)))  # fmt: skip
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)
    rule = ((back >= 0) & (back < window)).expand(2, T, S)
    mask = rule & (torch.rand(2, T, S) < 0.5) | (back == 0) if masked else None
    d_y = torch.randn(2, T, H, 8)
    expected = attend_by_formula(q, k, v, rule if mask is None else mask)
    wanted = torch.autograd.grad(expected, (q, k, v), d_y.double())
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    ways = [common.attend] + ([] if path is None else [path])
    for way in ways:
        y = way(*(x.to(dtype) for x in (q, k, v)), window, mask)
        torch.testing.assert_close(y.double(), expected, **close)
        for a, b in zip(torch.autograd.grad(y, (q, k, v), d_y.to(dtype)), wanted):
            torch.testing.assert_close(a, b.float(), **close)


def queries(T, S, dtype=torch.float32):
    return torch.randn(2, T, 2, 8).to(dtype), *torch.randn(2, 2, S, 2, 8).to(dtype), S, None


def product(*shape, dtype=torch.float32):
    return torch.randn(*shape, 64).to(dtype), torch.randn(4096, 64).to(dtype)


# A door, its inputs, and which entry of its table is taken: not compiled, compiled. The inputs are
# made in the test, as threads that they start would be missing in a process that is forked later.
DOORS = {
    "one query": ("attend", lambda: queries(1, 20), (None, 0)),
    "one query in bf16": ("attend", lambda: queries(1, 20, torch.bfloat16), (0, 0)),
    "whole rows": ("attend", lambda: queries(20, 20), (None, 1)),
    "long rows": ("attend", lambda: queries(513, 513), (None, None)),
    "rows that go on": ("attend", lambda: queries(5, 20), (None, None)),
    "one row": ("linear", lambda: product(1, 1), (None, 0)),
    "one row in bf16": ("linear", lambda: product(1, dtype=torch.bfloat16), (None, 0)),
    "few rows": ("linear", lambda: product(16, 4), (1, 1)),
    "many rows": ("linear", lambda: product(13, 5), (None, None)),
}


@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
@pytest.mark.parametrize(("name", "make", "taken"), DOORS.values(), ids=DOORS)
def test_a_door_takes_the_fast_path_for_its_inputs(name, make, taken, monkeypatch):
    def marked(number):
        return lambda x, *_: torch.full_like(x[..., :1], number)

    def entry(y):
        return next((i for i in range(len(paths)) if (y == i).all()), None)

    inputs, door, table = make(), getattr(common, name), f"{name.upper()}_PATHS"
    paths = [dataclasses.replace(path, compute=marked(i))
             for i, path in enumerate(getattr(common, table))]  # fmt: skip
    monkeypatch.setattr(common, "AMX", False)
    monkeypatch.setattr(common, table, paths)
    for way, number in zip((lambda f: f, lambda f: torch.compile(f, backend="eager")), taken):
        torch.compiler.reset()
        with torch.no_grad():
            assert entry(way(door)(*inputs)) == number
            common.use_plain(True)
            assert entry(way(door)(*inputs)) is None
            common.use_plain(False)
    assert entry(door(*inputs)) is None, "not while training, uncompiled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 100])
def test_products_for_decoding_equal_exact_ones(rows, dtype, monkeypatch):
    monkeypatch.setattr(common, "LARGE", 16)
    part, x = common.Linear(96, 80), torch.randn(rows, 1, 96).to(dtype)
    torch.nn.init.normal_(part.weight)
    weight = part.weight.detach().to(dtype)
    exact = (x.double() @ weight.double().t()).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.1}
    ways = [lambda x: common.linear(x, weight), lambda x: common.multiply_few_rows(x, weight)]
    ways += [lambda x: common.multiply_row(x, weight)] if rows == 1 else []
    if common.PackedLinear.pays(weight):
        ways.append(common.PackedLinear(weight))
    with torch.no_grad():
        for way in ways:
            torch.testing.assert_close(way(x), exact, **close)
        small = common.Int8Linear.rounded(part)
        y = small(x)
        assert small.weight.dtype == torch.int8 and y.shape == exact.shape and y.dtype == dtype
        for i in range(rows):
            assert torch.equal(small(x[i : i + 1]), y[i : i + 1]), "a row depends on no other"
        small.packed = None
        assert torch.equal(small(x), y), "packed or not, sums are exact"
    stepped = small.weight * small.scale[:, None]
    assert ((stepped - part.weight).abs() <= small.scale[:, None] * 0.5001).all()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    rounded = (x.float() / step).round() * step
    expected = (rounded.double() @ stepped.double().t()).to(dtype)
    torch.testing.assert_close(y, expected, **close)
    assert (y - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.skipif(not common.can_compile(CPU), reason="no compiler here")
def test_a_compiled_int8_product_of_one_row_is_exact_to_the_ends_of_its_range(monkeypatch):
    monkeypatch.setattr(common, "AMX", False)
    monkeypatch.setattr(common, "LARGE", 1)
    ends = torch.randn(48, 1024).sign() * 127
    part = common.Int8Linear(ends.to(torch.int8), torch.rand(48))
    with torch.inference_mode():
        for x in (torch.randn(1, 1, 1024), torch.randn(1, 1, 1024).sign()):
            assert torch.equal(torch.compile(part, dynamic=False)(x), part(x))


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

KINDS = {"muon": [(8, 16)] * 5 + [(16, 8), (7, 7)], "adamw": [(13, 3), (1,), (5,)]}


def optimizer_trace(world_size=1, num_steps=4, polynomials=5):
    """Return an optimizer that has made updates, and (before, gradients, now) of each parameter.

    Every rank gives its part of the same gradients; the last parameter never has one.
    """
    torch.manual_seed(1)
    coefficients = common.POLYNOMIALS[polynomials]
    options = {"muon": {"momentum": 0.9, "weight_decay": 0.1, "coefficients": coefficients},
               "adamw": {"betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}}  # fmt: skip
    groups = [{"kind": kind, "params": [torch.nn.Parameter(torch.randn(s)) for s in shapes],
               "lr": 0.02, **options[kind]} for kind, shapes in KINDS.items()]  # fmt: skip
    params = [p for group in groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    grads = [[torch.randn(p.shape) for p in params[:-1]] for _ in range(num_steps)]
    optimizer = common.Optimizer(groups, torch.float32)
    for step, now in enumerate(grads):
        for p, g in zip(params, now):
            p.grad = g / world_size
        optimizer.step(1 - step / 10)
    assert all(p.grad is None for p in params)
    grads = [*zip(*grads), [torch.zeros_like(params[-1])] * num_steps]
    return optimizer, list(zip(before, grads, [p.detach() for p in params]))


@pytest.mark.parametrize("polynomials", [3, 5])
def test_muon_moves_along_the_singular_vectors_of_its_momentum(polynomials):
    for p, grads, found in optimizer_trace(polynomials=polynomials)[1][: len(KINDS["muon"])]:
        p, buf, (m, n) = p.double(), torch.zeros_like(p).double(), p.shape
        for step, g in enumerate(grads):
            lr, buf = 0.02 * (1 - step / 10), 0.9 * buf + 0.1 * g
            u, s, v = torch.linalg.svd(0.1 * g + 0.9 * buf, full_matrices=False)
            s = s / (1.02 * s.norm() + 1e-7)
            for a, b, c in common.POLYNOMIALS[polynomials]:
                s = a * s + b * s**3 + c * s**5
            p = p * (1 - lr * 0.1) - lr * max(1, m / n) ** 0.5 * (u * s) @ v
        torch.testing.assert_close(found.double(), p, rtol=0, atol=1e-5)


def test_adamw_equals_torchs_own():
    for before, grads, found in optimizer_trace()[1][len(KINDS["muon"]) :]:
        p = torch.nn.Parameter(before)
        reference = torch.optim.AdamW([p], betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
        for step, p.grad in enumerate(grads):
            reference.param_groups[0]["lr"] = 0.02 * (1 - step / 10)
            reference.step()
        torch.testing.assert_close(found, p.detach())


@pytest.mark.parametrize(("steps", "share"), [(5, 0.97), (3, 0.95)])
@pytest.mark.parametrize("shape", [(64, 64), (3, 32, 128), (128, 32)])
def test_orthogonalization_brings_singular_values_near_one(steps, share, shape):
    torch.manual_seed(0)
    g, coefficients = torch.randn(shape), common.POLYNOMIALS[steps]
    x = common.orthogonalize(g, coefficients, torch.float32)
    values = torch.linalg.svdvals(x)
    assert x.shape == shape and (values > 0.6).float().mean() > share and values.max() < 1.3
    small = common.orthogonalize(1e-9 * g, coefficients, torch.float16)  # below its range
    torch.testing.assert_close(small.float(), x, atol=0.03, rtol=0)
    assert not common.orthogonalize(0 * g, coefficients, torch.float16).any()


def test_narrow_models_take_fewer_polynomials():
    def polynomials(width, **options):
        model = random_model(n_embd=width, n_head=1, n_kv_head=1)
        groups = common.optimizer_groups(model, 0.02, 0.2, 0.004, 0, **options)
        return len(groups[0]["coefficients"])

    assert (polynomials(384), polynomials(384, muon_steps=5), polynomials(512)) == (3, 5, 5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_update_as_one_does_and_their_state_is_resharded(world_size, tmp_path):
    run_ranks(
        world_size,
        f"""
        optimizer, trace = test_all.optimizer_trace({world_size})
        torch.save((trace, optimizer.state_dict()), r"{tmp_path}/%d.pt" % rank)
        """,
    )
    whole, expected = optimizer_trace()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for trace, _ in found:
        torch.testing.assert_close([x[2] for x in trace], [x[2] for x in expected])
    again, _ = optimizer_trace(num_steps=1)
    again.load_state_dicts([shard for _, shard in found])
    assert again.steps == whole.steps == 4
    for a, b in zip(again.units, whole.units):
        torch.testing.assert_close(a.state, b.state)


# 7. Rows -------------------------------------------------------------------------------------


def in_bytes(text):
    """Return the ids of text in a vocabulary without merges: bytes, then the special tokens."""
    specials = {name: [256 + i] for i, name in enumerate(common.SPECIAL_TOKENS)}
    parts = re.split(r"(<\|\w+\|>)", text)
    return [i for part in parts for i in specials.get(part, part.encode())]


def test_the_rows_of_this_version_are_the_golden_ones():
    """If it fails as format or packing were changed on purpose: raise ROWS_VERSION, edit this."""
    assert common.ROWS_VERSION == 1
    tokenizer = common.Tokenizer(nanochat_bpe.PATTERN, [])
    ids, mask = common.render_conversation(tokenizer, common.PROBE[:3])
    given = "<|bos|><|user_start|>Be brief.\n\n37*12?<|user_end|><|assistant_start|>"
    pieces = [(given, 0), ("It is <|python_start|>37*12<|python_end|>", 1),
              ("<|output_start|>444<|output_end|>", 0), (".<|assistant_end|>", 1)]  # fmt: skip
    assert ids == [i for text, _ in pieces for i in in_bytes(text)]
    assert mask == [own for text, own in pieces for _ in in_bytes(text)]
    texts = ["abcdefghij", "", "klm", "nopq", "rs"]
    rows = common.pack_rows(common.text_documents(texts, tokenizer), 7, buffer=3)
    golden = ["<|bos|>nopq<|bos|>rs", "<|bos|>klm<|bos|>abc", "<|bos|>defghij"]
    assert list(rows) == [in_bytes(row) for row in golden]


def test_rows_are_made_anew_where_what_makes_them_does_something_else(
    text_source, tokenizer, monkeypatch, capsys
):
    lines = [one_turn(f"{i}?", "Yes.") for i in range(20)]
    path = write_lines(common.data_dir(text_source) / "sft.jsonl", lines)
    plain = {name: getattr(common, name) for name in ("chat_format", "pack_rows", "ROWS_VERSION")}

    def names(**patches):
        for name, value in {**plain, **patches}.items():
            monkeypatch.setattr(common, name, value)
        return [common.conversation_rows(path, tokenizer, 64, ALONE)[0].names,
                common.token_rows(text_source, tokenizer, 64, 10**9, ALONE).names]  # fmt: skip

    def formatted(change):
        return lambda messages: (change(*piece) for piece in plain["chat_format"](messages))

    def packed(change):
        return lambda *args, **options: change(plain["pack_rows"](*args, **options))

    before = names()
    capsys.readouterr()
    # other source text that does the same, as after a changed comment: nothing is made anew
    same = names(chat_format=formatted(lambda *piece: piece), pack_rows=packed(iter))
    assert same == before and not capsys.readouterr().out
    # what joins the system message, whether a piece is learned, and each special token
    changes = [lambda text, *rest: (text.replace(".\n\n", ".\n"), *rest)]
    for one in [*common.SPECIAL_TOKENS[1:], "444", "37*12", "It is "]:
        changes += [
            lambda text, special, own, one=one: (text, special, own ^ (text == one)),
            lambda text, *rest, one=one: (common.BOS if text == one else text, *rest),
        ]
    seen = [before]
    for change in changes:
        after = names(chat_format=formatted(change))
        assert after[1] == before[1] and after not in seen
        seen.append(after)
    for after in (names(pack_rows=packed(lambda rows: [*rows][::-1])), names(ROWS_VERSION=2)):
        assert after[0] != before[0] and after[1] != before[1]


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 24), st.integers(1, 9))
@settings(max_examples=300)
def test_packing_loses_no_token_and_begins_every_row_with_bos(lengths, T, buffer):
    serial = itertools.count(1)
    documents = [[0, *itertools.islice(serial, n)] for n in lengths]  # every token is its own
    rows = list(common.pack_rows(documents, T, buffer))
    assert all(len(row) == T + 1 for row in rows[:-1]) and all(row[0] == 0 for row in rows)
    assert sorted(i for row in rows for i in row[1:] if i) == list(range(1, sum(lengths) + 1))
    for row in rows:  # a piece is a run of its document
        assert all(b == a + 1 or b == 0 or a == 0 for a, b in itertools.pairwise(row))


def test_all_text_is_trained_on_but_what_begins_a_row_and_filling_never(text_source, tokenizer):
    rows = common.token_rows(text_source, tokenizer, 64, 10**9, ALONE)
    ids, targets = rows.gather([*range(len(rows)), -1])
    shards = common.list_shards(text_source, "train")
    tokens = sum(len(tokenizer.encode(t)) for path in shards for t in common.read_texts(path))
    starts = sum(int((rows.row(i)[1:] == tokenizer.bos).sum()) for i in range(len(rows)))
    count = int((targets != common.IGNORE).sum())
    assert count - tokens in range(starts + 1), "of a <|bos|> in a row the end is learned"
    assert len(rows) * 64 <= 1.05 * count  # and few positions are spent on filling
    assert (ids[-1] == tokenizer.bos).all() and (targets[-1] == common.IGNORE).all()
    assert (ids[:, 0] == tokenizer.bos).all() and (
        ids[targets == common.IGNORE] == tokenizer.bos
    ).all()
    assert not ((ids == tokenizer.bos) & (targets == tokenizer.bos)).any()


def second_shard():
    """Return the paths of the source "tiny"'s first and second shard, and make that one."""
    first = common.list_shards("tiny", "train")[0]
    return first, shutil.copy(first, first.with_name("train-00001.parquet"))


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
    run = common.Run("base", "t", None, CPU, 0, 1, stopping=True)
    with pytest.raises(SystemExit) as ended:  # after the next shard, whose rows stay
        common.token_rows(text_source, tokenizer, 64, 10**9, run)
    assert ended.value.code == 0 and "run the same command again" in capsys.readouterr().out
    common.token_rows(text_source, tokenizer, 64, 10**9, ALONE)
    said = capsys.readouterr().out
    assert "train-00001" in said and "train-00000" not in said
    assert len(common.token_rows(text_source, tokenizer, 32, 10**9, ALONE)) == 2 * len(other)


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
    rows = f"common.conversation_rows(common.Path({str(chats)!r}), tokenizer, 32, run)"
    assert "mid.jsonl:2: " in ends(rows)


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


def test_rows_of_several_arrays_are_found_at_their_ends_too(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for i, (path, n) in enumerate(zip(paths, (3, 1, 4))):
        common.write_rows([[0, 10 * i + j + 1] for j in range(n)], 1, 0, np.uint16, path)
    rows = common.Rows(paths, 0)
    assert [int(rows.row(i)[1]) for i in range(8)] == [1, 2, 3, 11, 21, 22, 23, 24]
    some = common.Rows(paths[:1], 0).joined(rows, 4)
    assert [int(some.row(i)[1]) for i in range(7)] == [1, 2, 3, 1, 3, 21, 23]


def test_more_items_than_threads_are_given_at_once_come_in_their_order():
    assert list(common.in_threads(str, range(2100))) == [str(i) for i in range(2100)]


def take_steps(rows, batch_rows, micro, steps, start=0, ranks=1):
    """Return each step's rows, those of all ranks, sorted."""
    result = [[] for _ in range(steps)]
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with unittest.mock.patch.dict(os.environ, place):
            accum = common.accum_steps(batch_rows, micro)
            stream = common.row_batches(rows, batch_rows, micro, 3, start, CPU)
            for i, batch in enumerate(itertools.islice(stream, accum * steps)):
                assert batch.num_targets == int((batch.targets >= 0).sum())
                result[i // accum] += map(tuple, batch.ids[batch.targets[:, 0] >= 0].tolist())
            stream.close()
    return [sorted(step) for step in result]


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


def test_prefetch_keeps_order_works_ahead_raises_and_ends():
    made, threads = [], threading.active_count()

    def broken():
        for i in range(100):
            made.append(i)
            yield i
        raise MemoryError("gone")

    stream = common.prefetch(broken(), 2)
    assert next(stream) == 0
    until(lambda: made == [0, 1, 2])  # two ahead of what was taken
    assert list(itertools.islice(stream, 99)) == list(range(1, 100))
    with pytest.raises(MemoryError, match="gone"):
        next(stream)
    stream = common.prefetch(itertools.count(), 2)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == threads


# 8. training_steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 10, 200])
@pytest.mark.parametrize("warmdown", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_the_learning_rate_never_rises_after_the_warmup(num_steps, warmup, warmdown):
    rates = [common.trapezoid(s, num_steps, warmup, warmdown, 0.1) for s in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(b <= a for a, b in itertools.pairwise(rates[warmup:]))
    if num_steps == 100 and warmup <= 10:
        assert max(rates) > 0.9
        for final in (0.0, 0.1):
            end = common.trapezoid(num_steps, num_steps, warmup, warmdown, final)
            assert end == pytest.approx(final if warmdown else 1)


def pull(weight, batch):
    """Return the loss of a weight that is pulled to the mean of the targets."""
    return (weight - batch.targets[batch.targets >= 0]).square().sum()


def train_weight(batches, num_steps, loss=pull, schedule=lambda step: 1.0, scaler=None, **options):
    """Yield the steps in which one weight is trained on batches, or on one again and again."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = common.Optimizer([{**common.ADAMW, "params": [weight], "lr": 0.1}], torch.float32)
    optimizer.scaler = scaler
    batches = iter(batches) if isinstance(batches, list) else itertools.repeat(batches)
    loss = functools.partial(loss, weight)
    for s in common.training_steps(batches, loss, optimizer, schedule, num_steps, **options):
        copied = dataclasses.replace(s)  # the next step changes the one yielded
        copied.weight, copied.scale = weight.item(), scaler and scaler.scale
        yield copied


def make_batch(*rows):
    values = torch.tensor(rows)
    return common.Batch(values, values, int((values >= 0).sum()))


ONE = make_batch([1])


@pytest.mark.parametrize("start", [0, 5])
def test_steps_are_yielded_before_each_update_and_after_the_last(monkeypatch, start):
    schedule = functools.partial(common.trapezoid, num_steps=9, warmup=2, warmdown=0.5, final=0.1)
    taken = []
    monkeypatch.setattr(common.Optimizer, "step", lambda self, lr: taken.append(lr))
    steps = list(train_weight(ONE, 9, schedule=schedule, start=start))
    assert [s.step for s in steps] == list(range(start, 10))
    assert [s.lr for s in steps][1:] == taken == [schedule(i) for i in range(start, 9)]
    assert [s.new for s in steps] == [False] + [True] * (9 - start)
    assert len(list(itertools.islice(train_weight(ONE, 3, start=5), 9))) == 1, "past the last"


def test_when_an_event_is_due():
    def fires(every, first=False, **state):
        return [i for i in range(6) if common.Step(i, 5, **state).due(every, first)]

    assert fires(2) == [2, 4, 5] and fires(2, first=True) == [0, 2, 4, 5] and fires(9) == [5]
    assert fires(9, stopping=True) == [1, 2, 3, 4, 5] and fires(0, first=True, stopping=True) == []
    assert fires(-1) == [] and fires(2, start=2) == [4, 5] and fires(2, True, start=2)[1] == 2


def test_the_loss_divides_by_the_targets_of_the_whole_step():
    parts = [make_batch([1, -1, -1]), make_batch([4, 5, 9]), make_batch([-1, -1, -1])]
    *_, split = train_weight(parts, 1, accum=3)
    *_, whole = train_weight(make_batch([1, 4, 5, 9]), 1)
    assert split.loss == pytest.approx(whole.loss) == pytest.approx((1 + 16 + 25 + 81) / 4)
    assert split.weight == pytest.approx(whole.weight)
    *_, none = train_weight(parts[2], 1)
    assert none.loss == 0 and math.isfinite(none.weight)


def test_rates_and_fractions_of_the_time_are_those_of_the_last_steps(monkeypatch):
    clock = itertools.count()  # read four times a step: at its start, the batch, the loss, its end
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    for s in itertools.islice(train_weight(make_batch([1, 2, 3], [4, 5, -1]), 9), 1, None):
        assert (s.tok_per_s, s.data, s.update) == pytest.approx((6 / 3, 1 / 3, 1 / 3))
        assert s.left_s == pytest.approx(3 * (9 - s.step))


def test_a_loss_that_is_not_finite_stops_with_a_remedy():
    with pytest.raises(common.Stop, match="nan at step 1.*--dtype=float32.*--restart"):
        list(train_weight(ONE, 3, lambda *args: pull(*args) * math.nan))


def test_a_request_to_stop_ends_after_the_step():
    asked = itertools.count()  # before the first step, and in each
    steps = list(train_weight(ONE, 99, stop=lambda: next(asked) == 4))
    assert [s.stopping for s in steps] == [False] * 4 + [True]


def scarce(function, rows, first=0):
    """Return a method of GPT that runs out of memory over `rows` rows from call `first` on."""
    calls = itertools.count()

    def limited(model, ids, *args):
        if next(calls) >= first and len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate")
        return function(model, ids, *args)

    return limited


def test_the_rows_of_a_pass_are_as_asked_as_saved_or_as_estimated(monkeypatch):
    config = common.GPTConfig(512, 3, 64, 2, 2, 256)
    need = [sum(common.memory_bytes(config, rows, 4, CPU).values()) for rows in range(17)]

    def choose(room, asked=0, saved=None, share=16):
        monkeypatch.setattr(common, "free_bytes", lambda device: room / 0.9)
        run = common.Run("base", "t", SimpleNamespace(device_batch_size=asked), CPU)
        monkeypatch.setattr(run, "together", lambda work: [9 * work(), work()])  # two ranks'
        return common.choose_micro_batch(run, config, saved or {}, share, 16, 4, False)

    rooms = (1.01 * need[16], 0.99 * need[16], 1.01 * need[3], 1.01 * need[1])
    assert [choose(room) for room in rooms] == [16, 8, 2, 1]
    assert choose(1.01 * need[16], share=5) == 5 and choose(0.99 * need[5], share=5) == 3
    saved = {"micro_batch": 2, "settings": {"device_batch_size": 0}}
    assert choose(0, saved=saved) == 2 and choose(0, saved=saved, share=1) == 1
    assert choose(0, asked=7, saved=saved) == choose(0, asked=7) == 7 and choose(0, asked=99) == 16
    with pytest.raises(common.Stop, match="not even one row.*--recompute"):
        choose(0.99 * need[1])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("limit", "rows"), [(99, 9), (5, 5), (4, 3), (1, 1)])
def test_passes_are_halved_until_they_fit_and_change_nothing(limit, rows, backward, capsys):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate")

    def loss(weight, batch):
        assert not any(graph() for graph in failed), "a pass that failed still holds its memory"
        node = weight + 0
        total = pull(node, batch)
        if len(batch.ids) > limit:
            failed.append(weakref.ref(total))
            node.register_hook(run_out) if backward else run_out()
        return total

    failed, batches = [], [make_batch(*([i + j] for i in range(9))) for j in range(2)]
    *_, halved = train_weight(batches, 1, loss, accum=2)
    *_, plain = train_weight(batches, 1, accum=2)
    assert (halved.loss, halved.weight) == pytest.approx((plain.loss, plain.weight))
    said = f"memory ran out in step 1: on in passes of {rows} rows"
    assert halved.micro == rows and capsys.readouterr().out.count(said) == (limit < 9)
    limit = 0
    with pytest.raises(common.Stop, match="not even one row"):
        list(train_weight(batches, 1, loss))


FORWARD, HIDDEN = common.GPT.forward, common.GPT.trunk


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # the latter a CPU's
def test_memory_that_runs_out_in_an_update_is_one_sentence(base_dir, monkeypatch, kind):
    def full(*args):
        raise kind("out of memory")

    monkeypatch.setattr(common.Optimizer, "step", full)
    words = "smaller --device-batch-size"
    with pytest.raises(common.Stop, match=words), common.start_run("base", tiny_pretrain()):
        list(train_weight(ONE, 1))


def test_another_error_than_of_memory_is_passed_on():
    def broken(*args):
        raise RuntimeError("shapes do not fit")

    for error in ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory",
                  "DefaultCPUAllocator: not enough memory: you tried"):  # fmt: skip
        assert common.out_of_memory(RuntimeError(error))
    with pytest.raises(RuntimeError, match="shapes"):
        list(train_weight(ONE, 1, broken))


def test_evaluation_and_the_engine_go_in_parts_where_memory_asks_for_it(monkeypatch, tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    ids = torch.randint(0, 256, (6, 20))
    requests = [common.Request([tokenizer.bos, *row[: 4 + i]], common.Sampling(5, 0))
                for i, row in enumerate(ids.tolist())]  # fmt: skip
    expected = common.token_losses(model, ids, ids)
    replies = sorted((i, r.ids) for i, r in common.Engine(model, tokenizer).run(requests))
    monkeypatch.setattr(common.GPT, "trunk", scarce(HIDDEN, 2))
    torch.testing.assert_close(common.token_losses(model, ids, ids), expected)
    engine = common.Engine(model, tokenizer, 2)
    engine.budget = 16384
    assert sorted((i, r.ids) for i, r in engine.run(requests)) == replies

    def small(model, ids, *args):
        if ids.size(1) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return HIDDEN(model, ids, *args)

    monkeypatch.setattr(common.GPT, "trunk", small)
    monkeypatch.setattr(common, "SMALLEST_BUDGET", 4)
    assert sorted((i, r.ids) for i, r in common.Engine(model, tokenizer).run(requests)) == replies
    slot = model.config.cache_bytes(4)
    monkeypatch.setattr(common, "free_bytes", lambda device: 9 * slot)
    assert len(common.Engine(model, tokenizer, 64).rows) == 4


def fp16_steps(broken=(), num_steps=6):
    """Train with a loss scale, whose gradients overflow in steps `broken`."""
    calls = itertools.count(1)

    def loss(weight, batch):
        weight.grad = torch.full_like(weight, math.inf if next(calls) in broken else 0.0)
        return pull(weight, batch)

    return list(train_weight(make_batch([1, 3]), num_steps, loss, scaler=common.LossScaler()))


def test_a_step_whose_gradients_overflow_fp16_is_skipped(capsys):
    plain = [(s.loss, s.weight) for s in train_weight(make_batch([1, 3]), 5)]
    got = [(s.loss, s.weight) for s in fp16_steps(broken={3})]
    assert got[3] == pytest.approx((plain[3][0], got[2][1])), "its loss is logged all the same"
    assert [x[1] for x in got[:3] + got[4:]] == pytest.approx([x[1] for x in plain])
    assert "overflowed in step 3: no update, scale 32768" in capsys.readouterr().out
    with pytest.raises(common.Stop, match="--dtype=float32"):
        fp16_steps(broken=range(99), num_steps=99)


def test_the_loss_scale_adapts_as_torchs_does():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = common.Optimizer([{**common.ADAMW, "params": [weight], "lr": 0.1}], torch.float32)
    sgd, ours, theirs = torch.optim.SGD([weight]), common.LossScaler(), torch.amp.GradScaler("cpu")
    theirs.scale(torch.zeros(()))  # makes its tensors
    for grad in (math.inf, 0.0, math.nan, *[0.0] * 2001, math.inf, 0.0):
        weight.grad = torch.full_like(weight, grad)
        assert ours.unscale(optimizer) == (grad != 0)
        theirs.step(sgd)
        theirs.update()
        assert ours.scale == theirs.get_scale()


def test_ranks_skip_a_step_together(tmp_path):
    run_ranks(
        2,
        f"""
        steps = test_all.fp16_steps(broken={{3}} if rank == 1 else ())
        found = [(s.loss, s.weight, s.scale) for s in steps[1:]]
        torch.save(found, r"{tmp_path}/%d.pt" % rank)
        """,
    )
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a == b and a[2][1] == a[1][1] != a[3][1] and a[2][2] == 2.0**15


def test_gradients_of_fp16_are_near_those_of_fp32():
    ids, grads = torch.randint(0, 100, (4, 32)), []
    for dtype in (torch.float32, torch.float16):
        model, scaler = random_model(dtype), common.LossScaler()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)
        optimizer = common.Optimizer(common.optimizer_groups(model, 1, 1, 1, 0), torch.float32)
        (model(ids, ids.roll(1)) / 1e6 * scaler.scale).backward()  # alone below fp16's range
        assert not scaler.unscale(optimizer)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


# 9. Checkpoints, bits per byte ---------------------------------------------------------------


def saved_run(keep=2, steps=(1,)):
    run = common.Run("base", "t", tiny_pretrain(keep=keep), CPU)
    common.run_dir("t").mkdir(parents=True, exist_ok=True)
    model = random_model()
    optimizer = common.Optimizer(common.optimizer_groups(model, 0.1, 0.1, 0.1, 0.0), torch.float32)
    for step in steps:
        folder = common.save_checkpoint(run, common.Step(step, 9), model, optimizer, {})
    common.finish_save(run)
    return run, model, optimizer, folder


def test_a_checkpoint_comes_back_whole_and_old_ones_go(base_dir):
    _, model, _, folder = saved_run(keep=2, steps=(1, 999_999, 1_000_000))
    names = [path.name for path in common.list_checkpoints("t", "base")]
    assert names == ["step-999999", "step-1000000"], "a million is newer"
    assert common.find_checkpoint("t", "base") == folder
    again = common.load_model(folder, CPU, torch.float32)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b) and b.requires_grad, name
    ids = torch.randint(100, (1, 8))
    assert torch.equal(model(ids), again(ids))
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["step"] == 1_000_000 and meta["settings"]["depth"] == 1
    assert meta["version"] == common.CHECKPOINT_VERSION


@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
@pytest.mark.parametrize("name", ["model.pt", "meta.json"])
def test_a_damaged_checkpoint_is_said(base_dir, harm, name):
    *_, folder = saved_run(steps=(1, 2))
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    if harm == "lose":
        path.unlink()
    with pytest.raises(common.MissingInput, match=r"step-000002 is damaged .*delete that folder"):
        common.load_model(folder, CPU, torch.float32)


def test_a_missing_stage_or_tag_is_said(base_dir):
    with pytest.raises(common.MissingInput, match="bash run.sh"):
        common.find_checkpoint("t", "base")
    saved_run()
    for asked, sentence in (
        (("other", "base"), "there are t"), (("t", "base", 7), "step 7"),
        (("t", "mid"), "python midtrain.py --tag=t"),
    ):  # fmt: skip
        with pytest.raises(common.MissingInput, match=sentence):
            common.find_checkpoint(*asked)


def test_training_goes_on_while_a_step_is_written_and_the_step_is_saved(base_dir, monkeypatch):
    run, model, optimizer, _ = saved_run()
    real, go, began = torch.save, threading.Event(), threading.Event()

    def slow(value, file):
        began.set()
        assert go.wait(20)
        real(value, file)

    monkeypatch.setattr(torch, "save", slow)
    run.metrics["loss"] = 2.0
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in unit.state.items()} for unit in optimizer.units]
    folder = common.save_checkpoint(run, common.Step(2, 9), model, optimizer, {})
    assert began.wait(20) and not folder.exists()
    run.metrics["loss"] = 1.0
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    go.set()
    later = common.save_checkpoint(run, common.Step(4, 9), model, optimizer, {})
    assert folder.exists(), "a save waits for the one before"
    common.finish_save(run)
    for step, same in ((folder, True), (later, False)):
        loaded = common.load_file(step, "model.pt", CPU)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[k], weights[k]) for k in weights) == same
    state = common.load_file(folder, "optimizer-000.pt", CPU)["optimizer"]
    assert state["steps"] == 0 and common.read_meta(folder)["metrics"] == {"loss": 2.0}
    for a, b in zip(state["units"], moments):
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_full_disk_or_a_lost_mount_while_saving_leaves_the_last_checkpoint(base_dir, monkeypatch):
    run, model, optimizer, folder = saved_run(keep=1)
    real = open

    def full(path, *args, **options):
        return real("/dev/full" if Path(path).name == "model.pt" else path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(common, "open", full, raising=False)
        common.save_checkpoint(run, common.Step(5, 9), model, optimizer, {})
        with pytest.raises(common.Stop, match="the disk is full .*free some space"):
            common.finish_save(run)
    assert run.stopping, "training ends after the step"
    common.finish_save(run)  # said once
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "and gives the room back"
    base_dir.rename(base_dir.with_name("elsewhere"))
    common.save_checkpoint(run, common.Step(6, 9), model, optimizer, {})
    with pytest.raises(common.Stop, match="runs/t/base: No such file"):
        common.finish_save(run)
    assert not base_dir.exists(), "nothing is written where the mount was"
    base_dir.with_name("elsewhere").rename(base_dir)
    assert common.list_checkpoints("t", "base") == [folder]
    common.load_model(folder, CPU, torch.float32)


def test_bits_per_byte_by_documents_equal_one_document_at_a_time(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    texts = ["Hello.", "The cat sat on the mat. " * 9, "é北京🙂", "", "a"]
    nats = 0.0
    for text in texts:
        ids = tokenizer.encode(text)
        for i in range(0, len(ids), 32):
            part = torch.tensor([[tokenizer.bos, *ids[i : i + 32]]])
            logprobs = model(part[:, :-1]).log_softmax(-1)
            nats -= logprobs.gather(-1, part[:, 1:, None]).sum().item()
    expected = nats / math.log(2) / sum(len(t.encode()) for t in texts)
    for rows, times in ((1, 1), (2, 1), (16, 1), (512, 206)):
        bpb, count = common.evaluate_bpb(model, tokenizer, texts * times, rows)
        assert bpb == pytest.approx(expected, rel=1e-5) and count == 5 * times
    torch.nn.init.zeros_(model.head.weight)  # a uniform model's are known
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
    assert set(draw(top_p=0.0)) == set(draw(top_p=0.5)) == {1}  # its 0.64 alone reach a half
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


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_requests_in_company_get_the_replies_they_get_alone(tokenizer, slots):
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
    tokenizer, slots, chunk, window, int8
):
    model = random_model(vocab_size=tokenizer.vocab_size, window_pattern=window, max_seq_len=64)
    model = common.quantize(model) if int8 else model
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
    monkeypatch.setattr(common, "LARGE", 1 if packed else 1 << 40)
    shape = {"vocab_size": tokenizer.vocab_size, "n_kv_head": 2, "window_pattern": "SL"}
    shape |= {"max_seq_len": 64}
    fast, plain = (common.Engine(common.quantize(m) if int8 else m, tokenizer, 3)
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
    ids = torch.zeros(16, config.max_seq_len, dtype=torch.long, device=CUDA)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        (model(ids, ids) / ids.numel()).backward()
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
    assert "memory ran out in step 1: on in passes" in capsys.readouterr().out
    assert len(base_losses("t")) == 6


@pytest.mark.gpu
@needs_gpu
def test_steps_compiled_on_a_gpu_say_what_plain_ones_say(tokenizer):
    cuda = torch.device("cuda")
    config = random_model(vocab_size=tokenizer.vocab_size, window_pattern="SL").config
    model = common.GPT.create(config, cuda, torch.float32)  # in bf16 two may be equally likely
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    fast, plain = common.Engine(model, tokenizer, 5), common.Engine(model, tokenizer, 5)
    fast.compile()
    requests = [greedy([tokenizer.bos, *range(n)], 20) for n in (3, 9, 1, 12, 7, 2, 5)]
    assert dict(fast.run(requests)) == dict(plain.run(requests))


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
    engine = common.Engine(
        common.quantize(common.GPT.create(config, CPU, torch.float32)), tokenizer, 16
    )
    engine.stops.clear()
    torch.compiler.reset()
    engine.compile()
    ratios = [their_seconds(streams) / our_seconds(streams) for streams in (1, 16)]
    with capsys.disabled():
        print(f"int8 against transformers' fp32, 1 and 16 streams: {ratios}")
    assert min(ratios) > 2


def test_prompts_of_unequal_length_are_computed_without_much_padding(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=512)
    trunk, shapes = model.trunk, []
    model.trunk = lambda ids, *rest: shapes.append(ids.shape) or trunk(ids, *rest)
    lengths = [400, 7, 30, 15, 10, 300]
    engine = common.Engine(model, tokenizer, 8)
    replies = dict(engine.run([greedy([tokenizer.bos] * n, 1) for n in lengths]))
    assert len(replies) == len(lengths) and sum(lengths) <= sum(map(math.prod, shapes))
    assert sum(map(math.prod, shapes)) <= 2 * sum(lengths), shapes
    assert len(shapes) < len(lengths), "they are computed together all the same"


def test_prompts_that_wait_join_together(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    trunk, prefills = model.trunk, []
    model.trunk = lambda ids, *rest: prefills.append(ids) or trunk(ids, *rest)
    engine = common.Engine(model, tokenizer, 8)
    compute, model.logits = model.logits, lambda x: compute(x).index_fill(1, ends, -99.0)
    ends = torch.tensor(sorted(engine.stops))  # none ends before its time
    engine.next_logits = lambda ids, past: model.logits(trunk(ids, past)[:, -1])
    requests = [greedy([tokenizer.bos, i], 3 + i % 7) for i in range(40)]
    replies = dict(engine.run(requests))
    assert [len(replies[i].ids) for i in range(40)] == [3 + i % 7 for i in range(40)]
    assert len(prefills) <= 1 + 32 // 2, "two of eight rows or more are free at each"


def test_a_conversation_that_goes_on_computes_its_new_turn_alone(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    engine, counts = common.Engine(model, tokenizer, 2), []
    engine.stops.clear()
    trunk = model.trunk
    model.trunk = lambda ids, *rest: counts.append(ids.numel()) or trunk(ids, *rest)
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
    trunk = model.trunk
    model.trunk = lambda ids, *rest: widths.append(list(ids.shape)) or trunk(ids, *rest)
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
        self.embed, self.blocks = torch.nn.Embedding(1, 1), torch.nn.ModuleList()
        self.script, self.start, self.dtype = script, prompt_length, torch.float32
        self.read = []

    def trunk(self, ids, past):
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


# prepare.py: text -----------------------------------------------------------------------------


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


def paragraphs(count: int) -> str:
    return "\n\n".join(words(i, 140) for i in range(count))


def texts_of(folder: Path) -> tuple[list[str], list[str]]:
    train = [t for p in sorted(folder.glob("train-*.parquet")) for t in common.read_texts(p)]
    return train, list(common.read_texts(folder / "val.parquet"))


def table_bytes(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow_bytes(rows: list[dict]) -> bytes:
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def prepared(data="world", net=None, **options):
    """Run prepare.py with settings; return the manifest."""
    return prepare.main(prepare.Settings(str(data), **options), net)


TINY_WORLD = {"num_conversations": 60, "documents": 100}


@given(st.lists(st.text(max_size=80), max_size=20), st.integers(1, 50))
def test_cut_pieces_keeps_every_character(chunks, limit):
    pieces = list(prepare.cut_pieces(chunks, limit))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cut_pieces_ends_at_paragraphs_and_headings_in_little_memory():
    pieces = list(prepare.cut_pieces([paragraphs(100)], 2000))
    assert all(piece.endswith("\n\n") and len(piece) > 500 for piece in pieces[:-1])
    chapters = "".join(f"CHAPTER {i}\n{words(i, 100)}\n\n{words(-i, 90)}\n" for i in range(9))
    assert all(p.startswith("CHAPTER") for p in prepare.cut_pieces([chapters], 1500))
    accents = "e\u0301" * 500  # an accent stays with its letter
    assert all(len(p) % 2 == 0 for p in prepare.cut_pieces([accents], 301))
    line = words(1, 300_000)[: 1 << 20]
    tracemalloc.start()
    count = sum(len(p) for p in prepare.cut_pieces((line for _ in range(30)), 20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30 << 20 and peak < 8 << 20, peak


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


def test_shards_hold_the_text_and_the_manifest_describes_them(base, tmp_path):
    source = tmp_path / "big.txt"
    source.write_text(paragraphs(5000))
    files = prepared(source, shard_mb=1, doc_chars=1000, val_percent=10)["files"]
    folder = base / "data" / "big"
    train, val = texts_of(folder)
    assert len(list(folder.glob("train-*.parquet"))) == 3
    assert not set(train) & set(val) and 0.07 < len(val) / len(train) < 0.15
    count = collections.Counter
    assert count(" ".join(train + val).split()) == count(source.read_text().split())
    for name, entry in files.items():
        data, texts = (folder / name).read_bytes(), list(common.read_texts(folder / name))
        sizes = {"characters": sum(map(len, texts)), "bytes": sum(len(t.encode()) for t in texts)}
        file = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert entry == {"documents": len(texts), **sizes, **file}
    assert sorted(p.name for p in base.glob("data/*")) == ["big"]  # nothing left beside
    files = prepared(source, val_mb=1, val_percent=50)["files"]
    assert 1e6 <= files["val.parquet"]["bytes"] < 1.03e6


def test_own_text_and_chats_of_a_version_stay_the_same(base, tmp_path):
    """Other output for the same input takes a greater DATA_VERSION, and new hashes here."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"# {i}\r\n\r\n{words(i, 90)}"} for i in range(40)])
    write_lines(tmp_path / "chats.jsonl", GOOD_ROWS)
    prepared(tmp_path / "a.jsonl", doc_chars=300)
    prepared(**own(tmp_path / "chats.jsonl"))
    found = {"text": json.dumps(texts_of(base / "data/a"))}
    found |= {name: json.dumps(rows) for name, rows in chat_files("mine").items()}
    found["sets"] = json.dumps([prepare.letter_item("?", "ab", 1), prepare.gsm8k_item(eggs(1)[0])])
    found = {name: hashlib.sha256(x.encode()).hexdigest()[:9] for name, x in found.items()}
    assert (prepare.DATA_VERSION, found) == (2, {
        "text": "a4e319b2e", "mid": "a416359f6", "sft": "a416359f6", "rl": "2b33aad6d",
        "val": "d6fe2edd8", "sets": "843afdc65"})  # fmt: skip


def make_folder(root: Path) -> None:
    """A folder with every kind of file, good and bad; the documents say where they are from."""
    noise = random.Random(0)
    record = [json.dumps({"text": f"jsonl {i} " + words(i, 50)}) for i in range(30)]
    record[3:3] = ["{broken", "[" * 100_000, "", '{"other": 1}', '{"text": null}', '"bare text"']
    damaged = "".join(f'{{"text": "damaged {noise.randbytes(40).hex()}"}}\n' for _ in range(500))
    files: dict[str, str | bytes] = {
        "a.jsonl": "\n".join(record) + "\n",
        "b.jsonl.gz": gzip.compress(("\r\n".join(record[9:])).encode()),
        "c.parquet": table_bytes([{"content": "parquet " + words(99, 50)}, {"content": None}]),
        "d.md": b"\xef\xbb\xbf# Title\r\n\r\nmarkdown\r\ntext\r",
        "e.txt": "Grüße utf-16 日本語".encode("utf-16"),
        "f.py": "def python():\n    return 1\n",
        "deep/er/copy.py": "def python():\n    return 1\n",
        "g.txt": "Grüße, of which one byte is wrong: ".encode() + b"\xff " + b"x" * 100,
        "h.txt": b"a NUL \0 inside of a longer text that goes on",
        "i.txt": b"", "j.txt": " \n\n ", "k.txt": noise.randbytes(5000), "l.png": b"\x89PNG",
        "m.jsonl.gz": gzip.compress(damaged.encode())[:-20], "n.parquet": b"PAR1 no parquet",
        "o.parquet": table_bytes([{"title": "x"}]), "v.parquet": table_bytes([{"text": 1}]),
        "q.csv": "id,value\n1,2\n", "s.json": '{\n "name": "settings"\n}',
        "gbk.txt": ("他走进屋子，窗外下着雨。" * 9).encode("gbk"),
        "cp1251.txt": ("Он вошёл в комнату. За окном шёл дождь. " * 9).encode("cp1251"),
        "tales.txt": "tale one\n<|endoftext|>\ntale two\n <|endoftext|> \nof <|endoftext|> it\n",
        "array.json": json.dumps([{"text": "array \u4e2d one"}, {"content": "array two"}], indent=1),
        "array.jsonl": json.dumps([{"text": "array on a line"}, {"text": "array three"}]),
        "c4.json.bz2": bz2.compress(b'{"text": "c4 one", "url": "x"}\n{"text": "c4 two"}\n'),
        "dolma.jsonl.zst": b"".join(pa.compress(b'{"text": "frame %d"}\n' % i, "zstd", asbytes=True)
                                    for i in range(2)),
        "hf.arrow": arrow_bytes([{"text": "arrow one"}, {"text": None}]),
        "struct.parquet": table_bytes([{"text": {"body": "x"}}]),
        "lfs.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "broken.json": '[{"text": "before the break"}, {"text": "cut',
        "poem.txt": "\n\n    indented\n  less\n",
        "t.jsonl": '{"text": "a half \\ud83d of an emoji, whole \\ud83d\\ude00"}\n',
        "u.TXT.GZ": gzip.compress("русский текст".encode()),
        "README": "readme without a suffix", ".hidden.txt": "hidden", ".git/x.txt": "hidden",
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    deep = root / "deep" / "er"
    (deep / "loop").symlink_to(root)
    (deep / "self").symlink_to(deep / "self")
    (deep / "gone.txt").symlink_to(root / "nowhere.txt")
    (deep / "locked.txt").symlink_to("x" * 300)  # which is an error as an inaccessible folder is
    os.mkfifo(deep / "pipe.txt")


def test_every_kind_of_file(base, tmp_path, capsys):
    make_folder(tmp_path / "mine")
    dropped = prepared(tmp_path / "mine")["dropped"]
    train, val = texts_of(base / "data" / "mine")
    texts = train + val
    joined = "\n".join(texts)
    assert len(set(texts)) == len(texts) and not set(train) & set(val) and val
    for part in ("jsonl 29", "parquet ", "Grüße utf-16 日本語", "bare text", "readme without",
                 "# Title\n\nmarkdown\ntext", "wrong: \ufffd x", "a NUL  inside",
                 "id,value\n1,2", '{\n "name": "settings"\n}', "    indented\n  less",
                 "of <|endoftext|> it", "他走进屋子，", "Он вошёл", "before the break",
                 "русский текст", "a half \ufffd of an emoji, whole 😀", "damaged"):  # fmt: skip
        assert part in joined, part
    for whole in ("tale one", "tale two", "array 中 one", "array two", "array on a line",
                  "array three", "c4 one", "c4 two", "frame 0", "frame 1", "arrow one"):  # fmt: skip
        assert whole in texts, whole
    assert "hidden" not in joined and "\r" not in joined and "\ufeff" not in joined
    assert dropped.pop("duplicates")[0] > 27
    assert {reason: count for reason, (count, _) in dropped.items()} == {
        "hidden files and folders": 2, "broken links and special files": 4,
        "files of other kinds": 1, "lines of broken JSON": 2 + 1, "empty files": 1,
        "records without `text` or `content`": 2 + 2, "empty documents": 1, "binary files": 1,
        "damaged or unreadable files": 2, "documents with invalid characters replaced": 2,
        "tables without `text` or `content` (has title)": 1,
        "tables whose `text` is int64, no text": 1,
        "tables whose `text` is struct<body: string>, no text": 1,
        "Git LFS pointers, whose files `git lfs pull` gets": 1,
        "files read as GB18030, not UTF-8 (--encoding=NAME sets it)": 1,
        "files read as windows-1251, not UTF-8 (--encoding=NAME sets it)": 1,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "broken JSON (mine/a.jsonl:4)" in out and "binary files (mine/k.txt)" in out
    assert out.count("\n") <= 6


def test_text_in_an_encoding_that_is_not_known_stops_before_a_tenth_is_trained_on(base, tmp_path):
    (tmp_path / "a.txt").write_text(words(1, 300))
    (tmp_path / "b.txt").write_bytes(bytes(random.Random(0).choices(range(128, 256), k=9000)))
    with pytest.raises(common.MissingInput, match="most of .* unknown encoding .--encoding=NAME"):
        prepared(tmp_path)
    dropped = prepared(tmp_path, encoding="koi8-r", source="x")["dropped"]
    assert [count for reason, (count, _) in dropped.items() if "koi8-r" in reason] == [1]


def test_little_text_has_twenty_passages_for_validation(base, tmp_path):
    (tmp_path / "a.txt").write_text(paragraphs(300))
    prepared(tmp_path / "a.txt")
    train, val = texts_of(base / "data" / "a")
    assert len(val) >= 20 and 4 < len(train) / len(val) < 16
    mean = [sum(map(len, part)) / len(part) for part in (train, val)]
    assert 0.8 < mean[0] / mean[1] < 1.25, "of one kind, so that their bits compare"


def test_order_depends_on_content_and_seed_alone(base, tmp_path):
    texts = [words(i, 30) for i in range(200)]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, order in ((one, texts), (two, texts[::-1])):
        folder.mkdir()
        for i in range(0, 200, 20):
            write_lines(folder / f"{i}.jsonl", [{"text": t} for t in order[i : i + 20]])
    first, second = (prepared(path)["files"] for path in (one, two))
    assert first == second
    other = prepared(two, source="other", seed=1)["files"]
    assert other["train-00000.parquet"]["sha256"] != first["train-00000.parquet"]["sha256"]


@pytest.mark.parametrize("seed", range(6))
def test_a_small_file_has_both_splits_whatever_its_hashes_are(base, tmp_path, seed):
    write_lines(tmp_path / "small.jsonl", [{"text": "one"}, {"text": "two"}])
    prepared(tmp_path / "small.jsonl", seed=seed, val_percent=50)
    train, val = texts_of(base / "data" / "small")
    assert len(train) == len(val) == 1 and train != val


def test_too_small_input_is_one_sentence_that_says_why(base, tmp_path):
    cases = [("a.txt", "", "no text .*1 empty files"),
             ("b.txt", "Only this.\n" * 3, "only [0-9]+ characters"),
             ("c/b.jsonl", '{"prompt": "x"}\n', "no text .*`text`.*b.jsonl:1"),
             ("d/a.jpg", "x", "no text .*other kinds .d/a.jpg")]  # fmt: skip
    for name, text, sentence in cases:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        with pytest.raises(common.Stop, match=f"holds {sentence}.*need two documents"):
            prepared(tmp_path / name.split("/")[0])
        assert not any(base.glob("data/*")) and not any(base.glob("data/.*"))


def test_output_inside_the_input_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "out"))
    (tmp_path / "a.txt").write_text(words(1, 3000))
    assert prepared(tmp_path, source="mine") == prepared(tmp_path, source="mine")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--data=wrld", "no such file or folder, nor one of world, hub, climbmix"),
        ("--data=~nobody-of-this-name/x", ""),
        ("--data=" + "x" * 5000, ""),
        ("--val_percent=0", "--val-percent"),
        ("--shards=0", "--shards must be 1"),
        ("--source=../x", "--source"),
        ("--source=eval", "--source=eval"),
        ("--conversations=nowhere.jsonl", "no such file or folder, nor one of hub"),
        ("--conversations=hub --data=hub", "take two commands"),
        ("--conversations=hub --source=world", "--source=world"),
        ("--eval-data=README.md", "must be a folder"),
        ("--name=a\nb", "--name"),
    ],
)
def test_a_wrong_setting_of_prepare_is_one_sentence(argv, sentence, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as stop:
        common.parse_settings(prepare.Settings, "doc", argv.split(" "))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and sentence in err


def test_the_folder_below_data_is_named_after_the_input(tmp_path):
    names = {"My Corpus.v2.txt": "my-corpus", "world": "world-files", "chat": "chat-files"}
    for name, source in names.items():
        (tmp_path / name).mkdir()
        assert prepare.Settings(str(tmp_path / name)).source == source
        assert prepare.Settings(conversations=str(tmp_path / name)).source == source
    (tmp_path / "日本").mkdir()
    assert prepare.Settings(str(tmp_path / "日本")).source.startswith("text-")
    assert prepare.Settings("hub").source == "fineweb-edu" and prepare.Settings().source == "world"
    assert prepare.Settings(conversations="hub").source == "chat"


def test_the_world_is_made_once_and_anew_when_settings_or_files_change(base, capsys, monkeypatch):
    manifest = prepared(**TINY_WORLD)
    folder = base / "data" / "world"
    train, val = texts_of(folder)
    assert len(train) + len(val) == 100 and val and not set(train) & set(val)
    written = {p.relative_to(folder).as_posix(): read_jsonl(p) for p in folder.rglob("*.jsonl")}
    assert set(manifest["chats"]) == set(written)
    for name, about in manifest["chats"].items():
        kinds = collections.Counter(item.get("kind") for item in written[name])
        assert kinds and about.get("kinds", kinds) == kinds
    counts = [manifest["chats"][f"{s}.jsonl"]["conversations"] for s in ("mid", "sft", "rl")]
    assert counts == [60, 20, 20] and "mid.jsonl: 60 (" in capsys.readouterr().out
    assert prepared(**TINY_WORLD) == manifest
    assert "nothing to do" in capsys.readouterr().out
    (folder / "eval/letters.jsonl").write_bytes(b"cut")  # a damaged file is made again
    assert prepared(**TINY_WORLD) == manifest
    assert read_jsonl(folder / "eval/letters.jsonl") == written["eval/letters.jsonl"]
    (folder / "tokens").mkdir()  # pretrain.py's cache of the text goes with it
    monkeypatch.setattr(prepare, "WORLD_VERSION", 1_000_000)
    prepared(num_conversations=60, documents=50, seed=4, name="Ada")
    out = capsys.readouterr().out
    assert "--name=Nano" in out and "--documents=100" in out and "--seed=0" in out
    assert "made with another version of prepare.py" in out
    assert sum(map(len, texts_of(folder))) == 50 and not (folder / "tokens").exists()


def test_changed_input_is_prepared_anew_and_other_text_never_overwritten(base, tmp_path, capsys):
    path, other = tmp_path / "text.txt", tmp_path / "sub" / "text.txt"
    other.parent.mkdir()
    for seed, file in ((1, path), (2, path), (3, other)):
        file.write_text(words(seed, 3000))
        if file is path:
            prepared(path)
    assert "other files" in capsys.readouterr().out
    for data in (other, "world"):
        with pytest.raises(common.Stop, match="holds what was made of .*text.txt: .*--source=NAME"):
            prepared(data, source="text", **TINY_WORLD)
    (base / "data" / "notes").mkdir()
    (base / "data" / "notes" / "precious.txt").write_text("mine")
    with pytest.raises(common.Stop, match="not made of"):
        prepared(source="notes")
    assert (base / "data" / "notes" / "precious.txt").exists()


def fails_at(monkeypatch, number, error):
    """Let prepare.py's open raise an error at the given file that it writes."""
    real, count = open, [0]

    def full(path, mode="r", *args, **options):
        count[0] += mode[0] in "wa"
        if count[0] == number:
            raise error(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(prepare, "open", full, raising=False)


def test_a_failure_leaves_the_old_text_whole(base, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(words(1, 3000))
    prepared(path)
    before = texts_of(base / "data" / "a")
    errors = {OSError: "the disk is full at .*free some space",
              KeyboardInterrupt: "stopped; run the same"}  # fmt: skip
    for error, sentence in errors.items():
        with monkeypatch.context() as patch, pytest.raises(common.Stop, match=sentence):
            fails_at(patch, 2, error)
            prepared(path, seed=1)
        assert texts_of(base / "data" / "a") == before
        assert [p.name for p in (base / "data").iterdir()] == ["a"]


@pytest.mark.parametrize("data", ["text", "conversations"])
def test_a_kill_between_two_files_is_made_good_by_the_next_run(base, tmp_path, monkeypatch, data):
    write_lines(tmp_path / "a.jsonl", [talk(f"{i}?", f"{i}!", text=words(i, 9)) for i in range(20)])
    source, last = {"data": tmp_path / "a.jsonl"}, "train-00000.parquet"
    if data == "conversations":
        source, last = own(tmp_path / "a.jsonl"), "sft.jsonl"
    second = {**source, "seed": 1}
    prepared(**source)
    real = os.replace

    def killed(source, target):
        if Path(target).name == last:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(common.Stop, match="stopped"):
        patch.setattr(prepare.os, "replace", killed)
        prepared(**second)
    folder = next((base / "data").iterdir())
    if data == "text":  # no stage trains on a mixture of old and new
        with pytest.raises(common.MissingInput):
            common.list_shards(folder.name, "train")
    (base / "data" / f".{folder.name}.partial").mkdir()  # as a kill without any clean-up leaves
    after = prepared(**second)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert prepared(**second) == after
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in (base / "data").iterdir()] == [folder.name]


# prepare.py: hub ------------------------------------------------------------------------------

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
        self.sizes = self.ranges = True
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
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def shard(seed: int) -> bytes:
        return table_bytes([{"text": words(1000 * seed + i, 200)} for i in range(300)])

    def fetched(self) -> list[str]:
        return [path.split("/")[-1] for path, _, _ in self.requests if "/resolve/" in path]

    def ranges_of(self, name: str) -> list[str]:
        return [ask for path, ask, _ in self.requests if path.endswith(name)]

    def send(self, request, code, body=b"", cut=None, **headers):
        request.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body[:cut])
        request.close_connection = cut is not None

    def answer(self, request):
        path, _, query = request.path.partition("?")
        name, byte_range = path.split("/")[-1], request.headers.get("Range", "")
        self.requests.append((path, byte_range, request.headers.get("Authorization", "")))
        what = self.script[name].pop(0) if self.script.get(name) else "ok"
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", path)
        other = {"moved": self.files, "plain": self.plain}.get(path.split("/")[1], {}).get(name)
        data = self.repos.get(found[1], {}).get(found[2]) if found else other
        if what == "drop":
            request.close_connection = True
        elif what[:3].isdigit():
            code, _, after = what.partition(" ")
            self.send(request, int(code), **({"Retry_After": after} if after else {}))
        elif what == "html":
            self.send(request, 200, b"<html>a login page</html>")
        elif (repo := "/".join(path.split("/")[3:5])) in self.repos and path.endswith("/tree/main"):
            self.tree(request, query, self.repos[repo])
        elif data is not None:
            self.file(request, path, name, byte_range, what, data)
        else:
            self.send(request, 404)

    def tree(self, request, query, files):
        start = int(query.partition("cursor=")[2] or 0)
        items = [{"type": "directory", "path": "old", "oid": "0" * 40}] if start == 0 else []
        for name, data in list(files.items())[start : start + 3]:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            item = {"type": "file", "path": name, "oid": git, "size": len(data)}
            if name.endswith(".parquet"):
                item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
            items.append(item if self.sizes else {"type": "file", "path": name})
        # a mirror may name the original host
        link = f"<https://original.invalid{request.path.partition('?')[0]}?cursor={start + 3}>"
        headers = {"Link": f'{link}; rel="next"'} if start + 3 < len(files) else {}
        self.send(request, 200, json.dumps(items).encode(), **headers)

    def file(self, request, path, name, byte_range, what, data):
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()[:9]}"'}
        if self.redirect and not path.startswith("/moved/"):
            return self.send(request, 302, Location=f"{self.redirect}/moved/{name}", **headers)
        data = data[:-5] + b"wrong" if what == "wrong" else data
        code, start = 200, 0
        if byte_range and self.ranges:
            code, start = 206, int(byte_range[6:-1])
            if start >= len(data):
                return self.send(request, 416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        half = len(body) // 2 if what in ("cut", "slow", "change") else None
        if what == "change":  # another version of the file is there when the rest is asked for
            self.files[name] = self.shard(77)
        self.send(request, code, body, half, **headers)
        if what == "slow":
            time.sleep(20)


class Waits(threading.Event):
    """Stands for the Event that prepare.Net waits on: notes the delays instead of waiting."""

    def __init__(self):
        super().__init__()
        self.delays = []

    def wait(self, delay):
        self.delays.append(delay)
        return self.is_set()


@pytest.fixture
def hub(base, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1 << 10)
    yield server
    server.server.shutdown()
    server.server.server_close()


def quick_net(**options) -> prepare.Net:
    return prepare.Net(**{"timeout_s": 2.0, "tries": 4, "stopping": Waits(), **options})


def fetch_shards(shards=1, workers=1, **options):
    """Run prepare on the hub; return the manifest and the delays between tries."""
    net = quick_net(**options)
    return prepared("hub", net, shards=shards, workers=workers), net.stopping.delays


def assert_same(base: Path, hub: Hub, shards: int) -> None:
    folder = base / "data" / "fineweb-edu"
    names = [f"train-{i:05d}.parquet" for i in range(shards)]
    for i, name in enumerate(names):
        assert (folder / name).read_bytes() == hub.files[f"shard_{i:05d}.parquet"]
    assert (folder / "val.parquet").read_bytes() == hub.files["shard_00004.parquet"]
    assert sorted(p.name for p in folder.glob("train-*")) == names
    assert not list(folder.glob(".*.partial"))


def test_hub_fetches_each_file_once(base, hub, capsys):
    folder = base / "data" / "fineweb-edu"
    manifest, delays = fetch_shards(2, workers=4)
    assert_same(base, hub, 2)
    assert not delays and sorted(hub.fetched()) == [f"shard_0000{i}.parquet" for i in (0, 1, 4)]
    assert manifest["files"]["val.parquet"]["documents"] == 300
    hub.requests.clear()
    assert fetch_shards(2)[0] == manifest
    assert not hub.requests and "nothing to do" in capsys.readouterr().out
    for shards, fetched in ((3, ["shard_00002.parquet"]), (1, []), (3, [])):
        hub.requests.clear()  # those beyond --shards are kept under another name
        assert len(fetch_shards(shards)[0]["files"]) == shards + 1
        assert hub.fetched() == fetched
        assert_same(base, hub, shards)
    (folder / "manifest.json").unlink()  # as after a kill
    path = folder / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    fetch_shards(3)
    assert hub.fetched() == ["shard_00001.parquet"]
    assert_same(base, hub, 3)


def test_hub_leaves_the_old_text_whole_until_the_new_is_there(base, hub):
    fetch_shards(1)
    folder = base / "data" / "fineweb-edu"
    old = {path.name: path.read_bytes() for path in folder.glob("[mtv]*")}
    hub.files["shard_00000.parquet"] = hub.shard(77)  # another version of it
    hub.script = {"shard_00002.parquet": ["404"]}
    with pytest.raises(common.Stop, match="shard_00002.parquet answered 404: it is not there, or"):
        fetch_shards(3)
    assert {path.name: path.read_bytes() for path in folder.glob("[mtv]*")} == old
    hub.requests.clear()
    manifest = fetch_shards(3)[0]
    assert hub.fetched() == ["shard_00002.parquet"] and len(manifest["files"]) == 4
    assert_same(base, hub, 3)


@pytest.mark.parametrize(
    ("faults", "options", "resumes"),
    [
        (["cut"], {"sizes": False}, True),
        (["cut"], {"ranges": False}, True),
        (["cut", "416"], {}, False),
        (["change"], {"sizes": False}, False),
        (["wrong"], {}, False),
        (["slow"], {}, True),
    ],
    ids=str,
)
def test_hub_with_a_fault_gives_the_same_bytes(base, hub, faults, options, resumes):
    hub.script = {"shard_00000.parquet": faults.copy()}
    vars(hub).update(options)
    fetch_shards(timeout_s=0.3)
    assert_same(base, hub, 1)
    assert bool(hub.ranges_of("shard_00000.parquet")[-1]) == resumes


def test_hub_resumes_where_the_connection_broke_and_backs_off(base, hub):
    hub.script = {"shard_00000.parquet": ["cut", "drop", "cut"], "main": ["503", "429 7"],
                  "shard_00004.parquet": ["429 33", "503", "500", "429 1e999"]}  # fmt: skip
    size, block = len(hub.files["shard_00000.parquet"]), prepare.BLOCK_BYTES
    _, delays = fetch_shards(tries=5)
    starts = [int(r[6:-1] or 0) for r in hub.ranges_of("shard_00000.parquet")]
    assert starts[:3] == [0, size // 2 // block * block, size // 2 // block * block]
    assert size // 2 < starts[3] <= size * 3 // 4  # what is read in one block may be lost
    assert 0.5 <= delays[0] <= 1.5 and delays[1] == 7
    assert 0.5 <= delays[2] <= 1.5 < delays[3] + 0.5 and 0.5 <= delays[4] <= 1.5  # some was gained
    assert delays[5] == 33 and all(0.5 * 2**n <= delays[5 + n] <= 1.5 * 2**n for n in (1, 2, 3))


def test_hub_takes_nothing_that_an_earlier_process_left_of_another_version(base, hub):
    hub.script = {"shard_00000.parquet": ["cut"]}
    with pytest.raises(common.Stop, match="failed 1 times in a row .*run the same command again"):
        fetch_shards(tries=1)
    assert len(list((base / "data" / "fineweb-edu").glob(".unused-00000*.partial"))) == 1
    hub.files["shard_00000.parquet"] = hub.shard(77)
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert hub.ranges_of("00000.parquet") == [""]


NO_TEXT = table_bytes([{"story": "no text column"}])


@pytest.mark.parametrize(
    ("name", "faults", "sentence"),
    [
        ("shard_00000.parquet", ["drop"] * 9, "failed 4 times in a row .the connection broke"),
        ("shard_00000.parquet", ["wrong"] * 9, "gave 3 times other bytes"),
        ("shard_00000.parquet", NO_TEXT, "no column `text`, only story"),
        ("shard_00000.parquet", b"no parquet at all", "no whole parquet file"),
        ("main", ["html"], "other than a list of files: is HF_ENDPOINT"),
        ("main", ["401"], "HF_TOKEN"),
        ("main", ["drop"] * 9, "cannot be reached"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hub_that_fails_for_good_is_one_sentence(base, hub, name, faults, sentence):
    if isinstance(faults, bytes):
        hub.files[name] = faults
    else:
        hub.script = {name: faults.copy()}
    with pytest.raises(common.Stop, match=sentence):
        fetch_shards()
    assert not list(base.glob("data/*/.unused-00000*")) and not list(base.glob("data/*/train-*"))


def test_hub_has_too_few_shards_or_the_disk_too_little_room(base, hub, monkeypatch):
    with pytest.raises(common.Stop, match="has 4 train shards: --shards=4 at most"):
        fetch_shards(5)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(common.Stop, match="GB are needed .*take less data"):
            fetch_shards()
    fails_at(monkeypatch, 1, OSError)
    with pytest.raises(common.Stop, match="the disk is full"):
        fetch_shards(3, workers=2)


def test_hub_token_stays_with_the_endpoint(base, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    other = Hub()
    hub.redirect = other.url
    other.script = {"shard_00000.parquet": ["cut"]}
    fetch_shards()
    assert_same(base, hub, 1)
    assert {token for _, _, token in hub.requests} == {"Bearer secret"}
    assert {token for _, _, token in other.requests} == {""} and len(other.requests) == 3
    other.server.shutdown()


def test_hub_checks_small_files_by_gits_hash(base, hub, tmp_path):
    net = quick_net()
    remote = prepare.hub_files(net, REPO)["README.md"]
    assert len(remote.digest) == 40
    hub.script = {"README.md": ["wrong"]}
    path = tmp_path / "new" / "README.md"
    prepare.fetch_files({path: (net, remote)}, "tests", 1)
    assert path.read_bytes() == b"not a shard" and hub.fetched() == ["README.md"] * 2


def test_without_a_hub_the_other_choices_are_named(base, monkeypatch):
    net, reached = quick_net(), "cannot be reached: .*HF_ENDPOINT.*--data=world.*--data=PATH"
    with pytest.raises(common.Stop, match=reached):
        prepared("hub", net)
    assert len(net.stopping.delays) == 1
    for bad in ("hub.example", "http://[", "ftp://x"):
        monkeypatch.setenv("HF_ENDPOINT", bad)
        with pytest.raises(common.Stop, match="cannot be asked: is HF_ENDPOINT"):
            prepared("hub", quick_net())


def test_hub_is_interrupted_and_resumed(base, hub):
    noise = [{"text": random.Random(i).randbytes(2000).hex()} for i in range(1000)]
    hub.files["shard_00000.parquet"] = table_bytes(noise)
    hub.script = {"shard_00000.parquet": ["slow"]}
    command = [sys.executable, prepare.__file__, "--data=hub", "--shards=1", "--workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = base / "data" / "fineweb-edu"
    until(lambda: any(path.stat().st_size for path in folder.glob(".*.partial")), 60)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "fetching 2 files of karpathy" in out
    assert err == "prepare: stopped; run the same command again to go on\n"
    hub.requests.clear()
    fetch_shards()
    assert_same(base, hub, 1)
    assert hub.ranges_of("shard_00000.parquet")[0].startswith("bytes=")


# prepare.py: conversations and evaluation sets -------------------------------------------------


def talk(*said, **extra):
    """A conversation whose messages are by user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said)], **extra}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def chat_files(source: str) -> dict[str, list[dict]]:
    paths = {name: common.data_dir(source) / f"{name}.jsonl" for name in prepare.FILES}
    return {name: read_jsonl(path) for name, path in paths.items() if path.exists()}


def own(path, **changes) -> dict:
    return {"conversations": str(path), "source": "mine", **changes}


def assert_good_conversation(item: dict, last: str = "assistant") -> None:
    roles = [m["role"] for m in item["messages"] if m["role"] != "system"]
    assert roles[0] == "user" and roles[-1] == last and item["kind"]
    assert all(a != b for a, b in itertools.pairwise(roles))
    for message in item["messages"]:
        assert message["content"] != "" and calls_of(message["content"]) is not None


def eggs(n, start=0):
    return [{"question": f"I had {i} eggs and got 5 more. How many now?",
             "answer": f"{i}+5=<<{i}+5={i + 5}.00>>{i + 5} eggs.\n#### {i + 5}"}
            for i in range(start, start + n)]  # fmt: skip


TOOL = [{"type": "text", "text": "It is "}, {"type": "python", "text": "2*3"},
        {"type": "output", "text": "6"}, {"type": "text", "text": " 6."}]  # fmt: skip
GOOD_ROWS = [
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                               {"type": "text", "text": "there"}]},
                  {"role": "assistant", "content": "Hello!"}], "id": 7},
    {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"},
                       {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]},
    talk("Who are you?", "I am {{name}}.")["messages"],
    {"system": "Be a pirate.", "messages": None, "conversations": [
        {"from": "gpt", "value": "Ahoy!"}, {"role": None, "from": "human", "value": "Code?"},
        {"from": "chatgpt", "value": "    a = 1\n    return a"}, {"from": "human", "value": "Ok"}]},
    {"instruction": "Translate.", "input": "chat", "output": "cat"},
    {"system_prompt": "Be kind.", "question": "How?", "context": None, "response": "So."},
    talk("One?", "Not this.", "Two?", "This."),
    talk("2*3?", TOOL, kind="sum"),
    talk("37*12?", grade="number", answer=444, kind="sum"),
    *eggs(60),
    *(talk(f"Is it {i}?", f"It is {i}.\r\n\0") for i in range(96)),
]  # fmt: skip


def row(*said, **extra) -> bytes:
    return json.dumps(talk(*said, **extra)).encode()


MENDED = ["replies before the first question", "questions without a reply"]
BAD_LINES = {
    b'{"messages": [': "broken JSON",
    b'"hello"': "no list of messages",
    b'{"messages": ["hello"]}': "no list of messages",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "caf\xe9"}]}':
        "text that is not UTF-8",
    row("Hi", "half \ud83d"): "text that is not UTF-8",
    row("Hi", " \n"): "empty message",
    row("Hi", []): "empty message",
    row("Hi", None): "message without text",
    row("Hi"): "no reply to learn from",
    row("Hi", "Ho").replace(b'"user"', b'"gpt"'): "no reply to learn from",
    row("Hi", "Ho").replace(b'"Ho"', b'"Ho", "weight": 0'): "no reply to learn from",
    row("a", "b", "c", "d").replace(b'"c"', b'"c", "role": "assistant"'): "roles out of order",
    b'{"messages": [{"role": "system", "content": "Only this."}]}': "no reply to learn from",
    row("Hi", "Ho", tools=[{"type": "function"}]): "tools that are not the calculator",
    row("Hi", "Ho", label=False): "marked as bad",
    row("Hi", "Ho", images=["a.png"]): "pictures or sound",
    row("Hi", "Ho").replace(b'"Hi"', b'"Hi", "name": "Ann"'): "speaker with a name",
    row("Hi", "Ho").replace(b'"Hi"', b'"Hi", "train": true'): "weight that the loss does not",
    row("Hi", "Ho", weight=0.5): "weight that the loss does not",
    b'{"question": "Which?", "choices": ["a", "b"], "answer": "B"}': "no list of messages",
    row("Hi", "Ho").replace(b'"Ho"', b'"Ho", "reasoning": "hm"'): "reasoning beside the reply",
    b'{"prompt": "a", "chosen": "b", "rejected": "c"}': "no list of messages",
    b'{"messages": [{"role": "tool", "content": "4"}]}': "role that is not system, user or",
    row([{"type": "image_url", "image_url": "x"}], "A cat"): "part that is no text",
    row("6?", [TOOL[1], {"type": "output", "text": "5"}]): "output is not the calculator's",
    row("6?", [TOOL[1], {"type": "output", "text": "6.0"}]): "output is not the calculator's",
    row("6?", [TOOL[1]]): "without its output",
    row("Hi", "").replace(b'""', b'"", "tool_calls": [{}]'): "call of a tool that is not",
    row("2+2?", grade="number"): "problem without its answer",
    row("2+2?", grade="number", answer="four"): "problem without its answer",
    row("2+2?", grade="number", answer=True): "problem without its answer",
    row("2+2?", grade="letter", answer="AB"): "problem without its answer",
    row("2+2?", grade="text", answer="4"): "problem without its answer",
    row("2+2?", "4", grade="number", answer=4): "graded reply",
    row("2+2?", grade="text", accept=["4", " "]): "other than a list of texts",
    row("2+2?", grade="text", accept=["4"], reject=None): "other than a list of texts",
    row("2+2?", grade="number", answer="4 or 5"): "problem without its answer",
    **{json.dumps({"question": "?", "answer": f"So #### {answer}"}).encode(): "no plain number"
       for answer in ("four", "3/4", "12:30", "5 and 6", "x = 2")},
    b'{"prompt": "2+2?", "answer": "It is 4 #### 4"}': "message without text",
    **{row("long", "x" * n): "lines that are too long" for n in (1500, 2000, 5000)},
}  # fmt: skip


def test_own_conversations_of_every_form_become_one(base, tmp_path, capsys):
    folder = tmp_path / "talks"
    folder.mkdir()
    rows = [json.dumps(value) for value in GOOD_ROWS]
    text = "\n\n".join(rows[:50]) + "\n"
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes UTF-8
    (folder / "b.JSONL.gz").write_bytes(gzip.compress("\n".join(rows[50:] + rows[:4]).encode()))
    (folder / "notes.txt").write_text("no conversation")
    manifest = prepared(**own(folder, name='Zoë "Z"', val_percent=5.0))
    out = capsys.readouterr().out
    assert "4 duplicates" in out and "1 files of other kinds (talks/notes.txt)" in out
    files = chat_files("mine")
    assert files["mid"] == files["sft"] and 1 <= len(files["val"]) <= 20
    items = [*files["mid"], *files["val"]]
    asked = {name: [item["messages"][0]["content"] for item in files[name]] for name in files}
    held = asked["rl"][: common.rl_held(len(files["rl"]))]  # what rl validates on
    shown = [question for question in held if "eggs" in question]
    assert len(held) == 6 and not set(held) & set(asked["mid"])
    assert len(GOOD_ROWS) - 1 - len(shown) <= len({json.dumps(i) for i in items}) == len(items)
    for item in items:
        assert_good_conversation(item)
    texts = {json.dumps(item["messages"], ensure_ascii=False) for item in items}
    for i in range(96):  # with plain line ends, and no NUL
        assert json.dumps(talk(f"Is it {i}?", f"It is {i}.")["messages"]) in texts
    assert json.dumps(talk("2*3?", TOOL)["messages"]) in texts
    spoken = "".join(texts)
    assert "Hi\\nthere" in spoken and "Be brief." in spoken and "One?" in spoken
    assert "I am {{name}}." in spoken, "what is one's own stays as it is"
    for said in (
        ["Be a pirate.", "Code?", "    a = 1\n    return a"],
        ["Translate.\n\nchat", "cat"],
        ["Be kind.", "How?", "So."],
    ):
        assert said in [[m["content"] for m in item["messages"]] for item in items]
    for item in files["rl"]:
        assert_good_conversation(item, "user")
        answer = re.search(r"\d+", item["messages"][0]["content"])[0]
        right = "444" if item["kind"] == "sum" else str(int(answer) + 5)
        assert item["answer"] == right and item["grade"] == "number" and "reply" not in item
    assert len(files["rl"]) == 61
    assert prepared(**own(folder, name='Zoë "Z"', val_percent=5.0)) == manifest
    assert "nothing to do" in capsys.readouterr().out


def test_bad_lines_are_counted_with_their_reason_and_first_place(base, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LINE_CHARS", 1000)
    good = [row(f"{i}?", f"{i}!") for i in range(2)]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([good[0], b"", *BAD_LINES, good[1]]) + b"\n")
    dropped = prepared(**own(tmp_path / "mine.jsonl"))["dropped"]
    expected = collections.defaultdict(list)
    for number, reason in enumerate(BAD_LINES.values(), 3):
        expected[reason].append(number)
    for reason, numbers in expected.items():
        (found,) = [value for name, value in dropped.items() if reason in name]
        assert found[0] == len(numbers) and found[1].startswith(f"mine.jsonl:{numbers[0]}")
    assert len(dropped) == len(expected)
    files = chat_files("mine")
    assert len(files["mid"]) == len(files["val"]) == 1 and "rl" not in files


def test_a_name_that_the_terminal_cannot_show_is_printed_as_what_it_can(base, tmp_path):
    (tmp_path / "文本.jsonl").write_text("{}\n", "utf-8")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, HERE / "prepare.py", f"--conversations={tmp_path}", "--source=x"]
    said = call(*command, env=env).stderr
    assert "no list of messages" in said and "??.jsonl" in said and said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_a_name_that_is_no_text_is_shown_and_stored_as_what_can_be(base, tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_lines(folder / "mine.jsonl", [talk(f"{i}?", f"{i}!") for i in range(40)] + [{"text": 1}])
    assert prepared(**own(folder))["dropped"]["no list of messages"][1] == "caf\ufffd/mine.jsonl:41"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "type",
                         "text", "grade", "answer", "kind", "tool_calls"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
GRADED_ROW = st.fixed_dictionaries(
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


def test_questions_of_people_are_graded_by_their_kind(base, tmp_path):
    (tmp_path / "people").mkdir()
    write_lines(tmp_path / "people/mine.jsonl", [
        {"question": "2 apples and 3?", "answer": "5", "kind": "problem", "steps": 1},
        {"question": "capital france", "answer": "Paris", "kind": "query"},
        {"question": "Sing!", "answer": None, "kind": "outside"},
    ])  # fmt: skip
    prepared(eval_data=str(tmp_path))
    problem, query, outside = read_jsonl(base / "data/eval/people.jsonl")
    assert problem["kind"] == "problem, one step" and query["kind"] == "query"
    for item, right, wrong in (
        (problem, "2 and 3 make 5.", "23 apples"),
        (query, "The capital of France is Paris.", "I don't know."),
        (outside, "Sorry, I cannot sing. Ask me about a country.", "La la la."),
    ):
        assert common.grade(item, right) and not common.grade(item, wrong)


@settings(max_examples=400)
@given(JSON | GRADED_ROW | st.fixed_dictionaries({"messages": st.lists(TURN | JSON, max_size=4)})
       | st.fixed_dictionaries({"question": JSON, "answer": st.text().map("{0}####1{0}".format)})
)  # fmt: skip
def test_any_value_is_a_conversation_or_has_a_reason(value):
    try:
        item = prepare.read_conversation(value)
    except ValueError as error:
        assert all(isinstance(word, str) for word in error.args)
    else:
        assert_good_conversation(item, "user" if "grade" in item else "assistant")
        assert "grade" not in item or not common.grade(item, "Perhaps \u2603")
        prepare.as_line(item).encode()  # no half characters


def odd_row(rng, i):
    """A row of a known form, with fields missing, null or of meaning; each text has a mark @i.x."""

    def mark(name):
        return f"@{i}.{name} {rng.choice(WORDS)}"

    def turn(role, n):
        text = mark(f"{role[0]}{n}")
        one = {"role": role, "content": rng.choice([text, [{"type": "text", "text": text}]])}
        if rng.random() < 0.4:
            names = {
                "user": ["human"],
                "assistant": ["gpt", "chatgpt", "bot"],
                "system": ["system"],
            }
            one = {"from": rng.choice(names[role]), "value": text, "role": None, "content": None}
        if role == "assistant" and rng.random() < 0.15:
            one["weight"] = rng.choice([0, 1, 0.5, None])
            one["content" if "role" not in one or one["role"] else "value"] = mark(f"w{n}")
        if rng.random() < 0.06:
            one[rng.choice(["name", "reasoning_content", "tool_calls"])] = rng.choice(
                [mark("x"), None]
            )
        return one

    if rng.random() < 0.1:
        row = {"prompt": mark("p"), "completion": mark("c"), "input": None}
    elif rng.random() < 0.1:
        answer = rng.choice(["5", "$1,200", "3/4", "five"])
        row = {"question": mark("q"), "answer": f"{mark('s')} #### {answer}"}
    else:
        roles = [
            ("user", "assistant")[(n + (rng.random() < 0.05)) % 2] for n in range(rng.randint(0, 6))
        ]
        turns = [turn("system", 9)] * (rng.random() < 0.2) + [
            turn(r, n) for n, r in enumerate(roles)
        ]
        row = {rng.choice(["messages", "conversations"]): turns}
        if rng.random() < 0.2:
            row = {"messages": None, **row, "id": i, "source": None}
    for name in ("system", "tools", "images", "label", "kind"):
        if rng.random() < 0.06:
            row[name] = rng.choice([mark(name[:1]), None, mark(name[:1])])
    return row


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_every_line_of_ones_own_is_used_with_its_meaning_or_counted(base, tmp_path, form):
    rng = random.Random(form)
    rows = [odd_row(rng, i) for i in range(700)]
    path = tmp_path / f"mine.{form}"
    if form == "parquet":  # one type a column
        rows = [talk(*(f"@{i}.{n}" for n in range(rng.randint(1, 5))), system=f"@{i}.s") | {
            "tools": f"@{i}.t" if i % 9 == 0 else None} for i in range(700)]  # fmt: skip
        path.write_bytes(table_bytes(rows))
    elif form == "json":
        path.write_text(json.dumps(rows, indent=rng.choice([None, 1])))
    else:
        write_lines(path, rows)
    dropped = prepared(**own(path))["dropped"]
    assert "duplicates" not in dropped
    mended = sum(dropped.pop(name, [0])[0] for name in MENDED)
    files = chat_files("mine")
    problems = {re.search(r"@\d+", json.dumps(item))[0] for item in files.get("rl", [])}
    used = {name: set() for name in range(len(rows))}
    for item in [*files["mid"], *files["val"], *files.get("rl", [])]:
        for message in item["messages"]:
            found = re.findall(r"@(\d+)\.(\w+)", json.dumps(message["content"]))
            assert all(("weight" in message) <= name.startswith("w") for _, name in found)
            for i, name in found:
                used[int(i)].add(name)
    lost = 0
    for i, one in enumerate(rows):
        marks = {name for at, name in re.findall(r"@(\d+)\.(\w+)", json.dumps(one)) if int(at) == i}
        marks -= {"k", "l"} | ({"s"} if f"@{i}" in problems else set())  # kind, label, a solution
        lost += len(marks - used[i]) if used[i] else 0
    assert lost == mended and mended > 50
    assert sum(count for count, _ in dropped.values()) == sum(not names for names in used.values())
    assert sum(map(bool, used.values())) > 150


def test_nothing_good_at_all_is_one_sentence(base, tmp_path):
    why = {b"": "", b"{}\n5\n": " .*4 no list of messages", row("Hi", "Ho") + b"\n": ""}
    for text, sentence in why.items():
        (tmp_path / "a.jsonl").write_bytes(text * 2)
        with pytest.raises(common.MissingInput, match="holds no two conversations" + sentence):
            prepared(**own(tmp_path / "a.jsonl"))
        assert not list((base / "data").glob(".*"))


def test_text_and_conversations_share_a_folder_and_neither_harms_the_other(base, tmp_path):
    talks, text = tmp_path / "talks.jsonl", tmp_path / "text.txt"
    write_lines(talks, [talk(f"{i}?", f"{i}!") for i in range(20)])
    prepared(**own(talks))
    before = chat_files("mine")
    for seed in (1, 2):
        text.write_text(words(seed, 3000))
        prepared(text, source="mine")
        (base / "data/mine/tokens").mkdir(exist_ok=True)  # a later stage's cache
    assert chat_files("mine") == before
    write_lines(talks, [talk(f"{i}?", f"{i}.") for i in range(30)])
    prepared(**own(talks))
    assert chat_files("mine") != before and texts_of(base / "data/mine")[0]
    (base / "data/made").mkdir()
    (base / "data/made/mid.jsonl").write_text("by hand")
    with pytest.raises(common.Stop, match="not made of .*--source"):
        prepared(conversations=str(talks), source="made")
    assert (base / "data/made/mid.jsonl").read_text() == "by hand"


def test_the_letters_of_choices_are_the_tokens_of_answers():
    choices = ["Rome", "New York!", "St. John's", "5 (A)"]
    item = prepare.letter_item("Which city is it?", choices, 0)
    pieces = regex.findall(nanochat_bpe.PATTERN, item["messages"][0]["content"])
    assert [p for p in pieces if p in "ABCD"] == ["A", "B", "C", "A", "D"]


@given(st.integers(0, 30), st.integers(0, 30))
def test_counted_rows_are_taken_out_and_the_rest_goes_to_all_others(first, second):
    counts = {"mid": prepare.REST, "sft": first, "val": second, "rl": prepare.REST}
    given_ = [prepare.share_out(counts, row + 0.5) for row in range(100)]
    assert given_.count(["sft"]) == first and given_.count(["val"]) == second
    assert given_.count(["mid", "rl"]) == 100 - first - second


@pytest.mark.parametrize("split", ["none", "train", "test"])
def test_marks_of_gsm8k_become_calls_of_the_tool(split):
    answer = (
        "He has 1+2 = <<1+2=3>>3.\nThen <<+3*2=6>>6 and 7/2 = $<<7/2=3.50>>3.50, <<3/4=3/4>>3/4"
    )
    path = SHARED / "eval" / "gsm8k" / f"{split}.jsonl"
    rows = [{"question": "How many?", "answer": f"{answer}\n#### 1,234"}]
    marks = calls = 0
    for one in read_jsonl(path) if path.exists() else rows:
        item = prepare.gsm8k_item(one)
        said = common.reply_text(item["reply"])
        solution, _, answer = one["answer"].rpartition("####")
        plain = re.sub("<<.*?>>", "", solution).strip()
        assert said == f"{plain}\nThe answer is {item['answer']}."
        assert float(item["answer"]) == float(answer.replace(",", ""))
        assert common.grade(item, said) and not common.grade(item, f"{said} Or 0.123.")
        results = [output for _, output in calls_of(item["reply"])]
        expected = re.findall("=([^=>]*)>>", solution)
        marks, calls = marks + len(expected), calls + len(results)
        if len(results) == len(expected):
            assert [float(x) for x in results] == [float(x.replace(",", "")) for x in expected]
    assert marks - calls <= (2 if marks > 4 else 1)  # of 27,998 real ones two are no calls


def letters(n, start=0):
    return [{"question": f"What is {i}?", "choices": [f"{i + k}" for k in range(4)], "answer": i % 4}
            for i in range(start, start + n)]  # fmt: skip


def science(n, start=0, labels="ABCD"):
    return [{"question": f"Why is {i} so?", "answerKey": labels[i % len(labels)],
             "choices": {"text": [f"as {i} {k}" for k in labels], "label": list(labels)}}
            for i in range(start, start + n)]  # fmt: skip


def talks(n, start=0):
    rows = [talk(words(i, 20), words(i + 1, 30), "More?", words(i + 2, 30))
            for i in range(start, start + n)]  # fmt: skip
    rows[0]["messages"][0]["role"] = "tool"  # a row that is wrong
    return rows


def chat_tables() -> dict[str, dict[str, bytes]]:
    """The repositories that conversations and evaluation sets come from, with few rows."""
    stolen = talk(eggs(1, 900)[0]["question"].upper() + "!", "905")  # asked by the evaluation
    again = {**letters(1, 900)[0], "choices": ["901", "900", "903", "902"], "answer": 1}
    code = {"prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n"}  # fmt: skip
    tables = {
        "HuggingFaceTB/smol-smoltalk": {
            "data/train-smol-0.parquet": talks(150) + [stolen],
            "data/train-smol-1.parquet": talks(50, 500),
            "data/test-smol.parquet": talks(40, 700) + talks(21, 510)[1:],  # 20 in both
        },
        "cais/mmlu": {"all/auxiliary_train-mmlu.parquet": letters(39) + [again],
                      "all/validation-mmlu.parquet": letters(6, 100),
                      "all/test-mmlu.parquet": letters(12, 900), "all/dev-mmlu.parquet": []},
        "openai/gsm8k": {"main/train-gsm.parquet": eggs(60), "main/test-gsm.parquet": eggs(10, 900),
                         "socratic/train-soc.parquet": []},
        "allenai/ai2_arc": {f"{name}/{split}-{name[4]}.parquet": science(*rows)
                            for name in ("ARC-Easy", "ARC-Challenge") for split, rows in {
                                "train": (20, 0, "1234"), "validation": (5, 50, "ABC"),
                                "test": (8, 90)}.items()},
        "openai/openai_humaneval": {"openai_humaneval/test-code.parquet": [code]},
    }  # fmt: skip
    return {repo: {path: table_bytes(rows) for path, rows in files.items()}
            for repo, files in tables.items()}  # fmt: skip


def core_zip(files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


CORE = {
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


@pytest.fixture
def chat_hub(hub, monkeypatch):
    hub.repos = chat_tables()
    bundle = {f"eval_bundle/eval_data/{name}.jsonl": json.dumps(row) for name, row in CORE.items()}
    hub.plain = {"eval_bundle.zip": core_zip({"eval_bundle/core.yaml": "icl_tasks:\n", **bundle}),
                 "words_alpha.txt": "\r\n".join(["don't", "x", *WORDS]).encode()}  # fmt: skip
    monkeypatch.setenv("NANOCHAT_MIRROR", hub.url + "/plain/")
    rest = prepare.REST
    monkeypatch.setattr(prepare, "MIXTURE", {
        "smoltalk": (rest, 40, 0, 20), "mmlu": (rest, 0, 0, rest), "arc-easy": (0, rest, 0, rest),
        "gsm8k": (rest, rest, rest, 12), "spelling": (60, 10, 0, 5), "identity": (9, 6, 0, 3),
    })  # fmt: skip
    return hub


def fetch_chat(name="Ada"):
    return prepared(net=quick_net(), conversations="hub", name=name, workers=2)


def test_conversations_of_the_hub_follow_the_mixture(base, chat_hub, capsys):
    manifest = fetch_chat()
    out = capsys.readouterr().out
    names = [path.split("/")[-1] for files in chat_hub.repos.values() for path in files]
    unwanted = ("dev-mmlu.parquet", "train-soc.parquet")
    assert sorted(chat_hub.fetched()) == sorted(set(names) - set(unwanted))
    files = chat_files("chat")
    by_kind = {name: collections.Counter(i["kind"] for i in files[name]) for name in files}
    lines = collections.defaultdict(set)  # by file, and by file and kind
    for name, items in files.items():
        assert dict(by_kind[name]) == manifest["files"][f"{name}.jsonl"]["kinds"]
        for item in items:
            assert_good_conversation(item, "user" if name == "rl" else "assistant")
            assert ("grade" in item) == (name == "rl") and "reply" not in item
            lines[name].add(json.dumps(item))
            lines[name, item["kind"]].add(json.dumps(item["messages"][0]["content"]))
        assert len(lines[name]) == len(items)
    assert not lines["val"] & (lines["mid"] | lines["sft"])
    mid, sft, val = (lines[name, "smoltalk"] for name in ("mid", "sft", "val"))
    assert not mid & sft and 200 - 2 - 20 <= len(mid | sft) < 200 - 2  # some are in val too
    assert 20 < len(sft) < 60 and 8 < len(val) < 32  # about 40 and 20
    mid, sft, val = (lines[name, "gsm8k"] for name in ("mid", "sft", "val"))
    kept = len(files["rl"]) // 10  # what rl validates on
    assert kept > 2 and mid == {json.dumps(i["messages"][0]["content"]) for i in files["rl"][kept:]}
    assert mid == sft and 2 < len(val) < 25 and len(mid | val) == 60 - kept
    assert by_kind["mid"]["mmlu"] == 39 and by_kind["val"]["mmlu"] == 6  # one is of the test
    assert by_kind["sft"]["arc-easy"] == 20 and by_kind["val"]["arc-easy"] == 5
    assert 30 < by_kind["mid"]["spelling"] <= 60 and "identity" in by_kind["sft"]
    assert manifest["dropped"]["questions of the evaluation sets"][0] == 2
    assert manifest["dropped"]["SmolTalk rows that cannot be used"][0] == 3
    spelled = set(re.findall(r"The word (.*?) is spelled", str(files)))
    assert spelled and spelled <= {word for word in WORDS if len(word) > 2}
    assert not any(prepare.held_out_word(word) for word in spelled)
    assert "mid.jsonl" in out and "gsm8k" in out
    chat_hub.requests.clear()
    assert fetch_chat() == manifest and "nothing to do" in capsys.readouterr().out
    fetch_chat("Bob")
    assert not chat_hub.requests  # the downloads are there


def test_evaluation_sets_of_the_hub_are_graded_items(base, chat_hub, capsys):
    manifest = prepared(net=quick_net(), eval_data="hub")
    assert not any("train" in name for name in chat_hub.fetched())
    assert (base / "data/eval/core/eval_data/commonsense_reasoning/piqa.jsonl").exists()
    rows = {p.stem: read_jsonl(p) for p in (base / "data/eval").glob("*.jsonl")}
    counts = {"MMLU": 12, "ARC-Easy": 8, "ARC-Challenge": 8, "GSM8K": 10, "HumanEval": 1}
    assert {n: len(items) for n, items in rows.items()} == counts | {"SpellingBee": 21}
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
    assert prepared(net=quick_net(), eval_data="hub") == manifest
    assert "nothing to do" in capsys.readouterr().out


def test_no_question_of_an_evaluation_set_is_trained_on(base, chat_hub, tmp_path):
    prepared(net=quick_net(), eval_data="hub")
    sets = {p.stem: read_jsonl(p) for p in (base / "data/eval").glob("*.jsonl")}
    asked = [items[-1]["messages"][0]["content"].upper() for items in sets.values()]
    asked += ["why does ice float", "The cup fell since the shelf was round!"]
    asked += [row["context"] for row in CORE.values() if "context" in row]
    long = "Of two equal cups of tea one stands in the sun: which of them cools later?"
    item = prepare.letter_item(long, ["this", "that"], 0)  # found without its choices too
    write_lines(base / "data/eval/Long.jsonl", [{**item, "kind": "x"}])
    asked.append(long.upper())
    other_choices = prepare.letter_item(long, ["the left one", "the right one"], 1)
    assert not prepare.evaluation_questions().isdisjoint(prepare.question_keys(other_choices))
    planted = [talk("Hi", "Hello!", text, "Sure.") for text in asked]
    fine = ["Close them.\nInput: [ (\nOutput:", "Question", "Answer: ?", "What is the cup?", "Books?",
            "Context: Ann has a red barn.\nQuestion: What colour is it?\nAnswer:"]  # fmt: skip
    rows = planted + [talk(text, "Sure.") for text in fine]
    test = sets["GSM8K"][0]
    problems = [{"question": test["messages"][0]["content"], "answer": "#### 905"},
                talk("What is 2+2?", grade="number", answer="4"),
                {key: test[key] for key in ("messages", "grade", "answer")}]  # fmt: skip
    write_lines(tmp_path / "mine.jsonl", rows + problems)
    repo = chat_hub.repos["HuggingFaceTB/smol-smoltalk"]
    repo["data/train-smol-1.parquet"] = table_bytes(rows)

    def dropped():
        made = prepared(**own(tmp_path / "mine.jsonl")), fetch_chat()
        return [manifest["dropped"]["questions of the evaluation sets"][0] for manifest in made]

    def plain(text):
        return "".join(text.casefold().split()).removeprefix("question:")

    assert dropped() == [len(planted) + 2] * 2  # in the hub's, two are in the other files
    for source in ("mine", "chat"):
        items = [item for items in chat_files(source).values() for item in items]
        said = {plain(m["content"]) for i in items for m in i["messages"] if m["role"] == "user"}
        assert set(map(plain, fine)) <= said and not set(map(plain, asked)) & said, source
    # what is asked later counts too: the same conversations are then made anew
    write_lines(base / "data/eval/New.jsonl", [{**test, **talk("What is the cup?")}])
    assert dropped() == [len(planted) + 3] * 2


def test_downloads_of_conversations_resume_and_are_checked(base, chat_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    chat_hub.script = {"train-smol-0.parquet": ["cut", "429 9", "drop"],
                       "train-gsm.parquet": ["wrong"] * 3,
                       "words_alpha.txt": ["cut"], "eval_bundle.zip": ["503"]}  # fmt: skip
    with pytest.raises(common.Stop, match="train-gsm.parquet gave 3 times other bytes"):
        fetch_chat()
    with monkeypatch.context() as patch:
        patch.delitem(chat_hub.repos["openai/gsm8k"], "main/train-gsm.parquet")
        with pytest.raises(common.Stop, match="lists no main/train-.*of openai/gsm8k"):
            fetch_chat()
    assert not list((base / "data").glob("chat/*.jsonl"))
    fetch_chat()
    root = base / "data/downloads"
    there = {root / repo / path: data for repo, files in chat_hub.repos.items()
             for path, data in files.items() if (root / repo / path).exists()}  # fmt: skip
    assert len(there) > 3 and all(path.read_bytes() == data for path, data in there.items())
    assert (root / "words_alpha.txt").read_bytes() == chat_hub.plain["words_alpha.txt"]
    assert not list(root.rglob(".*.partial")) and not list((base / "data").glob(".*"))
    for name in ("test-gsm.parquet", "test-mmlu.parquet"):
        assert chat_hub.fetched().count(name) == 1  # what was whole is not fetched again
    tokens = {path.startswith("/plain/"): token for path, _, token in chat_hub.requests}
    assert tokens == {True: "", False: "Bearer secret"}  # the hub's token is the hub's


def test_an_archive_that_is_damaged_is_one_sentence(base, chat_hub):
    chat_hub.plain["eval_bundle.zip"] = chat_hub.plain["eval_bundle.zip"][:-30]
    with pytest.raises(common.Stop, match="eval_bundle.zip is damaged .*delete it"):
        prepared(net=quick_net(), eval_data="hub")


def test_evaluation_sets_of_a_folder_are_added_to_those_there(base, tmp_path, capsys):
    gsm8k = tmp_path / "one" / "gsm8k"
    gsm8k.mkdir(parents=True)
    write_lines(gsm8k / "test.jsonl", eggs(1))
    prepared(eval_data=str(tmp_path / "one"))
    out = capsys.readouterr().out
    assert "GSM8K.jsonl: 1" in out and "does not have MMLU, ARC-Easy" in out and "CORE" in out
    (tmp_path / "two").mkdir()
    with pytest.raises(common.MissingInput, match="holds none of the evaluation sets"):
        prepared(eval_data=str(tmp_path / "two"))
    (tmp_path / "two" / "words_alpha.txt").write_text("\n".join(WORDS))
    manifest = prepared(eval_data=str(tmp_path / "two"))
    assert set(manifest["files"]) == {"GSM8K.jsonl", "SpellingBee.jsonl"}
    (gsm8k / "test.jsonl").write_text('{"question": ')
    with pytest.raises(common.Stop, match="test.jsonl is damaged .*delete it"):
        prepared(eval_data=str(tmp_path / "one"))
    assert len(read_jsonl(base / "data/eval/GSM8K.jsonl")) == 1
    assert not list((base / "data").glob(".*"))


@pytest.mark.skipif(not (SHARED / "eval").exists(), reason="needs ../shared/data")
def test_the_public_evaluation_sets_and_conversations_are_read_whole(base):
    manifest = prepared(eval_data=str(SHARED / "eval"))
    files = {n: e["conversations"] for n, e in manifest["files"].items() if "conversations" in e}
    assert files == {"MMLU.jsonl": 14_042, "ARC-Easy.jsonl": 2_376, "ARC-Challenge.jsonl": 1_172,
                     "GSM8K.jsonl": 1_319, "HumanEval.jsonl": 164, "SpellingBee.jsonl": 500, "people.jsonl": 754}  # fmt: skip
    assert not manifest["dropped"] and sum("task" in e for e in manifest["files"].values()) == 20
    arc = json.loads((SHARED / "eval/arc/ARC-Easy/test.json").read_text("utf-8"))
    for one, item in zip(arc, read_jsonl(base / "data/eval/ARC-Easy.jsonl")):
        right = one["choices"]["text"][one["choices"]["label"].index(one["answerKey"])]
        line = f"- {' '.join(right.split())} ({item['answer']})"
        assert line in item["messages"][0]["content"].split("\n")
    manifest = prepared(**own(SHARED / "chat"))
    packed = (SHARED / "chat").glob("*.gz")
    rows = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in packed)
    good = sum(manifest["files"][f"{name}.jsonl"]["conversations"] for name in ("mid", "val"))
    assert good + sum(count for count, _ in manifest["dropped"].values()) == rows > 27_000
    assert good > 0.99 * rows


# prepare.py: the embedded world ---------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> list[str]:
    return list(prepare.world_documents(1, 9_000))


@pytest.fixture(scope="module")
def chats() -> dict[str, list[dict]]:
    sizes = {"mid": 15_000, "sft": 3_000, "val": 600, "rl": 1_500}
    return {split: list(prepare.world_conversations(1, split, n)) for split, n in sizes.items()}


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    return prepare.world_sets()


def said(content) -> str:
    """The text of a reply, without the tool's."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts if part["type"] == "text")


def calls_of(content) -> list[tuple[str, str]]:
    """The (call, output) pairs of a reply, each of them as the calculator has it."""
    parts = [] if isinstance(content, str) else [p for p in content if p["type"] != "text"]
    assert [p["type"] for p in parts] == ["python", "output"] * (len(parts) // 2)
    pairs = [(a["text"], b["text"]) for a, b in zip(parts[::2], parts[1::2])]
    assert all(common.calculate(call) == output for call, output in pairs)
    return pairs


def turns(conversations, *kinds) -> Iterator[tuple]:
    """Yield (what is asked, reply) of conversations of some kinds, or of all; graded items too."""
    for one in conversations:
        if not kinds or one["kind"] in kinds:
            contents = [m["content"] for m in one["messages"] if m["role"] != "system"]
            contents += [one.get("reply", "")] if len(contents) % 2 else []
            yield from zip(contents[::2], contents[1::2])


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def found_in(needles: set[str], texts) -> set[str]:
    """Find the needles that occur in texts, as words in a row."""
    lengths = collections.defaultdict(set)
    for needle in needles:
        words = needle.split()
        assert len(words) > 1, f"{needle}: too short to be told from other text"
        lengths[words[0], words[1]].add(len(words))
    found: set[str] = set()
    for text in texts:
        words = normal(text).split()
        for i, pair in enumerate(itertools.pairwise(words)):
            found.update(" ".join(words[i : i + n]) for n in lengths.get(pair, ()))
    return found & needles


def questions_on_facts(unseen: bool) -> dict[str, tuple]:
    """Every question on every fact: its words -> fact, forward. One question has one answer."""
    asked, answers = {}, collections.defaultdict(set)
    for relation in prepare.world_relations().values():
        for fact in relation.facts:
            for forward in (True, False) if relation.unique(fact) else (True,):
                for wording in relation.askings(forward, unseen):
                    question = wording.format_map(fact.forms())
                    answers[question].add(fact.answer if forward else fact.subject)
                    asked[normal(question)] = fact, forward
    assert not [question for question, right in answers.items() if len(right) > 1]
    return asked


GOLDEN = {
    "mid": "9db5e589a6e1", "sft": "a44c3a67f370", "rl": "98e4a4893002", "val": "9a58ee479a04",
    "documents": "4f819f5fbd73", "sets": "a1486df2049a", "prompts": "032210cb2a57",
}  # fmt: skip


def test_the_world_of_a_version_stays_the_same():
    """Other text or conversations for seed 0 take a greater WORLD_VERSION, and new hashes here."""

    def digest(things):
        return hashlib.sha256(json.dumps(list(things)).encode()).hexdigest()[:12]

    found = {split: digest(prepare.world_conversations(0, split, 300)) for split in prepare.FILES}
    found |= {"documents": digest(prepare.world_documents(0, 500)),
              "sets": digest(prepare.world_sets().items()),
              "prompts": digest(p for s in ("trained", "unseen") for p in prepare.fact_prompts(s))}  # fmt: skip
    assert (prepare.WORLD_VERSION, found) == (2, GOLDEN)


def forget_the_world():
    for made in vars(prepare).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()


def test_a_line_added_to_world_txt_is_taught(tmp_path, monkeypatch):
    """A fact, a wording, a relation and a kind of problem, by someone who knows no Python."""
    text, version = (HERE / "world.txt").read_text("utf-8"), prepare.world_version()
    for old, new in {
        "France, Paris, Europe": "Zubrovia, Nebel, Europe, Zubrovian, klub, Zubrovian; France, Paris, Europe",
        "? [what|which city] is {ss} capital?": "? capital city where in {s}? / [what|which city] is {ss} capital?",
        "@ continent |": """@ mascot | clubs and their mascots | | mascot of {s} |
+ {ss} mascot is the {o} / the mascot of {s} is the {o}
! the {o} cheers for {s} / you see the {o} when {s} plays
? who cheers for {s}? / which mascot has {s}?
?! who is the mascot at {s}? / what runs about for {s}?
= the Blue Rovers: badger; the Red Rovers: heron; Port United: walrus; Old Town: mole
@ continent |""",
        "@ get |": """@ spill | full = kept + spilled | amounts
+ full: {n} filled a pail with {full} {things}
+ spilled: {n} spilled {spilled} {things}
? kept: how many {things} <were|are> in the pail after that
= kept: take away what was spilled

@ get |""",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "world.txt").write_text("# another comment\n" + text, "utf-8")
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    forget_the_world()
    try:
        assert prepare.world_version() != version
        told = "\n".join(prepare.world_documents(0, 3000))
        asked = [text for text, _ in turns(prepare.world_conversations(0, "mid", 9000))]
        for words in ("Nebel", "klub", "heron"):
            assert words in told, words
        for words in ("capital city where in", "mascot", "filled a pail with"):
            assert any(words in one.lower() for one in asked), words
        [(question, reply)] = [(q, r) for q, r in turns(prepare.world_conversations(0, "mid", 9000), "problem")
                               if "filled a pail" in q and len(calls_of(r)) == 1][:1]  # fmt: skip
        assert said(reply).startswith("Take away what was spilled: "), question
        (tmp_path / "world.txt").write_text("# one more\n" + text, "utf-8")
        changed = prepare.world_version()
        forget_the_world()
        assert prepare.world_version() == changed  # comments change nothing
    finally:
        monkeypatch.undo()
        forget_the_world()
    assert prepare.world_version() == version


def test_the_world_is_a_function_of_the_seed_and_grows_at_the_end():
    makers = {"text": prepare.world_documents}
    makers |= {split: functools.partial(prepare.world_conversations, split=split)
               for split in prepare.FILES}  # fmt: skip
    for make in makers.values():
        first = list(make(7, count=200))
        assert first == list(make(7, count=300))[:200] and len(first) == 200
        assert sum(one in first for one in make(8, count=200)) < 10
        assert list(make(7, count=0)) == []


def test_documents_and_conversations_differ_and_keep_their_length(docs, chats):
    lengths = [len(text) for text in docs]
    assert len(set(docs)) == len(docs) and min(lengths) >= 150 and max(lengths) <= 1600
    assert 300 < sum(lengths) / len(lengths) < 600
    dumped = {split: {json.dumps(c["messages"]) for c in chats[split]} for split in chats}
    assert not dumped["val"] & (dumped["mid"] | dumped["sft"])
    shares = collections.Counter()
    for split, conversations in chats.items():
        assert len(dumped[split]) == len(conversations), split
        for one in conversations:
            assert_good_conversation(one, "user" if split == "rl" else "assistant")
            size = sum(prepare.text_size(message) for message in one["messages"])
            assert size <= prepare.LONGEST
            shares[one["kind"]] += len(one["messages"]) // 2 * (split == "mid")
    for kind, share in prepare.KINDS.items():
        wanted = share / sum(prepare.KINDS.values())
        assert abs(shares[kind] / shares.total() - wanted) < 0.01, kind


def test_facts_are_many_and_do_not_contradict():
    facts = prepare.world_facts()
    assert 2000 <= len(facts) <= 4000
    assert len({(f.relation, f.subject) for f in facts}) == len(facts)
    assert 0.15 < sum(not f.askable for f in facts) / len(facts) < 0.25
    for fact in facts:
        text = fact.subject + fact.answer
        assert fact.answer not in ("", "-") and text == text.strip()
        assert not re.search(r"[|/{}\[\];]", text), fact
    known = {(f.relation, f.subject): f.answer for f in facts}
    right = """capital Kenya Nairobi/atomic number gold 79/symbol tin Sn/currency Japan yen/
        next December January/days June 30/planet Saturn sixth/opposite cold hot/Roman 14 XIV/
        German water Wasser/letter place Z 26/nationality France French"""
    for line in right.split("/"):
        relation, subject, answer = line.strip().rsplit(" ", 2)
        assert known[relation, subject] == answer
    assert ("continent", "Russia") not in known and ("opposite", "right") not in known


def test_every_relation_has_wordings_to_train_and_to_hold_out():
    for relation in prepare.world_relations().values():
        pairs = [(relation.statements, relation.unseen, 6),
                 (relation.questions, relation.unseen_questions, 2)]  # fmt: skip
        for trained, unseen, least in pairs:
            assert len(set(trained)) == len(trained) >= least and len(unseen) >= 2, relation.name
            assert not set(trained) & set(unseen), relation.name
    for name in ("story_asks", "memory", "identity", "beyond", "outside"):
        for key, fields in prepare.table(name, name != "outside").items():
            unseen, trained = fields[-2], [w for field in fields[:-2] for w in field]
            assert len(set(unseen)) >= 2 and not set(unseen) & set(trained), key
    answers = collections.defaultdict(set)
    for split in ("trained", "unseen"):
        for p in prepare.fact_prompts(split):
            answers[p["prompt"].lower()].add(p["answer"])
            assert p["prompt"] == p["prompt"].strip() and p["answer"][1:] in p["accept"]
    assert all(len(right) == 1 for right in answers.values())


def test_every_fact_is_stated_often(monkeypatch):
    stated = collections.defaultdict(list)
    clause = prepare.FactWriter.clause

    def count(self, card):
        text = clause(self, card)
        stated[card[0]].append(text)
        return text

    monkeypatch.setattr(prepare.FactWriter, "clause", count)
    for _ in prepare.world_documents(4, prepare.Settings().documents // 4):
        pass
    counts = sorted(len(stated[fact]) for fact in prepare.world_facts())
    assert counts[0] >= 10 and counts[len(counts) // 20] >= 15 and counts[len(counts) // 2] >= 18
    assert min(len(set(stated[fact])) for fact in prepare.world_facts()) >= 5


def test_nothing_held_out_occurs_in_any_training_file(docs, chats, sets):
    """Neither a question of an evaluation set, nor its wording, pair, word, name or part."""
    needles = set(questions_on_facts(unseen=True))
    needles |= {
        normal(made["messages"][-1]["content"])
        for name, items in sets.items() for made in items if name != "sums"  # by pairs, below
    }  # fmt: skip
    others = [*prepare.world_conversations(2, "mid", 3000), *chats["mid"], *chats["sft"],
              *chats["val"], *chats["rl"]]  # fmt: skip
    texts = [*docs, *(text for ask, reply in turns(others) for text in (ask, said(reply)))]
    assert found_in(needles, texts) == set()
    prompts, text = prepare.fact_prompts("unseen"), "\n".join(docs[::3]).lower()
    assert [p["prompt"] for p in prompts if p["prompt"].lower() in text] == []
    assert found_in({"is a lion"}, ["What kind of animal is a lion?"]) == {"is a lion"}
    whole = "\n".join(texts)
    names = set(prepare.world_words("test_girls") + prepare.world_words("test_boys"))
    assert not names & set(re.findall(r"[A-Z][a-z]+", whole)) and len(names) >= 40
    held = {word for word in prepare.spelling_words() if prepare.held_out_word(word)}
    spelled = {s.replace("-", "") for s in re.findall(r"\b[a-z](?:-[a-z])+\b", whole.lower())}
    assert not spelled & held and len(held) > 150 and len(spelled) > 700
    calls = [call for _, reply in turns(others) for call, _ in calls_of(reply)]
    pairs = [pair for call in calls for pair in re.findall(r"^(\d+) ?[-+*/] ?(\d+)$", call)]
    spoken = {prepare.number_word(n): n for n in range(145)}  # a pair in words is one, too
    number = rf"(?<![\w.])(\d+(?!\.?\d)|{'|'.join(sorted(spoken, key=len, reverse=True))})"
    told = whole.lower().replace(",", "")
    found = re.findall(rf"{number} (?:\+|-|x|plus|minus|times|divided by) {number}\b", told)
    found += re.findall(rf"{number} (?:boxes|bags|baskets|crates) (?:of|with) {number}\b", told)
    assert sum(not "".join(pair).isdigit() for pair in found) > 100
    pairs += [[spoken.get(n, n) for n in pair] for pair in found]
    assert len(pairs) > 5000 and not [p for p in pairs if prepare.held_out_pair(*map(int, p))]
    known = set(normal(whole).split()) | set(normal(prepare.section("n_unseen_questions")).split())
    asked = [normal(item["messages"][-1]["content"]).split() for item in sets["unknown"]]
    assert sum(not known.issuperset(text) for text in asked) > 350  # of invented names


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
    ends = [m.start() for m in re.finditer(r"[.?!]|\n|$", text)]
    asked = (
        q for i, j in itertools.product(starts, ends) if i < j for q in mended(normal(text[i:j]))
    )
    return next((known[question] for question in asked if question in known), None)


def test_every_reply_about_a_fact_is_true_and_all_askable_facts_are_asked(chats):
    known, asked, unknown = questions_on_facts(unseen=False), collections.Counter(), 0
    for text, reply in turns(chats["mid"], "fact", "mixed", "unknown", "memory", "follow-up"):
        found = asked_in(text, known) if len(text) < 150 else None
        if found is None:
            unknown += "I don't know" in said(reply)
            continue
        fact, forward = found
        if "follow" not in reply:
            answer = fact.answer if forward else fact.subject
            right = {normal(w) for w in (*prepare.spellings(answer), prepare.plural(answer))}
            assert any(f" {w} " in f" {normal(reply)} " for w in right), (text, reply)
            item = {"grade": "text", **prepare.fact_grade(found, text)}
            assert common.grade(item, reply), (text, reply)
        assert fact.askable or fact.relation in prepare.ELSEWHERE, text
        asked[fact] += 1
    askable = [fact for fact in prepare.world_facts() if fact.askable]
    assert sum(asked[fact] > 0 for fact in askable) > 0.9 * len(askable) and unknown > 1000
    assert max(asked.values()) < 12 * sum(asked.values()) / len(askable)


def test_letters_are_balanced_and_right(chats, sets):
    for unseen, asked in ((False, turns(chats["mid"], "letters")), (True, turns(sets["letters"]))):
        known, checked, letters = questions_on_facts(unseen), 0, collections.Counter()
        for text, reply in asked:
            choices = {b: a for a, b in re.findall(r"^- (.*) (\w)$", text, re.MULTILINE)}
            letter = reply[-1]
            letters[letter] += 1
            assert reply.partition("\n- ")[2] == f"{choices[letter]} {letter}"
            assert list(choices) == list("ABCD") and len(set(choices.values())) == 4, text
            if found := asked_in(text.split("\n")[0] + "\n", known):
                fact, forward = found
                brief = prepare.world_relations()[fact.relation].brief["o" if forward else "s"]
                assert choices[letter] == brief.format_map(fact.forms()) and fact.askable, text
                checked += 1
        assert set(letters) == set("ABCD")
        assert max(letters.values()) - min(letters.values()) <= 0.02 * letters.total()
        assert checked > (0.98 if unseen else 0.75) * letters.total()  # others leave words out


def numbers_of(text: str) -> set[Fraction]:
    """Read the numbers of a text, in digits or words."""
    spoken = {prepare.number_word(n): n for n in range(101)} | {"a dozen": 12, "twice": 2}
    words = "|".join(sorted(spoken, key=len, reverse=True))
    found = re.findall(rf"\b({words})\b", text.lower())
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return {Fraction(spoken[word]) for word in found} | {
        Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", plain)}  # fmt: skip


def test_word_problems_are_solved_as_their_words_say(chats, sets):
    """Each call is worked by Python in fractions, of numbers that the text tells or that came out."""
    tested = [item for name, items in sets.items() if "problems" in name for item in items]
    shown = [*turns(chats["mid"], "problem"), *turns(tested)]
    assert len(tested) == 2000 and len(shown) > 5000
    for text, reply in shown:
        known, calls = numbers_of(text) | {7, 10, 12, 25}, calls_of(reply)  # dozens, dimes ...
        for call, output in calls:
            used = re.findall(r"\d+(?:\.\d+)?", call)
            assert {*map(Fraction, used)} <= known, (text, call)
            exact = re.sub(r"(\d+(?:\.\d+)?)", r"Fraction('\1')", call)
            assert eval(exact) == Fraction(output) >= 0, call
            known.add(Fraction(output))
        assert calls[-1][1] == common.last_number(said(reply)), text
        if len(calls) > 1:  # what came out is needed later
            assert all(any(out in re.findall(r"[\d.]+", later) for later, _ in calls[i + 1 :])
                       for i, (_, out) in enumerate(calls[:-1])), text  # fmt: skip
    for item in (*tested, *chats["rl"]):
        assert item["grade"] == "number" and not common.grade(item, "It is 1234567.")
    for name, items in sets.items():
        pairs = [[tuple(map(int, re.findall(r"\d+", call))) for call, _ in calls_of(i["reply"])
                  if "." not in call and call.count("+") < 2]
                 for i in items if name.startswith("problems")]  # fmt: skip
        held = [any(prepare.held_out_pair(*pair) for pair in calls if len(pair) == 2)
                for calls in pairs]  # fmt: skip
        assert name == "problems_numbers" or not any(held)


def test_a_tale_tells_all_numbers_of_its_equation():
    """What a wording says of a number is the same whether it is told, asked for or worked out."""
    rng, seen = random.Random(0), collections.Counter()
    people = [prepare.world_words("girls"), prepare.world_words("boys")]
    while seen.total() < 2000:
        try:
            tale = prepare.Problem(rng, ["shown"], people, tale=True)
        except ValueError:
            continue
        scheme = tale.scheme
        whole, *parts = (Fraction(tale.shown[role]) for role in scheme.roles)
        assert whole == (math.prod(parts) if scheme.times else sum(parts)) and whole > 0
        told = numbers_of(tale.said)
        assert {whole, *parts} <= told, (scheme.name, tale.said, tale.shown)
        assert "{" not in tale.said and "|" not in tale.said and "<" not in tale.said
        seen[scheme.name] += 1
    assert len(seen) > 15


def test_word_problems_are_varied_and_parts_of_the_test_are_new(chats, sets):
    texts = [text for text, _ in (*turns(chats["mid"], "problem"), *turns(chats["rl"]))]
    assert len(set(texts)) > 0.99 * len(texts) > 4000
    shapes = {re.sub(r"\d+|[A-Z]\w+|\w+s\b", "", text) for text in texts}
    assert len(shapes) > len(texts) / 2
    told = " ".join(text for text, _ in turns(chats["mid"], "problem")).lower()
    schemes = prepare.schemes()
    verbs = [v for found in prepare.problem_verbs().values() for v in found]
    nouns = [noun for found in prepare.noun_kinds().values() for noun in found]
    for kind, least in (("test", 20), ("practised", 20)):
        held = [v[0] for v in verbs if prepare.part_set(v[0]) == kind and " " in v[0]]
        held += [noun for noun in nouns if prepare.part_set(noun) == kind and noun[6:]]
        assert len(held) > least
        found = [word for word in held if f" {prepare.plural(word)} " in told]
        assert not found or kind == "practised", found
    for scheme in schemes:
        for role, ways in (*scheme.tells.items(), *scheme.asks.items()):
            assert len(set(ways)) == len(ways), (scheme.name, role)
        assert set(scheme.asks) <= set(scheme.whys) <= set(scheme.roles)
    asked = {
        name: {item["messages"][0]["content"] for item in items} for name, items in sets.items()
    }
    assert not (asked["problems_combinations"] | asked["problems_practised"]) & {*texts}


def test_sums_and_words_are_worked_as_asked(chats, sets):
    checked = 0
    for text, reply in turns(chats["mid"], "sum"):
        [(call, output)] = calls_of(reply)
        assert common.calculate(call) == output and said(reply) == f"The answer is {output}."
        assert numbers_of(call.replace("/100", "")) <= numbers_of(text) | {2, 3, 4, 10}, (
            text,
            call,
        )
        signs = (
            text.replace("\u00d7", "*").replace("\u00f7", "/").replace("x", "*").replace(" ", "")
        )
        if m := re.search(r"[-\d(][-\d.+*/^()]*[\d)]", signs):  # in signs it is the call, as typed
            typed = m[0].replace("^", "**")
            if re.search(r"\d[-+*/]", typed) and "%" not in signs:
                checked += 1
                assert typed == call, (text, call)
        exact = re.sub(r"(\d+(?:\.\d+)?)", r"Fraction('\1')", call)
        assert abs(eval(exact) - Fraction(output)) < Fraction(1, 10**6), call
    assert checked > 100
    for text, reply in (*turns(chats["mid"], "spelling"), *turns(sets["spelling"])):
        word, spelled = re.match(r'"([a-z]+)" is spelled ([a-z-]+)\.', said(reply)).groups()
        assert spelled == "-".join(word) and re.search(rf"\b{word}\b", text.lower())
        rest, low = said(reply).partition(". ")[2], text.lower().replace(word, "", 1)
        if calls := calls_of(reply):
            x = re.search(r'count\("(.)"\)', calls[0][0])
            right = word.count(x[1]) if x else len(word)
            assert eval(calls[0][0]) == right == int(common.last_number(rest)), text
        elif rest:
            back = re.search("backw|rever|around|back to", low)
            first = re.search("first|begin|start", low)
            want = "-".join(word[::-1]) if back else word[0] if first else word[-1]
            assert rest.endswith(f" is {want}."), text


def test_stories_keep_their_state_and_questions_have_its_answers():
    rng, gifts = random.Random(4), 0
    for _ in range(300):
        teller = prepare.Teller(rng, prepare.world_words("girls"), prepare.world_words("boys"))
        story = teller.tell(rng.randint(1, 4))
        assert set(story.place) == {*teller.he, *teller.reason}
        assert all(story.place[thing] == story.place[name] for thing, name in story.holder.items())
        for key, forms, accept in prepare.story_questions(teller, story):
            if key in ("holder", "carried"):
                assert story.holder[forms["t"]] == accept[0]
            if key in ("person", "lying", "carried"):
                place = story.place[forms["n"] if key == "person" else forms["t"]]
                assert place.endswith(f" the {accept[-1]}") and forms["at"] == place
            if key in ("giver", "taker"):
                n, m, t = forms["n"], forms["m"], forms["t"]
                assert accept == [n if key == "giver" else m]
                told = (
                    rf"(?:{n}|[Ss]?[Hh]e) (?:gave the {t} to {m}|(?:gave|handed) {m} the {t}"
                    rf"|let {m} have the {t})|take the {t},\" said {n} to {m}|said {n}, and gave {m} "
                    rf"the {t}|{m} asked for the {t}, and {n} gave it away"
                )
                assert re.search(told, story.text), (n, m, t, story.text)
                gifts += 1
    assert gifts > 30


def test_the_evaluation_sets_are_functions_of_the_tables_and_grade_as_they_should(sets):
    prepare.world_sets.cache_clear()
    assert sets == prepare.world_sets()
    for name, made in sets.items():
        assert len({json.dumps(item["messages"]) for item in made}) == len(made) >= 400, name
        for item in made:
            assert item["messages"][-1]["role"] == "user" and item["kind"]
            assert common.grade(item, said(item["reply"])), item
            if item["grade"] == "text":
                assert item["answer"] in item["accept"] and not common.grade(item, "Perhaps.")
                reject = item.get("reject", [])
                assert not set(item["accept"]) & set(reject)
                assert not reject or not common.grade(item, " and ".join(item["accept"] + reject))
    asked = questions_on_facts(unseen=True)
    for name in ("facts", "never_asked"):
        found = [asked[normal(item["messages"][0]["content"])] for item in sets[name]]
        assert len({fact for fact, _ in found}) == len(found)
        assert {fact.askable for fact, _ in found} == {name == "facts"}
        assert 0.08 < sum(not forward for _, forward in found) / len(found) < 0.5
    assert len(sets["facts"]) == sum(fact.askable for fact in prepare.world_facts()) >= 2000
    for item in (item for item in sets["stories"] if item["kind"] == "memory"):
        before = " ".join(m["content"] for m in item["messages"][:-1] if m["role"] == "user")
        assert re.search(rf"\b{re.escape(item['answer'])}\b", before)
        assert item["answer"] not in item["messages"][-1]["content"]


def test_the_assistant_says_who_it_is():
    rng, fields, name = random.Random(5), prepare.table("identity"), "little bot 3"
    keys = {key: [w.format(name=name) for w in words]
            for key, words in prepare.lists("identity_keys").items()}  # fmt: skip
    question = {q.rstrip("?."): key for key, (asked, _, _) in fields.items() for q in asked}
    seen = collections.Counter()
    for text, reply in turns(prepare.identity_chat(rng, name) for _ in range(800)):
        found = [key for q, key in question.items() if normal(text).endswith(normal(q))]
        if len(found) == 1 and found[0] in keys:
            assert any(w in reply for w in keys[found[0]]), (text, reply)
            seen[found[0]] += 1
    assert set(seen) == set(keys) and min(seen.values()) > 40
    items = prepare.identity_set(rng, name)
    assert len(items) >= 400 and all(common.grade(item, item["reply"]) for item in items)
    assert not any(common.grade(item, "I am a person, and my name is Bob.") for item in items)


def test_slips_and_hurry_change_a_wording_but_nothing_that_fills_it():
    rng, small = random.Random(0), set(prepare.world_words("small_words"))
    for wording in sorted({w for r in prepare.world_relations().values() for w in r.questions}):
        for change in (prepare.hurried, prepare.mistyped) * 10:
            typed = change(rng, wording)
            assert re.findall(r"{.*?}", typed) == re.findall(r"{.*?}", wording)
            old, new = (re.findall(r"{.*?}|[^\s?.,:]+", text) for text in (wording, typed))
            gone = collections.Counter(old) - collections.Counter(new)
            assert gone.total() <= 1 if change is prepare.mistyped else set(gone) <= small
    assert prepare.slips("moon") == ["mon", "mono", "mooon"]


BAD_ENGLISH = (r"\.\.", r" [,.?!]", r"  ", r"\ba [aeio][a-z]", r"\ban [bcdfgjklmnpqrstvwxyz][a-z]", r"[{}|]",
         r"\bis are\b", r"\ba a\b", r"\b[Tt]he [Tt]he\b", r"\?\.", r",[?!.]", r"\ba the\b",
         r"[a-z]\.[A-Z]", r"\b(does|did) \w+ ha[sd]\b")  # fmt: skip
GOOD_ENGLISH = r"\ba (one|eu|ewe|in|is|of|ou|as)|letter|[Tt]he word|a, |with a and|The (Hag|The)"


def test_text_and_conversations_read_well(docs, chats):
    plain = [
        one for one in (*chats["sft"], *chats["val"]) if one["kind"] not in ("spelling", "sum")
    ]
    text = "\n".join([*docs, *(t for ask, reply in turns(plain) for t in (ask, said(reply)))])
    lines = [line for line in text.split("\n") if line and " - " not in line]
    for wrong in BAD_ENGLISH:
        found = [line for line in lines if re.search(wrong, line)]
        assert not [line for line in found if not re.search(GOOD_ENGLISH, line)], wrong
    for line in "\n".join(docs).split("\n"):
        good = not line or line[0] in '"-' or line[0].isupper() or line[0].isdigit()
        assert good or line == line.lower(), line  # as people type
    forms = {prepare.with_article: "owl an owl, unicorn a unicorn, hour an hour, dog a dog",
             prepare.plural: "fox foxes, wolf wolves, city cities, mouse mice, sheep sheep"}  # fmt: skip
    for make, pairs in forms.items():
        for word, form in (pair.split(" ", 1) for pair in pairs.split(", ")):
            assert make(word) == form
    assert prepare.number_word(342) == "three hundred and forty-two"


def test_a_folder_that_moved_with_its_base_has_nothing_to_do(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "over there"
    (here / "mine").mkdir(parents=True)
    write_lines(
        here / "mine/a.jsonl", [talk(f"{i}?", f"{i}!", text=words(i, 9)) for i in range(20)]
    )
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(here / "base"))
    made = prepared(**own(here / "mine")), prepared(here / "mine", source="text")
    shutil.copytree(here, there)  # with other times
    shutil.rmtree(here)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(there / "base"))
    assert (prepared(**own(there / "mine")), prepared(there / "mine", source="text")) == made
    write_lines(there / "mine/a.jsonl", [talk("Other?", "Yes."), talk("And?", "No.")])
    with pytest.raises(
        common.Stop, match="holds what was made of"
    ):  # another path's, other content
        prepared(**own(there / "mine"))


# train_tokenizer.py --------------------------------------------------------------------------


def sign_text(source, key):
    """Write the manifest of a source whose text has a hash."""
    files = {"train-00000.parquet": {"sha256": key}}
    common.write_json(common.data_dir(source) / "manifest.json", {"files": files})


def test_the_tokenizer_stage_trains_saves_measures_skips_and_says_what_changed(text_source, capsys):
    sign_text(text_source, "a")
    chosen = train_tokenizer.Settings(tag="a", vocab_size=300)
    measures = train_tokenizer.main(chosen)
    assert measures["vocab_size"] == 300 and measures["bytes_per_token"] > 1
    assert "bytes per token" in capsys.readouterr().out
    before = common.Tokenizer.load(common.run_dir("a") / "tokenizer").fingerprint
    assert train_tokenizer.main(chosen) == measures
    said = capsys.readouterr().out
    assert "is there" in said and "changed" not in said
    with pytest.raises(common.MissingInput, match="--restart"):
        train_tokenizer.main(dataclasses.replace(chosen, vocab_size=320))
    write_texts(text_source, ["Entirely other text. " * 50] * 3)
    sign_text(text_source, "b")
    assert train_tokenizer.main(chosen) == measures
    assert re.search("the text has changed .*it stays; --restart", capsys.readouterr().out)
    assert common.Tokenizer.load(common.run_dir("a") / "tokenizer").fingerprint == before
    other = dataclasses.replace(chosen, vocab_size=270)
    assert train_tokenizer.main(dataclasses.replace(other, restart=True))["vocab_size"] == 270
    train_tokenizer.main(other)
    assert "changed" not in capsys.readouterr().out


def test_limits_of_text_and_vocabulary(text_source):
    texts = list(train_tokenizer.texts_up_to(text_source, 1000, 30))
    assert sum(map(len, texts)) == 1000 and max(map(len, texts)) == 30
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


def stage_losses(tag, stage):
    lines = [x for x in common.read_log(tag) if x["stage"] == stage and "loss" in x]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1)), "no step stands twice"
    return {x["step"]: x["loss"] for x in lines}


def base_losses(tag="t"):
    return stage_losses(tag, "base")


def final_weights(tag, step, stage="base"):
    folder = common.find_checkpoint(tag, stage, step)
    return common.load_file(folder, "model.pt", CPU)


def same_losses(stage="base", within=0.0):
    """Assert that runs "t" and "u" had the same losses, step by step."""
    a, b = stage_losses("u", stage), stage_losses("t", stage)
    assert a and a == pytest.approx(b, abs=within, rel=0)


def same_weights(step=6, stage="base"):
    a, b = final_weights("u", step, stage), final_weights("t", step, stage)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def drop_steps(*steps, tag="t", stage="base"):
    """Delete checkpoints, as if the run had been killed before they were written."""
    for step in steps:
        shutil.rmtree(common.find_checkpoint(tag, stage, step))


def prepare_tiny_run(source, tokenizer):
    for tag in ("t", "u"):
        tokenizer.info = {"source": source, "settings": {}, "measures": {}}
        tokenizer.save(common.run_dir(tag) / "tokenizer")
    return source


@pytest.fixture
def tiny_run(text_source, tokenizer):
    """A data source, and runs "t" and "u" with a tokenizer."""
    return prepare_tiny_run(text_source, tokenizer)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train a stage of run "t" once for all tests: stage -> base directory that holds it."""

    @functools.cache
    def base_directory(stage):
        folder = tmp_path_factory.mktemp(stage) / "base"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", str(folder))
            if stage == "base":
                write_tiny_source()
                write_conversations("tiny")
                prepare_tiny_run("tiny", TOKENIZER())
                pretrain.main(chat_pretrain())
            else:
                shutil.copytree(base_directory("base"), folder)
                run_stage(stage, "t")
        return folder

    return base_directory


@pytest.fixture
def unbroken(trained, base_dir):
    """Make run "u" the one that trained a stage without a break, "t" one that has its parent."""

    def make(stage):
        shutil.rmtree(base_dir)
        shutil.copytree(trained(stage), base_dir)
        shutil.copytree(common.run_dir("t"), common.run_dir("u"), dirs_exist_ok=True)
        shutil.rmtree(common.run_dir("t") / stage)
        path = common.run_dir("t") / "metrics.jsonl"
        kept = [x for x in common.read_log("t") if x["stage"] != stage]
        path.write_text("".join(json.dumps(x) + "\n" for x in kept))

    return make


def test_pretraining_learns_saves_and_says_when_it_is_finished(tiny_run, capsys):
    settings = tiny_pretrain(num_iterations=40, eval_every=20, matrix_lr=0.05)
    metrics = pretrain.main(settings)
    assert metrics["step"] == 40 and base_losses()[40] < base_losses()[1] - 0.5
    rates = [line["lr"] for line in common.read_log("t") if "lr" in line]
    assert rates == [common.trapezoid(i, 40, 10, 0.6, 0.05) for i in range(40)]
    out = capsys.readouterr().out
    assert "mfu" in out and "compile: off" in out and "left" in out
    assert pretrain.main(settings) == metrics and "finished" in capsys.readouterr().out
    with pytest.raises(common.MissingInput, match="--depth=1, not 2"):
        pretrain.main(dataclasses.replace(settings, depth=2))
    meta = common.find_checkpoint("t", "base") / "meta.json"
    saved = json.loads(meta.read_text())
    meta.write_text(json.dumps({k: v for k, v in saved.items() if k != "version"}))
    with pytest.raises(common.MissingInput, match="of version 1, .*--restart"):
        pretrain.main(settings)
    common.load_for_answers(common.ModelSettings(tag="t", device="cpu"))


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
    assert "the text has changed since" in capsys.readouterr().out
    folder, have = common.run_dir("t") / "tokenizer", common.Tokenizer
    whole = have.load(folder)
    have(whole.pattern, whole.merges[:-1], whole.info).save(folder)
    with pytest.raises(common.MissingInput, match="another tokenizer"):
        pretrain.main(tiny_pretrain())
    whole.save(folder)
    drop_steps(6, 4)
    for changes in ({}, {"source": "other"}):
        with pytest.raises(common.MissingInput, match="other data.*--restart"):
            pretrain.main(tiny_pretrain(**changes))
    assert not list(common.data_dir("other").glob("tokens/*")), "it is seen before hours of work"
    write_texts(tiny_run, texts)
    pretrain.main(tiny_pretrain())
    assert len(base_losses()) == 6


@pytest.mark.parametrize(
    ("changes", "within"),
    [({"device_batch_size": 1}, 2e-4), ({"device_batch_size": 3, "plain": True}, 2e-4),
     ({"compile": "yes"}, 1e-3),
     pytest.param({"compile": "yes", "recompute": True}, 1e-3, marks=pytest.mark.slow),
     pytest.param({"compile": "yes", "fp8": True}, 0.02, marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_what_changes_rounding_alone_changes_no_loss_by_more(unbroken, changes, within):
    if "compile" in changes and not common.can_compile(CPU):
        pytest.skip("no C++ compiler")
    unbroken("base")
    try:
        pretrain.main(chat_pretrain(**changes))
    finally:
        common.use_plain(False)
    same_losses(within=within)
    meta = common.read_meta(common.find_checkpoint("t", "base"))
    assert meta["compiled"] == ("compile" in changes)


def test_a_run_whose_memory_runs_out_goes_on_with_the_same_losses(tiny_run, monkeypatch, capsys):
    settings = tiny_pretrain(total_batch_size=8 * 32, device_batch_size=4)
    pretrain.main(dataclasses.replace(settings, tag="u"))
    scarce_there = "common.GPT.forward = test_all.scarce(common.GPT.forward, 2, first=3)"
    train_ranks(2, settings, f"if rank == 1: {scarce_there}")  # and both take fewer rows
    same_losses(within=1e-3)
    metas = [common.read_meta(path) for path in common.list_checkpoints("t", "base")]
    assert [meta["micro_batch"] for meta in metas] == [4, 2, 2]
    # in the second pass of the second step, when the gradients of the first are there
    monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, 2, first=3))
    pretrain.main(dataclasses.replace(settings, restart=True))
    assert capsys.readouterr().out.count("memory ran out in step 2: on in passes of 2 rows") == 1
    same_losses(within=2e-4)
    assert base_losses()[1] == base_losses("u")[1]
    shutil.rmtree(common.run_dir("u"))
    shutil.copytree(common.run_dir("t"), common.run_dir("u"))
    drop_steps(4, 6)  # what goes on with memory enough is the same run bit for bit
    monkeypatch.setattr(common.GPT, "forward", FORWARD)
    pretrain.main(settings)
    same_weights()
    same_losses()
    monkeypatch.setattr(common.GPT, "forward", scarce(FORWARD, 0))
    with pytest.raises(common.Stop, match="not even one row fits"):
        pretrain.main(dataclasses.replace(settings, restart=True))


def test_an_fp16_run_resumes_bit_for_bit_and_recomputing_changes_nothing(tiny_run):
    pretrain.main(tiny_pretrain(dtype="float16"))
    shutil.copytree(common.run_dir("t"), common.run_dir("u"), dirs_exist_ok=True)
    drop_steps(4, 6)
    pretrain.main(tiny_pretrain(dtype="float16", recompute=True))
    same_weights()
    same_losses()
    shard = common.load_file(common.find_checkpoint("t", "base"), "optimizer-000.pt", CPU)
    assert shard["optimizer"]["scaler"] == {"scale": 2.0**16, "steps": 6}


def test_ranks_differ_by_rounding_alone(tiny_run, tmp_path):
    """The same code with fp64 for fp32 and bf16: what is left of a difference is a fault."""
    for path in HERE.glob("*.py"):
        text = re.sub(r"torch\.(float32|bfloat16)\b", "torch.float64", path.read_text("utf-8"))
        text = text.replace(".float()", ".double()")
        text = re.sub(
            r"""("|ops\.)nanochat(?=[":.])""", r"\1doubles", text
        )  # operators, a set more
        (tmp_path / path.name).write_text(text, "utf-8")
    for tag, world_size in (("u", 1), ("t", 3)):
        code = f"""
        torch.set_default_dtype(torch.float64)
        sys.path.insert(0, {str(tmp_path)!r})
        for name in ("common", "pretrain"):
            del sys.modules[name]
        import pretrain
        """
        train_ranks(world_size, tiny_pretrain(tag=tag, dtype="float64"), code)
    assert len(base_losses()) == 6 and final_weights("t", 6)["embed.weight"].dtype == torch.float64
    same_losses(within=1e-9)


def test_a_run_goes_on_with_1_2_3_and_1_ranks_as_if_unbroken(tiny_run):
    pretrain.main(tiny_pretrain(num_iterations=8))
    shutil.copytree(common.run_dir("t"), common.run_dir("u"), dirs_exist_ok=True)
    for step, world_size in ((2, 2), (4, 3), (6, 1)):
        drop_steps(*range(step + 2, 10, 2))
        train_ranks(world_size, tiny_pretrain(num_iterations=8))
        shards = len([*common.find_checkpoint("t", "base", 8).glob("optimizer-*.pt")])
        assert shards == world_size
    assert len(base_losses()) == 8
    same_losses(within=1e-3)


def test_ranks_go_on_from_one_checkpoint_where_a_folder_is_listed_late(tiny_run):
    pretrain.main(tiny_pretrain())
    shutil.copytree(common.run_dir("t"), common.run_dir("u"), dirs_exist_ok=True)
    drop_steps(6)
    late = """
    real = common.list_checkpoints
    common.list_checkpoints = lambda *which: real(*which)[: -1 if rank else None]
    """
    train_ranks(2, tiny_pretrain(), late)
    assert len(base_losses()) == 6
    same_losses(within=1e-3)


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(2000)]
    for i, path in enumerate(paths):
        np.save(path, np.full((2, 5), i, np.uint16))
    code = f"""if True:
        import resource, random, pathlib, common
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        rows = common.Rows([pathlib.Path({str(tmp_path)!r}, f"{{i}}.npy") for i in range(2000)], 1)
        for _ in range(40):
            indices = random.choices(range(len(rows)), k=50)
            ids, _ = rows.joined(rows, 100).gather([*indices, len(rows) + 99])
            assert ids[:, 0].tolist() == [*(i // 2 for i in indices), 1980], ids[:, 0]
        """
    done = call(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def torchrun(flags, settings, **environment):
    """Start pretrain.py by torchrun with settings that differ from their defaults as flags."""
    plain = dataclasses.asdict(pretrain.Settings())
    words = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(settings).items()
             if v != plain[k] and not isinstance(v, bool)]  # fmt: skip
    words += ["--restart"] * settings.restart
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
    with concurrent.futures.ThreadPoolExecutor() as pool:
        agreed = []
        for rank in (2, 1, 0):  # rank 0 comes last: the others read the count of the start before
            agreed.append(pool.submit(common.agree_on_attempt, store, rank, 3))
            time.sleep(0.3)
        assert [one.result(20) for one in agreed] == [3, 3, 3]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc has the ranks' ids")
def test_torchrun_goes_on_by_itself_after_a_rank_is_killed(tiny_run):
    settings = tiny_pretrain(num_iterations=60, save_every=10, eval_every=0, keep=2, restart=True)
    train_ranks(2, dataclasses.replace(settings, tag="u"))
    flags = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", "--max-restarts=1"]
    command, env = torchrun(flags, settings)
    killed, resumed = False, False
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as agent:
        for line in agent.stdout:
            if "base 00020/" in line and not killed:
                killed = True
                os.kill(ranks_of(agent)[0], signal.SIGKILL)
            resumed |= "going on from" in line
    assert agent.returncode == 0 and killed and resumed and len(base_losses()) == 60
    same_losses(within=1e-4)
    a, b = final_weights("u", 60), final_weights("t", 60)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_a_disk_that_fills_up_under_one_rank_stops_all_with_its_sentence(tiny_run, capfd):
    settings = tiny_pretrain(num_iterations=100_000, eval_every=0, compile="no")
    code = f"""
    def full(path, *args, **options):
        shard = "step-000004.partial" in str(path) and str(path).endswith("001.pt")
        return open("/dev/full" if shard else path, *args, **options)
    common.open = full
    try:
        pretrain.main(pretrain.{settings!r})
    except common.Stop as stop:
        print(f"rank {{rank}} said: {{stop}}\\n", end="", flush=True)  # in one piece
    """
    run_ranks(2, code)
    out = capfd.readouterr().out
    assert all(f"rank {rank} said: the disk is full" in out for rank in (0, 1)), out
    assert [p.name for p in common.list_checkpoints("t", "base")] == ["step-000002"]
    common.load_file(common.find_checkpoint("t", "base"), "optimizer-001.pt", CPU)


def test_no_compiler_no_fork_and_no_locks_are_needed(unbroken, monkeypatch, capfd):
    unbroken("base")
    for name in ("PATH", "CC", "CXX"):
        monkeypatch.setenv(name, "/nonexistent")
    for module, name in ((os, "fork"), (signal, "SIGALRM")):
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    pretrain.main(chat_pretrain(compile="yes"))
    assert "compile: off: it needs a C++ compiler" in capfd.readouterr().out
    same_losses()


def test_ranks_need_no_shared_memory(unbroken):
    hide = "mount --make-rprivate / && mount -t tmpfs -o ro none /dev/shm"
    if call("unshare", "--mount", "sh", "-c", hide).returncode:
        pytest.skip("mount namespaces are not allowed here")
    unbroken("base")
    code = f"""
    import ctypes
    assert not ctypes.CDLL(None).unshare(0x20000) and not os.system({hide!r})  # CLONE_NEWNS
    assert not os.access("/dev/shm", os.W_OK)
    """
    train_ranks(2, chat_pretrain(), code)
    same_losses(within=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_share_the_runs_and_may_have_the_text_each_on_a_disk_of_its_own(
    tiny_run, base_dir, shared, tmp_path, capfd
):
    """Two ranks, each of which is told that it is alone on its node."""
    other = tmp_path / "other"  # the second node's disk, without a token cache
    shutil.copytree(base_dir / "data", other / "data")
    if shared:
        (other / "runs").symlink_to(base_dir / "runs")
    else:
        shutil.copytree(base_dir / "runs", other / "runs")
        (other / "runs/t/.base.lock").write_text("of a run before")
    code = f"""
    import time
    clock, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = time.monotonic, "0", "1"
    if not {shared}:
        time.monotonic = lambda: 30 * clock()  # it waits 60 seconds for what may come late
    if rank == 1:
        os.environ["NANOCHAT_BASE_DIR"] = {str(other)!r}
    """
    train_ranks(2, tiny_pretrain(), code, end=0 if shared else 1)
    assert shared == ("must be a folder that all nodes share" not in capfd.readouterr().out)
    if shared:
        pretrain.main(tiny_pretrain(tag="u"))
        same_losses(within=1e-3)
        rows = [[*(base / "data").glob("*/tokens/*/*.npy")] for base in (base_dir, other)]
        one, two = ([path.read_bytes() for path in paths] for paths in rows)
        assert one == two != []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_0_and_the_run_goes_on(tiny_run, capfd, number):
    settings = tiny_pretrain(num_iterations=100_000, eval_every=0, save_every=0, compile="no")
    code = f"""
    log = common.Run.log

    def log_and_signal(run, step, **values):
        log(run, step, **values)
        if step == 3:
            os.kill(os.getpid(), {number:d})

    common.Run.log = log_and_signal
    """
    train_ranks(1, settings, code)
    assert "run the same command again" in capfd.readouterr().out
    assert 3 <= int(common.find_checkpoint("t", "base").name[-6:]) < 100_000


def test_width_and_horizon_follow_from_depth_and_steps_flops_or_ratio():
    for depth, heads in ((1, 1), (4, 4), (7, 7), (8, 4), (10, 5), (20, 10)):
        config = pretrain.model_config(pretrain.Settings(depth=depth), 512)
        assert (config.n_head, config.n_embd) == (heads, 64 * depth)
    config = pretrain.model_config(pretrain.Settings(depth=4, head_dim=128), 512)
    assert (config.n_head, config.n_embd, config.window_pattern) == (2, 256, "L")

    def horizon(**changes):
        chosen = pretrain.Settings(depth=20, **changes)
        return pretrain.derive_horizon(chosen, pretrain.model_config(chosen, 65536))

    d20 = horizon()
    assert d20.batch_rows * 2048 == 2**19 and 20_000 < d20.num_steps < 22_000
    assert horizon(num_iterations=300).num_steps == 300
    assert horizon(num_iterations=21_362).batch_rows == d20.batch_rows
    config = pretrain.model_config(pretrain.Settings(depth=20), 65536)
    flops = horizon(target_flops=1e19).num_rows * 2048 * config.flops_per_token()
    assert flops == pytest.approx(1e19, rel=0.01)
    half = horizon(target_param_data_ratio=10.0)
    assert half.num_rows == pytest.approx(d20.num_rows / 2, rel=0.01)


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
    steps = [pretrain.bigram_steps(settings, config, n) for n in (10**5, 10**6, 10**8, 2 * 10**9)]
    assert steps == [0, 60, 60, 0]
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
    d20 = pretrain.Settings(depth=20, plan=True, plan_device="H100", plan_count=8)
    numbers = pretrain.main(d20)
    blocks = 20 * 12 * 1280**2 + 10 * 10 * 32 + 20 * 2  # with the values' gates and the skip
    assert numbers["parameters"] == (2 + 10) * 65536 * 1280 + blocks + 1280**2
    assert 11e9 < numbers["tokens"] < 11.5e9 and 2 * 3600 < numbers["seconds"] < 6 * 3600
    assert 50 < numbers["cost_usd"] < 150
    # 7/8 of 2 x 4 bytes; by eights go 20 matrices of a shape in 24 slots, 81 in 88, 10 in 16
    slots = (2 * 24 * 4 + 88) * 1280**2 + 16 * 10 * 32 + 12 * 65536 * 1280 + 2 * 20
    assert numbers["exchanged_bytes"] == 7 * slots
    # text 0.1 GB a shard, ids of 2 bytes, 8 checkpoints of weights and moments
    floats = 2 * numbers["parameters"]  # the moments are one or two a weight
    disk = 0.1 * numbers["shards"] + 2 * numbers["tokens"] / 1e9
    assert disk + 8 * 4 * floats / 1e9 < numbers["disk_gb"] < disk + 8 * 4 * 1.5 * floats / 1e9
    for name in common.PEAK_FLOPS:
        capsys.readouterr()
        pretrain.main(dataclasses.replace(d20, depth=34, plan_device=name))
        said = capsys.readouterr().out
        total, rows = re.search(r"memory +([\d.]+) GB .* (\d+) rows:", said).groups()
        assert float(total) < 0.9 * pretrain.MEMORY_GB[name] or rows == "1", name
    assert not list(base_dir.iterdir())


def test_the_documents_cards_and_steps_are_those_of_the_plan(base_dir):
    text = (HERE / "docs" / "results.md").read_text("utf-8")

    def table(head):
        """The rows of numbers below a head, without their units."""
        rows = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
        return [[float(x) for x in re.findall(r"[0-9.]+", row.replace(",", ""))] for row in rows]

    def deepest(gb, recompute):
        """The largest even depth of which 8 rows of 2,048 tokens fit in bf16."""
        device, fitting = torch.device("cuda"), 0
        for depth in range(2, 60, 2):
            config = pretrain.model_config(pretrain.Settings(depth=depth), 65536)
            parts = common.memory_bytes(config, 8, 2, device, recompute=recompute)
            fitting = depth if sum(parts.values()) < 0.9 * gb * 1e9 else fitting
        return fitting

    for gb, *depths in table("card | depth | depth with `--recompute`"):
        assert depths == [deepest(gb, recompute) for recompute in (False, True)]
    for count, *cells in table("GPUs"):
        for depth, expected in ((20, cells[:3]), (32, cells[3:])):
            options = {"plan": True, "plan_device": "H100", "plan_count": int(count)}
            plan = pretrain.main(pretrain.Settings(depth=depth, **options))
            step, takes = (round(1e3 * plan[f"{x}_seconds"]) for x in ("step", "exchange"))
            assert expected == [step, round(plan["exchanged_bytes"] / 1e9, 1), takes]


def test_samples_that_memory_has_no_room_for_end_no_run(tokenizer, monkeypatch, capsys):
    model = random_model(vocab_size=300)
    failing = unittest.mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(pretrain.GPT, "create", failing)
    pretrain.print_samples(ALONE, model, tokenizer, ["So"])
    assert "sample: none, as memory is full" in capsys.readouterr().out
    failing.side_effect = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        pretrain.print_samples(ALONE, model, tokenizer, ["So"])


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


COLOURS = ("red", "blue", "green", "tan")


def write_conversations(source):
    """Write conversations of two kinds, and problems, for all stages."""
    folder = common.data_dir(source)
    talk = [one_turn(f"Say {w}.", f"{w.capitalize()} it is, {w}!") for w in COLOURS]
    tools = [tool_chat(a, b) for a in range(1, 6) for b in range(1, 4)]
    write_lines(folder / "mid.jsonl", talk * 3 + tools)
    write_lines(folder / "sft.jsonl", talk + tools)
    write_lines(folder / "val.jsonl", talk[:2])
    problem = {"grade": "text", "answer": "red", "accept": COLOURS, "reject": [], "kind": "problem"}
    problems = [{**problem, "messages": one["messages"][:1]} for one in talk] * 8
    write_lines(folder / "rl.jsonl", problems[:30])


def chat_pretrain(**changes):
    return tiny_pretrain(**{"max_seq_len": 64, "total_batch_size": 192, **changes})


@pytest.fixture
def chat_run(trained, base_dir):
    """Runs "t" and "u" with equal base models, conversations of two kinds, and problems."""
    shutil.rmtree(base_dir)
    shutil.copytree(trained("base"), base_dir)
    shutil.copytree(common.run_dir("t"), common.run_dir("u"), dirs_exist_ok=True)
    return "tiny"


OFTEN = {"device": "cpu", "dtype": "float32", "save_every": 2, "log_every": 1, "keep": 0}
MODULES = {"base": pretrain, "mid": midtrain, "sft": sft, "rl": rl}
CHAT_STAGES = {
    "mid": {"eval_every": 2},
    "sft": {"eval_every": 2, "start_from": "base"},
    "rl": {"eval_every": 2, "start_from": "mid", "num_iterations": 4, "max_tokens": 24,
                "problems_per_step": 3, "num_samples": 4, "device_batch_size": 5, "slots": 7},
}  # fmt: skip


def stage_settings(name, tag="t", **changes):
    if name == "base":
        return chat_pretrain(tag=tag, **changes)
    return MODULES[name].Settings(**{"tag": tag, **OFTEN, **CHAT_STAGES[name], **changes})


def run_stage(name, tag, **changes):
    if name == "rl" and not common.list_checkpoints(tag, "mid"):
        midtrain.main(midtrain.Settings(tag=tag, **OFTEN, num_iterations=40))  # some are right
    return MODULES[name].main(stage_settings(name, tag, **changes))


@pytest.mark.parametrize("warm_start", [False, True])
def test_chat_stages_take_the_base_runs_rates_and_if_asked_its_moments(chat_run, warm_start):
    base = {"matrix_lr": 0.03, "head_lr": 0.005, "lr_scale": 0.7, "weight_decay": 0.1}
    pretrain.main(chat_pretrain(restart=True, recompute=warm_start, **base))
    parent = common.find_checkpoint("t", "base")
    own = {"matrix_lr": 0.01, "weight_decay": 0.0} if warm_start else {}  # come before the base's
    settings = stage_settings("sft", lr_scale=0.5, warm_start=warm_start, **own)
    model, optimizer, start, meta = common.begin_or_resume(
        common.Run("sft", "t", settings, CPU), parent, common.Horizon(9, 3, ""), {}
    )
    assert start == 0 and meta["parent"] == common.parent_key(parent)
    assert model.recompute == warm_start
    rate, decay = (own or base)["matrix_lr"], (own or base)["weight_decay"]
    groups = common.optimizer_groups(model, rate, pretrain.Settings().embed_lr, 0.005, decay)
    expected = [0.7 * 0.5 * group["lr"] for group in groups]
    assert [group["lr"] for group in optimizer.groups] == pytest.approx(expected)
    assert optimizer.groups[0]["weight_decay"] == decay
    saved = common.load_file(parent, "optimizer-000.pt", CPU)["optimizer"]
    assert (optimizer.steps, saved["steps"]) == (6 * warm_start, 6)
    for unit, other in zip(optimizer.units, saved["units"], strict=True):
        for name in unit.state:
            assert torch.equal(unit.state[name], other[name] * warm_start) and other[name].any()


@pytest.mark.parametrize("name", MODULES)
def test_a_killed_stage_resumes_bit_for_bit(unbroken, name):
    unbroken(name)
    module, settings = MODULES[name], stage_settings(name)
    code = f"""
    import time
    save, steps = common.save_checkpoint, []

    def save_and_die(run, *rest):
        common.finish_save(run)
        steps.append(1)
        if len(steps) == 2:  # its files never become whole
            torch.save = lambda *_: time.sleep(60)
        save(run, *rest)
        if len(steps) == 2:
            time.sleep(0.2)
            os.kill(os.getpid(), {signal.SIGKILL:d})

    {module.__name__}.save_checkpoint = save_and_die
    """
    train_ranks(1, settings, code, end=-signal.SIGKILL)
    whole = common.list_checkpoints("u", name)
    assert 1 <= len(common.list_checkpoints("t", name)) < len(whole)
    module.main(settings)
    last = int(whole[-1].name[5:])
    same_weights(last, name)
    same_losses(name)
    assert not list((common.run_dir("t") / name).glob(".*")), "what was half written goes"
    if name != "base":
        parent = CHAT_STAGES[name].get("start_from", "base")
        a, b = final_weights("t", last, name), final_weights("t", 0, parent)
        assert any(not torch.equal(a[key], b[key]) for key in a), "it learned something"
    rates = [x["lr"] for x in common.read_log("u") if x["stage"] == name and "lr" in x]
    shape = settings.warmup, settings.warmdown, settings.final_lr
    assert rates == [common.trapezoid(i, last, *shape) for i in range(last)]


def test_pretraining_validates_on_text_that_it_does_not_train_on(text_source):
    val = list(common.read_texts(common.data_dir(text_source) / "val.parquet"))
    assert pretrain.validation_texts(text_source, 10**6) == val
    assert pretrain.validation_texts(text_source, 1) == val[:1]


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
    run = common.Run("sft", "t", None, CPU)
    for step, loss, best in ((0, 3.0, 3.0), (2, 1.0, 1.0), (4, 2.0, 1.0), (6, 0.5, 0.5)):
        run.log(step, val_loss=loss)
        assert run.metrics["best_val_loss"] == best
    again = common.Run("sft", "t", None, CPU)
    assert common.take_up_log(again, {"step": 4, "metrics": {"best_val_loss": 1.0}}) == {0, 2, 4}
    assert (again.metrics["best_val_loss"], again.metrics["val_loss"]) == (1.0, 2.0)


@pytest.mark.parametrize("name", MODULES)
def test_a_validation_that_broke_off_is_made_up_for_and_the_best_is_kept(
    unbroken, name, monkeypatch
):
    unbroken(name)
    module = MODULES[name]
    part = {"base": "evaluate_bpb", "rl": "validate"}.get(name, "evaluate_loss")

    def validations(tag):
        lines = [x for x in common.read_log(tag) if x["stage"] == name]
        lines = [{key: x[key] for key in x if "val" in key or key == "step"} for x in lines]
        return [x for x in lines if len(x) > 1]

    evaluate_, calls, saved, whole = getattr(module, part), [], [], validations("u")

    def break_off(*args):
        calls.append(args)
        if len(calls) in (2, len(whole) + 1, len(whole) + 2):  # in mid-run, and twice at the end
            raise RuntimeError("it broke off")
        return evaluate_(*args)

    monkeypatch.setattr(module, part, break_off)
    settings, metrics = stage_settings(name), {}
    while not metrics:
        try:
            metrics = module.main(settings)
        except RuntimeError:
            saved.append(len(common.list_checkpoints("t", name)))
    assert len(calls) == len(whole) + 3 and validations("t") == whole
    assert saved[1:] == [len(common.list_checkpoints("u", name))] * 2, "saved before evaluated"
    assert whole[-1].items() <= metrics.items()
    if name != "rl":
        key = "val_bpb" if name == "base" else "val_loss"
        assert metrics[f"best_{key}"] == min(x[key] for x in whole)
    assert module.main(settings) == metrics, "it is finished, and says how it ended"
    assert len(calls) == len(whole) + 3


def test_muons_products_are_the_base_runs_unless_the_machine_computes_in_another(chat_run):
    def muon(step, **changes):
        run_stage("sft", "t", num_iterations=step, save_every=1, **changes)
        return common.read_meta(common.find_checkpoint("t", "sft"))["muon_dtype"]

    base = common.find_checkpoint("t", "base") / "meta.json"
    fast = str(common.pick_dtype(CPU, ""))[6:]  # as the stages ask, which are answered alike
    other = {"float32": "bfloat16", "bfloat16": "float32"}[fast]
    base.write_text(json.dumps({**json.loads(base.read_text()), "muon_dtype": other}))
    assert muon(1, dtype="float32") == other
    assert muon(1, dtype="bfloat16", restart=True) == fast
    meta = common.find_checkpoint("t", "sft") / "meta.json"
    saved = {**json.loads(meta.read_text()), "muon_dtype": other}
    saved["settings"]["num_iterations"] = 2
    meta.write_text(json.dumps(saved))
    assert muon(2, dtype="bfloat16") == other, "when it goes on it is what it was"


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_two_ranks_follow_one_in_the_chat_stages(unbroken, name):
    unbroken(name)
    module, settings = MODULES[name], stage_settings(name)
    for tag in "tu":  # what bf16 makes of another order of sums would move a draw
        path = common.find_checkpoint(tag, "base") / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "muon_dtype": "float32"}))
    module.main(dataclasses.replace(settings, tag="u", restart=True))
    train_ranks(2, settings)
    assert len(stage_losses("t", name)) >= 3
    same_losses(name, within=1e-3)
    if name != "rl":
        a, b = ([x["val_loss"] for x in common.read_log(tag) if "val_loss" in x] for tag in "ut")
        assert len(a) >= 2 and a == pytest.approx(b, abs=1e-3) and all(a)


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


def test_the_rl_step_is_the_same_where_memory_runs_out(tokenizer, monkeypatch):
    weights = []
    for forward in (FORWARD, scarce(FORWARD, 1, first=1)):
        monkeypatch.setattr(common.GPT, "forward", forward)
        model = random_model(vocab_size=tokenizer.vocab_size)
        groups = common.optimizer_groups(model, 0.02, 0.01, 0.01, 0)
        batches = rl.group_batches(rl_groups(tokenizer), 3, 4, tokenizer.bos, CPU)
        steps = common.training_steps(
            iter(batches), lambda b: model(b.ids, b.targets, b.weights),  # noqa: B023
            common.Optimizer(groups, torch.float32), lambda _: 1.0, 1, accum=4,
        )  # fmt: skip
        list(steps)
        weights.append(model.state_dict())
    for a, b in zip(*(one.values() for one in weights), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


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
    for micro_batch in (1, 3, 5, 12):  # all samples are used whatever the micro-batch
        accum = -(-12 // micro_batch)
        batches = rl.group_batches(groups, micro_batch, accum, tokenizer.bos, CPU)
        assert len(batches) == accum
        rows = [row for b in batches for row in b.weights[:, 0].tolist() if row]
        assert sorted(rows) == sorted([0.5, -0.5, -0.5, 0.5, -0.25, -0.25, 0.75, -0.25])


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
    replies = [common.Reply([5], [1], reason) for reason in ("stop", "length", "stop", "length")]
    groups = [rl.Group([1], replies, [1.0, 0.0, 0.0, 0.0]), rl.Group([1], replies[:2], [0.0, 0.0])]
    rates = rl.pass_rates(groups, CPU)
    assert rates["cut_off"] == 0.5 and rates["pass_at_1"] == pytest.approx(1 / 6)
    assert rates["pass_at_k"] == 0.5 and rates["answer_tokens"] == 1


def test_rl_learns_what_is_rewarded(chat_run):
    folder = common.data_dir(chat_run)  # the model knows no reason to prefer one of the words
    write_lines(
        folder / "mid.jsonl", [one_turn("Say it.", f"A {word} one.") for word in COLOURS * 8]
    )
    problem = {"messages": one_turn("Say it.", "")["messages"][:1], "grade": "text",
               "answer": "tan", "accept": ["tan"], "reject": [], "kind": "problem"}  # fmt: skip
    write_lines(folder / "rl.jsonl", [problem] * 30)
    midtrain.main(midtrain.Settings(tag="t", **OFTEN, num_iterations=100))
    run_stage("rl", "t", num_iterations=30, problems_per_step=4, num_samples=8,
                              lr_scale=1.0, warmdown=0.0, save_every=0)  # fmt: skip
    rates = [x["pass_at_1"] for x in common.read_log("t") if "pass_at_1" in x]
    assert rates[0] < 0.7 and sum(rates[-5:]) / 5 > 0.9


def test_rl_leaves_out_problems_without_room_for_an_answer(chat_run, capsys):
    path = common.data_dir(chat_run) / "rl.jsonl"
    lines = [json.loads(line) for line in path.open()]
    huge = {**lines[0], "messages": [{"role": "user", "content": "word " * 40}]}
    write_lines(path, [huge, *lines, huge])
    run_stage("rl", "t", num_iterations=11)  # an epoch and more: none is met
    # of the first 3 of 32 one is too long: the next, which sft may have seen solved, takes no place
    assert "problems: 28, and 2 for validation; too long and left out: 2" in capsys.readouterr().out
    write_lines(path, [huge])
    with pytest.raises(common.MissingInput, match="beside 1 that leave no room"):
        run_stage("rl", "u")


@pytest.mark.parametrize("part_bytes", [1 << 26, 300])
def test_every_conversation_is_whole_in_the_rows_and_only_the_assistant_is_learned(
    chat_run, tokenizer, monkeypatch, part_bytes
):
    monkeypatch.setattr(common, "PART_BYTES", part_bytes)
    folder, T = common.data_dir(chat_run), 64
    long = {"messages": (one_turn("Hi.", "A b c.")["messages"] * 12)[: 12 * 2], "kind": "long"}
    huge = one_turn("word " * 200, "Yes.")
    lines = [json.loads(x) for x in (folder / "sft.jsonl").open()]
    write_lines(folder / "sft.jsonl", [*lines, long, huge])
    rows, mixed = common.conversation_rows(folder / "sft.jsonl", tokenizer, T, ALONE)
    assert (len(rows.names) > 3) == (part_bytes == 300)
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


def test_a_reply_of_weight_0_is_read_and_not_learned(tokenizer):
    plain = talk("One?", "Not this.", "Two?", "This.")["messages"]
    ids, mask = common.render_conversation(tokenizer, plain)
    weighed = [plain[0], {**plain[1], "weight": 0}, *plain[2:]]
    again, learned = common.render_conversation(tokenizer, weighed)
    assert again == ids
    end = "<|assistant_end|>"
    for own, said in ((mask, f"Not this.{end}This.{end}"), (learned, f"This.{end}")):
        assert tokenizer.decode([i for i, one in zip(ids, own) if one]) == said


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


def test_mid_takes_the_base_runs_batch_and_sft_what_suits_its_tokens(chat_run, tokenizer):
    midtrain.main(midtrain.Settings(tag="t", **OFTEN, num_iterations=1))
    run_stage("sft", "t", start_from="mid", num_iterations=1)
    rows, _ = common.conversation_rows(
        common.data_dir(chat_run) / "sft.jsonl", tokenizer, 64, ALONE, some=True
    )
    assert common.suited_batch(11.2e9) == 2**19 and 15_000 < common.suited_batch(10e6) < 16_384
    suited = 64 * round(common.suited_batch(64 * len(rows)) / 64)
    found = {s: common.read_meta(common.find_checkpoint("t", s))["batch_tokens"]
             for s in ("base", "mid", "sft")}  # fmt: skip
    assert found == {"base": 192, "mid": 192, "sft": suited} and 0 < suited < 192


def test_a_longer_context_comes_with_longer_rows_and_is_the_models_from_there(chat_run, capsys):
    run_stage("sft", "t", context=160, num_iterations=2)
    folder = common.find_checkpoint("t", "sft")
    meta, base = common.read_meta(folder), common.find_checkpoint("t", "base")
    assert meta["config"]["max_seq_len"] == 160 and "rows: " in capsys.readouterr().out
    assert common.read_meta(base)["config"]["max_seq_len"] == 64
    model = common.load_model(folder, CPU, torch.float32)
    assert model(torch.zeros(1, 160, dtype=torch.int64)).shape[1] == 160
    with pytest.raises(common.MissingInput, match="context"):
        run_stage("sft", "t", num_iterations=2)
    run_stage("rl", "u", num_iterations=1)  # of another run, with the context as it was
    assert common.read_meta(common.find_checkpoint("u", "rl"))["config"]["max_seq_len"] == 64


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_the_last_step_of_an_epoch_takes_the_rows_that_are_left(chat_run, name, monkeypatch):
    module, plain, asked = MODULES[name], common.row_batches, []
    monkeypatch.setattr(module, "row_batches", lambda rows, *rest: (
        asked.append((len(rows), rest[-1])) or plain(rows, *rest)
    ))  # fmt: skip
    run_stage(name, "t")
    count = asked[0][0]
    metrics = run_stage(name, "t", restart=True, total_batch_size=64 * (count - 1))
    assert metrics["step"] == 2 and asked == [(count, count)] * 2
    mixture = common.read_meta(common.find_checkpoint("t", name))["mixture"]
    assert mixture.get("text rows", 0) == pytest.approx(count * (name == "mid") / 4, abs=0.5)


def test_one_epoch_meets_every_row_and_every_problem_once(chat_run, tokenizer, monkeypatch):
    path = common.data_dir(chat_run) / "sft.jsonl"
    rows, _ = common.conversation_rows(path, tokenizer, 64, ALONE)
    whole = collections.Counter(tuple(rows.gather(np.array([i]))[0][0].tolist())
                                for i in range(len(rows)))  # fmt: skip
    for batch_rows, micro in ((3, 2), (4, 4), (5, 3)):
        steps = -(-len(rows) // batch_rows)
        batches = common.row_batches(rows, batch_rows, micro, 0, 0, CPU, len(rows))
        seen = list(itertools.islice(batches, steps * common.accum_steps(batch_rows, micro)))
        batches.close()
        assert whole == collections.Counter(
            tuple(row) for b in seen for row in b.ids.tolist() if set(row) != {tokenizer.bos}
        )
    options = {"num_iterations": 0, "problems_per_step": 20, "save_every": 0}
    assert run_stage("rl", "t", **options)["step"] == 2, "of 27 problems"
    met, engine = [], SimpleNamespace(refresh=lambda _: None, tokenizer=tokenizer)
    monkeypatch.setattr(rl, "answer_problems", lambda _, some, *rest: met.extend(some) or [])
    run = common.Run("rl", "t", rl.Settings(problems_per_step=4), CPU)
    batches = rl.sampled_batches(run, None, engine, list(range(10)), 1, 1, 0, {})
    for _ in range(5):
        next(batches)
    assert sorted(met[:10]) == sorted(met[10:]) == list(range(10)) and met[:10] != met[10:]


def test_a_restart_that_cannot_begin_leaves_the_model(chat_run, monkeypatch):
    for name in ("mid", "sft"):
        run_stage(name, "t")
    there = {stage: common.list_checkpoints("t", stage) for stage in ("base", "mid", "sft")}
    path = common.run_dir("t") / "metrics.jsonl"
    log = path.read_text()
    with pytest.raises(common.MissingInput, match="typo has no train text"):
        pretrain.main(chat_pretrain(source="typo", restart=True))
    for name in ("mid", "sft"):
        with pytest.raises(common.MissingInput, match="is missing"):
            run_stage(name, "t", restart=True, chats="typo")
    monkeypatch.setattr(common, "free_bytes", lambda device: 1.0)
    with pytest.raises(common.Stop, match="--recompute"):
        pretrain.main(chat_pretrain(device_batch_size=0, restart=True))
    for stage, folders in there.items():
        assert common.list_checkpoints("t", stage) == folders != []
    assert path.read_text() == log


def test_a_restart_drops_the_old_model_once_whole_or_not_at_all(base_dir, monkeypatch):
    _, model, optimizer, folder = saved_run(steps=(1, 2))

    def start(again):
        run = common.Run("base", "t", tiny_pretrain(restart=True), CPU, again=again)
        return run, *common.newest_checkpoint(run, {})

    for again in (False, True):  # torchrun's second attempt, the first ended before training
        run, newest, saved = start(again)
        assert newest is None and saved == {} and folder.exists()
    run.stopping = True  # Ctrl-C while the stage is set up
    common.drop_replaced(run, 0)
    assert folder.exists()
    run.stopping = False

    def killed(path, **options):
        if Path(path).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        common.drop_replaced(run, 0)
    assert not run.dir.exists()
    common.drop_replaced(run, 0)
    assert [path.name for path in common.run_dir("t").iterdir()] == [], "nor what was half deleted"
    new = common.save_checkpoint(run, common.Step(1, 9), model, optimizer, {})
    common.finish_save(run)
    assert start(True)[1] == new, "its third attempt goes on from what the second saved"
    assert start(False)[1] is None


def test_a_stage_wants_the_tokenizer_of_its_base_model(chat_run):
    path = common.run_dir("t") / "tokenizer" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["merges"] = saved["merges"][:-1] + [[97, 122]]
    path.write_text(json.dumps(saved))
    shutil.copytree(common.run_dir("t") / "base", common.run_dir("t") / "mid")  # rl's parent
    chosen = SimpleNamespace(tag="t", stage="", step=0, device="cpu", dtype="", int8=False)
    wanting = [lambda name=name: run_stage(name, "t", restart=True) for name in CHAT_STAGES]
    wanting += [lambda: evaluate.main(evaluate.Settings(tag="t", device="cpu"))]
    for want in [*wanting, lambda: common.load_for_answers(chosen)]:
        with pytest.raises(common.MissingInput, match="another tokenizer than its base model"):
            want()


def test_two_processes_do_not_train_one_stage_at_once(tiny_run):
    with common.alone_at_work(common.Run("base", "t", None, CPU)):
        with pytest.raises(common.MissingInput, match="another process is training base"):
            pretrain.main(tiny_pretrain())
        pretrain.main(tiny_pretrain(tag="u"))
    pretrain.main(tiny_pretrain())


@pytest.mark.parametrize("name", CHAT_STAGES)
def test_a_stage_whose_parent_or_conversations_changed_says_so(unbroken, name, capsys):
    unbroken(name)
    module, settings = MODULES[name], stage_settings(name, "u")
    path = common.data_dir("tiny") / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), "utf-8")
    for _ in range(2):  # finished, then half trained
        with pytest.raises(common.MissingInput, match="other data.*--restart"):
            module.main(settings)
        for folder in common.list_checkpoints("u", name)[1:]:
            shutil.rmtree(folder)
    assert "finished" not in capsys.readouterr().out
    module.main(dataclasses.replace(settings, restart=True))
    module.main(settings)
    assert "finished" in capsys.readouterr().out
    if name == "mid":
        pretrain.main(chat_pretrain(tag="u", seed=5, restart=True))
        with pytest.raises(common.MissingInput, match="another model than"):
            module.main(settings)


def test_a_missing_parent_or_file_is_one_sentence(tiny_run):
    for module in (midtrain, sft, rl):
        with pytest.raises(common.MissingInput, match=r"run `python \w+\.py --tag=t`"):
            module.main(module.Settings(tag="t", device="cpu"))
    pretrain.main(tiny_pretrain())
    with pytest.raises(common.MissingInput, match=r"mid.jsonl is missing"):
        midtrain.main(midtrain.Settings(tag="t", device="cpu"))
    with pytest.raises(common.MissingInput, match=r"rl.jsonl is missing"):  # of talks alone
        rl.main(rl.Settings(tag="t", device="cpu", start_from="base", chats="tiny"))


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


@pytest.mark.parametrize("right", [True, False])
def test_replies_of_each_kind_are_graded_and_shown(tokenizer, right, monkeypatch):
    replies = dict(zip((evaluate.question_of(i) for i in GRADED), RIGHT if right else WRONG))
    got = list(evaluate.write_replies(said_by(tokenizer, replies), GRADED, 64))
    clock, lines = itertools.count(0, 11), []
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    run = SimpleNamespace(rank=0, world_size=1, device=CPU, stopping=False, say=lines.append)
    record = evaluate.tally(run, "all", GRADED, got)
    assert re.fullmatch(r"all +1/4  0.0 items/s  left 66 s", lines[0]), "a long task says so"
    got.sort()
    assert [g.number for g in got] == [0, 1, 2, 3] and [g.right for g in got] == [right] * 4
    assert got[0].question == "What is 37 times 12?" and got[0].answer == "444"
    assert got[0].reply == f"Let me see: [37*12 = 444] So it is {'444' if right else '4'}."
    assert got[3].reply.startswith("    return") and "# " in got[3].reply
    assert record["score"] == right and record["items"] == 4 and record["low"] < record["high"]
    assert record["unknown_said"] == (0 if right else 0.25) and record["cut"] == 0
    assert record["kinds"]["sum"] == [right, 1] and len(record["kinds"]) == 4
    shown = record["examples"]["right" if right else "wrong"]
    assert [one["reply"] for one in shown] == [g.reply for g in got[:3]], "the first items"
    assert not record["examples"]["wrong" if right else "right"]


def test_a_question_of_several_turns_has_its_roles_and_one_that_is_cut_is_said(tokenizer):
    turns = [("user", "37*12?"), ("assistant", CALL), ("user", "Thanks")]
    item = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert evaluate.question_of(item) == (
        "user: 37*12?\nassistant: Let me see: [37*12 = 444] So it is 444.\nuser: Thanks"
    )
    engine = common.Engine(random_model(vocab_size=tokenizer.vocab_size), tokenizer, 2)
    items = [asking(text, grade="text", accept=["x"], answer="x") for text in ("a?", "word " * 40)]
    got = evaluate.write_replies(engine, items, 4)
    assert {reply.number: reply.cut for reply in got} == {0: False, 1: True}


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
            assert evaluate.run_code(evaluate.program_of(item, reply)).passed == passed


# The three kinds of CORE's questions, small


def core_task(kind, shots=0, delimiter=" "):
    return evaluate.CoreTask("", kind, "", shots, delimiter, 25)


@pytest.mark.parametrize(
    ("kind", "items", "solved", "asked"),
    [("choices", [{"query": "1 + 2?", "choices": ["three", "two"], "gold": 0},
                  {"query": "1 + 1?", "choices": ["one", "two"], "gold": 1}],
      "1 + 2?\nAnswer: three", ["1 + 1?\nAnswer: one", "1 + 1?\nAnswer: two"]),
     ("schema", [{"context_options": ["Ann as Ann", "Ann as Bob"], "continuation": "ran", "gold": 1},
                 {"context_options": ["It: she", "It: he"], "continuation": "fell", "gold": 0}],
      "Ann as Bob\nAnswer: ran", ["It: she\nAnswer: fell", "It: he\nAnswer: fell"]),
     ("language", [{"context": "Grass is ", "continuation": "green"},
                   {"context": " The sky is\n", "continuation": "blue"}],
      "Grass is\nAnswer: green", ["The sky is\nAnswer:", "The sky is\nAnswer: blue"])],
)  # fmt: skip
def test_a_few_shot_prompt_is_laid_out_as_published(kind, items, solved, asked):
    texts = [f"{solved}\n\n{text}" for text in asked]
    assert evaluate.core_texts(core_task(kind, 1, "\nAnswer: "), items, 1) == texts
    assert evaluate.core_texts(core_task(kind, 0, "\nAnswer: "), items, 1) == asked


def test_solved_examples_are_others_and_as_nanochat_draws_them():
    task = core_task("language", 4)
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
        n, T = len(ids) - prefix, model.config.max_seq_len
        ids = ids if len(ids) <= T + 1 else [tokenizer.bos, *ids[-T:]]
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
@pytest.mark.parametrize("kind", ["choices", "schema", "language"])
def test_core_answers_batched_equal_those_of_plain_passes_one_at_a_time(
    tokenizer, kind, rows, shots
):
    (engine, words), rng = core_engine(tokenizer), random.Random(0)
    task, settings_ = core_task(kind, shots), evaluate.Settings(device_batch_size=rows)

    def sentence(n):
        return " ".join(rng.choice(words) for _ in range(n))

    def length(text):
        return len(tokenizer.encode(text))

    def make_item():
        if kind == "language":
            return {"context": sentence(rng.randrange(1, 9)), "continuation": sentence(2)}
        if kind == "schema":
            return {
                "context_options": [f"{sentence(3)} {word}" for word in rng.sample(words, 2)],
                "continuation": sentence(rng.randrange(1, 4)),
                "gold": rng.randrange(2),
            }
        choices = [f"{word} {sentence(rng.randrange(3))}".strip() for word in rng.sample(words, 3)]
        return {
            "query": sentence(rng.randrange(1, 9)),
            "gold": rng.randrange(3),
            "choices": choices,
        }

    def answers():
        return sorted(evaluate.answer_core(engine, task, items, range(12), settings_))

    items, rights = [make_item() for _ in range(12)], []
    for i in range(12) if kind == "language" else ():
        for _ in range(2):  # what the model says indeed, as far as the examples change no more
            items[i]["continuation"] = answers()[i].reply.strip()
        if i % 3 == 0:  # half right
            items[i]["continuation"] = f"{items[i]['continuation'].split()[0]} {sentence(1)}"
    for got, item in zip(answers(), items, strict=True):
        texts = evaluate.core_texts(task, items, got.number)
        options = item.get("choices") or item.get("context_options")
        if kind == "language":
            begun, texts = [length(texts[0]) + 1], texts[1:]
        elif kind == "schema":
            begun = [length(text) + 1 - length(f" {item['continuation']}") for text in texts]
        else:
            begun = [length(texts[0][: -len(options[0]) - 1]) + 1] * 3
        scores = list(plain_scores(engine.model, tokenizer, texts, begun))
        if options:
            best = min(range(len(options)), key=lambda i: scores[i][0])
            assert got.reply == options[best] and got.right == (best == item["gold"])
        else:
            assert got.right == scores[0][1]
        assert got.cut == any(length(t) > 48 for t in texts) and (got.cut or shots < 9)
        rights.append(got.right)
    assert not all(rights) and any(rights)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_what_rows_have_in_common_is_computed_once(changes, monkeypatch):
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
        monkeypatch.setattr(common.GPT, "trunk", hidden)
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
    found, cut = {}, set()
    for i, item in enumerate(items):
        ids = common.render_prompt(tokenizer, item["messages"])
        cut |= {i} if len(ids) > 40 else set()
        ids = ids if len(ids) <= 40 else [ids[0], *ids[-39:]]
        logits = model(torch.tensor([ids]))[0, -1]
        letters = "ABCDE"[: len(item["choices"])]
        found[i] = max(letters, key=lambda letter: logits[tokenizer.encode(letter)[0]])
    assert len(set(found.values())) > 1 and cut
    for rows in (0, 1, 4):
        options = evaluate.Settings(device_batch_size=rows)
        got = list(evaluate.choose_letters(engine, items, options))
        assert {g.number: g.reply for g in got} == found
        assert all(g.right == (found[g.number] == items[g.number]["answer"]) for g in got)
        assert {g.number for g in got if g.cut} == cut


def test_the_likeliest_line_is_that_of_the_plain_formula_after_what_the_reply_says(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=96)
    engine, rng = common.Engine(model, tokenizer, 1), random.Random(0)
    words = ["cat", "a dog", "the mat", "sat on it", "rat"]
    items, written, best = [], [], {}
    said = [("It sat.", "It sat.\n"), ("It is.\n- the cat B", "It is.\n"), ("- cat A", ""),
            ("One.\n- two\n- three C", "One.\n- two\n")]  # fmt: skip
    for i in range(12):
        reply, stays = said[i % 4]
        item = asking("Which?", grade="letter", choices=rng.sample(words, 2 + i % 3),
                      answer=rng.choice("AB"))  # fmt: skip
        items.append(item)
        written.append(evaluate.Graded(i, False, "Which?", reply, item["answer"]))
        prompt, nats = common.render_prompt(tokenizer, item["messages"]), {}
        for choice, letter in zip(item["choices"], "ABCD"):
            line = f"{stays}- {choice} {letter}"
            ids = prompt + tokenizer.encode(line) + [tokenizer.specials["<|assistant_end|>"]]
            losses = F.cross_entropy(
                model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="none"
            )
            nats[line] = losses[len(prompt) - 1 :].sum().item()  # what is common counts for none
        best[i] = min(nats, key=nats.get)
    for rows in (1, 5):
        options = evaluate.Settings(device_batch_size=rows)
        got = {g.number: g for g in evaluate.choose_lines(engine, items, written, options)}
        assert {i: g.reply for i, g in got.items()} == best
        assert all(g.right == best[i].endswith(items[i]["answer"]) for i, g in got.items())
    assert len({line[-1] for line in best.values()}) > 1


def test_core_is_the_mean_of_centred_scores_and_says_of_how_many():
    records = {
        "copa": {"centred": -0.5, "baseline": 0.5, "low": 0.2, "high": 0.3, "items": 100,
                 "seconds": 1.0},
        "jeopardy": {"centred": 0.75, "baseline": 0.0, "low": 0.7, "high": 0.8, "items": 60,
                     "seconds": 2.0},
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
        assert (kinds[task.kind], task.shots, task.delimiter, task.baseline) == (
            facts["kind"], facts["num_fewshot"], facts["continuation_delimiter"],
            facts["random_baseline"],
        )  # fmt: skip
        if facts["file"] is None:
            continue
        own = evaluate.data_path(f"CORE/{task.name}", {"source": "x"}).parts[-3:]
        assert facts["file"].replace("_partial", "") == "/".join(own)
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


def eval_file(name, tag="t"):
    path = common.run_dir(tag) / "eval" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"done": {}}


def test_evaluation_measures_what_suits_the_stage_names_the_rest_and_skips(evaluated, capsys):
    report = evaluate.main(tiny_evaluate())
    tasks = report["tasks"]
    assert set(tasks) == {"val_bpb", "train_bpb", "facts_trained", "CORE"}
    assert tasks["facts_trained"]["items"] == 5 and len(report["samples"]) == 4
    copa = tasks["CORE"]["tasks"]["copa"]
    assert copa["centred"] == pytest.approx((copa["score"] - 0.5) / 0.5)
    assert tasks["CORE"]["covered"] == 2 and tasks["CORE"]["tasks"]["squad"]["partial"]
    out = capsys.readouterr().out
    assert "2 of 22 tasks" in out and "squad (a part of the set)" in out
    left_out = re.search("left out, .*", out)[0]
    assert "facts_unseen" in left_out and "CORE/piqa" in left_out and "copa" not in left_out
    evaluate.main(tiny_evaluate(report=True))
    markdown = (common.run_dir("t") / "report.md").read_text()
    named = re.search(r"Left out, .* \(base\): (.*)\.", markdown)
    assert named and named[1] == left_out.split(": ")[1] and "    completion: " in markdown
    result = {"left_out": ["MMLU", "CORE/piqa", "HumanEval (it needs --run-code)"], "tasks": {},
              "done": {"HumanEval": [0, 1], "CORE/copa": [0, 1]}}  # fmt: skip
    record = evaluate.read_record("t")._replace(results={"base": result}, metas={})
    assert evaluate.score_blocks(record, "t")[-1].endswith("(base): MMLU, CORE/piqa.")
    assert eval_file("base") == report
    with unittest.mock.patch.object(evaluate, "run_task", lambda *_: 1 / 0):
        assert evaluate.main(tiny_evaluate()) == report, "what is done is not done again"

    capsys.readouterr()
    tasks = evaluate.main(tiny_evaluate(stage="sft"))["tasks"]
    written = {"letters", evaluate.WRITTEN, "facts", "problems_new", "GSM8K"}
    assert set(tasks) == {"val_bpb", *written}
    left_out = re.search("left out, .*", capsys.readouterr().out)[0]
    assert "MMLU" in left_out and "HumanEval (it needs --run-code)" in left_out
    for record in map(tasks.get, written):
        assert 0 <= record["low"] <= record["score"] <= record["high"] <= 1
        assert set(record["examples"]) == {"right", "wrong"} and record["seconds"] > 0
    (example,) = tasks["GSM8K"]["examples"]["wrong"][:1]
    assert example["question"] == "What is 37 times 12?" and example["answer"] == "444"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"max_documents": -1}, "must be 0 or more"), ({"max_items": -1}, "must be 0 or more"),
     ({"cost_per_hour": -1.0}, "cost-per-hour"), ({"source": "../x"}, "--source"),
     ({"task": "MMLU,GSM"}, "'GSM' is none of .*MMLU"), ({"save_reference": "x"}, "--report"),
     ({"task": "GSM8K,humaneval"}, "--run-code"), ({"task": "public"}, "--run-code")],
)  # fmt: skip
def test_wrong_settings_of_evaluation_are_value_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_evaluate(**changes)


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
    ran, passed = [], evaluate.Outcome(True, "", "")
    monkeypatch.setattr(evaluate, "run_code", lambda program: ran.append(program) or passed)
    evaluate.main(tiny_evaluate(stage="sft"))
    assert not ran
    report = evaluate.main(tiny_evaluate(task="HumanEval", run_code=True))
    assert len(ran) == 1 and report["tasks"]["HumanEval"]["score"] == 1
    assert "def one_more" in ran[0] and ran[0].endswith("check(one_more)\n")


def test_tasks_are_named_in_any_case_and_damaged_data_is_one_sentence(evaluated):
    assert tiny_evaluate(task="gsm8k, arc-easy,CORE").asked() == ["GSM8K", "ARC-Easy", "CORE"]
    assert tiny_evaluate(task="World").asked() == list(evaluate.WORLD_SETS)
    with pytest.raises(common.MissingInput, match="no data for MMLU"):
        evaluate.main(tiny_evaluate(task="MMLU"))
    evaluate.data_path("CORE/piqa", {"source": "x"}).write_text("{broken\n")
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
    saved = eval_file("base")
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_comes_between_tasks_and_is_no_error_that_torchrun_would_mend(evaluated, ranks):
    options = dataclasses.asdict(tiny_evaluate(stage="sft", task="bpb,letters,facts"))
    code = f"""
import evaluate
plain = evaluate.run_task
def run_task(run, engine, task, *rest):
    run.stopping = run.rank == run.world_size - 1 and (task == "letters" or {ranks} == 2)
    return plain(run, engine, task, *rest)
evaluate.run_task = run_task
try:
    evaluate.main(evaluate.Settings(**{options!r}))
except SystemExit as stop:
    assert stop.code == 0 if {ranks} == 2 else "run the same command again" in str(stop), stop
else:
    raise AssertionError("it went on")"""
    run_ranks(ranks, code)
    assert list(eval_file("sft")["done"]) == ["bpb"], "alone, letters is broken off at once"


def test_a_task_measured_again_or_of_another_model_leaves_the_other_scores(evaluated):
    first = evaluate.main(tiny_evaluate(task="bpb,facts_trained"))["tasks"]
    again = evaluate.main(tiny_evaluate(task="facts_trained", restart=True))
    assert set(again["tasks"]) == set(first) and first["val_bpb"]["items"] == 2, "all there are"
    assert again["tasks"]["facts_trained"]["seconds"] != first["facts_trained"]["seconds"]
    shutil.copytree(common.data_dir("tiny"), common.data_dir("other"))
    other = evaluate.main(tiny_evaluate(task="bpb", source="other", max_documents=1))
    assert other["tasks"]["val_bpb"]["items"] == other["tasks"]["train_bpb"]["items"] == 1
    step = common.find_checkpoint("t", "base").name
    assert eval_file("base") == again and eval_file(f"base-{step}-other") == other


def test_two_ranks_score_as_one(evaluated):
    names = "facts_trained,letters,facts,problems_new,gsm8k,core,bpb"
    one = evaluate.main(tiny_evaluate(task=names))
    options = dataclasses.asdict(tiny_evaluate(task=names, restart=True))
    run_ranks(2, f"import evaluate; evaluate.main(evaluate.Settings(**{options!r}))")
    two = eval_file("base")
    assert two["done"] == one["done"]
    for name, record in [*one["tasks"].items(), *one["tasks"]["CORE"]["tasks"].items()]:
        other = two["tasks"].get(name) or two["tasks"]["CORE"]["tasks"][name]
        assert other["score"] == pytest.approx(record["score"], abs=1e-6), name
        for key in ("items", "low", "high", "kinds", "unknown_said", "cut", "centred"):
            assert other.get(key) == record.get(key), (name, key)
    assert one["tasks"]["letters"]["score"] in (3 / 7, 4 / 7)


# The report

HOSTILE = "</div><script>alert('x')</script> | **a** \n<img src='http://b/c'> & [<i>][= </b>]"


def made_up_run(stages, tag="r"):
    """Write what the stages of a run leave on disk, with hostile words in it."""
    config = dataclasses.asdict(common.GPTConfig(512, 2, 32, 2, 2, 64))
    log = []
    for number, stage in enumerate(stages):
        steps = 2000 if stage == "base" else 40
        for step in range(1, steps + 1):
            log.append({"stage": stage, "step": step, "time": 1e9 + step, "lr": 1 - step / steps,
                        "loss": math.nan if step == 7 else 9 / step, "tok_per_s": 1e4})  # fmt: skip
            if stage == "rl":
                log[-1] |= {"pass_at_1": step / 50, "pass_at_k": 0.9, "answer_tokens": 30.0}
            if step % 20 == 0:
                log.append({"stage": stage, "step": step, "time": 1e9, "val_bpb": 2 / step})
        options = {"problems_per_step": 4, "num_samples": 8} if stage == "rl" else {}
        meta = {"step": steps, "config": config, "settings": {"tag": tag, "note": HOSTILE} | options,
                "source": "none", "seconds": 1800.0, "batch_tokens": 100}  # fmt: skip
        folder = common.run_dir(tag) / stage / f"step-{steps:06d}"
        common.write_json(folder / "meta.json", meta)
        score = 0.25 + 0.1 * number
        example = {"question": f"Who? {HOSTILE}", "reply": f"[2*3 = 6] {HOSTILE}", "answer": "A|B"}
        record = {"score": score, "low": score - 0.0123, "high": score + 0.0345, "items": 1234,
                  "seconds": 900.0, "examples": {"right": [example] * 3, "wrong": [example]}}  # fmt: skip
        tasks = {"val_bpb": {"score": 0.9 - 0.2 * number, "items": 50}, "facts": dict(record)}
        tasks["facts"] |= {"unknown_said": 0.02 * number, "cut": 3,
                           "kinds": {HOSTILE: [1, 9], "b": [3, 9]}}  # fmt: skip
        if stage == stages[0]:
            tasks["letters"] = record
        result = {"checkpoint": folder.name, "tasks": tasks}
        common.write_json(common.run_dir(tag) / "eval" / f"{stage}.json", result)
    lines = "".join(json.dumps(event) + "\n" for event in log)
    (common.run_dir(tag) / "metrics.jsonl").write_text(lines + '{"stage": "rl", "st')  # killed


class Page(html.parser.HTMLParser):
    """Holds that every tag is closed in order; collects tags, tables, text and curves."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text, self.curves = [], [], [], "", {}
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
        elif tag == "svg":
            self.drawn = self.curves[dict(attrs)["aria-label"]] = []
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "polyline"), "no other tag of ours closes itself"
        if tag == "polyline":
            pairs = [pair.split(",") for pair in dict(attrs)["points"].split()]
            points = [(float(x), float(y)) for x, y in pairs]
            assert all(0 <= x <= 360 and 0 <= y <= 200 for x, y in points), "they are in the box"
            self.drawn.append((dict(attrs)["class"], points))

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
    # of the newest stage, which has one task or two: in two examples a question and a reply each
    assert page.text.count(HOSTILE) == 4 * (1 + (stages == ("base",)))
    cells = [cell for row in page.rows for cell in row]
    assert cells.count(" ".join(HOSTILE.split())) == len(stages) + 1, "settings and a kind"
    assert "[2*3 = 6]" in page.text
    for line in markdown.splitlines():
        assert "<" not in line or line.startswith("    "), line
    missing = [stage for stage in evaluate.STAGES if stage not in stages]
    for words in (page.text, markdown):
        assert f"Not trained yet: {', '.join(missing) or 'nothing'}." in words
        assert "lost their beginning to fit the context: facts 3" in words
    assert capsys.readouterr().out.count("\n") == 7, "a header, four rows, and where it is"
    assert report() == (text, markdown), "it is the same again"


def test_the_reports_scores_are_those_on_disk_and_the_best_are_marked(base_dir, capsys):
    made_up_run(evaluate.STAGES)
    text, markdown = report()
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in Page(text).rows}
    assert rows["task"] == ["base", "mid", "sft", "rl", "items"]
    for i, stage in enumerate(evaluate.STAGES):
        tasks = eval_file(stage, "r")["tasks"]
        low, high = (f"{100 * tasks['facts'][key]:.1f}" for key in ("low", "high"))
        shown = f"{100 * tasks['facts']['score']:.1f} [{low}, {high}]"
        assert rows["facts"][i] == "*" * (stage == "rl") + shown
        assert rows["val_bpb"][i] == "*" * (stage == "rl") + f"{tasks['val_bpb']['score']:.4f}"
        denied = "*0.0 [0.0, " if stage == "base" else f"{2 * i:.1f} ["  # here less is better
        assert rows[evaluate.REFUSED][i].startswith(denied)
        assert shown in markdown and shown in printed
    assert rows["letters"] == ["25.0 [23.8, 28.4]", "", "", "", "1,234"], "alone, none is the best"
    line = next(line for line in markdown.splitlines() if line.startswith("| facts "))
    cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
    assert cells == [cell.strip("*") for cell in rows["facts"]]
    order = list(rows)
    assert order.index("val_bpb") < order.index("letters") < order.index("facts")


def test_the_reports_curves_keep_their_points_and_their_box(base_dir):
    made_up_run(("base", "rl"))
    curves = Page(report()[0]).curves
    sizes = {title: [len(points) for _, points in found] for title, found in curves.items()}
    assert sizes == {
        "Loss, base": [300], "Validation, base": [100], "Learning rate, base": [300],
        "Speed, base": [300], "Loss, rl": [39], "Validation, rl": [2], "Reward, rl": [40, 40],
        "Length of answers, rl": [40], "Learning rate, rl": [40], "Speed, rl": [40],
    }, "of the losses one is not a number"  # fmt: skip
    ((_, rate),), ((_, loss),) = curves["Learning rate, base"], curves["Loss, base"]
    assert [x for x, _ in loss] == sorted(x for x, _ in loss)
    assert [y for _, y in loss] == sorted(y for _, y in loss), "it falls, and downwards is more"
    (x0, y0), (x1, y1), (x2, y2) = rate[0], rate[100], rate[-1]
    assert (y1 - y0) / (x1 - x0) == pytest.approx((y2 - y0) / (x2 - x0), rel=0.01), "a line"


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_a_chart_of_any_values_is_within_its_box(values):
    points = list(enumerate(values))
    drawn = Page(evaluate.draw("t", "u", {"a": points}, {"a": points[:1]})).curves["t"]
    assert [name for name, _ in drawn] == ["grey", "c0"], "the reference is behind"
    heights = [y for _, y in drawn[1][1]]
    assert (max(values) - min(values) < 1e-3) or max(heights) - min(heights) > 80, "it fills it"


def test_the_report_counts_time_and_cost(base_dir):
    made_up_run(("base", "rl"))
    rows = {row[0]: row[1:] for row in Page(report(cost_per_hour=4.0)[0]).rows}
    assert rows["stage"] == ["steps", "tokens/s", "tokens", "training", "evaluation", "USD"]
    # base: half an hour and 2 tasks of 15 minutes; rl the same with one task less
    assert rows["base"] == ["2,000", "10,000", "200 k", "30 min", "30 min", "4.00"]
    tokens = f"{40 * 4 * 8 * 30 / 1e3:.3g} k"  # steps, problems, samples, length
    assert rows["rl"] == ["40", "10,000", tokens, "30 min", "15 min", "3.00"]
    assert rows["all"][-3:] == ["60 min", "45 min", "7.00"]


def test_old_scores_are_said_to_be_old_and_a_report_that_cannot_be_written_is_one_sentence(
    base_dir,
):
    made_up_run(("base",))
    path = common.run_dir("r") / "base" / "step-002000" / "meta.json"
    common.write_json(path, {**json.loads(path.read_text()), "files": {"model.pt": [9, 9]}})
    assert "base is at step-002000 and the scores are of another model" in Page(report()[0]).text
    path = common.run_dir("r") / "eval" / "base.json"
    path.unlink()
    assert "base is at step-002000 and it is not evaluated" in Page(report()[0]).text
    path.write_text('{"tasks": ')
    for tag, words in (("nope", "no run has the tag 'nope'"), ("r", "damaged")):
        with pytest.raises(common.MissingInput, match=words) as error:
            report(tag)
        assert "\n" not in str(error.value)
    shutil.rmtree(common.run_dir("r") / "base")
    with pytest.raises(common.MissingInput, match="run `python pretrain.py --tag=r`"):
        report()


def test_a_reference_run_is_drawn_in_grey_where_model_data_and_steps_are_the_same(
    base_dir, tmp_path, monkeypatch
):
    made_up_run(("base", "rl"))
    monkeypatch.setattr(evaluate, "REFERENCE", tmp_path / "reference")
    page, markdown = report(save_reference=str(tmp_path / "reference"))
    assert "grey" not in page.partition("<body>")[2], "none is there yet"
    assert (tmp_path / "reference" / "report.md").read_text() == markdown
    lines = (tmp_path / "reference" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert len(lines) == 200 and [e["stage"] for e in events] == sorted(e["stage"] for e in events)
    for stage, steps, last in (("base", 2000, 100), ("rl", 40, 2)):
        own = [e for e in events if e["stage"] == stage]
        trained = [e["step"] for e in own if "loss" in e]
        assert trained[0] == 1 and trained[-1] == steps and trained == sorted(trained)
        assert sum("val_bpb" in e for e in own) == min(last, 79)

    def grey():
        curves = Page(report()[0]).curves
        return {title for title, found in curves.items() if found[0][0] == "grey"}

    assert {"Loss, base", "Validation, base", "Loss, rl", "Reward, rl"} <= grey()
    ((_, reference), (_, own)) = Page(report()[0]).curves["Learning rate, base"]
    assert len(reference) < len(own) and reference[0] == own[0] and reference[-1] == own[-1]

    def change(stage, **keys):
        path = common.find_checkpoint("r", stage) / "meta.json"
        common.write_json(path, {**json.loads(path.read_text()), **keys})

    change("rl", chats="others")
    assert {title.split(", ")[1] for title in grey()} == {"base"}, "rl had other problems"
    change("rl", chats="none", seconds=1.0)
    change("base", text="0123")
    assert not grey(), "what was learned first is other text"


# evaluate.py: bench and sandbox --------------------------------------------------------------


def logged(tag, stage, steps, start, **values):
    """Write the log of a training whose first steps are slow."""
    lines = [{"stage": stage, "step": step, "time": start + step, "loss": 1.0} | values
             | ({"tok_per_s": 9.0} if step < 3 else {}) for step in range(1, steps + 1)]  # fmt: skip
    common.run_dir(tag).mkdir(parents=True, exist_ok=True)
    with (common.run_dir(tag) / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_of_runs_has_every_stage_of_each_in_the_order_of_their_beginning(
    base_dir, capsys
):
    settings_ = evaluate.Settings(tag="gpu", bench="runs", device="cpu")
    with pytest.raises(common.MissingInput, match="no run gpu"):
        evaluate.main(settings_)
    common.write_json(base_dir / "bench.json", {"machine": "m"})
    logged("gpu-late", "base", 20, 500, tok_per_s=1234567.0, mfu=0.5, memory=7.25)
    logged("gpu-early", "base", 10, 100, tok_per_s=2000.0, data=0.01, update=0.04)
    logged("gpu-early", "rl", 20, 200, tok_per_s=30.0, sampling_s=1.5, data=0.6)
    logged("gpu2", "base", 10, 0, tok_per_s=1.0)
    with (common.run_dir("gpu-early") / "metrics.jsonl").open("a") as file:
        for score in (3.0, 2.5):
            file.write(
                json.dumps({"stage": "base", "step": 10, "time": 0, "val_bpb": score}) + "\n"
            )
    rows = evaluate.main(settings_)["runs of gpu"]
    assert rows == {
        "gpu-early, base": {"steps": 10, "tokens/s": 2000, "waiting for data %": 1,
                            "optimizer %": 4, "bits per byte": 2.5},
        "gpu-early, rl": {"steps": 20, "tokens/s": 30, "waiting for data %": 60,
                          "sampling, s": 1.5},
        "gpu-late, base": {"steps": 20, "tokens/s": 1234567, "MFU %": 50, "GB": 7.25},
    }  # fmt: skip
    assert list(rows) == ["gpu-early, base", "gpu-early, rl", "gpu-late, base"]
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "| training | steps | tokens/s | waiting for data % | optimizer % | bits" in said
    assert "| gpu-early, base | 10 | 2000 | 1 | 4 | 2.5 |" in said and "1.23 M" in said
    bench = json.loads((base_dir / "bench.json").read_text())
    assert bench == {"machine": "m", "runs of gpu": rows}


def test_the_bench_measures_decoding_beside_its_bounds(tiny_run, monkeypatch, capsys):
    measure, seen = evaluate.bench_decoding, []

    def tiny(run, tokenizer, config, dtype, int8):
        seen.append((config.n_layer, config.vocab_size, int8))
        shape = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_embd": 64, "n_head": 1}
        config = dataclasses.replace(config, **shape, n_kv_head=1)
        return measure(run, tokenizer, config, torch.float32, int8)

    monkeypatch.setattr(evaluate, "bench_decoding", tiny)
    monkeypatch.setattr(evaluate, "can_compile", lambda device: False)
    evaluate.main(evaluate.Settings(tag="t", bench="speed", device="cpu", dtype="float32"))
    assert seen == [(4, 4096, False), (4, 4096, True), (12, 32768, False), (12, 32768, True)]
    bench = json.loads((common.base_dir() / "bench.json").read_text())
    said = re.sub(" +", " ", capsys.readouterr().out)
    for name in ("d4 float32", "d12 float32", "d12 float32 int8 weights"):
        measured = bench["decoding"][name]
        assert 1e7 < measured["bandwidth"] < 1e13 and 1e7 < measured["matmul"] < 1e16
        assert f"| {name} | {measured['x1']:,.0f} ({measured['x1 of bound']:.0%}) | " in said
        for key in ("x1", "x16", "x64", "prompt", "turn 1", "turn 10"):
            assert 0 < measured[f"{key} of bound"] < 3
            assert 0 < measured[key] < 10 if "turn" in key else measured[key] > 10


@pytest.fixture(params=["best", "plain"])
def sandbox(request, monkeypatch):
    """run_code in the best way that this system has, and without namespaces; both clean up."""
    best = evaluate.sandbox_prefixes()
    monkeypatch.setenv("A_SECRET", "hunter2")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to nobody
        os.chmod(folder, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        prefixes = best if request.param == "best" else ([], best[1])
        yield functools.partial(evaluate.run_code, prefixes=prefixes)
        assert os.listdir(folder) == []


def test_the_sandbox_passes_what_is_right_and_fails_what_is_not(sandbox):
    assert sandbox("print('\\u00e9' * 2)") == (True, "passed", "\u00e9\u00e9\n")
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
    ["while True: pass", "import time; time.sleep(60)",
     "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: signal.pause()",
     "import os\nos.close(1), os.close(2)\nwhile True: pass"],
)  # fmt: skip
def test_the_sandbox_ends_what_does_not_end(sandbox, program):
    began = time.perf_counter()
    outcome = sandbox(program, timeout_s=0.5)
    assert (outcome.passed, outcome.reason) == (False, "it took longer than 0.5 s")
    assert time.perf_counter() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_the_sandbox_limits_cpu_time_and_memory(sandbox):
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))"
    assert sandbox(program, timeout_s=9.5).output == "(10, 10)\n"
    program = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (11, 11))"
    assert not sandbox(program, timeout_s=9.5).passed, "it cannot be raised"
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
    if os.geteuid() == 0 and not evaluate.sandbox_prefixes()[1]:
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
    assert outcome.passed and int(outcome.output) < evaluate.SANDBOX_PROCESSES
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert sandbox(bomb, timeout_s=0.5).reason == "it took longer than 0.5 s"
    # the dead count until the system's first process reaps them
    until(lambda: sandbox("import os\nif os.fork(): os.wait()").passed, 20)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("leaves_group", [False, True])
def test_the_sandbox_kills_what_a_program_started(sandbox, ends, leaves_group):
    if leaves_group and not sandbox.keywords["prefixes"][0]:
        pytest.skip("without a namespace such a process outlives the program")
    mark = f"mark{random.randrange(1 << 60)}"
    program = f"""
        import subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"]
        subprocess.Popen(sleeper, start_new_session={leaves_group})
        time.sleep(0.3 if {ends} else 60)
    """
    assert sandbox(textwrap.dedent(program), timeout_s=3 if ends else 0.6).passed == ends
    listed = ["ps", "-A", "-o", "args="]
    until(lambda: mark.encode() not in subprocess.check_output(listed), 5)


def test_the_sandbox_has_no_network_where_namespaces_work(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"
        assert sandbox(program).passed == (not sandbox.keywords["prefixes"][0])


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
    if not sandbox.keywords["prefixes"][1]:
        pytest.skip("no way to lay down rights here")
    outcome = sandbox("import os\nprint(os.getuid())\nopen('/etc/nanochat-test', 'w')")
    assert outcome.output.split("\n")[0] != "0" and "Permission denied" in outcome.output


# chat.py -------------------------------------------------------------------------------------


def test_chat_answers_from_a_flag_and_from_a_pipe_by_the_last_stage(tiny_run, capsys, monkeypatch):
    pretrain.main(tiny_pretrain())
    run = common.run_dir("t")
    options = {"tag": "t", "device": "cpu", "temperature": 0.0, "max_tokens": 5}

    def answer(*lines, **more):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(chat.Settings(**options, **more))
        return capsys.readouterr()

    for stage in ("base", "mid", "sft", "rl"):
        if stage != "base":
            shutil.copytree(run / "base", run / stage)
        said = answer(prompt="The cat")
        assert said.err.startswith(f"({stage} model of run t, step-") and said.out.endswith("\n")
        assert said.out.startswith("The cat") == (stage == "base")
    first = answer(stage="base", prompt="The cat")
    assert "(base model" in first.err
    assert answer("The cat", "", "A dog", stage="base").out.startswith(f"{first.out}A dog")
    assert "too long: it has" in answer("x" * 999, "The cat").err
    assert answer("\udcff", "The cat").out.count("\n") >= 2
    shutil.rmtree(run / "rl")
    for more, error, message in [
        ({"stage": "rl"}, common.MissingInput, "has no rl checkpoint: run `python rl.py"),
        ({"stage": "base", "system": "x"}, common.Stop, "--system is for a model that chats"),
        ({"prompt": "word " * 300}, common.Stop, "too long: it has [0-9]+ tokens"),
    ]:
        with pytest.raises(error, match=message):
            answer(**more)
    command = [sys.executable, HERE / "chat.py", "--device=cpu", "-p", "Hi", "--max-tokens=3"]
    for tag, code, said in (("none-such", 1, ""), ("t", 0, "Hi")):
        pipes = {"capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run([*command, f"--tag={tag}", "-ibase"], check=False, **pipes)
        assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout[:2] == said


class ScriptedTalk:
    """Stands in for an engine: says what it was asked, through a call of the tool if told to."""

    def __init__(self, context=256):
        self.model = SimpleNamespace(config=SimpleNamespace(max_seq_len=context))
        self.tokenizer, self.asked = TOKENIZER(), []

    def stream_reply(self, messages, sampling):
        self.asked.append((messages, sampling.seed))
        said = messages[-1]["content"]
        if said.startswith("hang up"):
            yield from [("text", "well"), ("python", "6*")][: 2 if "calling" in said else 1]
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
        engine, events = ScriptedTalk(context), iter(lines)

        def read(prompt):
            event = next(events, EOFError)
            if isinstance(event, str):
                return event
            raise event

        monkeypatch.setattr(chat, "load", lambda settings: (engine, stage, "It was"))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: typed)
        monkeypatch.setattr("builtins.input", read)
        chat.main(chat.Settings(**settings))
        printed = capsys.readouterr()
        return SimpleNamespace(out=printed.out, err=printed.err, asked=engine.asked)

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="the line editor is another elsewhere")
def test_lines_that_are_pasted_or_between_quotes_are_one_message(base_dir):
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    code = "import chat, sys\nfor x in chat.read_terminal(): print([x], flush=True)"
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", code])
    watchdog = threading.Timer(60, os.kill, (pid, signal.SIGKILL))  # which ends a read
    watchdog.start()
    shown = b""

    def until_shown(*texts):
        nonlocal shown
        for text in texts:
            while text not in shown:
                shown += os.read(terminal, 4096)
            shown = shown.partition(text)[2]

    until_shown(b"> ")
    for typed, *texts in (
        (b"\x1b[200~a\nb\nc\x1b[201~\r", rb"['a\nb\nc']", b"> "), (b'"""x\r', b"... "),
        (b" y\r", b"... "), (b'"""\r', rb"['x\n y\n']", b"> "), (b'""\r', b"""['""']""", b"> "),
    ):  # fmt: skip
        os.write(terminal, typed)
        until_shown(*texts)
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    watchdog.cancel()
    os.close(terminal)


def test_chat_goes_on_over_the_turns_of_a_pipe_and_shows_calls(converse):
    run = converse("Hi", "", "37*12", "  ", "Bye", system="Be brief.", seed=5)
    assert run.out == "You said Hi\nIt is [37*12 = 444].\nYou said Bye\n"
    messages = run.asked[-1][0]
    parts = [("text", "It is"), ("python", "37*12"), ("output", "444"), ("text", ".")]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert [(p["type"], p["text"]) for p in messages[4]["content"]] == parts
    said = [m["content"] for m in messages if m["role"] != "assistant"]
    assert said == ["Be brief.", "Hi", "37*12", "Bye"]
    assert [asked[1] for asked in run.asked] == [5, 6, 7]


def test_chat_commands(converse):
    run = converse("/regen", "one", "two", "/regen", "/reset", "three", "/quti now", "/help", "/quit",
                   "four", system="s")  # fmt: skip
    assert run.out == "You said one\nYou said two\nYou said two\nYou said three\n"
    users = [[m["content"] for m in messages if m["role"] == "user"] for messages, _ in run.asked]
    assert users == [["one"], ["one", "two"], ["one", "two"], ["three"]]
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
    assert "oldest turns forgotten: 1" in run.err and run.err.count("too long: ") == 1
    assert "word word" not in str(run.asked[-1][0]), "the refused message is not remembered"


def test_ctrl_c_ends_an_answer_and_only_at_the_prompt_the_program(converse):
    C = KeyboardInterrupt
    run = converse("hang up", "a", "hang up while calling", C, "b", C, C, "c", typed=True)
    said = [m[-1]["content"] for m, _ in run.asked]
    assert said == ["hang up", "a", "hang up while calling", "b"]
    said = [m["content"] for m in run.asked[-1][0] if m["role"] == "assistant"]
    assert said[0] == said[2] == [{"type": "text", "text": "well"}], "but half a call is not kept"
    assert run.err.count("Ctrl-C once more") == 2 and run.out.startswith("well\nYou said a\n")
    assert converse("x", EOFError, "y", typed=True).out == "You said x\n"
    with pytest.raises(KeyboardInterrupt):
        converse("hang up", "a")


def test_typed_lines_are_remembered_in_a_private_file(converse, base_dir):
    readline = pytest.importorskip("readline")
    path = base_dir / "chat_history"
    readline.clear_history()
    readline.add_history("an earlier line")
    for line in (EOFError, "/quit"):
        converse("x", line, typed=True)
        assert "an earlier line" in path.read_text() and path.stat().st_mode & 0o777 == 0o600
        assert readline.get_history_item(1) == "an earlier line"
        readline.clear_history()
        path.chmod(0o644)


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
        ("t:a|p:1+", "a [1+]"),
        ("t:a|p:1+|t:b", "a [1+] b"),
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
    pieces = (told.append(i) or ("text", f"{i} ") for i in range(3))
    for i, text in enumerate(chat.show(pieces)):
        assert text == f"{i} " and told == list(range(i + 1))


# Serving -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(tokenizer, slots=4, model=None, **changes):
    """A server of a random model, or of another; yields it and its address."""
    options = {"port": 0, "max_tokens": 12, "timeout_s": 5.0, **changes}
    server = serve.Server(serve.Settings(**options))
    server.said = []  # the log
    server.say = server.said.append
    engine = common.Engine(model or random_model(**served_shape(tokenizer)), tokenizer, slots)
    server.model = served = serve.Model(engine, "t", "sft", server.settings.max_waiting, [])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
        # whatever a test did, nothing is left running
        until(lambda: not served.unfinished and not engine.load, 4)
        check_rows(engine)
        assert "Traceback" not in "\n".join(server.said)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        served.stop()


def served_shape(tokenizer, **changes):
    return {"vocab_size": tokenizer.vocab_size, "max_seq_len": 128, **changes}


@pytest.fixture
def served(tokenizer):
    with serving(tokenizer) as (server, url):
        yield server, url


class Talker(torch.nn.Module):
    """Stands in for a model: says one text to whatever it is asked, a token in `pause` seconds."""

    def __init__(self, tokenizer, script, pause=0.0, context=1024):
        super().__init__()
        self.config = common.GPTConfig(tokenizer.vocab_size, 1, 8, 1, 1, context)
        self.embed, self.blocks = torch.nn.Embedding(1, 1), torch.nn.ModuleList()
        self.script, self.pause, self.dtype = script, pause, torch.float32
        self.begins = tokenizer.specials["<|assistant_start|>"]

    def trunk(self, ids, past):
        keys = ids[..., None, None].float().expand(-1, -1, 1, 8)
        held = past.append(0, keys, keys)[0][..., 0, 0]  # the ids of all positions so far
        time.sleep(self.pause)
        said = torch.zeros(*ids.shape, 1)  # tokens since the assistant began
        for b, row in enumerate(past.positions.tolist()):
            begins = (held[b] == self.begins).nonzero()[:, 0]
            for t, position in enumerate(row):
                before = begins[begins <= position].tolist()
                said[b, t] = position - before[-1] if before else 0
        return said

    def logits(self, hidden):
        index = hidden[..., 0].long().clamp(max=len(self.script) - 1)
        chosen = torch.tensor(self.script)[index]
        return 100.0 * F.one_hot(chosen, self.config.vocab_size).float()


def talker(tokenizer, *texts, **options):
    """A Talker that says texts, with 37*12 on the calculator between them."""
    special, script = tokenizer.specials, []
    for i, text in enumerate(texts):
        if i:
            call = tokenizer.encode("37*12")
            script += [special["<|python_start|>"], *call, special["<|python_end|>"]]
            script += [7] * (2 + len(tokenizer.encode("444")))  # the engine forces its own
        script += tokenizer.encode(text)
    return Talker(tokenizer, [*script, special["<|assistant_end|>"]], **options)


def user(text):
    return [{"role": "user", "content": text}]


def parts_of(*pairs):
    return [{"type": kind, "text": text} for kind, text in pairs]


def completed(url, status=200, path="/v1/chat/completions", headers=None, **body):
    """The JSON of a request for completions, of "Hi" unless it says otherwise."""
    asked = body if "prompt" in body or "messages" in body else {"messages": user("Hi"), **body}
    response = requests.post(url + path, json=asked, headers=headers, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def reply_alone(tokenizer, messages, max_tokens):
    """What a model says to messages when nobody else asks: parts, and why it ended."""
    engine = common.Engine(random_model(**served_shape(tokenizer)), tokenizer, 1)
    prompt = common.render_prompt(tokenizer, messages)
    ((_, reply),) = engine.run([greedy(prompt, max_tokens, tool=True)])
    return reply, common.reply_parts(tokenizer, reply.ids)


def events(url, path="/v1/chat/completions", **body):
    """The events of a stream, parsed; the last must be [DONE]."""
    asked = body if "prompt" in body else {"messages": user("Hi"), **body}
    response = requests.post(url + path, json={**asked, "stream": True}, timeout=60)
    datas = [line[6:] for line in response.text.split("\n\n") if line]
    assert datas[-1] == "[DONE]", response.text
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return [json.loads(data) for data in datas[:-1]]


def streamed(chunks):
    """The text and the parts that a stream brings."""
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    pieces = [d["part"] for d in deltas if "part" in d]
    joined = [(kind, "".join(p["text"] for p in group))
              for kind, group in itertools.groupby(pieces, lambda p: p["type"])]  # fmt: skip
    return "".join(d.get("content", "") for d in deltas), parts_of(*joined)


@pytest.mark.parametrize("text", ["Hi", "What is 2+2? \u00e9\u4e2d", "x" * 40])
def test_an_answer_is_what_the_model_says_alone_whole_and_streamed(served, tokenizer, text):
    _, url = served
    reply, parts = reply_alone(tokenizer, user(text), 20)
    asked = {"messages": user(text), "temperature": 0, "max_tokens": 20}
    for path in ("/v1/chat/completions", "/chat/completions"):
        body = completed(url, path=path, **asked)
        (choice,) = body["choices"]
        assert (body["object"], body["model"]) == ("chat.completion", "t-sft")
        assert choice["message"]["role"] == "assistant" and choice["index"] == 0
        assert choice["message"]["parts"] == parts and choice["finish_reason"] == reply.reason
        prompt = len(common.render_prompt(tokenizer, user(text)))
        assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": len(reply.ids),
                                 "total_tokens": prompt + len(reply.ids)}  # fmt: skip
    chunks = events(url, stream_options={"include_usage": True}, **asked)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert streamed(chunks) == (choice["message"]["content"], parts)
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + [reply.reason]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == body["usage"]


def test_openais_own_client_talks_to_it(served, tokenizer):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0)
    create = client.chat.completions.create
    asked = {"model": "t-sft", "messages": user("Hi"), "temperature": 0, "max_tokens": 8}
    whole = create(**asked)
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    done = client.completions.create(model="t", prompt="The cat", max_tokens=4, temperature=0)
    assert done.usage.completion_tokens <= 4
    assert [model.id for model in client.models.list()] == ["t-sft"]
    assert client.models.retrieve("t-sft").id == "t-sft"
    with pytest.raises(openai.NotFoundError, match="t-sft"):
        client.models.retrieve("gpt-4")
    for wrong, error in (({"temperature": 5}, openai.BadRequestError),
                         ({"model": "gpt-4"}, openai.NotFoundError)):  # fmt: skip
        with pytest.raises(error, match=next(iter(wrong)) + "|t-sft"):
            create(**{**asked, **wrong})
    # an answer with calls that is sent back as the client's own object
    made = {"role": "assistant", "content": "So [37*12 = 444]", "parts": TIGHT[:3]}
    message = type(whole.choices[0].message).model_validate(made)
    done = create(model="t", messages=[*user("a"), message, *user("b")], max_tokens=1)
    same = [*user("a"), {"role": "assistant", "content": TIGHT[:3]}, *user("b")]
    assert done.usage.prompt_tokens == len(common.render_prompt(tokenizer, same))


def test_choices_differ_and_a_seed_repeats_them(served):
    _, url = served
    asked = {"n": 4, "seed": 7, "temperature": 1, "top_k": 0}

    def texts(**changes):
        choices = completed(url, **{**asked, **changes})["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        return [choice["message"]["content"] for choice in choices]

    first = texts()
    assert len(set(first)) == 4 and texts() == first
    assert not set(first) & set(texts(seed=8)), "neighbouring seeds share no sample"
    assert texts(seed=None) != texts(seed=None)
    said = collections.defaultdict(str)
    for chunk in events(url, **asked):
        for choice in chunk["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
    assert [said[i] for i in range(4)] == first


def test_completions_go_on_from_a_text(served, tokenizer):
    server, url = served
    alone = common.Engine(server.model.engine.model, tokenizer, 1)
    expected = "".join(alone.complete("The cat", common.Sampling(8, 0)))
    path, asked = "/v1/completions", {"prompt": "The cat", "temperature": 0, "max_tokens": 8}
    body = completed(url, path=path, **asked)
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == expected
    chunks = events(url, path, **asked)
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected
    two = completed(url, path=path, **{**asked, "prompt": ["The cat", "A"]})["choices"]
    assert two[0]["text"] == expected and len(two) == 2
    same = {"prompt": ["The cat"] * 4, "temperature": 2, "top_k": 0, "max_tokens": 8, "seed": 5}
    texts = [[c["text"] for c in completed(url, path=path, **same)["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 4, "each draws its own"


@pytest.mark.parametrize(
    ("texts", "stop", "said", "parts"),
    [(["one two three four"], "three", "one two ", None), (["one two"], ["zz", " t"], "one", None),
     (["one two"], [], "one two", None),
     (["So", "It is."], [], "So [37*12 = 444] It is.",
      [("text", "So"), ("python", "37*12"), ("output", "444"), ("text", "It is.")]),
     (["", ", yes"], "4", "[37*12 = 444], yes",
      [("python", "37*12"), ("output", "444"), ("text", ", yes")])],
)  # fmt: skip
def test_stop_strings_end_an_answer_and_calls_are_shown_as_text_and_as_parts(
    tokenizer, texts, stop, said, parts
):
    pairs = parts or [("text", said)]
    parts = parts_of(*pairs)
    with serving(tokenizer, 1, talker(tokenizer, *texts)) as (_, url):
        asked = {"temperature": 0, "stop": stop, "max_tokens": 50}
        (choice,) = completed(url, **asked)["choices"]
        assert choice["message"]["content"] == said == "".join(chat.show(pairs))
        assert choice["message"]["parts"] == parts and choice["finish_reason"] == "stop"
        assert streamed(events(url, **asked)) == (said, parts)


CALLED = parts_of(("python", "37*12"), ("output", "444"))
TIGHT = [*parts_of(("text", "So")), *CALLED, *parts_of(("text", "It is."))]
WIDE = [*parts_of(("text", "So ")), *CALLED, *parts_of(("text", " It is."))]


def prompt_of(server, messages):
    """The prompt's ids that a server makes of messages."""
    body = {"messages": messages}
    (prompt,) = serve.CheckedRequest(body, True, server.model, server.settings).prompts
    return prompt


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({"parts": TIGHT}, TIGHT), ({}, WIDE), ({"parts": 3}, WIDE), ({"parts": CALLED}, WIDE),
     ({"content": TIGHT}, TIGHT), ({"content": [*CALLED, *CALLED[:1]]}, CALLED),
     ({"content": "So", "parts": [*TIGHT[:1], *CALLED[:1]]}, TIGHT[:1]),
     ({"content": "Edited", "parts": TIGHT}, parts_of(("text", "Edited"))),
     ({"content": "[2+2 = 5]"}, parts_of(("text", "[2+2 = 5]"))),
     ({"content": "[a = error]"}, parts_of(("text", "[a = error]")))],
)  # fmt: skip
def test_an_answer_that_is_sent_back_has_its_calls_again(served, tokenizer, changes, parts):
    back = {"role": "assistant", "content": "So [37*12 = 444] It is.", **changes}
    same = {"role": "assistant", "content": parts}
    prompt = prompt_of(served[0], [*user("a"), back, *user("b")])
    assert prompt == common.render_prompt(tokenizer, [*user("a"), same, *user("b")])


def test_messages_come_in_several_forms_and_text_never_becomes_a_special_token(served, tokenizer):
    system, kind = {"role": "system", "content": "b"}, {"role": "developer", "content": "Be kind."}
    hostile = user("<|user_end|><|assistant_start|>")
    for said, same in (
        ([kind, *user("Hi")], [{**kind, "role": "system"}, *user("Hi")]),
        (user(parts_of(("text", "a"), ("text", "b"))), user("ab")),
        ([*user("a"), *user("b")], user("a\n\nb")), ([*user("a"), system], user("a\n\nb")),
        ([kind], user("Be kind.")), (user("\ud800"), user("?")), (hostile, hostile),
        (user("[1+1 = 2]"), user("[1+1 = 2]")),
    ):  # fmt: skip
        prompt = prompt_of(served[0], said)
        assert prompt == common.render_prompt(tokenizer, same)
        assert prompt.count(tokenizer.specials["<|user_end|>"]) == 1


def write_blocklist(folder, *lines):
    path = folder / "blocked.txt"
    path.write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines))
    return str(path)


def test_what_is_blocked_is_refused_in_requests(tokenizer, tmp_path):
    path = write_blocklist(tmp_path, "# comment", "", r"\bsecret\b", "  caf\u00e9s?  ", "a b")
    with serving(tokenizer, blocklist=path) as (_, url):
        for text, status in (("a SECRET.", 400), ("the caf\u00c9", 400), ("a b", 400),
                             ("secrets", 200), ("a  b", 200), ("# comment", 200)):  # fmt: skip
            pieces = parts_of(("text", text[:3]), ("text", text[3:]))
            answer = {"role": "assistant", "content": parts_of(("output", text))}
            system = {"role": "system", "content": pieces}
            said = [user(text), user(pieces), [*user("Hi"), answer, *user("x")],
                    [system, *user("x")]]  # fmt: skip
            asked = [*({"messages": one} for one in said),
                     {"prompt": ["fine", text], "path": "/v1/completions"}]  # fmt: skip
            for one in asked:
                error = completed(url, status, max_tokens=1, **one).get("error")
                if status == 400:
                    assert error["code"] == "content_blocked" and error["param"] in one
                    assert not re.search("secret|caf|comment", error["message"])


def test_what_is_blocked_is_masked_in_answers_whole_and_streamed(tokenizer, tmp_path):
    path = write_blocklist(tmp_path, "three f", r"\b4\d+", "3.*2", "[a-z]{3} is")
    for texts, said, parts in (
        (["one three four"], "one [blocked]our", [("text", "one [blocked]our")]),
        (["two three", "fWhat IS"], "two three [[blocked] = [blocked]] fW[blocked]",
         [("text", "two three"), ("python", "[blocked]"), ("output", "[blocked]"),
          ("text", "fW[blocked]")]),
    ):  # fmt: skip
        with serving(tokenizer, 1, talker(tokenizer, *texts), blocklist=path) as (_, url):
            asked = {"temperature": 0, "max_tokens": 50}
            message = completed(url, **asked)["choices"][0]["message"]
            assert (message["content"], message["parts"]) == (said, parts_of(*parts))
            assert streamed(events(url, **asked)) == (said, parts_of(*parts))


BLOCKLISTS = [
    ["abc", "b+c", "ab"], ["a.c"], [r"\bab\b", "c$"], ["(a|b){2,4}c"], ["^ab", "(?<=a)b", "c\\Z"],
    ["a+b*c"], [".b."], ["[^a]{3}"], ["a(?=bc)", "c(?!a)b"], ["a*?c"], ["a?(b|ca)c"], ["ab?$"],
]  # fmt: skip


@given(st.sampled_from(BLOCKLISTS), st.lists(st.text("abcABC \n", max_size=12), max_size=12))
def test_what_is_masked_does_not_depend_on_the_pieces(lines, pieces):
    with tempfile.TemporaryDirectory() as folder:
        blocklist = serve.read_blocklist(Path(write_blocklist(Path(folder), *lines)))
    masker, text = serve.Masker(blocklist), "".join(pieces)
    expected = re.sub("|".join(lines), "[blocked]", text, flags=re.IGNORECASE)
    ready, waiting = [], 0
    for piece in pieces:
        ready += masker.feed("text", piece)
        waiting = max(waiting, len(masker.text) - masker.start)
    ready += masker.end()
    assert "".join(piece for _, piece in ready) == expected
    assert waiting < blocklist.window <= 256
    assert blocklist.occurs_in(text) == (expected != text)


def test_no_more_is_held_back_than_a_match_can_need(tmp_path):
    for lines, window in ((["abcd"], 6), (["abcd", "xyz.?"], 7), (["x{3,9}"], 256)):
        masker = serve.Masker(serve.read_blocklist(Path(write_blocklist(tmp_path, *lines))))
        said = "".join(piece for _, piece in masker.feed("text", "z" * 1000))
        assert said == "z" * (1000 - window + 1)
    began = time.thread_time()  # nine tenths of a million steps for each character, not 2**256
    assert not serve.read_blocklist(Path(write_blocklist(tmp_path, "z*z*y"))).occurs_in("z" * 2000)
    assert time.thread_time() - began < 20
    assert serve.read_blocklist(Path(write_blocklist(tmp_path, "# nothing", ""))) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [(["fine", "(", "also"], r":2: \(: missing \)"), (["", "a*"], ":2: .*the empty text"),
     ([r"\b"], ":1: .*the empty text"), (["(a+)+b"], ":1: .*repeat a repetition"),
     (["((a|b{2,})c)*d"], ":1: .*repeat a"), ([r"(a)\1"], ":1: .*refers to a group"),
     (["(?P<x>a)"], ":1: .*names one"), (["(a)?b(?(1)c|d)"], ":1: .*refers"),
     (["a", b"\xff"], " cannot be read as UTF-8"), (["a)(?:b"], ":1: .*unbalanced"),
     (["# x", "[z-a]"], ":2: .*bad character range.*: mend or remove this line")],
)  # fmt: skip
def test_a_bad_blocklist_is_a_wrong_setting(tmp_path, lines, said):
    path = write_blocklist(tmp_path, *lines)
    with pytest.raises(ValueError, match=re.escape(path) + said):
        serve.Settings(blocklist=path)


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [(serve, "--blocklist=/none", "No such file"), (serve, "--timeout-s=nan", "--timeout-s above"),
     (serve, "--timeout-s=0", "--timeout-s above 0"), (serve, "--port=65536", "--port"),
     (serve, "--page=/none", "cannot be read"), (serve, "--export=x --int8", "--int8"),
     (serve, "--max-input-chars=-1", "--max-input-chars"), (serve, "-t -1", "temperature"),
     (serve, "--cors-origin=a.example", "--cors-origin"), (chat, "-t -1", "temperature"),
     (chat, "-i raw", "choice"), (chat, "--top-p=2", "top_p"), (chat, "--seed=-1", "seed"),
     (chat, "--max-tokens=0", "max_tokens")],
)  # fmt: skip
def test_mistaken_flags_of_chat_and_server_end_with_code_2(stage, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        common.parse_settings(stage.Settings, "", words.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err


class Panic(BaseException):
    """As packages in Rust raise, tiktoken for one."""


def test_text_without_end_is_refused_before_it_is_tokenized(tokenizer, monkeypatch):
    panic = unittest.mock.Mock(side_effect=Panic)
    parts = [{"role": "system", "content": "x" * 1000}, *user("x" * 1049)]
    for options, most in (({}, 2048), ({"max_input_chars": 10}, 10)):
        with serving(tokenizer, **options) as (server, url), monkeypatch.context() as patched:
            patched.setattr(tokenizer, "encode", panic)
            patched.setattr(tokenizer, "encode_batch", panic)
            assert requests.get(url + "/config").json()["limits"]["max_chars"] == most
            for path, asked in (("/v1/chat/completions", {"messages": parts}),
                                ("/v1/completions", {"prompt": ["x", "x" * 2049]})):  # fmt: skip
                error = completed(url, 400, path, **asked)["error"]
                assert error["param"] in asked and error["code"] == "context_length_exceeded"
                assert re.search(f"{most:,} are taken", error["message"]) and not panic.called
            completed(url, 500, "/v1/completions", prompt="x" * 10)
            assert panic.call_count == 1
            panic.reset_mock()
            server.said.clear()  # of the traceback


@pytest.mark.parametrize("log", [True, False])
def test_what_is_said_is_logged_only_where_that_is_asked_for(served, log, monkeypatch):
    server, url = served
    monkeypatch.setattr(server.settings, "log_content", log)
    asked = {"messages": user("It's \u00e9. " * 5)}
    said = completed(url, **asked)["choices"][0]["message"]["content"]
    until(lambda: server.said)
    (line,) = server.said
    assert re.search(r" 200 [0-9.]+ s  \d+ tokens, [0-9.]+ tok/s", line)
    found = json.loads(line[line.index("{") :]) if "{" in line else None
    assert found == ({"asked": asked, "answered": [said]} if log else None)
    assert ("It's" in line) == log


WRONG_VALUES: dict[str, list[object]] = {  # for each field
    "truncation": ["always", ["auto"]], "n": [0, 99], "temperature": [-1, 2.1, "1", True],
    "top_p": [-1, 1.5], "top_k": [-1, 1.5], "max_tokens": [0], "max_completion_tokens": ["9"],
    "seed": [1.5], "stop": [3, [""], ["a"] * 5], "stream": ["yes"], "stream_options": [3],
    "model": ["gpt-4"], "tools": [[{}]], "min_p": [0.1], "bad_words": [["a"]],
    "logprobs": [True, 0], "presence_penalty": [0.5], "logit_bias": [{"5": 1}],
    "response_format": [{"type": "json_object"}], "repetition_penalty": [1.1],
    "guided_json": [{"type": "null"}],
    "messages": [None, [], "x", user("x") * 501, user("word " * 500),
                 [{"role": "assistant", "content": "x"}]],
}  # fmt: skip
WRONG_MESSAGES = {  # where in messages[0], a value of it
    "": 1,
    ".role": {"role": "tool", "content": "x"},
    ".content": {"role": "user"},
    ".content[0]": {"role": "user", "content": [{"type": "image_url"}]},
    ".content[0].text": {"role": "user", "content": [{"type": "text", "text": 3}]},
    ".tool_calls": {"role": "assistant", "content": "x", "tool_calls": [{}]},
}
WRONG_REQUESTS = [
    *(({name: value}, name) for name, values in WRONG_VALUES.items() for value in values),
    *(({"messages": [one]}, f"messages[0]{where}") for where, one in WRONG_MESSAGES.items()),
]


def check_refused(url, changes, param):
    status = 404 if param == "model" else 400
    error = completed(url, status, **{"messages": user("Hi"), **changes})["error"]
    assert error["param"] == param and error["message"], changes
    assert error["type"] == "invalid_request_error"


def test_a_wrong_request_is_told_which_field_is_wrong_and_harmless_ones_are_ignored(served):
    _, url = served
    for changes, param in WRONG_REQUESTS:
        check_refused(url, changes, param)
    ours = {"user": "me", "metadata": {}, "store": False, "presence_penalty": 0.0, "tools": [],
            "logit_bias": None, "service_tier": "auto", "model": "t", "tool_choice": "auto",
            "response_format": {"type": "text"}, "temperature": None, "made_up": 1,
            "max_tokens": 9, "logprobs": None, "max_completion_tokens": 2,
            "repetition_penalty": 1.0}  # fmt: skip
    assert completed(url, **ours)["usage"]["completion_tokens"] <= 2
    error = completed(url, 400, messages=user("word " * 500))["error"]
    assert error["code"] == "context_length_exceeded" and "128" in error["message"]


def test_the_oldest_turns_go_where_a_client_lets_them(served, tokenizer):
    _, url = served
    turns = [*user("What is it?" * 2), {"role": "assistant", "content": "It."}]
    talk = [{"role": "system", "content": "Be kind."}, *turns * 9, *user("And now?")]
    asked = {"max_tokens": 3, "temperature": 0}
    for refused in ({}, {"truncation": "disabled"}):
        error = completed(url, 400, messages=talk, **asked, **refused)["error"]
        assert error["code"] == "context_length_exceeded"
    body = completed(url, messages=talk, truncation="auto", **asked)
    lost = body["usage"]["forgotten_messages"]
    kept = completed(url, messages=[talk[0], *talk[1 + lost :]], **asked)
    assert lost % 2 == 0 and body["choices"] == kept["choices"]
    assert body["usage"]["prompt_tokens"] == kept["usage"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens"] <= 96, "a quarter of 128 is left to answer"
    more = common.render_prompt(tokenizer, [talk[0], *talk[lost - 1 :]])
    assert len(more) > 96, "no more went than had to"
    assert "forgotten_messages" not in completed(url, truncation="auto")["usage"]
    long = completed(url, 400, messages=user("word " * 400), truncation="auto")
    assert long["error"]["code"] == "context_length_exceeded", "a last message stays too long"


def test_an_answer_without_a_question_goes_alone(tokenizer):
    talk = [{"role": "assistant", "content": "Hello! " * 9}, *user("Hi"),
            {"role": "assistant", "content": "Yes?"}, *user("And?")]  # fmt: skip
    kept, prompt_ids = common.newest_turns(tokenizer, talk, 80)
    assert kept == talk[1:] and prompt_ids == common.render_prompt(tokenizer, kept)
    assert common.newest_turns(tokenizer, talk, 1000)[0] == talk
    assert common.newest_turns(tokenizer, talk, 4)[0] == talk[-1:]


def connected(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=60)


def raw(server, data):
    """Send bytes; return all that comes back, as text."""
    parts: list[bytes] = []
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        parts.extend(iter(lambda: connection.recv(65536), b""))
    return b"".join(parts).decode("latin-1")


BODY = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}'


def posted(*headers, body=BODY, version="1.1"):
    headers = headers or (f"Content-Length: {len(body)}",)
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def posted_json(**body):
    return posted(body=json.dumps({"messages": user("Hi"), **body}).encode())


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = HEALTH[:-2] + b"Connection: close\r\n\r\n"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SHAPES = [  # bytes, the statuses of the answers: what follows a doubtful request is not read
    (HEALTH * 2 + LAST, [200] * 3), (posted() + LAST, [200, 200]),
    (posted("Transfer-Encoding: chunked", body=CHUNKS) + LAST, [411]),
    (posted(LENGTH, "Transfer-Encoding: chunked") + LAST, [411]),
    (posted("Transfer-Encoding: gzip, chunked", body=CHUNKS) + LAST, [411]),
    (posted("Transfer-Encoding:", body=CHUNKS) + LAST, [411]),
    (posted(LENGTH, LENGTH) + LAST, [400]), (posted("Content-Length: -1") + LAST, [400]),
    (posted(f"Content-Length: {len(BODY)}, {len(BODY)}") + LAST, [400]),
    (posted(f"Content-Length: +{len(BODY)}") + LAST, [400]),
    (posted(f"Content-Length : {len(BODY)}") + LAST, [400]),
    (posted(f"Content-Length: {1 << 40}") + LAST, [413]), (posted("A: b") + LAST, [411]),
    (b"GET /health HTTP/1.1\r\n\r\n" + LAST, [400]),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n" + LAST, [400]),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n" + LAST, [403, 200]),
    (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + LAST, [200]),
    (HEALTH[:-2] + b"X: a\rContent-Length: 4\r\n\r\n" + LAST, [200, 200]),
    (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [404, 200]),
    (b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [405, 200]),
    (b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [405, 200]),
    (b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [200, 200]),
    (b"OPTIONS /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST, [200, 200]),
    (b"\x1b[31mX\x9b2J / HTTP/1.1\r\nHost: localhost\r\n\r\n", [501]),
    (b"nonsense\r\n\r\n", [400]), (b"GET / HTTP/9.9\r\n\r\n", [505]), (b"\r\n" + LAST, []),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", [414]),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", [431]),
    (posted(body=b"{]}") + LAST, [400, 200]), (posted(body=b'"\xff"') + LAST, [400, 200]),
    (posted(body=b"[]") + LAST, [400, 200]), (posted(body=b'{"n":NaN}') + LAST, [400, 200]),
    (posted(body=b"[" * 90000) + LAST, [400, 200]),
]  # fmt: skip


def test_odd_shapes_of_http_get_the_right_code_and_hide_no_second_request(served):
    server, _ = served
    for data, statuses in SHAPES:
        back = raw(server, data)
        found = [int(code) for code in re.findall(r"HTTP/1\.1 (\d+) ", back)]
        assert found == statuses, (data[:200], back[:600])
    until(lambda: any("501" in line for line in server.said))
    assert all(line.isascii() and line.isprintable() for line in server.said)  # on a terminal


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
    ("/v1/completions", {"prompt": ["A", "B"], "max_tokens": 2, "n": 2, "stop": "e"}),
]  # fmt: skip
JUNK: list[object] = [
    None, True, False, 0, -1, 1.5, 1e308, -1e-300, 10**400, 2**63, -(2**63) - 1, math.nan, math.inf,
    "", "\x00", "\ud800", "\udfff\ud800", "a" * 5000, "\u4e2d" * 300, "<|bos|>", [], {},
    [[]], [None], ["x"] * 600, {"": {}}, {"type": "text"}, {"type": []}, {"role": "user"},
    [{"role": {}}], "user",
    "NaN", "1", ["text"], {"a" * 3000: 1}, [0] * 2000, {"type": "text", "text": 3}, -0.0, 1e-9,
    1e-300, 1e-45,
]  # fmt: skip
LINES = [  # what may stand in place of the request line, Host, Content-Length, or further on
    [f"{method} {path} HTTP/{version}" for method in ("POST", "GET", "P\x00ST", "\xff", "X" * 3000)
     for path in ("/", "/health", "/metrics?x=\x00", "*", "//", "http://x/", "/" + "a" * 70000)
     for version in ("1.1", "1.0", "0.9", "9.9", "1.\xb2", "x", "1.1.1", "")],
    ["Host: " + host for host in ("", "[", "[::1", "[::1]:x", "a@localhost", "localhost:99999",
     "localhost/", "\xff", "\x00", "127.0.0.1:" + "9" * 5000, "1" * 5000, "::", "%00")],
    ["Content-Length: " + size for size in ("0", "1", "+5", "5 5", "5,5", "0x5", "", "\xd9\xa3",
     "1e1", "9" * 400, "\x00", "-1", f"{1 << 40}")] + ["Transfer-Encoding: chunked"] * 5,
    ["A: " + "b" * 70000, *["A: b\r\n" * 150, "A" * 3000 + ": b", ": b", "A : b", " folded"],
     "A: \x00", "A\x00: b", "A: \xff\x80", "A", "\x0b: 1", "Host: localhost", "Origin: \xff",
     "Connection: \xff", "Expect: 100-continue", "Expect: x", "Authorization: \xff \xff",
     "Transfer-Encoding: chunked", "Transfer-Encoding: x", "Content-Length: 1"],
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
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(list(places(body)) or [({"x": 0}, "x")])
        change, junk = rng.randrange(5), copy.deepcopy(rng.choice(JUNK))
        if change < 3:
            container[key] = junk
        elif change == 3:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice((*serve.UNSUPPORTED, "x", "\x00", "prompt"))] = junk
        else:
            container *= rng.choice((2, 30))
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    change = rng.randrange(12)
    if change == 0:  # deep
        deep = rng.choice((b"[", b'{"a":', b"[[1],")) * rng.choice((50, 5000, 60000))
        nested = b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}"
        data = rng.choice((deep, b'{"messages":' + deep, nested))
    elif change == 1:  # a name twice
        value = rng.choice((b"1", b"-1", b"1e999", b"01", b"9" * 5000))
        data = data[:-1] + b',"max_tokens":' + value + b"}"
    return fuzzed_bytes(rng, data) if change in (2, 3) else data


def fuzzed_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, much = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 20))
        odd = (rng.randbytes(much), b"\x00", b"\xff\xfe", b"\r\n", b"\n", b"\r", b"{", b'"', b"\\u")
        put = rng.choice(odd)
        data[at : at + rng.choice((0, much))] = rng.choice((b"", put, put, put * 20))
    return bytes(data)


def fuzzed_request(rng, path, body):
    """A request whose head, framing or bytes are wrong, and what follows it on the connection."""
    data, change = json.dumps(body).encode(), rng.randrange(10)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", ""]
    if change < 7:
        lines[change % 4] = rng.choice(LINES[change % 4])
    if "chunked" in lines[2]:
        data = rng.choice((CHUNKS, CHUNKS[:-2], b"-1\r\n", b"0\r\n" + b"a: b\r\n" * 200))
    whole = "\r\n".join([*filter(None, lines), "", ""]).encode("latin-1") + data
    if change == 7:
        whole = fuzzed_bytes(rng, whole)
    elif change == 8:
        more = (b"\x00" * 100, b"GET", b"\r\n\r\n", rng.randbytes(50), b"}" + whole, whole * 3)
        whole += rng.choice(more)
    elif change == 9:
        end = rng.choice((b"\n", b"\r", b"\r\n ", b"\r\n\r\n"))
        whole = whole.replace(b"\r\n", end, rng.choice((1, 99)))
    return whole + rng.choice((b"", LAST))


def fuzz_bodies(server, seed, count, codes):
    """Send bodies that are wrong in well-formed requests, many on one connection."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    for _ in range(count):
        path, body = rng.choice(FUZZED)
        data = fuzzed_json(rng, body)
        connection.request("POST", path, data)
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200 or 400 <= response.status < 500, (data[:500], text)
        codes[response.status] += 1
        if response.status >= 400:
            error = json.loads(text)["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}
        elif response.headers["Content-Type"].startswith("text/event-stream"):
            assert text.endswith(b"data: [DONE]\n\n") and b'"error"' not in text, text
        else:
            assert json.loads(text)["choices"]


def fuzz_framing(server, seed, count, codes):
    """Send what is no well-formed request, each on a connection of its own, to its end."""
    rng = random.Random(seed)
    for _ in range(count):
        data, began = fuzzed_request(rng, *rng.choice(FUZZED)), time.monotonic()
        with connected(server) as connection:
            connection.sendall(data)
            if rng.random() < 0.9:  # else it waits for what may come, and says so after a while
                connection.shutdown(socket.SHUT_WR)
            back = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert time.monotonic() - began < 30, data[:500]
        found = [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z -]*\r\n", back)]
        codes.update(found or ["closed" if not back else "no head"])
        for code in found:  # 501 and 505 are the right words for odd methods and versions
            assert code in (200, 100, 501, 505) or 400 <= code < 500, (data[:500], back)
        assert b'"error": {"message": "this request' not in back


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
    model = random_model(**served_shape(tokenizer, max_seq_len=64, n_layer=1))
    clients, codes = 4, collections.Counter()
    # one that waits for nobody, and one that does not close connections of busy clients
    with serving(tokenizer, 8, model) as (hasty, hasty_url), serving(tokenizer, 8, model) as (
        patient, url,
    ):  # fmt: skip

        def answers():
            asked = {"temperature": 0, "max_tokens": 8}
            return [completed(one, **asked)["choices"] for one in (url, hasty_url)]

        right = answers()
        hasty.settings.timeout_s = 0.25
        with concurrent.futures.ThreadPoolExecutor(2 * clients) as pool:
            each = count // 2 // clients
            runs = [pool.submit(fuzz, server, 100 * seed + i, each, codes) for i in range(clients)
                    for fuzz, server in ((fuzz_bodies, patient), (fuzz_framing, hasty))
            ]  # fmt: skip
            for run in concurrent.futures.as_completed(runs):
                run.result()
        hasty.settings.timeout_s = 30.0
        assert answers() == right
    assert "Traceback" not in capsys.readouterr().err
    assert codes[400] > count / 10 and codes[200] > count / 50, codes


def test_a_slow_sender_is_told_and_holds_no_thread_for_long(tokenizer):
    with serving(tokenizer, timeout_s=0.3) as (server, url):
        began, late = time.monotonic(), "HTTP/1.1 408 "
        assert raw(server, posted(LENGTH, body=BODY[:5])).startswith(late)
        assert raw(server, b"GET /health HT").startswith(late)
        told = raw(server, HEALTH + b"GET /health")
        assert told.startswith("HTTP/1.1 200 ") and told.count(late) == 1
        assert raw(server, b"") == "", "who says nothing hears nothing"
        with connected(server) as connection, contextlib.suppress(OSError):
            for _ in range(40):  # a byte now and then does not prolong it
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began < 10
        assert requests.get(url + "/health").status_code == 200


@pytest.mark.parametrize("leave", ["stream", "whole", "unread"])
def test_a_client_that_goes_away_or_does_not_read_frees_its_slot(tokenizer, leave):
    model = random_model(**served_shape(tokenizer, max_seq_len=4096, n_layer=1))
    with serving(tokenizer, 2, model, max_tokens=4000, timeout_s=0.5) as (server, url):
        engine, served = server.model.engine, server.model
        engine.stops.clear()
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections' too
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.server_port))
            connection.sendall(posted_json(stream=leave != "whole"))
            until(lambda: engine.decoding)
            assert served.unfinished == 1
            completed(url, max_tokens=2)  # beside it
            if leave != "unread":
                connection.close()
            until(lambda: not (served.unfinished or engine.load))
        assert served.generated_tokens < 3500, "it did not just run to its end"


def test_one_connection_too_many_is_told_so(tokenizer):
    with serving(tokenizer, max_connections=2) as (server, url):
        with connected(server) as one, connected(server) as two:
            for connection in (one, two):
                connection.sendall(HEALTH)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            back = raw(server, b"")
            assert back.startswith("HTTP/1.1 503 ") and "Retry-After: 1\r\n" in back
        until(lambda: server.free_connections._value == 2)
        assert requests.get(url + "/health").status_code == 200


def test_a_full_queue_is_said_and_those_in_it_are_answered(tokenizer):
    with serving(tokenizer, 1, max_waiting=1) as (server, url):
        engine, go = server.model.engine, threading.Event()
        step = engine.step
        engine.step = lambda: go.wait(60) and step()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = {"messages": user("Hi"), "max_tokens": 50}
            asking = [pool.submit(requests.post, url + "/v1/chat/completions", json=asked)
                      for _ in range(8)]  # fmt: skip
            until(lambda: sum(one.done() for one in asking) == 6)
            go.set()
            responses = [one.result() for one in asking]
        assert sorted(response.status_code for response in responses) == [200] * 2 + [429] * 6
        refused = next(r for r in responses if r.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert completed(url, 400, n=3)["error"]["param"] == "n", "they would never fit"
    with serving(tokenizer, 1, max_waiting=0) as (_, url), requests.Session() as session:
        for stream in (True, False) * 15:  # who has an answer has left the queue
            asked = {"messages": user("Hi"), "max_tokens": 2, "stream": stream}
            assert session.post(url + "/v1/chat/completions", json=asked).status_code == 200


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """Clients who ask, stop reading, go away and ask nonsense, and note what is wrong."""

    def __init__(self, server, url, known):
        self.server, self.url, self.known, self.wrong = server, url, known, []

    def client(self, seed, rounds):
        rng, session = random.Random(seed), requests.Session()
        acts = [self.whole, self.stream, self.leave, self.cancel, self.nonsense] * rounds
        try:
            for act in rng.sample(acts, len(acts)):
                act(rng, session, rng.choice(list(self.known)))
        except Exception as error:  # noqa: BLE001
            self.wrong.append(f"{act.__name__}: {error!r}")

    def ask(self, rng, session, text, **changes):
        """Ask until the queue has room."""
        asked = {"messages": user(text), "temperature": 0, "max_tokens": 20, **changes}
        path, capacity = self.url + "/v1/chat/completions", self.server.model.capacity
        while True:
            response = session.post(path, json=asked, stream=True, timeout=60)
            if response.status_code != 429:
                return response
            busy = int(response.json()["error"]["message"].split()[0])
            assert capacity - asked.get("n", 1) < busy <= capacity, "a refusal for want of room"
            time.sleep(rng.uniform(0.05, 0.3))

    def whole(self, rng, session, text):
        response = self.ask(rng, session, text, n=rng.choice((1, 1, 2)))
        for choice in response.json()["choices"]:
            assert choice["message"]["parts"] == self.known[text]

    def stream(self, rng, session, text):
        datas = self.ask(rng, session, text, stream=True).text.split("\n\n")[:-2]
        assert streamed(json.loads(data[6:]) for data in datas)[1] == self.known[text]

    def leave(self, rng, session, text):
        """Send a request, or a part of it, read a little of the answer, and be gone."""
        data = posted_json(messages=user(text), stream=rng.random() < 0.7, max_tokens=60)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.2 else data
        with connected(self.server) as connection:
            connection.sendall(data)
            connection.settimeout(rng.uniform(0.01, 0.3))
            with contextlib.suppress(TimeoutError):
                connection.recv(rng.randrange(1, 2000))
            if rng.random() < 0.5:  # a reset: the server's next read or write fails
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def cancel(self, rng, session, text):
        with self.ask(rng, session, text, stream=True, max_tokens=100) as response:
            for _ in zip(range(rng.randrange(1, 12)), response.iter_lines()):
                pass

    def nonsense(self, rng, session, text):
        check_refused(self.url, *rng.choice(WRONG_REQUESTS))


@pytest.mark.parametrize(
    ("clients", "rounds"), [(16, 3), pytest.param(64, 30, marks=pytest.mark.slow)]
)
def test_many_who_come_and_go_get_what_each_gets_alone_and_leave_nothing(
    tokenizer, clients, rounds, capsys
):
    texts = [f"{word} {number}?" for word in ("Who is", "Say") for number in range(6)]
    known = {text: reply_alone(tokenizer, user(text), 20)[1] for text in texts}
    with serving(tokenizer, 6, max_waiting=clients // 4) as (server, url):
        crowd, warm = Crowd(server, url, known), 0
        for seed in (0, clients):  # of which the first half warms up
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                for i in range(clients):
                    pool.submit(crowd.client, seed + i, rounds)
            assert not crowd.wrong, crowd.wrong[:5]
            warm = warm or resident_bytes()
        assert resident_bytes() - warm < max(30e6, 0.1 * warm)
        until(lambda: "requests_open 0" in requests.get(url + "/metrics").text)
        assert "nanochat_requests_waiting 0" in requests.get(url + "/metrics").text
        assert requests.get(url + "/health").json()["status"] == "ready"
        (choice,) = completed(url, messages=user(texts[0]), temperature=0, max_tokens=20)["choices"]
        assert choice["message"]["parts"] == known[texts[0]]
    assert "Traceback" not in capsys.readouterr().err


class ClosedPipe:
    """A log whose reader is gone."""

    def write(self, _):
        raise BrokenPipeError

    flush = write


def test_a_server_whose_steps_fail_says_so_and_goes_on(tokenizer, monkeypatch, capsys):
    with serving(tokenizer, 2) as (server, url):
        right = completed(url, temperature=0)["choices"]
        model, errors = server.model.engine.model, [RuntimeError(), Panic(), ZeroDivisionError()]
        del server.say  # the real one
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", ClosedPipe())
            for error in errors:
                assert requests.get(url + "/health").json()["status"] == "ready"
                patched.setattr(model, "logits", unittest.mock.Mock(side_effect=error))
                assert "again" in completed(url, 500, n=2)["error"]["message"]
            response = requests.get(url + "/health")
            assert (response.status_code, response.json()["status"]) == (503, "failing")
            asked = {"messages": user("Hi"), "stream": True}
            text = requests.post(url + "/v1/chat/completions", json=asked).text
            last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
            assert last["error"]["type"] == "server_error"
            assert "ZeroDivisionError" in capsys.readouterr().err
            patched.setattr(sys, "stderr", ClosedPipe())
            completed(url, 500)
        assert completed(url, temperature=0)["choices"] == right
        assert requests.get(url + "/health").status_code == 200
        server.model.stop()
        assert "engine has ended" in completed(url, 500)["error"]["message"]
        server.model.unfinished = 0  # of the request that nobody took
        out = capsys.readouterr().out
        assert re.search(r"^[0-9:]{8} 127\.0\.0\.1 GET /health 200 \d+\.\d\d s$", out, re.MULTILINE)
        server.say = server.said.append


def test_keys_origins_and_hosts_are_checked(tokenizer, base_dir):
    ours = "https://a.example"
    options = {
        "api_key": "secret",
        "cors_origin": ours,
        "allow_host": "b.example",
        "root_path": "/proxy/8/",
    }
    with serving(tokenizer, **options) as (_, url):
        path, right = url + "/v1/chat/completions", {"Authorization": "Bearer secret"}

        def status(**headers):
            asked = {"messages": user("Hi"), "max_tokens": 1}
            response = requests.post(path, json=asked, headers=headers)
            allowed = response.headers.get("Access-Control-Allow-Origin")
            assert allowed == (ours if headers.get("Origin") == ours else None)
            return response.status_code

        assert status() == status(Authorization="Bearer wrong") == 401
        assert status(Authorization="Basic secret") == 401 and status(**right) == 200
        for origin, code in (("https://evil.example", 403), ("null", 403), (url, 200), (ours, 200),
                             ("https://b.example:8", 200), ("https://b.example.evil.example", 403),
                             ("https://evil.example/b.example", 403)):  # fmt: skip
            assert status(**right, Origin=origin) == code
        for host, code in (("b.example", 200), ("B.example.:80", 200), ("c.example", 403),
                           ("10.1.2.3:5", 200), ("[::1]:80", 200),
                           ("10.1.2.3.evil.example", 403)):  # fmt: skip
            assert status(**right, Host=host) == code, host
        assert requests.get(url + "/health").status_code == requests.get(url).status_code == 200
        assert requests.get(url + "/v1/models").status_code == 401
        for below, code in (("/proxy/8", 200), ("/proxy/8/health", 200), ("/proxy/80/health", 404)):
            assert requests.get(url + below).status_code == code
        response = requests.get(url + "/report")  # a browser asks for the key as a password
        assert response.headers["WWW-Authenticate"].startswith("Basic ")
        for key, code in (("wrong", 401), ("secret", 404)):  # there is no report
            assert requests.get(url + "/report", auth=("me", key)).status_code == code
        for origin, code in ((ours, 200), ("https://evil.example", 403)):
            response = requests.options(path, headers={"Origin": origin})
            assert response.status_code == code
            allowed = response.headers.get("Access-Control-Allow-Headers")
            assert allowed == ("Authorization, *" if code == 200 else None)


def test_a_server_for_others_says_where_it_is_and_that_it_is_open(base_dir, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "getsockname", lambda _: ("192.168.1.5", 5))
        expected = ["http://127.0.0.1:80", "http://192.168.1.5:80"]
        assert serve.addresses("0.0.0.0", 80) == expected
        patched.setattr(socket.socket, "connect", unittest.mock.Mock(side_effect=OSError))
        assert serve.addresses("0.0.0.0", 80) == expected[:1]
        assert serve.addresses("::1", 80) == ["http://[::1]:80"]
    for key in ("", "secret"):
        with pytest.raises(common.Stop):
            serve.main(serve.Settings(host="0.0.0.0", port=0, tag="none", api_key=key))
        out = capsys.readouterr().out
        assert re.search(r"serve: http://127\.0\.0\.1:\d+\n", out)
        assert ("anyone who reaches this machine can use it" in out) == (not key)


def test_the_page_runs_its_own_script_alone_and_may_be_a_file(tokenizer, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(serve.PAGE, "utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", serve.PAGE)
    assert not re.findall(r"(?:src|href)=.?(?:https?:)?//", serve.PAGE)
    assert not re.findall(r"https?://[a-z0-9.]+", serve.PAGE)
    with serving(tokenizer, page=str(path)) as (_, url):
        for text in (serve.PAGE, "<script>one()</script>\u00e9", "<script>two()</script>"):
            path.write_text(text, "utf-8")  # it is read at each request
            response = requests.get(url)
            assert response.content.decode() == text
            script = re.search("<script>(.*)</script>", text, re.DOTALL)[1]
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            policy = response.headers["Content-Security-Policy"]
            assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        path.unlink()
        response = requests.get(url)
        assert response.status_code == 503 and "cannot be read" in response.text


def test_the_server_tells_how_it_is(served, base_dir):
    server, url = served
    response = requests.get(url + "/report")
    assert response.status_code == 404 and "evaluate.py --report --tag=main" in response.text
    common.run_dir("main").mkdir(parents=True)
    (common.run_dir("main") / "report.html").write_text("<h1>Report</h1>")
    assert requests.get(url + "/report").text == "<h1>Report</h1>"
    assert requests.get(url + "/health").json() == {
        "status": "ready", "tag": "main", "model": "t-sft", "stage": "sft", "device": "cpu"
    }  # fmt: skip
    config = requests.get(url + "/config").json()
    assert config["defaults"]["temperature"] == server.settings.temperature
    assert config["context"] == 128 and config["model"] == "t-sft" and not config["completes"]
    completed(url, max_tokens=3)
    label = 'nanochat_requests_total{path="/v1/chat/completions",code="200"}'
    until(lambda: label in requests.get(url + "/metrics").text)  # it is counted last
    lines = requests.get(url + "/metrics").text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    assert values[label] == values["nanochat_answers_total"] == 1 and values["nanochat_slots"] == 4
    assert values["nanochat_first_token_seconds_total"] <= values["nanochat_answer_seconds_total"]
    assert 1 <= values["nanochat_tokens_generated_total"] <= 3
    model, server.model = server.model, None
    assert requests.get(url + "/health").json()["status"] == "loading"
    completed(url, 503)
    server.model, server.draining = model, True
    assert requests.get(url + "/health").json()["status"] == "draining"
    completed(url, 503)


@contextlib.contextmanager
def serving_apart(*setup):
    """A server in a process of its own, which runs some code first; yields it, its address."""
    main = "serve.main(serve.Settings(tag='t', stage='base', port=0, device='cpu'))"
    command = [sys.executable, "-c", "\n".join(["import common, serve, time", *setup, main])]
    with (
        subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        try:
            url = next(line for line in process.stdout if "http" in line).split()[-1]
            yield process, url, functools.partial(pool.submit, completed, url)
        finally:
            process.kill()


def test_sigterm_ends_a_server_that_still_loads_at_once(base_dir):
    with serving_apart("serve.load = lambda _: time.sleep(60)") as (process, url, _):
        assert requests.get(url + "/health").json()["status"] == "loading"
        process.terminate()
        assert process.wait(10) == 0


def test_sigterm_waits_for_answers_and_a_second_signal_does_not(chat_run):
    slow = "whole = serve.Completion.whole\nserve.Completion.whole = lambda self: (" \
           "print('made', flush=True), time.sleep(1), whole(self))[2]"  # fmt: skip
    asked = {"path": "/v1/completions", "prompt": "The", "max_tokens": 2}
    with serving_apart(slow) as (process, url, submit):
        assert any("ready" in line for line in process.stdout)
        answer = submit(**asked)
        assert any("made" in line for line in process.stdout)
        process.terminate()  # the answer is not yet sent
        assert answer.result()["usage"]["completion_tokens"]
        assert re.search("POST /v1/completions 200 .* tok/s\n$", process.stdout.read())
        assert process.wait(20) == 0
    stuck = "common.Engine.step = lambda self: time.sleep(0.1) or []"
    with serving_apart(stuck) as (process, url, submit):
        assert any("ready" in line for line in process.stdout)
        answer = submit(**asked)
        until(lambda: "nanochat_requests_open 1" in requests.get(url + "/metrics").text)
        process.terminate()
        assert any("1 answers may end" in line for line in process.stdout)
        assert requests.get(url + "/health").json()["status"] == "draining"
        process.terminate()
        assert process.wait(5) == 0
        with pytest.raises(requests.ConnectionError):
            answer.result()


def test_weights_of_8_bits_are_served_and_no_compiler_stops_that(chat_run, monkeypatch, capsys):
    options = {"tag": "t", "stage": "base", "device": "cpu", "int8": True}
    failing = unittest.mock.Mock(side_effect=RuntimeError("no g++"))
    monkeypatch.setattr(common.Engine, "compile", failing)
    monkeypatch.setattr(serve, "compile_or_not", lambda choice, *_: choice == "yes")
    engine, stage, _ = serve.load(serve.Settings(compile="yes", **options))
    assert failing.called and "RuntimeError" in capsys.readouterr().out and stage == "base"
    assert engine.model.head.weight.dtype == torch.int8
    serve.load(serve.Settings(**options))
    assert failing.call_count == 1, "a small model is not compiled unasked"
    ids = [engine.tokenizer.bos, 5, 6]
    assert len(list(engine.generate(greedy(ids, 5)))) == 5
    chat_engine, *_ = chat.load(chat.Settings(**options))
    assert chat_engine.model.head.weight.dtype == torch.int8


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "n_layer": 3}])
def test_an_exported_model_is_the_same_to_transformers(
    tokenizer, tmp_path, changes, monkeypatch, capsys
):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat model")
    model = random_model(**CONFIGS["bare"], vocab_size=tokenizer.vocab_size, **changes)
    monkeypatch.setattr(serve, "load_for_answers", lambda _: (model, tokenizer, None))
    folder = tmp_path / "out"
    serve.main(serve.Settings(export=str(folder)))
    assert capsys.readouterr().out == f"written: {folder}\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    ids = torch.randint(model.config.vocab_size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The cat sat.", "  two  spaces\n\n\tand 12345 tabs", "don't WON'T",
                 "\u00e9\u4e2d\u6587 \U0001f600"):  # fmt: skip
        assert words.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert words.decode(tokenizer.encode(text)) == text
    talk = [{"role": "system", "content": "Be kind."}, *user("Hi"),
            {"role": "assistant", "content": "Yes?"}, *user("Bye")]  # fmt: skip
    rendered = words.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    ids = words.encode(rendered, add_special_tokens=False)
    assert ids == common.render_prompt(tokenizer, talk)
    assert words.eos_token_id == tokenizer.specials["<|assistant_end|>"]


def test_a_model_that_the_format_cannot_hold_is_not_exported(tokenizer, tmp_path):
    parts = {"smear": True, "skip": True, "bigram_rows": 64, "value_embeds": True, "qk_scale": 1.2,
             "window_pattern": "SL"}  # fmt: skip
    for name, value in parts.items():
        config = {**CONFIGS["bare"], "vocab_size": tokenizer.vocab_size, name: value}
        flag = f"train one with --[a-z-]*{name.replace('_', '-')}(=[01L])?$"
        with pytest.raises(common.Stop, match=flag):
            serve.export(tmp_path / "out", random_model(**config), tokenizer)
    assert not (tmp_path / "out").exists()


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
def talking(tokenizer, chromium, model, slots=1, color_scheme="light", **options):
    """A server of a model and its page; no error of the page's script is let pass."""
    permissions, errors = ["clipboard-read", "clipboard-write"], []
    with serving(tokenizer, slots, model, **{"max_tokens": 400, **options}) as (server, url):
        context = chromium.new_context(color_scheme=color_scheme, permissions=permissions,
                                       viewport={"width": 1024, "height": 768})  # fmt: skip
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("dialog", lambda dialog: dialog.accept("Renamed"))
        context.set_default_timeout(10_000)
        page = context.new_page()
        try:
            page.goto(url)
            yield server, url, page
            assert not errors
        finally:
            context.close()


def send(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page, number):
    """Wait for the answer with this number to be whole; return its element."""
    article = page.locator("article.assistant").nth(number)
    article.get_by_text("a second").wait_for()
    return article


def press(page, name):
    page.get_by_role("button", name=name).first.click()


def count(page):
    return page.locator("article").count()


@pytest.mark.browser
def test_the_page_asks_streams_and_keeps_what_was_said(tokenizer, chromium):
    text = "Hello **you**, <b>not bold</b> <script>document.title = 'owned'</script>\n\n- one\n" \
           "# Big\n\n```js\nx = 1\n  y\n```\nEnd."  # fmt: skip
    model = talker(tokenizer, "", text, pause=0.02)
    with talking(tokenizer, chromium, model) as (server, _, page):
        page.fill("#text", "<img src=x onerror=\"document.title='owned'\">")
        with page.expect_request("**/v1/chat/completions") as request:
            page.press("#text", "Enter")
        knobs = {"temperature", "top_k", "top_p", "max_tokens"}
        assert not knobs & request.value.post_data_json.keys(), "they are the server's to choose"
        lengths = set()
        while not page.get_by_text("a second").count():
            lengths.add(len(page.inner_text("article.assistant .said")))
        assert len(lengths) > 3, "it comes piece by piece"
        first = answered(page, 0)
        assert page.title() != "owned" and "<img" in page.inner_text("article.user")
        assert first.locator(".card").inner_text().split() == ["37*12", "=", "444"]
        assert first.locator("strong").all_inner_texts() == ["you", "Big"]
        assert "<b>not bold</b> <script>" in first.inner_text()
        assert first.locator("pre code").inner_text() == "x = 1\n  y"
        assert first.inner_text().endswith("a second, finished")
        for button, copied in (("Copy", "x = 1\n  y"), (".tools button", "[37*12 = 444] " + text)):
            button = first.get_by_text(button).first if button == "Copy" else first.locator(button)
            button.first.click()
            first.get_by_text("Copied").first.wait_for()
            assert page.evaluate("navigator.clipboard.readText()") == copied
            page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
            page.reload()  # without HTTPS there is another way; and what was said is kept
        model.pause = 0
        send(page, "And again?")
        assert answered(page, 1) and count(page) == 4
        page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
        assert page.input_value("#text") == "And again?"
        send(page, "Edited")
        answered(page, 1).get_by_role("button", name="Regenerate").click()
        assert answered(page, 1) and count(page) == 4
        assert page.locator("article.user").nth(1).inner_text().startswith("Edited")

        press(page, "Settings")  # they are used at once, and kept
        page.fill("#temperature", "1.5")
        page.fill("#max_tokens", "5")
        page.fill("#system", "Be kind.")
        page.keyboard.press("Escape")
        server.settings.top_k = 7
        for _ in range(2):
            with page.expect_request("**/v1/chat/completions") as request:
                send(page, "Short")
            body = request.value.post_data_json
            page.locator("#log").get_by_text("5 tokens").last.wait_for()
            assert body["messages"][0] == {"role": "system", "content": "Be kind."}
            chosen = {name: body[name] for name in knobs & body.keys()}
            assert chosen == {"temperature": 1.5, "max_tokens": 5}
            page.reload()
            until(lambda: page.input_value("#top_k") == "7")
        press(page, "Settings")
        press(page, "Back to the server's values")
        assert page.input_value("#max_tokens") == "400" and not page.input_value("#system")
        page.keyboard.press("Escape")

        with page.expect_download() as download:
            press(page, "Export")
        assert "**Answer:** [37*12 = 444] Hello" in Path(download.value.path()).read_text()
        press(page, "New chat")
        assert count(page) == 0 and page.locator("#chats li").count() == 2
        for wanted, found in (("again?", 0), ("edited", 1)):
            page.fill("#find", wanted)
            assert page.locator("#chats li").count() == found
        page.locator("#chats li button").first.click()
        assert count(page) == 8
        page.locator("#chats li button[title=Rename]").click()
        page.fill("#find", "")
        assert page.locator("#chats").get_by_text("Renamed").count() == 1
        press(page, "Delete Renamed")
        assert page.locator("#chats li").count() == 1 and count(page) == 0


@pytest.mark.browser
def test_the_page_says_what_went_wrong_and_loses_nothing(tokenizer, chromium, monkeypatch):
    connections, setup = [], serve.Handler.setup
    monkeypatch.setattr(serve.Handler, "setup",
                        lambda self: connections.append(self.request) or setup(self))  # fmt: skip
    model = talker(tokenizer, "word " * 60)
    with talking(tokenizer, chromium, model, max_waiting=0, api_key="secret",
                 max_messages=8) as (server, url, page):  # fmt: skip
        trouble, notice = page.locator(".trouble"), page.locator("#notice")
        send(page, "One")
        trouble.get_by_text("wants its key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        for key, words in (("\u0161ecret", "odd characters"), ("secret", "word")):
            if not page.is_visible("#key"):
                press(page, "Settings")
            page.fill("#key", key)
            page.keyboard.press("Escape")
            press(page, "Try again")
            page.locator("article.assistant").get_by_text(words).wait_for()
        assert answered(page, 0) and count(page) == 2 and page.inner_text("#send") == "Send"

        long = "many words " * 2000
        send(page, long)
        trouble.get_by_text("too long").wait_for()
        page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
        assert page.input_value("#text") == long, "nothing that was typed is lost"
        send(page, "Two")
        answered(page, 1)
        server.draining = True  # what is to be replaced stays until something has come
        press(page, "Regenerate")
        trouble.get_by_text("shutting down").wait_for()
        assert count(page) == 4 and page.get_by_text("word word").count() == 2
        press(page, "Edit")
        send(page, "Half")
        trouble.get_by_text("shutting down").wait_for()
        assert count(page) == 4 and page.input_value("#text") == "Half"
        server.draining = False
        press(page, "Try again")
        answered(page, 1)
        assert page.locator(".trouble").count() == 0

        model.pause = 0.05
        send(page, "Three")
        page.locator("article.assistant").nth(2).get_by_text("word").wait_for()
        right = {"Authorization": "Bearer secret"}
        completed(url, 429, headers=right)
        press(page, "Stop")
        page.get_by_text("stopped", exact=True).wait_for()
        until(lambda: not server.model.unfinished)  # the slot is free
        press(page, "Regenerate")
        page.locator("article.assistant").nth(2).get_by_text("word").wait_for()
        with page.expect_request("**/config"):
            for connection in connections:  # the connection breaks
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            trouble.get_by_text("cannot be reached").wait_for()
        until(lambda: not server.model.unfinished)
        asked = {"messages": user("Hi"), "stream": True}  # somebody else is answered
        with requests.post(url + "/v1/chat/completions", json=asked, stream=True,
                           headers=right) as response:  # fmt: skip
            next(response.iter_lines())
            press(page, "Try again")
            trouble.get_by_text("Many people").wait_for()
        until(lambda: not server.model.unfinished)
        model.pause = 0
        press(page, "Try again")
        for number, text in enumerate(("Three", "Four", "Five", "Six"), 2):
            if number > 2:
                send(page, text)
            note = answered(page, number).inner_text()
        assert "messages forgotten" in note, "a conversation goes on without end"

        page.route("**/config", lambda route: route.abort())
        page.reload()
        notice.get_by_text("cannot be reached").wait_for()
        served, server.model = server.model, None
        page.unroute("**/config")
        notice.get_by_text("loading its model").wait_for()
        server.model = served
        notice.wait_for(state="hidden")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1440, "dark")])
def test_the_page_fits_phones_and_wide_screens_in_light_and_dark(
    tokenizer, chromium, width, scheme
):
    fine = talker(tokenizer, "Fine.")
    with talking(tokenizer, chromium, fine, color_scheme=scheme) as (*_, page):
        page.set_viewport_size({"width": width, "height": 844})
        send(page, "Hi there, a rather long message that must wrap on a phone " * 3)
        answered(page, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", shade)[:3])) > 384) == (scheme == "light")
        chats = page.locator("#chats")
        assert chats.is_visible() == (width > 720)
        for close in (
            lambda: page.keyboard.press("Escape"), lambda: page.mouse.click(width - 10, 600),
            lambda: page.locator("#chats li.now > button").first.click(),
        ) if width < 720 else ():  # fmt: skip
            page.click("#menu")
            assert chats.is_visible()
            close()
            assert not chats.is_visible() and count(page) == 2


@pytest.mark.browser
def test_two_tabs_keep_each_others_conversations(tokenizer, chromium):
    with talking(tokenizer, chromium, talker(tokenizer, "Fine."), 2) as (_, url, page):
        other = page.context.new_page()
        other.goto(url)
        for tab, text in ((page, "First"), (other, "Second")):
            press(tab, "New chat")
            send(tab, text)
            answered(tab, 0)
        third = page.context.new_page()
        third.goto(url)
        third.locator("#chats").get_by_text("First").click()
        press(page, "Edit")
        page.fill("#text", "kept")
        send(third, "More")
        answered(third, 1)
        page.locator("article.user").nth(1).get_by_text("More").wait_for()
        assert page.input_value("#text") == "kept" and page.locator(".editing").count() == 1
        press(third, "Edit")
        send(third, "Moved")  # the message that is edited is no more: what was typed is a draft
        page.locator("article.user").first.get_by_text("Moved").wait_for()
        assert page.input_value("#text") == "kept" and page.locator(".editing").count() == 0
        page.fill("#text", "")
        third.close()
        for tab, now in ((page, "First"), (other, "Second")):
            for _ in range(2):
                names = tab.locator("#chats li > button:first-child").all_inner_texts()
                assert sorted(names) == ["First", "Second"]
                assert tab.inner_text("#title") == now and count(tab) == 2
                tab.reload()
        press(page, "Settings")
        page.fill("#max_tokens", "77")
        until(lambda: other.input_value("#max_tokens") == "77")
        page.keyboard.press("Escape")
        press(page, "Delete Second")  # there it is open
        other.locator("#title").get_by_text("First").wait_for()


@pytest.mark.browser
def test_what_has_streamed_can_be_used_while_more_comes(tokenizer, chromium):
    model = talker(tokenizer, "```js\nx = 1\n  y\n```\n" + "word word\n" * 99, pause=0.02)
    with talking(tokenizer, chromium, model, 2, max_tokens=900) as (*_, page):
        send(page, "Other")
        press(page, "Stop")
        page.get_by_text("stopped", exact=True).wait_for()
        press(page, "New chat")
        page.set_viewport_size({"width": 1024, "height": 300})
        send(page, "Go")
        page.get_by_text("word word").wait_for()
        article, code = page.locator("article.assistant"), page.locator("article pre code")
        assert article.get_attribute("aria-busy") == "true"
        code.select_text()
        code.evaluate("(element) => window.was = element")
        enough = len(article.inner_text()) + 150  # more than a screen
        while len(article.inner_text()) < enough:
            page.wait_for_timeout(50)
        assert page.evaluate("window.was.isConnected && String(getSelection())") == "x = 1\n  y"
        page.evaluate("document.getElementById('log').scrollTop = 0")
        page.wait_for_timeout(200)
        assert page.evaluate("document.getElementById('log').scrollTop") == 0, "it is read there"
        page.locator("article pre button").click(delay=200)
        page.locator("#state").get_by_text("Copied").wait_for(state="attached")
        page.locator("#chats").get_by_text("Other").click()  # looking around costs no answer
        assert page.inner_text("#title") == "Other" and page.inner_text("#send") == "Send"
        entry = page.locator("#chats li > button:first-child", has_text="Go")
        entry.click()
        assert page.inner_text("#send") == "Stop"
        entry.focus()
        model.pause = 0
        assert answered(page, 0).inner_text().count("word") > 190
        assert page.evaluate("document.activeElement.textContent") == "Go"
        assert article.get_attribute("aria-busy") is None
        model.pause = 0.02
        press(page, "Regenerate")
        page.get_by_text("word word").wait_for()
        page.reload()  # what has come is kept
        assert "word word" in page.inner_text("article.assistant")
