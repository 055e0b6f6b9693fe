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
import inspect
import itertools
import json
import math
import operator
import os
import platform
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# 1. Tokenizer and chat format ----------------------------------------------------------------


BOS = "<|bos|>"
SPECIAL_TOKENS = [
    BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip


class Tokenizer:
    """A byte-level BPE vocabulary that tiktoken runs: bytes, then merges, then special tokens.

    merges lists pairs of token ids in order; merge i makes id 256 + i. The special tokens take
    the ids after the last merge and are never made from text.
    """

    def __init__(self, pattern: str, merges: list[tuple[int, int]], info: dict | None = None):
        import tiktoken

        self.pattern, self.merges, self.info = pattern, [tuple(m) for m in merges], info or {}
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
        """Read folder/tokenizer.json. Raises MissingInput where it is absent or damaged."""
        path = folder / "tokenizer.json"
        if not path.exists():
            tags = sorted(p.parent.parent.name for p in run_dir("").glob("*/tokenizer/*.json"))
            have = f" (tags with one: {', '.join(tags)})" if tags else ""
            raise MissingInput(
                f"{path} is missing{have}: run `python train_tokenizer.py "
                f"--tag={folder.parent.name}` first"
            )
        try:
            saved = json.loads(path.read_text("utf-8"))
            if saved["special_tokens"] != SPECIAL_TOKENS:
                raise ValueError("its special tokens are not this version's")
            return cls(saved["pattern"], saved["merges"], saved["info"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MissingInput(f"{path} is damaged ({error}): run train_tokenizer.py --restart")

    def save(self, folder: Path) -> None:
        """Write folder/tokenizer.json, readable and complete."""
        head = {"info": self.info, "pattern": self.pattern, "special_tokens": SPECIAL_TOKENS}
        text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "merges": [\n'
        text += ",\n".join(f"  [{a}, {b}]" for a, b in self.merges) + "\n ]\n}\n"
        with written_beside(folder / "tokenizer.json") as beside:
            beside.write_text(text, "utf-8")

    def encode(self, text: str) -> list[int]:
        """Encode text as ordinary tokens, whatever it says: no special token comes of it."""
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:  # tiktoken panics at a million spaces, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
        middle = len(text) // 2
        return self.encode(text[:middle]) + self.encode(text[middle:])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: list[int]) -> str:
        """Decode ids; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(ids, errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode ids to bytes."""
        return self.encoding.decode_bytes(ids)


def _need(path: Path) -> None:
    if not path.exists():
        raise MissingInput(f"{path} is missing: prepare.py makes it (--help says from what)")


def read_conversations(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the conversations, or graded problems, of a .jsonl file that prepare.py made.

    Raises MissingInput where the file is absent or a line is no conversation.
    """
    _need(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                conversation = json.loads(line)
                conversation["messages"][0]["role"]
            except (ValueError, LookupError, TypeError):
                raise MissingInput(
                    f"{path}:{number}: this line is no conversation: run prepare.py again"
                ) from None
            yield conversation


def _pieces(messages: list[dict[str, Any]]) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, special, own): what is encoded, and whether the assistant says it itself."""
    system = ""
    yield BOS, True, False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            system = f"{content}\n\n"
        elif role == "user":
            yield from (("<|user_start|>", True, False), (system + content, False, False))
            yield "<|user_end|>", True, False
            system = ""
        else:
            yield "<|assistant_start|>", True, False
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            for part in parts:
                kind, own = part["type"], part["type"] != "output"
                if kind != "text":
                    yield f"<|{kind}_start|>", True, own
                yield part["text"], False, own
                if kind != "text":
                    yield f"<|{kind}_end|>", True, own
            yield "<|assistant_end|>", True, True


def render_conversations(
    tokenizer: Tokenizer, conversations: list[list[dict[str, Any]]]
) -> list[tuple[list[int], list[int]]]:
    """Turn lists of messages into (ids, mask): mask 1 where the assistant's own tokens are.

    A system message is put before the first user message. The tool's output, which the engine
    forces, is not the assistant's own; its closing token is.
    """
    all_pieces = [list(_pieces(messages)) for messages in conversations]
    texts = [text for pieces in all_pieces for text, special, _ in pieces if not special]
    # threads cost more than the texts of one conversation
    several = len(conversations) > 1
    encoded = iter(tokenizer.encode_batch(texts) if several else map(tokenizer.encode, texts))
    rendered = []
    for pieces in all_pieces:
        ids: list[int] = []
        mask: list[int] = []
        for text, special, own in pieces:
            new = [tokenizer.specials[text]] if special else next(encoded)
            ids += new
            mask += [int(own)] * len(new)
        rendered.append((ids, mask))
    return rendered


def render_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Turn one list of messages into (ids, mask), as render_conversations does."""
    return render_conversations(tokenizer, [messages])[0]


def render_prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """Turn messages, a user's last, into the ids after which the assistant's reply begins."""
    ids, _ = render_conversation(tokenizer, messages)
    return [*ids, tokenizer.specials["<|assistant_start|>"]]


def prompt_room(context: int) -> int:
    """Return how many tokens a prompt may have: a quarter of the context is left to answer."""
    return context - context // 4


def newest_turns(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], context: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Forget the oldest turns until a quarter of the context is left to answer.

    Returns the messages that stay, a leading system message and the last one among them whatever
    their length, and the prompt that they make.
    """
    room, prompt_ids = prompt_room(context), render_prompt(tokenizer, messages)
    if len(prompt_ids) <= room:
        return messages, prompt_ids
    head = int(messages[0]["role"] == "system")
    questions = range(head + (len(messages) - 1 - head) % 2, len(messages), 2)

    def kept(first: int) -> list[dict[str, Any]]:
        return messages[:head] + messages[first:]

    def fits(first: int) -> bool:
        return len(render_prompt(tokenizer, kept(first))) <= room

    # by halves: rendering once for each turn that goes would take seconds of a long conversation
    first = questions[bisect.bisect_left(questions, True, 0, len(questions) - 1, key=fits)]
    return kept(first), render_prompt(tokenizer, kept(first))


THOUSANDS = r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])"  # 1,000
NUMBER = re.compile(
    rf"((?<![\w)\]])\$?[-\u2212]|)\$?({THOUSANDS}|[0-9]+|(?<![0-9])(?=\.[0-9]))(\.[0-9]+)?"
)


def last_number(text: str) -> str:
    """Return the last number in a text as it is compared: $1,234.50 is 1234.5, 10.0 is 10.

    "" if there is none. A minus counts where no word, number or bracket ends: 5-3 ends in 3.
    """
    found = NUMBER.findall(text)
    if not found:
        return ""
    sign, whole, decimals = found[-1]
    number = (whole.replace(",", "").lstrip("0") or "0") + decimals.rstrip("0").rstrip(".")
    return number if not sign or number == "0" else f"-{number}"


def grade(item: dict[str, Any], reply: str) -> bool:
    """Say whether a reply's text is right for a graded item.

    "number": its last number is the answer. "letter": it begins with that letter alone, or its
    last line is one of the `choices` and that letter.
    "text": it has one of `accept` and none of `reject`, as whole words in any case; what is
    rejected but is part of something accepted does not count. "code" is evaluate.py's own.
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
    accepted = [text for text in item["accept"] if _says(reply, text)]
    return bool(accepted) and not any(
        _says(reply, text) and not any(_says(good, text) for good in item["accept"])
        for text in item.get("reject", [])
    )


def _says(text: str, words: str) -> bool:
    """Say whether words occur in text as whole words, whatever the case, spaces, apostrophes.

    What a hyphen ties to is part of the word: c-a-t is not in c-a-t-s, nor twenty in twenty-one.
    """
    text, words = (" ".join(t.casefold().replace("\u2019", "'").split()) for t in (text, words))
    if words not in text:  # most are not, and making patterns took longer than writing the text
        return False
    return re.search(rf"(?<!\w)(?<!\w-){re.escape(words)}(?!-?\w)", text) is not None


# 2. Rows -------------------------------------------------------------------------------------


def pack_rows(
    documents: Iterable[list[int]], T: int, buffer: int = 512, whole: bool = False
) -> Iterator[list[int]]:
    """Pack documents into rows of T + 1 ids, best fit first, losing nothing.

    Each document begins with `<|bos|>`. A row takes the longest waiting document that fits; when
    none does, the longest is cut there and its rest waits, begun with `<|bos|>` again, so every
    row begins with one and every other token is a target exactly once. With `whole` none is cut,
    which asks for at most T + 1 ids each: the row stays shorter, as the last one may anyhow.
    `buffer` documents wait at a time: the choice of a best fit.
    """
    waiting: list[tuple[int, int, list[int]]] = []  # sorted by length, then by arrival
    arrivals = itertools.count()
    incoming = iter(documents)

    def add(ids: list[int]) -> None:
        bisect.insort(waiting, (len(ids), next(arrivals), ids))

    row: list[int] = []
    while True:
        for ids in itertools.islice(incoming, buffer - len(waiting)):
            add(ids)
        if not waiting:
            break
        room = T + 1 - len(row)
        fit = bisect.bisect_left(waiting, (room + 1,))
        if fit:
            row += waiting.pop(fit - 1)[2]
        elif whole:
            assert row, f"a document of {waiting[-1][0]} ids does not fit in a row of {T + 1}"
            yield row
            row = []
        else:
            ids = waiting.pop()[2]
            row += ids[:room]
            add(ids[:1] + ids[max(room, 1) :])
        if len(row) == T + 1:
            yield row
            row = []
    if row:
        yield row


def encode_shard(path: Path, tokenizer: Tokenizer, T: int, out: Path) -> None:
    """Tokenize and pack one parquet shard into the array out (rows, T + 1), beside and renamed.

    The last row is filled up with `<|bos|>`: a `<|bos|>` after a `<|bos|>` is never a target.
    """

    def documents() -> Iterator[list[int]]:
        texts = read_texts(path)
        while chunk := list(itertools.islice(texts, 1024)):
            for ids in tokenizer.encode_batch(chunk):
                if ids:
                    yield [tokenizer.bos, *ids]

    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    write_rows(pack_rows(documents(), T), T, tokenizer.bos, dtype, out)


def write_rows(rows: Iterable[list[int]], T: int, bos: int, dtype: Any, out: Path) -> None:
    """Write rows of at most T + 1 ids as an array, filled up with bos, beside and renamed."""
    arrays = [np.array(row + [bos] * (T + 1 - len(row)), dtype) for row in rows]
    with written_beside(out) as beside, open(beside, "wb") as file:
        plain: Any = SimpleNamespace(write=file.write)  # numpy's own way may miss a full disk
        np.save(plain, np.stack(arrays) if arrays else np.zeros((0, T + 1), dtype))


NO_TARGET = 1 << 30  # added to an id of a conversation's row that must not be learned


def cut_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], limit: int
) -> list[dict[str, Any]]:
    """Drop turns from the end until the messages have at most `limit` ids; [] if none is left."""
    while messages and len(render_conversation(tokenizer, messages)[0]) > limit:
        messages = messages[:-2] if messages[-1]["role"] == "assistant" else messages[:-1]
    return messages if any(m["role"] == "assistant" for m in messages) else []


@dataclass
class Mixed:
    """What became of the conversations of a file: rows of one kind and tokens, counted."""

    used: dict[str, int] = field(default_factory=dict)  # conversations by kind
    cut: int = 0  # too long for the context: their last turns are left out
    left_out: int = 0  # too long even in their first turn


def conversation_rows(
    path: Path, tokenizer: Tokenizer, T: int, run: Run, learn_all: bool = False, some: bool = False
) -> tuple[Rows, Mixed]:
    """Pack the conversations of a .jsonl file whole into rows, and count them by kind.

    Targets are the assistant's own tokens, or with learn_all those of users
    too (never what the tool says). The rows are cached below data/SOURCE/tokens/.
    Raises MissingInput where there must be some rows and there are none.
    """
    _need(path)
    learned = "all" if learn_all else "own"
    makers = (_conversation_ids, render_conversations, render_conversation, cut_conversation)
    folder = rows_folder(path.parent, tokenizer, T, *makers)
    out = folder / f"{path.stem}-{learned}-{path.stat().st_size}-{crc32(path):08x}.npy"
    counts = out.with_suffix(".json")

    def make(maker: bool) -> None:
        if maker and not (out.exists() and counts.exists()):
            mixed = Mixed()
            documents = _conversation_ids(path, tokenizer, T, learn_all, mixed)
            rows = pack_rows(documents, T, whole=True)
            write_rows(rows, T, tokenizer.bos + NO_TARGET, np.int32, out)
            write_json(counts, dataclasses.asdict(mixed))

    run.together(lambda: make(run.rank == 0))
    run.together(lambda: make(local_dist_info()[0] == 0))  # on other nodes' disks
    rows, mixed = Rows([out], tokenizer.bos), Mixed(**json.loads(counts.read_text("utf-8")))
    if some and not len(rows):
        raise MissingInput(
            f"none of the {mixed.left_out:,} conversations of {path} fits in {T} tokens: pretrain "
            "with a larger --max-seq-len"
        )
    return rows, mixed


def _conversation_ids(
    path: Path, tokenizer: Tokenizer, T: int, learn_all: bool, mixed: Mixed
) -> Iterator[list[int]]:
    conversations = read_conversations(path)
    while chunk := list(itertools.islice(conversations, 1024)):
        rendered = render_conversations(tokenizer, [one["messages"] for one in chunk])
        for conversation, (ids, mask) in zip(chunk, rendered):
            if len(ids) > T + 1:
                shorter = cut_conversation(tokenizer, conversation["messages"], T + 1)
                mixed.cut += bool(shorter)
                mixed.left_out += not shorter
                if not shorter:
                    continue
                ids, mask = render_conversation(tokenizer, shorter)
            kind = conversation.get("kind", "own")
            mixed.used[kind] = mixed.used.get(kind, 0) + 1
            output = False
            flagged = []
            for i, own in zip(ids, mask):
                output |= i == tokenizer.specials["<|output_start|>"]
                learned = own or (learn_all and not output and i != tokenizer.bos)
                flagged.append(i if learned else i + NO_TARGET)
                output &= i != tokenizer.specials["<|output_end|>"]
            yield flagged


class Rows:
    """The packed rows of one or more shards, in the order of their files, memory-mapped."""

    def __init__(self, paths: list[Path], bos: int):
        self.bos = bos
        self.names = [f"{path.parent.name}/{path.name}" for path in paths]  # hold keys of contents
        self.arrays = [np.load(path, mmap_mode="r") for path in paths]
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, index: int) -> np.ndarray:
        """Return one row (T + 1,) as it is stored."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return self.arrays[shard][index - self.ends[shard]]  # counted from the shard's end

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (ids, targets), each (len(indices), T) int64; an index of -1 is an empty row."""
        rows = np.full((len(indices), self.arrays[0].shape[1]), self.bos, np.int64)  # (B, T + 1)
        for i, index in enumerate(indices):
            if index >= 0:
                rows[i] = self.row(int(index))
        ids = torch.from_numpy(rows[:, :-1] % NO_TARGET)
        targets = torch.from_numpy(np.where(rows[:, 1:] >= NO_TARGET, IGNORE, rows[:, 1:]))
        targets[(ids == self.bos) & (targets == self.bos)] = IGNORE
        return ids, targets

    def joined(self, other: Rows, count: int) -> Rows:
        """Return these rows and, spread evenly over them, `count` of another's, as one."""
        picked = np.linspace(0, len(other), count, endpoint=False).astype(np.int64)
        both = copy.copy(self)
        both.names = self.names + other.names
        both.arrays = [*self.arrays, np.stack([other.row(int(i)) for i in picked])]
        both.ends = np.cumsum([len(array) for array in both.arrays])
        return both


def rows_folder(folder: Path, tokenizer: Tokenizer, T: int, *makers: Any) -> Path:
    """Return where rows are kept: a folder for each tokenizer, T and code, which may change."""
    code = "".join(map(inspect.getsource, [*makers, pack_rows, write_rows]))
    return folder / "tokens" / f"{tokenizer.fingerprint}-{T}-{zlib.crc32(code.encode()):08x}"


def token_rows(source: str, tokenizer: Tokenizer, T: int, needed: int, run: Run) -> Rows:
    """Open the packed rows of as many train shards as hold `needed` rows, or of all there are.

    Shards without a cached array for this tokenizer and T are encoded first, shared out over the
    ranks, or over those of a node that does not see the others' files; the rows depend on none
    of that. Ends the program after a shard where run.stopping asks for it on any rank.
    """
    rank, world_size = dist_info()
    local_rank, local_size = local_dist_info()
    shards = list_shards(source, "train")
    folder = rows_folder(data_dir(source), tokenizer, T, encode_shard)
    outs: list[Path] = []
    count = 0
    start = time.perf_counter()

    def encode(pairs: list[tuple[Path, Path]]) -> bool:
        for path, out in pairs:
            if not out.exists():
                run.say(f"tokenizing {path.name} ({len(outs) + 1} of at most {len(shards)} shards)")
                encode_shard(path, tokenizer, T, out)
                run.say(f"tokenized in {format_duration(time.perf_counter() - start)}")
        return run.stopping

    for first in range(0, len(shards), world_size):
        paths = shards[first : first + world_size]
        wave = [(path, folder / f"{path.stem}-{_file_key(path)}.npy") for path in paths]
        # each its own, then what was made on another node's disk
        for mine in (wave[rank : rank + 1], wave[local_rank::local_size]):
            if any(run.together(functools.partial(encode, mine))):
                run.say(f"{run.stage}: stopped while tokenizing; run the same command again")
                raise SystemExit(0)
        for _, out in wave:
            while not out.exists():  # NFS may still know how it was before
                time.sleep(0.1)
            outs.append(out)
            count += len(np.load(out, mmap_mode="r"))
            if count >= needed:
                return Rows(outs, tokenizer.bos)
    if not count:
        raise MissingInput(f"data source {source} holds no text: run prepare.py again")
    return Rows(outs, tokenizer.bos)


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
    """Return which of `count` comes at a position, shuffled anew each epoch by the seed."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


def row_batches(
    rows: Rows, batch_rows: int, micro_batch: int, seed: int, start: int, device: torch.device,
    total: int = sys.maxsize,
) -> Iterator[Batch]:  # fmt: skip
    """Yield this rank's micro-batches from step `start` on, without end, made ahead of use.

    A step takes batch_rows rows over all ranks, in `accum_steps` micro-batches a rank; rows are
    shuffled anew each epoch by the seed. Where the division leaves a remainder, empty rows fill
    it, so that a step's rows depend on neither ranks nor micro-batch; so they do after `total`
    rows, where a run ends with its last epoch and not with a whole batch.
    """
    rank, world_size = dist_info()
    accum = accum_steps(batch_rows, micro_batch)

    def make() -> Iterator[Batch]:
        for step in itertools.count(start):
            for i in range(accum):
                first = (i * world_size + rank) * micro_batch
                last = min(first + micro_batch, batch_rows)
                indices = np.full(micro_batch, -1)
                for j in range(first, last):
                    position = step * batch_rows + j
                    if position < total:
                        indices[j - first] = shuffled(position, len(rows), seed)
                ids, targets = rows.gather(indices)
                if device.type == "cuda":
                    ids, targets = ids.pin_memory(), targets.pin_memory()
                count = int((targets != IGNORE).sum())
                move = functools.partial(Tensor.to, device=device, non_blocking=True)
                yield Batch(move(ids), move(targets), count)

    return prefetch(make(), 2 * accum)


def batch_parts(batch: Any, rows: int) -> Iterator[Any]:
    """Cut a micro-batch in parts of at most `rows` rows; its count of targets stays the whole's."""
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
    for first in range(0, len(batch.ids), rows):
        part = {k: v[first : first + rows] for k, v in tensors.items()}
        yield dataclasses.replace(batch, **part)


def accum_steps(batch_rows: int, micro_batch: int) -> int:
    """Return how many micro-batches a rank runs for its share of a step's rows."""
    return -(-batch_rows // (micro_batch * dist_info()[1]))


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Run an iterator in a thread, `depth` items ahead; its exceptions are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    done = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not done.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001  it goes to the reader, whatever it is
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        done.set()
        thread.join()  # a thread inside torch while the interpreter ends would abort the process


# 3. GPT --------------------------------------------------------------------------------------


IGNORE = -1  # a target that has no loss


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; everything else about it follows."""

    vocab_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    max_seq_len: int
    window_pattern: str = "L"  # one letter a layer, repeated: L whole context, S a quarter of it
    rope_base: float = 100_000.0
    softcap: float = 15.0
    qk_scale: float = 1.2  # factor on normalised queries and keys each: sharper attention
    smear: bool = True  # each position's input has a linear part of the token before
    value_embeds: bool = True  # every other layer's values have a part of the token alone
    skip: bool = True  # every block's input has a part of the first one
    bigram_rows: int = 0  # of a table that embeds a token with the one before it; 0: none

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
        return -(-self.vocab_size // 64) * 64  # matmuls run faster on multiples of 64

    def window(self, layer: int) -> int:
        """Return how many positions, itself included, a query of this layer sees."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        whole = letter == "L" or layer == self.n_layer - 1  # the last layer always sees all
        return self.max_seq_len if whole else max(1, self.max_seq_len // 4)

    @property
    def gate_channels(self) -> int:
        """Return how many channels of a block's input say what the value embeddings weigh."""
        return min(32, self.n_embd)

    @property
    def value_layers(self) -> range:
        """Return the layers that have value embeddings: every other one, the last among them."""
        return range((self.n_layer - 1) % 2, self.n_layer * self.value_embeds, 2)

    def matrix_params(self) -> int:
        """Count the weights in products of every token: the blocks' and the smear's."""
        attention = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        blocks = self.n_layer * (attention + 8 * self.n_embd**2)
        gates = len(self.value_layers) * self.n_kv_head * self.gate_channels
        return blocks + gates + self.smear * self.n_embd**2

    def scaling_params(self) -> int:
        """Count the weights that ask for more text: all but the tables beside the embedding."""
        scalars = 2 * self.n_layer * self.skip
        return self.matrix_params() + 2 * self.padded_vocab_size * self.n_embd + scalars

    def num_params(self) -> int:
        """Count all weights."""
        width = len(self.value_layers) * self.n_kv_head * self.head_dim
        tables = self.padded_vocab_size * width + self.bigram_rows * self.n_embd
        return self.scaling_params() + tables

    def flops_per_token(self, seq_len: int = 0) -> float:
        """Count the FLOPs that train on one token: 6 a weight in a product, and attention.

        Attention is counted causal, 12 x n_embd a pair of positions forward and backward.
        """
        T = seq_len or self.max_seq_len
        weights = self.matrix_params() + self.padded_vocab_size * self.n_embd
        seen = 0.0  # keys that a query sees, mean over positions, summed over layers
        for layer in range(self.n_layer):
            w = min(self.window(layer), T)
            seen += (w * (w + 1) / 2 + (T - w) * w) / T
        return 6 * weights + 12 * self.n_embd * seen

    def cache_bytes(self, item: int) -> int:
        """Count the bytes that one slot of the engine keeps, `item` a number."""
        positions = sum(KVCache.slots_of(self, self.window(i)) for i in range(self.n_layer))
        return 2 * positions * self.n_kv_head * self.head_dim * item


class Linear(nn.Module):
    """A product without bias whose fp32 weight is cast to the input's dtype.

    Unlike nn.Linear it fills nothing when built: GPT.init_weights does, and filling on the meta
    device would import the compiler, three seconds in every command.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.scale: Tensor | None = None  # of the rows of a weight rounded to int8
        self.packed: Tensor | None = None  # the weight once more, as the library lays it out
        self.fp8 = False  # products are made in 8 bits while training

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            rows = x.flatten(0, -2)
            if rows.size(0) % 16 == 0:  # as its kernel asks
                return Float8Product.apply(rows, self.weight).view(*x.shape[:-1], -1)
        return product(x, self.weight, self.scale, self.packed)

    @torch.no_grad()
    def quantize(self) -> None:
        """Round each row of the weight to 8 bits; there is no way back."""
        self.scale = row_sizes(self.weight)[:, 0]
        rounded = (self.weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)


class Embedding(Linear):
    """A table of vectors, one a token id."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.device.type == "cpu" and self.weight.requires_grad:
            return Lookup.apply(self.weight, ids)
        return F.embedding(ids, self.weight)


NORM_EPS = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis (arXiv:1910.07467), without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle (RoPE, arXiv:2104.09864).

    x (B, T, H, D), D even; cos and sin (1, T, 1, D/2), same dtype. Returns x's shape.
    """
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


QUERIES = 1024  # that have a mask of their own at once
BY_HEADS = 1 << 14  # scores of a head whose products outweigh what the calls of them cost
STORED = 512  # the longest rows whose attention weights are stored, where that is faster


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None = None,
    in_window: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attend causally: the last query sees the last key, each at most `window` keys back.

    q (B, T, H, D); k and v (B, S, K, D), S >= T, H a multiple of K. Returns (B, T, H, D).
    A mask (B, T, S) says instead which keys each query sees. in_window is what does it for rows
    that are longer than the window: attend_in_blocks unless given.
    """
    T, S = q.size(1), k.size(1)
    if T == 1 and (torch.compiler.is_compiling() or by_parts(q)):
        return attend_once(q, k, v, mask)
    if mask is None and window < T == S:
        return (in_window or attend_in_blocks)(q, k, v, window)
    if mask is None and QUERIES < T < S:  # the mask of all would be T x S
        ends = [min(i + QUERIES, T) for i in range(0, T, QUERIES)]
        parts = zip(q.split(QUERIES, 1), [S - T + end for end in ends])
        return torch.cat([attend(x, k[:, :end], v[:, :end], window) for x, end in parts], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, K, S, D)
    grouped, on_cpu = q.size(1) != k.size(1), q.device.type == "cpu"
    if BY_HEADS < T * S <= QUERIES * S and by_parts(q) and (mask is not None or S <= window):
        y = attend_by_heads(q, k, v, mask)
    elif mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=grouped)
    elif T == 1:  # the caller gives the keys in the window only
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    elif T == S <= STORED and not grouped and on_cpu and torch.compiler.is_compiling():
        y = InProducts.apply(q, k, v)
    elif T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        back = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
        mask = (back >= 0) & (back < window)  # (T, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Causal attention with normalised queries and keys (arXiv:2010.04245).

    Where the layer has them, an embedding of each token joins its value (arXiv:2410.17897),
    weighed by a gate a head between 0 and 2.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.window(layer), config.head_dim
        self.q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd)
        self.qk_scale, self.gate_channels = config.qk_scale, config.gate_channels
        has_values = layer in config.value_layers
        self.gate = Linear(config.gate_channels, config.n_kv_head) if has_values else None
        self.joined: tuple[Tensor, Tensor | None] | None = None
        self.packed: Tensor | None = None  # as in Linear, of what is joined
        self.in_window: Callable[..., Tensor] | None = None  # of attend()

    @torch.no_grad()
    def join(self) -> None:
        """Lay the weights of q, k and v side by side, for one product instead of three."""
        parts = self.q, self.k, self.v
        weight = torch.cat([part.weight for part in parts])
        scales = [part.scale for part in parts if part.scale is not None]
        sizes = [part.weight.size(0) for part in parts]
        for part, rows in zip(parts, weight.split(sizes)):
            part.weight = nn.Parameter(rows, requires_grad=False)
        self.joined = weight, torch.cat(scales) if scales else None

    def forward(
        self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        B, T, _ = x.shape
        if self.joined is None:
            q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q, self.k, self.v))
        else:
            sizes = [part.weight.size(0) // self.head_dim for part in (self.q, self.k, self.v)]
            joined = product(x, *self.joined, self.packed).view(B, T, -1, self.head_dim)
            q, k, v = joined.split(sizes, dim=2)
        if self.gate is not None and values is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate_channels]))  # (B, T, K)
            v = v + gate[..., None] * values.view(B, T, -1, self.head_dim)
        q, k = (rms_norm(rotate(x, cos, sin)) * self.qk_scale for x in (q, k))
        mask = None
        if past is not None:
            k, v, mask = past.append(self.layer, self.window, k, v)
        return self.out(attend(q, k, v, self.window, mask, self.in_window).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())  # ReLU squared, arXiv:2109.08668


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
    """A decoder-only transformer: RoPE, QK-norm, ReLU squared, untied head, no biases.

    Each of the smear, the value embeddings and the skip can be left out by its name in GPTConfig.
    A table of pairs of tokens, found by a hash (arXiv:1709.03933), can be added.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.n_embd, config.padded_vocab_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.cos: Tensor
        self.sin: Tensor
        self.head = Linear(config.n_embd, config.padded_vocab_size)
        self.smear = Linear(config.n_embd, config.n_embd) if config.smear else None
        self.bigrams = Embedding(config.n_embd, config.bigram_rows) if config.bigram_rows else None
        self.value_embeds = nn.ModuleDict({
            str(i): Embedding(config.n_kv_head * config.head_dim, config.padded_vocab_size)
            for i in config.value_layers
        })  # fmt: skip
        if config.skip:  # a block's input is [0] x what came + [1] x the first block's input
            self.mix = nn.Parameter(torch.empty(config.n_layer, 2))
        shape = (1, config.max_seq_len, 1, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.dtype = torch.float32  # of activations; weights stay fp32 while training
        self.recompute = False  # keep only the blocks' inputs for the backward pass

    @classmethod
    def create(cls, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
        """Build a model without touching memory, then allocate and initialise every weight."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device=device)
        model.init_weights()
        return model.computing_in(dtype)

    def computing_in(self, dtype: torch.dtype) -> GPT:
        """Set the dtype of activations, and the kernels that are the fastest for it."""
        self.dtype = dtype
        for part in self.modules():
            if isinstance(part, Attention) and part.window < self.config.max_seq_len:
                part.in_window = window_kernel(self.embed.weight.device, dtype, part.head_dim)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill all weights and buffers; outputs of the blocks start at zero."""
        c = self.config
        bound = math.sqrt(3 / c.n_embd)  # uniform with the deviation of N(0, 1/n_embd)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.head.weight, std=0.001)  # near-uniform first predictions
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(weight)
            elif name.endswith("gate.weight"):
                nn.init.zeros_(weight)  # a gate of one
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
        """Make the rotation tables, in fp32 on the weights' device; no checkpoint holds them."""
        c, device = self.config, self.embed.weight.device
        channel = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32)
        angle = torch.arange(c.max_seq_len, device=device)[:, None] * c.rope_base ** (
            -channel / c.head_dim
        )  # (T, D/2)
        self.cos, self.sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def cast_weights(self) -> GPT:
        """Cast the weights to the activations' dtype, once, for use without training."""
        self.to(self.dtype)
        self.init_rope()  # the rotation tables stay fp32
        for module in self.modules():
            if isinstance(module, Attention):
                module.join()
        self.pack()
        return self

    def pack(self) -> None:
        """Lay the weights out once more where that is faster and memory is no question.

        Whoever changes the weights does it again.
        """
        device = self.embed.weight.device
        if sum(weight.nbytes for weight in self.parameters()) > free_bytes(device) / 4:
            return
        for name, module in self.named_modules():
            if isinstance(module, Attention) and module.joined:
                module.packed = pack(module.joined[0])
            elif type(module) is Linear and not name.endswith((".q", ".k", ".v")):
                module.packed = pack(module.weight)

    def train_in_fp8(self) -> None:
        """Make the blocks' products in 8 bits while training; gates and head keep the dtype.

        Raises Stop where the device has no such products.
        """
        device = self.embed.weight.device
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        cuda = cuda and torch.version.hip is None  # whose 8-bit numbers are others
        if not cuda and device.type != "cpu":  # a CPU makes them too, to look at
            raise Stop("--fp8 needs an H100 or a newer GPU: leave it out")
        for name, module in self.blocks.named_modules():
            if isinstance(module, Linear) and not name.endswith("gate"):
                module.fp8 = all(n % 16 == 0 for n in module.weight.shape)

    def quantize(self) -> GPT:
        """Round the weights of all products but the gates' to 8 bits, for use without training."""
        for name, module in self.named_modules():
            if type(module) is Linear and not name.endswith("gate"):
                module.quantize()
        return self

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, counts: list[int] | None = None
    ) -> Tensor:
        """Compute the last norm's output for ids (B, T); with a cache they continue its rows.

        Of row b the first counts[b] ids are real, the rest is padding. The caller adds to the
        cache's lengths afterwards.
        """
        return self.continued(ids, cache.begin(ids, counts) if cache else None)

    def next_logits(self, ids: Tensor, past: Past) -> Tensor:
        """Return the logits (B, vocab_size) after ids (B, 1): one step of decoding."""
        return self.logits(self.continued(ids, past)[:, -1])

    def continued(self, ids: Tensor, past: Past | None) -> Tensor:
        """Compute what hidden() does, given what the ids need of a cache."""
        if past is None:
            T = ids.size(1)
            assert T <= self.config.max_seq_len, f"position {T} is past the context"
            before = ids[:, :1]
            cos, sin = (x[:, :T].to(self.dtype) for x in (self.cos, self.sin))
        else:
            before = past.before
            cos, sin = (x[0, past.positions].to(self.dtype) for x in (self.cos, self.sin))
        both = torch.cat((before, ids), 1)  # (B, T+1)
        if self.smear is None:
            x = self.embed(ids).to(self.dtype)  # (B, T, C)
        else:  # copying from the context needs to know what came before a token, at once
            embedded = self.embed(both).to(self.dtype)  # (B, T+1, C)
            x = embedded[:, 1:] + self.smear(embedded[:, :-1])
        if self.bigrams is not None:
            pairs = both[:, :-1] * 1_000_003 + ids * 8_191
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (..., vocab_size) of hidden states (..., C), softly capped."""
        logits = softcap(self.head(hidden).float(), self.config.softcap)
        return logits[..., : self.config.vocab_size]

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or with targets the summed loss in nats.

        ids and targets (B, T) int64, a target IGNORE counts nothing; weights (B, T) multiply
        each target's loss.
        """
        hidden = self.hidden(ids)
        if targets is None:
            return self.logits(hidden)
        mask = (targets != IGNORE).float()
        mask = (mask if weights is None else mask * weights).flatten()
        flat = hidden.flatten(0, 1)
        return HeadLoss.apply(flat, self.head.weight, targets.flatten(), mask, self.config)


