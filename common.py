"""What two or more stages run, and nothing else: ten numbered sections, each usable alone.

1 tokenizer and chat format   2 rows   3 GPT   4 optimizer   5 training_steps   6 engine
7 checkpoints, bits per byte   8 settings, errors, log   9 devices and ranks   10 fast paths

On disk, below the base directory (NANOCHAT_BASE_DIR, default ~/.cache/nanochat):
  data/SOURCE/train-00000.parquet ... val.parquet    column `text`, one document a row
  data/SOURCE/tokens/KEY/                            packed rows of token ids, made on first use
  runs/TAG/tokenizer/tokenizer.json                  pattern, special tokens, merges
  runs/TAG/{base,mid,sft,rl}/step-001234/            checkpoints: weights, optimizer, meta.json
  runs/TAG/metrics.jsonl                             one line per logged event of every stage
  runs/TAG/eval/STAGE.json                           scores
"""

from __future__ import annotations

import argparse
import ast
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import stat
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# 1. Tokenizer and chat format ----------------------------------------------------------------

# Text comes in, ids go out: of a vocabulary of 4,096 at depth 4 (about 3.6 characters an id) and of
# 65,536 at depth 20. A conversation becomes the ids that chat_format lays out, and a mask of those
# that the assistant wrote itself. The text of a reply comes back, to be graded.

BOS = "<|bos|>"
SPECIAL_TOKENS = [
    BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip


class Tokenizer:
    """A byte-level BPE vocabulary, run by tiktoken: 256 bytes, then merges, then special tokens.

    Merge i joins a pair of earlier ids into id 256 + i. Special tokens are never made from text.

    >>> tokenizer = Tokenizer(pattern=r"\\w+|\\W+", merges=[(104, 105), (256, 256)])
    >>> tokenizer.encode("hihi hi")  # 256 is "hi", 257 is "hihi", 32 is a space
    [257, 32, 256]
    >>> tokenizer.decode([256, 33]), tokenizer.bos, tokenizer.vocab_size
    ('hi!', 258, 267)
    """

    def __init__(self, pattern: str, merges: Sequence[Sequence[int]], info: dict | None = None):
        import tiktoken

        self.pattern, self.merges, self.info = pattern, [(a, b) for a, b in merges], info or {}
        tokens = [bytes([b]) for b in range(256)]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        self.specials = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanochat",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
            special_tokens=self.specials,
        )
        self.vocab_size = len(tokens) + len(SPECIAL_TOKENS)
        self.bos = self.specials[BOS]
        # bits per byte weighs each target by its bytes; a special token stands for none
        self.token_bytes = torch.tensor([len(t) for t in tokens] + [0] * len(SPECIAL_TOKENS))
        described = json.dumps([pattern, self.merges, SPECIAL_TOKENS])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:12]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read folder/tokenizer.json. Raises MissingInput if it is absent or damaged."""
        path = folder / "tokenizer.json"
        if not path.exists():
            command = f"python train_tokenizer.py --tag={folder.parent.name}"
            raise MissingInput(f"{path} is missing: run `{command}` first")
        try:
            saved = json.loads(path.read_text("utf-8"))
            if saved["special_tokens"] != SPECIAL_TOKENS:
                raise ValueError("its special tokens are not this version's")
            return cls(saved["pattern"], saved["merges"], saved["info"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MissingInput(f"{path} is damaged ({error}): run train_tokenizer.py --restart")

    def save(self, folder: Path) -> None:
        """Write folder/tokenizer.json, a merge a line."""
        head = {"info": self.info, "pattern": self.pattern, "special_tokens": SPECIAL_TOKENS}
        text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "merges": [\n'
        text += ",\n".join(f"  [{a}, {b}]" for a, b in self.merges) + "\n ]\n}\n"
        with written_beside(folder / "tokenizer.json") as beside:
            beside.write_text(text, "utf-8")

    def encode(self, text: str) -> list[int]:
        """Encode text as ordinary tokens: "<|bos|>" in it is seven characters, no special token."""
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:  # tiktoken's panics are no Exception
            if type(error).__name__ != "PanicException":
                raise
        middle = len(text) // 2
        return self.encode(text[:middle]) + self.encode(text[middle:])

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        return list(in_threads(self.encode, texts))

    def decode(self, ids: list[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids, errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode ids to bytes."""
        return self.encoding.decode_bytes(ids)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield function(item) for each item, in order, computed on this rank's share of all cores.

    tiktoken releases the GIL. A thread takes 32 items at a time: handing over single short texts
    costs more than encoding them (8,000 conversations: 1.0 s in one thread, 4.2 s text by text).
    """
    remaining = iter(items)
    with concurrent.futures.ThreadPoolExecutor(own_cores()) as pool:
        while block := list(itertools.islice(remaining, 1024)):  # bounds what is held in memory
            groups = [block[i : i + 32] for i in range(0, len(block), 32)]
            for results in pool.map(lambda group: [function(item) for item in group], groups):
                yield from results


def read_conversations(path: Path, part: int = 0, parts: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the conversations, or graded problems, of a .jsonl file that prepare.py made.

    Of `parts` readers each gets every parts-th line, from line `part` on. Raises MissingInput if
    the file is absent or a line is not a conversation.
    """
    require(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in itertools.islice(enumerate(file, 1), part, None, parts):
            try:
                conversation = json.loads(line)
                conversation["messages"][0]["role"]
            except (ValueError, LookupError, TypeError):
                raise MissingInput(
                    f"{path}:{number}: this line is no conversation: run prepare.py again"
                ) from None
            yield conversation


def require(path: Path) -> None:
    """Raise MissingInput unless a file that prepare.py makes is there."""
    if not path.exists():
        raise MissingInput(f"{path} is missing: prepare.py makes it (--help says from what)")


def chat_format(messages: list[dict[str, Any]]) -> Iterator[tuple[str, bool, bool]]:
    """Yield the pieces of a conversation: (text, True if it is a special token, True if learned).

    This is the only place that knows the chat format. Here <x>..</x> is <|x_start|>..<|x_end|>:

        <|bos|><user>system text, an empty line, 37 x 12?</user>
        <assistant>That is <python>37*12</python><output>444</output>444.</assistant><user>...

    Learned is what the assistant writes itself: all after <|assistant_start|> but for outputs,
    which the engine forces, and messages of weight 0. To change the format, also raise
    ROWS_VERSION.
    """
    yield BOS, True, False
    system = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":  # it has no tokens of its own: the next user message begins with it
            system = f"{content}\n\n"
            continue
        if role == "user":
            content, system = system + content, ""
        yield f"<|{role}_start|>", True, False
        learned = role == "assistant" and bool(message.get("weight", 1))
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            kind, own = part["type"], learned and part["type"] != "output"
            if kind != "text":
                yield f"<|{kind}_start|>", True, own
            yield part["text"], False, own
            if kind != "text":
                yield f"<|{kind}_end|>", True, own
        yield f"<|{role}_end|>", True, learned


def render_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of messages: mask 1 for what the assistant wrote itself.

    >>> ids, mask = render_conversation(Tokenizer("[^ ]| ", []), [{"role": "user", "content": "Hi"}])
    >>> ids, mask  # 256 is <|bos|>, 257 is <|user_start|>, 258 is <|user_end|>
    ([256, 257, 72, 105, 258], [0, 0, 0, 0, 0])
    """
    ids: list[int] = []
    mask: list[int] = []
    for text, special, learned in chat_format(messages):
        ids += [tokenizer.specials[text]] if special else tokenizer.encode(text)
        mask += [int(learned)] * (len(ids) - len(mask))
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of messages, a user's last, after which the assistant's reply begins."""
    ids, _ = render_conversation(tokenizer, messages)
    return [*ids, tokenizer.specials["<|assistant_start|>"]]


def render_call(expression: str, output: str | None = None) -> str:
    """Return a tool call as people read it, without its output if it has none yet.

    >>> render_call("37*12", "444"), render_call("37*12")
    ('[37*12 = 444]', '[37*12]')
    """
    return f"[{expression}]" if output is None else f"[{expression} = {output}]"


def prompt_room(context: int) -> int:
    """Return how many ids a prompt may have: a quarter of the context is left for the answer."""
    return context - context // 4


def newest_turns(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], context: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Drop the oldest turns until the prompt fits in prompt_room(context).

    Returns the remaining messages and their prompt. A leading system message and the last message
    always remain, whatever their length.
    """
    head = messages[:1] if messages[0]["role"] == "system" else []
    first = len(messages) - 1
    ids = render_prompt(tokenizer, head + messages[first:])
    while first > len(head):  # from the end: a long history costs no more than what fits of it
        before = max(first - 2, len(head))  # a question and its answer more
        longer = render_prompt(tokenizer, head + messages[before:])
        if len(longer) > prompt_room(context):
            break
        first, ids = before, longer
    return head + messages[first:], ids


THOUSANDS = r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])"  # 1,000
NUMBER = re.compile(
    rf"((?<![\w)\]])\$?[-\u2212]|)\$?({THOUSANDS}|[0-9]+|(?<![0-9])(?=\.[0-9]))(\.[0-9]+)?"
)


def last_number(text: str) -> str:
    """Return the last number of a text in the form in which numbers are compared, or "".

    A minus counts unless a word, number or bracket stands before it.

    >>> [last_number(text) for text in ("$1,234.50", "so 10.0", "5-3", "x = -3", "none")]
    ['1234.5', '10', '3', '-3', '']
    """
    found = NUMBER.findall(text)
    if not found:
        return ""
    sign, whole, decimals = found[-1]
    number = (whole.replace(",", "").lstrip("0") or "0") + decimals.rstrip("0").rstrip(".")
    return number if not sign or number == "0" else f"-{number}"


def grade(item: dict[str, Any], reply: str) -> bool:
    """True if a reply's text answers a graded item.

    "number": its last number is the answer. "letter": it begins with that letter alone, or its
    last line is one of the `choices` and that letter. "text": it has one of `accept` and none of
    `reject`, as whole words in any case; a rejected text inside an accepted one does not count.
    "code" is graded by evaluate.py.
    """
    if item["grade"] == "number":
        return last_number(reply) == last_number(item["answer"])
    if item["grade"] == "letter":
        last = reply.strip(" .\n").rpartition("\n")[2]
        choice, _, letter = last.removeprefix("- ").rpartition(" ")
        if choice in item.get("choices", ()):
            return letter == item["answer"]
        start = rf"\s*\(?{re.escape(item['answer'])}(?![\w'\u2019-]|[ \t]+\w)"  # no "A cow", "I'm"
        return re.match(start, reply) is not None
    assert item["grade"] == "text", item["grade"]
    accepted = [text for text in item["accept"] if has_words(reply, text)]
    return bool(accepted) and not any(
        has_words(reply, text) and not any(has_words(good, text) for good in item["accept"])
        for text in item.get("reject", [])
    )


def has_words(text: str, words: str) -> bool:
    """True if words occur in text as whole words, whatever the case, spaces and apostrophes.

    A hyphen joins: c-a-t is not in c-a-t-s, nor twenty in twenty-one.
    """
    text, words = (" ".join(t.casefold().replace("\u2019", "'").split()) for t in (text, words))
    if words not in text:  # most are not, and compiling patterns took longer than writing the text
        return False
    return re.search(rf"(?<!\w)(?<!\w-){re.escape(words)}(?!-?\w)", text) is not None


# 2. Rows -------------------------------------------------------------------------------------

# Documents or conversations come in, batches of packed rows go out. A row is T + 1 ids, of which
# the first T are read and the last T are targets. At depth 4 a row is 257 ids and a batch 8 rows,
# at depth 20 a row is 2,049 ids and a batch 256 rows. Rows are made once, cached as arrays under
# data/SOURCE/tokens/KEY/ and read in place: row n is a slice, so resuming is an index.

# Raise it when the same input comes to make other rows: cached ones are then made anew. No source
# text is hashed, so an edited comment changes nothing. Golden tests hold the rows of version 1.
ROWS_VERSION = 1
# Every role, type of part and special token: the rows that it makes are part of a cache's key.
PROBE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "37*12?"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "It is "}, {"type": "python", "text": "37*12"},
        {"type": "output", "text": "444"}, {"type": "text", "text": "."},
    ]},
    {"role": "user", "content": "Say <|bos|>."},
    {"role": "assistant", "content": "<|bos|>"},
]  # fmt: skip
PART_BYTES = 1 << 26  # of conversations that a rank makes rows of at once
NO_TARGET = 1 << 30  # added to an id of a conversation's row that must not be learned


def pack_rows(
    documents: Iterable[list[int]], T: int, buffer: int = 512, whole: bool = False
) -> Iterator[list[int]]:
    """Pack documents, each of which begins with <|bos|>, into rows of T + 1 ids.

    Of the `buffer` documents that wait, a row takes the longest that fits. If none fits, the
    longest is cut at the row's end, and its rest waits with a <|bos|> of its own: every row begins
    with one and no id is lost. With `whole` no document is cut, and rows end early instead.

    >>> list(pack_rows([[0, 1, 2, 3, 4, 5, 6], [0, 7], [0, 8, 9]], T=4))  # 0 is <|bos|>
    [[0, 8, 9, 0, 7], [0, 1, 2, 3, 4], [0, 5, 6]]

    Best fit halves the cuts where documents are shorter than a row: from 0.99 a row to 0.48 for the
    world's (121 ids) at T = 256, but from 1.00 to 0.97 only for web text (915 ids) at T = 2048.
    """
    waiting: list[tuple[int, int, list[int]]] = []  # (length, order of arrival, ids), sorted
    arrivals = itertools.count()
    incoming = iter(documents)
    row: list[int] = []
    while True:
        for ids in itertools.islice(incoming, buffer - len(waiting)):
            bisect.insort(waiting, (len(ids), next(arrivals), ids))
        if not waiting:
            break
        room = T + 1 - len(row)
        fitting = bisect.bisect_left(waiting, (room + 1,))
        if fitting:
            row += waiting.pop(fitting - 1)[2]
        elif whole:
            assert row, f"a document of {waiting[-1][0]} ids does not fit in a row of {T + 1}"
            yield row
            row = []
        else:
            ids = waiting.pop()[2]
            row += ids[:room]
            rest = ids[:1] + ids[max(room, 1) :]
            bisect.insort(waiting, (len(rest), next(arrivals), rest))
        if len(row) == T + 1:
            yield row
            row = []
    if row:
        yield row


def text_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of each text that is not empty, with <|bos|> before them."""
    return ([tokenizer.bos, *ids] for ids in in_threads(tokenizer.encode, texts) if ids)


@dataclass
class Mixed:
    """What became of the conversations of a file."""

    used: collections.Counter[str] = field(default_factory=collections.Counter)  # by kind
    cut: int = 0  # longer than a row: their last turns are left out
    left_out: int = 0  # longer than a row even in their first turn


def conversation_documents(
    conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer, T: int, mixed: Mixed
) -> Iterator[list[int]]:
    """Yield each conversation's ids, plus NO_TARGET where not learned, and count it in mixed."""

    def fitted(conversation: dict[str, Any]) -> tuple[str, bool, list[int]]:
        whole = messages = conversation["messages"]
        while True:
            ids, mask = render_conversation(tokenizer, messages)
            if len(ids) <= T + 1:
                break
            messages = messages[: -2 if messages[-1]["role"] == "assistant" else -1]
        marked = [i if learned else i + NO_TARGET for i, learned in zip(ids, mask)]
        return conversation.get("kind", "own"), messages != whole, marked if any(mask) else []

    for kind, cut, ids in in_threads(fitted, conversations):
        if ids:
            mixed.used[kind] += 1
            mixed.cut += cut
            yield ids
        else:
            mixed.left_out += 1


def write_rows(rows: Iterable[list[int]], T: int, filler: int, dtype: Any, out: Path) -> None:
    """Write rows as an array (rows, T + 1), shorter ones filled up, beside and renamed."""
    arrays = [np.array(row + [filler] * (T + 1 - len(row)), dtype) for row in rows]
    with written_beside(out) as beside, open(beside, "wb") as file:
        plain: Any = SimpleNamespace(write=file.write)  # numpy's own way may miss a full disk
        np.save(plain, np.stack(arrays) if arrays else np.zeros((0, T + 1), dtype))


# A file that is memory-mapped is open, and a process may open 256 to 1,024.
open_rows = functools.lru_cache(maxsize=128)(functools.partial(np.load, mmap_mode="r"))


class Rows:
    """The packed rows of one or more arrays, in the order of their files, memory-mapped."""

    def __init__(self, paths: list[Path], bos: int):
        self.bos = bos
        self.names = [f"{path.parent.name}/{path.name}" for path in paths]  # differ with contents
        self.arrays: list[Path | np.ndarray] = [*paths]
        self.ends = np.cumsum([len(open_rows(path)) for path in paths])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, index: int) -> np.ndarray:
        """Return one row (T + 1,) as it is stored."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        array = self.arrays[shard]
        array = open_rows(array) if isinstance(array, Path) else array
        return array[index - self.ends[shard]]  # counted from the array's end

    def gather(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return (ids, targets) of B rows, each (B, T) int64; index -1 is an empty row.

        Targets are IGNORE where nothing is learned: at NO_TARGET, and where <|bos|> follows
        <|bos|>, which only the filling of a row does.
        """
        empty = np.full_like(self.row(0), self.bos)  # (T + 1,)
        rows = np.stack([self.row(int(i)) if i >= 0 else empty for i in indices]).astype(np.int64)
        ids, targets = torch.from_numpy(rows[:, :-1] % NO_TARGET), torch.from_numpy(rows[:, 1:])
        filled = (ids == self.bos) & (targets == self.bos)
        return ids, targets.masked_fill(filled | (targets >= NO_TARGET), IGNORE)

    def joined(self, other: Rows, count: int) -> Rows:
        """Return these rows followed by `count` of another's, taken evenly from all of them."""
        picked = np.linspace(0, len(other), count, endpoint=False).astype(np.int64)
        both = copy.copy(self)
        both.names = self.names + other.names
        both.arrays = [*self.arrays, np.stack([other.row(int(i)) for i in picked])]
        both.ends = np.append(self.ends, len(self) + count)
        return both


def rows_folder(folder: Path, tokenizer: Tokenizer, T: int, probe: Iterable[list[int]]) -> Path:
    """Return where rows are cached: a folder for each tokenizer, T, version and probe.

    probe: the rows that a fixed small input makes now. An edit of the chat format or of the
    packing that shows in them makes new rows even if ROWS_VERSION was not raised.
    """
    made = zlib.crc32(json.dumps(list(probe)).encode())
    return folder / "tokens" / f"{tokenizer.fingerprint}-{T}-v{ROWS_VERSION}-{made:08x}"


def made_in_turn(outs: list[Path], make: Callable[[Path], None], run: Run) -> Iterator[Path]:
    """Yield files in order; those that are absent are made by make(out), one a rank at a time.

    Then the ranks of each node make what lies on another node's own disk. Ends the program if
    run.stopping is set on any rank.
    """
    local_rank, local_size = local_dist_info()

    def work(wanted: list[Path]) -> bool:
        for out in wanted:
            if not out.exists():
                make(out)
        return run.stopping

    for first in range(0, len(outs), run.world_size):
        group = outs[first : first + run.world_size]
        for wanted in (group[run.rank : run.rank + 1], group[local_rank::local_size]):
            if any(run.together(functools.partial(work, wanted))):
                run.say(f"{run.stage}: stopped while tokenizing; run the same command again")
                raise SystemExit(0)
        while not all(out.exists() for out in group):  # NFS may show the folder as it was before
            time.sleep(0.1)
        yield from group


