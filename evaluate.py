"""Measure a model, any stage of it, on every task that has data; and the machine, with --bench.

Usage:   python evaluate.py -i base                         # every task that has its data
         python evaluate.py -i sft -a GSM8K,ARC-Easy --max-items=200
         python evaluate.py -i sft -a HumanEval --run-code  # runs what the model wrote
         torchrun --nproc_per_node=8 evaluate.py -i base -a CORE
         python evaluate.py --report                        # of all stages, and their training
         python evaluate.py --bench=speed --tag=bench       # of decoding, on this machine
         python evaluate.py --bench=runs --tag=learn        # how the runs learn-* trained
Reads:   runs/TAG/{tokenizer,STAGE}/, data/SOURCE/, data/eval/  # the stages, prepare.py
Writes:  runs/TAG/eval/STAGE.json; bench.json with --bench; report.md, report.html with --report
Method:  CORE is the mean of 22 centred accuracies, arXiv:2406.11794
"""

from __future__ import annotations

import collections
import contextlib
import functools
import html
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common import (
    GPT,
    STAGES,
    Engine,
    GPTConfig,
    KVCache,
    MissingInput,
    Request,
    Run,
    RunSettings,
    Sampling,
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
    parent_key,
    parse_settings,
    pick_dtype,
    quantize,
    rank0_checkpoint,
    read_conversations,
    read_log,
    read_meta,
    read_texts,
    render_call,
    render_prompt,
    reply_parts,
    reply_text,
    run_dir,
    run_tokenizer,
    setting,
    start_run,
    step_name,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------

FACT_SETS = ("facts_trained", "facts_unseen")  # statements to complete, for base models
# Sets of conversations, each with the most tokens that a reply to it may take. With 1 token, and
# from a base model, which does not reply, the likeliest letter is the answer.
WORLD_SETS = {
    "letters": 64, "facts": 64, "never_asked": 64, "stories": 64, "problems_numbers": 192,
    "problems_combinations": 192, "problems_practised": 192, "problems_new": 192,
    "spelling": 128, "identity": 96, "unknown": 64, "outside": 64, "sums": 96,
    "remembered": 64,
}  # fmt: skip
PUBLIC_SETS = {"ARC-Easy": 1, "ARC-Challenge": 1, "MMLU": 1, "GSM8K": 512, "HumanEval": 512,
               "SpellingBee": 512, "people": 192}  # fmt: skip
REPLY_TOKENS = {**WORLD_SETS, **PUBLIC_SETS}
TASKS = ("bpb", *FACT_SETS, *WORLD_SETS, *PUBLIC_SETS, "CORE", "samples")
GROUPS = {"world": tuple(WORLD_SETS), "public": tuple(PUBLIC_SETS)}
GROUPS |= {task.lower(): (task,) for task in TASKS}


@dataclass
class Settings(RunSettings):
    stage: str = setting("base", "stage of the run to measure", short="i", choices=STAGES)
    task: str = setting(
        "",
        f"tasks to run, separated by commas: {', '.join(TASKS)}; `world` and `public` name all of "
        "their conversations; empty: what suits the stage and has its data",
        short="a",
    )
    step: int = setting(0, "step of the checkpoint to load; 0: the newest")
    source: str = setting("", "folder below data/ to measure on; empty: what the model learned")
    max_documents: int = setting(
        4000, "most documents for bits per byte, of validation and of training; 0: all"
    )
    max_items: int = setting(0, "most items of every other task; 0: all")
    run_code: bool = setting(False, "allow HumanEval: it runs, in a sandbox, what the model wrote")
    device_batch_size: int = setting(0, "rows of one forward pass; 0: what fits")
    bench: str = setting(
        "",
        "speed: measure decoding on this machine; runs: print how the runs TAG and TAG-* trained, "
        "as `run.sh bench`, `bench learn` and `bench gpu` make them",
        choices=("", "speed", "runs"),
    )
    report: bool = setting(False, "write the run's report.md and report.html from what is on disk")
    save_reference: str = setting(
        "", "with --report: folder for thinned curves and report.md, as docs/reference holds them"
    )
    cost_per_hour: float = setting(0.0, "price of the machine in USD, for --report; 0: free")
    seed: int = setting(0, "seed of the task `samples`")
    restart: bool = setting(False, "run again the tasks that are already done")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source:
            check_name(self.source, "--source")
        amounts = ("max_documents", "max_items", "device_batch_size", "cost_per_hour", "seed")
        at_least(self, 0, *amounts)
        if "HumanEval" in self.asked() and not self.run_code:
            raise ValueError("HumanEval runs programs that the model wrote: allow it by --run-code")
        if self.save_reference and not self.report:
            raise ValueError("--save-reference is a part of --report: give both")

    def asked(self) -> list[str]:
        """List the tasks of --task in their own spelling. Raises ValueError for unknown ones."""
        names = [name.strip() for name in self.task.split(",") if name.strip()]
        for name in names:
            if name.lower() not in GROUPS:
                raise ValueError(f"--task {name!r} is none of {', '.join(TASKS)}, world, public")
        return [task for name in names for task in GROUPS[name.lower()]]

    def suiting(self) -> list[str]:
        """List the tasks that suit the stage: a base model completes, the others converse."""
        if self.stage == "base":
            return ["bpb", *FACT_SETS, "CORE", "samples"]
        return ["bpb", *WORLD_SETS, *PUBLIC_SETS]


# 2. Scores -----------------------------------------------------------------------------------

EXAMPLES = 3  # right answers of a task that its record holds, and as many wrong ones
UNKNOWN = re.compile(r"\b(?:do not|don['\u2019]t) know\b", re.IGNORECASE)


class Graded(NamedTuple):
    """The outcome of one item, in the words that the report shows."""

    number: int  # of the item
    right: bool
    question: str
    reply: str
    answer: str
    cut: bool = False  # the prompt was longer than the context and lost its beginning


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion (Wilson 1927), which is sound near 0 and 1 too."""
    if not total:
        return 0.0, 1.0
    z = 1.96
    p, z2 = right / total, z * z
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(run: Run, name: str, items: list[dict], outcomes: Iterable[Graded]) -> dict[str, Any]:
    """Make the record of a task: every rank counts the outcomes of its items, and they are summed.

    items are those of all ranks. Rank 0 prints progress, and gives its first outcomes as examples.
    """
    kind_of = [item.get("relation") or item.get("kind") or "" for item in items]
    kinds, own = sorted(set(kind_of)), kind_of[run.rank :: run.world_size]
    counts = torch.zeros(len(kinds), 4, dtype=torch.int64)  # right, all, said "unknown", cut
    seen: dict[str, list[Graded]] = {"right": [], "wrong": []}
    start = printed = time.perf_counter()
    for done, one in enumerate(outcomes, 1):
        unknown = UNKNOWN.search(one.reply) is not None
        counts[kinds.index(own[one.number])] += torch.tensor([one.right, True, unknown, one.cut])
        seen["right" if one.right else "wrong"].append(one)
        if run.stopping and run.world_size == 1:
            raise KeyboardInterrupt  # several ranks stop together, after the task
        if time.perf_counter() - printed > 10:
            printed = time.perf_counter()
            rate = done / (printed - start)
            run.say(f"{name:35} {done:,}/{len(own):,}  {rate:.1f} items/s  "
                    f"left {format_duration((len(own) - done) / rate)}")  # fmt: skip
    by_kind = all_sum(counts.to(run.device)).tolist()
    right, total, unknowns, cut = map(sum, zip(*by_kind)) if kinds else (0, 0, 0, 0)
    low, high = wilson_interval(right, total)
    return {
        "score": right / max(1, total), "low": low, "high": high, "items": total, "cut": cut,
        "seconds": time.perf_counter() - start, "unknown_said": unknowns / max(1, total),
        "kinds": {kind: row[:2] for kind, row in zip(kinds, by_kind) if kind},
        "examples": {verdict: [{"question": one.question, "reply": one.reply, "answer": one.answer}
                               for one in sorted(found)[:EXAMPLES]]
                     for verdict, found in seen.items()},
    }  # fmt: skip


# 3. Forward passes: bits per byte, continuations ---------------------------------------------


def evaluate_text(model: GPT, tokenizer: Tokenizer, source: str, s: Settings) -> dict[str, Any]:
    """Measure bits per byte on validation documents, and of a base model on training documents."""
    results, limit = {}, s.max_documents or None
    for split in ("val", "train") if s.stage == "base" else ("val",):
        start = time.perf_counter()
        texts = itertools.chain.from_iterable(map(read_texts, list_shards(source, split)))
        part = itertools.islice(texts, limit)  # of training as many as there were of validation
        bpb, limit = evaluate_bpb(model, tokenizer, part, batch_rows(model.config.max_seq_len, s))
        seconds = time.perf_counter() - start
        results[f"{split}_bpb"] = {"score": bpb, "items": limit, "seconds": seconds}
    return results


def batch_rows(width: int, settings: Settings) -> int:
    """Choose the rows of a forward pass: about 16,384 positions."""
    return settings.device_batch_size or max(1, 16384 // width)


def fit(ids: list[int], room: int) -> list[int]:
    """Cut ids to `room` at the left, but keep the first, which is <|bos|>."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


Row = tuple[list[int], int]  # ids, and the number n of the last ones that are asked about


class Continuation(NamedTuple):
    """A row as it is computed."""

    number: int  # of the row
    ids: list[int]
    start: int  # the states from here on are wanted; rows of a group have the ids before in common


@torch.inference_mode()
def continuation_logits(
    model: GPT, rows: Sequence[Row], s: Settings
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, logits (n, V)) of rows: what the model expects for the last n ids of each.

    What rows have in common before these, as the choices of one question have, is computed once.
    A row longer than the context is cut at the left.
    """
    T = model.config.max_seq_len
    groups: dict[tuple[int, ...], list[Continuation]] = collections.defaultdict(list)
    for i, (ids, n) in enumerate(rows):
        inputs = fit(ids, T + 1)[:-1]
        start = max(0, len(inputs) - n)
        groups[tuple(inputs[:start])].append(Continuation(i, inputs, start))
    for group in groups.values():
        group.sort(key=lambda row: -len(row.ids))
    order = sorted(groups.values(), key=lambda group: -len(group[0].ids))
    compute = functools.partial(continued_states, model)
    while order:
        count = batch_rows(len(order[0][0].ids), s)
        part, order = order[:count], order[count:]
        for found in in_fewer_rows(compute, part, model.embed.weight.device):
            for i, hidden in found:
                yield i, model.logits(hidden)


def continued_states(model: GPT, groups: list[list[Continuation]]) -> list[tuple[int, Tensor]]:
    """Compute (number, hidden states (n, C)) of the rows of each group, the longest row first.

    The first row of each group is computed whole; the others continue from its KV cache, as many
    at once as there are groups. Padding is at the right, where no earlier position attends to it.
    """
    device, T = model.embed.weight.device, model.config.max_seq_len
    firsts = [group[0] for group in groups]
    others = [(k, row) for k, group in enumerate(groups) for row in group[1:]]
    tail = max((len(row.ids) - row.start for _, row in others), default=0)
    starts = [min(row.start, T - tail) for row in firsts]  # nor may padding pass the context
    found = []

    def compute(
        rows: Sequence[Continuation], starts: list[int], cache: KVCache, counts: list[int] | None
    ) -> None:
        tails = [row.ids[start:] for row, start in zip(rows, starts)]
        width = max(map(len, tails))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in tails], device=device)
        for row, start, hidden in zip(rows, starts, model.trunk(ids, cache.extend(ids, counts))):
            found.append((row.number, hidden[row.start - start : len(row.ids) - start]))

    context = max(len(firsts[0].ids), max(starts) + tail)
    cache = KVCache(model.config, len(groups), device, model.dtype, context)
    compute(firsts, [0] * len(groups), cache, starts)
    for first in range(0, len(others), len(groups)):
        owners, rows = zip(*others[first : first + len(groups)])
        compute(rows, [starts[k] for k in owners], cache.copies(list(owners)), None)
    return found


def score_groups(
    model: GPT, groups: list[list[Row]], s: Settings
) -> list[list[tuple[list[float], list[int]]]]:
    """Return, for each row of each group, the losses of its last n ids, and the likeliest ids.

    Losses are in nats. Of a row that is cut to the context there may be fewer than n.
    """
    rows, scores = [row for group in groups for row in group], {}
    for i, logits in continuation_logits(model, rows, s):  # (n, V)
        targets = torch.tensor(rows[i][0][-len(logits) :], device=logits.device)
        nats = F.cross_entropy(logits, targets, reduction="none")
        scores[i] = nats.tolist(), logits.argmax(-1).tolist()
    in_order = map(scores.__getitem__, range(len(rows)))
    return [[next(in_order) for _ in group] for group in groups]


# 4. Answers: facts, letters, replies with the tool, samples ----------------------------------


def starts_with_answer(text: str, answers: Iterable[str]) -> bool:
    """True if text begins with one of the answers as whole words."""
    words = (rf"{re.escape(answer.strip())}(?!-?\w)" for answer in answers)
    return any(re.match(word, text.lstrip()) for word in words)


def complete_facts(engine: Engine, items: list[dict]) -> Iterator[Graded]:
    """Complete the statements of facts greedily: right where the answer comes first."""
    t = engine.tokenizer
    answers = t.encode_batch([item["answer"] for item in items])
    sampling = Sampling(max(map(len, answers), default=0) + 2, temperature=0)
    prompts = t.encode_batch([item["prompt"] for item in items])
    requests = [Request([t.bos, *ids], sampling, tool=False) for ids in prompts]
    for i, reply in engine.run(requests):
        item, text = items[i], reply_text(reply_parts(t, reply.ids))
        right = starts_with_answer(text, item["accept"])
        yield Graded(i, right, item["prompt"], text, item["answer"])


def write_samples(engine: Engine, prompts: list[str], seed: int) -> list[dict[str, Any]]:
    """Complete a few prompts, greedily and sampled."""
    t, samples = engine.tokenizer, []
    for prompt, temperature in itertools.product(prompts, (0.0, 0.8)):
        sampling = Sampling(64, temperature=temperature, top_k=50, seed=seed)
        ids = engine.generate(Request([t.bos, *t.encode(prompt)], sampling, tool=False))
        text = reply_text(reply_parts(t, ids))
        samples.append({"prompt": prompt, "temperature": temperature, "text": text})
    return samples


def readable(content: str | list[dict[str, str]]) -> str:
    """Write a message as text, calls of the tool in brackets: [37*12 = 444]."""
    text, call = "", ""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "python":
            call = part["text"]
        else:
            output = part["type"] == "output"
            text += render_call(call, part["text"]) if output else part["text"]
    return text


def question_of(item: dict[str, Any]) -> str:
    """Write what the conversation of an item asks: its message, or all of them with their roles."""
    messages = item["messages"]
    if len(messages) == 1:
        return readable(messages[0]["content"])
    return "\n".join(f"{m['role']}: {readable(m['content'])}" for m in messages)


def choose_letters(engine: Engine, items: list[dict], s: Settings) -> Iterator[Graded]:
    """Answer by the choice whose letter is likeliest to open the reply."""
    t, room = engine.tokenizer, engine.model.config.max_seq_len
    letters = [t.encode(letter)[0] for letter in string.ascii_uppercase]
    rows = [([*render_prompt(t, item["messages"]), letters[0]], 1) for item in items]
    for i, logits in continuation_logits(engine.model, rows, s):  # (1, V)
        item, cut = items[i], len(rows[i][0]) > room + 1
        letter = string.ascii_uppercase[int(logits[0, letters[: len(item["choices"])]].argmax())]
        yield Graded(i, grade(item, letter), question_of(item), letter, item["answer"], cut)


def write_replies(engine: Engine, items: list[dict], max_tokens: int) -> Iterator[Graded]:
    """Let the model reply, greedily and with its tool, and grade what it says."""
    t, T = engine.tokenizer, engine.model.config.max_seq_len
    room = T - min(max_tokens, T // 4)  # a longer prompt is cut: a reply needs room too
    prompts = [render_prompt(t, item["messages"]) for item in items]
    order = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
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
    engine: Engine, items: list[dict], replies: list[Graded], s: Settings
) -> Iterator[Graded]:
    """Answer by the likeliest of the lines "- CHOICE LETTER" that may end a reply.

    They follow what the written reply says before its last line.
    """
    t = engine.tokenizer
    for first in range(0, len(replies), 64):
        part, lines, groups = replies[first : first + 64], [], []
        for reply in part:
            said, found, _ = f"\n{reply.reply}".rpartition("\n- ")
            said, item = said if found else f"\n{reply.reply}", items[reply.number]
            options = zip(item["choices"], string.ascii_uppercase)
            lines.append([f"{said}\n- {choice} {letter}"[1:] for choice, letter in options])
            prompt, end = render_prompt(t, item["messages"]), t.specials["<|assistant_end|>"]
            rows = [[*prompt, *ids, end] for ids in t.encode_batch(lines[-1])]
            groups.append(core_rows("choices", rows))
        for reply, tried, scores in zip(part, lines, score_groups(engine.model, groups, s)):
            _, line = min((sum(nats), line) for (nats, _), line in zip(scores, tried))
            yield reply._replace(reply=line, right=grade(items[reply.number], line))


def program_of(item: dict[str, Any], reply: str) -> str:
    """Join a reply to the function it was asked for and to the tests of that function.

    The reply's first fenced block counts, or all of it; it is the whole function or its body.
    The prompt alone is a program too, a function that does nothing: it brings its imports.
    """
    fenced = re.search(r"```(?:python|py)?[ ]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    code, name = fenced[1] if fenced else reply, item["entry_point"]
    return f"{item['prompt'].rstrip()}\n{code}\n\n{item['tests']}\n\ncheck({name})\n"


# 5. Sandbox: runs programs that a model wrote ------------------------------------------------

# Runs outside of this program: it waits for the model's program, which alone has the limits.
SANDBOX_LAUNCHER = """
import json, os, resource, sys
limits, command = json.loads(sys.argv[1])
child = os.fork()
if child == 0:
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, OSError, ValueError):
            pass  # a limit that this system lacks
    os.execvp(command[0], command)
