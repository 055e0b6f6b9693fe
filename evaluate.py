"""Measure a model: bits per byte, the world's facts, samples; and the machine, with --bench.

Usage:   python evaluate.py -i base                         # every task that has its data
         python evaluate.py -i base -a bpb
         python evaluate.py --bench --tag=bench             # the table of `bash run.sh bench`
Reads:   runs/TAG/{tokenizer,STAGE}/, data/SOURCE/          # the stages, prepare.py
Writes:  runs/TAG/eval/STAGE.json; bench.json with --bench
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import (
    GPT,
    Engine,
    GPTConfig,
    KVCache,
    MissingInput,
    Run,
    Sampling,
    Tokenizer,
    all_sum,
    base_dir,
    check_name,
    data_dir,
    evaluate_bpb,
    find_checkpoint,
    list_shards,
    load_model,
    measure_matmul,
    parse_settings,
    pick_dtype,
    read_meta,
    read_texts,
    run_dir,
    setting,
    start_run,
    stream_text,
    world,
    write_json,
)

# 1. Settings ---------------------------------------------------------------------------------

TASKS = ("bpb", "facts", "samples")


@dataclass
class Settings:
    stage: str = setting("base", "which model of the run", short="i", choices=("base",))
    task: str = setting("", "one task; empty = all that have data", short="a", choices=("", *TASKS))
    tag: str = setting("main", "name of the run, a folder below runs/")
    step: int = setting(0, "checkpoint to load; 0 = the newest")
    source: str = setting("", "folder below data/ with the text; empty = the model's")
    max_documents: int = setting(20_000, "documents of each split for bits per byte at most")
    max_items: int = setting(0, "items of a task; 0 = all")
    device_batch_size: int = setting(0, "rows of one forward pass; 0 = what fits")
    bench: bool = setting(False, "measure decoding and print the table of the tag's runs")
    seed: int = setting(0, "of the samples")
    device: str = setting("", "cuda, mps or cpu; empty = the best present")
    dtype: str = setting(
        "", "of activations; empty = bfloat16 where fast", choices=("", "float32", "bfloat16")
    )
    restart: bool = setting(False, "evaluate again what is already evaluated")

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")


# 2. Scores -----------------------------------------------------------------------------------


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927): sound also near 0 and 1."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, z * z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(right: int, total: int, examples: dict[str, list]) -> dict[str, Any]:
    """Make the record of a task scored by right answers."""
    low, high = wilson_interval(right, total)
    return {"score": right / max(1, total), "low": low, "high": high, "items": total,
            "examples": examples}  # fmt: skip


# 3. Bits per byte ----------------------------------------------------------------------------


def evaluate_text(model: GPT, tokenizer: Tokenizer, source: str, s: Settings) -> dict[str, Any]:
    """Measure bits per byte on validation documents and on as many of training."""
    texts = {split: itertools.chain.from_iterable(map(read_texts, list_shards(source, split)))
             for split in ("val", "train")}  # fmt: skip
    rows = batch_rows(model.config, s)
    results, documents = {}, s.max_documents
    for split, all_texts in texts.items():
        part = itertools.islice(all_texts, documents)
        bpb, documents = evaluate_bpb(model, tokenizer, part, rows)
        results[f"{split}_bpb"] = {"score": bpb, "items": documents}
    return results


def batch_rows(config: GPTConfig, settings: Settings) -> int:
    """Choose the rows of a forward pass: about 16,384 positions."""
    return settings.device_batch_size or max(1, 16384 // config.max_seq_len)


# 4. The world's facts ------------------------------------------------------------------------


@torch.inference_mode()
def complete_greedily(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], max_tokens: int
) -> Iterator[tuple[int, str]]:
    """Yield (index, continuation) of prompts: the likeliest tokens, batched by equal length."""
    device = model.embed.weight.device
    encoded = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for length, group in itertools.groupby(order, key=lambda i: len(encoded[i])):
        members = list(group)
        steps = min(max_tokens, model.config.max_seq_len - length)
        for part in (members[i : i + 256] for i in range(0, len(members), 256)):
            cache = KVCache(model.config, len(part), device, model.dtype)
            ids = torch.tensor([encoded[i] for i in part], device=device)
            chosen = []
            for _ in range(steps):
                ids = model.logits(model.hidden(ids, cache)[:, -1:]).argmax(-1)  # (rows, 1)
                chosen.append(ids)
            for i, row in zip(part, torch.cat(chosen, 1).tolist()):
                end = row.index(tokenizer.bos) if tokenizer.bos in row else len(row)
                yield i, "".join(stream_text(tokenizer, row[:end]))


def starts_with_answer(text: str, answers: Iterable[str]) -> bool:
    """Say whether text begins with one of the answers as whole words."""
    words = (rf"{re.escape(answer.strip())}(?!\w)" for answer in answers)
    return any(re.match(word, text.lstrip()) for word in words)


def evaluate_facts(model: GPT, tokenizer: Tokenizer, source: str, s: Settings) -> dict[str, Any]:
    """Score completions of the facts' statements, in trained wordings and in held-out ones."""
    results = {}
    rank, world_size = world()
    for path in sorted((data_dir(source) / "eval").glob("facts_*.jsonl")):
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        items = items[: s.max_items or len(items)]
        mine = items[rank::world_size]
        longest = max((len(tokenizer.encode(i["answer"])) for i in mine), default=1) + 2
        right, examples = 0, {"right": [], "wrong": []}
        relations: dict[str, list[int]] = {}
        for i, text in complete_greedily(model, tokenizer, [m["prompt"] for m in mine], longest):
            good = starts_with_answer(text, mine[i]["accept"])
            right += good
            counts = relations.setdefault(mine[i]["relation"], [0, 0])
            counts[0], counts[1] = counts[0] + good, counts[1] + 1
            kept = examples["right" if good else "wrong"]
            if len(kept) < 5:
                kept.append(
                    {"prompt": mine[i]["prompt"], "text": text, "answer": mine[i]["answer"]}
                )
        device = model.embed.weight.device
        right, total = map(int, all_sum(torch.tensor([right, len(mine)], device=device)).tolist())
        results[path.stem] = {**score(right, total, examples), "relations": relations}
    return results