def conversation_rows(
    path: Path, tokenizer: Tokenizer, T: int, run: Run, some: bool = False
) -> tuple[Rows, Mixed]:
    """Open the rows of a .jsonl file's conversations, packed whole, and how many of each kind.

    Targets are what the assistant wrote itself. The ranks share the parts of a large file; which
    parts it has does not depend on them. Raises MissingInput if the file is absent, or with `some`
    if no conversation fits in a row.
    """
    require(path)

    def packed(conversations: Iterable[dict], T: int, mixed: Mixed) -> Iterator[list[int]]:
        return pack_rows(conversation_documents(conversations, tokenizer, T, mixed), T, whole=True)

    def make(out: Path) -> None:
        mixed = Mixed()
        rows = list(packed(read_conversations(path, outs.index(out), len(outs)), T, mixed))
        write_json(out.with_suffix(".json"), vars(mixed))  # first: out is the mark
        write_rows(rows, T, tokenizer.bos + NO_TARGET, np.int32, out)

    probe = packed([{"messages": PROBE}, {"messages": PROBE * 9}], 256, Mixed())
    folder, size = rows_folder(path.parent, tokenizer, T, probe), path.stat().st_size
    name, parts = f"{path.stem}-own-{size}-{crc32(path):08x}", 1 + size // PART_BYTES
    outs = [folder / f"{name}{f'-{i}of{parts}' * (parts > 1)}.npy" for i in range(parts)]
    mixed = Mixed()
    for out in made_in_turn(outs, make, run):
        part = Mixed(**json.loads(out.with_suffix(".json").read_text("utf-8")))
        mixed.used.update(part.used)
        mixed.cut, mixed.left_out = mixed.cut + part.cut, mixed.left_out + part.left_out
    if some and not mixed.used:
        raise MissingInput(
            f"none of the {mixed.left_out:,} conversations of {path} fits in {T} tokens: pretrain "
            "with a larger --max-seq-len"
        )
    return Rows(outs, tokenizer.bos), mixed


def token_rows(source: str, tokenizer: Tokenizer, T: int, needed: int, run: Run) -> Rows:
    """Open the packed rows of as many train shards as hold `needed` rows, or of all there are.

    Shards without cached rows are encoded first, a shard a rank at a time; the rows do not depend
    on the number of ranks. Ends the program after a shard if run.stopping is set on any rank.
    """
    probe = pack_rows(text_documents(["One document.", "", "Another."], tokenizer), 8)
    folder = rows_folder(data_dir(source), tokenizer, T, probe)
    shards = {folder / f"{p.stem}-{_file_key(p)}.npy": p for p in list_shards(source, "train")}
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def make(out: Path) -> None:
        name, number = shards[out].name, [*shards].index(out) + 1
        run.say(f"tokenizing {name} ({number} of at most {len(shards)} shards)")
        rows = pack_rows(text_documents(read_texts(shards[out]), tokenizer), T)
        write_rows(rows, T, tokenizer.bos, dtype, out)

    used: list[Path] = []
    count = 0
    for out in made_in_turn([*shards], make, run):
        used.append(out)
        count += len(open_rows(out))
        if count >= needed:
            break
    if not count:
        raise MissingInput(f"data source {source} holds no text: run prepare.py again")
    return Rows(used, tokenizer.bos)


def _file_key(path: Path) -> str:
    with open(path, "rb") as file:  # a parquet file's end describes all of it
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return hashlib.sha256(file.read()).hexdigest()[:12]