def logits_at_once(device: torch.device, logits: int = 0) -> int:
    """Return how many of the loss's logits are made: 2 M stay in a CPU's cache, 64 M fill a GPU.

    At least a 64th: each chunk adds to the gradient of the whole head.
    """
    return max(1 << (21 if device.type == "cpu" else 26), logits // 64)


class HeadLoss(torch.autograd.Function):
    """Head, softcap and cross-entropy over chunks of positions, gradients made on the way.

    The (positions, V) logits are never whole in memory, nor computed twice: a chunk's gradients
    follow from its logits at once, so the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, mask, config):  # type: ignore[no-untyped-def]
        """Return the sum of mask x nats of targets (N,) given hidden (N, C), weight (V, C)."""
        V, W = config.vocab_size, weight.to(hidden.dtype)
        columns = torch.arange(W.size(0), device=hidden.device)
        real = (columns < V).float()  # padded ids take no probability
        loss = torch.zeros((), device=hidden.device)
        d_weight = torch.zeros_like(weight)
        d_hidden = []
        chunk = logits_at_once(hidden.device, len(hidden) * W.size(0)) // W.size(0) or 1
        for h, t, m in zip(hidden.split(chunk), targets.split(chunk), mask.split(chunk)):
            cap, t = config.softcap, t.clamp_min(0)[:, None]
            logits = softcap((h @ W.t()).float(), cap)
            # capped logits have no need of their maximum taken off: one pass and one exp less
            top = 0.0 if cap else logits.amax(-1, keepdim=True)
            e = (logits - top).exp() * real
            total = e.sum(-1, keepdim=True)
            loss = loss + ((total.log() + top - logits.gather(1, t))[:, 0] * m).sum()
            d_logits = (e / total - (columns == t).float()) * m[:, None]
            if cap:
                d_logits = d_logits * (1 - (logits / cap).square())
            d_logits = d_logits.to(h.dtype)
            d_hidden.append(d_logits @ W)
            d_weight = d_weight + (d_logits.t() @ h).float()
        ctx.save_for_backward(torch.cat(d_hidden), d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):  # type: ignore[no-untyped-def]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss, None, None, None


@torch.no_grad()
def token_losses(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Compute the nats of each target (B, T) given ids (B, T); 0 where it is IGNORE."""
    hidden = torch.cat(in_fewer_rows(model.hidden, ids, ids.device)).flatten(0, 1)
    flat = targets.flatten()
    chunk = max(1, (1 << 24) // model.config.padded_vocab_size)
    losses = [
        F.cross_entropy(model.logits(h), t, ignore_index=IGNORE, reduction="none")
        for h, t in zip(hidden.split(chunk), flat.split(chunk))
    ]
    return torch.cat(losses).view(targets.shape)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Squash x smoothly into (-cap, cap): cap tanh(x / cap); 0 leaves it (arXiv:2408.00118)."""
    if not cap:
        return x
    if torch.compiler.is_compiling():  # as an exponential, which takes a CPU a third of tanh's time
        return cap - 2 * cap / ((x * (2 / cap)).exp() + 1)
    return cap * torch.tanh(x / cap)


# 4. Optimizer --------------------------------------------------------------------------------


# Coefficients (a, b, c) of the odd polynomials a x + b x^3 + c x^5 that, one after another, take
# every singular value towards 1. Newton-Schulz as in Muon (kellerjordan.github.io/posts/muon):
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
# Polar Express (arXiv:2505.16932): the best polynomial for each of five steps in turn
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
# three of them, best for singular values from 0.01 of the norm up, found by Remez' exchange
SHORT_EXPRESS = [
    (8.09336851255, -23.6204303288, 17.4461517498),
    (3.63658555426, -2.72192674661, 0.536546288327),
    (2.66129998578, -1.97715452188, 0.452616406996),
]


def orthogonalize(g: Tensor, coefficients: list, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 by odd polynomials (arXiv:2502.16982).

    g (..., m, n), any dtype; the products run in `dtype`, which is also returned.
    """
    if dtype == torch.float16:  # whose range begins where small gradients are
        g = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    # Polar Express needs all singular values safely below 1, Newton-Schulz only at most 1
    margin = 1.0 if coefficients is NEWTON_SCHULZ else 1.02
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for a, b, c in coefficients:
        xx = x.mT @ x if tall else x @ x.mT  # the smaller side squared is the cheaper product
        xx = b * xx + c * xx @ xx
        x = a * x + (x @ xx if tall else xx @ x)
    return x


def muon_update(
    p: Tensor, g: Tensor, buf: Tensor, lr: Tensor, momentum: float, weight_decay: float,
    coefficients: list, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Step stacked matrices p (K, m, n) along the orthogonalised Nesterov momentum of g."""
    buf.lerp_(g, 1 - momentum)
    update = orthogonalize(g.lerp(buf, momentum), coefficients, dtype)
    scale = max(1.0, p.size(-2) / p.size(-1)) ** 0.5  # tall matrices move by the same RMS
    p.mul_(1 - lr * weight_decay).sub_(update.to(p.dtype) * (lr * scale))


def adamw_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, t: Tensor,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Step p by AdamW (arXiv:1711.05101); m and v are its moments, t the number of this step."""
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g.square(), 1 - betas[1])
    denominator = (v / (1 - betas[1] ** t)).sqrt() + eps
    p.mul_(1 - lr * weight_decay).sub_(lr / (1 - betas[0] ** t) * m / denominator)


@dataclass
class _Unit:
    """Parameters that one update treats as one array: equal matrices stacked, or one tensor.

    The array is cut along its first axis in `world_size` equal chunks, the last ones padded;
    a rank keeps the state of its chunk alone.
    """

    group: dict[str, Any]
    params: list[nn.Parameter]
    length: int  # of the array's first axis, unpadded
    chunk: int  # of it that a rank owns
    state: dict[str, Tensor] = field(default_factory=dict)

    def join(self, tensors: list[Tensor], chunks: slice) -> Tensor:
        """Stack matrices, flatten the others; cut some chunks out, padded to their full length.

        Tensors that are flattened and need no padding stay where they are.
        """
        cut = slice(chunks.start * self.chunk, chunks.stop * self.chunk)
        if self.group["kind"] == "muon":
            array = torch.stack(tensors[cut] or [torch.zeros_like(tensors[0])])
        else:
            array = tensors[0].reshape(-1)[cut]
        missing = cut.stop - cut.start - len(array)
        return F.pad(array, [0, 0] * (array.dim() - 1) + [0, missing]) if missing else array

    def clear_gradients(self) -> None:
        """Forget the gradients of the parameters."""
        for param in self.params:
            param.grad = None

    def split(self, array: Tensor) -> None:
        """Copy an array of all chunks into the parameters."""
        if self.group["kind"] == "muon":
            for param, value in zip(self.params, array):
                param.copy_(value)
        elif array.data_ptr() != self.params[0].data_ptr():
            self.params[0].view(-1).copy_(array[: self.length])


GROW_AFTER = 2000  # steps, as in torch's own


@dataclass
class LossScaler:
    """Multiplies fp16's loss, so that small gradients do not vanish (arXiv:1710.03740).

    The factor halves when a gradient overflows and doubles after many steps in which none did.
    """

    scale: float = 2.0**16
    steps: int = 0  # since it changed

    def unscale(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the factor and adapt it; say whether any rank's overflowed.

        Raises Stop where no factor helps.
        """
        grads = [p.grad for u in optimizer.units for p in u.params if p.grad is not None]
        finite = True
        if grads:
            torch._foreach_mul_(grads, 1 / self.scale)
            finite = bool(torch.stack(torch._foreach_norm(grads)).isfinite().all())
        overflow = any_rank(not finite, optimizer.units[0].params[0].device)
        self.steps = 0 if overflow else self.steps + 1
        if overflow:
            self.scale /= 2
        elif self.steps == GROW_AFTER:
            self.scale, self.steps = self.scale * 2, 0
        if self.scale < 2**-10:
            raise Stop(
                "gradients overflow fp16 whatever the loss is multiplied by: checkpoints on disk "
                "are untouched; run again with --dtype=float32"
            )
        return overflow


class Optimizer:
    """Muon for matrices and AdamW for the rest, state and work shared out over the ranks.

    groups are dicts: {"kind": "muon", "params", "lr", "momentum", "weight_decay",
    "coefficients"} or {"kind": "adamw", "params", "lr", "betas", "eps", "weight_decay"}.
    Gradients are summed over ranks: a loss divides by the count of the whole step.
    dtype is that of Muon's products; compiled fuses the element-wise work.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, compiled: bool = False):
        self.rank, self.world_size = dist_info()
        self.groups, self.dtype, self.steps = groups, dtype, 0
        self.scaler: LossScaler | None = None  # where the activations are fp16
        self.muon, self.adamw = muon_update, adamw_update
        if compiled:
            self.muon = torch.compile(muon_update, dynamic=False)
            self.adamw = torch.compile(adamw_update, dynamic=False)
        self.units: list[_Unit] = []
        for group in groups:
            if group["kind"] == "muon":
                shapes: dict[torch.Size, list[nn.Parameter]] = {}
                for p in group["params"]:
                    shapes.setdefault(p.shape, []).append(p)
                for params in shapes.values():
                    self._add(group, params, len(params), ("buf",))
            else:
                for p in group["params"]:
                    self._add(group, [p], p.numel(), ("m", "v"))

    def _add(self, group: dict, params: list, length: int, names: tuple[str, ...]) -> None:
        chunk = -(-length // self.world_size)
        shape = (chunk, *params[0].shape) if group["kind"] == "muon" else (chunk,)
        state = {name: torch.zeros(shape, device=params[0].device) for name in names}
        self.units.append(_Unit(group, params, length, chunk, state))

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Update all parameters from their gradients and clear these."""
        self.steps += 1
        many, mine = self.world_size > 1, slice(self.rank, self.rank + 1)
        # all sums are on their way before the first update, and all results before they are awaited
        sums: collections.deque[tuple[Tensor, Any, Tensor]] = collections.deque()
        for unit in self.units:
            # a parameter that no token reached this step has no gradient: it counts as zero
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.params]
            whole = unit.join(grads, slice(0, self.world_size))
            unit.clear_gradients()
            g = torch.empty_like(whole[: unit.chunk]) if many else whole
            work: Any = dist.reduce_scatter_tensor(g, whole, async_op=True) if many else None
            sums.append((g, work, whole))
            del grads, g, whole
        results = []
        for unit in self.units:
            g, work, _ = sums.popleft()
            if many:
                work.wait()
            p = unit.join([p.data for p in unit.params], mine)
            self._update(unit, p, g, lr_scale)
            if many:
                whole = p.new_empty(self.world_size * len(p), *p.shape[1:])
                work = dist.all_gather_into_tensor(whole, p.clone(), async_op=True)
                results.append((unit, whole, work))
            else:
                unit.split(p)
        for unit, whole, work in results:
            work.wait()
            unit.split(whole)

    def _update(self, unit: _Unit, p: Tensor, g: Tensor, lr_scale: float) -> None:
        group, state = unit.group, unit.state
        # as tensors, a rate and a count that change every step do not compile anew; filled, not
        # copied, they do not wait for the device
        lr, t = (torch.full((), x, device=p.device) for x in (group["lr"] * lr_scale, self.steps))
        decay = group["weight_decay"]
        if group["kind"] == "muon":
            coefficients = group["coefficients"]
            self.muon(p, g, state["buf"], lr, group["momentum"], decay, coefficients, self.dtype)
        else:
            betas = group["betas"]
            self.adamw(p, g, state["m"], state["v"], lr, t, betas, group["eps"], decay)

    def clear_gradients(self) -> None:
        """Forget the gradients of all parameters."""
        for unit in self.units:
            unit.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard of the state."""
        state = {"steps": self.steps, "units": [unit.state for unit in self.units]}
        return {**state, "scaler": vars(self.scaler)} if self.scaler else state

    def load_state_dicts(self, shards: list[dict[str, Any]]) -> None:
        """Load the state from the shards of all ranks that saved it, cut anew for these ranks."""
        self.steps = shards[0]["steps"]
        if self.scaler and "scaler" in shards[0]:
            self.scaler = LossScaler(**shards[0]["scaler"])
        for i, unit in enumerate(self.units):
            first, end = self.rank * unit.chunk, min((self.rank + 1) * unit.chunk, unit.length)
            for name, mine in unit.state.items():
                mine.zero_()
                at = 0
                for shard in shards:
                    part = shard["units"][i][name]
                    a, b = max(at, first), min(at + len(part), end)
                    if a < b:
                        mine[a - first : b - first].copy_(part[a - at : b - at])
                    at += len(part)

    def scale_lr(self, factor: float) -> None:
        """Multiply every group's learning rate."""
        for group in self.groups:
            group["lr"] *= factor


ADAMW = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
MIX_LR = 0.02  # of the scalars that mix a block's input
BIGRAM_LR = 0.3  # factor on the embedding's rate for the table of pairs


def rate_scale(config: GPTConfig) -> float:
    """Return the factor on AdamW's rates, which are those of width 768."""
    return (config.n_embd / 768) ** -0.5


def optimizer_groups(
    model: GPT, matrix_lr: float, embed_lr: float, head_lr: float, weight_decay: float,
    muon_steps: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Make the parameter groups of a GPT: Muon for matrices, AdamW for tables, head, scalars.

    The AdamW rates are those of width 768 and fall with the root of the width (muP's direction,
    arXiv:2203.03466). weight_decay is that of the matrices, muon_steps how many polynomials, 3 or
    5, make their updates orthogonal; 0 = 5, or 3 below width 512, where small batches make them
    dear. There momentum is lower too: the small batches of short runs were measured to want less.
    """
    small = model.config.n_embd < 512
    muon_steps = muon_steps or (3 if small else 5)
    polynomials = {3: SHORT_EXPRESS, 5: POLAR_EXPRESS}[muon_steps]
    width = rate_scale(model.config)
    matrices = list(model.blocks.parameters())
    matrices += [] if model.smear is None else [model.smear.weight]
    tables = [model.embed.weight, *model.value_embeds.parameters()]
    groups = [
        {"kind": "muon", "params": matrices, "lr": matrix_lr, "momentum": 0.9 if small else 0.95,
         "weight_decay": weight_decay, "coefficients": polynomials},
        {**ADAMW, "params": tables, "lr": embed_lr * width},
        {**ADAMW, "params": [model.head.weight], "lr": head_lr * width},
    ]  # fmt: skip
    if model.bigrams is not None:
        lr = BIGRAM_LR * embed_lr * width
        groups.append({**ADAMW, "params": [model.bigrams.weight], "lr": lr})
    return groups + ([{**ADAMW, "params": [model.mix], "lr": MIX_LR}] if model.config.skip else [])


# 5. training_steps ---------------------------------------------------------------------------


def schedule(settings: Any, num_steps: int) -> Callable[[int], float]:
    """Return the factor on the rates at a step, by settings warmup, warmdown and final_lr."""
    s = settings
    return lambda step: trapezoid(step, num_steps, s.warmup, s.warmdown, s.final_lr)


def trapezoid(step: int, num_steps: int, warmup: int, warmdown: float, final: float) -> float:
    """Return the learning rate's factor: up over `warmup` steps, flat, down to `final`.

    warmdown is the share of the run in which it falls, linearly.
    """
    down = max(1, round(warmdown * num_steps))
    left = min(1.0, max(0, num_steps - step) / down) if warmdown else 1.0
    return min(1.0, (step + 1) / (warmup + 1)) * (final + (1 - final) * left)


@dataclass
class Step:
    """The state between two updates, as training_steps yields it."""

    step: int  # finished updates
    num_steps: int
    loss: float = math.nan  # of the last update, nats per target
    lr: float = 0.0  # factor of the last update
    tok_per_s: float = 0.0  # of all that goes through the model, learned or not
    left_s: float = math.nan
    data: float = 0.0  # share of the steps' time in which they waited for their rows
    update: float = 0.0  # share that the optimizer took, its exchange with other ranks too
    micro: int = 0  # rows of a forward pass: fewer once memory has run out
    stopping: bool = False  # the user asked to stop: this is the last one yielded

    def due(self, every: int, first: bool = False) -> bool:
        """Say whether an event of every n steps is due: 0 never, else also at the very end.

        With `first` also before the first update of a run.
        """
        if every <= 0 or (self.step == 0 and not first):  # others write never as -1
            return False
        return self.step % every == 0 or self.step == self.num_steps


def fewer_rows(rows: int, device: torch.device) -> int:
    """Return half of the rows, or of an odd number its largest divisor, after memory ran out.

    Raises Stop where there is but one. Called when the error, and all that it holds, is gone.
    """
    if rows == 1:
        raise Stop(
            f"not even one row fits in the memory of {device.type}: free some, pretrain with "
            "--recompute or with a smaller --max-seq-len or --depth"
        )
    gc.collect()
    if device.type in GPUS:
        getattr(torch, device.type).empty_cache()
    return max(n for n in range(1, rows // 2 + 1) if rows % n == 0)  # equal parts


def in_fewer_rows(
    compute: Callable[[Any], Any], rows: Sequence[Any] | Tensor, device: torch.device
) -> list[Any]:
    """Return [compute(rows)], or what it returns for parts of the rows where memory runs out."""
    try:
        return [compute(rows)]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    count = fewer_rows(len(rows), device)
    parts = (rows[i : i + count] for i in range(0, len(rows), count))
    return [found for part in parts for found in in_fewer_rows(compute, part, device)]


def accumulate(
    compute_loss: Callable[[Any], Tensor], batches: Sequence[Any], rows: int, count: Tensor,
    scale: float = 1.0,
) -> Tensor | None:  # fmt: skip
    """Add up the gradients of micro-batches, `rows` rows at a time; return their loss / count.

    The gradients alone are multiplied by scale. None where memory ran out: the gradients are then
    those of a part.
    """
    total = torch.zeros((), device=count.device)
    try:
        for batch in batches:
            for part in batch_parts(batch, rows):
                loss = compute_loss(part) / count
                (loss * scale).backward()
                total += loss.detach()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    return total


def memory_bytes(
    config: GPTConfig, rows: int, item: int, device: torch.device, *, world_size: int = 1,
    recompute: bool = False, slots: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Estimate a device's bytes at the peak of training in passes of `rows` rows, not compiled.

    item is the bytes of an activation. "workspace" is what the backward pass of a block, or the
    update, takes beyond the logits, which are gone by then.
    """
    C, L, N, V = config.n_embd, config.n_layer, rows * config.max_seq_len, config.padded_vocab_size
    matrices, params = config.matrix_params(), config.num_params()
    kv = config.n_kv_head / config.n_head
    norm = 4 if device.type == "cpu" else item  # of the input that a norm keeps: not fused there
    # kept for the backward pass, in bytes a channel and token: what the block's norms got and
    # gave; q and k as their norms got them; q, k, v and what attention gave; the MLP's 4 C
    # before and after the square; what the skip scales
    block = 2 * norm + 2 * item + (1 + kv) * norm + (1 + 2 * kv + 1 + 8 + config.skip) * item
    values = len(config.value_layers) * kv * item  # what the gates scale
    ends = 2 * norm + (1 + config.smear) * item  # first and last norm, smear, the head's input
    kept = (L * (1 + config.skip) * item if recompute else L * block) + values + ends
    casts = item * matrices if item < 4 else 0  # of the weights
    again = N * C * (block - config.skip * item) + casts / L if recompute else 0
    casts = 0 if recompute else casts
    parts = {
        "weights": 4 * params + casts,
        "gradients": 4 * params,
        "optimizer": (4 * matrices + 8 * (params - matrices)) // world_size,
        "activations": int(N * C * kept),
        "logits": 20 * min(N * V, logits_at_once(device, N * V)) + 8 * V * C,
        "cache": slots * config.cache_bytes(item),
    }
    backward = again + 10 * N * C * item + 4 * V * C
    # the largest array is of the attention's matrices: its copy, and what makes it orthogonal
    update = max(
        16 * max(V, config.bigram_rows) * C, (8 + 5 * item) * (4 * L + config.smear) * C * C
    )
    update -= parts["activations"] + casts
    return {**parts, "workspace": max(0, int(max(backward, update)) - parts["logits"])}


def fit_micro_batch(
    config: GPTConfig, most: int, device: torch.device, item: int, recompute: bool
) -> int:
    """Estimate how many rows a forward pass may have on all ranks: `most`, halved until they fit.

    Raises MissingInput where not even one does.
    """
    room = torch.tensor(0.9 * free_bytes(device), device=device)  # the rest: fragments
    ranks = dist_info()[1]
    if ranks > 1:
        dist.all_reduce(room, dist.ReduceOp.MIN)

    def need(rows: int) -> int:
        parts = memory_bytes(config, rows, item, device, world_size=ranks, recompute=recompute)
        return sum(parts.values())

    rows = most
    while rows > 1 and need(rows) > room:
        rows = -(-rows // 2)
    if need(rows) > room:
        raise MissingInput(
            f"a model of depth {config.n_layer} and context {config.max_seq_len} needs about "
            f"{need(1) / 1e9:.1f} GB and {device.type} has {room.item() / 1e9:.1f} GB for it: "
            f"pretrain with {'' if recompute else '--recompute or with '}a smaller --depth or "
            "--max-seq-len"
        )
    return rows


def choose_micro_batch(
    run: Run, config: GPTConfig, saved: dict[str, Any], share: int, most: int, item: int
) -> int:
    """Choose the rows of a forward pass, of the `share` that a rank has in a step.

    When a run goes on they are what they were in the end, so that it is the unbroken one; else
    what --device-batch-size says, or what fits, at most `most`.
    """
    asked = run.settings.device_batch_size
    if "micro_batch" in saved and saved["settings"]["device_batch_size"] == asked:
        return min(share, saved["micro_batch"])
    if not asked:
        asked = fit_micro_batch(config, min(share, most), run.device, item, recomputes(run))
    return min(share, asked)


def recomputes(run: Run) -> bool:
    """Say whether the blocks of a run are computed again in the backward pass."""
    if run.stage == "base":
        return run.settings.recompute
    return read_meta(find_checkpoint(run.tag, "base"))["settings"].get("recompute", False)


def blank_batch(rows: int, config: GPTConfig, device: torch.device) -> Batch:
    """Make a micro-batch of whole rows that say nothing, to try one."""
    ids = torch.zeros(rows, config.max_seq_len, dtype=torch.long, device=device)
    return Batch(ids, ids, ids.numel())


def try_micro_batch(
    rows: int, compute_loss: Callable[[Any], Tensor], optimizer: Optimizer,
    make: Callable[[int], Batch],
) -> int:  # fmt: skip
    """Return rows, halved until a trial of make(rows), and an update's memory, fit on all ranks.

    It takes two passes, the second with the gradients of the first at hand; nothing of the run
    changes. Raises Stop where not even one row fits.
    """
    device = optimizer.units[0].params[0].device
    largest = max(sum(p.numel() for p in unit.params) for unit in optimizer.units)

    def fits() -> bool:
        total = accumulate(compute_loss, [make(rows)] * 2, rows, torch.ones((), device=device))
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(25 * largest, dtype=torch.uint8, device=device)
            return total is not None
        return False

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        while any_rank(not fits(), device):
            optimizer.clear_gradients()
            rows = fewer_rows(rows, device)
            say(f"memory ran out in a trial step: passes of {rows} rows")
    optimizer.clear_gradients()
    return rows


def timestamp(device: torch.device) -> Any:
    """Return a time in seconds, or an event that a GPU reaches when what was launched is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def training_steps(
    batches: Iterator[Any],
    compute_loss: Callable[[Any], Tensor],
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    num_steps: int,
    *,
    accum: int = 1,
    micro: int = 0,
    start: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train from step `start` to num_steps, yielding before each update and after the last.

    compute_loss returns a micro-batch's loss summed over its targets; the update divides by the
    targets of the whole step, over micro-batches and ranks, so a batch without any counts zero.
    Where fp16's gradients overflow the step makes no update.
    Where memory runs out on any rank, all begin the step again in passes of half the rows; micro
    is their number at first, 0 for that of the first batch. stop() on any rank ends all after the
    step. Raises Stop where the loss is not finite or one row does not fit.
    """
    device = optimizer.units[0].params[0].device
    s = Step(start, num_steps, micro=micro, stopping=any_rank(stop(), device))
    times: collections.deque[tuple[float, ...]] = collections.deque(maxlen=20)
    scaler, collecting = optimizer.scaler, gc.isenabled()
    try:
        while True:
            yield s
            if s.step >= num_steps or s.stopping:
                return
            gc.disable()  # ranks would wait for each other's collections
            began = time.perf_counter()
            parts = [next(batches) for _ in range(accum)]
            waited = time.perf_counter() - began
            s.micro = s.micro or len(parts[0].ids)
            counts = [[float(b.num_targets), float(b.ids.numel())] for b in parts]
            count, num_tokens = all_sum(torch.tensor(counts, device=device).sum(0))
            count = count.clamp_min(1)
            scale = scaler.scale if scaler else 1.0
            while True:
                total = accumulate(compute_loss, parts, s.micro, count, scale)
                if not any_rank(total is None, device):
                    break
                optimizer.clear_gradients()
                s.micro = fewer_rows(s.micro, device)
                say(f"memory ran out in step {s.step + 1}: on in passes of {s.micro} rows")
            assert total is not None
            s.lr, first = schedule(s.step), timestamp(device)
            if scaler and scaler.unscale(optimizer):
                optimizer.clear_gradients()
                say(f"fp16 overflowed in step {s.step + 1}: no update, scale {scaler.scale:g}")
            else:
                optimizer.step(s.lr)
            last = timestamp(device)
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
                times.clear()  # the first step compiled and warmed up
            updated = last - first if isinstance(last, float) else first.elapsed_time(last) / 1e3
            times.append((time.perf_counter() - began, num_tokens.item(), waited, updated))
            seconds, tokens, waits, updates = map(sum, zip(*times))
            s.tok_per_s, s.data, s.update = tokens / seconds, waits / seconds, updates / seconds
            s.left_s = seconds / len(times) * (num_steps - s.step)
            if collecting:
                gc.enable()
    finally:
        if collecting:
            gc.enable()


# 6. Engine -----------------------------------------------------------------------------------


class KVCache:
    """The ids, keys and values of positions that were computed, for rows of unequal length.

    A layer with a window keeps the last positions alone: position p lies in slot p % its slots.
    """

    SPARE = 256  # slots beside a window: a prompt that parts from a row so near its end can use it

    def __init__(
        self, config: GPTConfig, rows: int, device: torch.device, dtype: torch.dtype,
        context: int | None = None,
    ):  # fmt: skip
        T = context or config.max_seq_len  # positions a row has room for
        self.windows = [config.window(layer) for layer in range(config.n_layer)]
        self.slots = {w: min(T, self.slots_of(config, w)) for w in self.windows}

        def room() -> list[Tensor]:
            shape = config.n_kv_head, config.head_dim
            sizes = [(rows, self.slots[w], *shape) for w in self.windows]
            return [torch.zeros(size, device=device, dtype=dtype) for size in sizes]

        self.k, self.v = room(), room()  # by layer: (rows, slots, K, D)
        self.ids = torch.zeros(rows, T, device=device, dtype=torch.long)
        self.lengths = [0] * rows  # positions filled
        self.reached = [0] * rows  # positions ever written, those since cut off included

    @classmethod
    def slots_of(cls, config: GPTConfig, window: int) -> int:
        """Return how many positions of a row a layer with this window keeps."""
        return min(config.max_seq_len, window + cls.SPARE)

    def part(self, start: int, end: int) -> KVCache:
        """Return rows start to end; the storage is shared, the lengths are a copy."""
        part = copy.copy(self)
        part.k, part.v = ([x[start:end] for x in xs] for xs in (self.k, self.v))
        part.ids, part.lengths = self.ids[start:end], self.lengths[start:end]
        return part

    def copies(self, rows: list[int]) -> KVCache:
        """Return a cache of its own whose rows continue these, of which one may stand twice."""
        made = copy.copy(self)
        made.k, made.v = ([x[rows] for x in xs] for xs in (self.k, self.v))
        made.ids, made.lengths = self.ids[rows], [self.lengths[row] for row in rows]
        made.reached = [self.reached[row] for row in rows]
        return made

    def holds(self, row: int, n: int) -> bool:
        """Say whether a row still has all that goes on from its first n positions asks for."""
        reached = max(self.reached[row], self.lengths[row])
        lost = reached - n + 1  # slots that later positions may have taken, or padding
        return all(reached < s or lost <= s - w + 1 for w, s in self.slots.items())

    def cut_row(self, row: int, n: int) -> None:
        """Let a row end after its first n positions."""
        self.reached[row] = max(self.reached[row], self.lengths[row]) if n else 0
        self.lengths[row] = n

    def copy_row(self, source: int, target: int, n: int) -> None:
        """Make the first n positions of a row, which holds them, equal to another's."""
        for x in (*self.k, *self.v):
            x[target, :n] = x[source, :n]
        self.ids[target, :n] = self.ids[source, :n]
        self.lengths[target] = n
        self.reached[target] = max(self.reached[source], self.lengths[source])

    def swap_rows(self, a: int, b: int) -> None:
        """Let two rows change places."""
        n = max(self.lengths[a], self.lengths[b])
        for x in (*self.k, *self.v, self.ids):  # by slices: a GPU waits for a list of indices
            kept = x[a, :n].clone()
            x[a, :n] = x[b, :n]
            x[b, :n] = kept
        for xs in (self.lengths, self.reached):
            xs[a], xs[b] = xs[b], xs[a]

    def begin(self, ids: Tensor, counts: list[int] | None = None) -> Past:
        """Prepare to append ids (B, T) to the rows; of row b the first counts[b], or all, count."""
        (B, T), device, context = ids.shape, self.ids.device, self.ids.size(1)
        low, high = min(self.lengths), max(self.lengths)
        assert high + T <= context, f"cache of {context} positions cannot hold {high + T}"
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        alike = low == high and (T > 1 or B == 1)  # steps of many have one form, for a compiler
        return self.past(ids, lengths, counts, high, alike)

    def past(
        self, ids: Tensor, lengths: Tensor, counts: list[int] | None, high: int, alike: bool
    ) -> Past:
        """Do what begin() does with the lengths (B, 1) on the device, none of them above `high`.

        `alike` says that they are equal.
        """
        T, device, context = ids.size(1), ids.device, self.ids.size(1)
        positions = lengths + torch.arange(T, device=device)  # (B, T)
        self.ids.scatter_(1, positions, ids)
        before = self.ids.gather(1, (lengths - 1).clamp_min(0))
        seen = {}
        for window, slots in self.slots.items():
            slot = torch.arange(min(slots, high + T), device=device)  # those in use
            if T == 1 or window >= context:  # the new ones are stored, then all are read
                mask = None
                if window < context or not alike:
                    back = (positions[:, :, None] - slot) % slots
                    mask = back < (positions + 1).clamp_max(window)[:, :, None]  # (B, T, slots)
                seen[window] = Seen(positions % slots, mask)
                continue
            # more than one new position could overwrite what another still sees
            old = lengths - 1 - torch.arange(min(window - 1, high), device=device)  # positions
            keys = torch.cat((old, positions), 1)[:, None]
            back = positions[:, :, None] - keys
            mask = (back >= 0) & (back < window) & (keys >= 0) if high else None
            # the last that counts of the positions that share a slot; what is older stays
            ends = lengths + (T if counts is None else torch.tensor(counts, device=device)[:, None])
            last = ends - 1 - (ends - 1 - slot) % slots
            source = torch.where(last >= lengths, last - lengths, -1)
            seen[window] = Seen(source, mask, old.clamp_min(0) % slots)
        used = [slice(min(self.slots[window], high + T)) for window in self.windows]
        k, v = ([x[:, part] for x, part in zip(xs, used)] for xs in (self.k, self.v))
        return Past(positions, before, k, v, seen)


@dataclass
class Seen:
    """How the layers of one window meet the cache."""

    at: Tensor  # (B, T): the slot of each new position; with `old` (B, slots): the new one of each
    mask: Tensor | None  # (B, T, keys): what each new position sees; None where attend() knows
    old: Tensor | None = None  # (B, n): slots of the keys that new ones see beside one another


@dataclass
class Past:
    """What T new tokens of B rows need of a cache."""

    positions: Tensor  # (B, T)
    before: Tensor  # (B, 1): the id before them; a row's first id counts as the one before itself
    k: list[Tensor]  # by layer: (B, slots, K, D), the slots in use
    v: list[Tensor]
    seen: dict[int, Seen]  # by the width of a layer's window

    def append(
        self, layer: int, window: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k and v (B, T, K, D) of a layer; return what may be seen, and the mask."""
        seen = self.seen[window]
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        whole = []
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            if seen.old is None:
                kept[rows, seen.at] = new.detach()
                whole.append(kept)
            else:
                whole.append(torch.cat((kept[rows, seen.old], new), 1))
                fresh = (seen.at >= 0)[..., None, None]
                kept.copy_(torch.where(fresh, new.detach()[rows, seen.at.clamp_min(0)], kept))
        return whole[0], whole[1], seen.mask


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
    top_p: float = 1.0  # 1 is off
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature {self.temperature} must be 0 or more")
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError("top_p must be in (0, 1], top_k 0 or more, max_tokens 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")


COLDEST = 1e-5  # a lower temperature is this one: in fp32 it would come to 0, and its logits to NaN


def to_device(values: list, device: torch.device) -> Tensor:
    """Copy numbers to a device, without waiting for what it is at."""
    cuda = device.type == "cuda"
    return torch.tensor(values, pin_memory=cuda).to(device, non_blocking=cuda)


def sample(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> list[int]:
    """Choose an id from each row of logits (B, V) by its own settings and uniform number.

    Temperature, then the k likeliest, then those of total probability p (arXiv:1904.09751), then
    the first whose cumulated weight passes the number; of equal logits the lower id comes first.
    A row's choice depends on no other. A GPU is waited for once, for the ids.
    """
    chosen, V = logits.argmax(-1), logits.size(-1)
    for filtered in (False, True):
        rows = [i for i, s in enumerate(samplings)
                if s.temperature and (s.top_k > 0 or s.top_p < 1) == filtered]  # fmt: skip
        if not rows:
            continue
        mine = [samplings[i] for i in rows]
        columns = [[max(s.temperature, COLDEST) for s in mine], [s.top_k or V for s in mine],
                   [s.top_p for s in mine], [uniforms[i] for i in rows]]  # fmt: skip
        whole = len(rows) == len(samplings)
        index = None if whole else to_device(rows, logits.device)
        temperatures, ks, ps, us = to_device(columns, logits.device)[..., None]
        z = (logits if index is None else logits[index]).float() / temperatures
        top = z
        if filtered:  # the largest values are the same, however many are taken; their ids are not
            k = max(min(s.top_k or V, V) for s in mine)
            top = z.topk(k).values if k < V else z.sort(descending=True).values
            top = top.masked_fill(torch.arange(k, device=z.device) >= ks, -math.inf)
        # unlike softmax's, these sums grow from the left: what other rows' k adds leaves them be
        weights = (top - top.amax(-1, keepdim=True)).exp()
        sums = weights.cumsum(-1)
        if filtered:  # the first is always kept
            sums = weights.masked_fill(sums - weights >= sums[:, -1:] * ps, 0).cumsum(-1)
        total = sums[:, -1:].contiguous()
        picked = torch.searchsorted(sums, total * us, right=True)
        # rounding may pass the end: the first sum that is the whole ends on an id that counts
        picked = torch.minimum(picked, torch.searchsorted(sums, total))
        if filtered:  # from the place in the order to the id: the n-th of those with this value
            value = top.gather(1, picked)
            n = picked - (top > value).sum(-1, keepdim=True)
            same = z == value
            picked = (same & (same.cumsum(-1) > n)).int().argmax(-1, keepdim=True)
        chosen = picked[:, 0] if index is None else chosen.index_copy(0, index, picked[:, 0])
    return chosen.tolist()


@dataclass(frozen=True)
class Request:
    """A prompt to go on from, and how; with `tool` the calculator answers its calls.

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
    reply: Reply = field(default_factory=Reply)
    row: int = -1  # of the cache, while decoding
    reused: int = 0  # tokens of the prompt that were found computed
    call: list[int] | None = None  # the expression being written
    asked: str | None = None  # the expression whose value comes next
    forced: collections.deque[int] = field(default_factory=collections.deque)
    tail: bytes | None = b""  # of the text, as long as a stop string may be; None in a call


@dataclass(eq=False)
class _Prompt:
    """A prompt that is being computed, for one job or more of the same prompt."""

    ids: list[int]
    jobs: list[Job]
    row: int


@dataclass
class _Row:
    """What a row of the cache holds, and who works in it."""

    ids: list[int] = field(default_factory=list)
    owner: Job | _Prompt | None = None
    left: int = -1  # the step in which its last owner left


MANY_TOKENS = 1_000_000  # at most to come, so that compiling, 20 to 45 seconds, is earned back
SMALLEST_BUDGET = 128  # tokens of prompts that are computed at once


class Engine:
    """Generates for many requests at once; they join and leave between steps.

    The weights are cast once to the compute dtype. Rows of the cache: first those of jobs that
    decode, last those of prompts that are being computed, and between them what former jobs left,
    which a prompt that begins alike goes on from. Equal prompts are computed once. While others
    decode, a long prompt is computed in chunks between their steps.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int = 64, chunk: int = 512):
        self.model, self.tokenizer, self.chunk = model.cast_weights(), tokenizer, chunk
        self.device, self.budget = model.embed.weight.device, 16384
        slot_bytes = model.config.cache_bytes(model.dtype.itemsize)
        while slots > 1 and slots * slot_bytes > free_bytes(self.device) / 2:
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
        self.next_logits: Callable[[Tensor, Past], Tensor] | None = None
        cuda = self.device.type == "cuda"
        self.graphs: dict[tuple[int, int], tuple] | None = {} if cuda else None
        self.pool = torch.cuda.graph_pool_handle() if cuda else None

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile the step, for one row and for many of any length: it takes a minute, once.

        What a compiler, or the lack of one, raises is passed on; the engine works without.
        """

        def checked(guards: Sequence[Any]) -> list[bool]:
            return [not isinstance(guard.value, nn.Parameter) for guard in guards]

        # what the parameters are follows from the rest: to check each would take its time
        step = torch.compile(self.model.next_logits, options={"guard_filter_fn": checked})
        mark = torch._dynamo.maybe_mark_dynamic
        # as long as no layer's slots are full all have equally many, then not: another program
        full = {s + 8 for s in self.cache.slots.values() if s + 8 < self.model.config.max_seq_len}
        for n, start in itertools.product((1, 2, FEW_ROWS + 1), (8, *full)):
            if n > len(self.rows):
                break
            rows = self.cache.part(0, n)
            rows.lengths = [start - i % 8 for i in range(n)]
            ids = torch.zeros(n, 1, dtype=torch.long, device=self.device)
            past = rows.begin(ids)
            seen = past.seen.values()
            for one in (ids, past.positions, past.before, *(one.at for one in seen)):
                mark(one, 0)
            for keys in (*past.k, *past.v):
                mark(keys, (0, 1))
            for mask in [one.mask for one in seen if one.mask is not None]:
                mark(mask, (0, 2))
            step(ids, past)
        self.next_logits = step

    def expect(self, tokens: int) -> None:
        """Prepare to generate up to so many tokens: where it pays, compile the step of a CPU."""
        if tokens < MANY_TOKENS or self.device.type != "cpu" or not can_compile(self.device):
            return
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
        self.model.pack()
        self.clear()  # keys and values of other weights

    def clear(self) -> None:
        """Forget every job and all that the cache holds."""
        self.waiting.clear()
        self.prompts, self.decoding = [], []
        self.rows = [_Row() for _ in self.rows]
        self.cache.lengths = [0] * len(self.rows)
        self.cache.reached = [0] * len(self.rows)

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
        draws = np.random.default_rng(request.sampling.seed)
        uniforms = draws.random(limit if request.sampling.temperature else 0)
        job = Job(request, limit, uniforms.tolist())  # numpy's own would make all fp64
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job at once, whatever it is at; what it has said stays in its reply."""
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
            logits = None if self.graphs is None else self._replay(last_ids)
            if logits is None:
                rows = self.cache.part(0, len(moved))
                ids = torch.tensor(last_ids, device=self.device)[:, None]
                if self.next_logits:
                    logits = self.next_logits(ids, rows.begin(ids))
                else:
                    logits = self.model.logits(self.model.hidden(ids, rows)[:, -1])
            for i, job in enumerate(moved):
                self.cache.lengths[i] += 1
                self.rows[i].ids.append(job.reply.ids[-1])
            self._choose(moved, logits)
        moved += self._prefill()
        self._leave()
        return moved

    def _replay(self, last_ids: list[int]) -> Tensor | None:
        """Compute the logits after the decoding rows' last ids by replaying a recorded step.

        None where none can be recorded, as where memory is full: then and from then on steps are
        plain. One is recorded for each power of two of rows and each GRAPH_KEYS positions. The rows that
        fill up to the power compute on: what they store lies past their ends.
        """
        assert self.graphs is not None
        n, context = len(last_ids), self.model.config.max_seq_len
        rows = min(len(self.rows), 1 << (n - 1).bit_length())
        lengths = self.cache.lengths[:rows]
        assert max(lengths) < context, f"cache of {context} positions is full: {lengths}"
        end = min(context, -(-(max(lengths) + 1) // GRAPH_KEYS) * GRAPH_KEYS)
        if (rows, end) not in self.graphs:
            part = self.cache.part(0, rows)
            fed = torch.zeros(2, rows, 1, dtype=torch.long, device=self.device)  # ids, lengths
            compute = self.next_logits or self.model.next_logits

            def step() -> Tensor:
                return compute(fed[0], part.past(fed[0], fed[1], None, end - 1, False))

            fed[1] = torch.tensor(lengths, device=self.device)[:, None]
            try:
                self.graphs[rows, end] = fed, *record(step, self.device, self.pool)
            except RuntimeError as error:
                warnings.warn(f"decoding is not recorded, so slower: {error}", stacklevel=2)
                self.graphs = None
                return None
        fed, replay, logits = self.graphs[rows, end]
        fed.copy_(to_device([[*last_ids, *[0] * (rows - n)], lengths], self.device)[..., None])
        replay()
        return logits[:n]

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

    def _admit(self) -> None:
        """Give waiting jobs their rows, as many as there are, and what is computed already."""
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
        alike = [n if self.cache.holds(i, n) else 0 for i, n in enumerate(alike)]
        found = max(alike)
        source = alike.index(found)
        if found < 32 or 2 * found < len(prompt.ids):
            found = 0  # a few tokens are sooner computed, with other prompts at once
        taken = min(free, key=lambda row: self.rows[row].left)
        if found and source in free and 2 * found >= len(self.rows[source].ids):
            taken = source  # it is the same conversation
        elif found:
            self.cache.copy_row(source, taken, found)
        self._swap(taken, target)
        self.cache.cut_row(target, found)
        self.rows[target] = _Row(prompt.ids[:found], prompt)
        prompt.row = target
        for job in prompt.jobs:
            job.reused = found

    def _swap(self, a: int, b: int) -> None:
        """Let two rows change places."""
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
            left = len(prompt.ids) - self.cache.lengths[prompt.row]
            width, real = max(width, left), real + left
            if count and (count + 1) * width > min(budget, 2 * real):  # or it is mostly padding
                break
            count += 1
        part = self.prompts[count - 1 :: -1]
        rows = self.cache.part(slots - count, slots)
        todo = [prompt.ids[n:] for prompt, n in zip(part, rows.lengths)]
        width = min(max(map(len, todo)), budget, context - max(rows.lengths))
        todo = [ids[:width] for ids in todo]
        padded = [[*ids, *[0] * (width - len(ids))] for ids in todo]
        counts = list(map(len, todo))
        try:
            hidden = self.model.hidden(torch.tensor(padded, device=self.device), rows, counts)
        except RuntimeError as error:
            if not out_of_memory(error) or self.budget <= SMALLEST_BUDGET:
                raise
            self.budget //= 2
            for prompt in part:  # where windows move on, what was written may have taken its place
                self.cache.cut_row(prompt.row, 0)
                self.rows[prompt.row].ids = []
            return []
        for prompt, ids in zip(part, todo):  # what a padded position holds is never seen
            self.rows[prompt.row].ids += ids
            self.cache.lengths[prompt.row] += len(ids)
        whole = [i for i, p in enumerate(part) if self.cache.lengths[p.row] == len(p.ids)]
        if not whole:
            return []
        ends = [len(todo[i]) - 1 for i in whole]
        logits = self.model.logits(hidden[whole, ends])
        return self._begin([part[i] for i in whole], logits)

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
        for job in jobs:  # while the device is still at the logits
            if job.asked is not None:
                job.forced += t.encode(calculate(job.asked))
                job.forced.append(t.specials["<|output_end|>"])
                job.asked = None
        free = [i for i, job in enumerate(jobs) if not job.forced]
        samplings = [jobs[i].request.sampling for i in free]
        uniforms = [jobs[i].uniforms[len(jobs[i].reply.ids)] if s.temperature else 0.0
                    for i, s in zip(free, samplings)]  # fmt: skip
        logits = logits if len(free) == len(jobs) else logits[free]
        chosen = dict(zip(free, sample(logits, samplings, uniforms))) if free else {}
        for i, job in enumerate(jobs):
            reply = job.reply
            reply.mask.append(int(i in chosen))
            reply.ids.append(chosen[i] if i in chosen else job.forced.popleft())
            said_stop = self._said_stop(job)
            if i in chosen:
                if reply.ids[-1] in self.stops or said_stop:
                    reply.reason = "stop"
                elif job.request.tool:
                    self._follow(job, reply.ids[-1])
            if not reply.reason and len(reply.ids) == job.limit:
                reply.reason = "length"

    def _said_stop(self, job: Job) -> bool:
        """Say whether a job's text now holds one of its stop strings, as ReplyDecoder finds them."""
        stops = [text.encode() for text in job.request.stop]
        last, t = job.reply.ids[-1], self.tokenizer
        if not stops:
            return False
        if last >= 256 + len(t.merges):  # a special token parts one text from the next
            opens = last in (t.specials["<|python_start|>"], t.specials["<|output_start|>"])
            job.tail = None if opens and job.request.tool else b""
        elif job.tail is not None:
            text = job.tail + t.decode_bytes([last])
            job.tail = text[-max(map(len, stops)) :]
            return any(stop in text for stop in stops)
        return False

    def _follow(self, job: Job, chosen: int) -> None:
        """Notice a call of the tool, and at its end force the output, whose text comes a step on."""
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

    def complete(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the pieces of text that continue `text`, each of whole characters.

        A prompt longer than the context keeps its end: half of it, or more where that fits.
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


def common_prefix(a: list[int], b: list[int]) -> int:
    """Count the ids with which both lists begin, by halves, as slices are compared in no time."""
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
    """Join the text parts of a reply: what it says, without the tool's."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


# Runs apart from this program: waits for the program, which alone the limits are laid upon.
SANDBOX_LAUNCHER = """
import json, os, resource, sys
limits, command = json.loads(sys.argv[1])
child = os.fork()
if child == 0:
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
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


@dataclass(frozen=True)
class Outcome:
    """What a generated program did: whether it ran to its end without an error, why, its output."""

    passed: bool
    reason: str
    output: str  # stdout and stderr


def run_code(
    program: str,
    timeout_s: float = 5.0,
    memory_bytes: int = 1 << 29,
    file_bytes: int = 1 << 20,
    way: tuple[list[str], list[str]] | None = None,
) -> Outcome:
    """Run a Python program that a model wrote, and say whether it got to its end.

    It is a process group of its own, with limits on time, CPU time, memory, number of processes
    and the size of its output and of each file, in an empty temporary folder that is removed
    afterwards, with a minimal environment and no stdin; when it ends or its time is up, the
    group is killed. Where Linux permits, it has no network, what it started dies with it even
    outside its group, and root's program runs as nobody; a trial finds the best `way` once.

    What it does not protect from: reading any file that the user may read (for root: that nobody
    or, where Python is root's own, root may read); writing the files of a user who is not root;
    many files filling the disk while it runs; other Unix sockets; flaws of the kernel. Without
    namespaces (macOS, most containers), also not from the network, nor from processes that left
    the group; macOS limits no memory; root where it cannot become nobody, no number of processes.
    For programs that err, not for programs by an enemy: that takes a virtual machine.
    """
    namespaces, user = sandbox_way() if way is None else way
    end = f"end {os.urandom(8).hex()}"
    source = f"{program}\n\n__import__('os').write(1, b'{end}')\n"
    python = [sys.executable, "-I", "-X", "utf8"]
    folder = Path(tempfile.mkdtemp(prefix="nanochat-"))
    try:
        (folder / "work").mkdir()
        (folder / "program.py").write_text(source, "utf-8", errors="replace")
        if os.geteuid() == 0:  # for nobody
            folder.chmod(0o711)
            (folder / "program.py").chmod(0o644)
            (folder / "work").chmod(0o777)
        cpu_s = math.ceil(timeout_s)
        limits = {
            "RLIMIT_CPU": cpu_s, "RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": file_bytes,
            "RLIMIT_NPROC": SANDBOX_PROCESSES, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
        }  # fmt: skip
        command = [*user, *python, str(folder / "program.py")]
        launcher = [*python, "-S", "-c", SANDBOX_LAUNCHER, json.dumps([limits, command])]
        with open(folder / "output", "ab+") as output:
            reason = _run_group([*namespaces, *launcher], folder / "work", output, timeout_s)
            output.seek(0)
            text = output.read(file_bytes).decode("utf-8", "replace")
    finally:
        _remove_tree(folder)
    passed = not reason and end in text
    reason = "passed" if passed else reason or "it stopped before its end"
    return Outcome(passed, reason, text.replace(end, ""))


def _run_group(command: list[str], work: Path, output: Any, timeout_s: float) -> str:
    """Run a command as a process group in `work`, kill what is left of it; "" if it succeeded."""
    environment = {"PATH": os.defpath, "HOME": str(work), "TMPDIR": str(work), "LC_ALL": "C"}
    process = subprocess.Popen(
        command, cwd=work, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=output, stderr=output,
    )  # fmt: skip
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


def _remove_tree(folder: Path) -> None:
    """Remove a folder whatever is in it; processes that are just dying may still add to it."""
    for _ in range(20):
        script = 'chmod -R u+rwx "$0"; rm -rf "$0"'  # takes any depth, unlike shutil.rmtree
        subprocess.run(["sh", "-c", script, str(folder)], check=False, stderr=subprocess.DEVNULL)
        if not folder.exists():
            return
        time.sleep(0.1)


@functools.cache
def sandbox_way() -> tuple[list[str], list[str]]:
    """Find by trial the best commands that may precede a sandboxed Python and its program.

    The first gives it a network and process numbers of its own, the second takes its rights away.
    """
    root = os.geteuid() == 0
    unshare = ["unshare", *([] if root else ["--user"]), "--net", "--pid", "--fork", "--kill-child"]
    nothing = ["setpriv", "--no-new-privs"]
    users = [nothing]
    if root:  # with the right to read anything where Python is in root's home
        nothing += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        read = "-all,+dac_read_search"
        bounds = ("--inh-caps", "--ambient-caps", "--bounding-set")
        users = [[*nothing, *(f"{bound}={caps}" for bound in bounds)] for caps in ("-all", read)]
    same = (sys.version, sys.base_prefix)  # without its rights it might find another Python
    trial = f"import decimal, sys\nassert (sys.version, sys.base_prefix) == {same!r}"
    for way in itertools.product([unshare, []], [*users, []]):
        there = all(shutil.which(command[0]) for command in way if command)
        if there and run_code(trial, way=way).passed:
            return way
    return [], []


# 7. Checkpoints, bits per byte ---------------------------------------------------------------


STAGES = ("base", "mid", "sft", "rl")  # in their order


def list_checkpoints(tag: str, stage: str) -> list[Path]:
    """List a stage's checkpoint folders, oldest first; each is whole (renamed when complete)."""
    found = (run_dir(tag) / stage).glob("step-[0-9]*")
    return sorted(found, key=lambda path: (len(path.name), path.name))  # a million has 7 digits


def save_checkpoint(
    run: Run, step: int, model: GPT, optimizer: Optimizer, meta: dict, keep: int = 2
) -> Path:
    """Copy a checkpoint to host memory, write it in the background, return the folder to be.

    The folder step-001234 is written beside and renamed; then all but the newest `keep` go, none
    with 0. Every rank writes its optimizer shard, rank 0 the weights and meta.json, which records
    each file's size and CRC-32. A step that is on disk is not written again. Waits for the write
    before this one, and raises Stop where that failed.
    """
    run.wait_for_save()
    folder = run.dir / step_name(step)
    if folder.exists():
        return folder
    shard = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    parts = {f"optimizer-{run.rank:03d}.pt": to_host(shard)}
    if run.rank == 0:
        parts["model.pt"] = to_host(model.state_dict())
    config, settings = dataclasses.asdict(model.config), dataclasses.asdict(run.settings)
    whole = {"stage": run.stage, "step": step, "config": config, "settings": settings,
             "muon_dtype": str(optimizer.dtype)[6:], **meta}  # fmt: skip
    whole = copy.deepcopy(whole)  # the metrics in it change
    run.in_background(lambda: write_checkpoint(run, folder, parts, whole, keep))
    return folder


def to_host(value: Any) -> Any:
    """Copy the tensors in dicts and lists to host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(x) for key, x in value.items()}
    return [to_host(x) for x in value] if isinstance(value, list) else value


def write_checkpoint(run: Run, folder: Path, parts: dict, meta: dict, keep: int) -> None:
    """Write all ranks' parts (name: value) and meta.json to a folder beside, and rename it."""
    beside = folder.with_name(f".{folder.name}.partial")

    def clear() -> None:
        for left in folder.parent.glob(".step-*.partial"):  # of a killed run, or now dropped
            shutil.rmtree(left)

    def begin() -> None:
        if run.rank == 0:
            clear()
            run.dir.mkdir(exist_ok=True)  # without its parents: a mount that went away stays away
            beside.mkdir()

    def write() -> dict[str, list[int]]:
        files = {}
        for name, value in parts.items():
            # given a path, torch.save holds up Python's other threads and calls no error ENOSPC
            with open(beside / name, "wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())  # a rename must not outlive its files in a power cut
            files[name] = [(beside / name).stat().st_size, crc32(beside / name)]
        return files

    def finish() -> None:
        if run.rank == 0:
            files = dict(sorted(pair for part in written for pair in part.items()))
            write_json(beside / "meta.json", {**meta, "files": files})
            os.replace(beside, folder)
            for old in list_checkpoints(run.tag, run.stage)[:-keep] if keep else []:
                os.replace(old, old.with_name(f".{old.name}.partial"))  # never half a checkpoint
            clear()

    try:
        run.together(begin)
        written = run.together(write)
        run.together(finish)
    except Stop:
        if run.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)  # room for what else must be written
        raise


def crc32(path: Path) -> int:
    """Return a file's CRC-32."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def read_meta(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's meta.json. Raises MissingInput where it is damaged."""
    try:
        return json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MissingInput(_damaged(folder, str(error)))


def _damaged(folder: Path, what: str) -> str:
    others = [p.name for p in list_checkpoints(folder.parent.parent.name, folder.parent.name)
              if p != folder]  # fmt: skip
    rest = f"{others[-1]} is then taken" if others else "the stage then begins anew"
    return f"checkpoint {folder} is damaged ({what}): delete that folder, {rest}"


def load_file(folder: Path, name: str, device: torch.device) -> Any:
    """Load one .pt file of a checkpoint after checking its size and CRC-32.

    Raises MissingInput where it is truncated or altered.
    """
    check_file(folder, name)
    try:
        return torch.load(folder / name, map_location=device, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise MissingInput(_damaged(folder, str(error).splitlines()[0]))


def check_file(folder: Path, name: str) -> None:
    """Raise MissingInput unless a checkpoint's file has the size and CRC-32 that were noted."""
    path, (size, crc) = folder / name, read_meta(folder)["files"][name]
    try:
        good = path.stat().st_size == size and crc32(path) == crc
    except OSError as error:
        raise MissingInput(_damaged(folder, str(error)))
    if not good:
        raise MissingInput(_damaged(folder, f"{name} is not what was saved"))


def find_checkpoint(tag: str, stage: str, step: int = 0) -> Path:
    """Return the newest checkpoint folder of a stage, or that of `step`.

    Raises MissingInput that names what there is.
    """
    found = list_checkpoints(tag, stage)
    if step:
        found = [p for p in found if p.name == step_name(step)]
    if found:
        return found[-1]
    if not run_dir(tag).is_dir():
        tags = sorted(p.name for p in run_dir("").glob("*") if p.is_dir())
        have = f"there are {', '.join(tags)}" if tags else "there is none yet: `bash run.sh`"
        raise MissingInput(f"no run has the tag {tag!r}; {have}")
    what = f"step {step}" if step else "checkpoint"
    script = {"base": "pretrain", "mid": "midtrain"}.get(stage, stage)
    raise MissingInput(f"run {tag!r} has no {stage} {what}: run `python {script}.py --tag={tag}`")


def newest_stage(tag: str) -> str:
    """Return the last stage of a run that has a checkpoint; "base" where none has."""
    there = [stage for stage in STAGES if list_checkpoints(tag, stage)]
    return there[-1] if there else "base"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> GPT:
    """Build the model that a checkpoint holds, its weights on the device.

    The weights stay fp32; `dtype` is that of the activations.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(**read_meta(folder)["config"]))
    model.load_state_dict(load_file(folder, "model.pt", device), assign=True)
    model.init_rope()
    return model.computing_in(dtype)


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
    """Load the model that tag, stage and step name, or the newest, its tokenizer and its folder."""
    stage = settings.stage or newest_stage(settings.tag)
    folder = find_checkpoint(settings.tag, stage, settings.step)
    tokenizer = run_tokenizer(settings.tag)
    device = pick_device(settings.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    if settings.int8 and device.type not in ("cpu", "cuda"):
        raise Stop(f"--int8 works on CPUs and NVIDIA GPUs, not on {device.type}: leave it out")
    model = load_model(folder, device, pick_dtype(device, settings.dtype))
    return model.quantize() if settings.int8 else model, tokenizer, folder


def load_optimizer(run: Run, folder: Path, optimizer: Optimizer) -> None:
    """Load a checkpoint's optimizer state, by however many ranks it was saved.

    A rank checks its share of the files, and reads of all of them only what it keeps.
    """
    names = [name for name in read_meta(folder)["files"] if name.startswith("optimizer-")]
    names.sort(key=lambda name: (len(name), name))  # 1000 is after 999

    def check() -> None:
        for name in names[run.rank :: run.world_size]:
            check_file(folder, name)

    run.together(check)
    shards = [
        torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        for name in names
    ]  # fmt: skip
    optimizer.load_state_dicts([shard["optimizer"] for shard in shards])
    torch.set_rng_state(shards[0]["rng"].clone())


def check_resume(folder: Path, settings: Any, may_differ: set[str]) -> None:
    """Raise MissingInput unless a checkpoint's settings are these, but for those in may_differ."""
    saved, now = read_meta(folder)["settings"], dataclasses.asdict(settings)
    for name in saved.keys() & now.keys() - may_differ:
        if saved[name] != now[name]:
            flag = f"--{name.replace('_', '-')}"
            raise MissingInput(
                f"{folder.parent} holds a run with {flag}={saved[name]}, not {now[name]}: repeat "
                "it as it was, begin anew with --restart, or give another --tag"
            )


def check_data(run: Run, saved: dict[str, Any], **now: Any) -> None:
    """Raise MissingInput unless a checkpoint's meta has the values of now, or has none of a key."""
    if any(saved.get(key, value) != value for key, value in now.items()):
        raise MissingInput(
            f"{run.dir} was trained on other data, or with another tokenizer, than there is now: "
            "begin it anew with --restart, or give another --tag"
        )


def newest_checkpoint(run: Run, parent: Path | None = None) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint that a stage goes on from and its meta, or None and {}.

    None also with --restart: run.begin then drops what is there. Raises MissingInput where the
    run there has other settings, or began from another model than parent holds.
    """
    settings, mark = run.settings, run.dir / ".restart"

    def is_old() -> bool:  # torchrun's next attempt tells by the mark whether begin was reached
        if settings.restart and not run.again and run.rank == 0 and run.dir.exists():
            mark.touch()
        return settings.restart and mark.exists()

    found = [] if run.together(is_old)[0] else list_checkpoints(run.tag, run.stage)
    if not found:
        return None, {}
    check_resume(found[-1], settings, settings.may_differ)
    saved = read_meta(found[-1])
    if parent and saved["parent"] != parent_key(parent):
        raise MissingInput(
            f"{run.dir} was trained from another model than {parent} holds now: begin it anew "
            "with --restart, or give another --tag"
        )
    run.recall(saved)
    return found[-1], saved


def parent_key(folder: Path) -> list[int]:
    """Tell one checkpoint's weights from another's: their size and CRC-32."""
    return read_meta(folder)["files"]["model.pt"]


def continue_stage(
    run: Run, parent: Path, newest: Path | None, compiled: bool, dtype: torch.dtype, warm: bool
) -> tuple[GPT, Optimizer]:
    """Load a stage's model and optimizer: its own newest checkpoint's, else its parent's weights.

    The optimizer is built from the settings matrix_lr, embed_lr, head_lr, 0 for the base run's,
    and weight_decay, -1 for it; with `warm` it begins with the parent's moments.
    """
    model = load_model(newest or parent, run.device, dtype)
    base = read_meta(find_checkpoint(run.tag, "base"))
    model.recompute = recomputes(run)
    names = ("matrix_lr", "embed_lr", "head_lr")
    rates = [getattr(run.settings, name) or base["settings"][name] for name in names]
    decay = run.settings.weight_decay
    rates.append(decay if decay >= 0 else base["settings"]["weight_decay"])
    rates.append(base["settings"].get("muon_steps", 0))
    # as before, unless this machine computes in another: bf16 crawls on a card without it
    before = {**base, **(read_meta(newest) if newest else {})}
    as_before = str(dtype)[6:] == before["dtype"]
    muon_dtype = pick_dtype(run.device, before["muon_dtype"] if as_before else "")
    optimizer = Optimizer(optimizer_groups(model, *rates), muon_dtype, compiled)
    optimizer.scaler = LossScaler() if dtype == torch.float16 else None
    optimizer.scale_lr(run.settings.lr_scale * base["settings"]["lr_scale"])
    if newest or warm:
        load_optimizer(run, newest or parent, optimizer)
    run.say(f"{run.stage}: {'going on' if newest else 'beginning'} from {newest or parent}")
    return model, optimizer


@torch.no_grad()
def evaluate_loss(model: GPT, rows: Rows, micro_batch: int) -> float:
    """Return the mean nats per target over all rows, shared out over the ranks."""
    rank, world_size = dist_info()
    device = model.embed.weight.device
    sums = torch.zeros(2, device=device)
    for first in range(rank * micro_batch, len(rows), world_size * micro_batch):
        indices = np.arange(first, min(first + micro_batch, len(rows)))
        ids, targets = (x.to(device) for x in rows.gather(indices))
        sums[0] += token_losses(model, ids, targets).sum()
        sums[1] += (targets != IGNORE).sum()
    nats, count = all_sum(sums).tolist()
    return nats / max(1.0, count)


def document_windows(ids: list[int], bos: int, T: int) -> list[tuple[list[int], list[int]]]:
    """Cut a document's ids in windows (inputs, targets) of at most T: each id a target once.

    Every window's inputs begin with bos.
    """
    parts = [ids[i : i + T] for i in range(0, len(ids), T)]
    return [([bos, *part[:-1]], part) for part in parts]


def evaluate_bpb(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], micro_batch: int
) -> tuple[float, int]:
    """Return (bits per byte, documents) over texts, by documents: packing has no part in it.

    Each document is read from its `<|bos|>`, in windows of the model's context; nats of all its
    tokens are summed and divided by all its UTF-8 bytes. Ranks share the documents out.
    """
    rank, world_size = dist_info()
    T, bos, device = model.config.max_seq_len, tokenizer.bos, model.embed.weight.device
    weights = tokenizer.token_bytes.to(device)
    sums = torch.zeros(3, dtype=torch.float64)  # nats, bytes, documents
    texts = itertools.islice(texts, rank, None, world_size)
    while chunk := list(itertools.islice(texts, 1024)):
        documents = tokenizer.encode_batch(chunk)
        windows = [w for ids in documents for w in document_windows(ids, bos, T)]
        windows.sort(key=lambda w: len(w[0]))  # equal lengths side by side waste less padding
        for i in range(0, len(windows), micro_batch):
            part = windows[i : i + micro_batch]
            width = len(part[-1][0])
            ids = torch.full((len(part), width), bos)
            targets = torch.full((len(part), width), IGNORE)
            for row, (x, y) in enumerate(part):
                ids[row, : len(x)], targets[row, : len(y)] = torch.tensor(x), torch.tensor(y)
            targets = targets.to(device)
            nats = token_losses(model, ids.to(device), targets)
            sums[0] += nats.double().sum().item() if device.type != "mps" else nats.sum().item()
            sums[1] += int((weights[targets.clamp_min(0)] * (targets != IGNORE)).sum())
        sums[2] += len(chunk)
    if world_size > 1:  # NCCL sums on the device, and mps has no float64
        sums = all_sum(sums.to(device))
    nats, num_bytes, num_documents = sums.tolist()
    return nats / math.log(2) / max(1.0, num_bytes), int(num_documents)


# 8. Settings, errors, log --------------------------------------------------------------------


class Stop(SystemExit):
    """End the program with one sentence on stderr and exit code 1, without a traceback."""


class MissingInput(Stop):
    """Something that an earlier stage makes, or that the settings name, is not there."""


RL_VAL = 128  # problems at most on which rl validates


def rl_held(count: int) -> int:
    """Return how many of rl.jsonl's first problems are for validation: training shows none solved."""
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
    shards = sorted(folder.glob("train-*.parquet")) if split == "train" else []
    if split == "val" and (folder / "val.parquet").exists():
        shards = [folder / "val.parquet"]
    if not shards or not (folder / "manifest.json").exists():  # prepare.py writes that one last
        have = prepared_sources()
        known = f" (prepared: {', '.join(have)})" if have else ""
        raise MissingInput(
            f"{folder} has no {split} text{known}: run `python prepare.py --source={source}` first"
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
    """Give a path beside `path` to write to; rename it into place at the end, drop it on error.

    Works for files and folders. The process id keeps two writers apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        old = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
        if beside.is_dir() and path.exists():
            os.replace(path, old)  # a folder cannot be renamed over another
        try:
            os.replace(beside, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write value as indented JSON, beside and renamed."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def format_duration(seconds: float) -> str:
    """Say a time span in its natural unit: 45 s, 12 min, 3.4 h, 2.1 d."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            digits = 1 if unit == "h" else 0
            return f"{seconds / divisor:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def format_count(value: float) -> str:
    """Say a count with three digits and k, M, G or T: 1.23 M."""
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
    words = [LOG_FORMATS.get(key, lambda v, k=key: f"{k} {_plain(v)}")(values[key])
             for key in values]  # fmt: skip
    return "  ".join([f"{stage} {step:05d}/{num_steps:05d}", *words])


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_log(tag: str) -> list[dict[str, Any]]:
    """Read what a run's stages have logged, but for lines torn by a full disk or a power cut."""
    path = run_dir(tag) / "metrics.jsonl"
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def setting(default: Any, help: str, short: str = "", choices: tuple = ()) -> Any:  # noqa: A002
    """Declare one field of a Settings dataclass: its default, help, one-letter flag, choices."""
    return field(default=default, metadata={"help": help, "short": short, "choices": choices})


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
        parser.add_argument(*names, **options)
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--\w[\w-]*(?==|$)", lambda m: m[0].replace("_", "-"), w) for w in words]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(_explain_unknown(cls, unknown[0]))
    try:
        return cls(**vars(values))
    except (ValueError, OSError, RuntimeError) as error:  # the latter of paths that cannot be
        parser.error(str(error))


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raise ValueError unless each of these settings is finite and `least` or more."""
    for name in names:
        if not least <= getattr(settings, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more")


def _explain_unknown(cls: type, word: str) -> str:
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    if name in getattr(cls, "derived", {}):
        return f"{word} is not a setting: {cls.derived[name]}"  # type: ignore[attr-defined]
    known = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists them"
    return f"{word!r} is not a setting; {hint}"


# 9. Devices and ranks ------------------------------------------------------------------------


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


GPUS = {"cuda": "nccl", "xpu": "xccl"}  # kinds that ranks have one each of, and what sums there


def pick_device(name: str = "") -> torch.device:
    """Choose cuda, xpu, mps or cpu, best first, or the named one; under torchrun its own GPU.

    Raises MissingInput for an unknown or absent device, and for more ranks than GPUs.
    """
    present = [kind for kind in GPUS if getattr(torch, kind).is_available()]
    present += ["mps"] if torch.backends.mps.is_available() else []
    present += ["cpu"]
    if name and name not in present:
        raise MissingInput(f"--device={name} is not on this machine: it has {', '.join(present)}")
    kind = name or present[0]
    if kind not in GPUS:
        return torch.device(kind)
    local_rank, count = local_dist_info()[0], getattr(torch, kind).device_count()
    if local_rank >= count:
        raise MissingInput(
            f"local rank {local_rank} has no GPU of its own: start torchrun with "
            f"--nproc_per_node={count} or less, or --device=cpu"
        )
    getattr(torch, kind).set_device(local_rank)
    return torch.device(kind, local_rank)


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


def matmul_ratio(device: torch.device, n: int) -> float:
    """Measure how many times as fast bf16's products of n x n matrices are as fp32's.

    They take turns of some length: on a busy machine a thread that waits for its core makes any of
    them slow, and of two that have just begun the second may share the core of the first.
    """
    rates = [
        [measure_matmul(device, dtype, n, 8) for dtype in (torch.bfloat16, torch.float32)]
        for _ in range(4)
    ]
    bf16, fp32 = map(max, zip(*rates, strict=True))
    return bf16 / fp32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the matmul peak in FLOP/s: the maker's bf16 figure, else measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name):  # an L40 is no L4
                return flops
    return measure_matmul(device, dtype, 8192 if device.type == "cuda" else 1024)


@functools.cache  # a second timing could choose otherwise on a busy machine
def pick_dtype(device: torch.device, name: str = "") -> torch.dtype:
    """Choose the compute dtype: the named one, else bf16 where it is fast, fp16 where that is.

    Elsewhere fp32. On a CPU bf16 and fp32 are timed: without the instructions bf16 runs hundreds of
    times slower (so a small product is asked first), and where it is little faster the conversions
    eat the gain; at 2.2 times fp32's rate training was 1.6 to 1.9 times as fast.
    """
    if name:
        return getattr(torch, name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if (7, 0) <= capability < (8, 0):  # V100, T4: tensor cores, but no bf16
            return torch.float16
        fast = capability >= (8, 0)
    elif device.type == "cpu":
        fast = all(matmul_ratio(device, n) > factor for n, factor in ((192, 0.01), (1024, 1.5)))
        fast = any_rank(fast, device)  # each has timed by itself, beside the others
    else:
        fast = device.type == "xpu"
    return torch.bfloat16 if fast else torch.float32


def can_compile(device: torch.device) -> bool:
    """Say whether torch.compile can work here: Python's headers, a compiler, on a GPU Triton."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):  # too old for Triton
            return False
        compiler = os.environ.get("CC") or "gcc"  # of what launches Triton's programs
        found = any(map(shutil.which, (compiler, "gcc", "clang")))
        return found and importlib.util.find_spec("triton") is not None
    compiler = os.environ.get("CXX") or "g++"
    return device.type == "cpu" and any(map(shutil.which, (compiler, "g++", "clang++")))


def compile_choice(run: Run, saved: dict[str, Any]) -> str:
    """Return --compile: yes, no, or auto, which in a run that goes on is what it was."""
    if run.settings.compile != "auto" or "compiled" not in saved:
        return run.settings.compile
    return "yes" if saved["compiled"] else "no"


def compile_or_not(
    choice: str,
    seconds: float,
    device: torch.device,
    say: Callable[[str], None],
    before: bool = False,
) -> bool:
    """Decide on torch.compile, and say it: yes, no, or auto where the run earns it back.

    seconds is the run's estimated length without it. Compiling saves a quarter of it or more, and
    costs about a minute, or ten seconds where the same was compiled `before` (README, Choices).
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
    """Say whether it is so on any rank."""
    if dist_info()[1] == 1:  # without waiting for the device
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=device)).item())


# of a container, v2 and v1; what is used there counts files in memory, which give way
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_bytes(device: torch.device) -> float:
    """Return the memory that this process may fill: what a GPU has free, a share of a machine's."""
    if device.type in GPUS:
        kind = getattr(torch, device.type)
        held = kind.memory_reserved(device) - kind.memory_allocated(device)
        return kind.mem_get_info(device)[0] + held
    if not hasattr(os, "sysconf"):  # Windows does not say
        return math.inf
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            room = min(room, int(Path(path).read_text("utf-8")))
    return room / local_dist_info()[1]


def out_of_memory(error: RuntimeError) -> bool:
    """Say whether memory ran out; not all of torch's allocators have a class for it."""
    words = r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))


@dataclass
class Run:
    """One stage at work: its place on disk, device, ranks, log. Made by start_run."""

    stage: str
    tag: str
    settings: Any
    device: torch.device
    rank: int
    world_size: int
    num_steps: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    validated: set[int] = field(default_factory=set)  # the steps that were
    stopping: bool = False
    again: bool = False  # torchrun began it again after a fault
    group: Any = None  # of all ranks, for the thread that saves: collectives of two threads mix
    saving: threading.Thread | None = None  # writes a checkpoint
    save_error: BaseException | None = None
    wandb: Any = None
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def dir(self) -> Path:
        return run_dir(self.tag) / self.stage

    def closing(self, items: Any) -> Any:
        """Return items, which will be closed when the run ends."""
        return self.cleanup.enter_context(contextlib.closing(items))

    def in_background(self, work: Callable[[], None]) -> None:
        """Run work in a thread; where it fails, training stops after the step."""

        def body() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  wait_for_save raises it
                self.save_error, self.stopping = error, True

        self.saving = threading.Thread(target=body, daemon=True)  # Ctrl-C leaves a hung disk
        self.saving.start()

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on disk. Raises what its write raised, once."""
        if self.saving is not None:
            self.saving.join()  # to its end: see prefetch
        error, self.saving, self.save_error = self.save_error, None, None
        if error is not None:
            raise error

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

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        say(text)

    def log(self, step: int, **values: Any) -> None:
        """Print one event as a line and append its values, unrounded, to metrics.jsonl."""
        if self.device.type == "cuda" and "loss" in values:
            values["memory"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.remember(step, values)
        if self.rank == 0:
            print(format_log(self.stage, step, self.num_steps, values), flush=True)
            line = {"stage": self.stage, "step": step, "time": time.time(), **values}
            with open(run_dir(self.tag) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(
                {f"{self.stage}/{key}": v for key, v in {"step": step, **values}.items()}
            )

    def remember(self, step: int, values: dict[str, Any]) -> None:
        """Keep an event's values as the newest, its validation loss also if it is the best."""
        self.metrics.update(values, step=step)
        for name in [name for name in values if name.startswith("val_")]:
            self.validated.add(step)
            if name in ("val_bpb", "val_loss"):
                best = self.metrics.get(f"best_{name}", math.inf)
                self.metrics[f"best_{name}"] = min(best, values[name])

    def recall(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's metrics and its validation, which came after it was saved."""

        def replay() -> Any:  # on rank 0, for all
            self.metrics = dict(saved.get("metrics", {}))
            for line in read_log(self.tag) if self.rank == 0 else []:
                if line["stage"] == self.stage and line["step"] <= saved["step"]:
                    values = {k: v for k, v in line.items() if k not in ("stage", "step", "time")}
                    self.remember(line["step"], values)
            return self.metrics, self.validated

        self.metrics, self.validated = self.together(replay)[0]
        self.metrics["step"] = saved["step"]

    def estimate_seconds(self, flops: float, peak: float) -> float:
        """Return about how long all ranks take, not compiled, at 0.3 of their peak."""
        return flops / (peak * self.world_size * 0.3)

    def end_if_stopped(self, s: Step) -> None:
        """End the program, whose checkpoint is saved, where the user has asked to stop."""
        if s.stopping:
            self.say(f"{self.stage}: stopped at step {s.step}; run the same command again to go on")
            raise SystemExit(0)

    def validates(self, s: Step) -> bool:
        """Say whether this step's validation is due and was not made before the run went on."""
        due = s.due(self.settings.eval_every, first=True)
        return due and s.step not in self.validated

    def finished(self) -> bool:
        """Say whether the last step's checkpoint is there, and validated if any was."""
        step = self.metrics.get("step", -1)
        return step >= self.num_steps and (not self.validated or step in self.validated)

    def begin(self, saved: dict[str, Any]) -> None:
        """Drop what training from here on replaces: old checkpoints, log lines after `saved`.

        Until then --restart has deleted nothing. They go by one rename: whole, or not at all.
        Where the user has asked to stop while the stage was set up, nothing goes.
        """
        if any_rank(self.stopping, self.device):
            return  # training_steps will make no step

        def clear() -> None:
            if self.rank == 0:
                old = self.dir.with_name(f".{self.stage}.partial")
                shutil.rmtree(old, ignore_errors=True)  # a killed run's
                if not saved and self.dir.exists():
                    os.replace(self.dir, old)
                    shutil.rmtree(old)
                self.rewind_log(saved.get("step", -1))

        self.together(clear)

    def rewind_log(self, step: int) -> None:
        """Drop this stage's lines after `step` from metrics.jsonl: a resumed run repeats them."""
        path = run_dir(self.tag) / "metrics.jsonl"
        if path.exists():
            log = read_log(self.tag)
            kept = [x for x in log if x["stage"] != self.stage or x["step"] <= step]
            with written_beside(path) as beside:
                beside.write_text("".join(json.dumps(x) + "\n" for x in kept), "utf-8")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Have this process keep what memory it frees, in pages of 2 MB, where the system is Linux.

    Each step's tensors would come anew from the system, in pages of 4 KB that it clears first.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc's: when to return the heap's end, and what to map by itself
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, 2**31 - 1)


@contextlib.contextmanager
def start_run(stage: str, settings: Any) -> Iterator[Run]:
    """Set up device, ranks, seed and signals for a stage, and clean up after it.

    settings needs `tag`, `device` and `seed`. The first Ctrl-C or SIGTERM sets `run.stopping`,
    which training_steps obeys on all ranks at once; a second Ctrl-C ends at once. A full or
    read-only disk becomes one sentence. However it ends, a checkpoint under way is written first.
    """
    keep_memory()
    device, attempt = pick_device(settings.device), 1
    rank, world_size = dist_info()
    if world_size > 1:
        if device.type == "cpu":  # torchrun sets one thread a rank; share the cores instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_dist_info()[1]))
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives its restarts: in it are the addresses of dead ranks. Its own
            # count of restarts differs between nodes: one that follows another's fault counts none
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            kept = dist.TCPStore(host, port, world_size, is_master=False)
            attempt = agree_on_attempt(kept, rank, world_size)
            store = dist.PrefixStore(str(attempt), kept)
        backend = GPUS.get(device.type, "gloo")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)
    run = Run(stage, settings.tag, settings, device, rank, world_size, again=attempt > 1)
    run.group = dist.new_group(backend="gloo") if world_size > 1 else None
    if device.type == "cuda":
        vary = stage in ("rl", "eval")
        if kernels := rank_attention(device, pick_dtype(device), lengths_vary=vary):
            run.cleanup.enter_context(sdpa_kernel(kernels, set_priority=True))

    def stop(number: int, frame: Any) -> None:
        if run.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        if rank == 0 and not run.stopping:  # print could be what the signal interrupted
            os.write(1, b"stopping after this step; Ctrl-C again stops at once\n")
        run.stopping = True

    in_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        with one_sentence(stage):
            if stage != "eval":
                run.cleanup.enter_context(alone_at_work(run))
            run.wandb = _start_wandb(run)
            try:
                yield run
            finally:
                run.wait_for_save()
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
    """Keep a second process out of a run's stage while this one trains it.

    Raises MissingInput where one is at work, or where a rank does not see rank 0's folder. A file
    system without locks is left unguarded, and so is a run that is not there: the stage will say.
    """
    path = run_dir(run.tag) / f".{run.stage}.lock"
    mark = f"{socket.gethostname()} {time.time_ns()}"
    with contextlib.ExitStack() as held:

        def take() -> str:
            if run.rank or not path.parent.is_dir():
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
            path.write_text(mark, "utf-8")
            return mark

        def see() -> None:
            patience = time.monotonic() + 20  # of NFS, which may still know how it was before
            while first and not (path.exists() and path.read_text("utf-8") == first):
                if time.monotonic() > patience:
                    raise MissingInput(
                        f"{socket.gethostname()} does not see {path} of {first.split()[0]}: "
                        "NANOCHAT_BASE_DIR must be a folder that all nodes share"
                    )
                time.sleep(0.1)

        first = run.together(take)[0]
        run.together(see)
        yield


def _start_wandb(run: Run) -> Any:
    name = getattr(run.settings, "run", "")
    if not name or run.rank:
        return None
    if importlib.util.find_spec("wandb") is None:
        run.say("wandb is not installed (`uv pip install wandb`): metrics.jsonl has everything")
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


def try_attention(
    attend: Callable[..., Tensor], shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[float, list[Tensor]]:
    """Time attention forward and backward; return seconds, what it made and its gradients.

    q, k and v are of one shape. No random number is drawn.
    """
    count = torch.arange(math.prod(shape), device=device).view(*shape)
    q, k, v = ((count * step).sin().to(dtype).requires_grad_() for step in (0.7, 1.1, 1.3))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        y = attend(q, k, v)
        made = [y.detach(), *torch.autograd.grad(y, (q, k, v), y.detach())]
        made[1].sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best, made


def is_close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Say whether two kernels' results differ by what 16 bits round."""
    return all((x.double() - y).norm() < 0.05 * y.double().norm() for x, y in zip(a, b))


def rank_attention(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] = (1, 8, 2048, 128),
    lengths_vary: bool = False,
) -> list[SDPBackend]:  # fmt: skip
    """List the kernels of torch's attention that say what its plain one says, the fastest first.

    They are tried with q, k and v of this shape (B, H, T, D). cuDNN plans half a second for each
    new shape, so that where lengths vary it is left out, as are versions of it with known faults.
    FlashAttention 3 (arXiv:2407.08608) is the flash kernel of an H100 where it is installed.
    """
    flash, library = SDPBackend.FLASH_ATTENTION, torch.nn.attention
    kinds = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, flash]
    if device.type == "cuda":
        sound = (torch.backends.cudnn.version() or 0) > 91500  # pytorch/pytorch#169849
        kinds += [SDPBackend.CUDNN_ATTENTION] * (sound and not lengths_vary)
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        if hopper and importlib.util.find_spec("flash_attn_interface"):
            with contextlib.suppress(AttributeError, ImportError, RuntimeError):
                library.activate_flash_attention_impl("FA3")  # torch 2.10 and newer
                kinds.append(flash)  # the older one, should that not work
    plain, times = None, {}
    for i, kind in enumerate(kinds):
        if kind == flash and kinds.index(flash) < i:
            if flash in times:
                continue
            library.restore_flash_attention_impl()
        with sdpa_kernel(kind), warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")  # of why one cannot run here
            attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
            seconds, made = try_attention(attend, shape, device, dtype)
            plain = plain or made
            if is_close(made, plain):
                times[kind] = seconds
    return sorted(times, key=lambda kind: times[kind])


class Float8Product(torch.autograd.Function):
    """The product of rows and a weight, each rounded to fp8 with one scale (arXiv:2209.05433).

    Rows and weight have 4 bits of exponent, gradients have 5 and are summed in fp32.
    """

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        """Return x (N, n_in) @ weight (n_out, n_in) turned, in x's dtype; all multiples of 16."""
        x8, w8 = (to_float8(a, torch.float8_e4m3fn) for a in (x, weight))
        ctx.save_for_backward(*x8, *w8)
        return float8_matmul(x8, (w8[0].t(), w8[1]), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, x_scale, w, w_scale = ctx.saved_tensors
        g, g_scale = to_float8(dy, torch.float8_e5m2)
        # the kernel wants its second factor stored by columns
        dx = float8_matmul((g, g_scale), (w.t().contiguous().t(), w_scale), dy.dtype)
        turned = g.t().contiguous(), g_scale
        dw = float8_matmul(turned, (x.t().contiguous().t(), x_scale), torch.float32)
        return dx, dw


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round x to an 8-bit float; return it and its scale, which brings the largest to the end."""
    top = torch.finfo(dtype).max
    scale = x.float().abs().amax().clamp_min(1e-12) / top
    return (x.float() / scale).clamp(-top, top).to(dtype), scale


def float8_matmul(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """Multiply two matrices in fp8, each with its scale; fast sums have fewer bits, on a GPU."""
    fast = fast and a[0].is_cuda
    return torch._scaled_mm(
        a[0], b[0], scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=fast
    )


def row_sizes(x: Tensor) -> Tensor:
    """Return what one step of 8 bits is worth for each row of x (..., n): fp32 (..., 1)."""
    return x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127


FEW_ROWS = 64  # as many as the engine's slots
PACKED = 1 << 18  # numbers in the smallest weight that is packed: each call has a price
PACKED_INT8 = 3 << 19
EXACT = 1024  # products of two int8 that fp32 adds up exactly
AMX = torch.cpu._is_amx_tile_supported()  # its products of 8 bits want the weight first

operators = torch.library.Library("nanochat", "FRAGMENT")  # a compiler calls them as they are
operators.define("packed_product(Tensor x, Tensor packed) -> Tensor")
operators.define("packed_int8_product(Tensor x, Tensor packed, Tensor scale) -> Tensor")
operators.define("sum_rows(Tensor x, Tensor rows, int count) -> Tensor")


@torch.library.impl(operators, "packed_product", "MkldnnCPU")
def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """Multiply x (N, n_in) by what pack() made of a weight (n_out, n_in), turned: (N, n_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.library.register_fake("nanochat::packed_product", lib=operators)
def _packed_shape(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(x.size(0), packed.size(0))


@torch.library.impl(operators, "packed_int8_product", "MkldnnCPU")
def packed_int8_product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Multiply x (N, n_in), of bytes that mean 128 less, by a packed int8 weight: fp32 (N, n_out).

    The sums are exact; scale (n_out,) multiplies them.
    """
    zero = scale.new_zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


@torch.library.register_fake("nanochat::packed_int8_product", lib=operators)
def _packed_int8_shape(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.size(0), scale.size(0), dtype=torch.float32)


@torch.library.impl(operators, "sum_rows", "CPU")
def sum_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Add each row of x (N, C) to that of the sums (count, C) which rows (N,) names, in order.

    A compiler's loop lets threads add where they meet: slower, and each run in another order.
    """
    return torch.ops.aten.embedding_dense_backward(x, rows, count, -1, False)


@torch.library.register_fake("nanochat::sum_rows", lib=operators)
def _sums_shape(x: Tensor, rows: Tensor, count: int) -> Tensor:
    return x.new_empty(count, x.size(1))


@functools.cache
def packs_int8() -> bool:
    """Say whether packed products of 8 bits are there and exact: without VNNI their sums clip."""
    if AMX:
        return False
    x = torch.full((2, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        y = torch.ops.nanochat.packed_int8_product(x, packed, torch.ones(16))
        return bool((y == 127 * 127 * 64).all())
    return False


def pack(weight: Tensor) -> Tensor | None:
    """Lay a weight out in the blocks that oneDNN reads; None where that is not known to pay."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if not torch.backends.mkldnn.is_available() or weight.numel() < PACKED:
        return None
    if weight.dtype == torch.int8:
        if weight.numel() < PACKED_INT8 or not packs_int8():
            return None
        return torch.ops.onednn.qlinear_prepack(weight.detach(), None)
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype != torch.float32 and not bf16:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)


def stored(x: Tensor) -> Tensor:
    """Return x; a compiler then stores it, where it would compute it anew for each use."""
    return x.as_strided(x.shape, x.stride())


def product(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """Multiply x (..., n_in) by a weight (n_out, n_in), turned: (..., n_out) in x's dtype.

    An int8 weight has scales (n_out,), and the rows of x are rounded to 8 bits as well, as in
    arXiv:2208.07339: the sums are exact, and a row's result depends on no other row.
    `packed` is what pack() made of the weight.
    """
    rows = x.flatten(0, -2)
    n = rows.size(0)
    training = torch.is_grad_enabled()
    few = n <= FEW_ROWS and x.device.type == "cpu" and not training
    alone = few and n == 1 and torch.compiler.is_compiling()
    if scale is not None:
        size = row_sizes(rows)
        small = (rows / size).round()
        if alone and not AMX and weight.numel() >= PACKED_INT8 and weight.size(1) <= EXACT:
            y = (weight.float() * stored(small)).sum(-1) * scale
        elif packed is not None and n > 1:
            y = torch.ops.nanochat.packed_int8_product((small + 128).byte(), packed, scale)
        elif n > FEW_ROWS or (few and n == 1 and not AMX):
            y = torch._int_mm(small.char(), weight.t()) * scale
        else:
            if x.device.type == "cuda":
                small = F.pad(small, (0, 0, 0, -n % 8))  # as its kernel asks
            y = torch._int_mm(weight, small.char().t())[:, :n].t() * scale
        y = (y * size).to(x.dtype)
    elif alone and (x.dtype == torch.float32 or (weight.numel() >= PACKED and not AMX)):
        # one loop of a compiler's, on some CPUs twice as fast as their library
        y = (weight.float() * stored(rows).float()).sum(-1).to(x.dtype)
    elif packed is not None and not training and (n > 1 or x.dtype == torch.float32):
        y = torch.ops.nanochat.packed_product(rows, packed)
    elif few and n > 1:
        y = (weight.to(x.dtype) @ rows.t()).t()  # a third faster for few rows, as measured
    else:
        y = F.linear(rows, weight.to(x.dtype))
    if not torch.compiler.is_compiling():
        y = y.contiguous()  # attention is slow on what lies turned
    return y.view(*x.shape[:-1], -1)


class Lookup(torch.autograd.Function):
    """F.embedding on a CPU, whose gradient is the same in every run."""

    @staticmethod
    def forward(ctx, weight, ids):  # type: ignore[no-untyped-def]
        """Return the rows of weight (V, C) that ids (...) name: (..., C)."""
        ctx.save_for_backward(ids)
        ctx.count = weight.size(0)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_rows):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        flat = d_rows.reshape(-1, d_rows.size(-1))
        return torch.ops.nanochat.sum_rows(flat, ids.reshape(-1), ctx.count), None


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend as attend() does, T = S > window, without scores that no window holds.

    Blocks of `window` queries see their own keys and those of the block before.
    """
    B, T = q.shape[:2]
    first = attend(q[:, :window], k[:, :window], v[:, :window], window)
    missing = -T % window
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    q, k, v = (x.view(B, -1, window, *x.shape[2:]) for x in (q, k, v))
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), 2).flatten(0, 1) for x in (k, v))
    at = torch.arange(-window, window, device=q.device)
    back = at[window:, None] - at
    mask = ((back >= 0) & (back < window))[None]  # (1, window, 2 window), of every block
    rest = attend(q[:, 1:].flatten(0, 1), k, v, window, mask)
    return torch.cat((first, rest.reshape(B, -1, *rest.shape[2:])), 1)[:, :T]


def attend_in_flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend as attend() does, T = S, with torch's flash kernel, which passes over other keys.

    Raises ImportError before torch 2.10, RuntimeError where there is no such kernel.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler

    B, T, H, _ = q.shape
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    if (groups := H // k.size(2)) > 1:  # torch 2.12 and newer would share them
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    seen = (window - 1, 0)  # before and after
    y: Any = varlen_attn(rows[0], rows[1], rows[2], starts, starts, T, T, window_size=seen)
    return y.view(q.shape)


@functools.cache
def window_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor]:
    """Return what attends in windows here: attend_in_flash where that runs and is right."""
    if device.type == "cuda":
        shape, how = (2, 96, 2, head_dim), (attend_in_flash, attend_in_blocks)
        with contextlib.suppress(ImportError, RuntimeError, TypeError):
            tries = [functools.partial(one, window=32) for one in how]
            if is_close(*(try_attention(one, shape, device, dtype)[1] for one in tries)):
                return attend_in_flash
    return attend_in_blocks


class InProducts(torch.autograd.Function):
    """Causal attention, each (B, H, T, D), in products of 128 queries with the keys they may see.

    What lies between the products a compiler makes one loop of, a pass over the scores each way.
    The weights are stored, not yet divided by their sums.
    """

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        parts, stored = [], []
        for start in range(0, q.size(2), 128):
            x = q[:, :, start : start + 128]
            end = start + x.size(2)
            scores = (x @ k[:, :, :end].transpose(2, 3)).float() / math.sqrt(q.size(3))
            at = torch.arange(end, device=q.device, dtype=torch.int32)  # int64 takes twice the time
            scores = scores.masked_fill(at > at[start:, None], -math.inf)
            weights = (scores - scores.amax(-1, keepdim=True)).exp().to(v.dtype)
            total = weights.float().sum(-1, keepdim=True)
            parts.append(((weights @ v[:, :, :end]).float() / total).to(v.dtype))
            stored += [weights, total]
        y = torch.cat(parts, 2)
        ctx.save_for_backward(q, k, v, y, *stored)
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        q, k, v, y, *stored = ctx.saved_tensors
        means = (d_y.float() * y.float()).sum(-1, keepdim=True)  # of each query's d_weights
        d_q, d_k, d_v = [], torch.zeros_like(k).float(), torch.zeros_like(v).float()
        for weights, total in zip(stored[::2], stored[1::2]):
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


def by_parts(q: Tensor) -> bool:
    """Say whether torch's kernel is slower here than the products of attention, one by one."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not AMX
    return slow and not q.requires_grad and not torch.compiler.is_compiling()


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as attend() does, q (B, H, T, D) to k and v (B, K, S, D), in a product for each head.

    The keys of a head are a matrix as they lie; for those of all the library would copy them.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q = q / math.sqrt(D)
    products = [q[b, h] @ k[b, h * K // H].T for b in range(B) for h in range(H)]
    scores = torch.stack(products).view(B, H, T, S)
    if mask is None:
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores[..., S - T :].masked_fill_(later, -math.inf)
    else:
        scores.masked_fill_(~mask[:, None], -math.inf)
    weights = scores.softmax(-1).view(B, K, -1, S)  # a group's heads one below the other
    return (weights @ v).view(B, H, T, D)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as attend() does, T = 1, in sums that a compiler makes one loop each of."""
    B, _, H, D = q.shape
    q = q.view(B, 1, k.size(2), -1, D).float()  # (B, 1, K, H/K, D)
    scores = (q * k[:, :, :, None]).sum(-1) / math.sqrt(D)  # (B, S, K, H/K)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0, :, None, None], -math.inf)
    y = (scores.softmax(1)[..., None] * v[:, :, :, None]).sum(1)  # (B, K, H/K, D)
    return y.view(B, 1, H, D).to(v.dtype)


GRAPH_KEYS = 256  # a recorded step reads whole blocks of so many positions


def record(
    step: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Tensor]:
    """Record what a step launches on a GPU; return what launches it again, and its output.

    Records of one pool share memory: an output holds until the next of them is launched.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # libraries and compilers set up what a record cannot hold
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = step()
    return graph.replay, output