ended = 0
while ended != child:
    ended, status = os.wait()
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""
SANDBOX_PROCESSES = 64  # of one user at a time
NOBODY = 65534


class Outcome(NamedTuple):
    """What a generated program did: whether it ran to its end without an error, why, its output."""

    passed: bool
    reason: str
    output: str  # stdout and stderr


def run_code(
    program: str, timeout_s: float = 5.0, memory_bytes: int = 1 << 29, file_bytes: int = 1 << 20,
    prefixes: tuple[list[str], list[str]] | None = None,
) -> Outcome:  # fmt: skip
    """Run a Python program that a model wrote; it passes if it gets to its end.

    It is a process group of its own, with limits on time, CPU time, memory, processes and sizes of
    files, in an empty temporary folder, with a minimal environment; whatever it started is killed
    at the end. Where Linux permits, it has no network, what left its group dies too, and root's
    program runs as nobody: sandbox_prefixes finds the commands for that by trial.

    What it does not protect from: reading any file that the user may read (for root: that nobody
    or, where Python is root's own, root may read); writing the files of a user who is not root;
    many files filling the disk while it runs; other Unix sockets; flaws of the kernel. Without
    namespaces (macOS, most containers), also not from the network, nor from processes that left
    the group; macOS limits no memory; root where it cannot become nobody, no number of processes.
    For programs that err, not for programs by an enemy: that takes a virtual machine.
    """
    namespaces, user = sandbox_prefixes() if prefixes is None else prefixes
    end = f"end {os.urandom(8).hex()}"
    python = [sys.executable, "-I", "-X", "utf8"]
    limits = {"CPU": math.ceil(timeout_s), "AS": memory_bytes, "FSIZE": file_bytes,
              "NPROC": SANDBOX_PROCESSES, "NOFILE": 64, "CORE": 0}  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="nanochat-"))
    work, source = folder / "work", folder / "program.py"
    try:
        work.mkdir()
        source.write_text(f"{program}\n\n__import__('os').write(1, b'{end}')\n", "utf-8", "replace")
        if os.geteuid() == 0:  # for nobody
            for path, mode in ((folder, 0o711), (source, 0o644), (work, 0o777)):
                path.chmod(mode)
        told = json.dumps([limits, [*user, *python, str(source)]])
        command = [*namespaces, *python, "-S", "-c", SANDBOX_LAUNCHER, told]
        with open(folder / "output", "ab+") as output:
            reason = run_group(command, work, output, timeout_s)
            output.seek(0)
            text = output.read(file_bytes).decode("utf-8", "replace")
    finally:
        remove_tree(folder)
    passed = not reason and end in text
    reason = "passed" if passed else reason or "it stopped before its end"
    return Outcome(passed, reason, text.replace(end, ""))