@dataclass
class Batch:
    """One micro-batch: ids and targets (B, T) int64 on the device; targets that count."""

    ids: Tensor
    targets: Tensor
    num_targets: int


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def shuffled(position: int, count: int, seed: int) -> int:
    """Return which of `count` items comes at a position, in an order drawn anew each epoch."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


def accum_steps(batch_rows: int, micro_batch: int) -> int:
    """Return how many micro-batches each rank runs for a step's rows."""
    return -(-batch_rows // (micro_batch * dist_info()[1]))


def row_batches(
    rows: Rows, batch_rows: int, micro_batch: int, seed: int, start: int, device: torch.device,
    total: int = sys.maxsize,
) -> Iterator[Batch]:  # fmt: skip
    """Yield this rank's micro-batches from step `start` on, endlessly, prepared ahead of use.

    Step s takes the shuffled rows s * batch_rows to (s + 1) * batch_rows, over all ranks, each in
    `accum_steps` micro-batches. Where there are no more rows, in a step or after `total`, empty
    rows fill up, so that a step's rows depend on neither ranks nor micro-batch.
    """
    rank, world_size = dist_info()
    accum = accum_steps(batch_rows, micro_batch)

    def batches() -> Iterator[Batch]:
        for n in itertools.count(start * accum):
            step, i = divmod(n, accum)
            first = step * batch_rows + (i * world_size + rank) * micro_batch
            end = min((step + 1) * batch_rows, total)
            taken = range(first, min(first + micro_batch, end))
            indices = [shuffled(position, len(rows), seed) for position in taken]
            ids, targets = rows.gather(indices + [-1] * (micro_batch - len(indices)))
            if device.type == "cuda":  # pinned memory is copied while the GPU computes
                ids, targets = ids.pin_memory(), targets.pin_memory()
            move = functools.partial(Tensor.to, device=device, non_blocking=True)
            yield Batch(move(ids), move(targets), int((targets != IGNORE).sum()))

    return prefetch(batches(), 2 * accum)


def batch_parts(batch: Any, rows: int) -> Iterator[Any]:
    """Split a micro-batch into parts of at most `rows` rows; num_targets stays the whole's."""
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
    for first in range(0, len(batch.ids), rows):
        part = {k: v[first : first + rows] for k, v in tensors.items()}
        yield dataclasses.replace(batch, **part)


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Yield from an iterator that a thread runs, `depth` items ahead; its exceptions come here."""
    end = object()
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        ahead = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item
    finally:  # waits: a thread inside torch while the interpreter ends would abort the process
        pool.shutdown(cancel_futures=True)


# 3. GPT --------------------------------------------------------------------------------------
#
# In: ids (B, T), a batch of rows. Out: logits (B, T, V), or with targets their summed loss. A
# decoder-only transformer: RoPE, QK-norm, ReLU squared, untied head, no biases. At depth 4: width
# 256, 4 heads of 64, 7.4 M parameters; at depth 20: width 1280, 10 heads of 128, 561 M.
# The shortest full statement of the architecture is `plain_logits` in test_all.py, one position at
# a time in plain products; a test holds this section to it. Products go through `linear`, attention
# through `attend`: both stand here in their plain form and first ask section 10 for a faster one,
# which --plain switches off. Change the model here, and train with --plain.

IGNORE = -1  # a target that has no loss
NORM_EPS = 1e-6


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; everything else about it follows."""

    vocab_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped-query attention (arXiv:2305.13245)
    max_seq_len: int
    window_pattern: str = "L"  # one letter a layer, repeated: L whole context, S a quarter of it
    rope_base: float = 100_000.0
    softcap: float = 15.0
    qk_scale: float = 1.2  # factor on normalised queries and keys each: sharper attention
    smear: bool = True  # add a linear map of the previous token's embedding to each input
    value_embeds: bool = True  # add a token embedding to the values of every other layer
    skip: bool = True  # mix the first block's input into every block's input
    bigram_rows: int = 0  # of a hashed table of token pairs, added to the input; 0: none

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} must divide into n_head {self.n_head} even heads, and "
                f"n_head into n_kv_head {self.n_kv_head}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(f"window pattern {self.window_pattern!r} must be letters L and S")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64  # products run faster on multiples of 64

    @property
    def gate_channels(self) -> int:
        """Return how many channels of a block's input set the gates of the value embeddings."""
        return min(32, self.n_embd)

    @property
    def value_layers(self) -> range:
        """Return the layers that have value embeddings: every other one, the last among them."""
        return range((self.n_layer - 1) % 2, self.n_layer * self.value_embeds, 2)

    def window(self, layer: int) -> int:
        """Return how many positions, itself included, a query of this layer sees."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        whole = letter == "L" or layer == self.n_layer - 1  # the last layer always sees all
        return self.max_seq_len if whole else max(1, self.max_seq_len // 4)

    def matrix_params(self) -> int:
        """Count the weights that every token is multiplied by: those of the blocks and the smear."""
        attention = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        blocks = self.n_layer * (attention + 8 * self.n_embd**2)
        gates = len(self.value_layers) * self.n_kv_head * self.gate_channels
        return blocks + gates + self.smear * self.n_embd**2

    def scaling_params(self) -> int:
        """Count the weights that set the length of a run: all but value embeddings and pairs."""
        mix = 2 * self.n_layer * self.skip
        return self.matrix_params() + 2 * self.padded_vocab_size * self.n_embd + mix

    def num_params(self) -> int:
        """Count all weights."""
        values = len(self.value_layers) * self.n_kv_head * self.head_dim * self.padded_vocab_size
        return self.scaling_params() + values + self.bigram_rows * self.n_embd

    def flops_per_token(self, seq_len: int = 0) -> float:
        """Count the FLOPs that train on one token: 6 a weight in a product, and attention.

        Attention is counted causal: 12 x n_embd for a pair of positions, forward and backward.
        """
        T = seq_len or self.max_seq_len
        weights = self.matrix_params() + self.padded_vocab_size * self.n_embd
        keys = 0.0  # that a query sees, mean over positions, summed over layers
        for layer in range(self.n_layer):
            w = min(self.window(layer), T)
            keys += (w * (w + 1) / 2 + (T - w) * w) / T
        return 6 * weights + 12 * self.n_embd * keys

    def cache_bytes(self, item: int) -> int:
        """Count the bytes of one row of the KV cache, `item` a number."""
        return 2 * self.n_layer * self.max_seq_len * self.n_kv_head * self.head_dim * item


def rms_norm(x: Tensor) -> Tensor:
    """Divide x by its root mean square over the last axis (arXiv:1910.07467), without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle (RoPE, arXiv:2104.09864).

    x (B, T, H, D), D even; cos and sin (1 or B, T, 1, D/2), same dtype. Returns x's shape.
    """
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Squash x smoothly into (-cap, cap): cap tanh(x / cap); 0 leaves it (arXiv:2408.00118)."""
    if not cap:
        return x
    if torch.compiler.is_compiling():  # the same, which takes a CPU a third of tanh's time
        return cap - 2 * cap / ((x * (2 / cap)).exp() + 1)
    return cap * torch.tanh(x / cap)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (..., n_in) by the transposed weight (n_out, n_in): (..., n_out) in x's dtype."""
    if (y := faster(LINEAR_PATHS, x, weight)) is not None:
        return y
    return F.linear(x, weight.to(x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None = None) -> Tensor:
    """Attend causally: the last query sees the last key, each at most `window` keys back.

    q (B, T, H, D); k and v (B, S, K, D) with S >= T, H a multiple of K. A mask (B, T, S), True
    where a query sees a key, replaces that rule. Returns (B, T, H, D).
    """
    if (y := faster(ATTEND_PATHS, q, k, v, window, mask)) is not None:
        return y
    T, S = q.size(1), k.size(1)
    causal = mask is None and T == S <= window
    if mask is None and not causal:
        back = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
        mask = ((back >= 0) & (back < window))[None]  # (1, T, S)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, K, S, D)
    y = F.scaled_dot_product_attention(
        q, k, v, None if mask is None else mask[:, None], is_causal=causal,
        enable_gqa=q.size(1) != k.size(1),
    )  # fmt: skip
    return y.transpose(1, 2)  # (B, T, H, D)


class Linear(nn.Module):
    """A product without bias; the weight (n_out, n_in) is fp32 while training.

    Unlike nn.Linear it fills nothing when built: GPT.init_weights does, and filling on the meta
    device would import the compiler, three seconds in every command.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """A table (rows, n_embd) of vectors, one for each id."""

    def __init__(self, rows: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, n_embd))

    def forward(self, ids: Tensor) -> Tensor:
        if (x := faster(EMBEDDING_PATHS, ids, self.weight)) is not None:
            return x
        return F.embedding(ids, self.weight)


class Attention(nn.Module):
    """Causal attention with normalised queries and keys (arXiv:2010.04245).

    In the layers that have value embeddings, an embedding of each token is added to its values
    (arXiv:2410.17897), weighted by a gate from 0 to 2 for each head.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.head_dim, self.qk_scale = config.head_dim, config.qk_scale
        self.q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd)
        has_values, self.gate_channels = layer in config.value_layers, config.gate_channels
        self.gate = Linear(config.gate_channels, config.n_kv_head) if has_values else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (B, T, K, D) of x (B, T, C)."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        return q, k, v

    def forward(
        self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        q, k, v = self.project(x)
        if self.gate is not None and values is not None:  # values (B, T, K D)
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate_channels]))  # (B, T, K)
            v = v + gate[..., None] * values.view(v.shape)
        q, k = (rms_norm(rotate(x, cos, sin)) * self.qk_scale for x in (q, k))
        mask = None
        if past is not None:
            k, v = past.append(self.layer, k, v)  # (B, S, K, D): all positions so far
            mask = past.masks[self.window]
        y = attend(q, k, v, self.window, mask)  # (B, T, H, D)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    """Two products with ReLU squared between them (arXiv:2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)

    def forward(
        self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        x = x + self.attention(rms_norm(x), values, cos, sin, past)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Embedding, blocks, head. Smear, value embeddings, skip and pairs can each be left out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, V, C = config, config.padded_vocab_size, config.n_embd
        self.embed = Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.head = Linear(C, V)
        self.smear = Linear(C, C) if config.smear else None
        self.bigrams = Embedding(config.bigram_rows, C) if config.bigram_rows else None
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(V, config.n_kv_head * config.head_dim) for i in config.value_layers}
        )
        if config.skip:  # a block's input is [0] x what came + [1] x the first block's input
            self.mix = nn.Parameter(torch.empty(config.n_layer, 2))
        self.cos, self.sin = torch.empty(0), torch.empty(0)  # init_rope makes them
        self.dtype = torch.float32  # of activations; weights stay fp32 while training
        self.recompute = False  # keep only the blocks' inputs for the backward pass

    @classmethod
    def create(cls, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
        """Build a model on the meta device, then allocate and initialise every weight."""
        with torch.device("meta"):
            model = cls(config)
        weights = {k: torch.empty(w.shape, device=device) for k, w in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)  # to_empty() would import sympy: 2 s and more
        model.init_weights()
        model.dtype = dtype
        return model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill all weights; each block begins as the identity, as its outputs are zero."""
        c = self.config
        bound = math.sqrt(3 / c.n_embd)  # uniform with the standard deviation of N(0, 1/n_embd)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.head.weight, std=0.001)  # near-uniform first predictions
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("out.weight", "down.weight", "gate.weight")):  # gates of 1
                nn.init.zeros_(weight)
            else:
                nn.init.uniform_(weight, -bound, bound)
        for table in self.value_embeds.parameters():
            nn.init.uniform_(table, -bound, bound)
        for part in (self.smear, self.bigrams):
            if part is not None:
                nn.init.zeros_(part.weight)
        if c.skip:
            self.mix.copy_(torch.tensor([1.0, 0.0]).expand(c.n_layer, 2))
        self.init_rope()

    @torch.no_grad()
    def init_rope(self) -> None:
        """Make the rotation tables (1, T, 1, D/2), fp32; no checkpoint holds them."""
        c, device = self.config, self.embed.weight.device
        channel = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32)
        frequency = c.rope_base ** (-channel / c.head_dim)  # (D/2,)
        angle = torch.arange(c.max_seq_len, device=device)[:, None] * frequency  # (T, D/2)
        self.cos, self.sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def trunk(self, ids: Tensor, past: Past | None = None) -> Tensor:
        """Compute the last norm's output (B, T, C) for ids (B, T), all of the model but its head.

        With `past`, which KVCache.extend returns, the ids continue what the cache's rows hold.
        """
        T = ids.size(1)
        if past is None:
            assert T <= self.config.max_seq_len, (
                f"{T} ids in a context of {self.config.max_seq_len}"
            )
            before = ids[:, :1]  # nothing is before a row's first id: it counts as its own
            cos, sin = self.cos[:, :T], self.sin[:, :T]
        else:
            before = past.before
            cos, sin = self.cos[0, past.positions], self.sin[0, past.positions]  # (B, T, 1, D/2)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        with_before = torch.cat((before, ids), 1)  # (B, T + 1)
        embedded = self.embed(with_before).to(self.dtype)  # (B, T + 1, C)
        x = embedded[:, 1:]
        if self.smear is not None:  # what came before a token is what copying looks for
            x = x + self.smear(embedded[:, :-1])
        if self.bigrams is not None:  # pairs by a hash (arXiv:1709.03933)
            pairs = with_before[:, :-1] * 1_000_003 + ids * 8_191
            x = x + self.bigrams(pairs % self.config.bigram_rows).to(self.dtype)
        x = first = rms_norm(x)
        for i, block in enumerate(self.blocks):
            if self.config.skip:
                x = self.mix[i, 0].to(x.dtype) * x + self.mix[i, 1].to(x.dtype) * first
            has_values = i in self.config.value_layers
            values = self.value_embeds[str(i)](ids).to(x.dtype) if has_values else None
            inputs = x, values, cos, sin, past
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return rms_norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """Return fp32 logits (..., V) of the trunk's output h (..., C), softly capped."""
        return softcap(self.head(h).float(), self.config.softcap)[..., : self.config.vocab_size]

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or with targets (B, T) the summed loss in nats.

        A target IGNORE has no loss; weights (B, T) multiply each target's loss.
        """
        h = self.trunk(ids)
        if targets is None:
            return self.logits(h)
        mask = (targets != IGNORE).float()
        mask = mask if weights is None else mask * weights
        if (loss := faster(LOSS_PATHS, self, h, targets, mask)) is not None:
            return loss
        nats = F.cross_entropy(
            self.logits(h).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return (nats * mask.flatten()).sum()


@torch.no_grad()
def token_losses(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Compute the nats of each target (B, T) given ids (B, T); 0 where it is IGNORE."""
    h = torch.cat(in_fewer_rows(model.trunk, ids, ids.device)).flatten(0, 1)  # (B T, C)
    chunk = max(1, (1 << 24) // model.config.padded_vocab_size)  # the logits are never whole
    losses = [
        F.cross_entropy(model.logits(part), t, ignore_index=IGNORE, reduction="none")
        for part, t in zip(h.split(chunk), targets.flatten().split(chunk))
    ]
    return torch.cat(losses).view(targets.shape)


# 4. Optimizer --------------------------------------------------------------------------------
# In: the gradients that a step's backward passes left in each parameter's `grad`. Out: updated
# parameters, cleared gradients. Muon updates the matrices, AdamW the tables, the head and the
# scalars. Matrices of one shape are stacked, so that one batched product serves all of them: d4's
# 17 of (256, 256) are one array, and so are d20's 81 of (1280, 1280).
# Every array is cut along its first axis into one chunk a rank. A step sums each chunk's gradient
# on the rank that owns it, updates it there, and gathers the parameters (ZeRO, arXiv:1910.02054).
# The small tier's d4 has 16 M parameters and 0.1 GB of optimizer state; d20 has 1.4 G parameters
# and 9.6 GB of state, of which each of 8 ranks keeps 1.2.


# Coefficients (a, b, c) of odd polynomials a x + b x^3 + c x^5 that, one after another, bring
# every singular value near 1, each the best for the range that the one before leaves. The five
# are Polar Express (arXiv:2505.16932), the three for singular values from 0.01 of the norm up.
POLYNOMIALS = {
    5: [(8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
    3: [(8.09336851255, -23.6204303288, 17.4461517498),
        (3.63658555426, -2.72192674661, 0.536546288327),
        (2.66129998578, -1.97715452188, 0.452616406996)],
}  # fmt: skip


def orthogonalize(g: Tensor, coefficients: list, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 by odd polynomials (arXiv:2502.16982).

    g (..., m, n), any dtype; the products run in `dtype`, which is also returned.
    """
    if dtype == torch.float16:  # small gradients lie below its range
        g = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    x = g.to(dtype)
    # the polynomials ask for singular values below 1: none is above the norm, but for rounding
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in coefficients:
        xx = x.mT @ x if tall else x @ x.mT  # (..., k, k) of the smaller side k: the cheaper one
        xx = b * xx + c * xx @ xx
        x = a * x + (x @ xx if tall else xx @ x)  # (..., m, n)
    return x


def muon_update(
    p: Tensor, g: Tensor, buf: Tensor, lr: Tensor, momentum: float, weight_decay: float,
    coefficients: list, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Update matrices p (K, m, n) along the orthogonalized Nesterov momentum of their gradients g.

    This is Muon (kellerjordan.github.io/posts/muon); buf (K, m, n) is the momentum, lr a tensor ().
    """
    buf.lerp_(g, 1 - momentum)
    update = orthogonalize(g.lerp(buf, momentum), coefficients, dtype)  # (K, m, n)
    scale = max(1.0, p.size(-2) / p.size(-1)) ** 0.5  # tall matrices move by the same RMS
    p.mul_(1 - lr * weight_decay).sub_(update.to(p.dtype) * (lr * scale))


def adamw_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, t: Tensor,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update p (N,) by AdamW (arXiv:1711.05101).

    m and v (N,) are the moments of the gradient g, lr and t, which counts updates, tensors ().
    """
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g.square(), 1 - betas[1])
    denominator = (v / (1 - betas[1] ** t)).sqrt() + eps
    p.mul_(1 - lr * weight_decay).sub_(lr / (1 - betas[0] ** t) * m / denominator)


class _Unit:
    """Parameters that are updated as one array, and this rank's chunk of their state.

    The array is (number of matrices, m, n) for Muon and (number of elements,) for AdamW.
    """

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], world_size: int):
        self.group, self.params, self.stacked = group, params, group["kind"] == "muon"
        self.options = {k: x for k, x in group.items() if k not in ("kind", "params", "lr")}
        self.length = len(params) if self.stacked else params[0].numel()
        self.chunk = -(-self.length // world_size)
        self.padding = self.chunk * world_size - self.length  # at the array's end
        shape = (self.chunk, *params[0].shape) if self.stacked else (self.chunk,)
        names = ("buf",) if self.stacked else ("m", "v")
        self.state = {name: torch.zeros(shape, device=params[0].device) for name in names}

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes as one array (world_size * chunk, ...)."""
        array = torch.stack(tensors) if self.stacked else tensors[0].reshape(-1)  # or a view
        before = [0, 0] * (array.dim() - 1)  # F.pad counts from the last axis
        return F.pad(array, [*before, 0, self.padding]) if self.padding else array

    def split(self, array: Tensor) -> None:
        """Copy an array that join() made into the parameters; from a view nothing is copied."""
        array = array[: self.length]
        values = array.unbind() if self.stacked else [array.view_as(self.params[0])]
        for param, value in zip(self.params, values):
            param.copy_(value)


class Optimizer:
    """Muon for matrices and AdamW for the rest, with state and work sharded over the ranks.

    groups are dicts: {"kind": "muon", "params", "lr", "momentum", "weight_decay",
    "coefficients"} or {"kind": "adamw", "params", "lr", "betas", "eps", "weight_decay"}.
    Gradients are summed over ranks, not averaged: a loss divides by the whole step's targets.
    dtype is that of Muon's products; compiled fuses the element-wise work.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, compiled: bool = False):
        self.rank, self.world_size = dist_info()
        self.groups, self.dtype, self.steps = groups, dtype, 0
        self.scaler: LossScaler | None = None  # set where activations are fp16
        build: Any = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
        self.muon, self.adamw = build(muon_update), build(adamw_update)
        self.units: list[_Unit] = []
        for group in groups:
            stacks: dict[Any, list[nn.Parameter]] = {}
            for p in group["params"]:
                stacks.setdefault(p.shape if group["kind"] == "muon" else id(p), []).append(p)
            self.units += [_Unit(group, params, self.world_size) for params in stacks.values()]
        self.device = self.units[0].params[0].device

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Update all parameters from their gradients, and clear these."""
        self.steps += 1
        # every sum is under way before the first update, and every gather before one is awaited
        sums = collections.deque([self._sum_gradients(unit) for unit in self.units])
        gathers: list[tuple[_Unit, Tensor, Any]] = []
        for unit in self.units:
            g, work = sums.popleft()
            if self.world_size > 1:
                work.wait()
            array = unit.join([p.detach() for p in unit.params])  # (world_size * chunk, ...)
            p = array[self.rank * unit.chunk : (self.rank + 1) * unit.chunk]
            # compiled code has numbers built in: what changes every step has to be a tensor, which
            # full() makes on the device, while a copy from the host would wait for it
            lr = torch.full((), unit.group["lr"] * lr_scale, device=p.device)
            t = torch.full((), self.steps, device=p.device)
            if unit.stacked:
                self.muon(p, g, lr=lr, dtype=self.dtype, **unit.options, **unit.state)
            else:
                self.adamw(p, g, lr=lr, t=t, **unit.options, **unit.state)
            if self.world_size > 1:
                work = dist.all_gather_into_tensor(array, p, async_op=True)
                gathers.append((unit, array, work))
            else:
                unit.split(array)
        for unit, array, work in gathers:
            work.wait()
            unit.split(array)

    def _sum_gradients(self, unit: _Unit) -> tuple[Tensor, Any]:
        """Begin to sum a unit's gradients over the ranks: this rank's chunk, and what to await."""
        # a parameter that no token reached in this step has no gradient: it counts as zero
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.params]
        array = unit.join(grads)  # (world_size * chunk, ...)
        for p in unit.params:
            p.grad = None  # matrices were copied: their memory is free
        if self.world_size == 1:
            return array, None
        chunk = torch.empty_like(array[: unit.chunk])
        return chunk, dist.reduce_scatter_tensor(chunk, array, async_op=True)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for unit in self.units:
            for p in unit.params:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard of the state."""
        state = {"steps": self.steps, "units": [unit.state for unit in self.units]}
        return {**state, "scaler": vars(self.scaler)} if self.scaler else state

    def load_state_dicts(self, shards: list[dict[str, Any]]) -> None:
        """Load the state from the shards of all ranks that saved it, resharded for these ranks."""
        self.steps = shards[0]["steps"]
        if self.scaler and "scaler" in shards[0]:
            self.scaler = LossScaler(**shards[0]["scaler"])
        for i, unit in enumerate(self.units):
            first = self.rank * unit.chunk  # this rank has elements first to end of the array
            end = min(first + unit.chunk, unit.length)
            for name, state in unit.state.items():
                state.zero_()  # the padding, too
                for rank, shard in enumerate(shards):
                    saved = shard["units"][i][name]
                    start = rank * len(saved)
                    a, b = max(start, first), min(start + len(saved), end)
                    if a < b:
                        state[a - first : b - first] = saved[a - start : b - start]


@dataclass
class LossScaler:
    """Multiplies fp16's loss so that small gradients do not vanish (arXiv:1710.03740).

    For V100 and T4, which lack bf16; unverified on GPU. Raises Stop where no scale helps.
    """

    scale: float = 2.0**16
    steps: int = 0  # without an overflow, since the scale changed

    def unscale(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale and adapt it; return True if any rank's overflowed."""
        grads = [p.grad for u in optimizer.units for p in u.params if p.grad is not None]
        for g in grads:
            g.div_(self.scale)
        overflow = any_rank(not all(g.isfinite().all() for g in grads), optimizer.device)
        self.steps = 0 if overflow else self.steps + 1
        if overflow:
            self.scale /= 2
        elif self.steps == 2000:  # as in torch's GradScaler
            self.scale, self.steps = self.scale * 2, 0
        if self.scale < 2**-10:
            raise Stop("gradients overflow fp16 at any loss scale: go on with --dtype=float32")
        return overflow


ADAMW = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def rate_scale(config: GPTConfig) -> float:
    """Return the factor on AdamW's learning rates, which are stated for width 768."""
    return (config.n_embd / 768) ** -0.5


def optimizer_groups(
    model: GPT, matrix_lr: float, embed_lr: float, head_lr: float, weight_decay: float,
    muon_steps: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Make the parameter groups of a GPT: Muon for matrices, AdamW for tables, head, scalars.

    AdamW's rates are stated for width 768 and fall with the root of the width (muP's direction,
    arXiv:2203.03466). weight_decay is that of the matrices; muon_steps polynomials, 3 or 5, make
    an update orthogonal, 0 = 5, or 3 below width 512.
    """
    # small batches of narrow models make polynomials dear, and were measured to want less momentum
    narrow = model.config.n_embd < 512
    coefficients = POLYNOMIALS[muon_steps or (3 if narrow else 5)]
    width = rate_scale(model.config)
    matrices = list(model.blocks.parameters())
    if model.smear is not None:
        matrices.append(model.smear.weight)
    muon = {"kind": "muon", "params": matrices, "lr": matrix_lr, "weight_decay": weight_decay,
            "momentum": 0.9 if narrow else 0.95, "coefficients": coefficients}  # fmt: skip
    adamw = [
        ([model.embed.weight, *model.value_embeds.parameters()], embed_lr * width),
        ([model.head.weight], head_lr * width),
        ([model.bigrams.weight] if model.bigrams is not None else [], 0.3 * embed_lr * width),
        ([model.mix] if model.config.skip else [], 0.02),  # scalars that mix a block's input
    ]
    return [muon, *({**ADAMW, "params": params, "lr": lr} for params, lr in adamw if params)]


# 5. training_steps ---------------------------------------------------------------------------
# In: micro-batches (section 2), a function that returns the loss of one, an optimizer and a
# schedule. Out: a Step between any two updates, at which the stage logs, evaluates and saves.
# A step of the small tier's d4 is 2,048 tokens, 8 rows of 256 in one forward pass; one of d20 is
# 524,288 tokens, 256 rows of 2,048: on one GPU 16 micro-batches of 16 rows, on eight 2 each.
# The gradients of a step's micro-batches add up in the parameters' `grad` until the update.
# How many rows fit in a pass is estimated at the start, and halved where memory runs out anyway.


def schedule(settings: Any, num_steps: int) -> Callable[[int], float]:
    """Return the factor on the rates at a step, by settings warmup, warmdown and final_lr."""
    s = settings
    return lambda step: trapezoid(step, num_steps, s.warmup, s.warmdown, s.final_lr)


def trapezoid(step: int, num_steps: int, warmup: int, warmdown: float, final: float) -> float:
    """Return the learning rate's factor: up over `warmup` steps, flat, then down to `final`.

    warmdown is the fraction of the run in which it falls, linearly.
    """
    down = max(1, round(warmdown * num_steps))
    left = min(1.0, max(0, num_steps - step) / down) if warmdown else 1.0
    return min(1.0, (step + 1) / (warmup + 1)) * (final + (1 - final) * left)


@dataclass
class Step:
    """The state between two updates, as training_steps yields it."""

    step: int  # finished updates
    num_steps: int
    start: int = 0  # the step that this process began at: over 0 in a resumed run
    loss: float = math.nan  # of the last update, nats per target
    lr: float = 0.0  # factor of the last update
    tok_per_s: float = 0.0  # all tokens that go through the model, learned or not
    left_s: float = math.nan  # seconds to the last step
    data: float = 0.0  # fraction of the time that was spent waiting for micro-batches
    update: float = 0.0  # fraction that the optimizer took, with its exchange between ranks
    micro: int = 0  # rows of a forward pass: fewer once memory has run out
    stopping: bool = False  # the user asked to stop: this is the last one yielded

    @property
    def new(self) -> bool:
        """True once this process has made an update."""
        return self.step > self.start

    def due(self, every: int, first: bool = False) -> bool:
        """Return True at multiples of `every` steps, at the end and on a stop; 0 is never.

        At the step where a process begins, 0 or the one it resumes from, only with `first`.
        """
        if every <= 0 or not (self.new or first):
            return False
        return self.step % every == 0 or self.step == self.num_steps or self.stopping


def accumulate(
    compute_loss: Callable[[Any], Tensor], batches: Sequence[Any], rows: int, count: Tensor,
    optimizer: Optimizer,
) -> tuple[Tensor, int]:  # fmt: skip
    """Add up the gradients of micro-batches, `rows` rows a pass; return their loss / count, rows.

    Where memory runs out on any rank, all begin again in passes of half the rows.
    """
    scale = optimizer.scaler.scale if optimizer.scaler else 1.0  # of the gradients alone
    while True:
        optimizer.zero_grad()  # of passes before one that failed, or of a step without an update
        total, ran_out = torch.zeros((), device=count.device), False
        try:
            for batch in batches:
                for part in batch_parts(batch, rows):
                    loss = compute_loss(part) / count
                    (loss * scale).backward()
                    total += loss.detach()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            ran_out, loss = True, total  # without the graph of the pass that failed
        if not any_rank(ran_out, count.device):
            return total, rows
        rows = fewer_rows(rows, count.device)


def training_steps(
    batches: Iterator[Any], compute_loss: Callable[[Any], Tensor], optimizer: Optimizer,
    schedule: Callable[[int], float], num_steps: int, *, accum: int = 1, micro: int = 0,
    start: int = 0, stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:  # fmt: skip
    """Train from step `start` to num_steps, yielding before each update and after the last.

    A step takes `accum` micro-batches, in passes of `micro` rows (0: as many as the first has).
    compute_loss returns a micro-batch's loss summed over its targets; the update divides by the
    targets of the whole step, over micro-batches and ranks, so a batch without any counts zero.
    Where fp16's gradients overflow the step makes no update. stop() on any rank ends all after the
    step. Raises Stop where the loss is not finite or one row does not fit in memory.
    """
    device, scaler = optimizer.device, optimizer.scaler
    s = Step(start, num_steps, start, micro=micro, stopping=any_rank(stop(), device))
    recent: collections.deque[tuple[float, ...]] = collections.deque(maxlen=20)  # steps' times
    while True:
        yield s
        if s.step >= num_steps or s.stopping:
            return
        began = time.perf_counter()
        parts = [next(batches) for _ in range(accum)]
        waited = time.perf_counter() - began
        s.micro = s.micro or len(parts[0].ids)
        counts = [[float(b.num_targets), float(b.ids.numel())] for b in parts]  # (accum, 2)
        count, num_tokens = all_sum(torch.tensor(counts, device=device).sum(0))
        total, rows = accumulate(compute_loss, parts, s.micro, count.clamp_min(1), optimizer)
        if rows < s.micro:
            say(f"memory ran out in step {s.step + 1}: on in passes of {rows} rows")
        s.micro = rows
        total.item()  # waits for the device, so that the update's time is its own
        passed = time.perf_counter()
        s.lr = schedule(s.step)
        if scaler and scaler.unscale(optimizer):
            say(f"fp16 overflowed in step {s.step + 1}: no update, scale {scaler.scale:g}")
        else:
            optimizer.step(s.lr)
        sums = all_sum(torch.stack([total, torch.tensor(float(stop()), device=device)]))
        s.loss, stopping = sums.tolist()
        s.step, s.stopping = s.step + 1, stopping > 0
        if not math.isfinite(s.loss):
            raise Stop(
                f"loss is {s.loss} at step {s.step}: checkpoints on disk are untouched; go on "
                "from them with --dtype=float32, begin anew with --restart and a lower "
                "--lr-scale, or look at the data of this step"
            )
        if s.step == start + 2:
            recent.clear()  # the first step compiled and warmed up
        ended = time.perf_counter()
        recent.append((ended - began, num_tokens.item(), waited, ended - passed))
        seconds, tokens, waits, updates = map(sum, zip(*recent))
        s.tok_per_s, s.data, s.update = tokens / seconds, waits / seconds, updates / seconds
        s.left_s = seconds / len(recent) * (num_steps - s.step)


def fewer_rows(rows: int, device: torch.device) -> int:
    """Return half of the rows, rounded up. Raises Stop where there is but one.

    To be called when the error is gone, and with it the tensors that its frames hold.
    """
    if rows == 1:
        raise Stop(
            f"not even one row fits in the memory of {device.type}: free some, or pretrain with "
            "--recompute, a smaller --max-seq-len or --depth (--plan estimates what they take)"
        )
    gc.collect()
    return -(-rows // 2)


def in_fewer_rows(compute: Callable[[Any], Any], rows: Any, device: torch.device) -> list[Any]:
    """Return [compute(rows)], or what it returns for parts of the rows where memory runs out."""
    try:
        return [compute(rows)]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    half = fewer_rows(len(rows), device)
    parts = rows[:half], rows[half:]
    return [found for part in parts for found in in_fewer_rows(compute, part, device)]


def memory_bytes(
    config: GPTConfig, rows: int, itemsize: int, device: torch.device, *, world_size: int = 1,
    recompute: bool = False, slots: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Estimate a device's bytes at the peak of training with `rows` rows a pass, not compiled.

    itemsize is the bytes of an activation; slots are those of an engine that samples meanwhile.
    "workspace" is what the backward pass of a block, or the update, takes beyond the logits, which
    are gone by then. Tests hold the sum to what is measured, within a tenth.
    """
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    N = rows * config.max_seq_len  # tokens of a pass
    matrices, params = config.matrix_params(), config.num_params()
    kv = config.n_kv_head / config.n_head  # width of the keys, or the values, in C
    norm = 4 if device.type == "cpu" else itemsize  # a norm's input: fp32 where it is not fused
    # kept for the backward pass, in bytes a token and channel: of a block the inputs and outputs
    # of its norms, and the inputs of those of queries and keys; queries, keys, values and what
    # attention gives; the MLP's 4 C before and after the square; what the skip scales
    block = 2 * (norm + itemsize) + (1 + kv) * norm + (2 + 2 * kv + 8 + config.skip) * itemsize
    kept = L * (1 + config.skip) * itemsize if recompute else L * block
    kept += len(config.value_layers) * kv * itemsize  # what the gates scale
    kept += 2 * norm + (1 + config.smear) * itemsize  # first and last norm, smear, head's input
    casts, again = itemsize * matrices if itemsize < 4 else 0, 0.0  # casts of the weights
    if recompute:  # one block at a time makes its own again
        casts, again = 0, N * C * (block - config.skip * itemsize) + casts / L
    parts = {
        "weights": 4 * params + casts,
        "gradients": 4 * params,
        "optimizer": (4 * matrices + 8 * (params - matrices)) // world_size,
        "activations": int(N * C * kept),
        "logits": 20 * min(N * V, logits_at_once(device, N * V)) + 8 * V * C,
        "cache": slots * config.cache_bytes(itemsize),
    }
    backward = again + 10 * N * C * itemsize + 4 * V * C
    # the largest array is a table, or the stack of attention's matrices: that one is copied, and
    # orthogonalized. The activations are free by then
    table = 16 * max(V, config.bigram_rows) * C
    stack = (8 + 5 * itemsize) * (4 * L + config.smear) * C * C
    update = max(table, stack) - parts["activations"] - casts
    return {**parts, "workspace": max(0, int(max(backward, update)) - parts["logits"])}


def choose_micro_batch(
    run: Run, config: GPTConfig, saved: dict[str, Any], share: int, most: int, itemsize: int,
    recompute: bool,
) -> int:  # fmt: skip
    """Choose the rows of a forward pass, of the `share` of a step's rows that a rank has.

    They are as --device-batch-size says, or else `most`, halved until the estimate fits on all
    ranks; in a resumed run, whose meta is `saved`, as at its end, so that it is the unbroken run.
    """
    asked = run.settings.device_batch_size
    if "micro_batch" in saved and saved["settings"]["device_batch_size"] == asked:
        asked = saved["micro_batch"]
    if asked:
        return min(share, asked)
    rows, device = min(share, most), run.device
    room = 0.9 * min(run.together(lambda: free_bytes(device)))  # the rest: fragments
    options: dict[str, Any] = {"world_size": run.world_size, "recompute": recompute}
    while sum(memory_bytes(config, rows, itemsize, device, **options).values()) > room:
        rows = fewer_rows(rows, device)
    return rows


# 6. Engine -----------------------------------------------------------------------------------
#
# In: requests, each a prompt's ids and how to sample. Out: replies, one id a step for each request
# at work. Chat, the server, evaluation and rl all generate here. The engine has a fixed number of
# slots (64), rows of one KV cache: at d4 a slot of 256 positions takes 2 MB in fp32, at d20 one of
# 2,048 positions 210 MB in bf16. Requests join and leave between steps. Equal prompts are computed
# once, and what a row holds of a conversation is not computed again.

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
EXPRESSION = re.compile(r"""(?: [-0-9.,+*/%() ] | len\( | \.count\( | '[^'\\\n]*' | "[^"\\\n]*" )+""",
                        re.VERBOSE)  # fmt: skip
MAX_EXPRESSION, MAX_DEPTH = 256, 64  # characters; operations inside one another
MAX_DIGITS, MAX_BITS = 30, 2048  # before the point in a result; of any number on the way to it
DECIMALS = 6  # a result is rounded to these


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression as text, or "error": the assistant's tool.

    Numbers (1,000 too), + - * / // % **, parentheses, 'text'.count('x') and len('text'). It walks
    Python's syntax tree, so that nothing is executed, and counts in fractions, so that results
    are exact: 0.1+0.2 is 0.3, 20/2 is 10. Every size, and with them the time, is bounded.
    """
    quoted = "'" in expression or '"' in expression
    try:
        if len(expression) > MAX_EXPRESSION or not EXPRESSION.fullmatch(expression):
            return "error"
        if not quoted:
            expression = re.sub(THOUSANDS, lambda m: m[0].replace(",", ""), expression)
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"
    if abs(value) >= 10**MAX_DIGITS:
        return "error"
    scaled = round(value * 10**DECIMALS)
    whole, rest = divmod(abs(scaled), 10**DECIMALS)
    return "-" * (scaled < 0) + f"{whole}.{rest:0{DECIMALS}}".rstrip("0").rstrip(".")


def _evaluate(node: ast.expr, depth: int) -> Fraction:
    """Evaluate a syntax tree of what calculate allows. Raises ValueError for anything else."""
    if depth == 0:
        raise ValueError("too deep")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(repr(number))  # 0.1 as it is written
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, depth - 1)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str(text))], keywords=[]):
            return Fraction(len(text))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return Fraction(text.count(part))
        case ast.BinOp() if type(node.op) in OPERATORS:
            left, right = (_evaluate(side, depth - 1) for side in (node.left, node.right))
            if isinstance(node.op, ast.Pow):
                value = _power(left, right)
            else:
                value = Fraction(OPERATORS[type(node.op)](left, right))
            if _bits(value) > MAX_BITS:
                raise ValueError("too large")
            return value
        case _:
            raise ValueError(f"{type(node).__name__} is not allowed")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        if abs(exponent) * _bits(base) > MAX_BITS:
            raise ValueError("too large")
        return Fraction(base**exponent)
    if base < 0:
        raise ValueError("the root of a negative number")
    return Fraction(repr(float(base) ** float(exponent)))


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off; 0 takes the likeliest token
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature {self.temperature} must be 0 or more")
        if not 0 <= self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError("top_p must be from 0 to 1, top_k 0 or more, max_tokens 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken, without any chance."""
        return self.temperature == 0 or self.top_p == 0


COLDEST = 1e-5  # lower temperatures are taken as this one: they would be 0 in fp32, and logits NaN


def to_device(values: list, device: torch.device) -> Tensor:
    """Copy numbers to a device, without waiting for what it is computing."""
    cuda = device.type == "cuda"
    return torch.tensor(values, pin_memory=cuda).to(device, non_blocking=cuda)


def sample(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> list[int]:
    """Choose an id from each row of logits (B, V) by its own settings and uniform number.

    Temperature, then the k likeliest, then those of total probability p (arXiv:1904.09751), then
    the first whose cumulative weight passes the number; of equal logits the lower id comes first.
    A row's choice depends on no other. A GPU is waited for once, for the ids.
    """
    chosen, V = logits.argmax(-1), logits.size(-1)
    for filtered in (False, True):
        rows = [i for i, s in enumerate(samplings)
                if not s.greedy and (s.top_k > 0 or s.top_p < 1) == filtered]  # fmt: skip
        if not rows:
            continue
        own = [samplings[i] for i in rows]
        columns = [[max(s.temperature, COLDEST) for s in own], [s.top_k or V for s in own],
                   [s.top_p for s in own], [uniforms[i] for i in rows]]  # fmt: skip
        index = None if len(rows) == len(samplings) else to_device(rows, logits.device)
        temperatures, ks, ps, us = to_device(columns, logits.device)[..., None]  # (rows, 1) each
        z = (logits if index is None else logits[index]).float() / temperatures
        top = z
        if filtered:  # the largest values are the same, however many are taken; their ids are not
            k = max(min(s.top_k or V, V) for s in own)
            top = z.topk(k).values if k < V else z.sort(descending=True).values
            top = top.masked_fill(torch.arange(k, device=z.device) >= ks, -math.inf)
        # cumulative sums grow from the left: the longer k of another row changes none, as it would
        # change the total of a softmax
        weights = (top - top.amax(-1, keepdim=True)).exp()
        sums = weights.cumsum(-1)
        if filtered:  # the first always stays
            sums = weights.masked_fill(sums - weights >= sums[:, -1:] * ps, 0).cumsum(-1)
        total = sums[:, -1:].contiguous()
        picked = torch.searchsorted(sums, total * us, right=True)
        # rounding may pass the end: the first sum that equals the total ends on an id with weight
        picked = torch.minimum(picked, torch.searchsorted(sums, total))
        if filtered:  # from the place in the order to the id: the n-th of those with this value
            value = top.gather(1, picked)
            n = picked - (top > value).sum(-1, keepdim=True)
            same = z == value
            picked = (same & (same.cumsum(-1) > n)).int().argmax(-1, keepdim=True)
        chosen = picked[:, 0] if index is None else chosen.index_copy(0, index, picked[:, 0])
    return chosen.tolist()


@dataclass
class Past:
    """What a forward pass of ids (B, T) needs of the cache; made by KVCache.extend."""

    rows: Tensor  # (B, 1): 0 .. B - 1
    positions: Tensor  # (B, T)
    before: Tensor  # (B, 1): the id before them; a row's first id counts as its own
    k: list[Tensor]  # by layer: (B, S, K, D), the positions in use
    v: list[Tensor]
    masks: dict[int, Tensor | None]  # by window: (B, T, S), True where seen; None: attend's rule

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, T, K, D) of a layer; return those of all positions."""
        for cached, new in ((self.k[layer], k), (self.v[layer], v)):
            cached[self.rows, self.positions] = new.detach()
        return self.k[layer], self.v[layer]


class KVCache:
    """The ids, keys and values of positions that were computed, for rows of unequal length."""

    def __init__(
        self, config: GPTConfig, rows: int, device: torch.device, dtype: torch.dtype,
        context: int | None = None,
    ):  # fmt: skip
        T = context or config.max_seq_len  # positions for which a row has room
        shape = rows, T, config.n_kv_head, config.head_dim
        self.k, self.v = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
            for _ in "kv"
        )
        self.ids = torch.zeros(rows, T, device=device, dtype=torch.long)
        self.lengths = np.zeros(rows, np.int64)  # positions filled
        self.windows = {config.window(layer) for layer in range(config.n_layer)}

    def part(self, start: int, end: int) -> KVCache:
        """Return rows start to end; storage and lengths are shared."""
        part = copy.copy(self)
        part.k, part.v = ([x[start:end] for x in xs] for xs in (self.k, self.v))
        part.ids, part.lengths = self.ids[start:end], self.lengths[start:end]
        return part

    def copies(self, rows: list[int]) -> KVCache:
        """Return a cache of its own whose rows continue these, of which one may stand twice."""
        made = copy.copy(self)
        made.k, made.v = ([x[rows] for x in xs] for xs in (self.k, self.v))
        made.ids, made.lengths = self.ids[rows], self.lengths[rows]
        return made

    def copy_row(self, source: int, target: int, n: int) -> None:
        """Make the first n positions of a row equal to another's, and end it there."""
        for x in (*self.k, *self.v, self.ids):
            x[target, :n] = x[source, :n]
        self.lengths[target] = n

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange two rows."""
        n = max(self.lengths[a], self.lengths[b])
        for x in (*self.k, *self.v, self.ids):  # by slices: a GPU waits for a list of indices
            x[a, :n], x[b, :n] = x[b, :n].clone(), x[a, :n].clone()
        self.lengths[[a, b]] = self.lengths[[b, a]]

    def extend(self, ids: Tensor, counts: list[int] | None = None) -> Past:
        """Append ids (B, T) to the rows, whose keys and values GPT.trunk then stores.

        Of row b the first counts[b] ids are real, or all: the rest is padding, which the next
        ids overwrite and no later position sees.
        """
        (B, T), device = ids.shape, ids.device
        end = int(self.lengths.max()) + T
        assert end <= self.ids.size(1), f"{end} positions in a cache of {self.ids.size(1)}"
        # steps of several rows always have a mask, so that a compiler sees one form of them
        alike = bool((self.lengths == self.lengths[0]).all()) and (T > 1 or B == 1)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        positions = lengths + torch.arange(T, device=device)  # (B, T)
        self.ids.scatter_(1, positions, ids)
        before = self.ids.gather(1, (lengths - 1).clamp_min(0))
        masks: dict[int, Tensor | None] = dict.fromkeys(self.windows)
        for window in self.windows:
            if not alike or window < self.ids.size(1):
                back = positions[:, :, None] - torch.arange(end, device=device)  # (B, T, S)
                masks[window] = (back >= 0) & (back < window)
        self.lengths += T if counts is None else np.array(counts)
        k, v = ([x[:, :end] for x in xs] for xs in (self.k, self.v))
        return Past(torch.arange(B, device=device)[:, None], positions, before, k, v, masks)


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how; with `tool` the calculator answers its calls.

    A reply ends as soon as its text holds one of the strings in `stop`.
    """

    prompt_ids: list[int]
    sampling: Sampling
    tool: bool = True
    stop: tuple[str, ...] = ()


@dataclass
class Reply:
    """What followed a prompt: ids, with the forced ones marked 0 in mask, and why it ended."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 sampled, 0 forced by the tool
    reason: str = ""  # stop: a closing token or stop string; length: a limit; cancel


CALL_TOKENS = 64  # a call of the tool that is longer ends in an error


@dataclass(eq=False)
class Job:
    """A request at work: its reply so far, random numbers, and where it is in a tool call."""

    request: Request
    limit: int  # tokens of the reply at most
    uniforms: list[float]
    decoder: ReplyDecoder  # finds stop strings
    reply: Reply = field(default_factory=Reply)
    row: int = -1  # of the cache, while decoding
    reused: int = 0  # tokens of the prompt that some row held already
    call: list[int] | None = None  # the expression being written
    asked: str | None = None  # the expression whose value comes next
    forced: collections.deque[int] = field(default_factory=collections.deque)


@dataclass(eq=False)
class _Prompt:
    """A prompt in prefill, for one or more jobs that share it."""

    ids: list[int]
    jobs: list[Job]
    row: int


@dataclass
class _Row:
    """What a row of the cache holds, and who works in it."""

    ids: list[int] = field(default_factory=list)
    owner: Job | _Prompt | None = None
    left: int = -1  # the step in which its last owner left


MANY_TOKENS = 1_000_000  # so many to come pay for compiling, which takes 20 to 45 seconds
SMALLEST_BUDGET = 128  # prompt tokens computed at once, when memory is short
MIN_REUSE = 32  # fewer tokens are sooner computed, together with other prompts


class Engine:
    """Generates for many requests at once; they join and leave between steps.

    Rows of the cache: first those of jobs that decode, last those of prompts in prefill, and
    between them what former jobs left, which a prompt that begins alike continues. While others
    decode, a long prompt is computed in chunks between their steps.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int = 64, chunk: int = 512):
        self.model, self.tokenizer, self.chunk = for_decoding(model), tokenizer, chunk
        self.device, self.budget = model.embed.weight.device, 16384
        row_bytes = model.config.cache_bytes(model.dtype.itemsize)
        while slots > 1 and slots * row_bytes > free_bytes(self.device) / 2:
            slots = -(-slots // 2)
        while True:
            try:
                self.cache = KVCache(model.config, slots, self.device, model.dtype)
                break
            except RuntimeError as error:  # what is free may lie in pieces
                if slots == 1 or not out_of_memory(error):
                    raise
                slots = -(-slots // 2)
        self.rows = [_Row() for _ in range(slots)]
        self.waiting: collections.deque[Job] = collections.deque()
        self.prompts: list[_Prompt] = []  # the i-th has the i-th row from the end
        self.decoding: list[Job] = []  # the i-th has row i
        self.steps = 0
        self.stops = {tokenizer.bos, tokenizer.specials["<|assistant_end|>"]}
        self.next_logits = self._next_logits

    def _next_logits(self, ids: Tensor, past: Past) -> Tensor:
        """Return the logits (B, V) after ids (B, 1): a step of decoding."""
        return self.model.logits(self.model.trunk(ids, past)[:, -1])

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile the step, for one row and for several of any length: it takes a minute, once.

        What a compiler, or the lack of one, raises is passed on; the engine works without.
        """

        def checked(guards: Sequence[Any]) -> list[bool]:
            return [not isinstance(guard.value, nn.Parameter) for guard in guards]

        if self.device.type == "cuda":  # as recorded graphs: unverified on GPU
            step = torch.compile(self._next_logits, mode="reduce-overhead")
        else:  # parameters follow from the rest: a check of each at every step takes its time
            step = torch.compile(self._next_logits, options={"guard_filter_fn": checked})
        mark = torch._dynamo.maybe_mark_dynamic
        for n in (1, 2, FEW_ROWS + 1):  # products of few rows and of more are other programs
            if n > len(self.rows):
                break
            rows = self.cache.part(0, n)
            rows.lengths[:] = [8 - i % 8 for i in range(n)]
            ids = torch.zeros(n, 1, dtype=torch.long, device=self.device)
            past = rows.extend(ids)
            for one in (ids, past.rows, past.positions, past.before):
                mark(one, 0)
            for keys in (*past.k, *past.v):
                mark(keys, (0, 1))
            for mask in past.masks.values():
                if mask is not None:
                    mark(mask, (0, 2))
            step(ids, past)
        self.clear()
        self.next_logits = step

    def expect(self, tokens: int) -> None:
        """Prepare to generate up to so many tokens: where it pays, compile the step of a CPU."""
        if tokens >= MANY_TOKENS and self.device.type == "cpu" and can_compile(self.device):
            self.try_to_compile(say)

    def try_to_compile(self, say: Callable[[str], None]) -> None:
        """Compile the step, or say that this failed: the engine works without."""
        try:
            self.compile()
        except (RuntimeError, OSError) as error:
            say(f"compile: failed ({type(error).__name__}), going on without")

    def refresh(self, model: GPT) -> None:
        """Take over the weights of a model in training; nothing may be at work."""
        assert not self.load, f"{self.load} requests are at work"
        self.model.load_state_dict(model.state_dict())
        for module in self.model.modules():
            if isinstance(module, PackedLinear):
                module.pack()
        self.clear()  # the cache is that of other weights

    def clear(self) -> None:
        """Forget every job and all that the cache holds."""
        self.waiting.clear()
        self.prompts, self.decoding = [], []
        self.rows = [_Row() for _ in self.rows]
        self.cache.lengths[:] = 0

    @property
    def load(self) -> int:
        """Return how many requests wait or are at work."""
        return len(self.waiting) + self._at_work()

    def _at_work(self) -> int:
        return len(self.decoding) + sum(len(prompt.jobs) for prompt in self.prompts)

    def submit(self, request: Request) -> Job:
        """Put a request in line; its reply grows by calls of step().

        Raises ValueError for a prompt that leaves no room.
        """
        n, context = len(request.prompt_ids), self.model.config.max_seq_len
        if not 1 <= n < context:
            raise ValueError(f"the prompt has {n} tokens: this model takes 1 to {context - 1}")
        limit = min(request.sampling.max_tokens, context - n)
        rng = np.random.default_rng(request.sampling.seed)
        uniforms = rng.random(0 if request.sampling.greedy else limit).tolist()
        decoder = ReplyDecoder(self.tokenizer, request.stop, request.tool)
        self.waiting.append(job := Job(request, limit, uniforms, decoder))
        return job

    def cancel(self, job: Job) -> None:
        """End a job at once, whatever it is doing; what it has said stays in its reply."""
        if not job.reply.reason:
            job.reply.reason = "cancel"
            self._leave()

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Compute the next id of every job that can go on; return those that got one."""
        self.steps += 1
        self._admit()
        moved = list(self.decoding)
        if moved:
            last_ids = [job.reply.ids[-1] for job in moved]
            ids = torch.tensor(last_ids, device=self.device)[:, None]
            logits = self.next_logits(ids, self.cache.part(0, len(moved)).extend(ids))
            for row, last_id in zip(self.rows, last_ids):
                row.ids.append(last_id)
            self._choose(moved, logits)
        moved += self._prefill()
        self._leave()
        return moved

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the request, its reply) as they finish.

        Raises ValueError for a prompt that leaves no room.
        """
        coming, jobs = enumerate(requests), dict[Job, int]()
        try:
            while True:
                free = len(self.rows) - self.load
                if 4 * free >= len(self.rows):  # prompts take less time together than one by one
                    for key, request in itertools.islice(coming, free):
                        jobs[self.submit(request)] = key
                if not jobs:
                    return
                for job in self.step():
                    if job.reply.reason:
                        yield jobs.pop(job), job.reply
        finally:
            for job in jobs:
                self.cancel(job)

    def generate(self, request: Request) -> Iterator[int]:
        """Yield the ids of one reply as they come."""
        job = self.submit(request)
        try:
            while not job.reply.reason:
                self.step()
                yield from job.reply.ids[-1:]
        finally:
            self.cancel(job)

    def complete(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the pieces of text that continue `text`, each of whole characters.

        A prompt longer than the context keeps its end: half of the context, or more where the
        answer leaves room for it.
        """
        context = self.model.config.max_seq_len
        keep = max(context // 2, context - 1 - sampling.max_tokens)
        prompt_ids = [self.tokenizer.bos, *self.tokenizer.encode(text)[-keep:]]
        ids = self.generate(Request(prompt_ids, sampling, tool=False))
        yield from (piece for _, piece in decoded(self.tokenizer, ids))

    def stream_reply(
        self, messages: list[dict[str, Any]], sampling: Sampling
    ) -> Iterator[tuple[str, str]]:
        """Yield the pieces (type, text) of the assistant's reply, each of whole characters.

        The type is "text", "python" (a call of the tool) or "output" (its result).
        """
        request = Request(render_prompt(self.tokenizer, messages), sampling)
        yield from decoded(self.tokenizer, self.generate(request))

    def _admit(self) -> None:
        """Give waiting jobs their rows, as many as are free, and what of them is computed."""
        new = []
        while self.waiting and self._at_work() < len(self.rows):
            job = self.waiting.popleft()
            prompt_ids = job.request.prompt_ids
            same = (p for p in self.prompts if p.ids == prompt_ids)
            if prompt := next(same, None):
                prompt.jobs.append(job)
                continue
            prompt = _Prompt(prompt_ids, [job], -1)
            self.prompts.append(prompt)
            new.append(prompt)
        # equal lengths side by side waste less padding
        first = len(self.prompts) - len(new)
        self.prompts[first:] = sorted(new, key=lambda prompt: len(prompt.ids))
        for i, prompt in enumerate(self.prompts[first:], first):
            self._take_row(prompt, len(self.rows) - 1 - i)

    def _take_row(self, prompt: _Prompt, target: int) -> None:
        """Give a prompt a row, with the beginning of it that another row holds."""
        todo = prompt.ids[:-1]  # the last id is always computed
        free = range(len(self.decoding), target + 1)
        alike = [common_prefix(row.ids, todo) for row in self.rows]
        found = max(alike)
        source = alike.index(found)
        if found < MIN_REUSE or 2 * found < len(prompt.ids):
            found = 0
        taken = min(free, key=lambda row: self.rows[row].left)
        if found and source in free and 2 * found >= len(self.rows[source].ids):
            taken = source  # it is the same conversation
        elif found:
            self.cache.copy_row(source, taken, found)
        self._swap(taken, target)
        self.cache.lengths[target] = found
        self.rows[target] = _Row(prompt.ids[:found], prompt)
        prompt.row = target
        for job in prompt.jobs:
            job.reused = found

    def _swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        self.cache.swap_rows(a, b)
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        for row in (a, b):
            if owner := self.rows[row].owner:
                owner.row = row

    def _prefill(self) -> list[Job]:
        """Compute the next part of the prompts; choose the first token where that was the last."""
        if not self.prompts:
            return []
        context, slots = self.model.config.max_seq_len, len(self.rows)
        budget = min(self.chunk, self.budget) if self.decoding else self.budget  # tokens
        count, width, real = 0, 0, 0
        for prompt in self.prompts:
            left = len(prompt.ids) - int(self.cache.lengths[prompt.row])
            width, real = max(width, left), real + left
            if count and (count + 1) * width > min(budget, 2 * real):  # or it is mostly padding
                break
            count += 1
        part = self.prompts[count - 1 :: -1]
        rows = self.cache.part(slots - count, slots)
        todo = [prompt.ids[n:] for prompt, n in zip(part, rows.lengths)]
        width = min(max(map(len, todo)), budget, context - int(rows.lengths.max()))
        todo = [ids[:width] for ids in todo]
        padded = [[*ids, *[0] * (width - len(ids))] for ids in todo]
        new = torch.tensor(padded, device=self.device)
        try:
            h = self.model.trunk(new, rows.extend(new, list(map(len, todo))))
        except RuntimeError as error:
            if not out_of_memory(error) or self.budget <= SMALLEST_BUDGET:
                raise
            self.budget //= 2
            for prompt in part:  # they begin again
                self.cache.lengths[prompt.row] = 0
                self.rows[prompt.row].ids = []
            return []
        for prompt, ids in zip(part, todo):
            self.rows[prompt.row].ids += ids
        whole = [i for i, p in enumerate(part) if len(self.rows[p.row].ids) == len(p.ids)]
        if not whole:
            return []
        ends = [len(todo[i]) - 1 for i in whole]
        return self._begin([part[i] for i in whole], self.model.logits(h[whole, ends]))

    def _begin(self, prompts: list[_Prompt], logits: Tensor) -> list[Job]:
        """Let the jobs of prompts that are computed decode, each in a row of its own."""
        self.prompts = [prompt for prompt in self.prompts if prompt not in prompts]
        self._close_ranks()
        first = len(self.decoding)
        begun = [(i, prompt.jobs[0]) for i, prompt in enumerate(prompts)]
        begun += [(i, job) for i, prompt in enumerate(prompts) for job in prompt.jobs[1:]]
        for row, (i, job) in enumerate(begun, first):
            if job is prompts[i].jobs[0]:
                self._swap(prompts[i].row, row)
            else:
                self.cache.copy_row(first + i, row, len(prompts[i].ids))
            self.rows[row], job.row = _Row(list(prompts[i].ids), job), row
        jobs = [job for _, job in begun]
        self.decoding += jobs
        self._choose(jobs, logits[[i for i, _ in begun]])
        return jobs

    def _close_ranks(self) -> None:
        """Bring the rows of prompts to the end of the cache, in their order."""
        for i, prompt in enumerate(self.prompts):
            self._swap(prompt.row, len(self.rows) - 1 - i)

    def _choose(self, jobs: list[Job], logits: Tensor) -> None:
        """Append each job's next id, forced or sampled, and follow the tool's protocol."""
        t = self.tokenizer
        for job in jobs:  # while the device still computes the logits
            if job.asked is not None:
                job.forced += t.encode(calculate(job.asked))
                job.forced.append(t.specials["<|output_end|>"])
                job.asked = None
        free = [i for i, job in enumerate(jobs) if not job.forced]
        samplings = [jobs[i].request.sampling for i in free]
        uniforms = [0.0 if s.greedy else jobs[i].uniforms[len(jobs[i].reply.ids)]
                    for i, s in zip(free, samplings)]  # fmt: skip
        logits = logits if len(free) == len(jobs) else logits[free]
        chosen = dict(zip(free, sample(logits, samplings, uniforms))) if free else {}
        for i, job in enumerate(jobs):
            reply = job.reply
            reply.mask.append(int(i in chosen))
            reply.ids.append(chosen[i] if i in chosen else job.forced.popleft())
            if job.request.stop:
                job.decoder.feed(reply.ids[-1])
            if i in chosen and (reply.ids[-1] in self.stops or job.decoder.stopped):
                reply.reason = "stop"
            elif i in chosen and job.request.tool:
                self._follow(job, reply.ids[-1])
            if not reply.reason and len(reply.ids) == job.limit:
                reply.reason = "length"

    def _follow(self, job: Job, chosen: int) -> None:
        """Notice a call of the tool, and at its end force the output; its text comes next step."""
        t = self.tokenizer
        if chosen == t.specials["<|python_start|>"]:
            job.call = []
        elif job.call is not None:
            ended = chosen == t.specials["<|python_end|>"]
            job.call += [] if ended else [chosen]
            if ended or len(job.call) == CALL_TOKENS:
                job.forced += [] if ended else [t.specials["<|python_end|>"]]
                job.forced.append(t.specials["<|output_start|>"])
                job.asked, job.call = t.decode(job.call) if ended else "", None  # "" is an error

    def _leave(self) -> None:
        """Free the rows of jobs that have ended; what they hold stays for prompts that go on."""
        self.waiting = collections.deque(job for job in self.waiting if not job.reply.reason)
        for prompt in self.prompts:
            prompt.jobs = [job for job in prompt.jobs if not job.reply.reason]
        for prompt in [prompt for prompt in self.prompts if not prompt.jobs]:
            self.prompts.remove(prompt)
            self._free(prompt.row)
        self._close_ranks()
        for row in reversed(range(len(self.decoding))):
            if self.decoding[row].reply.reason:
                self._swap(row, len(self.decoding) - 1)
                self.decoding[row] = self.decoding[-1]
                self.decoding.pop()
                self._free(len(self.decoding))

    def _free(self, row: int) -> None:
        self.rows[row].owner, self.rows[row].left = None, self.steps


def common_prefix(a: list[int], b: list[int]) -> int:
    """Count the ids with which both lists begin, by bisection: slices compare in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class ReplyDecoder:
    """Turns a reply's ids, one by one, into pieces (type, text) of whole characters.

    A character whose bytes are incomplete waits for the rest, and so does what may be the
    beginning of a stop string. Nothing follows the first stop string, which is left out; with
    `tool` none is sought in calls and their outputs.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), tool: bool = True):
        self.tokenizer, self.stops, self.tool = tokenizer, stops, tool
        self.names = {i: name for name, i in tokenizer.specials.items()}
        self.kind, self.text, self.stopped = "text", "", False
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, one: int) -> list[tuple[str, str]]:
        """Take the next id; return the pieces that are ready."""
        if name := self.names.get(one, ""):
            pieces = self.end()
            opens = name in ("<|python_start|>", "<|output_start|>")
            self.kind = name[2:-8] if opens else "text"
            return pieces
        if self.stopped:
            return []
        self.text += self.bytes.decode(self.tokenizer.decode_bytes([one]))
        stops = self.stops if self.kind == "text" or not self.tool else ()
        if found := [i for stop in stops if (i := self.text.find(stop)) >= 0]:
            self.stopped, ready = True, min(found)
        else:
            ends = (n for s in stops for n in range(1, len(s)) if self.text.endswith(s[:n]))
            ready = len(self.text) - max(ends, default=0)
        piece, self.text = self.text[:ready], "" if self.stopped else self.text[ready:]
        return [(self.kind, piece)] if piece else []

    def end(self) -> list[tuple[str, str]]:
        """Return what waited for more."""
        rest = "" if self.stopped else self.text + self.bytes.decode(b"", final=True)
        self.text = ""
        self.bytes.reset()
        return [(self.kind, rest)] if rest else []


def decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Turn ids, as they come, into pieces (type, text), each of whole characters."""
    decoder = ReplyDecoder(tokenizer)
    for one in ids:
        yield from decoder.feed(one)
    yield from decoder.end()


def reply_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[dict[str, str]]:
    """Turn a reply's ids into parts {"type": "text" | "python" | "output", "text"}."""
    groups = itertools.groupby(decoded(tokenizer, ids), key=lambda piece: piece[0])
    return [{"type": kind, "text": "".join(text for _, text in group)} for kind, group in groups]


def reply_text(parts: list[dict[str, str]]) -> str:
    """Join the text parts of a reply: what it says, without calls and outputs of the tool."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


# 7. Checkpoints, bits per byte ---------------------------------------------------------------
#
# In: a model, its optimizer and what a stage did so far. Out: runs/TAG/STAGE/step-001234/ with
# model.pt (weights in fp32: 63 MB at depth 4 with 4,096 ids, 5.6 GB at depth 20 with 65,536), a
# shard of the optimizer's state per rank, and meta.json. All stages start by begin_or_resume.

STAGES = ("base", "mid", "sft", "rl")  # in their order
CHECKPOINT_VERSION = 2  # 1 had no number; one more where an older run cannot be resumed
BEGIN_ANEW = "begin it anew with --restart, or give another --tag"


def list_checkpoints(tag: str, stage: str) -> list[Path]:
    """List a stage's checkpoint folders, oldest first; each is whole (renamed when complete)."""
    found = (run_dir(tag) / stage).glob("step-[0-9]*")
    return sorted(found, key=lambda path: (len(path.name), path.name))  # a million has 7 digits


def save_checkpoint(
    run: Run, s: Step, model: GPT, optimizer: Optimizer, meta: dict[str, Any]
) -> Path:
    """Copy a checkpoint to host memory, write it in the background, return the folder to be.

    The folder step-001234 is written beside and renamed; then all but the newest --keep go. Every
    rank writes its optimizer shard, rank 0 the weights and meta.json, which records each file's
    size and CRC-32. Waits for the write before this one, and raises Stop where that failed.
    """
    finish_save(run)
    folder = run.dir / step_name(s.step)
    shard = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    parts = {f"optimizer-{run.rank:03d}.pt": to_host(shard)}
    if run.rank == 0:
        parts["model.pt"] = to_host(model.state_dict())
    whole = {
        **meta, "version": CHECKPOINT_VERSION, "stage": run.stage, "step": s.step,
        "config": dataclasses.asdict(model.config), "settings": dataclasses.asdict(run.settings),
        "muon_dtype": str(optimizer.dtype)[6:], "micro_batch": s.micro,
        "metrics": dict(run.metrics), "seconds": time.time() - run.began,
    }  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(1)
    run.saving = pool.submit(write_checkpoint, run, folder, parts, whole)
    pool.shutdown(wait=False)
    return folder


def finish_save(run: Run) -> None:
    """Wait until the last checkpoint is on disk. Raises what its write raised, once."""
    saving, run.saving = run.saving, None
    if saving:
        saving.result()


def to_host(value: Any) -> Any:
    """Copy the tensors in dicts and lists to host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(x) for key, x in value.items()}
    return [to_host(x) for x in value] if isinstance(value, list) else value


def write_checkpoint(run: Run, folder: Path, parts: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write all ranks' parts (name: value) and meta.json to a folder beside, and rename it."""
    beside, keep = folder.with_name(f".{folder.name}.partial"), run.settings.keep

    def begin() -> None:
        run.dir.mkdir(exist_ok=True)  # without its parents: a mount that went away stays away
        for left in run.dir.glob(".step-*.partial"):  # of a killed run
            shutil.rmtree(left)
        beside.mkdir()

    def write() -> dict[str, list[int]]:
        files = {}
        for name, value in parts.items():
            # given a path, torch.save holds up Python's other threads and calls no error ENOSPC
            with open(beside / name, "wb") as file:
                torch.save(value, file)
            sync(beside / name)  # a rename must not outlive its files in a power cut
            files[name] = [(beside / name).stat().st_size, crc32(beside / name)]
        return files

    def finish() -> None:
        files = dict(sorted(pair for part in written for pair in part.items()))
        write_json(beside / "meta.json", {**meta, "files": files})
        sync(beside / "meta.json")
        sync(beside)
        os.replace(beside, folder)
        sync(run.dir)
        for old in list_checkpoints(run.tag, run.stage)[:-keep] if keep else []:
            os.replace(old, beside)  # so that there is never half a checkpoint
            shutil.rmtree(beside)

    try:
        on_rank0(run, begin)
        written = run.together(write)
        on_rank0(run, finish)
    except BaseException:  # finish_save raises it, after the step
        run.stopping = True
        if run.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)  # room for what else must be written
        raise


def on_rank0(run: Run, work: Callable[[], Any]) -> Any:
    """Do a part of the work on files on rank 0 alone; all ranks wait for it and get its result."""
    return run.together(lambda: work() if run.rank == 0 else None)[0]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "posix":  # Windows opens no folders
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def crc32(path: Path) -> int:
    """Return a file's CRC-32."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a checkpoint into MissingInput that says what to delete."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingInput(
            f"checkpoint {folder} is damaged ({str(error).splitlines()[0]}): delete that folder; "
            "the newest of the others is then taken, or the stage begins anew"
        ) from None


def read_meta(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's meta.json. Raises MissingInput where it is damaged."""
    with undamaged(folder):
        return json.loads((folder / "meta.json").read_text("utf-8"))


def check_file(folder: Path, name: str) -> None:
    """Raise MissingInput unless a checkpoint's file has the size and CRC-32 that were noted."""
    path, noted = folder / name, read_meta(folder)["files"][name]
    with undamaged(folder):
        if [path.stat().st_size, crc32(path)] != noted:
            raise ValueError(f"{name} is not what was saved")


def load_file(folder: Path, name: str, device: torch.device) -> Any:
    """Load one .pt file of a checkpoint, checked. Raises MissingInput where it is damaged."""
    check_file(folder, name)
    with undamaged(folder):
        return torch.load(folder / name, map_location=device, weights_only=True)


def find_checkpoint(tag: str, stage: str, step: int = 0) -> Path:
    """Return the newest checkpoint folder of a stage, or that of `step`.

    Raises MissingInput that names what there is.
    """
    found = list_checkpoints(tag, stage)
    if step:
        found = [path for path in found if path.name == step_name(step)]
    if found:
        return found[-1]
    if not run_dir(tag).is_dir():
        tags = sorted(path.name for path in run_dir("").glob("*") if path.is_dir())
        have = f"there are {', '.join(tags)}" if tags else "there is none yet: `bash run.sh`"
        raise MissingInput(f"no run has the tag {tag!r}; {have}")
    what = f"step {step}" if step else "checkpoint"
    script = {"base": "pretrain", "mid": "midtrain"}.get(stage, stage)
    raise MissingInput(f"run {tag!r} has no {stage} {what}: run `python {script}.py --tag={tag}`")


def rank0_checkpoint(run: Run, find: Callable[[], Path | None]) -> Any:
    """Return the folder that rank 0 finds, once all ranks see it: NFS may list a new one late.

    Ranks that looked for themselves could train together from different steps.
    """
    folder = on_rank0(run, find)
    run.see(lambda: not folder or (folder / "meta.json").exists(), str(folder))
    return folder


def parent_checkpoint(run: Run, stage: str) -> Path:
    """Return the newest checkpoint of a stage of the run, the same for all ranks."""
    return rank0_checkpoint(run, functools.partial(find_checkpoint, run.tag, stage))


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, context: int = 0) -> GPT:
    """Build the model of a checkpoint on the device: weights in fp32, activations in dtype.

    context, if not 0, replaces the model's: no weight depends on it.
    """
    config = GPTConfig(**read_meta(folder)["config"])
    with torch.device("meta"):
        model = GPT(replace(config, max_seq_len=context or config.max_seq_len))
    model.load_state_dict(load_file(folder, "model.pt", device), assign=True)
    model.init_rope()
    model.dtype = dtype
    return model


