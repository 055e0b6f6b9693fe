"""Measure a model, any stage of it, on all there is data for; and the machine, with --bench.

Usage:   python evaluate.py -i base                         # every task that has its data
         python evaluate.py -i sft -a GSM8K,ARC-Easy --max-items=200
         python evaluate.py -i sft -a HumanEval --run-code  # runs what the model wrote
         torchrun --nproc_per_node=8 evaluate.py -i base -a CORE
         python evaluate.py --bench=speed --tag=bench       # the table of `bash run.sh bench`
         python evaluate.py --report                        # of all stages, and their training
Reads:   runs/TAG/{tokenizer,STAGE}/, data/SOURCE/, data/eval/  # the stages, prepare.py
Writes:  runs/TAG/eval/STAGE.json; bench.json with --bench; report.md, report.html with --report
Method:  CORE is the mean of 22 centred accuracies, arXiv:2406.11794
"""

from __future__ import annotations

import bisect
import collections
import html
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common import (
    GPT,
    GPUS,
    STAGES,
    Engine,
    GPTConfig,
    KVCache,
    Linear,
    MissingInput,
    Request,
    Run,
    Sampling,
    Stop,
    Tokenizer,
    all_sum,
    any_rank,
    at_least,
    base_dir,
    can_compile,
    check_name,
    crc32,
    data_dir,
    evaluate_bpb,
    find_checkpoint,
    format_count,
    format_duration,
    grade,
    in_fewer_rows,
    list_checkpoints,
    list_shards,
    load_model,
    measure_matmul,
    memory_bytes,
    parent_key,
    parse_settings,
    pick_dtype,
    read_conversations,
    read_log,
    read_meta,
    read_texts,
    render_prompt,
    reply_parts,
    reply_text,
    run_code,
    run_dir,
    run_tokenizer,
    setting,
    start_run,
    step_name,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------

FACT_SETS = ("facts_trained", "facts_unseen")
# Sets of conversations, and the tokens that a reply to one may take; at 1, and from a base model,
# which does not reply, the likeliest of the letters counts, and of "letters" the likeliest line
WORLD_SETS = {
    "letters": 64, "facts": 64, "never_asked": 64, "stories": 64, "problems_numbers": 192,
    "problems_combinations": 192, "problems_practised": 192, "problems_new": 192,
    "spelling": 128, "identity": 96, "unknown": 64,
}  # fmt: skip
PUBLIC_SETS = {
    "ARC-Easy": 1, "ARC-Challenge": 1, "MMLU": 1, "GSM8K": 512, "HumanEval": 512,
    "SpellingBee": 512,
}  # fmt: skip
TASKS = ("bpb", *FACT_SETS, *WORLD_SETS, *PUBLIC_SETS, "CORE", "samples")
GROUPS = {
    "world": tuple(WORLD_SETS),
    "public": tuple(PUBLIC_SETS),
    **{task.lower(): (task,) for task in TASKS},
}


@dataclass
class Settings:
    stage: str = setting("base", "which model of the run", short="i", choices=STAGES)
    task: str = setting(
        "",
        f"tasks, between commas: {', '.join(TASKS)}; world and public name their conversations; "
        "empty = what suits the stage and has its data",
        short="a",
    )
    tag: str = setting("main", "name of the run, a folder below runs/")
    step: int = setting(0, "checkpoint to load; 0 = the newest")
    source: str = setting("", "folder below data/ with text and sets; empty = the model's own")
    max_documents: int = setting(
        0, "documents for bits per byte at most; 0 = all of validation, and as many of training"
    )
    max_items: int = setting(0, "items of a task; 0 = all")
    run_code: bool = setting(
        False, "HumanEval too: runs programs that the model wrote, in common.py's sandbox"
    )
    device_batch_size: int = setting(0, "rows of one forward pass; 0 = what fits")
    bench: str = setting(
        "",
        "speed: measure decoding and print the table of the tag's runs; learn: train models for "
        "equal times with and without each choice; gpu: train for some steps what a GPU is for",
        choices=("", "speed", "learn", "gpu"),
    )
    bench_seconds: int = setting(480, "of training in the comparisons of --bench=learn")
    bench_seeds: int = setting(3, "runs of each depth; one with each choice, a quarter long")
    report: bool = setting(False, "write the run's report.md and report.html from what is on disk")
    cost_per_hour: float = setting(0.0, "price of the machine in USD, for the report; 0 = free")
    seed: int = setting(0, "of the samples")
    device: str = setting("", "cuda, xpu, mps or cpu; empty = the best present")
    dtype: str = setting(
        "",
        "of activations; empty = bfloat16 or float16 where fast",
        choices=("", "float32", "bfloat16", "float16"),
    )
    restart: bool = setting(False, "evaluate again what is already evaluated")

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        if self.source:
            check_name(self.source, "--source")
        at_least(
            self, 0, "max_documents", "max_items", "device_batch_size", "cost_per_hour", "seed"
        )
        at_least(self, 1, "bench_seeds", "bench_seconds")
        if "HumanEval" in self.asked() and not self.run_code:
            raise ValueError("HumanEval runs programs that the model wrote: allow it by --run-code")

    def asked(self) -> list[str]:
        """List the tasks of --task in their own spelling."""
        names = [name.strip() for name in self.task.split(",") if name.strip()]
        for name in names:
            if name.lower() not in GROUPS:
                raise ValueError(f"--task {name!r} is none of {', '.join(TASKS)}, world, public")
        return [task for name in names for task in GROUPS[name.lower()]]


def default_tasks(stage: str) -> list[str]:
    """List the tasks that suit a stage: a base model completes, the others converse."""
    if stage == "base":
        return ["bpb", *FACT_SETS, "CORE", "samples"]
    return ["bpb", *WORLD_SETS, *PUBLIC_SETS]


# 2. Scores -----------------------------------------------------------------------------------

EXAMPLES = 3  # right ones of a task, and as many wrong ones
UNKNOWN = re.compile(r"\b(?:do not|don['\u2019]t) know\b", re.IGNORECASE)


@dataclass(frozen=True)
class Graded:
    """One item's outcome, in the words that the report shows."""

    index: int  # of the item
    right: bool
    question: str
    reply: str
    answer: str
    cut: bool = False  # the prompt was longer than the context and lost its beginning


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927): sound also near 0 and 1."""
    if not total:
        return 0.0, 1.0
    z = 1.96
    share, z2 = right / total, z * z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def kind_of(item: dict[str, Any]) -> str:
    """Return what sort of question an item is, within its task."""
    return item.get("relation") or item.get("kind") or ""


def tally(run: Run, name: str, items: list[dict], outcomes: Iterable[Graded]) -> dict[str, Any]:
    """Make a task's record: each rank counts the outcomes of its share, the counts are summed.

    Rank 0 shows progress and gives the examples, as unlike in kind as there are.
    """
    kinds = sorted(set(map(kind_of, items)))
    counts = torch.zeros(len(kinds), 4, dtype=torch.int64)  # right, all, said "unknown", cut
    kept: dict[bool, list[Graded]] = {True: [], False: []}
    mine = len(range(run.rank, len(items), run.world_size))
    start = shown = time.perf_counter()
    for done, outcome in enumerate(outcomes, 1):
        unknown = UNKNOWN.search(outcome.reply) is not None
        row = counts[kinds.index(kind_of(items[outcome.index]))]
        row += torch.tensor([outcome.right, True, unknown, outcome.cut])
        kept[outcome.right].append(outcome)
        if run.stopping and run.world_size == 1:
            raise KeyboardInterrupt
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            rate = done / (shown - start)
            run.say(f"{name:35} {done:,}/{mine:,}  {rate:.1f} items/s  "
                    f"left {format_duration((mine - done) / rate)}")  # fmt: skip
    by_kind = all_sum(counts.to(run.device)).tolist()
    right, total, unknown, cut = map(sum, zip(*by_kind)) if kinds else (0, 0, 0, 0)
    low, high = wilson_interval(right, total)
    return {
        "score": right / max(1, total), "low": low, "high": high, "items": total,
        "seconds": time.perf_counter() - start, "unknown_said": unknown / max(1, total),
        "cut": cut, "kinds": {kind: row[:2] for kind, row in zip(kinds, by_kind) if kind},
        "examples": {key: pick_examples(items, kept[good])
                     for key, good in (("right", True), ("wrong", False))},
    }  # fmt: skip


def pick_examples(items: list[dict], outcomes: list[Graded]) -> list[dict[str, str]]:
    """Choose a few outcomes in the order of the items, of other kinds before more of one kind."""
    seen: collections.Counter[str] = collections.Counter()
    ranked = []
    for outcome in sorted(outcomes, key=lambda o: o.index):
        kind = kind_of(items[outcome.index])
        ranked.append((seen[kind], outcome.index, outcome))
        seen[kind] += 1
    return [{"kind": kind_of(items[o.index]), "question": o.question, "reply": o.reply,
             "answer": o.answer} for _, _, o in sorted(ranked)[:EXAMPLES]]  # fmt: skip


# 3. Forward passes: bits per byte, continuations ---------------------------------------------


def evaluate_text(model: GPT, tokenizer: Tokenizer, source: str, s: Settings) -> dict[str, Any]:
    """Measure bits per byte on validation documents, of a base model on as many of training."""
    texts = {split: itertools.chain.from_iterable(map(read_texts, list_shards(source, split)))
             for split in (("val", "train") if s.stage == "base" else ("val",))}  # fmt: skip
    results, documents = {}, s.max_documents or None
    for split, all_texts in texts.items():
        start = time.perf_counter()
        part = itertools.islice(all_texts, documents)
        rows = batch_rows(model.config.max_seq_len, s)
        bpb, documents = evaluate_bpb(model, tokenizer, part, rows)
        results[f"{split}_bpb"] = {"score": bpb, "items": documents,
                                   "seconds": time.perf_counter() - start}  # fmt: skip
    return results


def batch_rows(width: int, settings: Settings) -> int:
    """Choose the rows of a forward pass: about 16,384 positions."""
    return settings.device_batch_size or max(1, 16384 // width)


def fit(ids: list[int], room: int) -> list[int]:
    """Cut ids to `room` at the left, but keep the first, which is <|bos|>."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


