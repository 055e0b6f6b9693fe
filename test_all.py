"""All tests: CPU, offline, a few minutes. Run with `bash run.sh test [pytest options]`.

Marks: gpu (needs a CUDA device), slow (minutes), browser (needs Chromium). Parts that need the
public data in ../shared/data skip where it is absent. Each part is held against an independent
oracle: a plain version, torch's own, transformers, regex, another batch shape, an unbroken run.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nanochat_bpe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chat
import common
import evaluate
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
    assert "C++ compiler" in said[2] and len(said) == 5


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
    first = common.Step(0, 10, 0)
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
     ("Paris, France", True), (" 12", False), (" Lyon.", True)],
)  # fmt: skip
def test_an_answer_is_a_whole_word(text, good):
    assert evaluate.starts_with_answer(text, [" Paris", "Lyon"]) == good


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