def run_tokenizer(tag: str) -> Tokenizer:
    """Load a run's tokenizer. Raises MissingInput where its base model was trained with another."""
    tokenizer, found = Tokenizer.load(run_dir(tag) / "tokenizer"), list_checkpoints(tag, "base")
    if found and read_meta(found[-1])["tokenizer"] != tokenizer.fingerprint:
        raise MissingInput(
            f"run {tag!r} has another tokenizer than its base model was trained with: put that "
            f"one back, or train anew: `python pretrain.py --restart --tag={tag}`"
        )
    return tokenizer


def load_for_answers(settings: Any) -> tuple[GPT, Tokenizer, Path]:
    """Load the model that ModelSettings name, by default the run's newest, to talk to.

    Returns the model, its tokenizer and its folder.
    """
    use_plain(getattr(settings, "plain", False))
    limit_threads()
    there = [stage for stage in STAGES if list_checkpoints(settings.tag, stage)]
    stage = settings.stage or (there[-1] if there else "base")
    folder = find_checkpoint(settings.tag, stage, settings.step)
    tokenizer, device = run_tokenizer(settings.tag), pick_device(settings.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    if settings.int8 and device.type not in ("cpu", "cuda"):
        raise Stop(f"--int8 works on CPUs and NVIDIA GPUs, not on {device.type}: leave it out")
    model = load_model(folder, device, pick_dtype(device, settings.dtype))
    return quantize(model) if settings.int8 else model, tokenizer, folder


def load_optimizer(run: Run, folder: Path, optimizer: Optimizer) -> None:
    """Load a checkpoint's optimizer state and random state, by however many ranks it was saved.

    A rank checks its share of the files, and reads of all of them only what it keeps.
    """
    files = [name for name in read_meta(folder)["files"] if name.startswith("optimizer-")]
    names = sorted(files, key=lambda name: (len(name), name))  # 1000 is after 999

    def check() -> None:
        for name in names[run.rank :: run.world_size]:
            check_file(folder, name)

    run.together(check)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": True}
    shards = [torch.load(folder / name, **options) for name in names]
    optimizer.load_state_dicts([shard["optimizer"] for shard in shards])
    torch.set_rng_state(shards[0]["rng"].clone())


@dataclass(frozen=True)
class Horizon:
    """How long a run is."""

    num_steps: int  # optimizer updates
    batch_rows: int  # rows of an update, over all ranks
    why: str  # what num_steps is derived from, for the log
    total_rows: int = sys.maxsize  # after which the last step has no more, in runs of whole epochs

    @property
    def num_rows(self) -> int:
        """Rows of the whole run."""
        return self.num_steps * self.batch_rows


# The batch at which 20 tokens a parameter of depth 20 train well, published for nanochat.
REFERENCE_BATCH, REFERENCE_TOKENS = 2**19, 11.2e9


def context_of(settings: Any, meta: dict[str, Any]) -> int:
    """Return the positions of a row of mid or sft: as set, or as in the parent checkpoint's meta."""
    return settings.context or meta["config"]["max_seq_len"]


def suited_batch(tokens: float) -> float:
    """Return how many tokens a step should have: short runs need steps more than clean gradients."""
    return REFERENCE_BATCH * math.sqrt(tokens / REFERENCE_TOKENS)


def epochs_horizon(settings: Any, count: int, batch_rows: int, epochs: int = 1) -> Horizon:
    """Derive how long a run over `count` rows is: --num-iterations, or whole epochs."""
    if settings.num_iterations:
        return Horizon(settings.num_iterations, batch_rows, "as set")
    steps, why = math.ceil(epochs * count / batch_rows), f"{epochs} epoch{'s' * (epochs > 1)}"
    return Horizon(steps, batch_rows, why, epochs * count)


def describe_rows(run: Run, rows: Rows, mixed: Mixed, horizon: Horizon, text_rows: int = 0) -> None:
    """Print of what and how many conversations rows are made, and how long they are trained on."""
    for kind, count in sorted(mixed.used.items(), key=lambda pair: -pair[1]):
        run.say(f"{count:9,} {kind}")
    T, text = len(rows.row(0)) - 1, f", {text_rows:,} of them text" * (text_rows > 0)
    run.say(f"rows: {len(rows):,} of {T} tokens{text}; conversations cut at a turn: {mixed.cut:,}, "
            f"too long and left out: {mixed.left_out:,}")  # fmt: skip
    run.say(f"steps: {horizon.num_steps:,} ({horizon.why}) of {horizon.batch_rows * T:,} tokens")


def begin_or_resume(
    run: Run, parent: Path | GPTConfig, horizon: Horizon, data: dict[str, Any], cpu_rows: int = 0
) -> tuple[GPT, Optimizer, int, dict[str, Any]] | None:
    """Set a stage up: where it broke off, else from its parent checkpoint or with a new model.

    Returns the model, compiled where that pays, its optimizer, the step to train from and what
    save_checkpoint is to note; None where the run is finished. parent is the config of a new model
    where no stage came before. What alters rounding (dtype, compilation, rows of a pass) stays as
    it was, which makes a resumed run the unbroken one, bit for bit. cpu_rows: rows of a pass on a
    CPU at most, where more gain nothing; 0: the base run's. Raises MissingInput where the run on
    disk has other settings, another parent or other `data`.
    """
    settings, device = run.settings, run.device
    if isinstance(parent, Path):
        data = {**data, "parent": parent_key(parent)}
    newest, saved = newest_checkpoint(run, data)
    start, run.num_steps = saved.get("step", 0), horizon.num_steps
    validated = take_up_log(run, saved) if newest else set()
    run.validated = start in validated
    if newest and start >= run.num_steps and (run.validated or not validated):
        run.say(f"{run.stage}: {newest} is there, finished")
        return None

    before = read_meta(parent) if isinstance(parent, Path) else {}
    base = read_meta(parent_checkpoint(run, "base")) if before else {}
    config = parent if isinstance(parent, GPTConfig) else GPTConfig(**before["config"])
    context = getattr(settings, "context", 0) or config.max_seq_len
    config = replace(config, max_seq_len=context)
    dtype = pick_dtype(device, settings.dtype or saved.get("dtype", ""))
    rows = accum_steps(horizon.batch_rows, 1)  # of a step, on this rank
    most = cpu_rows or base.get("micro_batch") or max(1, 8192 // config.max_seq_len)
    most = most if device.type == "cpu" else rows
    recompute = (base["settings"] if base else vars(settings)).get("recompute", False)
    micro = choose_micro_batch(run, config, saved, rows, most, dtype.itemsize, recompute)
    compiled = False
    if hasattr(settings, "compile"):  # not in rl, whose batches differ in width
        choice = settings.compile
        if choice == "auto" and "compiled" in saved:
            choice = "yes" if saved["compiled"] else "no"
        rate = 0.3 * peak_flops(device, dtype) * run.world_size  # FLOP/s without compilation
        seconds = horizon.num_rows * config.max_seq_len * config.flops_per_token() / rate
        warm = bool(before) and before["compiled"] and micro == before["micro_batch"]
        compiled = compile_or_not(choice, seconds, device, say, warm)

    folder = newest or parent
    if isinstance(folder, Path):
        model = load_model(folder, device, dtype, context)
        run.say(f"{run.stage}: {'going on' if newest else 'beginning'} from {folder}")
    else:
        model = GPT.create(config, device, dtype)
    model.recompute = recompute
    if getattr(settings, "fp8", False):
        train_in_fp8(model)
    optimizer = make_optimizer(model, settings, base, {**base, **saved}, compiled)
    if isinstance(folder, Path) and (newest or settings.warm_start):
        load_optimizer(run, folder, optimizer)
    if compiled:
        model.compile(dynamic=False)
    run.began = time.time() - saved.get("seconds", 0)
    meta = {"dtype": str(dtype)[6:], "compiled": compiled, "micro_batch": micro, **data}
    meta["threads"] = torch.get_num_threads()
    if device.type == "cpu" and saved.get("threads", meta["threads"]) != meta["threads"]:
        run.say(f"{run.stage}: begun with {saved['threads']} threads, now {meta['threads']}: sums "
                "are rounded otherwise, so this is not the unbroken run bit for bit")  # fmt: skip
    return model, optimizer, start, {**saved, **meta}


def make_optimizer(
    model: GPT, settings: Any, base: dict[str, Any], was: dict[str, Any], compiled: bool
) -> Optimizer:
    """Make a stage's optimizer: of its settings, those of the base run where they are left open.

    base is the base run's meta, {} in the base run itself; was is that of the run so far. Muon's
    dtype stays what it was unless the machine computes in another: bf16 crawls on some.
    """
    of_base = base["settings"] if base else {**dataclasses.asdict(settings), "lr_scale": 1.0}
    decay = settings.weight_decay if settings.weight_decay >= 0 else of_base["weight_decay"]
    device, dtype = model.embed.weight.device, str(model.dtype)[6:]
    muon_dtype = pick_dtype(device, was["muon_dtype"] if was.get("dtype") == dtype else "")
    groups = optimizer_groups(
        model, settings.matrix_lr or of_base["matrix_lr"], settings.embed_lr or of_base["embed_lr"],
        settings.head_lr or of_base["head_lr"], decay, of_base["muon_steps"],
    )  # fmt: skip
    for group in groups:
        group["lr"] *= settings.lr_scale * of_base["lr_scale"]
    optimizer = Optimizer(groups, muon_dtype, compiled)
    optimizer.scaler = LossScaler() if model.dtype == torch.float16 else None
    return optimizer


def newest_checkpoint(run: Run, data: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint that a stage is resumed from and its meta, or None and {}.

    None also with --restart: drop_replaced then drops what is there. Raises MissingInput where the
    run there is of an older version, has other settings, or other values than `data` in its meta.
    """
    settings, mark = run.settings, run.dir / ".restart"

    def find() -> Path | None:
        if settings.restart and not run.again and run.dir.exists():
            mark.touch()  # it tells torchrun's next attempt that training had not begun
        listed = list_checkpoints(run.tag, run.stage)
        return listed[-1] if listed and not (settings.restart and mark.exists()) else None

    newest = rank0_checkpoint(run, find)
    if not newest:
        return None, {}
    saved = read_meta(newest)
    if (version := saved.get("version", 1)) != CHECKPOINT_VERSION:
        raise MissingInput(
            f"{newest} is of version {version}, which answers as before but is not trained on "
            f"by a program of version {CHECKPOINT_VERSION}: {BEGIN_ANEW}"
        )
    for f in dataclasses.fields(settings):
        now = getattr(settings, f.name)
        before = saved["settings"].get(f.name, now)
        if before != now and not f.metadata["may_differ"]:
            raise MissingInput(
                f"{run.dir} holds a run with --{f.name.replace('_', '-')}={before}, not {now}: "
                f"repeat it as it was, {BEGIN_ANEW}"
            )
    check_data(run, saved, data)
    return newest, saved


def check_data(run: Run, saved: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise MissingInput where the meta of a run that is resumed has other values than data."""
    if any(saved.get(key, value) != value for key, value in data.items()):
        raise MissingInput(
            f"{run.dir} was trained on other data, with another tokenizer or from another model "
            f"than there is now: {BEGIN_ANEW}"
        )


def parent_key(folder: Path) -> list[int]:
    """Tell one checkpoint's weights from another's: their size and CRC-32."""
    return read_meta(folder)["files"]["model.pt"]


def take_up_log(run: Run, saved: dict[str, Any]) -> set[int]:
    """Take over the metrics of a run that is resumed; return the steps that it validated at.

    The validation at a checkpoint's step came after it was saved, and stands in the log alone.
    """

    def replay() -> tuple[dict[str, Any], set[int]]:
        metrics, validated = dict(saved["metrics"]), set()
        for line in read_log(run.tag):
            if line.pop("stage") == run.stage and line["step"] <= saved["step"]:
                note(metrics, {key: line[key] for key in line if key != "time"})
                if any(key.startswith("val_") for key in line):
                    validated.add(line["step"])
        return {**metrics, "step": saved["step"]}, validated

    run.metrics, validated = on_rank0(run, replay)
    return validated


def note(metrics: dict[str, Any], values: dict[str, Any]) -> None:
    """Keep an event's values as the newest, and the best validation loss beside them."""
    metrics.update(values)
    for name in ("val_bpb", "val_loss"):
        if name in values:
            best = metrics.get(f"best_{name}", math.inf)
            metrics[f"best_{name}"] = min(best, values[name])


def drop_replaced(run: Run, start: int) -> None:
    """Drop what training from `start` on replaces: with 0 old checkpoints, later lines of the log.

    Until then --restart has deleted nothing. They go by one rename: whole, or not at all. Where
    the user has asked to stop while the stage was set up, nothing goes.
    """
    log_path = run_dir(run.tag) / "metrics.jsonl"

    def drop() -> None:
        old = run.dir.with_name(f".{run.stage}.partial")
        shutil.rmtree(old, ignore_errors=True)  # a killed run's
        if not start and run.dir.exists():
            os.replace(run.dir, old)
            shutil.rmtree(old)
        if log_path.exists():
            last = start or -1
            kept = [x for x in read_log(run.tag) if x["stage"] != run.stage or x["step"] <= last]
            with written_beside(log_path) as beside:
                beside.write_text("".join(json.dumps(x) + "\n" for x in kept), "utf-8")

    if not any_rank(run.stopping, run.device):  # else training_steps will make no step
        on_rank0(run, drop)


@torch.no_grad()
def evaluate_loss(model: GPT, rows: Rows, micro_batch: int) -> float:
    """Return the mean nats per target over all rows, which the ranks share."""
    rank, world_size = dist_info()
    device = model.embed.weight.device
    sums = torch.zeros(2, device=device)  # nats, targets
    for first in range(rank * micro_batch, len(rows), world_size * micro_batch):
        indices = np.arange(first, min(first + micro_batch, len(rows)))
        ids, targets = (x.to(device) for x in rows.gather(indices))  # (B, T) each
        sums[0] += token_losses(model, ids, targets).sum()
        sums[1] += (targets != IGNORE).sum()
    nats, count = all_sum(sums).tolist()
    return nats / max(1.0, count)


def evaluate_bpb(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], micro_batch: int
) -> tuple[float, int]:
    """Return (bits per byte, documents) over texts, by documents: packing has no part in it.

    Each document is read in windows of the model's context, every one begun with `<|bos|>`; nats
    of all its tokens are summed and divided by all its UTF-8 bytes. The ranks share the documents.
    """
    rank, world_size = dist_info()
    T, bos, device = model.config.max_seq_len, tokenizer.bos, model.embed.weight.device
    token_bytes = tokenizer.token_bytes.to(device)
    sums = torch.zeros(3, dtype=torch.float64)  # nats, bytes, documents
    texts = itertools.islice(texts, rank, None, world_size)
    while chunk := list(itertools.islice(texts, 1024)):
        documents = map(torch.tensor, filter(None, tokenizer.encode_batch(chunk)))
        windows = [window for document in documents for window in document.split(T)]
        windows.sort(key=len)  # equal lengths side by side waste less padding
        for i in range(0, len(windows), micro_batch):
            targets = nn.utils.rnn.pad_sequence(windows[i : i + micro_batch], True, IGNORE)
            ids = F.pad(targets[:, :-1], (1, 0), value=bos)  # (B, T): each target's id before it
            targets, ids = targets.to(device), ids.where(ids != IGNORE, bos).to(device)
            sums[0] += token_losses(model, ids, targets).sum().item()
            sums[1] += int((token_bytes[targets.clamp_min(0)] * (targets != IGNORE)).sum())
        sums[2] += len(chunk)
    if world_size > 1:  # NCCL sums on the device, and mps has no float64
        sums = all_sum(sums.to(device))
    nats, num_bytes, num_documents = sums.tolist()
    return nats / math.log(2) / max(1.0, num_bytes), int(num_documents)


# 8. Settings, errors, log --------------------------------------------------------------------
#
# In: a command line and the base directory. Out: one dataclass of settings a stage, the paths of
# what stages leave each other, one-sentence errors, and an event as a line of log and of JSON.


class Stop(SystemExit):
    """End the program with one sentence on stderr and exit code 1, without a traceback."""


class MissingInput(Stop):
    """Something that an earlier stage makes, or that the settings name, is not there."""


RL_VAL = 128  # problems at most on which rl validates


def rl_held(count: int) -> int:
    """Return how many of rl.jsonl's first problems are for validation alone."""
    return min(RL_VAL, count // 10)


def base_dir() -> Path:
    """Return the folder that holds everything: NANOCHAT_BASE_DIR or ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def data_dir(source: str) -> Path:
    """Return the folder of one data source's shards and conversations."""
    return base_dir() / "data" / source


def run_dir(tag: str) -> Path:
    """Return the folder of one run: tokenizer, checkpoints, metrics, report."""
    return base_dir() / "runs" / tag


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:06d}"


def check_name(name: str, what: str) -> None:
    """Raise ValueError unless name is one plain folder name (text never becomes a path)."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{what} {name!r} must be letters, digits, '.', '_' or '-'")


def prepared_sources() -> list[str]:
    """List the sources whose text is prepared."""
    return sorted(p.parent.name for p in base_dir().glob("data/*/manifest.json"))


def list_shards(source: str, split: str) -> list[Path]:
    """List a source's text shards of split "train" or "val" in order.

    Raises MissingInput where prepare.py has not made them.
    """
    folder = data_dir(source)
    shards = sorted(folder.glob("train-*.parquet" if split == "train" else "val.parquet"))
    if not shards or not (folder / "manifest.json").exists():  # prepare.py writes that one last
        have = ", ".join(prepared_sources())
        raise MissingInput(
            f"{folder} has no {split} text{f' (prepared: {have})' if have else ''}: run "
            f"`python prepare.py --source={source}` first"
        )
    return shards


def text_key(source: str) -> str:
    """Tell a source's text from what it was: a hash of its files' own, "" where they have none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        files = json.loads((data_dir(source) / "manifest.json").read_text("utf-8"))["files"]
        hashes = {name: entry["sha256"] for name, entry in files.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:12]
    return ""


def read_texts(path: Path) -> Iterator[str]:
    """Yield a parquet file's `text` column document by document.

    Raises MissingInput where the file is truncated or is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise MissingInput(f"{path} cannot be read ({reason}): delete it and run prepare.py again")


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it into place at the end, drop it on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")  # of this process alone
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write value as indented JSON, beside and renamed."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def format_duration(seconds: float) -> str:
    """Write a time span in its natural unit: 45 s, 12 min, 3.4 h, 2.1 d."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def format_count(value: float) -> str:
    """Write a count with three digits and k, M, G or T: 1.23 M."""
    for divisor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= divisor:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:.3g}"


# How a logged value is printed; a key that is not here is printed as `key value`.
LOG_FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "lr": lambda v: f"lr {v:.2f}x",
    "val_bpb": lambda v: f"val_bpb {v:.4f}",
    "tok_per_s": lambda v: f"{v / 1e3:.1f} ktok/s",
    "mfu": lambda v: f"mfu {100 * v:.1f} %",
    "data": lambda v: f"data {100 * v:.1f} %",
    "update": lambda v: f"update {100 * v:.1f} %",
    "memory": lambda v: f"memory {v:.1f} GB",
    "left_s": lambda v: f"left {format_duration(v)}",
}