# 5. Samples ----------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "The opposite of hot is",
    "Once upon a time",
    "In the morning",
    "There are many ways to",
)


def write_samples(model: GPT, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Complete a few prompts, greedily and sampled, and measure the rate."""
    engine = Engine(model, tokenizer)
    texts, tokens, start = [], 0, time.perf_counter()
    for prompt, temperature in itertools.product(PROMPTS, (0.0, 0.8)):
        sampling = Sampling(max_tokens=64, temperature=temperature, top_k=50, seed=seed)
        ids = list(engine.generate([tokenizer.bos, *tokenizer.encode(prompt)], sampling))
        tokens += len(ids)
        texts.append({"prompt": prompt, "temperature": temperature, "text": tokenizer.decode(ids)})
    return {"samples": texts, "decode_tok_per_s": tokens / (time.perf_counter() - start)}


# 6. Bench ------------------------------------------------------------------------------------


def bench_decoding(depth: int, vocab_size: int, run: Run, dtype: torch.dtype) -> dict[str, float]:
    """Measure prefill and batch-1 decoding of a random model of `depth`, in tokens/s."""
    config = GPTConfig(vocab_size, depth, 64 * depth, max(1, depth // 2), max(1, depth // 2), 1024)
    model = GPT.create(config, run.device, dtype).cast_weights()
    with torch.inference_mode():
        cache = KVCache(config, 1, run.device, dtype)
        prompt = torch.randint(vocab_size, (1, 512), device=run.device)
        times = []
        for ids in (prompt, *(prompt[:, i : i + 1] for i in range(64))):
            start = time.perf_counter()
            model.logits(model.hidden(ids, cache)[:, -1:]).argmax(-1).item()
            times.append(time.perf_counter() - start)
            if len(times) == 1:  # once more, warm
                cache.length = 0
                start = time.perf_counter()
                model.logits(model.hidden(ids, cache)[:, -1:]).argmax(-1).item()
                times[0] = time.perf_counter() - start
    decode = sorted(times[1:])[len(times) // 2]  # the median
    return {"prefill_tok_per_s": 512 / times[0], "decode_tok_per_s": 1 / decode}


def training_rates(tag: str) -> dict[str, float]:
    """Return the median training rate and MFU of a run, from its later log lines."""
    path = run_dir(tag) / "metrics.jsonl"
    if not path.exists():
        raise MissingInput(f"{path} is missing: `bash run.sh bench` makes it")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["stage"] == "base" and "tok_per_s" in line]
    lines = lines[len(lines) // 2 :]
    config = read_meta(find_checkpoint(tag, "base"))
    name = f"pretraining d{config['config']['n_layer']} {config['dtype']}"
    return {
        f"{name}, tokens/s": sorted(line["tok_per_s"] for line in lines)[len(lines) // 2],
        f"{name}, MFU %": 100 * sorted(line["mfu"] for line in lines)[len(lines) // 2],
    }


def print_bench(run: Run, settings: Settings) -> dict[str, Any]:
    """Collect the tag's measures and those of decoding, print them and write bench.json."""
    tokenizer = Tokenizer.load(run_dir(settings.tag) / "tokenizer")
    measures = tokenizer.info["measures"]
    fp32 = max(measure_matmul(run.device, torch.float32, 1024, 20) for _ in range(3)) / 1e9
    rows: dict[str, float] = {
        "fp32 matmul, GFLOP/s": fp32,
        "tokenizer training, M characters/s": measures["train_chars_per_s"] / 1e6,
        "encoding on one thread, k tokens/s": measures["encode_tokens_per_s"] / 1e3,
    }
    for tag in (settings.tag, f"{settings.tag}-fp32"):
        rows |= training_rates(tag)
    for name in [name for name in rows if "tokens/s" in name and "pretraining" in name]:
        rows[f"{name} a GFLOP/s of fp32 matmul"] = rows[name] / fp32
    dtype = pick_dtype(run.device, settings.dtype)
    for depth in (4, 12):
        for name, value in bench_decoding(depth, tokenizer.vocab_size, run, dtype).items():
            rows[f"d{depth} {name.split('_')[0]} {str(dtype)[6:]}, tokens/s"] = value
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    run.say(f"| {machine}, torch {torch.__version__} | |\n| --- | ---: |")
    for name, value in rows.items():
        run.say(f"| {name} | {value:,.1f} |")
    write_json(base_dir() / "bench.json", {"machine": machine, "torch": torch.__version__, **rows})
    run.say(f"written: {base_dir() / 'bench.json'}")
    return rows


# 9. Main -------------------------------------------------------------------------------------


def show(run: Run, name: str, record: dict[str, Any]) -> None:
    """Print a score as one line."""
    if "low" in record:
        low, high = 100 * record["low"], 100 * record["high"]
        run.say(f"{name:16} {100 * record['score']:6.2f} %  [{low:.1f}, {high:.1f}]  "
                f"{record['items']:,} items")  # fmt: skip
    else:
        run.say(f"{name:16} {record['score']:6.4f}  {record['items']:,} documents")


def main(settings: Settings) -> dict[str, Any]:
    """Run the tasks that are not done for this checkpoint yet; return all its results."""
    with start_run("eval", settings) as run:
        if settings.bench:
            return print_bench(run, settings)
        folder = find_checkpoint(settings.tag, settings.stage, settings.step)
        tokenizer = Tokenizer.load(run_dir(settings.tag) / "tokenizer")
        source = settings.source or read_meta(folder)["source"]
        out: Path = run_dir(settings.tag) / "eval" / f"{settings.stage}.json"
        asked = {"checkpoint": folder.name, "source": source, "max_items": settings.max_items,
                 "max_documents": settings.max_documents, "seed": settings.seed}  # fmt: skip
        report: dict[str, Any] = {**asked, "tasks": {}, "done": []}
        if out.exists() and not settings.restart:
            saved = json.loads(out.read_text("utf-8"))
            if all(saved.get(key) == value for key, value in asked.items()):
                report = saved
        dtype = pick_dtype(run.device, settings.dtype)
        model = load_model(folder, run.device, dtype).cast_weights()
        for task in [settings.task] if settings.task else TASKS:
            if task not in report["done"]:
                if task == "bpb":
                    report["tasks"] |= evaluate_text(model, tokenizer, source, settings)
                elif task == "facts":
                    report["tasks"] |= evaluate_facts(model, tokenizer, source, settings)
                else:
                    report |= write_samples(model, tokenizer, settings.seed)
                report["done"].append(task)
                if run.rank == 0:
                    write_json(out, report)
        run.say(f"{settings.stage} {folder.name} on {source}:")
        for name, record in report["tasks"].items():
            show(run, name, record)
        for item in report.get("samples", []):
            run.say(f"  {item['prompt']}|{item['text']!r}")
        run.say(f"written: {out}")
    return report


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