@torch.inference_mode()
def continuation_logits(
    model: GPT, rows: Sequence[tuple[list[int], int]], settings: Settings
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, logits (n, V)) of rows (ids, n): what the model expects for the last n ids.

    What rows have in common before those, as choices have their question, is computed once. A row
    longer than the context is cut at the left; its last n ids stay while they fit.
    """
    device, T = model.embed.weight.device, model.config.max_seq_len
    inputs = [fit(ids, T + 1)[:-1] for ids, _ in rows]
    groups: dict[tuple[int, ...], list[Continuation]] = {}
    for i, (ids, (_, n)) in enumerate(zip(inputs, rows)):
        begun = ids[: max(0, len(ids) - n)]
        groups.setdefault(tuple(begun), []).append(Continuation(i, ids, len(begun)))
    for group in groups.values():
        group.sort(key=lambda row: -len(row.ids))
    order = sorted(groups.values(), key=lambda group: -len(group[0].ids))
    while order:
        count = batch_rows(len(order[0][0].ids), settings)
        part, order = order[:count], order[count:]
        for found in in_fewer_rows(partial(continued_states, model), part, device):
            for i, hidden in found:
                yield i, model.logits(hidden)


class Continuation(NamedTuple):
    """A row of continuation_logits."""

    number: int  # of the row
    ids: list[int]
    start: int  # what is asked about are the states from here on


def continued_states(model: GPT, groups: list[list[Continuation]]) -> list[tuple[int, Tensor]]:
    """Compute (number, hidden states (n, C)) of rows; a group's have all before `start` in common.

    The first of each group, its longest, is computed whole, the others go on from its cache, as
    many at once as there are groups. Padding is at the right, where no position before it looks.
    """
    device, T = model.embed.weight.device, model.config.max_seq_len
    firsts = [group[0] for group in groups]
    others = [(k, row) for k, group in enumerate(groups) for row in group[1:]]
    tail = max((len(row.ids) - row.start for _, row in others), default=0)
    starts = [min(row.start, T - tail) for row in firsts]  # no padding is past the context either
    context = max(len(firsts[0].ids), max(starts) + tail)
    found = []

    def compute(
        rows: Sequence[Continuation], starts: list[int], cache: KVCache, counts: list[int] | None
    ) -> None:
        tails = [row.ids[start:] for row, start in zip(rows, starts)]
        width = max(map(len, tails))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in tails], device=device)
        for row, start, hidden in zip(rows, starts, model.hidden(ids, cache, counts)):
            found.append((row.number, hidden[row.start - start : len(row.ids) - start]))

    cache = KVCache(model.config, len(groups), device, model.dtype, context)
    compute(firsts, [0] * len(groups), cache, starts)
    cache.lengths = starts
    for first in range(0, len(others), len(groups)):
        owners, rows = zip(*others[first : first + len(groups)])
        compute(rows, [starts[k] for k in owners], cache.copies(list(owners)), None)
    return found


# 4. Completions: facts and samples -----------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "The opposite of hot is",
    "Once upon a time",
    "In the morning",
    "There are many ways to",
)


def make_engine(model: GPT, tokenizer: Tokenizer, settings: Settings) -> Engine:
    """Make an engine of 64 slots, or of as many as have room in 8 GiB."""
    row_bytes = model.config.cache_bytes(model.dtype.itemsize)
    slots = settings.device_batch_size or max(1, min(64, (8 << 30) // row_bytes))
    return Engine(model, tokenizer, slots)


def starts_with_answer(text: str, answers: Iterable[str]) -> bool:
    """Say whether text begins with one of the answers as whole words."""
    words = (rf"{re.escape(answer.strip())}(?!-?\w)" for answer in answers)
    return any(re.match(word, text.lstrip()) for word in words)


def complete_facts(engine: Engine, items: list[dict], mine: Sequence[int]) -> Iterator[Graded]:
    """Complete the statements of facts greedily: right where the answer comes first."""
    t = engine.tokenizer
    answers = t.encode_batch([item["answer"] for item in items])
    sampling = Sampling(max(map(len, answers), default=0) + 2, temperature=0)
    prompts = t.encode_batch([items[i]["prompt"] for i in mine])
    requests = [Request([t.bos, *ids], sampling, tool=False) for ids in prompts]
    for key, reply in engine.run(requests):
        item, text = items[mine[key]], reply_text(reply_parts(t, reply.ids))
        right = starts_with_answer(text, item["accept"])
        yield Graded(mine[key], right, item["prompt"], text, item["answer"])


def write_samples(engine: Engine, seed: int) -> dict[str, Any]:
    """Complete a few prompts, greedily and sampled, and measure the rate."""
    t = engine.tokenizer
    texts, tokens, start = [], 0, time.perf_counter()
    for prompt, temperature in itertools.product(PROMPTS, (0.0, 0.8)):
        sampling = Sampling(max_tokens=64, temperature=temperature, top_k=50, seed=seed)
        request = Request([t.bos, *t.encode(prompt)], sampling, tool=False)
        ids = list(engine.generate(request))
        tokens += len(ids)
        text = reply_text(reply_parts(t, ids))
        texts.append({"prompt": prompt, "temperature": temperature, "text": text})
    return {"samples": texts, "decode_tok_per_s": tokens / (time.perf_counter() - start)}


# 5. Conversations: letters, replies with the tool, programs ----------------------------------


def readable(content: str | list[dict[str, str]]) -> str:
    """Show a message as text, calls of the tool and their results in brackets."""
    forms = {"text": "{}", "python": "[{}]", "output": "[= {}]"}
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(forms[part["type"]].format(part["text"]) for part in parts)


def question_of(item: dict[str, Any]) -> str:
    """Show what an item's conversation asks: the message, or all with their roles."""
    messages = item["messages"]
    if len(messages) == 1:
        return readable(messages[0]["content"])
    return "\n".join(f"{m['role']}: {readable(m['content'])}" for m in messages)


def choose_letters(
    engine: Engine, items: list[dict], mine: Sequence[int], s: Settings
) -> Iterator[Graded]:
    """Answer by the choice whose letter is likeliest to open the reply."""
    t, room = engine.tokenizer, engine.model.config.max_seq_len
    ids = [t.encode(letter)[0] for letter in string.ascii_uppercase]
    rows = [([*render_prompt(t, items[i]["messages"]), ids[0]], 1) for i in mine]
    for key, logits in continuation_logits(engine.model, rows, s):
        item = items[mine[key]]
        choices = item["choices"]
        chosen = int(logits[-1, ids[: len(choices)]].argmax())
        letter = string.ascii_uppercase[chosen]
        cut = len(rows[key][0]) > room + 1
        yield Graded(mine[key], grade(item, letter), question_of(item), letter, item["answer"], cut)