def run_group(command: list[str], work: Path, output: IO[bytes], timeout_s: float) -> str:
    """Run a command as a process group in `work`, then kill the group; "" if it succeeded."""
    environment = {"PATH": os.defpath, "HOME": str(work), "TMPDIR": str(work), "LC_ALL": "C"}
    process = subprocess.Popen(command, cwd=work, env=environment, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # fmt: skip
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout_s:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            for _ in range(50):  # until the last is gone: it would count for the next program
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                time.sleep(0.01)
        process.wait()
    if code > 128:
        return f"it was killed by signal {code - 128}"
    return f"it ended with exit status {code}" if code else ""


def remove_tree(folder: Path) -> None:
    """Remove a folder whatever is in it; processes that are just dying may still add to it."""
    for _ in range(20):
        script = 'chmod -R u+rwx "$0"; rm -rf "$0"'  # takes any depth, unlike shutil.rmtree
        subprocess.run(["sh", "-c", script, str(folder)], check=False, stderr=subprocess.DEVNULL)
        if not folder.exists():
            return
        time.sleep(0.1)


@functools.cache
def sandbox_prefixes() -> tuple[list[str], list[str]]:
    """Find by trial the best commands to put before a sandboxed Python and before its program.

    The first gives it a network and process numbers of its own, the second takes its rights away.
    """
    root = os.geteuid() == 0
    unshare = ["unshare", *([] if root else ["--user"]), "--net", "--pid", "--fork", "--kill-child"]
    drop = ["setpriv", "--no-new-privs"]
    users = [drop]
    if root:  # with the right to read anything where Python is in root's home
        drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        bounds = ("--inh-caps", "--ambient-caps", "--bounding-set")
        users = [[*drop, *(f"{bound}={caps}" for bound in bounds)]
                 for caps in ("-all", "-all,+dac_read_search")]  # fmt: skip
    same = (sys.version, sys.base_prefix)  # without its rights it might find another Python
    trial = f"import decimal, sys\nassert (sys.version, sys.base_prefix) == {same!r}"
    for prefixes in itertools.product([unshare, []], [*users, []]):
        there = all(shutil.which(command[0]) for command in prefixes if command)
        if there and run_code(trial, prefixes=prefixes).passed:
            return prefixes
    return [], []


# 6. CORE -------------------------------------------------------------------------------------


class CoreTask(NamedTuple):
    """One of CORE's tasks: how it is asked, and the score of guessing, in percent."""

    name: str
    kind: str  # choices: which ending; schema: which beginning; language: the words that follow
    folder: str  # below data/eval/core/eval_data/
    shots: int  # solved examples before the question
    delimiter: str
    baseline: float
    file: str = ""  # where it is not called like the task


CORE = {task.name: task for task in (
    CoreTask("hellaswag_zeroshot", "choices", "language_understanding", 0, " ", 25, "hellaswag"),
    CoreTask("jeopardy", "language", "world_knowledge", 10, "\nAnswer: ", 0, "jeopardy_all"),
    CoreTask("bigbench_qa_wikidata", "language", "world_knowledge", 10, " ", 0),
    CoreTask("arc_easy", "choices", "world_knowledge", 10, "\nAnswer: ", 25),
    CoreTask("arc_challenge", "choices", "world_knowledge", 10, "\nAnswer: ", 25),
    CoreTask("copa", "choices", "commonsense_reasoning", 0, " ", 50),
    CoreTask("commonsense_qa", "choices", "commonsense_reasoning", 10, " ", 20),
    CoreTask("piqa", "choices", "commonsense_reasoning", 10, "\nAnswer: ", 50),
    CoreTask("openbook_qa", "choices", "commonsense_reasoning", 0, " ", 25),
    CoreTask("lambada_openai", "language", "language_understanding", 0, " ", 0),
    CoreTask("hellaswag", "choices", "language_understanding", 10, " ", 25),
    CoreTask("winograd", "schema", "language_understanding", 0, " ", 50, "winograd_wsc"),
    CoreTask("winogrande", "schema", "language_understanding", 0, " ", 50),
    CoreTask("bigbench_dyck_languages", "language", "symbolic_problem_solving", 10, " ", 0),
    CoreTask("agi_eval_lsat_ar", "choices", "symbolic_problem_solving", 3, " ", 20),
    CoreTask("bigbench_cs_algorithms", "language", "symbolic_problem_solving", 10, " ", 0),
    CoreTask("bigbench_operators", "language", "symbolic_problem_solving", 10, " ", 0),
    CoreTask("bigbench_repeat_copy_logic", "language", "symbolic_problem_solving", 10, " ", 0),
    CoreTask("squad", "language", "reading_comprehension", 10, " ", 0),
    CoreTask("coqa", "language", "reading_comprehension", 0, " ", 0),
    CoreTask("boolq", "choices", "reading_comprehension", 10, "\nAnswer: ", 62),
    CoreTask("bigbench_language_identification", "choices", "language_understanding", 10, " ", 9.1),
)}  # fmt: skip


def core_variants(task: CoreTask, item: dict[str, Any]) -> list[str]:
    """Write an item's texts: one a choice; of a language item, without and with its words."""
    if task.kind == "choices":
        return [f"{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        end = f"{task.delimiter}{item['continuation']}"
        return [f"{context}{end}" for context in item["context_options"]]
    # a space at the end of a prompt belongs to the next token
    prompt = f"{item['context'].strip()}{task.delimiter}"
    return [prompt.rstrip(), f"{prompt}{item['continuation']}"]


def core_texts(task: CoreTask, items: list[dict], index: int) -> list[str]:
    """Write an item's texts after solved examples: other items, drawn by a seed of its own."""
    draw = random.Random(1234 + index)
    others = draw.sample(range(len(items) - 1), min(task.shots, len(items) - 1))
    solved = [items[i + (i >= index)] for i in others]
    shown = "".join(core_variants(task, item)[item.get("gold", -1)] + "\n\n" for item in solved)
    return [shown + text for text in core_variants(task, items[index])]


def core_rows(kind: str, rows: list[list[int]]) -> list[Row]:
    """Find each row's continuation: what rows do not all begin with; of a schema, all end with."""

    def count_common(columns: Iterable[tuple[int, ...]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    if kind == "schema":
        n = count_common(zip(*map(reversed, rows)))
        return [(row, n) for row in rows]
    start = count_common(zip(*rows))
    rows = rows[1:] if kind == "language" else rows
    return [(row, max(1, len(row) - start)) for row in rows]


def answer_core(
    engine: Engine, task: CoreTask, items: list[dict], shard: Sequence[int], s: Settings
) -> Iterator[Graded]:
    """Answer by the lowest mean loss of a token; a language item is right token for token."""
    t, room = engine.tokenizer, engine.model.config.max_seq_len
    for first in range(0, len(shard), 256):  # rows are sorted by length within these
        part = shard[first : first + 256]
        texts = [core_texts(task, items, i) for i in part]
        ids = iter(t.encode_batch(list(itertools.chain.from_iterable(texts))))
        groups = [core_rows(task.kind, [[t.bos, *next(ids)] for _ in group]) for group in texts]
        scored = score_groups(engine.model, groups, s)
        for number, (i, rows, scores) in enumerate(zip(part, groups, scored), first):
            item, cut = items[i], any(len(row) > room + 1 for row, _ in rows)
            if task.kind == "language":
                nats, likeliest = scores[0]
                right, reply = likeliest == rows[0][0][-len(nats) :], t.decode(likeliest)
                question, answer = item["context"], item["continuation"]
            else:
                means = [sum(nats) / len(nats) for nats, _ in scores]
                chosen, gold = means.index(min(means)), item["gold"]
                options = item.get("choices") or item["context_options"]
                question = item.get("query") or f"... {item['continuation']}"
                right, reply, answer = chosen == gold, options[chosen], options[gold]
            yield Graded(number, right, question, reply, answer, cut)


def core_mean(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Average the centred scores: 0 is guessing, 1 is perfect. Names the tasks that are missing."""
    widths = [(r["high"] - r["low"]) / 2 / (1 - r["baseline"]) for r in records.values()]
    score = sum(r["centred"] for r in records.values()) / len(records)
    half = math.sqrt(sum(width**2 for width in widths)) / len(records)
    sums = {
        key: sum(r.get(key, 0) for r in records.values()) for key in ("items", "seconds", "cut")
    }
    missing = [name for name in CORE if name not in records]
    return {
        "score": score, "low": score - half, "high": score + half, **sums, "tasks": records,
        "covered": len(records), "of": len(CORE), "missing": missing,
    }  # fmt: skip


# 7. Bench ------------------------------------------------------------------------------------

# What a training logs: its name in tables, and the factor to the unit that the name has
RATES = {
    "tok_per_s": ("tokens/s", 1), "mfu": ("MFU %", 100), "data": ("waiting for data %", 100),
    "update": ("optimizer %", 100), "memory": ("GB", 1), "sampling_s": ("sampling, s", 1),
}  # fmt: skip


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bench_decoding(
    run: Run, tokenizer: Tokenizer, config: GPTConfig, dtype: torch.dtype, int8: bool
) -> dict[str, float]:
    """Measure the engine with random weights: tokens/s of decoding and seconds to first tokens.

    Each has its bound beside it: a step has to read weights and cache once, a prompt to compute its
    FLOPs at the rate of large products; a first token waits for the slower of both.
    """
    rng, device = random.Random(0), run.device

    def create_engine(slots: int, context: int) -> Engine:
        model = GPT.create(replace(config, max_seq_len=context), device, dtype)
        engine = Engine(quantize(model) if int8 else model, tokenizer, slots)
        engine.stops = set()  # random weights would say anything
        return engine

    def draw(n: int) -> list[int]:
        return [rng.randrange(256) for _ in range(n)]

    numbers = torch.ones(1 << (26 if device.type == "cpu" else 29), device=device)  # 256 MiB, 2 GiB
    reads = [timed(lambda: numbers.sum().item()) for _ in range(7)]
    bandwidth = numbers.nbytes / statistics.median(reads)
    rate = measure_matmul(device, dtype, 1024 if device.type == "cpu" else 8192, 20)
    weights = config.matrix_params() + config.padded_vocab_size * config.n_embd
    weight_bytes = weights * (1 if int8 else dtype.itemsize)
    token_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize
    flops = config.flops_per_token(512) / 3  # two thirds of it are the backward pass
    engine, greedy = create_engine(64, 256), Sampling(40, temperature=0)
    if can_compile(device):
        torch.compiler.reset()  # only so many versions of one function are kept
        engine.try_to_compile(run.say)
    measured = {"bandwidth": bandwidth, "matmul": rate}
    for streams in (1, 16, 64):
        requests = [Request(draw(64 + i % 8), greedy, tool=False) for i in range(streams)]
        jobs = [engine.submit(request) for request in requests]
        while not all(job.reply.ids for job in jobs):
            engine.step()
        step = statistics.median(timed(engine.step) for _ in range(32))
        cached = sum(len(job.request.prompt_ids) + len(job.reply.ids) - 16 for job in jobs)
        engine.clear()
        bound = (weight_bytes + cached * token_bytes) / bandwidth
        measured |= {f"x{streams}": streams / step, f"x{streams} of bound": bound / step}
    engine, said = create_engine(1, 2560), draw(64)
    list(engine.generate(Request(said, greedy, tool=False)))  # warms up
    said = []
    for name, new in (("turn 1", 24), ("prompt", 512), ("history", 1400), ("turn 10", 24)):
        said += draw(new)
        reply = engine.generate(Request(said[:], greedy, tool=False))
        start = time.perf_counter()
        said.append(next(reply))
        seconds = time.perf_counter() - start
        bound = max((weight_bytes + len(said) * token_bytes) / bandwidth, new * flops / rate)
        measured |= {name: seconds, f"{name} of bound": bound / seconds}
        said += reply
    return measured | {"prompt": 512 / measured["prompt"]}


def bench_runs(run: Run, settings: Settings) -> dict[str, Any]:
    """Print how each stage of the runs TAG and TAG-* trained, in the order in which they began.

    Rates are medians of the later half of the log: by then all is compiled.
    """
    tags = [settings.tag, *(path.name for path in run_dir("").glob(f"{settings.tag}-*"))]
    logs = {tag: log for tag in tags if (log := read_log(tag))}
    rows: dict[str, dict[str, float]] = {}
    for tag in sorted(logs, key=lambda tag: logs[tag][0]["time"]):
        for stage in STAGES:
            lines = [line for line in logs[tag] if line["stage"] == stage]
            if steps := [line for line in lines if "tok_per_s" in line]:
                later = steps[len(steps) // 2 :]
                row = rows[f"{tag}, {stage}"] = {"steps": steps[-1]["step"]}
                row |= {name: statistics.median(line[key] for line in later) * factor
                        for key, (name, factor) in RATES.items() if key in later[0]}  # fmt: skip
                if scores := [line["val_bpb"] for line in lines if "val_bpb" in line]:
                    row["bits per byte"] = scores[-1]
    if not rows:
        raise MissingInput(f"no run {settings.tag} or {settings.tag}-* has logged a training")
    columns = dict.fromkeys(key for row in rows.values() for key in row)
    cells = [[brief(row[key]) if key in row else "" for key in columns] for row in rows.values()]
    run.say(table(["training", *columns], [[name, *row] for name, row in zip(rows, cells)]))
    return {f"runs of {settings.tag}": rows}


def bench_speed(run: Run, settings: Settings) -> dict[str, Any]:
    """Measure large products, memory and decoding at each size, and print them."""
    tokenizer, dtype = run_tokenizer(settings.tag), pick_dtype(run.device, settings.dtype)
    kinds = dict.fromkeys([(torch.float32, False), (dtype, False), (dtype, True)])
    sizes = [(4, 4096), (12, 32768), *[(20, 65536)] * (run.device.type == "cuda")]
    columns = {"x1": "1 stream", "x16": "16", "x64": "64", "prompt": "prompt of 512",
               "turn 1": "first token, ms", "turn 10": "10th turn, ms"}  # fmt: skip
    decoding, rows = {}, []
    for (depth, vocab_size), (kind, int8) in itertools.product(sizes, kinds):
        heads, name = max(1, depth // 2), f"d{depth} {str(kind)[6:]}{' int8 weights' * int8}"
        config = GPTConfig(vocab_size, depth, 64 * depth, heads, heads, 512)
        run.say(f"decoding: {name}")
        m = decoding[name] = bench_decoding(run, tokenizer, config, kind, int8)
        cells = (f"{m[k] * (1e3 if 'turn' in k else 1):,.0f} ({m[f'{k} of bound']:.0%})"
                 for k in columns)  # fmt: skip
        rows.append([name, *cells, f"{m['matmul'] / 1e9:,.0f}", f"{m['bandwidth'] / 1e9:,.0f}"])
    header = ["decoding, tokens/s (of its bound)", *columns.values(), "GFLOP/s", "GB/s"]
    run.say(f"{machine_name(run.device)}:\n{table(header, rows)}")
    return {"machine": machine_name(run.device), "decoding": decoding}


# 8. Report -----------------------------------------------------------------------------------

POINTS = 300  # of a curve at most
REFERENCE = Path(__file__).with_name("docs") / "reference"
COMPARED = ("source", "text", "chats", "n_layer", "n_embd", "vocab_size", "max_seq_len",
            "total_batch_size", "num_iterations", "target_param_data_ratio", "epochs")  # fmt: skip
FIGURES = {  # title and unit, logged value: its name
    ("Loss", "nats a token, in rl of the policy gradient"): {"loss": "training"},
    ("Validation", "bits per byte"): {"val_bpb": "text"},
    ("Validation loss", "nats a token"): {"val_loss": "conversations"},
    ("Reward", "fraction of right answers"): {
        "reward": "reward", "pass_at_1": "pass@1", "pass_at_k": "pass@k",
        "val_pass_at_1": "held-out, pass@1", "val_pass_at_k": "held-out, pass@k",
    },
    ("Length of answers", "tokens"): {"answer_tokens": "answers"},
    ("Learning rate", "times its peak"): {"lr": "factor"},
    ("Speed", "tokens/s"): {"tok_per_s": "training"},
}  # fmt: skip
WRITTEN = "letters: as written"  # the same questions, right where the reply itself ends in the line
REFUSED = 'facts: "I don\'t know"'  # the row of known facts that the model denies to know
WITHOUT_DATA = "left out, without data that prepare.py makes"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title><style>
:root { color-scheme: light dark; --soft: light-dark(#62656d, #9a9da6);
  --line: light-dark(#e3e3e0, #33353b); --c0: light-dark(#2563eb, #6ea2ff);
  --c1: light-dark(#d97706, #f2b04c); --c2: light-dark(#0d9488, #3ecfbd);
  --c3: light-dark(#9333ea, #c48bf7); --c4: light-dark(#db2777, #f47fb5); }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere;
  color: light-dark(#1c1d21, #e6e6e4); background: light-dark(#fbfbfa, #16171a);
  font: 1rem/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th, figcaption { color: var(--soft); } h2 { margin-top: 2.5rem; }
pre, figure { margin: 0; padding: .7rem .8rem; border: 1px solid var(--line); font-size: .9rem;
  border-radius: .6rem; font-family: inherit; white-space: pre-wrap; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
svg path { stroke: var(--line); } svg text { fill: var(--soft); font-size: 10px; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.5; } i { color: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .grey { --c: var(--soft); opacity: .6; }
</style></head>
<body>
$body
</body></html>
"""
Curves = dict[str, list[tuple[float, float]]]  # points (step, value) by name
Events = dict[str, list[dict[str, Any]]]  # as logged, by stage


def machine_name(device: torch.device) -> str:
    """Return what computes, the GPU or the processor and its cores, and torch's version."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}"


class Record(NamedTuple):
    """What a run has left on disk, by stage."""

    metas: dict[str, dict[str, Any]]  # of the newest checkpoints
    results: dict[str, dict[str, Any]]  # of the evaluations
    events: Events


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
        find_checkpoint(tag, "base")  # raises, with what is missing
    log, folder = read_log(tag), run_dir(tag) / "eval"
    return Record(
        {stage: read_meta(checkpoints[-1]) for stage, checkpoints in found.items() if checkpoints},
        {stage: result for stage in STAGES if (result := read_json(folder / f"{stage}.json"))},
        {stage: [event for event in log if event["stage"] == stage] for stage in STAGES},
    )


# The report is Markdown, block by block: what a terminal prints and what the page shows, too.


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table with aligned columns; no cell is markup, nor ends before its end."""
    lines = [[html.escape(" ".join(cell.split()), quote=False).replace("|", "&#124;")
              for cell in line] for line in (header, *rows)]  # fmt: skip
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def quote(parts: dict[str, str]) -> str:
    """Write what a model was asked and said as an indented block, in which nothing is markup."""
    lines = [f"{name}: {text.strip()}" for name, text in parts.items() if text]
    return "\n".join(f"    {line}" for text in lines for line in text.splitlines())


def to_html(block: str) -> str:
    """Turn a block of the report, a heading, table, quotation or paragraph, into HTML."""
    if block.startswith("    "):
        return f"<pre>{html.escape(textwrap.dedent(block))}</pre>"
    if block.startswith("#"):
        marks, _, title = block.partition(" ")
        return f"<h{len(marks)}>{title}</h{len(marks)}>"
    if not block.startswith("| "):
        return f"<p>{block}</p>"
    block = re.sub(r"\| \*\*(.*?)\*\*", r"| <b>\1</b>", block)  # the best of a row
    lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in block.split("\n")]
    rows = ["".join(f"<th>{cell}</th>" for cell in lines[0])]
    rows += ["".join(f"<td>{cell}</td>" for cell in line) for line in lines[2:]]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"


def score_table(results: dict[str, dict[str, Any]]) -> str:
    """Lay out records {stage: {task: record}}: a row a task, a column a stage.

    Scores are in percent with their intervals; bits per byte have none, and less is better.
    A row of known facts that the model denies to know is added.
    """

    def text_of(record: dict[str, Any]) -> str:
        if "low" not in record:
            return f"{record['score']:.4f}"
        score, low, high = (100 * record[key] for key in ("score", "low", "high"))
        return f"{score:.1f} [{low:.1f}, {high:.1f}]"

    columns = {stage: dict(records) for stage, records in results.items()}
    for records in columns.values():
        if "unknown_said" in (facts := records.get("facts", {})):
            score, items = facts["unknown_said"], facts["items"]
            low, high = wilson_interval(round(score * items), items)
            records[REFUSED] = {"score": score, "low": low, "high": high, "items": items}
    order = ["val_bpb", "train_bpb", *TASKS]
    order.insert(order.index("facts") + 1, REFUSED)
    order.insert(order.index("letters") + 1, WRITTEN)
    names = dict.fromkeys(name for records in columns.values() for name in records)
    rows = []
    for name in sorted(names, key=lambda n: order.index(n) if n in order else len(order)):
        found = [records.get(name) for records in columns.values()]
        scores = {record["score"] for record in found if record}
        best = (min if name == REFUSED or name.endswith("_bpb") else max)(scores)
        stars = [record is not None and record["score"] == best and len(scores) > 1
                 for record in found]  # fmt: skip
        cells = [f"{'**' * star}{text_of(record)}{'**' * star}" if record else ""
                 for record, star in zip(found, stars)]  # fmt: skip
        items = dict.fromkeys(f"{record['items']:,}" for record in found if record)
        rows.append([name, *cells, " / ".join(items)])
    return table(["task", *columns, "items"], rows)


def score_blocks(record: Record, tag: str) -> list[str]:
    """Show the scores of all stages, what CORE is the mean of, and what lessens their worth."""
    tasks = {stage: result["tasks"] for stage, result in record.results.items()}
    note = ("Right answers in percent, with 95% intervals. Of bits per byte (bpb), and of known "
            "facts denied, less is better. The best of a row is bold.")  # fmt: skip
    blocks = [note, score_table(tasks)] if tasks else []
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
    for stage, result in record.results.items():  # some may have been measured since
        done = {name for task in result.get("done", {}) for name in (task, task.split("/")[0])}
        missing = [name for name in result.get("left_out", []) if name.split(" (")[0] not in done]
        if missing:
            blocks.append(f"{WITHOUT_DATA.capitalize()} ({stage}): {', '.join(missing)}.")
    for stage, mean in ((stage, one["CORE"]) for stage, one in tasks.items() if "CORE" in one):
        parts = [f"{n} (a part of the set)" for n, one in mean["tasks"].items() if one["partial"]]
        notes = {"with": parts, "without": mean["missing"]}
        what = "".join(f", {word} {', '.join(names)}" for word, names in notes.items() if names)
        blocks.append(f"CORE of {stage} is the mean of the centred scores of {mean['covered']} of "
                      f"{mean['of']} tasks{what}. They are, not centred:")  # fmt: skip
        blocks.append(score_table({stage: mean["tasks"]}))
    return blocks


def talk_blocks(record: Record) -> list[str]:
    """Show one right and one wrong reply of each task, of the newest stage that is evaluated."""
    if not record.results:
        return []
    stage, result = list(record.results.items())[-1]
    blocks = ["## Conversations", f"What {stage} replied. [37*12 = 444] is a call of the tool."]
    for task, one in result["tasks"].items():
        for verdict, examples in one.get("examples", {}).items():
            for example in examples[:1]:
                blocks += [f"### {task}, {verdict}", quote(example)]
        kinds = sorted(one.get("kinds", {}).items(), key=lambda kind: kind[1][0] / kind[1][1])
        if len(kinds) > 1:
            weak = [[kind, f"{right}/{total}"] for kind, (right, total) in kinds[:8]]
            blocks.append(table([f"{task}, weakest kinds", "right"], weak))
    for one in result.get("samples", []):
        blocks += [f"### Completion at temperature {one['temperature']:g}",
                   quote({"prompt": one["prompt"], "completion": one["text"]})]  # fmt: skip
    return blocks


def cost_table(record: Record, cost_per_hour: float) -> str:
    """Lay out rate, tokens and time of each stage, and what they cost."""
    rows, sums = [], [0.0, 0.0, 0.0]
    for stage, meta in record.metas.items():
        s, events, step = meta["settings"], record.events[stage], meta["step"]
        tokens = step * meta.get("batch_tokens", s.get("total_batch_size", 0))
        if lengths := [e["answer_tokens"] for e in events if "answer_tokens" in e]:
            answers = step * s["problems_per_step"] * s["num_samples"]
            tokens = answers * statistics.fmean(lengths)  # that rl wrote
        tasks = record.results.get(stage, {}).get("tasks", {}).values()
        spent = [tokens, meta["seconds"], sum(one.get("seconds", 0) for one in tasks)]
        sums = [total + value for total, value in zip(sums, spent)]
        rates = [e["tok_per_s"] for e in events if "tok_per_s" in e]
        rate = f"{statistics.median_high(rates):,.0f}" if rates else ""
        rows.append(([stage, f"{step:,}", rate], spent))
    rows.append((["all", "", ""], sums))
    lines = [[*texts, format_count(tokens), format_duration(training), format_duration(evaluation),
              f"{(training + evaluation) / 3600 * cost_per_hour:,.2f}"]
             for texts, (tokens, training, evaluation) in rows]  # fmt: skip
    header = ["stage", "steps", "tokens/s", "tokens", "training", "evaluation", "USD"]
    return table(header, lines)


def setup_table(record: Record, tag: str, machine: str) -> str:
    """Lay out what the model was made of, and where."""
    info = read_json(run_dir(tag) / "tokenizer" / "tokenizer.json").get("info", {})
    ratio = info.get("measures", {}).get("bytes_per_token")
    c = GPTConfig(**list(record.metas.values())[-1]["config"])
    rows = [["this machine", machine]]
    for name in dict.fromkeys(meta["source"] for meta in record.metas.values()):
        files = read_json(data_dir(name) / "manifest.json").get("files", {}).values()
        count = sum(file.get("characters", 0) for file in files)
        rows.append(["text", name + (f", {format_count(count)} characters" if count else "")])
    size = f"{c.vocab_size:,} ids" + (f", {ratio:.2f} bytes a token" if ratio else "")
    model = (f"{format_count(c.num_params())} parameters: {c.n_layer} layers of width {c.n_embd}, "
             f"{c.n_head} heads of {c.head_dim}, context {c.max_seq_len}")  # fmt: skip
    rows += [["tokenizer", size], ["model", model]]
    if times := [event["time"] for events in record.events.values() for event in events]:
        days = [time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in (min(times), max(times))]
        rows.append(["trained", f"{' to '.join(days)} UTC"])
    return table(["set-up", ""], rows)


def settings_table(record: Record) -> str:
    """Lay out the settings of each stage, with what it chose itself and how much of what it saw."""
    chosen = ("dtype", "compiled", "micro_batch", "batch_tokens")
    columns = {stage: {**meta["settings"], **{key: meta[key] for key in chosen if key in meta},
                       **{f"taught: {k}": n for k, n in meta.get("mixture", {}).items()}}
               for stage, meta in record.metas.items()}  # fmt: skip
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(str(column.get(name, "")) for column in columns.values())] for name in names]
    return table(["setting", *columns], rows)


def brief(value: float) -> str:
    """Write a number in a few digits."""
    return format_count(value) if abs(value) >= 1e4 else f"{value:.4g}"


def evenly(items: list[Any], count: int) -> list[Any]:
    """Choose at most `count` of the items at equal distances, the first and the last included."""
    last, every = len(items) - 1, max(1, (len(items) - 1) / max(1, count - 1))
    return [items[round(i * every)] for i in range(round(last / every) + 1)]


def curves_of(events: list[dict[str, Any]], names: dict[str, str]) -> Curves:
    """Return the curves of logged values {key: name}, at most POINTS points each."""
    curves = {}
    for key, name in names.items():
        points = [(e["step"], e[key]) for e in events
                  if isinstance(e.get(key), (int, float)) and math.isfinite(e[key])]  # fmt: skip
        if points:
            curves[name] = evenly(points, POINTS)
    return curves


def draw(title: str, unit: str, curves: Curves, reference: Curves) -> str:
    """Draw a chart as SVG with its caption; its axes are named at their ends and halfway."""
    left, right, top, bottom = 46, 344, 10, 176  # the sides of the plot
    drawn = [("grey", points) for name, points in reference.items() if name in curves]
    drawn += [(f"c{i}", points) for i, points in enumerate(curves.values())]
    xs, ys = zip(*(point for _, points in drawn for point in points))
    low, high, x_end = min(ys), max(ys), max(xs) or 1
    low = 0 if low > 0 and not high / 2 <= low < high else low  # a flat curve is not a line at 0
    span = high - low or abs(high) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - low) / span
        return round(left + (right - left) * x / x_end, 1), round(bottom - (bottom - top) * up, 1)

    marks = []
    for part in (0, 0.5, 1):
        x, y = place(part * x_end, low + part * span)
        marks.append(
            f'<path d="M{left} {y}H{right}M{x} {top}V{bottom}"/>'
            f'<text x="{left - 5}" y="{y + 3}" text-anchor="end">{brief(low + part * span)}</text>'
            f'<text x="{x}" y="190" text-anchor="middle">{brief(part * x_end)}</text>'
        )
    for color, points in drawn:
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        marks.append(f'<polyline class="{color}" points="{line}"/>')
    names = [f'<i class="c{i}">&#9644;</i> {name} {brief(points[-1][1])}'
             for i, (name, points) in enumerate(curves.items())]  # fmt: skip
    return (f"<figure><figcaption><b>{title}</b>, {unit}: {', '.join(names)}</figcaption>"
            f'<svg viewBox="0 0 360 200" role="img" aria-label="{title}">{"".join(marks)}'
            "</svg></figure>")  # fmt: skip


def comparable(record: Record) -> dict[str, dict[str, Any]]:
    """Return, by stage, what two runs must have in common to be compared curve by curve."""
    known = {stage: {**meta["settings"], **meta["config"], **meta}
             for stage, meta in record.metas.items()}  # fmt: skip
    return {stage: {name: values[name] for name in COMPARED if name in values}
            for stage, values in known.items()}  # fmt: skip


def read_reference(record: Record) -> Events:
    """Read what the reference run logged, of the stages that are set as this run's.

    Returns {} where there is no reference, or where its base model or data differ.
    """
    own, theirs = comparable(record), read_json(REFERENCE / "run.json")
    if not theirs or theirs.get("base") != own.get("base"):
        return {}
    lines = (REFERENCE / "metrics.jsonl").read_text("utf-8").splitlines()
    return {stage: [event for event in map(json.loads, lines) if event["stage"] == stage]
            for stage in own if theirs.get(stage) == own[stage]}  # fmt: skip


def save_reference(folder: Path, record: Record, report: str, lines: int = 200) -> None:
    """Write a reference run: report.md, at most 200 lines of its log, and run.json.

    The latter says, by stage, what another run must have in common with it.
    """
    groups = [[e for e in events if ("loss" in e) == trains]  # validations are few: all stay
              for events in record.events.values() for trains in (True, False)]  # fmt: skip
    chosen: list[dict[str, Any]] = []
    for place, group in enumerate(sorted(groups, key=len)):
        chosen += evenly(group, (lines - len(chosen)) // (len(groups) - place))
    chosen.sort(key=lambda event: (STAGES.index(event["stage"]), event["step"]))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", comparable(record))
    log = "".join(json.dumps(event) + "\n" for event in chosen)
    (folder / "metrics.jsonl").write_text(log, "utf-8")
    (folder / "report.md").write_text(report, "utf-8")


def write_report(run: Run, settings: Settings) -> dict[str, Any]:
    """Write report.md and report.html of a run and print its scores; return the paths."""
    record, price = read_record(settings.tag), settings.cost_per_hour
    missing = ", ".join(stage for stage in STAGES if stage not in record.metas)
    charts, ends, reference = [], [], read_reference(record)
    for stage, events in record.events.items():
        for (title, unit), names in FIGURES.items():
            if curves := curves_of(events, names):
                grey = curves_of(reference.get(stage, []), names)
                charts.append(draw(f"{title}, {stage}", unit, curves, grey))
                ends += [[f"{title}, {stage}: {name}", unit, brief(y[0][1]), brief(y[-1][1])]
                         for name, y in curves.items()]  # fmt: skip
    before = [f"# nanochat: {settings.tag}", f"Not trained yet: {missing or 'nothing'}.",
              setup_table(record, settings.tag, machine_name(run.device)),
              "## Scores", *score_blocks(record, settings.tag), *talk_blocks(record),
              "## Curves", f"Over the steps, at most {POINTS} points of each, evenly chosen."
              + " Grey: the reference run in docs/reference." * bool(reference)]  # fmt: skip
    after = ["## Time and cost", f"At {price:g} USD an hour (--cost-per-hour).",
             cost_table(record, price), "## Settings", settings_table(record)]  # fmt: skip
    before, after = ([block if block.startswith(("| ", "    ")) else html.escape(block, quote=False)
                      for block in blocks] for blocks in (before, after))  # fmt: skip
    drawn = f'<div class="cards">{"".join(charts)}</div>'
    body = "\n".join([*map(to_html, before), drawn, *map(to_html, after)])
    whole = {"md": "\n\n".join([*before, table(["curve", "unit", "first", "last"], ends), *after]),
             "html": string.Template(PAGE).substitute(title=settings.tag, body=body)}  # fmt: skip
    paths = {name: run_dir(settings.tag) / f"report.{name}" for name in whole}
    if run.rank == 0:
        for name, path in paths.items():
            with written_beside(path) as beside:
                beside.write_text(whole[name] + "\n", "utf-8")
        if settings.save_reference:
            save_reference(Path(settings.save_reference), record, whole["md"] + "\n")
    scores = score_table({stage: result["tasks"] for stage, result in record.results.items()})
    run.say(f"{scores}\nwritten: {paths['md']}, {paths['html']}")
    return paths


# 9. Main -------------------------------------------------------------------------------------


def data_path(task: str, asked: dict[str, Any]) -> Path:
    """Return the file that a task reads, whether it is there or not."""
    source = data_dir(asked["chats" if task in WORLD_SETS else "source"])
    if task == "samples":
        return base_dir()
    if task == "bpb":
        return source / "val.parquet"
    if task.startswith("CORE/"):
        core = CORE[task[5:]]
        folder = data_dir("eval") / "core" / "eval_data" / core.folder
        path = folder / f"{core.file or core.name}.jsonl"
        part = path.with_name(f"{path.stem}_partial.jsonl")  # of a set that is not public in full
        return part if part.exists() and not path.exists() else path
    return (data_dir("eval") if task in PUBLIC_SETS else source / "eval") / f"{task}.jsonl"


def plan_tasks(settings: Settings, asked: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the tasks to run, CORE's one by one, and those left out, each with the reason.

    Raises MissingInput where tasks were asked for and none has data.
    """
    present, left_out = [], []
    for task in settings.asked() or settings.suiting():
        parts = [f"CORE/{name}" for name in CORE] if task == "CORE" else [task]
        there = [part for part in parts if data_path(part, asked).exists()]
        of_world = task in (*FACT_SETS, *WORLD_SETS)
        if of_world and not settings.asked() and not data_path(task, asked).parent.exists():
            continue  # of other data there are no such sets
        if task == "HumanEval" and there and not settings.run_code:
            there, task = [], "HumanEval (it needs --run-code)"
        present += there
        left_out += [part for part in parts if part not in there] if there else [task]
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
    shard = range(run.rank, len(items), run.world_size)
    own = items[run.rank :: run.world_size]
    max_tokens = REPLY_TOKENS.get(task, 0)
    if task in FACT_SETS:
        outcomes = complete_facts(engine, own)
    elif task.startswith("CORE/"):
        core = CORE[task[5:]]
        record = tally(run, task, items, answer_core(engine, core, items, shard, s))
        guess = core.baseline / 100
        centred = (record["score"] - guess) / (1 - guess)
        partial = path.stem.endswith("_partial")
        return {task[5:]: {**record, "centred": centred, "baseline": guess, "partial": partial}}
    elif items and items[0]["grade"] == "letter" and (s.stage == "base" or max_tokens == 1):
        outcomes = choose_letters(engine, own, s)
    elif task == "letters":
        counted, written = itertools.tee(write_replies(engine, own, max_tokens))
        record = tally(run, WRITTEN, items, counted)
        chosen = choose_lines(engine, own, list(written), s)
        return {task: tally(run, task, items, chosen), WRITTEN: record}
    else:
        outcomes = write_replies(engine, own, max_tokens)
    return {task: tally(run, task, items, outcomes)}


def evaluate_stage(run: Run, settings: Settings) -> dict[str, Any]:
    """Run the tasks that are not done for this checkpoint yet; return all its results."""
    named = settings.tag, settings.stage, settings.step
    folder = rank0_checkpoint(run, lambda: find_checkpoint(*named))
    tokenizer, meta = run_tokenizer(settings.tag), read_meta(folder)
    source = settings.source or meta["source"]
    asked = {"checkpoint": folder.name, "weights": parent_key(folder), "source": source,
             "chats": settings.source or meta.get("chats", source)}  # fmt: skip
    tasks, left_out = plan_tasks(settings, asked)
    if left_out:
        run.say(f"{WITHOUT_DATA}: {', '.join(left_out)}")
    # the scores of an older checkpoint, or on other data, never replace those of the report
    usual = folder == find_checkpoint(settings.tag, settings.stage) and not settings.source
    name = settings.stage if usual else f"{settings.stage}-{folder.name}-{source}"
    out = run_dir(settings.tag) / "eval" / f"{name}.json"
    report: dict[str, Any] = {**asked, "tasks": {}, "done": {}}
    saved = run.together(lambda: read_json(out))[0]  # every rank has read it before one writes it
    if all(saved.get(key) == value for key, value in asked.items()):
        report = saved
    if not settings.asked():
        report["left_out"] = left_out
    keys = {}  # of the tasks to do: what their scores depend on beside the model
    limits = {"bpb": settings.max_documents, "samples": settings.seed}
    for task in tasks:
        path = data_path(task, asked)
        key = [limits.get(task, settings.max_items), crc32(path) if path.is_file() else 0]
        if settings.restart or report["done"].get(task) != key:
            keys[task] = key
    openings = read_meta(folder).get("openings") or ["The"]  # of the text, noted since version 2
    model = load_model(folder, run.device, pick_dtype(run.device, settings.dtype))
    row_bytes = model.config.cache_bytes(model.dtype.itemsize)  # 64 slots, or what 8 GiB hold
    slots = settings.device_batch_size or max(1, min(64, (8 << 30) // row_bytes))
    engine = Engine(model, tokenizer, slots)
    if settings.stage != "base":
        engine.expect(sum(
            REPLY_TOKENS[task] * len(read_items(data_path(task, asked), settings)) // run.world_size
            for task in keys if task in REPLY_TOKENS
        ))  # fmt: skip
    for task, key in keys.items():
        if task == "samples":
            report["samples"] = write_samples(engine, openings, settings.seed)
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
    shown = score_blocks(Record({}, {settings.stage: report}, {}), settings.tag)
    run.say("\n\n".join([f"{settings.stage} {folder.name} on {source}:", *shown]))
    for item in report.get("samples", []):
        run.say(f"  {item['prompt']}|{item['text']!r}")
    run.say(f"written: {out}")
    return report


def main(settings: Settings) -> dict[str, Any]:
    """Measure, or write the report; return the scores, the measures or the report's paths."""
    with start_run("eval", settings) as run:
        if settings.bench:
            measures = {"speed": bench_speed, "runs": bench_runs}[settings.bench](run, settings)
            path = base_dir() / "bench.json"
            write_json(path, read_json(path) | measures)
            run.say(f"written: {path}")
            return measures
        return (write_report if settings.report else evaluate_stage)(run, settings)


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