def format_log(stage: str, step: int, num_steps: int, values: dict[str, Any]) -> str:
    """Make the one log line of an event, same order and units in every stage."""
    words = [f"{stage} {step:05d}/{num_steps:05d}"]
    for key, value in values.items():
        plain = f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        words.append(LOG_FORMATS[key](value) if key in LOG_FORMATS else plain)
    return "  ".join(words)


def read_log(tag: str) -> list[dict[str, Any]]:
    """Read what a run's stages have logged, but for lines torn by a full disk or a power cut."""
    path = run_dir(tag) / "metrics.jsonl"
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


HELP_GROUPS = ("model", "data", "optimisation", "logging", "device")  # the headings of --help


def setting(
    default: Any, help: str, short: str = "", choices: tuple = (),  # noqa: A002
    may_differ: bool = False, group: str = "",
) -> Any:  # fmt: skip
    """Declare one field of a Settings dataclass: its default, help, one-letter flag, choices.

    may_differ: True if a resumed run may have another value, as it alters no batch and no update.
    group: one of HELP_GROUPS, under which --help lists it.
    """
    metadata = {"help": help, "short": short, "choices": choices, "may_differ": may_differ}
    return field(default=default, metadata={**metadata, "group": group})


model_setting, data_setting, optim_setting, log_setting, device_setting = (
    functools.partial(setting, group=group, may_differ=group in ("logging", "device"))
    for group in HELP_GROUPS
)