def write_replies(
    engine: Engine, items: list[dict], mine: Sequence[int], max_tokens: int
) -> Iterator[Graded]:
    """Let the model reply, greedily and with its tool, and grade what it says."""
    t, T = engine.tokenizer, engine.model.config.max_seq_len
    room = T - min(max_tokens, T // 4)  # a longer prompt is cut: a reply needs room too
    prompts = {i: render_prompt(t, items[i]["messages"]) for i in mine}
    order = sorted(mine, key=lambda i: -len(prompts[i]))
    sampling = Sampling(max_tokens, temperature=0)
    for key, reply in engine.run(Request(fit(prompts[i], room), sampling) for i in order):
        i, parts = order[key], reply_parts(t, reply.ids)
        item, said, shown = items[i], reply_text(parts), readable(parts)
        if item["grade"] == "code":
            outcome = run_code(program_of(item, said))
            right, shown = outcome.passed, f"{shown}\n# {outcome.reason}"
        else:
            right = grade(item, said)
        expected = item["answer"] or readable(item.get("reply", ""))
        yield Graded(i, right, question_of(item), shown, expected, len(prompts[i]) > room)


def choose_lines(
    engine: Engine, items: list[dict], written: list[Graded], s: Settings
) -> Iterator[Graded]:
    """Answer by the likeliest of the lines that may end a reply: each choice with its letter.

    What a written reply says before its last line stays.
    """
    t = engine.tokenizer
    for first in range(0, len(written), 64):
        part = written[first : first + 64]
        rows: list[tuple[list[int], int]] = []
        owners = []
        for number, reply in enumerate(part):
            item = items[reply.index]
            prompt, end = render_prompt(t, item["messages"]), t.specials["<|assistant_end|>"]
            said, found, _ = f"\n{reply.reply}".rpartition("\n- ")
            said = said if found else f"\n{reply.reply}"
            lines = [f"{said}\n- {choice} {letter}"[1:]
                     for choice, letter in zip(item["choices"], string.ascii_uppercase)]  # fmt: skip
            rows += core_rows("choices", [[*prompt, *ids, end] for ids in t.encode_batch(lines)])
            owners += [(number, line) for line in lines]
        nats: list[dict[str, float]] = [{} for _ in part]
        for i, logits in continuation_logits(engine.model, rows, s):
            targets = torch.tensor(rows[i][0][-len(logits) :], device=logits.device)
            number, line = owners[i]
            nats[number][line] = F.cross_entropy(logits, targets, reduction="sum").item()
        for reply, lines in zip(part, nats):
            line = min(lines, key=lambda line: (lines[line], line))
            yield replace(reply, reply=line, right=grade(items[reply.index], line))


def program_of(item: dict[str, Any], reply: str) -> str:
    """Join a reply to the function it was asked for and to that one's tests.

    The reply's first fenced block counts, or all of it; it is the whole function or its body.
    The prompt alone is a program too, a function that does nothing: it brings its imports.
    """
    fenced = re.search(r"```(?:python|py)?[ ]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    code, name = fenced[1] if fenced else reply, item["entry_point"]
    return f"{item['prompt'].rstrip()}\n{code}\n\n{item['tests']}\n\ncheck({name})\n"


# 6. CORE -------------------------------------------------------------------------------------


class CoreTask(NamedTuple):
    """One of CORE's tasks: how it is asked, and the score of guessing, in percent."""

    kind: str  # choices: which ending; schema: which beginning; language: the words that follow
    file: str  # below data/eval/core/eval_data/
    shots: int  # solved examples before the question
    delimiter: str
    baseline: float


CORE = {
    "hellaswag_zeroshot": CoreTask("choices", "language_understanding/hellaswag", 0, " ", 25),
    "jeopardy": CoreTask("language", "world_knowledge/jeopardy_all", 10, "\nAnswer: ", 0),
    "bigbench_qa_wikidata": CoreTask(
        "language", "world_knowledge/bigbench_qa_wikidata", 10, " ", 0
    ),
    "arc_easy": CoreTask("choices", "world_knowledge/arc_easy", 10, "\nAnswer: ", 25),
    "arc_challenge": CoreTask("choices", "world_knowledge/arc_challenge", 10, "\nAnswer: ", 25),
    "copa": CoreTask("choices", "commonsense_reasoning/copa", 0, " ", 50),
    "commonsense_qa": CoreTask("choices", "commonsense_reasoning/commonsense_qa", 10, " ", 20),
    "piqa": CoreTask("choices", "commonsense_reasoning/piqa", 10, "\nAnswer: ", 50),
    "openbook_qa": CoreTask("choices", "commonsense_reasoning/openbook_qa", 0, " ", 25),
    "lambada_openai": CoreTask("language", "language_understanding/lambada_openai", 0, " ", 0),
    "hellaswag": CoreTask("choices", "language_understanding/hellaswag", 10, " ", 25),
    "winograd": CoreTask("schema", "language_understanding/winograd_wsc", 0, " ", 50),
    "winogrande": CoreTask("schema", "language_understanding/winogrande", 0, " ", 50),
    "bigbench_dyck_languages": CoreTask(
        "language", "symbolic_problem_solving/bigbench_dyck_languages", 10, " ", 0
    ),
    "agi_eval_lsat_ar": CoreTask(
        "choices", "symbolic_problem_solving/agi_eval_lsat_ar", 3, " ", 20
    ),
    "bigbench_cs_algorithms": CoreTask(
        "language", "symbolic_problem_solving/bigbench_cs_algorithms", 10, " ", 0
    ),
    "bigbench_operators": CoreTask(
        "language", "symbolic_problem_solving/bigbench_operators", 10, " ", 0
    ),
    "bigbench_repeat_copy_logic": CoreTask(
        "language", "symbolic_problem_solving/bigbench_repeat_copy_logic", 10, " ", 0
    ),
    "squad": CoreTask("language", "reading_comprehension/squad", 10, " ", 0),
    "coqa": CoreTask("language", "reading_comprehension/coqa", 0, " ", 0),
    "boolq": CoreTask("choices", "reading_comprehension/boolq", 10, "\nAnswer: ", 62),
    "bigbench_language_identification": CoreTask(
        "choices", "language_understanding/bigbench_language_identification", 10, " ", 9.1
    ),
}


def core_variants(task: CoreTask, item: dict[str, Any]) -> list[str]:
    """Lay out an item's texts: one a choice; of a language item, without and with its words."""
    if task.kind == "choices":
        return [f"{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{context}{task.delimiter}{item['continuation']}"
                for context in item["context_options"]]  # fmt: skip
    # a space at the end of a prompt belongs to the next token
    begun = f"{item['context'].strip()}{task.delimiter}"
    return [begun.rstrip(), f"{begun}{item['continuation']}"]


def core_texts(task: CoreTask, items: list[dict], index: int) -> list[str]:
    """Lay out an item's texts after its solved examples: others, by a seed of its own."""
    draw = random.Random(1234 + index)
    others = draw.sample(range(len(items) - 1), min(task.shots, len(items) - 1))
    solved = [items[i + (i >= index)] for i in others]
    shown = "".join(core_variants(task, item)[item.get("gold", -1)] + "\n\n" for item in solved)
    return [shown + text for text in core_variants(task, items[index])]


def core_rows(kind: str, rows: list[list[int]]) -> list[tuple[list[int], int]]:
    """Find each row's continuation: what the rows do not begin with or, of a schema, end with."""

    def count_common(columns: Iterable[tuple[int, ...]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    if kind == "schema":
        n = count_common(zip(*map(reversed, rows)))
        return [(row, n) for row in rows]
    start = count_common(zip(*rows))
    rows = rows[1:] if kind == "language" else rows
    return [(row, max(1, len(row) - start)) for row in rows]


def answer_core(
    engine: Engine, task: CoreTask, items: list[dict], mine: Sequence[int], s: Settings
) -> Iterator[Graded]:
    """Answer by the lowest mean nats a token; a language item is right token for token."""
    t, room = engine.tokenizer, engine.model.config.max_seq_len
    for first in range(0, len(mine), 256):  # lengths are sorted within these
        part = mine[first : first + 256]
        texts = [core_texts(task, items, i) for i in part]
        encoded = iter(t.encode_batch(list(itertools.chain.from_iterable(texts))))
        rows, owners = [], []
        for i, variants in zip(part, texts):
            found = core_rows(task.kind, [[t.bos, *next(encoded)] for _ in variants])
            rows += found
            owners += [(i, choice) for choice in range(len(found))]
        nats: dict[int, dict[int, float]] = {i: {} for i in part}
        said: dict[int, tuple[bool, str]] = {}
        for row, logits in continuation_logits(engine.model, rows, s):
            targets = torch.tensor(rows[row][0][-len(logits) :], device=logits.device)
            i, choice = owners[row]
            if task.kind == "language":
                likeliest = logits.argmax(-1)
                said[i] = torch.equal(likeliest, targets), t.decode(likeliest.tolist())
            nats[i][choice] = F.cross_entropy(logits, targets).item()
        cut = {owners[row][0] for row, (ids, _) in enumerate(rows) if len(ids) > room + 1}
        for i in part:
            item = items[i]
            if task.kind == "language":
                question, options, gold = item["context"], [item["continuation"]], 0
                right, reply = said[i]
            else:
                question = item.get("query") or f"... {item['continuation']}"
                options, gold = item.get("choices") or item["context_options"], item["gold"]
                chosen = min(nats[i], key=lambda choice: (nats[i][choice], choice))
                right, reply = chosen == gold, options[chosen]
            yield Graded(i, right, question, reply, options[gold], i in cut)


def core_mean(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Average the tasks' centred scores: 0 is guessing, 1 is perfect. Names what is not there."""
    widths = [(r["high"] - r["low"]) / 2 / (1 - r["baseline"]) for r in records.values()]
    score = sum(r["centred"] for r in records.values()) / len(records)
    half = math.sqrt(sum(width**2 for width in widths)) / len(records)
    return {
        "score": score, "low": score - half, "high": score + half,
        "items": sum(r["items"] for r in records.values()),
        "seconds": sum(r["seconds"] for r in records.values()),
        "cut": sum(r.get("cut", 0) for r in records.values()),
        "covered": len(records), "of": len(CORE), "missing": [n for n in CORE if n not in records],
        "examples": {side: [one for r in records.values() for one in r["examples"][side][:1]]
                     [:EXAMPLES] for side in ("right", "wrong")},
        "tasks": records,
    }  # fmt: skip


# 7. Bench ------------------------------------------------------------------------------------


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast memory is read, in bytes/s: the median of several sums of 256 MiB.

    Of 2 GiB on a GPU, whose caches and launches would count else.
    """
    numbers, times = torch.ones(1 << (26 if device.type == "cpu" else 29), device=device), []
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum().item()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / sorted(times)[3]


def bench_decoding(
    run: Run, tokenizer: Tokenizer, config: GPTConfig, dtype: torch.dtype, int8: bool
) -> dict[str, float]:
    """Measure the engine with a random model: tokens/s, each beside its bound, and first tokens.

    A step's bound is to read weights and cache once, a prompt's its FLOPs at the matmul rate, a
    turn's first token's the larger of both.
    """
    rng = random.Random(0)

    def engine_of(slots: int, context: int) -> Engine:
        model = GPT.create(replace(config, max_seq_len=context), run.device, dtype)
        engine = Engine(model.quantize() if int8 else model, tokenizer, slots)
        engine.stops = set()  # random weights would say anything
        return engine

    def ids(n: int) -> list[int]:
        return [rng.randrange(256) for _ in range(n)]

    engine = engine_of(64, 256)
    if can_compile(run.device):
        torch.compiler.reset()  # of one function only so many versions are kept
        engine.compile()
    bandwidth = read_bandwidth(run.device)
    weights = sum(m.weight.nbytes for m in engine.model.modules() if type(m) is Linear)
    token_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize
    measured = {"bandwidth": bandwidth}
    for streams in (1, 16, 64):
        for i in range(streams):
            engine.submit(Request(ids(64 + i % 8), Sampling(40, temperature=0), tool=False))
        while engine.waiting or engine.prompts:
            engine.step()
        times, cached = [], 0
        for _ in range(32):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
            cached += sum(engine.cache.lengths[:streams])
        engine.clear()
        step = sorted(times)[len(times) // 2]
        measured[f"x{streams}"] = streams / step
        measured[f"x{streams} of bound"] = (weights + cached / 32 * token_bytes) / bandwidth / step
    engine = engine_of(1, 2560)

    def first_token(prompt_ids: list[int]) -> float:
        """Return the seconds to the first of 8 tokens, which the prompt then ends with."""
        start = time.perf_counter()
        reply = engine.generate(Request(prompt_ids[:], Sampling(8, temperature=0), tool=False))
        prompt_ids.append(next(reply))
        seconds = time.perf_counter() - start
        prompt_ids += reply
        return seconds

    n, flops = 512, config.flops_per_token(512) / 3  # two thirds of it are the backward pass
    seconds = sorted(first_token(ids(n)) for _ in range(3))[1]
    rate = measure_matmul(run.device, dtype, 1024 if run.device.type == "cpu" else 8192, 20)
    measured |= {"prefill": n / seconds, "prefill of bound": n * flops / rate / seconds}
    said: list[int] = []
    for turn in range(1, 11):
        new = 24 if turn in (1, 10) else 238
        said += ids(new)
        history = len(said)
        bound = max((weights + len(said) * token_bytes) / bandwidth, new * flops / rate)
        seconds = first_token(said)
        measured |= {f"turn {turn}": seconds, f"turn {turn} of bound": bound / seconds}
    return measured | {"history": history}


def training_log(tag: str, stage: str = "base") -> list[dict[str, Any]]:
    """Read what a stage of a run has logged."""
    lines = [line for line in read_log(tag) if line["stage"] == stage]
    if not lines:
        raise MissingInput(f"run {tag!r} has logged no {stage}: `bash run.sh bench` does")
    return lines


def training_rates(tag: str) -> dict[str, float]:
    """Return the medians of a run's training rate, MFU and shares, from its later log lines."""
    lines = [line for line in training_log(tag) if "tok_per_s" in line]
    lines = lines[len(lines) // 2 :]
    config = read_meta(find_checkpoint(tag, "base"))
    name = f"pretraining d{config['config']['n_layer']} {config['dtype']}"
    whats = {"tok_per_s": "tokens/s", "mfu": "MFU %", "data": "data %", "update": "optimizer %"}
    return {
        f"{name}, {what}": sorted(line[key] for line in lines)[len(lines) // 2]
        * (100 if what.endswith("%") else 1)
        for key, what in whats.items()
    }


def machine_name(device: torch.device) -> str:
    """Say what computes: the GPU, or the processor and its cores."""
    if device.type in GPUS:
        return getattr(torch, device.type).get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def print_bench(run: Run, settings: Settings) -> dict[str, Any]:
    """Collect the tag's measures and those of decoding, print them and write bench.json."""
    tokenizer = Tokenizer.load(run_dir(settings.tag) / "tokenizer")
    measures = tokenizer.info["measures"]
    # the median of seconds, as training lasts: the best of a shared machine is rarely had
    products = (measure_matmul(run.device, torch.float32, 1024, 1) for _ in range(200))
    fp32 = statistics.median(products) / 1e9
    rows: dict[str, float] = {
        "fp32 matmul, GFLOP/s": fp32,
        "tokenizer training, M characters/s": measures["train_chars_per_s"] / 1e6,
        "encoding on one thread, k tokens/s": measures["encode_tokens_per_s"] / 1e3,
    }
    for tag in (settings.tag, f"{settings.tag}-fp32"):
        rows |= training_rates(tag)
    for name in [name for name in rows if "tokens/s" in name and "pretraining" in name]:
        rows[f"{name} a GFLOP/s of fp32 matmul"] = rows[name] / fp32
    dtypes = [(torch.float32, False), (pick_dtype(run.device, settings.dtype), True)]
    if dtypes[1][0] != torch.float32:
        dtypes.insert(1, (dtypes[1][0], False))
    shapes = [(4, 4096), (12, 32768), *([(20, 65536)] if run.device.type == "cuda" else [])]
    decoding = {}
    for (depth, vocab_size), (dtype, int8) in itertools.product(shapes, dtypes):
        heads = max(1, depth // 2)
        config = GPTConfig(vocab_size, depth, 64 * depth, heads, heads, 512)
        name = f"d{depth} {str(dtype)[6:]}{' int8 weights' * int8}"
        run.say(f"decoding: {name}")
        decoding[name] = bench_decoding(run, tokenizer, config, dtype, int8)
    machine = machine_name(run.device)
    run.say(f"| {machine}, torch {torch.__version__} | |\n| --- | ---: |")
    for name, value in rows.items():
        run.say(f"| {name} | {value:,.1f} |")
    run.say("| decoding, tokens/s (of its bound) | 1 stream | 16 | 64 | prompt of 512 | first token | "
            "10th turn |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for name, m in decoding.items():
        cells = [f"{m[key]:,.0f} ({m[f'{key} of bound']:.0%})" for key in ("x1", "x16", "x64")]
        cells.append(f"{m['prefill']:,.0f} ({m['prefill of bound']:.0%})")
        cells += [f"{1e3 * m[key]:,.0f} ms ({m[f'{key} of bound']:.0%})"
                  for key in ("turn 1", "turn 10")]  # fmt: skip
        run.say(f"| {name} | {' | '.join(cells)} |")
    report = {"machine": machine, "torch": torch.__version__, **rows, "decoding": decoding}
    update_bench(run, report)
    return rows


def update_bench(run: Run, report: dict[str, Any]) -> None:
    """Put measures into bench.json, beside what it holds of other kinds."""
    path = base_dir() / "bench.json"
    write_json(path, read_json(path) | report)
    run.say(f"written: {path}")


CHOICES = {  # of pretrain.py, and how each is switched off
    "without the fit to pairs of tokens": "--bigram-steps=0",
    "without the table of pairs": "--bigram-rows=0",
    "without value embeddings": "--no-value-embeds",
    "without smear": "--no-smear",
    "without skip": "--no-skip",
    "without scaled queries and keys": "--qk-scale=1",
    "with five steps of Muon": "--muon-steps=5",
}
PACE_STEPS, BATCH_TOKENS = 40, 2048


def run_stage(run: Run, stage: str, tag: str, *flags: str) -> list[dict[str, Any]]:
    """Run a stage's file anew with the run's tokenizer; return the lines that it logged."""
    (run_dir(tag) / "tokenizer").mkdir(parents=True, exist_ok=True)
    name = Path("tokenizer", "tokenizer.json")
    shutil.copy(run_dir(run.tag) / name, run_dir(tag) / name)
    script = Path(__file__).with_name(f"{stage}.py")
    command = [sys.executable, str(script), f"--tag={tag}", f"--device={run.device.type}",
               "--save-every=0", "--restart", *flags]  # fmt: skip
    run.say(f"bench: {shlex.join(command[1:])}")
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise Stop(f"{shlex.join(command)} failed:\n{done.stdout[-1000:]}")
    if run.stopping:  # the stage has heard it too, and ended early
        raise Stop("bench: stopped; run the same command again")
    return training_log(tag, "base" if stage == "pretrain" else stage)


def train_for_bench(run: Run, tag: str, depth: int, steps: int, flags: list[str]) -> dict:
    """Pretrain a small model anew; return its last measures and its pace."""
    logged = run_stage(
        run, "pretrain", tag, f"--depth={depth}", "--max-seq-len=512",
        f"--total-batch-size={BATCH_TOKENS}", "--dtype=float32", "--compile=yes",
        "--eval-tokens=300000", f"--num-iterations={steps}", f"--eval-every={steps}", *flags,
    )  # fmt: skip
    lines = [line for line in logged if "loss" in line]
    first, last = lines[1], lines[-1]  # the very first is of a step that compiled
    if last["step"] != steps:
        raise Stop(f"bench: {tag} was stopped at step {last['step']}; run the same command again")
    # what else a machine does only slows a run, so two are compared by their fastest tenths
    rates = sorted(line["tok_per_s"] for line in lines[1:])
    return {
        "steps": steps,
        "tokens": steps * BATCH_TOKENS,
        "seconds": (last["time"] - first["time"]) / (last["step"] - first["step"]) * steps,
        "tok_per_s": rates[len(rates) * 9 // 10],
        "bpb": next((line["val_bpb"] for line in reversed(logged) if "val_bpb" in line), math.nan),
    }


GPU_RUNS = {  # what is trained for some steps on one GPU: its flags
    "d12 bfloat16, no windows": ["--depth=12", "--window-pattern=L"],
    "d12 bfloat16": ["--depth=12"],  # sft and rl go on from this one
    "d20 bfloat16, passes of 32 rows": ["--depth=20", "--device-batch-size=32"],
    "d24 bfloat16": ["--depth=24"],
    "d26 bfloat16": ["--depth=26"],
    "d26 fp8": ["--depth=26", "--fp8"],
}
GPU_FLAGS = "--max-seq-len=2048 --total-batch-size=524288 --dtype=bfloat16 --compile=yes".split()
GPU_STEPS = 20
LOG_NAMES = {"tok_per_s": "tokens/s", "mfu": "MFU", "data": "share of waiting for data",
             "update": "share of the optimizer", "memory": "GB at the peak",
             "rows": "rows of a pass", "estimate": "GB estimated, not compiled"}  # fmt: skip


def bench_gpu(run: Run, settings: Settings) -> dict[str, Any]:
    """Train some steps of each of GPU_RUNS, then sft and rl; print rates, MFU, memory, shares.

    rl is idle while it neither samples nor trains.
    """
    rows: dict[str, dict[str, float]] = {}
    steps = [f"--num-iterations={GPU_STEPS}", "--log-every=1"]

    def steady(lines: list[dict], *names: str) -> dict[str, float]:
        """Return the medians of the last half's values."""
        lines = [line for line in lines if "loss" in line][-(GPU_STEPS // 2) :]
        return {name: sorted(line.get(name, 0.0) for line in lines)[len(lines) // 2]
                for name in names}  # fmt: skip

    first = f"{run.tag}-{next(iter(GPU_RUNS)).split()[0]}"
    for name, flags in GPU_RUNS.items():
        tag = f"{run.tag}-{name.split()[0]}"
        flags = [*flags, *GPU_FLAGS, *steps, "--eval-every=0", "--bigram-tokens=0"]
        lines = run_stage(run, "pretrain", tag, *flags)
        rows[name] = steady(lines, "tok_per_s", "mfu", "data", "update", "memory")
        meta = read_meta(find_checkpoint(tag, "base"))
        config = GPTConfig(**meta["config"])
        parts = memory_bytes(config, meta["micro_batch"], 2, torch.device("cuda"))
        rows[name] |= {"vocabulary": config.vocab_size, "rows": meta["micro_batch"],
                       "estimate": sum(parts.values()) / 1e9}  # fmt: skip
        if tag != first:
            shutil.rmtree(run_dir(tag))  # some ten gigabytes
    fp8 = rows["d26 fp8"]
    fp8["of bfloat16"] = fp8["tok_per_s"] / rows["d26 bfloat16"]["tok_per_s"]
    conversations = [*steps, f"--chats={settings.source or 'world'}", "--eval-every=0"]
    lines = run_stage(
        run, "sft", first, "--start-from=base", *conversations, *GPU_FLAGS[1:]
    )  # fmt: skip
    rows["sft"] = steady(lines, "tok_per_s", "data", "memory")
    rows["sft"]["of pretraining"] = rows["sft"]["tok_per_s"] / rows["d12 bfloat16"]["tok_per_s"]
    lines = [x for x in run_stage(run, "rl", first, *conversations) if "loss" in x]
    one, last = lines[1], lines[-2]  # the first steps warm up, the last says no time left
    n = last["step"] - one["step"]
    sampling = sum(line["sampling_s"] for line in lines[2:-1]) / n
    training = (1 - last["data"]) * last["left_s"] / (GPU_STEPS - last["step"])
    wall = (last["time"] - one["time"]) / n
    rows["rl"] = {"sampling": sampling / wall, "training": training / wall,
                  "idle": 1 - (sampling + training) / wall}  # fmt: skip
    run.say("| one GPU | |\n| --- | ---: |")
    for name, row in rows.items():
        for key, value in row.items():
            run.say(f"| {name}, {LOG_NAMES.get(key, key)} | {value:,.3g} |")
    update_bench(run, {"gpu": rows})
    return rows


def bench_learning(run: Run, settings: Settings) -> dict[str, Any]:
    """Train depths 4 and 6 for a time, and with each of CHOICES on a quarter of the tokens.

    Vocabulary and text are those of the run's tokenizer. A choice that costs time would see fewer
    tokens in the same time: the last column adds what these bring, by the slope between the
    short and the long runs. What was measured is kept until the table is whole: stopped, it
    goes on from there.
    """
    table: dict[str, list[dict]] = {}
    Tokenizer.load(run_dir(run.tag) / "tokenizer")  # raises where there is none
    path = run_dir(run.tag) / "learning.json"
    kept: dict[str, dict] = read_json(path)
    if kept:
        run.say(f"bench: going on after {len(kept)} runs; without {path} it would begin anew")

    def train(depth: int, name: str, steps: int, *flags: str) -> dict:
        tag = f"{run.tag}-d{depth}-{re.sub('[^a-z0-9]+', '-', name.lower())}"
        if tag not in kept:
            kept[tag] = train_for_bench(run, tag, depth, steps, list(flags))
            write_json(path, kept)
        return kept[tag]

    for depth in (4, 6):
        pace = train(depth, "pace", PACE_STEPS, "--bigram-steps=0", "--eval-every=0")
        seconds, whole = settings.bench_seconds, f"depth {depth}, all choices"
        steps = max(4 * PACE_STEPS, round(seconds / pace["seconds"] * PACE_STEPS))
        seeds = range(settings.bench_seeds)
        table[whole] = [train(depth, f"seed-{i}", steps, f"--seed={i}") for i in seeds]
        long = sum(one["bpb"] for one in table[whole]) / len(seeds)
        short = train(depth, "short", steps // 4)
        slope = (short["bpb"] - long) / math.log(4)
        for name, *flags in [["all choices, a quarter of the time"], *CHOICES.items()]:
            one = train(depth, name, steps // 4, *flags) if flags else short
            fewer = slope * math.log(short["tok_per_s"] / one["tok_per_s"])
            table[f"depth {depth}, {name}"] = [one | {"in_time": one["bpb"] + fewer}]
    run.say(
        "| training | runs | tokens | seconds | tokens/s | bits per byte | in equal time |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, runs in table.items():
        bpb = [one["bpb"] for one in runs]
        mean = {key: sum(one[key] for one in runs) / len(runs) for key in runs[0]}
        spread = f" ({min(bpb):.3f} to {max(bpb):.3f})" if len(runs) > 1 else ""
        in_time = f"{mean['in_time']:.3f}" if "in_time" in mean else ""
        run.say(f"| {name} | {len(runs)} | {mean['tokens']:,.0f} | {mean['seconds']:.0f} | "
                f"{mean['tok_per_s']:,.0f} | {mean['bpb']:.3f}{spread} | {in_time} |")  # fmt: skip
    update_bench(run, {"learning": table})
    path.unlink()
    return table


# 8. Report -----------------------------------------------------------------------------------

POINTS = 300  # of a curve at most
FIGURES = (  # title, unit, whether the axis begins at 0, logged value: its name
    ("Loss", "nats a token", False, {"loss": "training"}),
    ("Validation", "bits per byte", False, {"val_bpb": "text"}),
    ("Validation loss", "nats a token", False, {"val_loss": "conversations"}),
    ("Reward", "share of right answers", True,
     {"reward": "reward", "pass_at_1": "pass@1", "pass_at_k": "pass@k",
      "val_pass_at_1": "kept apart, pass@1", "val_pass_at_k": "kept apart, pass@k"}),
    ("Length of answers", "tokens", True, {"answer_tokens": "answers"}),
    ("Learning rate", "times its peak", True, {"lr": "factor"}),
    ("Speed", "tokens/s", True, {"tok_per_s": "training"}),
)  # fmt: skip
WRITTEN = "letters: as written"  # the same questions, right where the reply itself ends in the line
REFUSED = 'facts: "I don\'t know"'  # the row of known facts that the model denies to know
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title><style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1d21; --soft: #62656d;
  --line: #e3e3e0; --card: #fff; --tint: #e3ecfd; --right: #0f7a57; --wrong: #b3372f;
  --c0: #2563eb; --c1: #d97706; --c2: #0d9488; --c3: #9333ea; --c4: #db2777; }
@media (prefers-color-scheme: dark) { :root { --page: #16171a; --ink: #e6e6e4; --soft: #9a9da6;
  --line: #33353b; --card: #1e2024; --tint: #24395f; --right: #4cc79a; --wrong: #f08a80;
  --c0: #6ea2ff; --c1: #f2b04c; --c2: #3ecfbd; --c3: #c48bf7; --c4: #f47fb5; } }
* { box-sizing: border-box; }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.5rem 0 .6rem; font-size: 1.3rem; }
p { max-width: 46rem; margin: .6rem 0; } .wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th, figcaption, summary, small { color: var(--soft); } small { display: block; }
table:not(:has(th)) td { white-space: normal; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
s { display: block; height: 3px; border-radius: 2px; background: var(--c0); }
summary { cursor: pointer; margin: 1rem 0 .5rem; } summary b, figcaption b { color: var(--ink); }
.cards { display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure, article { margin: 0; padding: .7rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; font-size: .9rem; }
svg { display: block; width: 100%; height: auto; } svg path { stroke: var(--line); }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.5; stroke-linejoin: round; }
circle { fill: var(--c); } i { background: var(--c); }
i { display: inline-block; width: .9em; height: .2em; margin: 0 .3em .25em 0; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .right { color: var(--right); } .wrong { color: var(--wrong); }
article div { width: fit-content; margin: .4rem 0; padding: .35rem .7rem; white-space: pre-wrap;
  border: 1px solid var(--line); border-radius: .7rem; }
article .ask { margin-left: auto; background: var(--tint); border: 0; }
code { padding: .1em .4em; border-radius: .4em; background: var(--tint); }
</style></head>
<body><h1>$title</h1>
$body</body></html>
"""


class Cell(str):
    """A score in a table: whether it is the best of its row, and the share that its bar shows."""

    best, share = False, None


class Table(NamedTuple):
    """Rows of texts and Cells; the header may be empty."""

    header: list[str]
    rows: list[list[str]]


class Chart(NamedTuple):
    """Curves: points (step, value), by name."""

    title: str
    unit: str
    from_zero: bool
    curves: dict[str, list[tuple[float, float]]]


class Talk(NamedTuple):
    """A question, the model's reply, and whether it is right."""

    verdict: str
    question: str
    reply: str
    answer: str


class Fold(NamedTuple):
    """A part that can be folded."""

    title: str
    blocks: list[Any]
    is_open: bool = False


class Record(NamedTuple):
    """What a run has left on disk, by stage."""

    metas: dict[str, dict[str, Any]]  # of the newest checkpoints
    results: dict[str, dict[str, Any]]  # of the evaluations
    events: dict[str, list[dict[str, Any]]]  # as logged


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file, {} where there is none. Raises MissingInput where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise MissingInput(f"{path} is damaged ({error}): delete it and make it anew") from None


def read_record(tag: str) -> Record:
    """Gather what a run has on disk. Raises MissingInput where it has no checkpoint."""
    found = {stage: list_checkpoints(tag, stage) for stage in STAGES}
    if not any(found.values()):
        find_checkpoint(tag, "base")  # says what is missing
    log = read_log(tag)
    events = {stage: [event for event in log if event["stage"] == stage] for stage in STAGES}
    results = {stage: read_json(run_dir(tag) / "eval" / f"{stage}.json") for stage in STAGES}
    metas = {stage: read_meta(folders[-1]) for stage, folders in found.items() if folders}
    return Record(metas, {stage: result for stage, result in results.items() if result}, events)


def score_table(results: dict[str, dict[str, Any]]) -> Table:
    """Lay out records {stage: {task: record}}: a row a task, a column a stage.

    Shares are in percent with their intervals; bits per byte have none, and less of them is
    better. A row of known facts that the model denies to know is added.
    """
    columns = {stage: dict(records) for stage, records in results.items()}
    for records in columns.values():
        if "unknown_said" in (facts := records.get("facts", {})):
            share, items = facts["unknown_said"], facts["items"]
            low, high = wilson_interval(round(share * items), items)
            records[REFUSED] = {"score": share, "low": low, "high": high, "items": items}
    order = ["val_bpb", "train_bpb", *TASKS]
    order.insert(order.index("facts") + 1, REFUSED)
    order.insert(order.index("letters") + 1, WRITTEN)
    names = dict.fromkeys(name for records in columns.values() for name in records)
    rows = []
    for name in sorted(names, key=lambda n: order.index(n) if n in order else len(order)):
        found = {stage: records[name] for stage, records in columns.items() if name in records}
        scores = {record["score"] for record in found.values()}
        best = (min if name == REFUSED or name.endswith("_bpb") else max)(scores)
        row = [name, *(Cell(score_text(found[s]) if s in found else "") for s in columns)]
        for cell, record in zip(row[1:], map(found.get, columns)):
            if record:
                cell.best = record["score"] == best and len(scores) > 1
                cell.share = max(0, record["score"]) if "low" in record else None
        rows.append([*row, " / ".join({f"{record['items']:,}": 0 for record in found.values()})])
    return Table(["task", *columns, "items"], rows)


def score_text(record: dict[str, Any]) -> str:
    """Say one score: "93.1 [92.0, 94.1]" percent, or 0.3814 bits per byte."""
    if "low" not in record:
        return f"{record['score']:.4f}"
    score, low, high = (100 * record[key] for key in ("score", "low", "high"))
    return f"{score:.1f} [{low:.1f}, {high:.1f}]"


def score_blocks(record: Record, tag: str) -> list[Any]:
    """Show the scores of all stages, what CORE is the mean of, and what lessens their worth."""
    tasks = {stage: result["tasks"] for stage, result in record.results.items()}
    blocks: list[Any] = []
    if tasks:
        note = ("Right answers in percent, with 95% intervals. Of bits per byte (bpb), and of "
                "known facts denied, less is better. The best of a row is bold.")  # fmt: skip
        blocks = [note, score_table(tasks)]
    for stage, meta in record.metas.items():
        result, newest = record.results.get(stage, {}), step_name(meta["step"])
        have, weights = result.get("checkpoint"), meta.get("files", {}).get("model.pt")
        if have != newest or result.get("weights") != weights:
            have = "another model" if have == newest else have
            what = f"the scores are of {have}" if have else "it is not evaluated"
            blocks.append(f"{stage} is at {newest} and {what}; `python evaluate.py -i {stage} "
                          f"--tag={tag}` measures it.")  # fmt: skip
    cut = [f"{name} {one['cut']:,} ({stage})" for stage, records in tasks.items()
           for name, one in records.items() if one.get("cut")]  # fmt: skip
    if cut:
        blocks.append(f"Prompts that lost their beginning to fit the context: {', '.join(cut)}.")
    lists = {}
    for stage, result in record.results.items():  # some may have been measured since
        done = {name for task in result.get("done", {}) for name in (task, task.split("/")[0])}
        missing = [name for name in result.get("left_out", []) if name.split(" (")[0] not in done]
        lists[stage] = ", ".join(missing)
    for names in dict.fromkeys(filter(None, lists.values())):
        stages = ", ".join(stage for stage, other in lists.items() if other == names)
        blocks.append(f"{WITHOUT_DATA.capitalize()} ({stages}): {names}.")
    core = {stage: records["CORE"] for stage, records in tasks.items() if "CORE" in records}
    for stage, mean in core.items():
        without = f", without {', '.join(mean['missing'])}" if mean["missing"] else ""
        blocks.append(f"CORE of {stage} is the mean of the centred scores of {mean['covered']} "
                      f"of {mean['of']} tasks{without}.")  # fmt: skip
    parts = score_table({stage: mean["tasks"] for stage, mean in core.items()})
    return blocks + ([Fold("The tasks of CORE, not centred", [parts])] if core else [])


def talk_blocks(record: Record) -> list[Any]:
    """Show one right and one wrong reply of each task, of the newest stage that is evaluated."""
    stage, result = ([("", {"tasks": {}})] + list(record.results.items()))[-1]
    blocks: list[Any] = []
    for task, one in result["tasks"].items():
        talks = [Talk(verdict, e.get("question", e.get("prompt", "")),
                      e.get("reply", e.get("text", "")), e["answer"])
                 for verdict in ("right", "wrong")
                 for e in one.get("examples", {}).get(verdict, [])[:1]]  # fmt: skip
        kinds = sorted(one.get("kinds", {}).items(), key=lambda kind: kind[1][0] / kind[1][1])
        weak = ", ".join(f"{kind} {right}/{total}" for kind, (right, total) in kinds[:8])
        if talks:
            what = "above guessing" if task == "CORE" else "right"
            title = f"{task}: {100 * one['score']:.1f}% {what}"
            more = [f"Weakest kinds: {weak}."] if len(kinds) > 1 else []
            blocks.append(Fold(title, [talks, *more], is_open=True))
    if samples := [Talk(f"temperature {one['temperature']:g}", one["prompt"], one["text"], "")
                   for one in result.get("samples", [])]:  # fmt: skip
        blocks.append(Fold("Completions", [samples]))
    note = f"What {stage} replied. Where it calculates, the result is the tool's."
    return [note, *blocks] if blocks else []


def curve_blocks(record: Record) -> list[Any]:
    """Plot what each stage has logged."""
    rows = []
    for stage, events in record.events.items():
        charts = []
        for title, unit, from_zero, names in FIGURES:
            curves = {}
            for key, name in names.items():
                points = [(e["step"], e[key]) for e in events
                          if isinstance(e.get(key), (int, float)) and math.isfinite(e[key])]  # fmt: skip
                last, every = len(points) - 1, max(1, (len(points) - 1) / (POINTS - 1))
                if points:
                    count = round(last / every) + 1
                    curves[name] = [points[round(i * every)] for i in range(count)]
            if curves:
                unit = "of the policy gradient" if (stage, title) == ("rl", "Loss") else unit
                charts.append(Chart(f"{title}, {stage}", unit, from_zero, curves))
        rows += [charts] if charts else []
    note = (f"Over the steps, with the last value: at most {POINTS} points of a curve, evenly "
            "chosen, nothing smoothed.")  # fmt: skip
    return [note, *rows] if rows else []


def cost_table(record: Record, cost_per_hour: float) -> Table:
    """Lay out rate, tokens and time of each stage; the price where an hour has one."""
    rows, sums = [], [0.0, 0.0, 0.0]
    for stage, meta in record.metas.items():
        s, events, step = meta["settings"], record.events[stage], meta["step"]
        tokens = step * meta.get("batch_tokens", s.get("total_batch_size", 0))
        if lengths := [e["answer_tokens"] for e in events if "answer_tokens" in e]:
            answers = step * s["problems_per_step"] * s["num_samples"]
            tokens = answers * sum(lengths) / len(lengths)  # that rl wrote
        tasks = record.results.get(stage, {}).get("tasks", {}).values()
        spent = [tokens, meta["seconds"], sum(one.get("seconds", 0) for one in tasks)]
        sums = [total + value for total, value in zip(sums, spent)]
        rates = sorted(e["tok_per_s"] for e in events if "tok_per_s" in e)
        rate = f"{rates[len(rates) // 2]:,.0f}" if rates else ""
        rows.append(([stage, f"{step:,}", rate], spent))
    rows.append((["all", "", ""], sums))
    table = Table(["stage", "steps", "tokens/s", "tokens", "training", "evaluation"], [])
    for texts, (tokens, *seconds) in rows:
        price = [f"{sum(seconds) / 3600 * cost_per_hour:,.2f}"] if cost_per_hour else []
        table.rows.append([*texts, format_count(tokens), *map(format_duration, seconds), *price])
    return table._replace(header=table.header + ["USD"] * bool(cost_per_hour))


def setup_table(record: Record, tag: str, machine: str) -> Table:
    """Say what the model was made of, and where."""
    rows = [["this machine", machine], ["torch", torch.__version__]]
    for key in ("source", "chats"):
        for name in dict.fromkeys(meta[key] for meta in record.metas.values() if meta.get(key)):
            made = read_json(data_dir(name) / "manifest.json")
            if key == "source":
                files = made.get("files", {}).values()
                counts = {unit: sum(file.get(unit, 0) for file in files)
                          for unit in ("documents", "characters")}  # fmt: skip
            else:  # those of the world are made with its text
                apart = read_json(data_dir(name) / "conversations.json").get("files")
                files = apart or made.get("chats", {})
                counts = {f"for {stage}": files.get(f"{stage}.jsonl", {}).get("conversations", 0)
                          for stage in ("mid", "sft", "rl")}  # fmt: skip
            held = ", ".join(f"{format_count(n)} {unit}" for unit, n in counts.items() if n)
            rows.append(["text" if key == "source" else key, f"{name}: {held}" if held else name])
    info = read_json(run_dir(tag) / "tokenizer" / "tokenizer.json").get("info", {})
    ratio = info.get("measures", {}).get("bytes_per_token")
    meta = list(record.metas.values())[-1]
    c = GPTConfig(**meta["config"])
    model = (f"{format_count(c.num_params())} parameters: {c.n_layer} layers of width {c.n_embd}, "
             f"{c.n_head} heads of {c.head_dim}, context {c.max_seq_len}")  # fmt: skip
    size = f"{c.vocab_size:,} ids" + (f", {ratio:.2f} bytes a token" if ratio else "")
    rows += [["tokenizer", size], ["model", model]]
    times = sorted(event["time"] for events in record.events.values() for event in events)
    days = [time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in [*times[:1], *times[-1:]]]
    return Table([], [*rows, *([["trained", f"{' to '.join(days)} UTC"]] if days else [])])


def report_sections(record: Record, settings: Settings, machine: str) -> dict[str, list[Any]]:
    """Lay out the whole report: the blocks of each section."""

    def fold(title: str, what: str, values: dict[str, dict[str, Any]]) -> Fold:
        names = dict.fromkeys(name for column in values.values() for name in column)
        rows = [[name, *(str(column.get(name, "")) for column in values.values())]
                for name in names]  # fmt: skip
        return Fold(title, [Table([what, *values], rows)])

    chosen = ("dtype", "compiled", "micro_batch", "batch_tokens")  # by the stage, where not set
    folds = [fold("All settings", "setting", {
        stage: {**meta["settings"], **{key: meta[key] for key in chosen if key in meta}}
        for stage, meta in record.metas.items()
    })]  # fmt: skip
    if mixtures := {stage: m["mixture"] for stage, m in record.metas.items() if m.get("mixture")}:
        folds.append(fold("What was taught", "kind", mixtures))
    missing = ", ".join(stage for stage in STAGES if stage not in record.metas)
    price = settings.cost_per_hour
    where = (
        f"On a machine for {price:g} USD an hour."
        if price
        else "No price is set (--cost-per-hour)."
    )
    sections = {
        "": [f"Not trained yet: {missing}."] if missing else [],
        "Set-up": [setup_table(record, settings.tag, machine), *folds],
        "Scores": score_blocks(record, settings.tag),
        "Conversations": talk_blocks(record),
        "Curves": curve_blocks(record),
        "Time and cost": [where, cost_table(record, price)],
    }
    return {title: blocks for title, blocks in sections.items() if blocks}


def brief(value: float) -> str:
    """Say a number of a curve in a few digits."""
    return format_count(value) if abs(value) >= 1e4 else f"{value:.5g}"


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Choose about five round numbers, from low or just below it to high or just above."""
    if log:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        scale = [f * 10.0**k for k in powers for f in ((1, 2, 5) if high < 100 * low else (1,))]
    else:
        high = high if high > low else low + (abs(low) if abs(low) > 1e-100 else 1)
        power = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(f * power for f in (1, 2, 5, 10, 20) if 4 * f * power >= high - low)
        first = math.floor(low / step) - 1
        scale = [i * step for i in range(first, math.ceil(high / step) + 2)]
    return scale[bisect.bisect_right(scale, low) - 1 : bisect.bisect_left(scale, high) + 1]


def draw(chart: Chart) -> str:
    """Draw a chart as SVG with its caption; one whose values span a lot has a log scale."""
    left, right, top, bottom = 42, 344, 10, 176  # the sides of the plot
    xs, ys = zip(*(point for points in chart.curves.values() for point in points))
    low, high, x_end = min(ys), max(ys), max(xs) or 1
    log = not chart.from_zero and low > 0 and high > 4 * low
    bend = math.log10 if log else float
    y_ticks = ticks(min(0, low) if chart.from_zero else low, high, log)
    floor, ceiling = bend(y_ticks[0]), bend(y_ticks[-1])

    def place(x: float, y: float) -> tuple[str, str]:
        up = (bend(y) - floor) / (ceiling - floor)
        return f"{left + (right - left) * x / x_end:.1f}", f"{bottom - (bottom - top) * up:.1f}"

    def mark(path: str, x: Any, y: Any, anchor: str, tick: float) -> str:
        text = f'<text x="{x}" y="{y}" text-anchor="{anchor}">{brief(tick)}</text>'
        return f'<path d="{path}"/>{text}'

    marks = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        marks.append(mark(f"M{left} {y}H{right}", left - 5, float(y) + 3, "end", tick))
    for tick in (tick for tick in ticks(0, x_end) if tick <= x_end):
        x = place(tick, y_ticks[0])[0]
        marks.append(mark(f"M{x} {top}V{bottom}", x, bottom + 15, "middle", tick))
    names = []
    for i, (name, points) in enumerate(chart.curves.items()):
        spots = [place(*point) for point in points]
        marks.append(f'<polyline class="c{i}" points="{" ".join(map(",".join, spots))}"/>')
        if len(spots) <= 25:
            marks += [f'<circle class="c{i}" cx="{x}" cy="{y}" r="2"/>' for x, y in spots]
        names.append(f'<i class="c{i}"></i>{name} {brief(points[-1][1])}')
    unit = chart.unit + ", log scale" * log
    return (f"<figure><figcaption><b>{chart.title}</b>, {unit}<small>{' '.join(names)}</small>"
            f'</figcaption><svg viewBox="0 0 360 200" role="img" aria-label="{chart.title}">'
            f"{''.join(marks)}</svg></figure>")  # fmt: skip


def show_talk(talk: Talk) -> str:
    """Show a talk as HTML, where nothing that the model wrote is markup."""
    ask, reply, answer = (html.escape(text.strip()) for text in talk[1:])
    reply = re.sub(r"\[([^\[\]\n]+)\]\[= ([^\[\]\n]*)\]", r"<code>\1 = \2</code>", reply)
    sign = {"right": "✓ ", "wrong": "✗ "}.get(talk.verdict, "")
    end = f"<small>expected: {answer}</small>" if answer else ""
    return (f'<article><b class="{talk.verdict}">{sign}{talk.verdict}</b>'
            f'<div class="ask">{ask}</div><div>{reply}</div>{end}</article>')  # fmt: skip


def to_html(block: Any) -> str:
    """Show a block of the report as HTML."""
    if isinstance(block, Table):
        rows = [[f"<th>{html.escape(text)}</th>" for text in block.header]]
        for row in block.rows:
            rows.append([])
            for text in row:
                share, shown = getattr(text, "share", None), html.escape(text)
                bar = "" if share is None else f'<s style="width:{100 * share:.1f}%"></s>'
                shown = f"<b>{shown}</b>" if getattr(text, "best", False) else shown
                rows[-1].append(f"<td>{shown}{bar}</td>")
        lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows if row)
        return f'<div class="wide"><table>\n{lines}\n</table></div>'
    if isinstance(block, Fold):
        title, inner = html.escape(block.title), "\n".join(map(to_html, block.blocks))
        state = " open" * block.is_open
        return f"<details{state}><summary><b>{title}</b></summary>\n{inner}\n</details>"
    if isinstance(block, list):
        cards = [draw(one) if isinstance(one, Chart) else show_talk(one) for one in block]
        return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"
    return f"<p>{html.escape(block)}</p>"


def to_markdown(block: Any) -> str:
    """Show a block of the report as Markdown; of curves the first and the last value."""
    if isinstance(block, Table):
        header = block.header or [""] * len(block.rows[0])
        rows = [header, ["---"] * len(header)]
        for row in block.rows:
            shown = [html.escape(" ".join(text.split()), False).replace("|", "\\|") for text in row]
            rows.append([f"**{new}**" if getattr(text, "best", False) else new
                         for text, new in zip(row, shown)])  # fmt: skip
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if isinstance(block, Fold):
        title = html.escape(block.title, False)
        return "\n\n".join([f"### {title}", *map(to_markdown, block.blocks)])
    if isinstance(block, list) and isinstance(block[0], Chart):
        ends = [[f"{chart.title}: {name}", chart.unit, brief(points[0][1]), brief(points[-1][1]),
                 f"{points[0][0]:,} to {points[-1][0]:,}"]
                for chart in block for name, points in chart.curves.items()]  # fmt: skip
        return to_markdown(Table(["curve", "unit", "first", "last", "steps"], ends))
    if isinstance(block, list):
        talks = []
        for one in block:  # an indented block: nothing in it is markup
            said = {"question": one.question, "reply": one.reply, "expected": one.answer}
            lines = [f"{name}: {text.strip()}" for name, text in said.items() if text]
            quoted = "\n".join(f"    {line}" for text in lines for line in text.splitlines())
            talks.append(f"{one.verdict}:\n\n{quoted}")
        return "\n\n".join(talks)
    return html.escape(block, False)


def write_report(run: Run, settings: Settings) -> dict[str, Any]:
    """Write report.md and report.html of a run, print its scores; return the paths and scores."""
    record = read_record(settings.tag)
    sections = report_sections(record, settings, machine_name(run.device))
    title = f"nanochat: {settings.tag}"
    page, text = [], [f"# {title}"]
    for name, blocks in sections.items():
        page += [f"<h2>{name}</h2>"] * bool(name) + [*map(to_html, blocks)]
        text += [f"## {name}"] * bool(name) + [*map(to_markdown, blocks)]
    whole = string.Template(PAGE).substitute(title=title, body="\n".join(page))
    paths = {name: run_dir(settings.tag) / f"report.{name}" for name in ("md", "html")}
    scores = score_table({stage: result["tasks"] for stage, result in record.results.items()})
    if run.rank == 0:
        for path, content in zip(paths.values(), ("\n\n".join(text) + "\n", whole)):
            with written_beside(path) as beside:
                beside.write_text(content, "utf-8")
    run.say(f"{plain_table(scores)}\nwritten: {paths['md']}, {paths['html']}")
    return {**paths, "scores": scores}


def plain_table(table: Table) -> str:
    """Lay out a table for the terminal, a star at the best of a row."""
    lines = [[text + "*" * getattr(text, "best", False) for text in row]
             for row in [table.header, *table.rows]]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# 9. Main -------------------------------------------------------------------------------------


def data_path(task: str, asked: dict[str, Any]) -> Path:
    """Return the file that a task reads, whether it is there or not."""
    source = asked["chats" if task in WORLD_SETS else "source"]
    if task == "samples":
        return base_dir()
    if task == "bpb":
        return data_dir(source) / "val.parquet"
    if task.startswith("CORE/"):
        path = data_dir("eval") / "core" / "eval_data" / f"{CORE[task[5:]].file}.jsonl"
        part = path.with_name(f"{path.stem}_partial.jsonl")  # of a set that is not public in full
        return part if part.exists() and not path.exists() else path
    folder = data_dir("eval") if task in PUBLIC_SETS else data_dir(source) / "eval"
    return folder / f"{task}.jsonl"


WITHOUT_DATA = "left out, without data that prepare.py makes"


def plan_tasks(settings: Settings, asked: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the tasks to run, CORE's one by one, and those left out, each with the reason.

    Raises MissingInput where tasks were asked for and none has data.
    """
    present, left_out = [], []
    for task in settings.asked() or default_tasks(settings.stage):
        parts = [f"CORE/{name}" for name in CORE] if task == "CORE" else [task]
        there = [part for part in parts if data_path(part, asked).exists()]
        of_world = task in (*FACT_SETS, *WORLD_SETS)
        if of_world and not settings.asked() and not data_path(task, asked).parent.exists():
            continue  # of other data there are no such sets
        name = task
        if task == "HumanEval" and there and not settings.run_code:
            there, name = [], "HumanEval (it needs --run-code)"
        present += there
        left_out += [part for part in parts if part not in there] if there else [name]
    if settings.asked() and not present:
        raise MissingInput(
            f"there is no data for {', '.join(left_out)}: prepare.py makes it (--help says how)"
        )
    return present, left_out


def read_items(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """Read a task's items, shuffled by a fixed seed; at most --max-items of them."""
    if path.parent.parent.name == "eval_data" or path.stem in FACT_SETS:
        try:
            items = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        except ValueError as error:
            raise MissingInput(f"{path} is damaged ({error}): run prepare.py again") from None
    else:
        items = list(read_conversations(path))
    random.Random(1337).shuffle(items)
    return items[: settings.max_items or len(items)]


def run_task(run: Run, engine: Engine, task: str, asked: dict, s: Settings) -> dict[str, Any]:
    """Return the records of one task, by name."""
    if task == "bpb":
        return evaluate_text(engine.model, engine.tokenizer, asked["source"], s)
    path = data_path(task, asked)
    items = read_items(path, s)
    mine = range(run.rank, len(items), run.world_size)
    max_tokens = {**WORLD_SETS, **PUBLIC_SETS}.get(task, 0)
    if task in FACT_SETS:
        outcomes = complete_facts(engine, items, mine)
    elif task.startswith("CORE/"):
        core = CORE[task[5:]]
        record = tally(run, task, items, answer_core(engine, core, items, mine, s))
        guess = core.baseline / 100
        centred = (record["score"] - guess) / (1 - guess)
        partial = path.stem.endswith("_partial")
        return {task[5:]: {**record, "centred": centred, "baseline": guess, "partial": partial}}
    elif items and items[0]["grade"] == "letter" and (s.stage == "base" or max_tokens == 1):
        outcomes = choose_letters(engine, items, mine, s)
    elif task == "letters":
        counted, written = itertools.tee(write_replies(engine, items, mine, max_tokens))
        record = tally(run, WRITTEN, items, counted)
        chosen = choose_lines(engine, items, list(written), s)
        return {task: tally(run, task, items, chosen), WRITTEN: record}
    else:
        outcomes = write_replies(engine, items, mine, max_tokens)
    return {task: tally(run, task, items, outcomes)}


def show(run: Run, name: str, record: dict[str, Any]) -> None:
    """Print a score as one line, and those it is the mean of before it."""
    for part, one in record.get("tasks", {}).items():
        show(run, f"  {part}", one)
    if "low" not in record:
        run.say(f"{name:35} {record['score']:6.4f}  {record['items']:,} documents")
        return
    low, high = 100 * record["low"], 100 * record["high"]
    notes = [f"{record['items']:,} items"]
    if "covered" in record:
        notes = [f"{record['covered']} of {record['of']} tasks"]
    if "centred" in record:
        notes.append(f"centred {record['centred']:.4f}")
    if record.get("partial"):
        notes.append("a part of the set")
    if record.get("cut"):
        notes.append(f"{record['cut']:,} prompts cut to the context")
    run.say(f"{name:35} {100 * record['score']:6.2f} %  [{low:.1f}, {high:.1f}]  "
            f"{', '.join(notes)}")  # fmt: skip


def main(settings: Settings) -> dict[str, Any]:
    """Run the tasks that are not done for this checkpoint yet; return all its results."""
    with start_run("eval", settings) as run:
        if settings.bench:
            if settings.bench == "gpu" and run.device.type != "cuda":
                raise MissingInput("bench gpu needs an NVIDIA GPU: `bash run.sh bench` does not")
            benches = {"speed": print_bench, "learn": bench_learning, "gpu": bench_gpu}
            return benches[settings.bench](run, settings)
        if settings.report:
            return write_report(run, settings)
        folder = find_checkpoint(settings.tag, settings.stage, settings.step)
        tokenizer = run_tokenizer(settings.tag)
        meta = read_meta(folder)
        source = settings.source or meta["source"]
        asked = {"checkpoint": folder.name, "weights": parent_key(folder), "source": source,
                 "chats": settings.source or meta.get("chats", source)}  # fmt: skip
        tasks, left_out = plan_tasks(settings, asked)
        if left_out:
            run.say(f"{WITHOUT_DATA}: {', '.join(left_out)}")
        newest = find_checkpoint(settings.tag, settings.stage).name
        usual = {"checkpoint": newest, "source": meta["source"],
                 "chats": meta.get("chats", meta["source"])}  # fmt: skip
        # another model's scores, or on other data, are kept apart from those that the report shows
        apart = "" if asked | usual == asked else f"-{folder.name}-{source}"
        out: Path = run_dir(settings.tag) / "eval" / f"{settings.stage}{apart}.json"
        report: dict[str, Any] = {**asked, "tasks": {}, "done": {}}
        # all have read it before one writes it
        saved = run.together(lambda: read_json(out))[0]
        if all(saved.get(key) == value for key, value in asked.items()):
            report = saved
        if not settings.asked():
            report["left_out"] = left_out
        dtype = pick_dtype(run.device, settings.dtype)
        engine = make_engine(load_model(folder, run.device, dtype), tokenizer, settings)
        limits = {"bpb": settings.max_documents, "samples": settings.seed}
        keys = {}  # of the tasks to do
        for task in tasks:
            path = data_path(task, asked)
            key = [limits.get(task, settings.max_items), crc32(path) if path.is_file() else 0]
            if settings.restart or report["done"].get(task) != key:
                keys[task] = key
        if settings.stage != "base":
            engine.expect(sum(
                tokens * len(read_items(data_path(task, asked), settings)) // run.world_size
                for task, tokens in {**WORLD_SETS, **PUBLIC_SETS}.items() if task in keys
            ))  # fmt: skip
        for task, key in keys.items():
            if task == "samples":
                report |= write_samples(engine, settings.seed)
            else:
                records = run_task(run, engine, task, asked, settings)
                if task.startswith("CORE/"):
                    records = {**report["tasks"].get("CORE", {}).get("tasks", {}), **records}
                    records = {"CORE": core_mean({n: records[n] for n in CORE if n in records})}
                report["tasks"] |= records
            report["done"][task] = key
            if run.rank == 0:
                write_json(out, report)
            if any_rank(run.stopping, run.device):
                if run.world_size > 1:  # torchrun begins again what ends with an error
                    run.say("evaluate: stopped; run the same command again to go on")
                    raise SystemExit(0)
                raise KeyboardInterrupt
        run.say(f"{settings.stage} {folder.name} on {source}:")
        for name, record in report["tasks"].items():
            show(run, name, record)
        for item in report.get("samples", []):
            run.say(f"  {item['prompt']}|{item['text']!r}")
        run.say(f"written: {out}")
    return report


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