@dataclass
class RunSettings:
    """What every command that runs a model can be told.

    A subclass changes a default by `name: type = value`; help, choices and the rest are inherited.
    """

    tag: str = setting("main", "name of the run, a folder below runs/", may_differ=True)
    device: str = device_setting("", "cuda, mps or cpu; empty: the best that is present")
    dtype: str = device_setting(
        "", "dtype of activations; empty: bfloat16 or float16 where that is fast, else float32",
        choices=("", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    plain: bool = device_setting(False, "switch all fast paths off, for who changes the model")

    def __init_subclass__(cls) -> None:
        for parent in reversed(cls.__mro__[1:]):
            for name, f in parent.__dict__.get("__dataclass_fields__", {}).items():
                own = cls.__dict__.get(name, f)
                if not isinstance(own, dataclasses.Field):
                    setattr(cls, name, field(default=own, metadata=f.metadata))

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")


@dataclass
class ModelSettings(RunSettings):
    """Which model of a run chat.py, serve.py and evaluate.py load."""

    stage: str = model_setting(
        "", "stage whose model it is; empty: the last that has one", "i", ("", *STAGES)
    )
    step: int = model_setting(0, "step of the checkpoint to load; 0: the newest")
    int8: bool = model_setting(False, "multiply in 8 bits: less memory, sooner answers on a CPU")


@dataclass
class TrainSettings(RunSettings):
    """What all stages that train can be told."""

    restart: bool = setting(
        False, "delete this stage's checkpoints and begin anew", may_differ=True
    )
    seed: int = data_setting(0, "seed of all that is drawn: weights, the data's order, samples")
    num_iterations: int = optim_setting(0, "optimizer steps; 0: as many as --epochs takes")
    lr_scale: float = optim_setting(1.0, "factor on all learning rates")
    warmup: int = optim_setting(0, "steps in which the learning rate rises")
    warmdown: float = optim_setting(1.0, "fraction of the run in which the learning rate falls")
    final_lr: float = optim_setting(0.0, "factor on the learning rate at the end of --warmdown")
    eval_every: int = log_setting(250, "steps between validations; 0: never")
    save_every: int = log_setting(500, "steps between checkpoints; 0: only at the end")
    keep: int = log_setting(2, "newest checkpoints that are kept; 0: all")
    log_every: int = log_setting(10, "steps between log lines; 0: only at the end")
    run: str = log_setting("", "name of a wandb run to log to as well; empty: none")
    device_batch_size: int = device_setting(0, "rows of one forward pass; 0: as many as fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "seed", "num_iterations", "warmup", "keep", "device_batch_size")
        if not 0 <= self.warmdown <= 1:
            raise ValueError("--warmdown must be from 0 to 1")
        if not 0 < self.lr_scale < math.inf:
            raise ValueError("--lr-scale must be above 0")
        self.save_every, self.log_every = max(0, self.save_every), max(0, self.log_every)


@dataclass
class RowSettings(TrainSettings):
    """What the stages can be told that train on packed rows: all but rl."""

    total_batch_size: int = optim_setting(
        0, "tokens of a step over all ranks; 0: the base run's, in sft what suits its tokens"
    )
    compile: str = device_setting(
        "auto", "use torch.compile; auto: where the run is long enough to gain by it",
        choices=("auto", "yes", "no"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "total_batch_size")


@dataclass
class ChatSettings(TrainSettings):
    """What the stages can be told that go on from another one's model: mid, sft and rl."""

    chats: str = data_setting("", "folder below data/ with the conversations; empty: as before")
    matrix_lr: float = optim_setting(0.0, "learning rate of matrices (Muon); 0: the base run's")
    embed_lr: float = optim_setting(0.0, "learning rate of the embedding; 0: the base run's")
    head_lr: float = optim_setting(0.0, "learning rate of the head; 0: the base run's")
    weight_decay: float = optim_setting(-1.0, "decay of the matrices; -1: the base run's")
    warm_start: bool = optim_setting(True, "begin with the parent checkpoint's Muon and Adam state")


@dataclass
class ChatRowSettings(ChatSettings, RowSettings):
    """What mid and sft can be told, which train another stage's model on packed conversations."""

    context: int = model_setting(
        0, "positions of a row, and of the model from here on; 0: as before"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "context")


def _whole_number(text: str) -> int:
    value = float(text)  # so that 2e9 is an int, as people write it
    if not value.is_integer():  # nor inf
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text) if text.lstrip("+-").isdigit() else int(value)


_whole_number.__name__ = "whole number"  # as argparse calls it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """End with one line and exit code 2 instead of argparse's usage screen."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse_settings(cls: type, doc: str | None, argv: list[str] | None = None) -> Any:
    """Turn a Settings dataclass into a command line and parse it: `--a-b 1`, `--a_b=1` alike.

    A bool field is a switch, `--x` or `--no-x`. A dataclass may name, in a class variable
    `derived: dict[str, str]`, flags that people try and what to use instead. Exits with code 2
    and one sentence on a wrong flag or value, also on an error of `__post_init__`.
    """
    parser = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups = {name: parser.add_argument_group(name) for name in HELP_GROUPS}
    types = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        names = [f"-{f.metadata['short']}"] if f.metadata["short"] else []
        names += [f"--{f.name.replace('_', '-')}"]
        default = f"default: {f.default}" if f.default not in ("", None) else "default: none"
        options: dict[str, Any] = {"dest": f.name, "default": f.default}
        options["help"] = f"{f.metadata['help']} ({default})".replace("%", "%%")
        if types[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _whole_number if types[f.name] is int else types[f.name]
            options["metavar"] = types[f.name].__name__.upper()
        if f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        groups.get(f.metadata["group"], parser).add_argument(*names, **options)
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--\w[\w-]*(?==|$)", lambda m: m[0].replace("_", "-"), w) for w in words]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(cls)], n=1)
        hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists them"
        parser.error(
            f"{unknown[0]!r} is not a setting: {getattr(cls, 'derived', {}).get(name, hint)}"
        )
    try:
        return cls(**vars(values))
    except (ValueError, OSError, RuntimeError) as error:  # the latter of paths that cannot be
        parser.error(str(error))


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raise ValueError unless each of these settings is finite and `least` or more."""
    for name in names:
        if not least <= getattr(settings, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more")


# 9. Devices and ranks ------------------------------------------------------------------------
#
# One path for one process and for many: torchrun's variables say which of the ranks this is, and
# collective helpers return their input where it is alone.

# Dense bf16 matmul peaks in FLOP/s as the makers state them; other devices are measured.
PEAK_FLOPS = {
    "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12,
    "H20": 148e12, "B200": 2250e12, "GB200": 2500e12, "B300": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A40": 150e12, "A6000": 155e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def dist_info() -> tuple[int, int]:
    """Return (rank, world_size) of this process: (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_dist_info() -> tuple[int, int]:
    """Return (rank, world_size) among the processes of this node: (0, 1) without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_device(name: str = "") -> torch.device:
    """Choose cuda, mps or cpu, the best first, or the named one; under torchrun its own GPU.

    Raises MissingInput for an unknown or absent device, and for more ranks than GPUs.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present = [kind for kind in there if there[kind]] + ["cpu"]
    if name and name not in present:
        raise MissingInput(f"--device={name} is not on this machine: it has {', '.join(present)}")
    kind = name or present[0]
    if kind != "cuda":
        return torch.device(kind)
    local_rank, count = local_dist_info()[0], torch.cuda.device_count()
    if local_rank >= count:
        raise MissingInput(
            f"local rank {local_rank} has no GPU of its own: start torchrun with "
            f"--nproc_per_node={count} or less, or --device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def measure_matmul(device: torch.device, dtype: torch.dtype, n: int, repeats: int = 40) -> float:
    """Measure the best of `repeats` products of n x n matrices, in FLOP/s."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def card_name(device: torch.device) -> str:
    """Return the key of PEAK_FLOPS that a GPU's name has as a whole word, "" where none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)), "")  # L40: no L4


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the matmul peak in FLOP/s: the maker's bf16 figure, else measured here."""
    if dtype == torch.bfloat16 and (name := card_name(device)):
        return PEAK_FLOPS[name]
    return measure_matmul(device, dtype, 8192 if device.type == "cuda" else 1024)


@functools.cache  # a second timing could choose otherwise on a busy machine
def pick_dtype(device: torch.device, name: str = "") -> torch.dtype:
    """Choose the compute dtype: the named one, else bf16 where it is fast, fp16 where that is.

    On a CPU bf16 is timed beside fp32: without the instructions it is hundreds of times slower (a
    small product is asked first), and where it is little faster the conversions eat the gain; at
    2.2 times fp32's rate training was 1.6 to 1.9 times as fast.
    """
    if name:
        return getattr(torch, name)
    fast = False
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if (7, 0) <= capability < (8, 0):  # V100, T4: tensor cores, but no bf16
            return torch.float16
        fast = capability >= (8, 0)
    elif device.type == "cpu":
        both = (torch.bfloat16, torch.float32)

        def speedup(n: int) -> float:  # in turns: on a busy machine any of them may be slow
            rates = [[measure_matmul(device, dtype, n, 8) for dtype in both] for _ in range(4)]
            bf16, fp32 = map(max, zip(*rates))
            return bf16 / fp32

        fast = any_rank(speedup(192) > 0.01 and speedup(1024) > 1.5, device)
    return torch.bfloat16 if fast else torch.float32


def can_compile(device: torch.device) -> bool:
    """True if torch.compile can work here: Python's headers, a compiler, on a GPU Triton."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if device.type == "cuda":  # a C compiler builds what launches Triton's programs
        compilers = (os.environ.get("CC") or "gcc", "gcc", "clang")
        headers &= torch.cuda.get_device_capability(device) >= (7, 0)  # else too old for Triton
        headers &= importlib.util.find_spec("triton") is not None
    else:
        compilers = (os.environ.get("CXX") or "g++", "g++", "clang++")
    return headers and device.type != "mps" and any(map(shutil.which, compilers))


def compile_or_not(
    choice: str, seconds: float, device: torch.device, say: Callable[[str], None],
    before: bool = False,
) -> bool:  # fmt: skip
    """Decide on torch.compile, and say it: yes, no, or auto where the run earns it back.

    seconds is the run's estimated length without it. Compiling saves a quarter of it or more, and
    costs about a minute, or ten seconds where the same was compiled `before` (docs/choices.md).
    """
    if choice == "no" or (choice == "auto" and seconds < (30 if before else 300)):
        short = f": a run of about {format_duration(seconds)} would not earn it back"
        say(f"compile: off{short if choice == 'auto' else ''}")
        return False
    if not can_compile(device):
        need = "Triton, a C compiler" if device.type == "cuda" else "a C++ compiler"
        say(f"compile: off: it needs {need} and Python's headers (Debian: python3-dev)")
        return False
    say(f"compile: on: the first step takes {'some seconds' if before else 'a minute or so'}")
    return True


def say(text: str) -> None:
    """Print a line on rank 0."""
    if dist_info()[0] == 0:
        print(text, flush=True)


def all_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; alone it is returned as it is."""
    if dist_info()[1] > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """True if it is so on any rank."""
    if dist_info()[1] == 1:  # without waiting for the device
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=device)).item())


# of a container, v2 and v1; what is used there counts files in memory, which give way
CGROUP = "/sys/fs/cgroup"
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
CGROUP_CORES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def own_cores() -> int:
    """Return how many cores this process has: its share, among the ranks, of what it may use."""
    whole = hasattr(os, "sched_getaffinity")
    cores = float(len(os.sched_getaffinity(0)) if whole else os.cpu_count() or 1)
    for names in CGROUP_CORES:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            quota, period = " ".join(Path(CGROUP, x).read_text("utf-8") for x in names).split()
            cores = min(cores, int(quota) / int(period)) if int(quota) > 0 else cores
    return max(1, int(cores / local_dist_info()[1]))


def free_bytes(device: torch.device) -> float:
    """Return the memory that this process may fill: what a GPU has free, a share of a machine's."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if not hasattr(os, "sysconf"):  # Windows does not say
        return math.inf
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            room = min(room, int(Path(CGROUP, name).read_text("utf-8")))
    return room / local_dist_info()[1]


def limit_threads() -> None:
    """Take no more threads than there are cores for: torch does not know a container's quota."""
    if torch.get_num_threads() > own_cores():
        torch.set_num_threads(own_cores())


def out_of_memory(error: RuntimeError) -> bool:
    """True if memory ran out; not all of torch's allocators have a class for it."""
    words = r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))


@dataclass
class Run:
    """One stage at work: its settings, device, ranks and log. Made by start_run."""

    stage: str
    tag: str
    settings: Any
    device: torch.device
    rank: int = 0
    world_size: int = 1
    again: bool = False  # torchrun began it again after a fault
    group: Any = None  # of all ranks, for the thread that saves: collectives of two threads mix
    wandb: Any = None
    num_steps: int = 0
    began: float = field(default_factory=time.time)  # less the seconds before it was resumed
    metrics: dict[str, Any] = field(default_factory=dict)  # the newest of each, the best loss
    validated: bool = False  # at the step that training begins at, before this process
    stopping: bool = False  # the user asked to, or a save failed
    saving: concurrent.futures.Future | None = None  # of a checkpoint that is being written
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def dir(self) -> Path:
        """The folder of this stage's checkpoints."""
        return run_dir(self.tag) / self.stage

    def closing(self, batches: Any) -> Any:
        """Return batches, whose thread reads ahead and will be ended with the run."""
        return self.cleanup.enter_context(contextlib.closing(batches))

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        say(text)

    def log(self, step: int, **values: Any) -> None:
        """Print one event as a line and append its values, unrounded, to metrics.jsonl."""
        if self.device.type == "cuda" and "loss" in values:
            values["memory"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        note(self.metrics, {"step": step, **values})
        if self.rank == 0:
            self.say(format_log(self.stage, step, self.num_steps, values))
            line = {"stage": self.stage, "step": step, "time": time.time(), **values}
            with open(run_dir(self.tag) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log({f"{self.stage}/{k}": v for k, v in {"step": step, **values}.items()})

    def together(self, work: Callable[[], Any]) -> list:
        """Do a part of the work on files on each rank, wait for all, return every rank's result.

        Raises Stop on all ranks where one cannot read or write.
        """
        mine, failed = None, None
        try:
            mine = work()
        except Stop as error:
            failed = error
        except OSError as error:
            failed = Stop(disk_sentence(error))
        everyone: list = [(mine, str(failed or ""))] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, everyone[0], self.group)
        for _, sentence in everyone:
            if failed or sentence:
                raise failed or Stop(sentence)
        return [result for result, _ in everyone]

    def see(self, there: Callable[[], bool], what: str) -> None:
        """Wait until all ranks see what rank 0 wrote: NFS may show it late. Raises MissingInput."""

        def look() -> None:
            patience = time.monotonic() + 60
            while not there():
                if time.monotonic() > patience:
                    raise MissingInput(
                        f"{socket.gethostname()} does not see {what}: NANOCHAT_BASE_DIR must be a "
                        "folder that all nodes share"
                    )
                time.sleep(0.1)

        self.together(look)


def keep_memory() -> None:
    """Have this process keep what memory it frees, in pages of 2 MB, where the system is Linux.

    Each step's tensors would come anew from the system, in pages of 4 KB that it clears first. An
    older glibc than 2.35 does worse with these options than without.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
    libc, version = platform.libc_ver()
    if libc == "glibc" and [int(n) for n in version.split(".")] >= [2, 35]:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


@contextlib.contextmanager
def start_run(stage: str, settings: Any) -> Iterator[Run]:
    """Set up device, ranks, seed and signals for a stage, and clean up after it.

    settings needs `tag`, `device` and `seed`. The first Ctrl-C or SIGTERM, or the end of the
    terminal, sets `run.stopping`, which training_steps obeys on all ranks at once; a second Ctrl-C
    ends at once. A full or read-only disk becomes one sentence. However it ends, a checkpoint
    under way is written first.
    """
    keep_memory()
    use_plain(getattr(settings, "plain", False))
    device, attempt = pick_device(settings.device), 1
    rank, world_size = dist_info()
    limit_threads()
    if world_size > 1:
        if device.type == "cpu":  # torchrun sets one thread a rank; share the cores instead
            torch.set_num_threads(own_cores())
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives its restarts: in it are the addresses of dead ranks. Its own
            # count of restarts differs between nodes: one that follows another's fault counts none
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            agent = dist.TCPStore(host, port, world_size, is_master=False)
            attempt = agree_on_attempt(agent, rank, world_size)
            store = dist.PrefixStore(str(attempt), agent)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)
    run = Run(stage, settings.tag, settings, device, rank, world_size, again=attempt > 1)
    run.group = dist.new_group(backend="gloo") if world_size > 1 else None

    def stop(number: int, frame: Any) -> None:
        if run.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == HANGUP:  # whoever prints to a terminal that is gone gets an error
            for stream in (1, 2):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if rank == 0 and not run.stopping:  # print could be what the signal interrupted
            os.write(1, b"stopping after this step; Ctrl-C again stops at once\n")
        run.stopping = True

    in_main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGINT, signal.SIGTERM] * in_main
    if in_main and HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as nohup has it
        signals.append(HANGUP)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        with one_sentence(stage), alone_at_work(run):
            run.wandb = start_wandb(run)
            try:
                yield run
            finally:
                finish_save(run)
            if run.stopping and stage in STAGES:
                say(f"{stage}: stopped; run the same command again to go on")
    finally:
        run.cleanup.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> int:
    """Return the number of this start of all ranks, in a store that knows of former ones.

    Rank 0 counts; who reads the count too early, of a start whose rank 0 is dead, gets no answer
    and reads it again.
    """
    if rank == 0:
        attempt = store.add("attempt", 1)
        for other in range(1, world_size):
            store.set(f"welcome/{store.get(f'here/{attempt}/{other}').decode()}", "yes")
        return attempt
    me = secrets.token_hex(8)
    while True:
        attempt = store.add("attempt", 0)
        store.set(f"here/{attempt}/{rank}", me)
        with contextlib.suppress(RuntimeError):  # in time, or not
            store.wait([f"welcome/{me}"], timedelta(seconds=1))
            return attempt


@contextlib.contextmanager
def alone_at_work(run: Run) -> Iterator[None]:
    """Keep a second process out of a run's stage while this one trains it; evaluation may share.

    Raises MissingInput where one is at work, or where a rank does not see rank 0's folder. A file
    system without locks is left unguarded, and so is a run that is not there: the stage will say.
    """
    path = run_dir(run.tag) / f".{run.stage}.lock"
    with contextlib.ExitStack() as held:

        def take() -> str:
            if run.rank or not path.parent.is_dir() or run.stage not in STAGES:
                return ""
            file = held.enter_context(open(path, "a", encoding="utf-8"))
            try:
                import fcntl  # Windows has none

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MissingInput(
                    f"another process is training {run.stage} of the run {run.tag!r}: wait for it, "
                    "or give another --tag"
                ) from None
            except (ImportError, OSError):
                pass
            mark = f"{socket.gethostname()} {time.time_ns()}"
            path.write_text(mark, "utf-8")
            return mark

        def is_there() -> bool:
            return not mark or (path.exists() and path.read_text("utf-8") == mark)

        mark = run.together(take)[0]
        run.see(is_there, f"{path} of {mark.split(' ')[0]}")
        yield


def start_wandb(run: Run) -> Any:
    """Begin the wandb run that --run names; None where there is none, or it fails."""
    name = getattr(run.settings, "run", "")
    if not name or run.rank:
        return None
    try:
        import wandb

        return wandb.init(project="nanochat", name=name, config=dataclasses.asdict(run.settings))
    except Exception as error:  # noqa: BLE001  an extra stops no training, whatever ails it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        run.say(f"wandb is left out ({reason}): metrics.jsonl has everything")
        return None


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn Ctrl-C, full memory and a disk's errors into one sentence and a non-zero exit."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the locale cannot read or write
    try:
        yield
    except KeyboardInterrupt:
        raise Stop(f"{what}: stopped; run the same command again to go on") from None
    except RuntimeError as error:  # not in a pass, which would have been halved
        if not out_of_memory(error):
            raise
        raise Stop(
            f"{what}: memory ran out; run the same command again with a smaller "
            "--device-batch-size, or with fewer --slots where it has them"
        ) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its flush at exit
        raise Stop(f"{what}: stopped, as nobody reads any more what it prints") from None
    except OSError as error:
        raise Stop(disk_sentence(error)) from None


def disk_sentence(error: OSError) -> str:
    """Say what a failed read or write means for the user."""
    place = error.filename2 or error.filename or base_dir()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full at {place}: free some space and run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{place} cannot be written: set NANOCHAT_BASE_DIR to a folder of your own"
    what = error.strerror or error
    return f"{place}: {what}; NANOCHAT_BASE_DIR must be a folder that can be written"


# 10. Fast paths ------------------------------------------------------------------------------
#
# The model's products, attention, embeddings and loss ask here first, in a table each: the first
# entry that applies computes it, else the plain form of section 3 does. Three more ways to multiply
# are modules that take the place of Linear and Attention when the engine or the trainer asks. Each
# says what it brings and where that was measured; one test holds each to its plain twin.


@dataclass(frozen=True)
class FastPath:
    """A faster way to compute what a plain form of section 3 does."""

    applies: Callable[..., bool]
    compute: Callable[..., Tensor]
    brings: str


class _Plain:
    on = False


def use_plain(on: bool) -> None:
    """Switch all fast paths off, or on again: for who changes the model, and to compare."""
    _Plain.on = on


def faster(paths: list[FastPath], *inputs: Any) -> Tensor | None:
    """Compute by the first entry of a table that applies, or return None."""
    if not _Plain.on:
        for path in paths:
            if path.applies(*inputs):
                return path.compute(*inputs)
    return None


# Units of a CPU that multiply tiles of bf16 and int8; instructions that add int8 products exactly
AMX = torch.cpu._is_amx_tile_supported()
VNNI = torch.cpu._is_vnni_supported() and not AMX
FEW_ROWS = 64  # as many as the engine's slots
LARGE = 1 << 18  # numbers in the smallest weight for which a call of another kernel pays


def _decodes(x: Tensor) -> bool:
    """True if x, on a CPU, is not trained on."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


# Products ------------------------------------------------------------------------------------


def multiply_row(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply one row in sums that a compiler makes one loop of."""
    y = (weight.float() * stored(x.flatten(0, -2)).float()).sum(-1).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def stored(x: Tensor) -> Tensor:
    """Return x; a compiler then stores it, where it would compute it anew for each use."""
    return x.as_strided(x.shape, x.stride())


def multiply_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply with the weight as the first factor."""
    y = (weight.to(x.dtype) @ x.flatten(0, -2).t()).t()
    if not torch.compiler.is_compiling():
        y = y.contiguous()  # attention is slow on transposed memory
    return y.view(*x.shape[:-1], -1)


LINEAR_PATHS = [
    FastPath(
        lambda x, weight: torch.compiler.is_compiling() and x.numel() == x.size(-1) and _decodes(x)
        and (x.dtype == torch.float32 or (weight.numel() >= LARGE and not AMX)),
        multiply_row, "d12, one stream, bf16: 122 tokens/s for 86 (EPYC)",
    ),
    FastPath(
        lambda x, weight: 1 < x.numel() // x.size(-1) <= FEW_ROWS and _decodes(x),
        multiply_few_rows, "2 to 64 rows in two thirds of the time (EPYC, Xeon)",
    ),
]  # fmt: skip


def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """Multiply x (N, n_in) by a packed weight (n_out, n_in), transposed: (N, n_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def packed_int8_product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Multiply x (N, n_in), of bytes that mean 128 less, by a packed int8 weight: fp32 (N, n_out).

    The sums are exact; scale (n_out,) multiplies them.
    """
    zero = scale.new_zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def sum_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Add each row of x (N, C) to that of the sums (count, C) which rows (N,) names, in order."""
    return torch.ops.aten.embedding_dense_backward(x, rows, count, -1, False)


operators = torch.library.Library("nanochat", "FRAGMENT")  # compiled code calls them as they are
for kernel, schema, compute, shape in (
    ("MkldnnCPU", "packed_product(Tensor x, Tensor packed) -> Tensor", packed_product,
     lambda x, packed: x.new_empty(x.size(0), packed.size(0))),
    ("MkldnnCPU", "packed_int8_product(Tensor x, Tensor packed, Tensor scale) -> Tensor",
     packed_int8_product, lambda x, _, scale: scale.new_empty(x.size(0), scale.size(0))),
    ("CPU", "sum_rows(Tensor x, Tensor rows, int count) -> Tensor", sum_rows,
     lambda x, _, count: x.new_empty(count, x.size(1))),
):  # fmt: skip
    name = operators.define(schema)
    operators.impl(name, compute, kernel)
    torch.library.register_fake(f"nanochat::{name}", shape, lib=operators)


class PackedLinear(Linear):
    """A Linear whose weight lies once more in the blocks that oneDNN reads, for decoding.

    Products of d12 with 16 rows take 26 ms for 45 in fp32, 15 for 23 in bf16 (EPYC).
    """

    def __init__(self, weight: Tensor):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.pack()

    @staticmethod
    def pays(weight: Tensor) -> bool:
        """True if this machine packs such a weight, and its products gain more than a call costs."""
        if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
            return False
        bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        known = weight.dtype == torch.float32 or bf16
        return known and torch.backends.mkldnn.is_available() and weight.numel() >= LARGE

    def pack(self) -> None:
        """Pack the weight, anew when it has changed."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        one = rows.size(0) == 1 and (x.dtype != torch.float32 or torch.compiler.is_compiling())
        if one or _Plain.on:
            return linear(x, self.weight)
        return torch.ops.nanochat.packed_product(rows, self.packed).view(*x.shape[:-1], -1)


class Int8Linear(Linear):
    """A Linear whose weight is rounded to 8 bits, for use without training.

    Rows of x are rounded as well (arXiv:2208.07339): sums of int8 products are exact, and a row's
    result depends on no other. Brings 3 times the rate of fp32 at d12 (Xeon), 6 times (EPYC).
    """

    def __init__(self, weight: Tensor, scale: Tensor):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight, requires_grad=False)  # int8 (n_out, n_in)
        self.scale = scale  # (n_out,): what one step of a row is worth
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.numel() >= 6 * LARGE and VNNI:
            self.packed = torch.ops.onednn.qlinear_prepack(weight, None)

    @classmethod
    @torch.no_grad()
    def rounded(cls, linear: Linear) -> Int8Linear:
        """Round the weight of a product; there is no way back."""
        scale = row_sizes(linear.weight)
        return cls((linear.weight / scale).round().to(torch.int8), scale[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        n, size = rows.size(0), row_sizes(rows)
        small = (rows / size).round()
        loop = n == 1 and torch.compiler.is_compiling() and not AMX  # exact: sums below 2^24
        if loop and self.weight.numel() >= 6 * LARGE and self.weight.size(1) <= 1024:
            y = (self.weight.float() * stored(small)).sum(-1) * self.scale
        elif self.packed is not None and n > 1:
            packed = (small + 128).byte(), self.packed, self.scale
            y = torch.ops.nanochat.packed_int8_product(*packed)
        elif n > FEW_ROWS or (n == 1 and not AMX and not x.is_cuda):
            y = torch._int_mm(small.char(), self.weight.t()) * self.scale
        else:
            if x.is_cuda:
                small = F.pad(small, (0, 0, 0, -n % 8))  # as its kernel asks
            y = torch._int_mm(self.weight, small.char().t())[:, :n].t() * self.scale
        return (y * size).to(x.dtype).contiguous().view(*x.shape[:-1], -1)


def row_sizes(x: Tensor) -> Tensor:
    """Return what one step of 8 bits is worth for each row of x (..., n): fp32 (..., 1)."""
    return x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127


def replace_products(model: nn.Module, make: Callable[[Linear], Linear]) -> None:
    """Put make(product) in the place of each product of a model but the gates."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is Linear and name != "gate":
                setattr(parent, name, make(part))


def quantize(model: GPT) -> GPT:
    """Round the weights of all products but the gates' to 8 bits; there is no way back."""
    replace_products(model, Int8Linear.rounded)
    return model


class JoinedAttention(Attention):
    """An Attention whose queries, keys and values are one product, for decoding."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        parts: tuple[Any, ...] = self.q, self.k, self.v
        self.heads = [part.weight.size(0) // self.head_dim for part in parts]
        weight = torch.cat([part.weight for part in parts])
        self.qkv = Linear(0, 0)
        self.qkv.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(self.q, Int8Linear):
            self.qkv = Int8Linear(weight, torch.cat([part.scale for part in parts]))
        del self.q, self.k, self.v
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _join(_: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Make of a plain model's state this one's."""
        parts = [state.pop(f"{prefix}{name}.weight") for name in "qkv"]
        state[f"{prefix}qkv.weight"] = torch.cat(parts)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        return q, k, v


@torch.no_grad()
def for_decoding(model: GPT) -> GPT:
    """Cast the weights to the dtype of activations, once, and lay them out for decoding."""
    model.to(model.dtype)
    for block in model.blocks.children():
        assert isinstance(block, Block)
        if type(block.attention) is Attention:  # not joined by another engine before
            block.attention = JoinedAttention(block.attention)
    size = sum(weight.nbytes for weight in model.parameters())
    if size <= free_bytes(model.embed.weight.device) / 4:  # memory is no question
        replace_products(
            model,
            lambda part: PackedLinear(part.weight) if PackedLinear.pays(part.weight) else part,
        )
    return model


class Float8Linear(Linear):
    """A Linear that multiplies in 8 bits while training (arXiv:2209.05433): unverified on GPU."""

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if not torch.is_grad_enabled() or rows.size(0) % 16:  # as its kernel asks
            return linear(x, self.weight)
        return Float8Product.apply(rows, self.weight).view(*x.shape[:-1], -1)


class Float8Product(torch.autograd.Function):
    """The product of rows and a weight, each rounded to fp8 with one scale.

    Rows and weight have 4 bits of exponent, gradients have 5 and are summed in fp32. The kernel
    wants its second factor stored by columns, and all sides multiples of 16.
    """

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        """Return x (N, n_in) @ weight.t() (n_in, n_out) in x's dtype."""
        x8, x_scale = to_float8(x, torch.float8_e4m3fn)
        w8, w_scale = to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return torch._scaled_mm(x8, w8.t(), x_scale, w_scale, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, x_scale, w, w_scale = ctx.saved_tensors
        g, g_scale = to_float8(dy, torch.float8_e5m2)
        w, x = w.t().contiguous().t(), x.t().contiguous().t()
        dx = torch._scaled_mm(g, w, g_scale, w_scale, out_dtype=dy.dtype)
        g = g.t().contiguous()
        return dx, torch._scaled_mm(g, x, g_scale, x_scale, out_dtype=torch.float32)


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round x to an 8-bit float; return it and its scale, which brings the largest to the end."""
    top = torch.finfo(dtype).max
    scale = x.float().abs().amax().clamp_min(1e-12) / top
    return (x.float() / scale).clamp(-top, top).to(dtype), scale


def train_in_fp8(model: GPT) -> None:
    """Make the blocks' products in 8 bits while training; gates and head keep the dtype.

    Raises Stop where the device has no such products.
    """
    device = model.embed.weight.device
    cuda = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not cuda and device.type != "cpu":  # a CPU makes them too, to look at
        raise Stop("--fp8 needs an H100 or a newer GPU: leave it out")
    replace_products(
        model.blocks,
        lambda part: Float8Linear(part) if all(n % 16 == 0 for n in part.weight.shape) else part,
    )


# Attention -----------------------------------------------------------------------------------


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Attend, T = 1, in sums that a compiler makes one loop each of."""
    B, _, H, D = q.shape
    q = q.view(B, 1, k.size(2), -1, D).float()  # (B, 1, K, H/K, D)
    scores = (q * k[:, :, :, None]).sum(-1) / math.sqrt(D)  # (B, S, K, H/K)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0, :, None, None], -math.inf)
    y = (scores.softmax(1)[..., None] * v[:, :, :, None]).sum(1)  # (B, K, H/K, D)
    return y.view(B, 1, H, D).to(v.dtype)


def attend_short_row(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Attend, T = S, with the weights stored for the backward pass."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ShortRowAttention.apply(q, k, v).transpose(1, 2)


class ShortRowAttention(torch.autograd.Function):
    """Causal attention, each (B, H, T, D), in products of 128 queries with the keys they may see.

    What lies between the products a compiler makes one loop of, a pass over the scores each way.
    The weights are stored, not yet divided by their sums.
    """

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        parts, saved = [], []
        for start in range(0, q.size(2), 128):
            x = q[:, :, start : start + 128]
            end = start + x.size(2)
            scores = (x @ k[:, :, :end].transpose(2, 3)).float() / math.sqrt(q.size(3))
            at = torch.arange(end, device=q.device, dtype=torch.int32)  # int64 takes twice the time
            scores = scores.masked_fill(at > at[start:, None], -math.inf)
            weights = (scores - scores.amax(-1, keepdim=True)).exp().to(v.dtype)
            total = weights.float().sum(-1, keepdim=True)
            parts.append(((weights @ v[:, :, :end]).float() / total).to(v.dtype))
            saved += [weights, total]
        y = torch.cat(parts, 2)
        ctx.save_for_backward(q, k, v, y, *saved)
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        q, k, v, y, *saved = ctx.saved_tensors
        means = (d_y.float() * y.float()).sum(-1, keepdim=True)  # of each query's d_weights
        d_q, d_k, d_v = [], torch.zeros_like(k).float(), torch.zeros_like(v).float()
        for weights, total in zip(saved[::2], saved[1::2]):
            end = weights.size(3)
            own = slice(end - weights.size(2), end)
            d_out = (d_y[:, :, own].float() / total).to(v.dtype)
            d_weights = (d_out @ v[:, :, :end].transpose(2, 3)).float()
            d_scores = weights.float() * (d_weights - means[:, :, own] / total)
            d_scores = (d_scores / math.sqrt(q.size(3))).to(q.dtype)
            d_q.append(d_scores @ k[:, :, :end])
            later = 0, 0, 0, k.size(2) - end
            d_k = d_k + F.pad((d_scores.transpose(2, 3) @ q[:, :, own]).float(), later)
            d_v = d_v + F.pad((weights.transpose(2, 3) @ d_out).float(), later)
        return torch.cat(d_q, 2), d_k.to(k.dtype), d_v.to(v.dtype)


ATTEND_PATHS = [
    FastPath(
        lambda q, k, v, window, mask: q.size(1) == 1 and _decodes(q)
        and (mask is not None or k.size(1) <= window)
        and (torch.compiler.is_compiling() or (q.dtype == torch.bfloat16 and not AMX)),
        attend_one_query, "d12, bf16, 2,000 keys: 10 ms a step for 22 (Zen 5)",
    ),
    FastPath(
        lambda q, k, v, window, mask: torch.compiler.is_compiling() and q.device.type == "cpu"
        and mask is None and q.shape == k.shape and q.size(1) <= min(512, window),
        attend_short_row, "a layer, forward and backward, T 256, bf16: 7.8 ms for 17.2; T 512: "
        "10.6 for 21.5, in fp32 19.0 for 25.3 (Xeon with AMX)",
    ),
]  # fmt: skip


# Embeddings and loss -------------------------------------------------------------------------


class Lookup(torch.autograd.Function):
    """F.embedding, whose gradient is summed in order: 0.6 ms a table for 3.4 (d4, Xeon).

    A compiler's loop lets threads add where they meet: slower, and each run in another order.
    """

    @staticmethod
    def forward(ctx, weight, ids):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.count = weight.size(0)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_rows):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        flat = d_rows.reshape(-1, d_rows.size(-1))
        return torch.ops.nanochat.sum_rows(flat, ids.reshape(-1), ctx.count), None


EMBEDDING_PATHS = [
    FastPath(
        lambda ids, weight: ids.device.type == "cpu" and weight.requires_grad,
        lambda ids, weight: Lookup.apply(weight, ids),
        "0.6 ms a table for 3.4, and the same gradient each run (d4, compiled, Xeon)",
    )
]


def logits_at_once(device: torch.device, logits: int = 0) -> int:
    """Return how many of the loss's logits are made: 2 M stay in a CPU's cache, 64 M fill a GPU.

    At least a 64th: each chunk adds to the gradient of the whole head.
    """
    return max(1 << (21 if device.type == "cpu" else 26), logits // 64)


class HeadLoss(torch.autograd.Function):
    """Head, softcap and cross-entropy over chunks of positions, with their gradients.

    The (positions, V) logits are never whole in memory, nor computed twice: a chunk's gradients
    follow from its logits at once, so the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, mask, config):  # type: ignore[no-untyped-def]
        """Return the sum of mask x nats of targets (N,) given h (N, C), weight (V, C)."""
        V, W, cap = config.vocab_size, weight.to(h.dtype), config.softcap
        columns = torch.arange(W.size(0), device=h.device)
        real = (columns < V).float()  # padded ids take no probability
        loss, d_weight, d_h = torch.zeros((), device=h.device), torch.zeros_like(weight), []
        chunk = logits_at_once(h.device, len(h) * W.size(0)) // W.size(0) or 1
        for x, t, m in zip(h.split(chunk), targets.split(chunk), mask.split(chunk)):
            t = t.clamp_min(0)[:, None]
            logits = softcap((x @ W.t()).float(), cap)
            # exp cannot overflow on capped logits: no need of a pass for their maximum
            top = 0.0 if cap else logits.amax(-1, keepdim=True)
            e = (logits - top).exp() * real
            total = e.sum(-1, keepdim=True)
            loss = loss + ((total.log() + top - logits.gather(1, t))[:, 0] * m).sum()
            d_logits = (e / total - (columns == t).float()) * m[:, None]
            if cap:
                d_logits = d_logits * (1 - (logits / cap).square())
            d_logits = d_logits.to(x.dtype)
            d_h.append(d_logits @ W)
            d_weight = d_weight + (d_logits.t() @ x).float()
        ctx.save_for_backward(torch.cat(d_h), d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):  # type: ignore[no-untyped-def]
        d_h, d_weight = ctx.saved_tensors
        return d_h * d_loss.to(d_h.dtype), d_weight * d_loss, None, None, None


def chunked_loss(model: GPT, h: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Compute the sum of mask x nats of targets (B, T) given the trunk's output h (B, T, C)."""
    flat = h.flatten(0, 1), model.head.weight, targets.flatten(), mask.flatten()
    return HeadLoss.apply(*flat, model.config)


LOSS_PATHS = [
    FastPath(lambda *_: True, chunked_loss, "a fifth more tokens/s (d4, compiled, Xeon), and of "
             "the logits of 32 rows of d20, 17 GB, a 64th is in memory at once"),
]  # fmt: skip
