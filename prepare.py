"""Get text and conversations: from the hub, from your own files, or from the embedded world.

Usage:   python prepare.py                                 # the embedded world, no network
         python prepare.py --data=../books                 # your own folder or file
         python prepare.py --data=hub --shards=8           # FineWeb-Edu; --data=climbmix
         python prepare.py --conversations=hub             # data/chat: SmolTalk, MMLU, GSM8K, ARC
         python prepare.py --conversations=my.jsonl        # your own: OpenAI's form, ShareGPT's,
                                                           # Alpaca's, GSM8K's; file or folder
         python prepare.py --eval-data=hub                 # evaluation sets alone; or a folder
Reads:   the hub (HF_ENDPOINT, HF_TOKEN), a path, or nothing; NANOCHAT_MIRROR, a place that has
         eval_bundle.zip and words_alpha.txt, where their own addresses are out of reach
Writes:  data/SOURCE/train-00000.parquet ... val.parquet, manifest.json; of the world also
         data/world/{mid,sft,rl,val}.jsonl and eval/NAME.jsonl
         data/SOURCE/{mid,sft,rl,val}.jsonl, conversations.json; data/eval/
Method:  documents are cut at paragraph ends, then sorted by a hash of seed and text: this
         shuffles them, drops duplicates and splits off validation text in bounded memory,
         and does not depend on how the files lie on the disk
"""

from __future__ import annotations

import bisect
import bz2
import codecs
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests

from common import (
    NUMBER,
    MissingInput,
    Stop,
    at_least,
    base_dir,
    calculate,
    check_name,
    crc32,
    data_dir,
    format_count,
    format_duration,
    last_number,
    one_sentence,
    parse_settings,
    read_conversations,
    rl_held,
    setting,
    write_json,
)

Out = TypeVar("Out")
Item = dict[str, Any]  # a conversation, or a graded question: {"kind", "messages", ...}
Manifest = dict[str, Any]  # {"settings", "files": Files, "dropped": Dropped, ...}
Files = dict[str, dict[str, Any]]  # file name: its size, hash and counts
Dropped = dict[str, list[Any]]  # what was left out: [how often, the first place]

# 1. Settings ---------------------------------------------------------------------------------

# One command prepares one thing: text (--data), conversations (--conversations) or evaluation
# sets (--eval-data). What determines the data is written to its manifest, and the next command
# does nothing where the manifest says the same. These numbers stand in it for the code:
# raise one when the same input gives other data (golden tests notice), not for a new comment.
WORLD_VERSION = 2  # how world.txt is read: what is written, asked and answered
DATA_VERSION = 2  # how own files and the hub's data sets are read, checked, cut and split

# name: folder below data/, repository; the last shard is for validation
HUB = {
    "hub": ("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle"),  # 1,823 shards
    "climbmix": ("climbmix", "karpathy/climbmix-400b-shuffle"),  # 6,543 shards
}
RESERVED = {"world", "eval", "chat", "downloads", *(folder for folder, _ in HUB.values())}


def resolve(path: str) -> Path:
    """Return a path of the command line as an absolute one."""
    return Path(path).expanduser().resolve()


@dataclass
class Settings:
    data: str = setting(
        "world", "The text: world, hub (FineWeb-Edu), climbmix, or the path of your own files."
    )
    conversations: str = setting(
        "", "Prepare conversations, and no text: hub, or the path of your own .jsonl files."
    )
    eval_data: str = setting("", "Prepare evaluation sets, and no text: hub, or a folder of them.")
    source: str = setting(
        "", "The folder below data/ (none: world, fineweb-edu, climbmix, chat, or the path's name)."
    )
    name: str = setting("Nano", "What the assistant calls itself in its conversations.")
    shards: int = setting(8, "hub: shards to train on, about 250 M characters each.")
    documents: int = setting(64_000, "world: documents to write, about 440 characters each.")
    num_conversations: int = setting(
        60_000, "world: conversations of mid; sft gets a sixth as many, rl a tenth as problems."
    )
    doc_chars: int = setting(20_000, "own files: longer documents are cut, at paragraph ends.")
    document_ends: str = setting(
        "<|endoftext|>,<|end_of_text|>", "own files: a line of one of these ends a document."
    )
    encoding: str = setting("", "own files: encoding of those that are not UTF-8; none: a guess.")
    val_percent: float = setting(2.0, "world, own files: percentage of the validation documents.")
    val_mb: int = setting(20, "world, own files: MB of validation text at most.")
    shard_mb: int = setting(100, "world, own files: MB of text in one training shard.")
    seed: int = setting(0, "world, own files: decides the order, the split and the world's tales.")
    workers: int = setting(4, "hub: files to download at once.")

    def __post_init__(self) -> None:
        at_least(
            self, 1, "shards", "documents", "num_conversations", "val_mb", "shard_mb", "workers"
        )
        at_least(self, 200, "doc_chars")
        if not 0 < self.val_percent <= 50:
            raise ValueError("--val-percent must be over 0 and at most 50: training needs both")
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError("--name must be a name, on one line")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"--encoding={self.encoding} is none that Python knows") from None
        known = {"data": ("world", *HUB), "conversations": ("", "hub"), "eval_data": ("", "hub")}
        for key, words in known.items():
            value, flag = getattr(self, key), f"--{key.replace('_', '-')}"
            if value not in words and not resolve(value).exists():
                others = ", ".join(word for word in words if word)
                raise ValueError(f"{flag}={value}: no such file or folder, nor one of {others}")
            if key != "data" and value and self.data != "world":
                raise ValueError(f"{flag} and --data take two commands: text is prepared by itself")
        if self.eval_data not in ("", "hub") and not resolve(self.eval_data).is_dir():
            raise ValueError(f"--eval-data={self.eval_data} must be a folder, or hub")
        self.source = self.source or self.default_source()
        check_name(self.source, "--source")
        if self.source in ("eval", "downloads") or (self.conversations and self.source == "world"):
            raise ValueError(f"--source={self.source} is a folder with another use: take another")

    @property
    def kind(self) -> str:
        """Return where the text is from: world, hub or own."""
        return "hub" if self.data in HUB else "world" if self.data == "world" else "own"

    def default_source(self) -> str:
        """Derive the folder below data/: a fixed name, or the path's name in plain letters."""
        if "hub" in (self.conversations, self.kind):
            return "chat" if self.conversations else HUB[self.data][0]
        if self.kind == "world" and not self.conversations:
            return "world"
        path = resolve(self.conversations or self.data)
        plain = unicodedata.normalize("NFKD", path.name.split(".")[0].lower())
        plain = plain.encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        slug = slug or "text-" + hashlib.sha256(str(path).encode()).hexdigest()[:6]
        return f"{slug}-files" if slug in RESERVED else slug


# 2. Documents --------------------------------------------------------------------------------

# The text of the world and of own files takes this way: documents of any length are cut to
# pieces of at most --doc-chars characters, which a Sorter brings into the order of their hashes.
# The first --val-percent of the hashes are validation text; the rest fills training shards of
# --shard-mb. At the default settings the world is one shard of 28 MB and 1,300 documents in
# val.parquet. No step holds more than BUCKET_BYTES of text in memory.

# Where a long document is cut, best first: chapters and headings, paragraphs, lines, sentences.
CUTS = (
    ("\n# ", "\n## ", "\n = ", "\nCHAPTER ", "\nChapter ", "\n\n\n", "\f"),
    ("\n\n",),
    ("\n",),
    (". ", "! ", "? ", '." ', "。", "！", "？", "। ", "؟ "),
    (" ", "\u3000"),
)
BUCKET_BYTES = 1 << 26  # text in memory at once, and in one file to be sorted


def cut_point(text: str, start: int, window: int) -> int:
    """Find where to end a piece of text[start:] of at most `window` characters."""
    end, half = start + window, start + window // 2
    for marks in CUTS:
        found = max((at, mark) for mark in marks for at in [text.rfind(mark, half, end)])
        if found[0] > half:
            at, mark = found
            # a heading begins the next piece; other marks end this one
            return at + (1 if mark[0] == "\n" and mark.strip() else len(mark))
    while end > half and (unicodedata.combining(text[end]) or "\u200d" in text[end - 1 : end + 1]):
        end -= 1  # an accent or a joined emoji stays with its letter
    return end


def cut_pieces(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """Cut streamed text into pieces of at most `limit` characters; joined they are the text."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > 2 * limit:
            end = cut_point(rest, start, limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while len(rest) > limit:  # the last two or three pieces are of similar length
        end = cut_point(rest, 0, min(limit, len(rest) * 5 // 8))
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


class Sorter:
    """Sort documents by a hash of seed and text: a shuffle in bounded memory, without duplicates.

    The first bits of the hash choose a bucket, which is a file below `folder`; the buckets are
    then sorted one by one. On the disk they take as much as the text.
    """

    def __init__(self, folder: Path, seed: int, expected_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.key = folder, f"nanochat {seed}".encode()
        count = max(1, min(4096, expected_bytes // BUCKET_BYTES))
        self.buckets = [bytearray() for _ in range(count)]
        self.bytes_in_memory = 0
        self.least, self.greatest = b"\xff", b""  # hashes of the first and the last document
        self.count = self.duplicates = self.total_chars = 0

    def add(self, text: str) -> None:
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=self.key).digest()
        bucket = self.buckets[int.from_bytes(key[:4], "big") * len(self.buckets) >> 32]
        bucket += key + len(data).to_bytes(8, "big") + data
        self.least, self.greatest = min(self.least, key), max(self.greatest, key)
        self.total_chars += len(text)
        self.count += 1
        self.bytes_in_memory += len(data)
        if self.bytes_in_memory >= BUCKET_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, bucket in enumerate(self.buckets):
            if bucket:
                with open(self.folder / f"{number:04d}", "ab") as file:
                    file.write(bucket)
                bucket.clear()
        self.bytes_in_memory = 0

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Yield (hash, text) in the order of the hashes, each text once; the files go."""
        self.flush()
        for path in sorted(self.folder.iterdir()):
            before = b""
            for key, data in sorted(self._records(path)):
                if key == before:
                    self.duplicates += 1
                else:
                    yield key, data.decode()
                before = key
            path.unlink()

    @staticmethod
    def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
        with open(path, "rb") as file:
            while head := file.read(24):  # 16 bytes of hash, 8 of length
                yield head[:16], file.read(int.from_bytes(head[16:], "big"))


def split_documents(sorter: Sorter, settings: Settings) -> tuple[Iterator[str], Iterator[str]]:
    """Return the validation texts, those of the smallest hashes, and then the training texts.

    Both have a text wherever there are two distinct ones, and share none. Read them in turn. Of
    few texts more than --val-percent are for validation: 20, or a tenth of them.
    """
    documents, least = sorter.documents(), min(20, max(1, sorter.count // 10))
    below = int(settings.val_percent / 100 * (1 << 128)).to_bytes(16, "big")
    first_train: list[str] = []

    def validation() -> Iterator[str]:
        taken = 0
        for number, (key, text) in enumerate(documents):
            full = number and taken >= settings.val_mb * 10**6
            if full or (number >= least and key >= below) or key == sorter.greatest:
                first_train.append(text)
                return
            taken += len(text.encode())
            yield text

    return validation(), chain(first_train, (text for _, text in documents))


def describe_shard(path: Path) -> dict[str, Any]:
    """Count a parquet file's documents, characters and bytes of text; size and sha256 of it."""
    entry: dict[str, Any] = {"documents": 0, "characters": 0, "bytes": 0}
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise Stop(f"{path} has no column `text`, only {names}: it cannot be trained on")
            for batch in file.iter_batches(columns=["text"]):
                text = batch.column(0)
                entry["documents"] += batch.num_rows
                entry["characters"] += pc.sum(pc.utf8_length(text)).as_py() or 0
                entry["bytes"] += pc.sum(pc.binary_length(text)).as_py() or 0
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise Stop(f"{path} is no whole parquet file ({reason}): delete it and run again")
    return entry | {"size": path.stat().st_size, "sha256": file_digest(path)}


def write_shard(path: Path, documents: Iterator[str], cap_bytes: float) -> dict[str, Any]:
    """Write documents until they hold cap_bytes of text or end; return the file's description."""
    schema = pa.schema([("text", pa.string())])
    written = 0
    with open(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while written < cap_bytes and (batch := list(islice(documents, 1000))):
            table = pa.table({"text": batch}, schema)
            writer.write_table(table)
            written += table.nbytes
    return describe_shard(path)


def write_splits(folder: Path, sorter: Sorter, settings: Settings) -> Files:
    """Write val.parquet, then the training shards; describe each file."""
    val, train = split_documents(sorter, settings)
    files = {"val.parquet": write_shard(folder / "val.parquet", val, float("inf"))}
    for number, text in enumerate(train):
        name = f"train-{number:05d}.parquet"
        cap_bytes = settings.shard_mb * 10**6
        files[name] = write_shard(folder / name, chain([text], train), cap_bytes)
    return files


class Progress:
    """One line of bytes done, rate and time left: rewritten on a terminal, else every 10 s."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = 0
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            now, tty = time.monotonic(), sys.stdout.isatty()
            if now - self.said < (0.2 if tty else 10):
                return
            self.said = now
            rate = max(1.0, self.done / (now - self.start))
            left = format_duration(max(0, self.total - self.done) / rate)
            line = f"prepare: {self.what} {self.done / 1e6:,.0f}/{self.total / 1e6:,.0f} MB"
            line = f"{line}  {rate / 1e6:.1f} MB/s  left {left}"
            print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty() and self.said > self.start:
            print("\r\x1b[K", end="", flush=True)  # what follows gets a line of its own


def check_space(need: int) -> None:
    """Raise Stop where the base directory's disk has less than `need` bytes free."""
    base_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base_dir()).free
    if free < need:
        raise Stop(
            f"{base_dir()}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free: free "
            "some space, set NANOCHAT_BASE_DIR, or take less data"
        )


# 3. Hub --------------------------------------------------------------------------------------

# hub_files lists a repository, fetch_files gets any of its files: several at once, each into a
# partial file beside its place, continued after a broken connection or a killed process, checked
# against the announced size and hash, then renamed. make_hub_text does so for shards of text,
# fetch_sets (section 5) for conversations and evaluation sets.

HUB_ADDRESS = "https://huggingface.co"
BLOCK_BYTES = 1 << 18  # read at once; what a cut connection may lose


@dataclass(frozen=True)
class Remote:
    """A file to fetch: where it is and what is known of it (size None, digest "": unknown)."""

    url: str
    size: int | None = None
    digest: str = ""  # sha256, or git's blob id, which has 40 digits


def file_digest(path: Path, like: str = "") -> str:
    """Hash a file as the hub does: sha256, or git's blob id where `like` has 40 digits."""
    state = hashlib.sha256()
    if len(like) == 40:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def size_of(path: Path) -> int:
    """Return a file's size, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def is_whole(path: Path, remote: Remote) -> bool:
    """True if a file has the announced size and hash, as far as these are known."""
    if not path.is_file() or remote.size not in (None, path.stat().st_size):
        return False
    return not remote.digest or file_digest(path, remote.digest) == remote.digest


class Busy(Exception):
    """The server cannot answer now: (reason, seconds to wait before the next try)."""


@dataclass
class Net:
    """How one server is asked. Only `endpoint` gets the token; redirects elsewhere do not.

    A server that is no hub has its mirror named by another `variable`, and gets no token.
    """

    endpoint: str = field(default_factory=lambda: os.environ.get("HF_ENDPOINT") or HUB_ADDRESS)
    tries: int = 8  # failures in a row without a byte gained
    timeout_s: float = 30.0
    stopping: threading.Event = field(default_factory=threading.Event)
    variable: str = "HF_ENDPOINT"
    answered: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add HF_TOKEN to a request of the endpoint; requests drops it when another host comes."""
        token = os.environ.get("HF_TOKEN", "").strip() if self.variable == "HF_ENDPOINT" else ""
        if token and (request.url or "").startswith(f"{self.endpoint}/"):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def open(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """Start one GET. Raises Busy where a later try may help, Stop where none will."""
        headers = {"Accept-Encoding": "identity", **(headers or {})}  # so that sizes are true
        options: dict[str, Any] = {"stream": True, "timeout": (10, self.timeout_s)}
        try:
            response = requests.get(url, headers=headers, auth=self.sign, **options)
        except (ValueError, requests.TooManyRedirects):
            raise Stop(f"{url} cannot be asked: is {self.variable} right?") from None
        self.answered = True
        code = response.status_code
        if code in (200, 206, 416):
            return response
        response.close()
        if code in (408, 429) or code >= 500:
            wait = response.headers.get("Retry-After", "")
            raise Busy(f"it answered {code}", min(600.0, float(wait) if wait.isdecimal() else 0))
        remedy = f"it is not there, or {self.variable} is not right"
        if code in (401, 403) and self.variable == "HF_ENDPOINT":
            remedy = "set HF_TOKEN to a token that may read it"
        raise Stop(f"{url} answered {code}: {remedy}")

    def retry(self, url: str, attempt: Callable[[], Out], gained: Callable[[], int] = int) -> Out:
        """Return attempt(), repeated while it raises Busy or loses the connection.

        Waits twice as long each time; a try that `gained` bytes starts the count anew. Raises Stop
        after the last try, or after two where the server has never answered: there is no network.
        """
        failures = 0
        while True:
            before, wait_s = gained(), 0.0
            try:
                return attempt()
            except Busy as error:
                reason, wait_s = error.args
            except requests.Timeout:
                reason = "no answer in time"
            except requests.RequestException:
                reason = "the connection broke"
            failures = 1 if gained() > before else failures + 1
            if failures == min(2, self.tries) and not self.answered:
                raise Stop(
                    f"{self.endpoint} cannot be reached: check the network or set {self.variable} "
                    "to a mirror; without one take --data=world, the embedded text, or "
                    "--data=PATH, your own files"
                )
            if failures == self.tries:
                raise Stop(f"{url} failed {failures} times in a row ({reason}): run the same "
                           "command again later to go on from here")  # fmt: skip
            delay_s = min(60, 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            if self.stopping.wait(max(delay_s, wait_s)):
                raise Stop("stopped")


def hub_files(net: Net, repo: str) -> dict[str, Remote]:
    """List a dataset repository's files by path, with the sizes and hashes the hub announces."""
    place = f"{net.endpoint}/datasets/{repo}/resolve/main"
    files: dict[str, Remote] = {}
    url = f"{net.endpoint}/api/datasets/{repo}/tree/main?recursive=true"

    def read_page() -> str:
        with net.open(url) as response:
            try:
                for item in response.json():
                    lfs, path = item.get("lfs") or item, item["path"]
                    if item.get("type", "file") == "file":
                        digest = (lfs.get("oid") or "").removeprefix("sha256:")
                        files[path] = Remote(f"{place}/{quote(path)}", lfs.get("size"), digest)
            except (ValueError, AttributeError, KeyError, TypeError):
                raise Stop(f"{url} answered something other than a list of files: is HF_ENDPOINT "
                           "right?") from None  # fmt: skip
            link = urlsplit(response.links.get("next", {}).get("url", ""))
        # a mirror may name the original host in the link: stay with the endpoint
        return urlunsplit((*urlsplit(net.endpoint)[:2], *link[2:])) if link.path else ""

    while url:
        url = net.retry(url, read_page)
    return files


def download(net: Net, remote: Remote, path: Path, progress: Progress) -> None:
    """Fetch a file whole and checked, or raise Stop; a later call continues a stopped one.

    Only a file whose hash is known beforehand is continued by another process.
    """
    key = hashlib.sha256(f"{remote.size} {remote.digest}".encode()).hexdigest()[:12]
    part = path.with_name(f".{path.name}.{key}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial"):
        if old != part or not remote.digest:
            old.unlink()  # of another version of the file
    size, etag = remote.size, ""

    def fetch_rest() -> None:
        nonlocal size, etag
        have = size_of(part)
        if size and have >= size:
            return
        with net.open(remote.url, {"Range": f"bytes={have}-"} if have else {}) as response:
            known, etag = etag, response.headers.get("ETag", "")
            span = response.headers.get("Content-Range", "")
            # without a hash to check, the rest must be of the same version
            resumes = response.status_code == 206 and span.startswith(f"bytes {have}-")
            resumes = resumes and bool(remote.digest or known == etag != "")
            if have and not resumes:
                part.unlink()
                progress.add(-have)
                have = 0
            if response.status_code != 200 and not resumes:
                raise Busy(f"it cannot go on from byte {have}", 0)
            size = remote.size or have + int(response.headers.get("Content-Length") or 0)
            with open(part, "ab") as file:
                for block in response.iter_content(BLOCK_BYTES):
                    file.write(block)
                    progress.add(len(block))
                    if net.stopping.is_set():
                        raise Stop("stopped")
        if size_of(part) < size:
            raise Busy("it cut the connection", 0)

    for _ in range(3):
        net.retry(remote.url, fetch_rest, lambda: size_of(part))
        if is_whole(part, remote):
            os.replace(part, path)
            return
        progress.add(-size_of(part))
        part.unlink()
    raise Stop(f"{remote.url} gave 3 times other bytes than the hub announces: try again later, "
               f"or another {net.variable}")  # fmt: skip


def fetch_files(
    wanted: dict[Path, tuple[Net, Remote]], what: str, workers: int, room: int = 1
) -> None:
    """Download files in threads; the first error stops all. The disk needs `room` times their size.

    The threads are daemons, so that Ctrl-C need not wait until a stalled read times out.
    """
    if not wanted:
        return
    total = sum(remote.size or 0 for _, remote in wanted.values())
    check_space(room * total)
    print(f"prepare: fetching {len(wanted)} files of {what}, {total / 1e6:,.0f} MB", flush=True)
    futures: dict[Path, Future[None]] = {path: Future() for path in wanted}
    todo = iter(list(futures.items()))
    stopping = next(iter(wanted.values()))[0].stopping  # one for all servers

    def work() -> None:
        for path, future in todo:
            if stopping.is_set():
                return
            try:
                download(*wanted[path], path, progress)
                future.set_result(None)
            except (Stop, Exception) as error:  # noqa: BLE001  raised again in the main thread
                future.set_exception(error)

    with contextlib.closing(Progress(what, total)) as progress:
        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:  # Ctrl-C too: the threads shall not go on
            stopping.set()
            raise


def make_hub_text(settings: Settings, net: Net, folder: Path) -> Files:
    """Fetch the first shards of a hub repository, and its last one for validation.

    What lies there stays as it is until all is there: a new shard waits under the name unused-...,
    as do those beyond --shards, which may be wanted again.
    """
    repo = HUB[settings.data][1]
    remotes = hub_files(net, repo)
    shards = [remotes[name] for name in sorted(remotes) if re.search(r"shard_\d+\.parquet$", name)]
    if not shards:
        raise Stop(f"{net.endpoint} lists no shards of {repo}: is HF_ENDPOINT right?")
    if settings.shards >= len(shards):
        raise Stop(f"{repo} has {len(shards) - 1} train shards: --shards={len(shards) - 1} at most")
    wanted = {f"train-{i:05d}.parquet": shards[i] for i in range(settings.shards)}
    wanted["val.parquet"] = shards[-1]
    lies: dict[str, Path] = {}
    missing: dict[Path, tuple[Net, Remote]] = {}
    for name, remote in wanted.items():
        beside = folder / f"unused-{name.removeprefix('train-')}"
        lies[name] = folder / name if is_whole(folder / name, remote) else beside
        if lies[name] == beside and not is_whole(beside, remote):
            missing[beside] = net, remote
    fetch_files(missing, repo, settings.workers)
    with ThreadPoolExecutor(settings.workers) as pool:
        files = dict(zip(wanted, pool.map(describe_shard, lies.values())))
    (folder / "manifest.json").unlink(missing_ok=True)  # written again at once
    for path in folder.glob("train-*.parquet"):
        if path.name not in wanted:
            os.replace(path, path.with_name(path.name.replace("train-", "unused-")))
    for name, path in lies.items():
        os.replace(path, folder / name)
    return files


# 4. Own files --------------------------------------------------------------------------------

# What people have, in any layout: OwnFiles finds the files below a path and reads each of them
# once, as text (documents) or as conversations (section 5). What cannot be used is left out,
# counted by reason with the first place it was met at, and said at the end; nothing stops.

TEXT_SUFFIXES = """
 txt text md markdown json csv tsv rst org adoc tex bib srt vtt log html htm xml svg py pyi js mjs
 jsx ts tsx css scss c h cc cpp cxx hpp cu cuh java kt scala go rs rb php pl pm lua r jl m swift cs
 fs hs ml mli ex exs erl clj lisp el scm sh bash zsh fish ps1 bat sql yaml yml toml ini cfg conf
 cmake mk proto graphql vue svelte dart zig nim v sv vhd vhdl asm s f f90 pas d tcl diff
"""
COLUMNS = ("text", "content")  # of records, the first that is there
FILE_KINDS = {".parquet": ".table", ".arrow": ".table", ".json": ".json", ".jsonl": ".jsonl",
         ".ndjson": ".jsonl"}  # fmt: skip
PACKED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
}  # fmt: skip
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
              pa.types.is_large_binary)  # fmt: skip
LINE_CHARS = 1 << 25  # the longest line of .jsonl, or value of an array, that is read
LFS = b"version https://git-lfs"  # how a file begins that stands for one in Git LFS


def file_kind(path: Path) -> str:
    """Return .table, .json, .jsonl or .txt by a file's name without .gz, "" where it is none."""
    name = path.name.lower()
    name = name.removesuffix(next(filter(name.endswith, PACKED), ""))
    suffix = os.path.splitext(name)[1]
    plain = not suffix or suffix[1:] in TEXT_SUFFIXES.split()
    return FILE_KINDS.get(suffix, ".txt" if plain else "")


def sniff_encoding(head: bytes) -> str:
    """Return the encoding of text that begins with `head`, "" where it is not known."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    wrong, other = text.count("\ufffd"), len(re.findall("[\0-\x06\x0e-\x1a\x7f]", text))
    right = len(re.findall("[^\0-\x7f\ufffd]", text))
    if wrong > max(2, right, len(text) / 300) and not other:  # more than some damage
        detector: Any = getattr(requests.compat, "chardet", None)  # the one that requests brings
        if detector and (guess := detector.detect(head)["encoding"]):
            return guess
    return "utf-8-sig" if (wrong + other) * 10 <= len(text) + 10 else ""


def clean(text: str) -> str:
    """Return text with plain line ends, without NULs, outer blanks and halves of characters.

    The indentation of a first line stays: it means something in a program.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.replace("\0", "").rstrip())
    text = text if text[:1] == "\t" or text[:2].isspace() else text.lstrip()
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def present(row: dict[str, Any], *names: str) -> Any:
    """Return the first of a row's fields that is there and not null, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def stream_values(text: IO[str], start: str = "") -> Iterator[Any]:
    """Yield the values of a JSON array, or a value without one; `start` of it was read before.

    At most LINE_CHARS are in memory. Raises ValueError where a value or the array does not end.
    """
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    more = read = start or text.read(1 << 16)
    at = len(read) - len(read.lstrip())
    in_array = read.startswith("[", at)
    at += in_array
    while True:
        at += len(skip.match(read, at)[0])  # type: ignore[index]  # it matches everywhere
        if read.startswith("]", at) if in_array else at == len(read) and not more:
            return
        end = 0
        with contextlib.suppress(ValueError, RecursionError):
            value, end = decode(read, at)
        if end and (end < len(read) or not more):
            yield value
            at = end
        elif not more or len(read) - at > LINE_CHARS:
            raise ValueError("it does not end")
        else:
            more = text.read(1 << 20)  # the value may go on there
            read, at = read[at:] + more, 0


def is_array(value: Any) -> bool:
    """True if a value is a list of records, and not the messages of one conversation."""
    records = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return records and not any(present(one, "role", "from") for one in value)


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored, whatever bytes its names have."""
    return os.fsencode(path).decode("utf-8", "replace")


def drop(dropped: Dropped, reason: str, place: str = "", count: int = 1) -> None:
    """Count what is left out or mended; the manifest keeps the count and the first place."""
    if count:
        dropped.setdefault(reason, [0, place])[0] += count


def left_out(dropped: Dropped, form: str) -> str:
    """List what was left out or mended, most first, in the form's braces; "" where it is none."""
    counts = sorted(dropped.items(), key=lambda pair: -pair[1][0])
    said = (f"{n:,} {reason}" + f" ({place})" * bool(place) for reason, (n, place) in counts)
    return form.format("left out or mended: " + ", ".join(said)) if dropped else ""


class OwnFiles:
    """The files of some kinds below a path, and what was left out of them."""

    def __init__(self, root: Path, encoding: str = "", with_text: bool = True) -> None:
        self.root, self.encoding = root, encoding
        self.kinds = {*FILE_KINDS.values(), *[".txt"] * with_text}
        self.dropped: Dropped = {}
        self.unknown_bytes = 0  # of files in an encoding that is not known
        found = [root] if root.is_file() else sorted(self.find_files())
        self.files = {path: path.stat() for path in found}

    def drop(self, reason: str, place: Path | str, detail: str = "") -> None:
        place = printable(os.path.relpath(place, self.root.parent))
        drop(self.dropped, reason, f"{place}: {detail}" if detail else place)

    def find_files(self) -> Iterator[Path]:
        """Yield the files to read: no hidden ones, no loops of links, not what is written here."""
        seen = {os.path.realpath(base_dir())}

        def unreadable(error: OSError) -> None:
            self.drop("unreadable folders", error.filename)

        for folder, folders, names in os.walk(self.root, onerror=unreadable, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            inner = {name for name in folders if name[0] != "."}
            for path in (Path(folder, name) for name in folders + names if name not in inner):
                if path.name[0] == ".":
                    self.drop("hidden files and folders", path)
                elif not os.path.isfile(path):
                    self.drop("broken links and special files", path)
                elif file_kind(path) not in self.kinds:
                    self.drop("files of other kinds", path)
                else:
                    yield path
            folders[:] = sorted(inner)

    def size(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def expected_bytes(self) -> int:
        """Guess the size of the text: packed files hold about four times theirs."""
        packed = (*PACKED, ".parquet")
        extra = (i.st_size for p, i in self.files.items() if p.suffix.lower() in packed)
        return self.size() + 3 * sum(extra)

    def fingerprint(self) -> str:
        """Hash the files' names and contents, wherever they lie: changed input is prepared anew."""
        whole = hashlib.sha256()
        for path in sorted(self.files):
            name = printable(os.path.relpath(path, self.root))
            with contextlib.suppress(OSError):  # what cannot be read is left out, and said
                whole.update(f"{name}\0{crc32(path)}\0".encode())
        return whole.hexdigest()

    def read(self, records: Callable[[Path, Any], Iterator[Out]]) -> Iterator[Out]:
        """Yield what records(path, file) yields of each file; damaged files are counted."""
        print(f"prepare: reading {len(self.files)} files, {self.size() / 1e6:,.1f} MB", flush=True)
        done = 0
        with contextlib.closing(Progress("reading", self.size())) as progress:
            for path, info in self.files.items():
                if not info.st_size:
                    self.drop("empty files", path)
                try:
                    with open(path, "rb") as raw:
                        if raw.peek(len(LFS)).startswith(LFS):
                            self.drop("Git LFS pointers, whose files `git lfs pull` gets", path)
                            continue
                        unpack = PACKED.get(path.suffix.lower(), contextlib.nullcontext)
                        with unpack(raw) as file:
                            for record in records(path, file) if info.st_size else ():
                                yield record
                                now = done + (0 if raw.closed else raw.tell())
                                progress.add(now - progress.done)
                except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException):
                    self.drop("damaged or unreadable files", path)
                done += info.st_size

    def open_text(self, path: Path, file: Any) -> IO[str]:
        """Open a file in the encoding it seems to have, as an empty one where it is no text."""
        file = io.BufferedReader(file, 1 << 14)
        head = file.peek(1 << 14)
        encoding = sniff_encoding(head)
        if not encoding and b"\0" in head:
            self.drop("binary files", path)
            return io.StringIO()
        if not encoding.startswith("utf-"):
            encoding = self.encoding or encoding
            if not encoding:
                self.drop("files in an unknown encoding (--encoding=NAME says it)", path)
                self.unknown_bytes += path.stat().st_size
                return io.StringIO()
            self.drop(f"files read as {encoding}, not UTF-8 (--encoding=NAME sets it)", path)
        return io.TextIOWrapper(file, encoding, "replace")

    def documents(self, limit: int, ends: Sequence[str] = ()) -> Iterator[str]:
        """Yield the clean documents of all files, each at most `limit` characters long.

        A line that is one of `ends` stands between two documents.
        """
        for path, piece in self.read(partial(self._pieces, limit, ends)):
            if text := clean(piece):
                if "\ufffd" in text:
                    self.drop("documents with invalid characters replaced", path)
                yield text
            else:
                self.drop("empty documents", path)

    def _pieces(
        self, limit: int, ends: Sequence[str], path: Path, file: Any
    ) -> Iterator[tuple[Path, str]]:
        for lines in self._texts(path, file):
            for is_end, group in itertools.groupby(lines, key=lambda line: line.strip() in ends):
                if not is_end:
                    yield from ((path, piece) for piece in cut_pieces(group, limit))

    def _texts(self, path: Path, file: Any) -> Iterator[Iterable[str]]:
        """Yield the lines of each text of a file: of the whole file, or of its records."""
        kind = file_kind(path)
        if kind == ".table":
            values = self.table(path, file, COLUMNS)
        else:
            text = self.open_text(path, file)
            if kind == ".txt" or (kind == ".json" and not self.has_records(text)):
                yield iter(partial(text.readline, 1 << 20), "")
                return
            values = self.json_values(path, text)
        for place, value in values:
            value = present(value, *COLUMNS) if isinstance(value, dict) else value
            if isinstance(value, str):
                yield value.splitlines(keepends=True) or [""]
            else:
                self.drop("records without `text` or `content`", place)

    def has_records(self, text: IO[str]) -> bool:
        """True if one of the first values of a .json file, or of its array, is a record of text."""
        found = False
        with contextlib.suppress(ValueError):
            for value in islice(stream_values(text), 20):
                found |= isinstance(value, dict) and isinstance(present(value, *COLUMNS), str)
        text.seek(0)
        return found

    def values(self, path: Path, file: Any) -> Iterator[tuple[str, Any]]:
        """Yield (place, value) of each row of a table, or value of JSON."""
        if file_kind(path) == ".table":
            return self.table(path, file)
        return self.json_values(path, self.open_text(path, file))

    def json_values(self, path: Path, text: IO[str]) -> Iterator[tuple[str, Any]]:
        """Yield (place, value) of lines of JSON; the records of an array one by one."""
        line, number = "\n", 0
        while line and not line.strip():
            line, number = text.readline(LINE_CHARS), number + 1
        try:
            json.loads(line or "0")
        except (ValueError, RecursionError):
            if line[0] == "[" or (line[0] == "{" and file_kind(path) == ".json"):  # over many lines
                count = 0
                try:
                    for count, value in enumerate(stream_values(text, line), 1):
                        yield f"{path}: record {count}", value
                except ValueError:
                    self.drop("lines of broken JSON", f"{path}: after record {count}")
                return
        while line:
            place = f"{path}:{number}"
            if len(line) == LINE_CHARS and line[-1] != "\n":
                self.drop("lines that are too long", place)
                while (rest := text.readline(LINE_CHARS)) and rest[-1] != "\n":
                    pass
            elif line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    self.drop("lines of broken JSON", place)
                else:
                    yield from ((place, one) for one in (value if is_array(value) else [value]))
            line, number = text.readline(LINE_CHARS), number + 1

    def table(
        self, path: Path, file: Any, columns: Sequence[str] = ()
    ) -> Iterator[tuple[str, Any]]:
        """Yield (place, row) of a table, or the text of the first of `columns` that it has."""
        if ".parquet" in path.name.lower():
            table: Any = pq.ParquetFile(file)
            schema, batches = table.schema_arrow, table.iter_batches(batch_size=64)
        else:  # Arrow's own format, as a file or a stream
            try:
                table = pa.ipc.open_file(file)
                batches = map(table.get_batch, range(table.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                table = batches = pa.ipc.open_stream(file)
            schema = table.schema
        name = next((name for name in columns if name in schema.names), "")
        if columns and not name:
            has = ", ".join(schema.names[:8])
            return self.drop(f"tables without `text` or `content` (has {has})", path)
        if name and not any(is_text(schema.field(name).type) for is_text in TEXT_TYPES):
            return self.drop(f"tables whose `{name}` is {schema.field(name).type}, no text", path)
        for batch in batches:
            if name:
                texts = batch.column(name).cast(pa.large_binary()).to_pylist()
                rows = [text and text.decode("utf-8", "replace") for text in texts]
            else:
                rows = batch.to_pylist()
            yield from ((str(path), row) for row in rows)


def make_own_text(settings: Settings, files: OwnFiles, folder: Path) -> Manifest:
    """Write shards of the user's files to `folder`."""
    size = files.expected_bytes()
    check_space(size * 3 // 2)
    sorter = Sorter(folder / "buckets", settings.seed, size)
    # so that even a short text has 200 documents, of which 20 are for validation
    limit, ends = min(settings.doc_chars, max(200, size // 200)), settings.document_ends.split(",")
    for text in files.documents(limit, ends):
        sorter.add(text)
    if files.unknown_bytes * 2 > files.size():
        raise MissingInput(f"most of {files.root} cannot be read{left_out(files.dropped, ' ({})')}")
    if sorter.least >= sorter.greatest:  # none or one, however often it came
        what = f"only {sorter.total_chars:,} characters of text" if sorter.count else "no text"
        raise MissingInput(
            f"{files.root} holds {what} that can be used{left_out(files.dropped, ' ({})')}; "
            "training and validation need two documents, better a million characters"
        )
    made = write_splits(folder, sorter, settings)
    drop(files.dropped, "duplicates", count=sorter.duplicates)
    return {"files": made, "dropped": files.dropped}


# 5. Conversations and evaluation sets --------------------------------------------------------

# A row of any of these forms becomes a conversation of common.py's form, or a graded item: that
# ends with a user's message, and has what grades the reply and, in `reply`, a right one. mid and
# sft train on conversations (a graded item with its reply), rl on graded items without a reply.
# data/eval/ has the graded items of the public sets; no question of theirs is trained on.

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
# Fields of known forms that change what a row or a turn means, and that a chat cannot say here.
MEANT = {
    "tools": "tools that are not the calculator", "functions": "tools that are not the calculator",
    "tool_calls": "call of a tool that is not the calculator",
    "function_call": "call of a tool that is not the calculator",
    "images": "pictures or sound", "image": "pictures or sound", "audio": "pictures or sound",
    "audios": "pictures or sound", "videos": "pictures or sound", "refusal": "refusal of a reply",
    "reasoning_content": "reasoning beside the reply", "reasoning": "reasoning beside the reply",
    "thinking": "reasoning beside the reply", "history": "turns in a field of their own",
}  # fmt: skip
LETTERS = "ABCDE"  # of the public sets' choices
PLAIN_NUMBER = re.compile(rf"\s*(?:{NUMBER.pattern})\s*[%.]?\s*")


def read_content(content: Any, role: str) -> str | list[dict[str, str]]:
    """Check a message's content, text or parts. Raises ValueError(reason, detail)."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        kinds = [str(part.get("type")) for part in parts]
        for kind, part in zip(kinds, parts):
            if kind not in ("text", "python", "output") or not isinstance(part.get("text"), str):
                raise ValueError("part that is no text", kind[:40])
        if set(kinds) <= {"text"}:
            content = "\n".join(part["text"] for part in parts)
        else:  # outer blanks of a part belong to it
            texts = [clean(f"|{part['text']}|")[1:-1] for part in parts]
            parts = [{"type": kind, "text": text} for kind, text in zip(kinds, texts)]
            pairs = [(a["text"], b["text"]) for a, b in itertools.pairwise(parts)
                     if a["type"] == "python" and b["type"] == "output"]  # fmt: skip
            counts = [kinds.count("python"), kinds.count("output")]
            if role != "assistant" or counts != [len(pairs)] * 2:
                raise ValueError("tool call without its output")
            if any(calculate(call) != output for call, output in pairs):
                raise ValueError("tool call whose output is not the calculator's")
            return parts
    text = clean(content) if isinstance(content, str) else None
    if not text:
        raise ValueError("message without text" if text is None else "empty message")
    return text


def check_meaning(row: dict[str, Any]) -> None:
    """Raise ValueError(reason, field) where a field says what would be lost."""
    for name, reason in MEANT.items():
        if row.get(name):
            raise ValueError(reason, name)
    if row.get("label") is False:  # of preferences
        raise ValueError("reply that is marked as bad", "label")


def check_weight(row: dict[str, Any], allowed: tuple) -> Any:
    """Return how much a row or turn is to count: OpenAI's field, and others' of this meaning."""
    weight = present(row, "weight", "train", "loss")
    if weight not in allowed:
        raise ValueError("weight that the loss does not have", str(weight)[:40])
    return weight


def read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Read a message of any spelling. Raises ValueError(reason, detail)."""
    check_meaning(turn)
    said = str(present(turn, "role", "from"))
    if said not in ROLES:
        raise ValueError("role that is not system, user or assistant", said[:40])
    if turn.get("name"):
        raise ValueError("speaker with a name of its own", str(turn["name"])[:40])
    role = ROLES[said]
    content = read_content(present(turn, "content", "value"), role)
    message: dict[str, Any] = {"role": role, "content": content}
    weight = check_weight(turn, (None, 0, 1) if role == "assistant" else (None, 0))
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return message


def find_turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a conversation, or those of a question and its reply in two fields."""
    turns = present(row, "messages", "conversations", "conversation")
    asked = present(row, "prompt", "instruction", "question")
    said = present(row, "completion", "response", "output", "answer")
    more = present(row, "input", "context") or ""
    pair = all(isinstance(text, str) for text in (asked, said, more))
    if turns is None and pair and not row.get("choices") and not row.get("options"):
        asked = f"{asked}\n\n{more}" if more else asked
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    turns = list(turns) if isinstance(turns, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("no list of messages")
    if system := present(row, "system", "system_prompt"):
        if ROLES.get(str(present(turns[0], "role", "from"))) == "system":
            raise ValueError("two system prompts")
        turns.insert(0, {"role": "system", "content": system})
    return turns


def read_conversation(value: Any, mend: Callable[[str], Any] = lambda reason: None) -> Item:
    """Read a conversation in the spelling of OpenAI, ShareGPT, a bare list, or of this project.

    A problem of GSM8K's form, with `question` and `answer`, becomes a graded item with its reply.
    mend is told of turns that are left out. Raises ValueError(reason, detail) where there is
    nothing to learn, or where the meaning of a field would be lost.
    """
    row = value if isinstance(value, dict) else {"messages": value}
    check_meaning(row)
    kind = row.get("kind")
    kind = kind if isinstance(kind, str) and kind else ""
    if "####" in str(row.get("answer")) and present(row, "messages", "conversations") is None:
        texts = {key: str(read_content(row.get(key), "user")) for key in ("question", "answer")}
        return {**gsm8k_item(texts), "kind": kind or "problem"}
    check_weight(row, (None, 1))
    messages = [read_turn(turn) for turn in find_turns(row)]
    graded = row.get("grade") in ("number", "letter", "text")
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    while not graded and turns and turns[0]["role"] == "assistant":
        turns.pop(0)
        mend("replies before the first question")
    while not graded and turns and turns[-1]["role"] == "user":
        turns.pop()
        mend("questions without a reply")
    roles = [turn["role"] for turn in turns]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError("roles out of order", " ".join(roles)[:40])
    replies = [turn for turn in turns if turn["role"] == "assistant" and "weight" not in turn]
    if not graded and not replies:
        raise ValueError("no reply to learn from")
    if graded and (not roles or roles[-1] != "user"):
        raise ValueError("graded reply")
    item = {"kind": kind or "own", "messages": head + turns}
    return item | read_grade(row) if graded else item


def read_grade(row: dict[str, Any]) -> dict[str, Any]:
    """Check what replies are graded by: nothing may make all right. Raises ValueError(reason)."""
    texts = {key: row.get(key, []) for key in ("accept", "reject", "choices")}
    for key, some in texts.items():
        if not isinstance(some, list) or not all(isinstance(t, str) and clean(t) for t in some):
            raise ValueError("problem with something other than a list of texts", key)
    texts = {key: [clean(text) for text in some] for key, some in texts.items() if some}
    answer = row.get("answer", "")
    answer = clean(answer if isinstance(answer, str) else calculate(json.dumps(answer)))
    right = {"number": PLAIN_NUMBER.fullmatch(answer), "letter": re.fullmatch("[A-Z]", answer),
             "text": texts.get("accept")}  # fmt: skip
    if not right[row["grade"]] or (row["grade"] != "text" and "accept" in texts):
        raise ValueError("problem without its answer")
    return {"grade": row["grade"], "answer": answer, **texts}


def user_asks(text: str, **graded: Any) -> Item:
    """Return a graded item of one question."""
    return {"messages": [{"role": "user", "content": text}], **graded}


def letter_item(question: str, choices: Sequence[str], right: int) -> Item:
    """Make a graded item of a question with choices, in training and in evaluation alike.

    The letter stands behind its choice, where copying what follows finds it, and in parentheses,
    where it is the same token as in the answer.
    """
    choices = [" ".join(choice.split()) for choice in choices]
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= right < len(choices):
        raise ValueError("choices without their answer")
    lines = [f"- {choice} ({letter})" for choice, letter in zip(choices, LETTERS)]
    text = "\n".join([question.strip(), *lines, "Answer with the letter alone."])
    letter = LETTERS[right]
    return user_asks(text, choices=choices, grade="letter", answer=letter, reply=letter)


def mmlu_item(row: dict[str, Any]) -> Item:
    """Read a row of MMLU, of a table or of a .csv file."""
    choices = row.get("choices") or [row[f"choice{i}"] for i in range(4)]
    return letter_item(row["question"], choices, int(row["answer"]))


def arc_item(row: dict[str, Any]) -> Item:
    """Read a row of ARC, whose labels are letters or numbers."""
    labels = list(row["choices"]["label"])
    return letter_item(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def gsm8k_item(row: dict[str, Any]) -> Item:
    """Read a row of GSM8K: its marks <<16-3=13>> become calls of the tool, with their outputs."""
    solution, _, answer = row["answer"].rpartition("####")
    reply: list[dict[str, str]] = []
    text = ""
    for i, piece in enumerate(re.split("<<(.*?)>>", solution.strip())):
        call, _, result = piece.partition("=")
        call = call.strip().lstrip("+")
        output = calculate(call) if i % 2 else "error"  # every other piece is a mark
        if not i % 2:
            text += piece
        elif output == last_number(result) != "":
            reply += [{"type": "text", "text": text}] if text else []
            reply += [{"type": "python", "text": call}, {"type": "output", "text": output}]
            text = ""
    number = last_number(answer)
    if not PLAIN_NUMBER.fullmatch(answer):
        raise ValueError("problem whose answer is no plain number", answer.strip()[:40])
    reply.append({"type": "text", "text": f"{text}\nThe answer is {number}."})
    return user_asks(row["question"].strip(), grade="number", answer=number, reply=reply)


def humaneval_item(row: dict[str, Any]) -> Item:
    """Read a row of HumanEval: a function to complete, and its tests."""
    task = "Complete this Python function. Answer with the whole of it in a code block."
    reply = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return user_asks(
        f"{task}\n\n```python\n{row['prompt'].strip()}\n```", grade="code", answer="",
        prompt=row["prompt"], tests=row["test"], entry_point=row["entry_point"], reply=reply,
    )  # fmt: skip


HONEST = ["I cannot", "I can't", "I am too small", "I don't know", "I do not know"]


def people_item(row: dict[str, Any]) -> Item:
    """Read {"question", "answer", "kind"} as a graded item: no answer stands for an honest no."""
    answer, kind = row["answer"], row.get("kind", "people")
    if answer is None:
        return user_asks(row["question"], grade="text", answer="I cannot", accept=HONEST, kind=kind)
    if PLAIN_NUMBER.fullmatch(answer):
        kind += f", {'one step' if row['steps'] == 1 else 'more steps'}" if "steps" in row else ""
        return user_asks(row["question"], grade="number", answer=answer, kind=kind)
    return user_asks(row["question"], grade="text", answer=answer, accept=[answer], kind=kind)


COUNT_LETTERS = """
How many times does the letter {l} occur in the word {w}? | How many {l} are in {w}? |
How many times is {l} in "{w}"? | Count the letter {l} in {w}. | How often does {w} have a {l}? |
In the word "{w}", how many letters are {l}? | Tell me how many {l} there are in {w}. |
What is the number of {l} in {w}?"""
SPELL_OUT = """
How do you spell {w}? | Spell the word {w}. | Spell "{w}" letter by letter. |
Which letters does the word {w} consist of? | Write {w} one letter at a time."""


def count_letters(rng: random.Random, word: str) -> Item:
    """Ask how often a letter is in a word; the reply spells it and lets the tool count."""
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    asked = rng.choice(items(COUNT_LETTERS, "|")).format(l=letter, w=word)
    count = word.count(letter)
    there = f"There is 1 {letter}" if count == 1 else f"There are {count} {letter}'s"
    reply = [{"type": "text", "text": f"The word {word} is spelled {'-'.join(word)}. "},
             *tool_parts(f"'{word}'.count('{letter}')"),
             {"type": "text", "text": f" {there} in {word}."}]  # fmt: skip
    return {"kind": "spelling"} | user_asks(asked, grade="number", answer=str(count), reply=reply)


def spell_out(rng: random.Random, word: str) -> Item:
    """Ask for a word's letters."""
    asked, spelled = rng.choice(items(SPELL_OUT, "|")).format(w=word), "-".join(word)
    graded = {"grade": "text", "answer": "", "accept": [spelled], "reply": f"{spelled}."}
    return {"kind": "spelling"} | user_asks(asked, **graded)


def solved(item: Item) -> Item:
    """Return a graded item as the conversation in which it is answered, others as they are."""
    if "grade" not in item:
        return item
    reply = {"role": "assistant", "content": item["reply"]}
    return {"kind": item["kind"], "messages": [*item["messages"], reply]}


@dataclass(frozen=True)
class HubSet:
    """A data set: what evaluation calls it, where it is on the hub and in folders laid out by hand.

    In the patterns {} is the name of a split.
    """

    title: str
    repo: str
    pattern: str  # below the repository
    by_hand: str  # below a folder of one's own
    train: str  # names of the splits, "" for none
    val: str
    test: str
    read: Callable[[Any], Item]


SETS = {
    "smoltalk": HubSet("SmolTalk", "HuggingFaceTB/smol-smoltalk", "data/{}-*.parquet",
                       "smoltalk/{}.jsonl*", "train", "test", "", read_conversation),
    "mmlu": HubSet("MMLU", "cais/mmlu", "all/{}-*.parquet",
                   "mmlu/{}/*.csv", "auxiliary_train", "validation", "test", mmlu_item),
    "arc-easy": HubSet("ARC-Easy", "allenai/ai2_arc", "ARC-Easy/{}-*.parquet",
                       "arc/ARC-Easy/{}.json*", "train", "validation", "test", arc_item),
    "arc-challenge": HubSet("ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge/{}-*.parquet",
                            "arc/ARC-Challenge/{}.json*", "train", "validation", "test", arc_item),
    "gsm8k": HubSet("GSM8K", "openai/gsm8k", "main/{}-*.parquet",
                    "gsm8k/{}.jsonl*", "train", "", "test", gsm8k_item),
    "humaneval": HubSet("HumanEval", "openai/openai_humaneval", "openai_humaneval/{}-*.parquet",
                        "humaneval/HumanEval.jsonl*", "", "", "test", humaneval_item),
}  # fmt: skip
# Two files from elsewhere; NANOCHAT_MIRROR names a place that has both.
PLAIN_FILES = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com",  # CORE
    "words_alpha.txt":
        "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master",
}  # fmt: skip
OF_A_TEST = "questions of the evaluation sets"
SPELLING_BEE = 500  # words of the evaluation set
REST = sys.maxsize
FILES = ("mid", "sft", "rl", "val")
# Conversations of each kind in FILES. Rows of a split that are counted are taken out by a hash;
# REST takes all others. The rows of val are of the validation split where there is one.
MIXTURE = {
    "smoltalk": (REST, 10_000, 0, 2_000),  # 460,341 rows, of val 24,229
    "mmlu": (REST, 0, 0, REST),  # 99,842 rows, of val 1,531
    "arc-easy": (0, REST, 0, REST),  # 2,251 rows, of val 570
    "arc-challenge": (0, REST, 0, REST),  # 1,119 rows, of val 299
    "gsm8k": (REST, REST, REST, 200),  # 7,473 rows; those of rl without the solution
    "spelling": (280_000, 600, 0, 300),
    "identity": (2_000, 1_000, 0, 100),
}


def find_set(root: Path, name: str, split: str) -> list[Path]:
    """List the files of a set's split below a folder, [] where it has none."""
    about = SETS[name]
    hub = f"{about.repo}/{about.pattern}"
    for place in (hub, hub.partition("/")[2], about.by_hand, f"eval/{about.by_hand}"):
        if split and (paths := sorted(root.glob(place.format(split)))):
            return paths
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a .parquet, .csv, .json, .jsonl or packed .jsonl.gz file."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(1024):
                    yield from batch.to_pylist()
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
            elif path.suffix == ".json":
                yield from json.load(file)
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (
        pa.ArrowException, gzip.BadGzipFile, EOFError, zlib.error, ValueError, csv.Error
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0]
        raise Stop(f"{path} is damaged ({reason}): delete it, get it again and run this again")


def read_set(root: Path, name: str, split: str, dropped: Dropped) -> Iterator[Item]:
    """Yield a set's rows as conversations or graded items; those that are none are counted."""
    good = 0
    for path in (paths := find_set(root, name, split)):
        for row in read_rows(path):
            try:
                item = SETS[name].read(row)
            except (ValueError, LookupError, TypeError, AttributeError):
                drop(dropped, f"{SETS[name].title} rows that cannot be used")
            else:
                good += 1
                yield {**item, "kind": name}
    if paths and not good:
        raise Stop(f"{paths[0]} has no row that can be read as one of {SETS[name].title}")


def read_words(root: Path) -> list[str]:
    """Read an English word list below a folder, or beside it; [] where there is none."""
    for place in ("", "words", "../words"):
        path = root / place / "words_alpha.txt"
        if path.is_file():
            words = path.read_text("utf-8", errors="replace").split()
            words = [w for w in words if 3 <= len(w) <= 14 and re.fullmatch("[a-z]+", w)]
            if len({held_out_word(word) for word in words}) < 2:
                raise Stop(f"{path} is no list of English words: delete it and run this again")
            return words
    return []


def fetch_sets(net: Net, root: Path, splits: list[tuple[str, str]], workers: int) -> None:
    """Fetch the files of sets' splits, and the plain files, below `root`.

    Its files.json lists the files of each split with their sizes, once these are whole: then
    no network is needed any more.
    """
    known = read_json(root / "files.json")
    wanted: dict[Path, tuple[Net, Remote]] = {}
    listed = cache(partial(hub_files, net))
    for name, split in splits:
        files, repo, pattern = f"{name} {split}", SETS[name].repo, SETS[name].pattern.format(split)
        if all(size_of(root / path) == size for path, size in known.get(files, {"": -1}).items()):
            continue
        found = fnmatch.filter(listed(repo), pattern)
        if not found:
            raise Stop(f"{net.endpoint} lists no {pattern} of {repo}: is HF_ENDPOINT right?")
        known[files] = {f"{repo}/{path}": -1 for path in found}
        places = {root / repo / path: (net, listed(repo)[path]) for path in found}
        wanted |= {path: at for path, at in places.items() if not is_whole(path, at[1])}
    mirror = os.environ.get("NANOCHAT_MIRROR", "").strip().rstrip("/")
    for name, place in PLAIN_FILES.items():
        if not (root / name).is_file():  # neither size nor hash is known: one that is there is good
            endpoint = mirror or "/".join(place.split("/")[:3])
            other = replace(net, endpoint=endpoint, variable="NANOCHAT_MIRROR")
            wanted[root / name] = other, Remote(f"{mirror or place}/{name}")
    # room: they are packed, and lie unpacked twice in the end
    fetch_files(wanted, "conversations and evaluation sets", workers, room=5)
    known = {key: {path: size_of(root / path) for path in files} for key, files in known.items()}
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "files.json", known)


def write_lines(path: Path, lines: Iterable[str]) -> Files:
    """Write lines; return the file's rows, kinds, size and hash by its name."""
    kinds: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            kinds[line.split('"', 4)[3]] += 1  # a line begins with its kind, see as_line
            file.write(line + "\n")
    about = {"conversations": sum(kinds.values()), "kinds": dict(kinds.most_common())}
    return {path.name: {**about, "size": path.stat().st_size, "sha256": file_digest(path)}}


def as_line(item: Item) -> str:
    """Write a conversation or item as a line of JSON that begins with its kind."""
    return json.dumps({"kind": item["kind"], **item}, ensure_ascii=False)


def question_key(text: str) -> str:
    """Write a question as its words, and the signs of sums and brackets, in one type."""
    words = " ".join(re.findall(r"\w+|[+*/=<>(){}\[\]]", text.casefold()))
    return re.sub("^question | answer$", "", words)  # labels of CORE


def question_keys(item: Item) -> list[str]:
    """Name what a conversation asks, so that the same question in other type is found again.

    The choices, in any order, are part of a question: many ask which of these is true. A long
    question is the same without them.
    """
    asked = [m["content"] for m in item["messages"] if m["role"] == "user"]
    if "choices" in item:
        alone = asked[0][: asked[0].rindex(f"\n- {item['choices'][0]} (A)")]
        asked = [" ".join([alone, *sorted(item["choices"])]), *[alone] * (alone.count(" ") > 11)]
    return [question_key(text) for text in asked]


def evaluation_questions() -> set[str]:
    """Return the keys of all questions in data/eval/, also of those that have choices laid out."""
    keys: set[str] = set()
    for path in data_dir("eval").glob("*.jsonl"):
        for item in read_conversations(path):
            keys.update(question_keys(item), question_keys({"messages": item["messages"]}))
    for path in data_dir("eval").glob("core/eval_data/*/*.jsonl"):
        for row in read_rows(path):
            if isinstance(row, dict):
                keys.update(map(question_key, core_questions(row)))
    return {key for key in keys if key.count(" ") > 2}  # three words are asked by chance


def core_questions(row: dict[str, Any]) -> list[str]:
    """List what a row of CORE asks, whole: alone and with its choices, as question_keys has them.

    Never a passage alone, which many rows share.
    """
    if "context_options" in row:
        return [f"{context} {row.get('continuation')}" for context in row["context_options"]]
    asked = str(row.get("query") or row.get("context") or "")
    return [asked, " ".join([asked, *sorted(map(str, row.get("choices") or []))])]


def share_out(counts: dict[str, int], draw: float) -> list[str]:
    """Return the files that a row goes to, whose draw is from 0 to the number of rows."""
    for file, count in counts.items():
        if count != REST:
            if draw < count:
                return [file]
            draw -= count
    return [file for file, count in counts.items() if count == REST]


def hub_conversations(
    root: Path, settings: Settings, dropped: Dropped
) -> Iterator[tuple[str, Item]]:
    """Yield (file, conversation or graded item) of the mixture; none is of a test."""
    tests = evaluation_questions()
    words = [word for word in read_words(root) if not held_out_word(word)]
    for kind in ("spelling", "identity"):
        for file, count in zip(FILES, MIXTURE[kind]):
            rng = random.Random(f"{kind} {file} {settings.seed}")
            for _ in range(count):
                if kind == "identity":
                    yield file, {**identity_chat(rng, settings.name), "kind": kind}
                else:
                    make = rng.choice((count_letters, spell_out))
                    yield file, make(rng, rng.choice(words))
    for kind, about in SETS.items():
        counts = dict(zip(FILES, MIXTURE.get(kind, ())))
        val = {"val": counts.pop("val", 0)} if about.val else {}
        for split, wanted in ((about.val, val), (about.train, counts)):
            rows = sum(pq.read_metadata(path).num_rows for path in find_set(root, kind, split))
            for item in read_set(root, kind, split, dropped):
                if not tests.isdisjoint(question_keys(item)):
                    drop(dropped, OF_A_TEST)
                    continue
                draw = zlib.crc32(as_line(item).encode()) / 2**32 * rows
                yield from ((file, item) for file in share_out(wanted, draw))


def own_conversations(files: OwnFiles) -> Iterator[tuple[str, Item]]:
    """Yield ("mid" or "rl", conversation or graded item) of own files; none is of a test."""
    tests = evaluation_questions()
    for place, value in files.read(files.values):
        mended: list[str] = []
        try:
            item = read_conversation(value, mended.append)
            if not tests.isdisjoint(question_keys({"messages": item["messages"]})):
                raise ValueError(OF_A_TEST)
            if "\ufffd" in as_line(item):
                raise ValueError("text that is not UTF-8")
        except ValueError as error:
            files.drop(error.args[0], place, ": ".join(error.args[1:]))
            continue
        for reason in mended:
            files.drop(reason, place)
        if "grade" not in item or "reply" in item:
            yield "mid", item
        if "grade" in item:
            yield "rl", item


def make_chat(settings: Settings, files: OwnFiles | None, root: Path, folder: Path) -> Manifest:
    """Write {val,mid,sft,rl}.jsonl, shuffled: your own `files`, or the hub's below `root`.

    No conversation of val is in mid or sft, nor one that shows rl.py's validation solved. Your own
    ones bring no val and no sft: val is taken out of mid, and sft is mid.
    """
    if files:
        size, dropped = files.expected_bytes(), files.dropped
        check_space(4 * size)
        chats = own_conversations(files)
    else:
        size, dropped = 3 * sum(map(size_of, find_set(root, "smoltalk", "train"))), {}
        print(f"prepare: writing the conversations of {data_dir(settings.source)}", flush=True)
        chats = hub_conversations(root, settings, dropped)
    sorters = {file: Sorter(folder / "buckets" / file, settings.seed, size) for file in FILES}
    for file, item in chats:
        sorters[file].add(as_line(item if file == "rl" else solved(item)))
    lines: dict[str, Iterator[str]] = {
        file: (line for _, line in sorter.documents()) for file, sorter in sorters.items()
    }
    if files:
        lines["val"], lines["mid"] = split_documents(sorters["mid"], settings)
    val = list(lines["val"])  # --val-mb at most, or the few thousand of MIXTURE
    first = list(islice(lines["rl"], rl_held(sorters["rl"].count)))
    apart = {as_line(solved(item)) for item in map(json.loads, first) if "reply" in item}
    apart.update(val)
    made = write_lines(folder / "val.jsonl", val)
    for file in ("mid",) if files else ("mid", "sft"):
        train = (line for line in lines[file] if line not in apart)
        made |= write_lines(folder / f"{file}.jsonl", train)
    if files:
        shutil.copyfile(folder / "mid.jsonl", folder / "sft.jsonl")
        made["sft.jsonl"] = made["mid.jsonl"]
    if sorters["rl"].count:
        problems = map(json.loads, chain(first, lines["rl"]))
        asked = ({key: item[key] for key in item if key != "reply"} for item in problems)
        made |= write_lines(folder / "rl.jsonl", map(as_line, asked))
    if not all(made[f"{file}.jsonl"]["conversations"] for file in ("mid", "val")):
        raise MissingInput(
            f"{files.root if files else root} holds no two conversations that can be used"
            f"{left_out(dropped, ' ({})')}: training and validation need two"
        )
    drop(dropped, "duplicates", count=sum(sorter.duplicates for sorter in sorters.values()))
    return {"files": made, "dropped": dropped}


def unzip(path: Path, folder: Path) -> None:
    """Unpack an archive below a new folder. Raises Stop where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # which makes "..", links and absolute paths harmless
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise Stop(
            f"{path} is damaged ({error}): delete it and run the same command again"
        ) from None


def copy_core(root: Path, folder: Path) -> list[str]:
    """Copy the CORE bundle's data, unpacked or not, to folder/core/; return the files' names."""
    if (root / "eval_bundle.zip").is_file():
        unzip(root / "eval_bundle.zip", folder / "bundle")
        root = folder / "bundle"
    for place in ("core", "eval_bundle", "eval/core", "."):
        if (source := root / place / "eval_data").is_dir():
            shutil.copytree(source, folder / "core" / "eval_data", copy_function=shutil.copyfile)
            break
    return [str(p.relative_to(folder)) for p in sorted(folder.glob("core/eval_data/*/*.jsonl"))]


def make_eval(root: Path, folder: Path) -> Manifest:
    """Write the evaluation sets that `root` has to folder/{NAME.jsonl, core/}."""
    dropped: Dropped = {}
    made: Files = {}
    for name, about in SETS.items():
        if about.test and find_set(root, name, about.test):
            rows = map(as_line, read_set(root, name, about.test, dropped))
            made |= write_lines(folder / f"{about.title}.jsonl", rows)
    words = [word for word in read_words(root) if held_out_word(word)]
    if words:
        rng = random.Random("spelling bee")
        words = rng.sample(words, min(len(words), SPELLING_BEE))
        lines = (as_line(count_letters(rng, word)) for word in words)
        made |= write_lines(folder / "SpellingBee.jsonl", lines)
    paths = [path for place in ("people", "eval/people") for path in root.glob(f"{place}/*.jsonl")]
    if people := [people_item(row) for path in sorted(paths) for row in read_rows(path)]:
        made |= write_lines(folder / "people.jsonl", map(as_line, people))
    for path in copy_core(root, folder):
        made[path] = {"size": size_of(folder / path), "task": Path(path).stem}
    if not made:
        places = "gsm8k/, arc/, mmlu/, humaneval/, core/ or the hub's openai/gsm8k/"
        raise MissingInput(f"{root} holds none of the evaluation sets: it must have {places}")
    return {"files": made, "dropped": dropped}


# 6. World: tables ----------------------------------------------------------------------------
MARKS = "+ ! & % ? ?!".split()  # kinds of wordings in relations
LANGUAGES = ("Spanish", "French", "German")  # columns of translations


@cache
def sections() -> dict[str, str]:
    """Read world.txt: name -> section, without comments."""
    text = (Path(__file__).parent / "world.txt").read_text("utf-8")
    parts = re.split(r"(?m)^== (\w+)\n", re.sub(r"(?m)^#.*\n", "", text))
    return {name: body.strip("\n") for name, body in zip(parts[1::2], parts[2::2])}


def section(name: str) -> str:
    """Return a section of world.txt."""
    return sections()[name]


def world_version() -> str:
    """Return what the world is made by: the version of this code and a checksum of world.txt."""
    return f"{WORLD_VERSION} {zlib.crc32(json.dumps(sections()).encode()):08x}"


@cache
def world_words(name: str) -> list[str]:
    """Return the words of a section."""
    return section(name).split()


@cache
def world_items(name: str) -> list[str]:
    """Return the items of a section, which semicolons separate."""
    return items(section(name))


def items(text: str, mark: str = ";") -> list[str]:
    """Split a table of short texts at semicolons or another mark; lines may break anywhere."""
    return [item.strip() for item in re.sub(r"\s+", " ", text).split(mark) if item.strip()]


def held_out(item: str, one_in: int = 10) -> bool:
    """Whether an item belongs to the test: a function of its text alone, not of order or seed."""
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") % one_in == 0


@cache
def held_out_pair(a: int, b: int) -> bool:
    """Whether two operands, in either order, are kept for the test: no training file works them."""
    return held_out(f"pair {min(a, b)} {max(a, b)}")


def held_out_word(word: str) -> bool:
    """Whether a word is spelled, counted and reversed in the test only."""
    return held_out(f"spell {word}")


def number_word(n: int) -> str:
    """Spell a number from 0 to 999,999 in words: 342 -> three hundred and forty-two."""
    if n < 20:
        return world_words("small")[n]
    if n < 100:
        return world_words("tens")[n // 10] + (f"-{world_words('small')[n % 10]}" if n % 10 else "")
    base, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % base
    tail = f"{' and' if rest < 100 else ''} {number_word(rest)}" if rest else ""
    return f"{number_word(n // base)} {name}{tail}"


@cache
def irregular() -> dict[str, str]:
    """Return the plurals that do not follow the rules of `plural`."""
    block = section("relations").split("@ plural")[1].split("@ ")[0]
    return dict(re.findall(r"(\w+): (\w+)", block))


def plural(noun: str) -> str:
    """Return the plural of an English noun phrase: by the table of irregular ones, else by rule."""
    if " of " in noun:  # piece of clothing -> pieces of clothing
        first, _, rest = noun.partition(" of ")
        return f"{plural(first)} of {rest}"
    head, _, last = noun.rpartition(" ")
    if last in irregular():
        last = irregular()[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeou"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def with_article(noun: str) -> str:
    """Put a or an before a noun phrase, by its first sound."""
    vowel = noun[0] in "aeiouAEIOU" and not noun.startswith(
        ("uni", "use", "eu", "ewe", "uku", "one")
    )
    return ("an " if vowel or noun.startswith(("hour", "heir", "honest")) else "a ") + noun


def sentence(clause: str) -> str:
    """Make a written sentence of a clause: a capital in front, a full stop behind."""
    clause = clause[0].upper() + clause[1:]
    return clause if clause[-1] in '.?!:"' else clause + "."


@dataclass(frozen=True)
class Fact:
    """One true thing: the `answer` to `relation` of `subject`, with what the wordings need."""

    relation: str
    subject: str
    answer: str
    key: str  # what the split hashes; mirrors share it
    operands: tuple[int, ...] = ()  # of a sum or product

    @property
    def askable(self) -> bool:
        """Whether training may ask for it; one fact in five is only ever stated in the text."""
        return not held_out(f"fact {self.key}", 5)

    def forms(self) -> dict[str, str]:
        """Return what the placeholders of a wording stand for."""
        s, o = self.subject, self.answer
        forms = {
            "s": s,
            "as": with_article(s),
            "ps": plural(s),
            "ss": s + ("'" if s[-1] == "s" else "'s"),
            "o": o,
            "ao": with_article(o),
            "adj": nationalities().get(s, s),
            "po": plural(o),
        }
        if self.operands:
            forms |= {"x": str(self.operands[0]), "y": str(self.operands[1])}
        return forms


@dataclass
class Relation:
    """A kind of fact with all its wordings, as read from a block of relations."""

    name: str
    title: str
    both: bool  # an answer names one subject, too
    brief: dict[str, str]  # "o" -> "the {o}": an answer by itself
    statements: list[str]  # training text
    unseen: list[str]  # evaluation only
    follow: list[str]  # "its capital is {o}"
    shared: list[str]  # "{x} and {y} are both in {o}"
    questions: list[str]
    unseen_questions: list[str]
    facts: list[Fact]

    def wordings(self, forward: bool, unseen: bool = False) -> list[str]:
        """Statements that tell the answer of the subject (forward) or the subject of the answer."""
        wordings = self.unseen if unseen else self.statements
        return [w for w in wordings if not self.both or ends_in(w, "s") != forward]

    def askings(self, forward: bool, unseen: bool = False) -> list[str]:
        """Questions for the answer (forward: they name the subject) or for the subject."""
        questions = self.unseen_questions if unseen else self.questions
        return [q for q in questions if bool(re.search(r"\{[ap]?o\}", q)) != forward]

    def unique(self, fact: Fact) -> bool:
        """Whether the answer of a fact names its subject, so that it can be asked backward."""
        return self.both and sum(f.answer == fact.answer for f in self.facts) == 1


@cache
def nationalities() -> dict[str, str]:
    """Return the adjective of each country that has one."""
    return {fact.subject: fact.answer for fact in world_relations()["nationality"].facts}


def ends_in(wording: str, letter: str) -> bool:
    """Whether a wording ends in a form of the answer ("o") or of the subject ("s")."""
    return re.search(r"\{[ap]?" + letter + r"\}$", wording) is not None


def expand(text: str) -> list[str]:
    """Write out every combination of the [a|b] choices in wordings separated by slashes."""
    out = []
    for wording in text.split(" / "):
        parts = re.split(r"\[(.*?)\]", wording.strip())  # odd places hold the choices
        choices = [p.split("|") if i % 2 else [p] for i, p in enumerate(parts)]
        out += ["".join(combination) for combination in itertools.product(*choices)]
    return [w for w in out if w]


def parse_facts(name: str, lines: list[str], mirror: bool) -> list[Fact]:
    """Read the data lines of a relation, or make its facts by a rule; "-" is left out."""
    if name in ("sum", "product"):
        sign, times = ("times", True) if name == "product" else ("plus", False)
        return [
            Fact(
                name,
                f"{a} {sign} {b}",
                str(a * b if times else a + b),
                f"{name} {min(a, b)} {max(a, b)}",
                (a, b),
            )
            for a, b in itertools.product(range(1, 11), repeat=2)
            if not held_out_pair(a, b)
        ]
    pairs: list[tuple[str, str]] = []
    if name == "first letter":
        pairs = [(w, w[0]) for w in world_words("first_letter") if not held_out_word(w)]
    for line in lines:
        mark, _, text = line.partition(" ")
        if mark == "=|":  # a column of a table; of several relations, that of one
            one, _, where = text.rpartition(": ")
            table, column = where.split()
            rows = [row.split(", ") for row in world_items(table) if one in ("", name)]
            pairs += [(row[0], row[int(column)]) for row in rows]
            continue
        for entry in items(text):
            left, _, right = entry.partition(": ")
            pairs += [(s, left) for s in right.split(", ")] if mark == "=<" else [(left, right)]
    if mirror:
        subjects, answers = [s for s, _ in pairs], [o for _, o in pairs]
        pairs += [(o, s) for s, o in pairs if answers.count(o) == 1 and o not in subjects]
    mirror = mirror or name in ("next", "previous")
    return [
        Fact(name, s, o, f"order {min(s, o)} {max(s, o)}" if mirror else f"{name} {s}")
        for s, o in pairs
        if o != "-"
    ]


def parse_relations(block: str) -> list[Relation]:
    """Read one block of relations; a header with several names makes one relation of each."""
    header, *lines = block.replace("\n ", " ").strip().splitlines()
    names, title, flags, n, m = (c.strip() for c in re.split(r"(?<=\s)\|(?=\s|$)", header))
    marked: dict[str, list[str]] = {mark: [] for mark in (*MARKS, "=")}
    for line in lines:
        mark, _, text = line.partition(" ")
        marked[mark[:1] if mark[0] == "=" else mark] += [line] if mark[0] == "=" else expand(text)
    brief = {}
    for letter, phrase in (("o", n), ("s", m)):
        endings = [w[w.rindex("{") :] for w in marked["+"] if ends_in(w, letter)]
        phrase, _, end = phrase.partition(" = ")
        brief[letter] = end or (endings[0] if endings and not phrase else f"{{{letter}}}")
        if phrase:
            end, first = brief[letter], expand(phrase)[0].rstrip(",")
            marked["+"] += expand(f"the {phrase} is {end}")
            marked["+"] += expand(f"{end} is the {phrase.rstrip(',')}") if letter == "o" else []
            marked["+"] += [f"{w.replace('{N}', first)} {end}" for w in world_items("n_asides")]
            marked["!"].append(section("n_unseen").replace("{N}", first) + end)
            marked["?"] += expand(section("n_questions").replace("\n", "").replace("{N}", first))
            marked["?!"] += expand(section("n_unseen_questions").replace("{N}", first))
    relations = []
    for name in names.split(", "):
        facts = parse_facts(name, marked["="], "mirror" in flags)
        texts = [[w.replace("{r}", name) for w in dict.fromkeys(marked[mark])] for mark in MARKS]
        title, both = title.replace("{r}", name), "both" in flags
        told, unseen, follow, shared, asked, unasked = texts
        relation = Relation(
            name, title, both, brief, told, unseen, follow, shared, asked, unasked, facts
        )
        relations.append(relation)
    return relations


@cache
def world_relations() -> dict[str, Relation]:
    """Read all of relations, once."""
    blocks = re.split(r"(?m)^@ ", section("relations"))[1:]
    return {r.name: r for block in blocks for r in parse_relations(block)}


def world_facts() -> list[Fact]:
    """Return every fact of the world, in the order of the tables."""
    return [fact for relation in world_relations().values() for fact in relation.facts]


@cache
def all_statements() -> list[str]:
    """Return every plain statement of the training text, sorted."""
    told = set()
    for relation in world_relations().values():
        for fact in relation.facts:
            for forward in (True, False) if relation.unique(fact) else (True,):
                told |= {sentence(w.format_map(fact.forms())) for w in relation.wordings(forward)}
    return sorted(told)


def is_open(prompt: str, accept: list[str]) -> bool:
    """Say whether another statement of the text begins like prompt but goes on otherwise."""
    told = all_statements()
    for text in told[bisect.bisect_left(told, prompt) :]:
        rest = text.removeprefix(prompt)
        if rest == text:
            return False
        if rest[0] in " ," and not rest.lstrip().startswith(tuple(accept)):
            return True
    return False


def fact_prompts(split: Literal["trained", "unseen"]) -> Iterator[dict[str, object]]:
    """Yield what a base model must complete: {"prompt", "answer", "relation", "accept", "wording"}.

    A prompt ends just before the answer, without the blank; the answer begins with it. One prompt
    asks for each fact's answer, another for its subject where that is unique; a prompt that the
    text also continues otherwise ("A dog is" a mammal, a kind of pet) is passed over. The
    wordings of "unseen" occur in no training text.
    """
    for relation in world_relations().values():
        for fact in relation.facts:
            for letter in "os" if relation.unique(fact) else "o":
                choices = relation.wordings(letter == "o", split == "unseen")
                choices = [w for w in choices if ends_in(w, letter)]
                salt = zlib.crc32(f"{fact.key} {fact.subject} {letter}".encode())
                for i in range(len(choices)):
                    wording, _, form = choices[(salt + i) % len(choices)].rpartition("{")
                    answer = fact.forms()[form[:-1]]
                    prompt = sentence(wording.format_map(fact.forms()) + answer)
                    prompt = prompt[: prompt.rindex(answer)].rstrip()
                    answer = answer.rstrip(".")
                    if not is_open(prompt, spellings(answer)):
                        yield {
                            "prompt": prompt,
                            "answer": " " + answer,
                            "relation": relation.name,
                            "accept": spellings(answer),
                            "wording": f"{relation.name}: {wording}{{{form}",
                        }
                        break


def spellings(answer: str) -> list[str]:
    """Return the right ways to write an answer: a small number may be in words or digits."""
    if answer.isdigit() and int(answer) <= 1000:
        return [answer, number_word(int(answer))]
    numbers = {number_word(n): str(n) for n in range(101)}
    return [answer, numbers[answer]] if answer in numbers else [answer]


# 7. World: text ------------------------------------------------------------------------------
@cache
def wordings(key: str, name: str = "wordings") -> list[str]:
    """Return the ways to word one kind of sentence."""
    lines = section(name).replace("\n ", " ").splitlines()
    return next(items(line[len(key) + 1 :], " / ") for line in lines if line.startswith(key + ":"))


def worded(rng: random.Random, key: str, **forms: object) -> str:
    """Write one sentence of a kind."""
    return sentence(rng.choice(wordings(key)).format_map(forms))


def join_and(words: Sequence[object]) -> str:
    """Join words as English does: a, b and c."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def paragraph(rng: random.Random, sentences: Iterable[str], lines: float = 0.15) -> str:
    """Run sentences together, sometimes one to a line."""
    return ("\n" if rng.random() < lines else " ").join(sentences)


T = TypeVar("T")
Card = tuple[Fact, bool]  # a fact, and whether its answer is told


class Deck(Generic[T]):
    """Deals cards in shuffled order, all of them before any again."""

    def __init__(self, rng: random.Random, cards: Iterable[T]) -> None:
        self.rng, self.cards, self.left = rng, list(cards), 0

    def deal(self) -> T:
        """Return the next card."""
        if not self.left:
            self.rng.shuffle(self.cards)
            self.left = len(self.cards)
        self.left -= 1
        return self.cards[self.left]


NO_LEAD = "(if|when|to|for|count|ask|change|add|multiply|look) |.*="  # clauses that take no "that"


class FactWriter:
    """Writes documents of facts, dealing facts and wordings in turn so that none is left out."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.relations = rng, world_relations()
        self.leads = world_items("leads")
        self.turns: dict[Card, list[Any]] = {}  # card -> [forms, wordings, the last told]
        self.decks: dict[str, Deck[Card]] = {}
        self.followed: dict[str, list[Fact]] = {}  # subject -> facts told of it as "it"
        self.alike: dict[tuple[str, str], list[Fact]] = {}
        for name, relation in self.relations.items():
            pools = [relation.wordings(forward) for forward in (False, True)]
            rng.shuffle(pools[0])
            rng.shuffle(pools[1])
            cards = [(fact, True) for fact in relation.facts]
            cards += [(fact, False) for fact in relation.facts if relation.unique(fact)]
            for fact, forward in cards:
                start = rng.randrange(len(pools[forward]))
                self.turns[fact, forward] = [fact.forms(), pools[forward], start]
            for fact in relation.facts:
                self.alike.setdefault((name, fact.answer), []).append(fact)
                if relation.follow:
                    self.followed.setdefault(fact.subject, []).append(fact)
            self.decks[name] = Deck(rng, cards)
        self.deck = Deck(rng, self.turns)
        self.themes = Deck(
            rng, (n for n, d in self.decks.items() for _ in range(1 + len(d.cards) // 8))
        )

    def clause(self, card: Card) -> str:
        """State a fact in its next wording, without capital and full stop."""
        turn = self.turns[card]
        turn[2] = (turn[2] + 1) % len(turn[1])
        return turn[1][turn[2]].format_map(turn[0])

    def say(self, card: Card) -> str:
        """State a fact as a sentence, now and then with a lead-in."""
        clause = self.clause(card)
        if self.rng.random() < 0.07 and not re.match(NO_LEAD, clause):
            clause = f"{self.rng.choice(self.leads)} {clause}"
        return sentence(clause)

    def mixed(self) -> str:
        """Tell facts of all kinds, as they come."""
        return paragraph(
            self.rng, [self.say(self.deck.deal()) for _ in range(self.rng.randint(5, 15))]
        )

    def few(self, low: int, high: int) -> tuple[Relation, list[Card]]:
        """Deal some facts of one kind."""
        name = self.themes.deal()
        relation, deck = self.relations[name], self.decks[name]
        return relation, [
            deck.deal() for _ in range(min(self.rng.randint(low, high), len(relation.facts)))
        ]

    def theme(self) -> str:
        """Tell facts of one kind, some of them joined or set beside another."""
        relation, cards = self.few(5, 14)
        rng, out = self.rng, []
        if rng.random() < 0.4:
            out.append(worded(rng, "opening", t=relation.title))
        while cards:
            card, roll = cards.pop(), rng.random()
            if roll < 0.15 and cards:
                clauses, link = [self.clause(card), self.clause(cards.pop())], ", while "
                if any(re.match(NO_LEAD, clause) for clause in clauses):
                    link = "; "
                out.append(sentence(rng.choice((link, "; ", link)).join(clauses)))
            else:
                out += [self.say(card)] + (self.beside(relation, card[0]) if roll > 0.88 else [])
        return paragraph(rng, out)

    def beside(self, relation: Relation, fact: Fact) -> list[str]:
        """Set a fact beside another of its kind: the same answer, or more or less of something."""
        other = self.rng.choice(self.alike[fact.relation, fact.answer])
        form = "as" if "{as}" in relation.statements[0] else "s"
        if relation.shared and other != fact:
            shared = {"x": fact.forms()[form], "y": other.forms()[form]}
            return [sentence(self.rng.choice(relation.shared).format_map(fact.forms() | shared))]
        if relation.name in COMPARED:
            other = self.rng.choice(relation.facts)
            size, least = (
                min(int(n) for n in spellings(f.answer) if n.isdigit()) for f in (fact, other)
            )
            more = COMPARED[relation.name].split("|")[size < least]
            if size != least:
                return [sentence(f"{fact.forms()[form]} has {more} than {other.forms()[form]}")]
        return []

    def listing(self) -> str:
        """List facts of one kind, under a title."""
        relation, cards = self.few(6, 14)
        mark = self.rng.choice(("", "- "))
        lines = [
            f"{f.subject[0].upper()}{f.subject[1:]}: {f.answer}"
            for f in dict.fromkeys(f for f, _ in cards)
        ]
        return "\n".join([sentence(relation.title)[:-1], *(mark + line for line in lines)])

    def entry(self) -> str:
        """Write small encyclopaedia entries: all the facts of one subject, then of another."""
        rng, out = self.rng, []
        for _ in range(rng.randint(2, 4)):
            card = self.deck.deal()
            told = [self.say(card)]
            others = (
                self.followed.get(card[0].subject, [])
                if self.relations[card[0].relation].follow
                else []
            )
            for other in rng.sample(others, len(others)):
                if other != card[0]:
                    follow = self.relations[other.relation].follow
                    told.append(sentence(rng.choice(follow).format_map(other.forms())))
            out.append(" ".join(told))
        return ("\n\n" if rng.random() < 0.5 else " ").join(out)

    def dialogue(self) -> str:
        """Ask and answer, as lines or as talk; facts that training never asks are just told."""
        rng, out = self.rng, []
        ask, answer, gap = rng.choice(ASKING)
        one, two = rng.sample(world_words("girls") + world_words("boys"), 2)
        for _ in range(rng.randint(4, 9)):
            card = fact, forward = self.deck.deal()
            questions = self.relations[fact.relation].askings(forward)
            if not fact.askable or not questions:
                out.append(self.say(card))
                continue
            question = sentence(rng.choice(questions).format_map(self.turns[card][0]))
            brief = self.relations[fact.relation].brief["o" if forward else "s"]
            full = rng.random() < 0.6
            reply = sentence(self.clause(card) if full else brief.format_map(self.turns[card][0]))
            if ask:
                out.append(f"{ask}{question}{answer}{reply}".lstrip())
            else:
                said = f'{reply[:-1]},"' if reply.endswith(".") else f'{reply}"'
                verb, end = ("asked", "?") if question.endswith("?") else ("said", ",")
                out.append(f'"{question[:-1]}{end}" {verb} {one}. "{said} said {two}.')
        return gap.join(out)


# Before a question, between it and the answer, after it; without a mark it is talk.
ASKING = (
    ("Question: ", "\nAnswer: ", "\n\n"),
    ("Q: ", "\nA: ", "\n"),
    (" ", " ", "\n"),
    (" ", "\n", "\n\n"),
    ("", "", " "),
    ("", "", "\n"),
)
COMPARED = {
    "legs": "more legs|fewer legs",
    "sides": "more sides|fewer sides",
    "days": "more days|fewer days",
    "atomic number": "a higher atomic number|a lower atomic number",
}


@dataclass
class Story:
    """A told story and what is true at its end: who holds a thing, and where everything is."""

    text: str
    holder: dict[str, str]  # thing -> name; absent if lying somewhere
    place: dict[str, str]  # name or thing -> "in the kitchen"
    given: list[tuple[str, str, str]]  # who gave what to whom


class Teller:
    """Tells one story, keeping track of who is where and who has what."""

    def __init__(self, rng: random.Random, girls: Sequence[str], boys: Sequence[str]) -> None:
        people = rng.sample([*girls, *boys], rng.choice((2, 2, 2, 3)))
        self.rng, self.places = rng, rng.sample(world_items("places"), 4)
        self.he = {name: "she" if name in girls else "he" for name in people}
        things = rng.sample(world_items("wanted"), rng.choice((1, 2, 2, 3)))
        self.reason = {thing: why for thing, _, why in (item.partition(": ") for item in things)}
        self.place = {name: rng.choice(self.places) for name in [*people, *self.reason]}
        self.holder: dict[str, str] = {}
        self.given: list[tuple[str, str, str]] = []
        self.out: list[str] = []
        self.last = ""  # of whom the last sentence told

    def add(self, who: str, key: str, **forms: str) -> None:
        """Tell something of somebody, by a pronoun where the last sentence told of the same."""
        same = who == self.last and self.rng.random() < 0.6
        forms |= {"n": who, "p": self.he[who] if same else who, "he": self.he[who]}
        self.out.append(
            worded(self.rng, key, **forms) if key in STORY_KEYS else sentence(key.format_map(forms))
        )
        self.last = who

    def met(self, who: str) -> list[str]:
        """Return the others in the same place."""
        return [n for n in self.he if n != who and self.place[n] == self.place[who]]

    def held(self, who: str) -> list[str]:
        """Return the things that somebody has."""
        return [thing for thing, name in self.holder.items() if name == who]

    def go(self, who: str, place: str) -> None:
        """Let somebody walk, with whatever they carry."""
        rng, carried = self.rng, self.held(who)
        self.place |= dict.fromkeys([who, *carried], place)
        forms = {
            "to": re.sub("^(in|at|by|on) ", "to ", place),
            "why": rng.choice(world_items("moves")).format(he=self.he[who]),
            "went": rng.choice(("went", "walked", "went", "ran", "hurried")),
        }
        key = "carry" if carried and rng.random() < 0.5 else "go"
        self.add(who, key, t=rng.choice(carried or [""]), **forms)
        if self.met(who) and rng.random() < 0.4:
            self.add(who, "there {p} met " + join_and(self.met(who)))

    def take(self, who: str, thing: str) -> None:
        """Let somebody take a thing that lies where they are."""
        self.holder[thing] = who
        self.add(who, "take", t=thing)

    def give(self, who: str, thing: str, to: str) -> None:
        """Let somebody hand a thing to another who is there."""
        self.holder[thing] = to
        self.given.append((who, thing, to))
        self.add(who, "give", t=thing, q=to)
        if self.rng.random() < 0.4:
            self.add(to, "thanks")

    def step(self) -> None:
        """Let one thing happen that can happen now."""
        rng, who, roll = self.rng, self.rng.choice(list(self.he)), self.rng.random()
        here = [t for t in self.reason if t not in self.holder and self.place[t] == self.place[who]]
        mine, met, thing = self.held(who), self.met(who), rng.choice(list(self.reason))
        if here and roll < 0.6:
            self.take(who, rng.choice(here))
        elif mine and met and roll < 0.55:
            self.give(who, rng.choice(mine), rng.choice(met))
        elif mine and roll < 0.3:
            thing = rng.choice(mine)
            del self.holder[thing]
            self.add(who, "put", t=thing, at=self.place[who])
        elif met and roll < 0.24:
            owner = self.holder.get(thing)
            answer = (
                f"{'I' if owner == who else 'you' if owner == met[0] else owner} have the {thing}"
            )
            answer = answer.replace("have", "has") if owner not in (who, met[0]) else answer
            answer = answer if owner else f"the {thing} is {self.place[thing]}"
            self.add(who, "ask", t=thing, q=met[0], answer=sentence(answer)[:-1])
        elif roll > 0.93:
            self.add(who, rng.choice(world_items("feelings")))
        else:
            self.go(who, rng.choice([p for p in self.places if p != self.place[who]]))

    def fetch(self, who: str, thing: str) -> None:
        """Let somebody get the thing they want, wherever it is."""
        owner = self.holder.get(thing)
        if owner != who:
            self.add(who, "want", t=thing, reason=self.reason[thing].format(he=self.he[who]))
            if self.place[thing] != self.place[who]:
                self.go(who, self.place[thing])
            if owner:
                self.add(who, "beg", t=thing)
                self.give(owner, thing, who)
            else:
                self.take(who, thing)

    def state(self) -> list[str]:
        """Tell what is true now: a clause for each person and thing."""
        things = [
            f"{self.holder[t]} had the {t}" if t in self.holder else f"the {t} was {self.place[t]}"
            for t in self.reason
        ]
        people: dict[str, list[str]] = {}
        for name in self.he:
            people.setdefault(self.place[name], []).append(name)
        return [
            f"{join_and(n)} {'were' if len(n) > 1 else 'was'} {at}" for at, n in people.items()
        ] + things

    def tell(self, steps: int = 0) -> Story:
        """Tell the whole story, in which so many things happen (0: two to seven)."""
        rng = self.rng
        self.out += [sentence(rng.choice(world_items("weather")))] if rng.random() < 0.6 else []
        clauses = self.state()
        if rng.random() < 0.5:
            clauses[:2] = [", and ".join(clauses[:2])]
        self.out += [sentence(clause) for clause in clauses]
        for _ in range(steps or rng.randint(2, 7)):
            self.step()
        if rng.random() < 0.7:
            self.fetch(rng.choice(list(self.he)), rng.choice(list(self.reason)))
        for clause in rng.sample(self.state(), rng.choice((0, 1, 2))):
            self.out.append(f"{worded(rng, 'close')[:-1].rstrip('.')} {clause}.")
        self.out += [sentence(rng.choice(world_items("endings")))] if rng.random() < 0.3 else []
        return Story(" ".join(self.out), self.holder, self.place, self.given)


STORY_KEYS = "go carry take put give thanks want beg ask".split()


def story(rng: random.Random) -> str:
    """Tell a story, sometimes with questions about its end and their answers."""
    teller = Teller(rng, world_words("girls"), world_words("boys"))
    told = teller.tell()
    thing, who = rng.choice(list(teller.reason)), rng.choice(list(teller.he))
    owner, asked = told.holder.get(thing), [f"Where is {who}? {who} is {told.place[who]}."]
    asked.append(
        f"Who has the {thing}? {owner} has the {thing}."
        if owner
        else f"Where is the {thing}? The {thing} is {told.place[thing]}."
    )
    return "\n".join([told.text, *rng.sample(asked, rng.choice((0, 0, 0, 1, 2)))])


def sum_of(rng: random.Random) -> str | None:
    """Work one sum, with its steps; None where any step has a held-out pair of operands."""
    kind = rng.choice("add subtract multiply small minus times share".split())
    a, b = (
        (rng.randint(11, 89) for _ in "ab")
        if kind in ("add", "subtract")
        else (rng.randint(2, 12) for _ in "ab")
    )
    a = rng.randint(11, 99) if kind == "multiply" else a
    if kind in ("subtract", "minus"):
        a, b = max(a, b) + 1, min(a, b)
    at, ao, bt, bo = a // 10 * 10, a % 10, b // 10 * 10, b % 10
    pairs, forms = {
        "add": (
            [(a, b), (at, bt), (ao, bo), (at + bt, ao + bo)],
            {"t": at + bt, "o": ao + bo, "r": a + b},
        ),
        "subtract": ([(a, b), (a, bt), (a - bt, bo), (a - b, b)], {"m": a - bt, "r": a - b}),
        "multiply": (
            [(a, b), (at, b), (ao, b), (at * b, ao * b)],
            {"t": at * b, "o": ao * b, "r": a * b},
        ),
        "share": ([(a, b), (a * b, a)], {}),
    }.get(kind, ([(a, b)], {}))
    trivial = kind in ("add", "subtract", "multiply") and not (ao and bo)
    if trivial or any(held_out_pair(*pair) for pair in pairs):
        return None
    words = {"A": a, "B": b, "S": a + b, "D": a - b, "P": a * b}
    return worded(
        rng,
        kind,
        **{k: number_word(n) for k, n in words.items() if n >= 0},
        **forms,
        a=a,
        b=b,
        at=at,
        ao=ao,
        bt=bt,
        bo=bo,
        things=plural(rng.choice(noun_kinds()["things"][:60])),
    )


def arithmetic(rng: random.Random) -> str:
    """Work a page of sums."""
    return paragraph(rng, filter(None, (sum_of(rng) for _ in range(rng.randint(6, 12)))), 0.4)


def counting(rng: random.Random) -> str:
    """Count up and down and by steps; tell order, size and digits of numbers."""
    out = []
    for _ in range(rng.randint(4, 8)):
        start, step, top = (
            rng.randint(0, 90),
            rng.choice((1, 1, 2, 3, 5, 10)),
            rng.choice((100, 1000)),
        )
        run = [start + i * step for i in range(rng.randint(5, 9))]
        (a, b), some = rng.sample(range(top), 2), rng.sample(range(100), 5)
        out.append(
            worded(
                rng,
                "count",
                a=a,
                b=b,
                max=max(a, b),
                min=min(a, b),
                more="more" if a > b else "less",
                end=a % 10,
                odd="an odd" if a % 2 else "an even",
                by="ones" if step == 1 else plural(number_word(step)),
                up=", ".join(map(str, run)),
                down=", ".join(map(str, run[::-1])),
                some=join_and(some),
                words=", ".join(map(number_word, run[:6])),
                sorted=join_and(sorted(some)),
                digits=join_and(list(str(a))),
                named=number_word(a),
            )
        )
    return paragraph(rng, out, 0.5)


@cache
def spelling_words() -> tuple[str, ...]:
    """Return the plain words of the tables; those that `held_out_word` picks are for the test."""
    texts = [
        f"{fact.subject} {fact.answer}"
        for name, relation in world_relations().items()
        if name not in (*LANGUAGES, "stands")
        for fact in relation.facts
    ]
    texts += [
        section("rhymes"),
        section("how_to"),
        section("first_letter"),
        section("places"),
        section("wanted"),
        section("weather"),
        section("feelings"),
        section("moves"),
        *noun_kinds()["things"],
        *noun_kinds()["food"],
    ]
    words = re.findall(r"(?<![\w{'])(?!the\b)[a-z]{3,10}(?![\w}'])", " ".join(texts))
    return tuple(dict.fromkeys(words))


@cache
def shown_words() -> list[str]:
    """Return the words that training may spell, backwards too."""
    held = set(held_words())
    return [w for w in spelling_words() if not {w, w[::-1]} & held]


@cache
def letter_chain() -> dict[str, list[str]]:
    """Return what may follow two letters in the words shown: letters, or "" for the end."""
    chain: dict[str, list[str]] = {}
    for word in shown_words():
        for i in range(len(word) + 1):
            chain.setdefault(word[max(i - 2, 0) : i], []).append(word[i : i + 1])
    return chain


@cache
def held_words() -> list[str]:
    """Return the words for the test."""
    return [word for word in spelling_words() if held_out_word(word)]


def made_word(rng: random.Random) -> str:
    """Make up a word, so that more combinations of letters are spelled than the tables have."""
    word = letter = rng.choice(letter_chain()[""])
    while letter:
        letter = rng.choice(letter_chain()[word[-2:]])
        word += letter
    held = any(test in word or test in word[::-1] for test in held_words() if test[3:])
    clumsy = not 4 <= len(word) <= 10 or re.search(CLUMSY, word)
    return made_word(rng) if held or clumsy else word


def spelling(rng: random.Random) -> str:
    """Spell words; count their letters, turn them round, name their first and last letters.

    Words are put in quotes too, those of the test as well: there they have other tokens, and a
    word that stands in its question without quotes has them in the reply.
    """
    out: list[str] = []
    for _ in range(rng.randint(4, 9)):
        if rng.random() < 0.5:
            out.append(worded(rng, "quoted", w=rng.choice(spelling_words())))
        made = rng.random() < 0.5
        w = made_word(rng) if made else rng.choice(shown_words())
        letter = rng.choice(w)
        k = w.count(letter)
        forms = {
            "w": f'"{w}"' if made or rng.random() < 0.7 else w,  # in quotes its tokens are shorter
            "l": "-".join(w),
            "n": number_word(len(w)),
            "list": ", ".join(w),
            "first": w[0],
            "last": w[-1],
            "back": w[::-1],
            "lback": "-".join(w[::-1]),
            "is": "is" if k == 1 else "are",
            "k": f"{number_word(k)} {letter}{chr(39) + 's' if k > 1 else ''}",
        }
        keys = rng.choice(
            (["spell"], ["spell", "letters"], ["letters"], ["spell", "letters", "letters"])
        )
        out += dict.fromkeys(worded(rng, key, **forms) for key in keys)
    return paragraph(rng, out, 0.4)


def rhyming(rng: random.Random) -> str:
    """Tell words that rhyme."""
    out = []
    for family in rng.sample(world_items("rhymes"), rng.randint(4, 8)):
        words = rng.sample(family.split(), len(family.split()))
        out.append(worded(rng, "rhyme", a=words[0], b=words[1], all=join_and(words)))
    return paragraph(rng, out, 0.4)


def how_to(rng: random.Random) -> str:
    """Tell how to do one thing, or two, step by step."""
    out = []
    for line in rng.sample(
        section("how_to").replace("\n ", " ").strip().splitlines(), rng.choice((1, 1, 2))
    ):
        title, _, text = line.partition(": ")
        steps = text.split(" | ")
        opening = worded(
            rng,
            "how",
            t=title,
            n=rng.choice(world_words("girls") + world_words("boys")),
            k=number_word(len(steps)),
        )
        links = [
            "first",
            *rng.sample(("then", "next", "after that", "now", "then"), len(steps) - 2),
            "finally",
        ]
        if rng.random() < 0.4:
            numbered = [f"{i}. {sentence(step)}" for i, step in enumerate(steps, 1)]
            out.append("\n".join([opening[:-1] + ":", *numbered]))
        else:
            out.append(" ".join([opening, *(sentence(f"{a}, {b}") for a, b in zip(links, steps))]))
    return "\n\n".join(out)


def sorting(rng: random.Random) -> str:
    """Put words in order, and find the odd one out of a group."""
    out = []
    for _ in range(rng.randint(3, 5)):
        words = rng.sample(shown_words(), rng.randint(3, 6))
        first, second = sorted(words)[:2]
        out.append(
            worded(
                rng,
                "sort",
                words=join_and(words),
                sorted=join_and(sorted(words)),
                first=first,
                second=second,
            )
        )
        facts = rng.sample(world_relations()["class"].facts, 40)
        odd = next(f for f in facts if f.answer != facts[0].answer)
        same = [f for f in facts if f.answer == facts[0].answer][:3]
        if len(same) == 3:
            named = rng.sample([f.subject for f in [*same, odd]], 4)
            out.append(
                worded(
                    rng, "odd", words=join_and(named), odd=odd.subject, kind=plural(facts[0].answer)
                )
            )
    return " ".join(out)


def world_documents(seed: int, count: int | None = None) -> Iterator[str]:
    """Yield documents for pretraining, without end unless `count` says how many; no two are equal.

    They are a function of the seed, 160 to 1,500 characters each; facts are about three fifths.
    """
    rng = random.Random(f"world text {seed}")
    facts = FactWriter(rng)
    own = {
        facts.mixed: 260,
        facts.theme: 170,
        facts.listing: 25,
        facts.entry: 80,
        facts.dialogue: 100,
    }
    tellers = {
        story: 125,
        arithmetic: 45,
        counting: 25,
        spelling: 60,
        rhyming: 15,
        how_to: 10,
        sorting: 10,
        tale: 60,
    }  # documents in about a thousand
    makers: list[Callable[[], str]] = [*own, *(partial(make, rng) for make in tellers)]
    bounds = list(itertools.accumulate([*own.values(), *tellers.values()]))
    seen: set[bytes] = set()
    while count is None or len(seen) < count:
        make = makers[bisect.bisect(bounds, rng.randrange(bounds[-1]))]
        text = make()
        if make in own and rng.random() < 0.1:
            text = text.lower()  # as people type: names have other tokens there
        while len(text) < 160:
            text = f"{text}\n\n{make()}".strip()
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if len(text) <= 1500 and digest not in seen:
            seen.add(digest)
            yield text


# 8. World: conversations ---------------------------------------------------------------------
# Statements that are no good as replies.
NO_REPLY = (
    f"{NO_LEAD}|.*(as you may know|of course|so people say|as we learn|comes to mind|one thing|of to )|among other|feed|"
    "first|everyone|what you|counting|by the|orchestras|it was|before it|one |today|a Roman"
)
CASED = ("symbol", "formula", "Roman", "stands", "letter after", "letter place")
VAGUE = ("food", "place", "material", "part")  # several choices may be right
LISTED = ("class", "kind", "sort", "family")
ELSEWHERE = ("sum", "product", "first letter")  # other kinds of conversations ask for these, too
CLUMSY = r"[^aeiouy]{4}|^[^aeiouy]{3}|[^aeiouy]{3}$|[aeiou]{3}|(.)\1\1|shit|fuck|f[au]g|" + (
    "nig|cunt|dick|cock|slut|piss|nazi|trump"
)


@cache
def table(name: str, whole: bool = True) -> dict[str, list[list[str]]]:
    """Read a table of talk: key -> its fields, each a list of wordings, written out if whole."""
    write = expand if whole else lambda field: field.split(" / ")
    rows = (
        re.split(" ?>!? ", re.sub(r"\s*\n\s*", " ", row))
        for row in re.split(r"\n+(?! )", section(name))
    )
    return {
        row[0]: [[w.strip() for w in write(field) if w.strip()] for field in row[1:]]
        for row in rows
    }


@cache
def ways(name: str) -> list[str]:
    """Write out a list of wordings."""
    return expand(re.sub(r"\s*\n\s*", " ", section(name)))


@cache
def lists(name: str, mark: str = ",") -> dict[str, list[str]]:
    """Read a table of lists: key -> items; entries end at ";", or at line ends if that is the mark."""
    lines = section(name).replace("\n ", " ").splitlines()
    rows = world_items(name) if mark == "," else lines
    return {key: items(row, mark) for key, _, row in (line.partition(": ") for line in rows)}


def choose(rng: random.Random, wording: str) -> str:
    """Choose one of each [a|b] in a wording."""
    return re.sub(r"\[(.*?)\]", lambda m: rng.choice(m[1].split("|")), wording)


@cache
def questions(name: str, forward: bool, unseen: bool = False) -> list[str]:
    """Return a relation's questions for the answer (forward) or for the subject."""
    asked = world_relations()[name].askings(forward, unseen)
    return [w for w in asked if not re.match("what .*is the (author|composer|writer|person) ", w)]


@cache
def full_replies(name: str, forward: bool) -> list[str]:
    """Return a relation's statements that are good replies, mostly ending in what is asked."""
    told = [w for w in world_relations()[name].wordings(forward) if not re.match(NO_REPLY, w)]
    return told + 3 * [w for w in told if ends_in(w, "o" if forward else "s")]


def fits(wording: str, fact: Fact) -> bool:
    """Whether a wording suits a fact: the name of a name is too much."""
    return not fact.subject.startswith("name ") or "name" not in wording


@cache
def brief_replies(name: str, forward: bool) -> list[str]:
    """Return all answers (or subjects) of a relation as they are said by themselves."""
    relation = world_relations()[name]
    form = relation.brief["o" if forward else "s"]
    return sorted({form.format_map(fact.forms()) for fact in relation.facts} - {"England"})


@cache
def fact_cards(askable: bool = True) -> dict[Card, dict[str, str]]:
    """Return what can be asked for, with its forms: answers, and subjects that an answer names."""
    return {
        (fact, forward): fact.forms()
        for relation in world_relations().values()
        for fact in relation.facts
        for forward in ((True, False) if relation.unique(fact) else (True,))
        if fact.askable == askable
    }


@cache
def known_words() -> set[str]:
    """Return every word of world.txt, in small letters: none of them is an invented name."""
    return set(re.findall(r"\w+", " ".join(sections().values()).casefold()))


def coined(rng: random.Random, real: Sequence[str], test: bool = False) -> str:
    """Invent a name in the style of real ones: in one of them a word is made anew.

    A new word is joined of the parts of two real ones, or of syllables, or of both. Which words
    are for the test is decided by a hash, as everywhere.
    """
    while True:
        words = rng.choice(real).split()
        capitals = [i for i, w in enumerate(words) if w[0].isupper() and w not in ("The", "Mount")]
        places = [i for i in capitals or range(len(words)) if words[i].isalpha()]
        places = [i for i in places if len(words[i]) > 3 or words[i].isupper()]
        if not places:
            continue
        i = rng.choice(places) if capitals else places[-1]
        word, other = words[i], rng.choice(rng.choice(real).split())
        new = "".join(
            rng.choice(world_words("onsets")) + rng.choice(world_words("vowels"))
            for _ in range(rng.choice((1, 1, 2)))
        )
        new, roll = new + rng.choice(world_words("codas")), rng.random()
        if roll < 0.35:
            new = word[: rng.randint(2, max(2, len(word) - 1))] + other[-rng.randint(2, 4) :]
        elif roll < 0.75:
            new += word[-rng.randint(2, 4) :]
        new = "".join(rng.sample("QXZJVKWFY", 3)) if word.isupper() else new.lower()
        clumsy = not (4 <= len(new) <= 11 and new.isalpha()) or re.search(CLUMSY, new)
        small = new.lower()
        if clumsy and not word.isupper() or known_words() & {small, small + "s", small[:-1]}:
            continue
        if held_out(f"name {small}") == test:
            words[i] = new.capitalize() if capitals and not word.isupper() else new
            if i and words[i - 1] in ("a", "an"):
                words[i - 1] = with_article(new).split()[0]
            return " ".join(words)


def conversation(kind: str, texts: Sequence[Any], system: str = "", **grade: Any) -> dict[str, Any]:
    """Make a conversation of what is said in turn; with a grade, the item that asks for its end."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    if not grade:
        return {"kind": kind, "messages": messages}
    reply = messages.pop()["content"]
    return {"kind": kind, "messages": messages, "grade": "text", **grade, "reply": reply}


def put(rng: random.Random, clause: str, before: Sequence[str] = (), cased: bool = False) -> str:
    """Put a question as people do: plainly, politely, in passing, or typed in a hurry."""
    roll, text = rng.random(), sentence(clause)
    if roll < 0.35:  # typed
        typed = clause.rstrip("?." if roll < 0.28 else ".")
        if roll < 0.1:
            typed = re.sub(
                r"\bthe ",
                "",
                re.sub(r"\b(what|who|where) is\b", rng.choice((r"\1s", r"\1's")), typed),
            )
        if roll < 0.04:
            typed += rng.choice(
                (" please", " now", " today", " answer", " quick", f" {rng.randint(1990, 2026)}")
            )
        return typed if cased or roll < 0.06 else typed.lower()
    if roll > (0.75 if before else 0.6) or before and before[-2][-1] != "?":
        return text
    plain = re.match("(can|could|do|would) you|tell|give|say|name|your|I |I$|so ", clause)
    forms = [w for w in ways("go_on" if before else "polite") if "{Q}" in w or not plain]
    return rng.choice(forms).format(Q=text, q=clause[0] + text[1:])


def hurried(rng: random.Random, wording: str) -> str:
    """Leave small words out of a wording now and then, as people type into a search box.

    Without such questions a model takes any wording that it has not seen for one that asks for
    what it does not know.
    """
    if rng.random() > 0.15:
        return wording
    small = world_words("small_words")
    kept = [w for w in wording.split() if w.strip("?.,:") not in small or rng.random() < 0.3]
    short = " ".join(kept).rstrip(",:")
    return short if re.search("[a-z]{3}", re.sub(r"\{.*?\}", "", short)) else wording


def slips(word: str) -> list[str]:
    """Return how a word is mistyped: inside, a letter too few or too many, or two swapped."""
    inner = range(1, len(word) - 1)
    made = [word[:i] + word[i + 1 :] for i in inner]
    made += [word[: i + 1] + word[i:] for i in inner]
    made += [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner]
    return sorted({*made} - {word})


def mistyped(rng: random.Random, wording: str) -> str:
    """Mistype one word of a wording now and then; never what fills it, or it would be another.

    Without such questions a model takes an unknown word around a subject for an unknown subject.
    """
    words = re.findall(r"(?<![{\w'])[a-z]{4,}(?![}\w'])", wording)
    if not words or rng.random() > 0.12:
        return wording
    word = rng.choice(words)
    return re.sub(rf"(?<![{{\w]){word}\b", rng.choice(slips(word)), wording, count=1)


def greeted(rng: random.Random, text: str, reply: str) -> str:
    """Return a greeting, or agree to help, before a reply now and then."""
    if text.startswith(("Hello", "Hi", "Good ")) and rng.random() < 0.4:
        return rng.choice(("Hello! ", "Hi! ")) + reply
    asked = text.startswith(("Can you help", "Could you help", "Help me"))
    return rng.choice(("Sure! ", "Of course. ", "", "")) + reply if asked else reply


def as_asked(wording: str, forms: dict[str, str]) -> str:
    """Return the subject in the form in which a question names it."""
    found = re.search(r"(the |a baby |a young )?\{([ap]?s|ss|x|adj)\}", wording)
    assert found, wording
    form = found[2] if found[2] in ("as", "ps") else "s"
    return f"the {forms['s']}" if found[1] == "the " else forms["as" if found[1] else form]


def fact_grade(card: Card, question: str) -> dict[str, Any]:
    """Return what a reply must say, and what else of the relation it must not."""
    fact, forward = card
    relation, answer = world_relations()[fact.relation], fact.answer if forward else fact.subject
    accept = [*spellings(answer), re.sub("^(the|an?) ", "", answer)]
    if any(("{po}" if forward else "{ps}") in w for w in relation.statements):
        accept.append(plural(answer))
    # what the question says, or any reply (with its greeting), tells nothing
    said = ["hello", question, fact.subject if forward else fact.answer, *relation.statements]
    told = re.findall(r"\w+", " ".join(said).casefold())
    others = {f.answer if forward else f.subject for f in relation.facts} - set(accept)
    reject = [o for o in others if f" {o.casefold()} " not in f" {' '.join(told)} "]
    return {"answer": answer, "accept": list(dict.fromkeys(accept)), "reject": sorted(reject)}


def lay_out(rng: random.Random, question: str, choices: Sequence[str]) -> str:
    """Put choices under a question, to be answered by one of them and its letter.

    A small model names the letter only after it has said the answer: it looks up what stood
    behind those words. So the letter follows them at once, both times, as one token, and the
    reply ends in the line that is right.
    """
    lines = [f"- {choice} {letter}" for choice, letter in zip(choices, "ABCD")]
    end = rng.choice(([], ["Say the answer and its letter."], ["Which one is right?"]))
    return "\n".join([question, *lines, *end])


def identity_turn(rng: random.Random, name: str, texts: list[str], key: str = "") -> None:
    """Ask the assistant who it is, and let it answer."""
    asked, _, replies = table("identity")[key or rng.choice(list(table("identity")))]
    text = put(rng, mistyped(rng, rng.choice(asked)), texts)
    texts += [text, greeted(rng, text, rng.choice(replies).format(name=name))]


def identity_chat(rng: random.Random, name: str) -> dict[str, Any]:
    """Ask an assistant of any name who it is, and what, and the like."""
    texts: list[str] = []
    for key in rng.sample(list(table("identity")), rng.choice((1, 1, 2, 3))):
        identity_turn(rng, name, texts, key)
    return conversation("identity", texts)


def rhyme_request(rng: random.Random) -> tuple[str, str]:
    """Return words that rhyme with one, after that one."""
    family = rng.choice(world_items("rhymes")).split()
    word, *others = rng.sample(family, min(len(family), rng.randint(2, 4)))
    return word, sentence(f"{join_and(others)} {'rhyme' if others[1:] else 'rhymes'} with {word}")


def how_request(rng: random.Random) -> tuple[str, str]:
    """Return what to do, and its steps."""
    title, _, text = rng.choice(
        section("how_to").replace("\n ", " ").strip().splitlines()
    ).partition(": ")
    steps = text.split(" | ")
    if rng.random() < 0.5:
        return title, "\n".join(f"{i}. {sentence(step)}" for i, step in enumerate(steps, 1))
    links = ["first", "then", "next", "after that"][: len(steps) - 1] + ["finally"]
    return title, " ".join(sentence(f"{a}, {b}") for a, b in zip(links, steps))


def story_questions(teller: Teller, told: Story) -> list[tuple[str, dict[str, str], list[str]]]:
    """Return what can be asked of a story: key of story_asks, forms, and what must be said."""
    noun = {who: place.split(" ", 2)[2] for who, place in told.place.items()}
    asks = [("person", {"n": n}, [noun[n]]) for n in teller.he]
    for t in teller.reason:
        if n := told.holder.get(t):
            asks.append(("carried", {"t": t, "n": n}, [n, noun[t]]))
            asks.append(("holder", {"t": t, "n": n}, [n]))
        else:
            asks.append(("lying", {"t": t}, [noun[t]]))
    for n, t, m in told.given:
        if sum(given[1:] == (t, m) for given in told.given) == 1:
            asks.append(("giver", {"n": n, "t": t, "m": m}, [n]))
        if sum(given[:2] == (n, t) for given in told.given) == 1:
            asks.append(("taker", {"n": n, "t": t, "m": m}, [m]))
    for _, forms, _ in asks:
        at = told.place[forms.get("t") or forms["n"]]
        forms |= {"at": at, "At": at.capitalize()}
    return asks


class Asker:
    """Asks and answers; facts, their wordings and letters are dealt so that none is left out.

    For the test the last question of each conversation, its names and what is invented are such
    as training never sees, and the conversation is an item to be graded.
    """

    def __init__(self, rng: random.Random, name: str = "Nano", test: bool = False) -> None:
        self.rng, self.name, self.test, self.relations = rng, name, test, world_relations()
        self.turns = {card: rng.randrange(60) for card in fact_cards()}  # wordings used so far
        lettered = [(fact, forward) for fact, forward in self.turns if fact.relation not in VAGUE]
        lettered = [c for c in lettered if len(brief_replies(c[0].relation, c[1])) >= 4]
        self.deck, self.lettered = Deck(rng, self.turns), Deck(rng, lettered)
        self.letters = Deck(rng, "ABCD")
        self.same: dict[str, list[Fact]] = {}  # relation -> facts
        self.more: dict[str, list[Fact]] = {}  # subject -> facts that are told of it as "it"
        for fact in (fact for fact, forward in self.turns if forward):
            self.same.setdefault(fact.relation, []).append(fact)
            if self.relations[fact.relation].follow:
                self.more.setdefault(fact.subject, []).append(fact)
        self.alike = Deck(rng, (f for facts in self.same.values() for f in facts))
        self.it = Deck(rng, (f for facts in self.more.values() if facts[1:] for f in facts))
        self.cities = [f.subject for f in self.relations["city"].facts]
        self.models = {  # relation -> real names, of subjects and of answers
            name: ([f.subject for f in r.facts], [f.answer for f in r.facts])
            for name, r in self.relations.items()
            if name not in world_items("plain")
        }
        self.groups: dict[tuple[str, str], list[str]] = {}  # relation, answer -> subjects
        for fact in (fact for name in LISTED for fact in self.same[name]):
            self.groups.setdefault((fact.relation, fact.answer), []).append(fact.subject)

    def people(self) -> list[list[str]]:
        """Return girls' and boys' names, at times invented ones: any word may be a name."""
        if self.test:
            return [world_words("test_girls"), world_words("test_boys")]
        if self.rng.random() < 0.7:
            return [world_words("girls"), world_words("boys")]
        return [
            [coined(self.rng, names) for _ in range(3)]
            for names in (world_words("girls"), world_words("boys"))
        ]

    def wording(self, card: Card, one: bool = False) -> str:
        """Return the next question for a fact, with `one` not for many."""
        wordings = questions(card[0].relation, card[1])
        while True:
            self.turns[card] += 1
            wording = wordings[self.turns[card] % len(wordings)]
            if fits(wording, card[0]) and not (one and "{ps}" in wording):
                return wording

    def asking(self, card: Card) -> str:
        """Ask for a fact, at times in a hurry."""
        wording = mistyped(self.rng, hurried(self.rng, self.wording(card)))
        return wording.format_map(fact_cards()[card])

    def reply(self, card: Card, brief: float = 0.12, one: bool = False) -> str:
        """Answer in a full sentence, with `one` not of many, or at times by the answer alone."""
        fact, forward = card
        told = full_replies(fact.relation, forward)
        if self.rng.random() < brief:
            told = [self.relations[fact.relation].brief["o" if forward else "s"]]
        told = [w for w in told if fits(w, fact) and not (one and "{ps}" in w)]
        return sentence(self.rng.choice(told).format_map(fact.forms()))

    def follow(self, fact: Fact) -> str:
        """State a fact of what has just been named."""
        told = self.rng.choice(self.relations[fact.relation].follow)
        return sentence(told.format_map(fact.forms()))

    def fact_turn(self, texts: list[str], brief: float = 0.12) -> None:
        """Ask for a fact, and answer."""
        card = self.deck.deal()
        clause = self.asking(card)
        text = put(self.rng, clause, texts, card[0].relation in CASED)
        texts += [text, greeted(self.rng, text, self.reply(card, brief))]

    def fact_chat(self) -> dict[str, Any]:
        """Ask for some facts, one after another."""
        roll, texts, system = self.rng.random(), list[str](), ""
        if roll < 0.06:
            system = self.rng.choice(ways("briefly" if roll < 0.04 else "instructions"))
        for _ in range(self.rng.choice((1, 1, 2, 2, 3, 4))):
            self.fact_turn(texts, 1 if roll < 0.04 else 0.12)
        return conversation("fact", texts, system.format(name=self.name))

    def fact_item(self, card: Card) -> dict[str, Any]:
        """Ask for a fact in a wording that is kept for the test, chosen by the fact."""
        (fact, forward), forms = card, card[0].forms()
        asked = [w for w in questions(fact.relation, forward, True) if fits(w, fact)]
        salt = zlib.crc32(f"{fact.key} {fact.subject} {forward}".encode())
        question = sentence(asked[salt % len(asked)].format_map(forms))
        return conversation("fact", [question, self.reply(card)], **fact_grade(card, question))

    def by_letter(self, card: Card, question: str) -> dict[str, Any]:
        """Make an item of a fact and three wrong choices."""
        (fact, forward), letter = card, self.letters.deal()
        right = self.relations[fact.relation].brief["o" if forward else "s"]
        right = right.format_map(fact.forms())
        wrong = [choice for choice in brief_replies(fact.relation, forward) if choice != right]
        choices = self.rng.sample(wrong, 3)
        choices.insert("ABCD".index(letter), right)
        turned = not self.test and self.rng.random() < 0.3  # the line looks for what is offered,
        told = self.reply((fact, forward != turned), 0)  # wherever the sentence has it
        texts = [lay_out(self.rng, question, choices), f"{told}\n- {right} {letter}"]
        return conversation("letters", texts, grade="letter", answer=letter, choices=choices)

    def letters_chat(self) -> dict[str, Any]:
        """Ask for a fact or two by letters."""
        texts: list[str] = []
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            card = self.lettered.deal()
            clause = self.asking(card)
            item = self.by_letter(card, put(self.rng, clause, texts, True))
            texts += [item["messages"][0]["content"], item["reply"]]
        return conversation("letters", texts)

    def story_chat(self) -> dict[str, Any]:
        """Tell a short story, and ask who is where and who has what."""
        rng, text = self.rng, ""
        while not 0 < len(text) < 420:
            teller = Teller(rng, *self.people())
            told = teller.tell(rng.randint(1, 4))
            text = told.text
        asks = story_questions(teller, told)
        texts: list[str] = []
        for key, forms, accept in rng.sample(asks, 1 if self.test else min(3, rng.randint(1, 4))):
            row = table("story_asks")[key]
            ask, reply = (rng.choice(row[i]) for i in (self.test, 2))
            ask = (ask if self.test else mistyped(rng, ask)).format_map(forms)
            reply = reply.format_map(forms)
            lead = rng.choice(("{}\n\n{}", "{} {}", "{}\n{}", "Story: {}\n\n{}"))
            texts += [sentence(ask) if texts else lead.format(text, sentence(ask)), reply]
        if not self.test:
            return conversation("story", texts)
        others = {*teller.he, *(place.split(" ", 2)[2] for place in teller.places)}
        reject = sorted(o for o in others - set(accept) if o not in ask)
        return conversation("story", texts, answer=accept[0], accept=accept, reject=reject)

    def follow_chat(self) -> dict[str, Any]:
        """Ask for a fact, then for the same of others, or for more of the same subject."""
        rng, it = self.rng, self.rng.random() < 0.5
        fact = (self.it if it else self.alike).deal()
        wording = self.wording((fact, True), it)
        texts = [put(rng, wording.format_map(fact.forms())), self.reply((fact, True), 0.05, it)]
        others = [f for f in (self.more[fact.subject] if it else self.same[fact.relation])]
        others = rng.sample([f for f in others if f != fact], min(len(others), 4) - 1)
        others = others[: rng.choice((1, 1, 2, 3))]
        for other in others:
            unseen = self.test and other == others[-1]
            if it:
                asked = rng.choice(ways("it_too_unseen" if unseen else "it_too"))
                asked = asked.format(c=lists("it")[other.relation][0])
            else:
                asked = rng.choice(ways("follow_up_unseen" if unseen else "follow_up"))
                if "of {s}" in wording and not unseen and rng.random() < 0.25:
                    asked = "and of {s}?"
                asked = asked.format(s=as_asked(wording, other.forms())).replace("..", ".")
            told = self.follow(other) if it else ""
            if rng.random() < 0.4 or not it:
                told = self.reply((other, True), one=it)
            texts += [sentence(asked), told]
        grade = fact_grade((other, True), " ".join(texts[:-1])) if self.test else {}
        return conversation("follow-up", texts, **grade)

    def memory_chat(self, later: int = -1) -> dict[str, Any]:
        """Be told things by somebody, and know them when asked later: after some turns."""
        rng, rows, texts = self.rng, table("memory"), list[str]()
        girls, boys = (rng.sample(names, 3) for names in self.people())
        told = {}  # key -> forms
        for key in rng.sample(list(rows), rng.choice((1, 2, 2, 3))):
            p = rng.choice(lists("memory_values").get(key, [""]))
            values = {
                "city": rng.choice(self.cities),
                "month": rng.choice(world_words("months")[::2]),
            }
            if key in ("name", "pet", "person"):
                sides = {"sister": girls, "aunt": girls, "brother": boys, "uncle": boys}
                values[key] = sides.get(p, rng.choice((girls, boys))).pop()
            values.setdefault(key, p or str(rng.randint(5, 90)))
            told[key] = {"p": p, "ap": p and with_article(p), "v": values[key]}
        said = [rng.choice(rows[key][0]).format_map(forms) for key, forms in told.items()]
        for i, part in enumerate([said] if rng.random() < 0.6 else [[one] for one in said]):
            joined = rng.choice((1, 2))
            text, rest = sentence(", and ".join(part[:joined])), part[joined:]
            hello = rng.choice(("", "", "Hello!", "Hi!", "Hi there!")) if not i else ""
            reply = rng.choice(ways("told"))
            if "name" in told and told["name"]["v"] in text and rng.random() < 0.7:
                reply = f"Nice to meet you, {told['name']['v']}!"
            texts += [" ".join([hello, text, *map(sentence, rest)]).strip(), reply]
        turns = rng.choice((0, 1, 1, 2)) if later < 0 else later
        for _ in range(turns):
            self.fact_turn(texts)
        for key in rng.sample(list(told), 1 if self.test else rng.randint(1, min(2, len(told)))):
            forms = told[key]
            ask, reply = (rng.choice(rows[key][i]) for i in (1 + self.test, 3))
            ask = ask if self.test else mistyped(rng, ask)
            texts += [sentence(ask.format_map(forms)), reply.format_map(forms)]
        if self.test:
            others = [other["v"] for other in told.values() if other != forms]
            grade: Any = {"answer": forms["v"], "accept": [forms["v"]], "reject": others}
            return conversation("memory", texts, **grade)
        if rng.random() < 0.12:
            key = rng.choice([key for key in rows if key not in told])
            ask = rng.choice(rows[key][1]).format(
                p=rng.choice(lists("memory_values").get(key, [""]))
            )
            texts += [sentence(ask), rng.choice(ways("not_told"))]
        return conversation("memory", texts)

    def outside_turn(self, texts: list[str]) -> None:
        """Ask for what the assistant cannot do; it says so, and what it can do."""
        rng, words = self.rng, lists("outside_words", ";")
        rows = table("outside", whole=False)
        row = rows[rng.choice([key for key in rows if rows[key][self.test]])]
        forms: dict[str, str] = {}
        for key, some in words.items():
            forms[key], forms[f"{key}2"] = rng.sample(some, 2)
        forms["awork"] = with_article(forms["work"])
        names = [coined(rng, n) for n in self.people()] if rng.random() < 0.2 else [
            rng.choice(n) for n in self.people()]  # fmt: skip
        forms["a"], forms["b"] = names[0], names[1]
        forms["c"], forms["c2"] = rng.sample(self.cities, 2)
        forms["day"], forms["number"] = rng.choice(world_items("days")), str(rng.randint(2, 90))
        things = rng.sample(noun_kinds()["things"], rng.randint(2, 6))
        forms["things"], forms["food"] = (
            ", ".join(map(plural, things)),
            rng.choice(noun_kinds()["food"]),
        )
        told = [rng.choice(all_statements()) for _ in range(rng.choice((1, 1, 2, 3)))]
        if rng.random() < 0.5:
            told = [rng.choice((
                f"I think that {forms['topic']} is better than {forms['topic2']}.",
                f"{forms['a']} wants to {forms['activity']} because of {forms['topic']}.",
                f"Dear {forms['a']}, thank you for {forms['occasion']}. Yours, {forms['b']}",
                f"This is the worst {forms['work']} about {forms['topic']} that I have read.",
                f"{forms['topic'].capitalize()} has changed the way we live.",
                f"From: {forms['c']}\nTo: {forms['c2']}", f"{forms['topic']}",
                f"He {rng.choice(('go', 'went', 'goes', 'gone'))} to {forms['c']} yesterday.",
            ))]  # fmt: skip
        forms["text"] = " ".join(told).rstrip(rng.choice((".", "")))
        topic, two = forms["topic"], forms["topic2"]
        title = rng.choice((topic, forms["things"].split(",")[0], forms["activity"])).title()
        forms["input"] = rng.choice((
            forms["text"], forms["text"], f'"{forms["text"]}"', topic, title, f"{title}, {two}",
            f"Topic: {topic}", f"Product: {title}\nRating: {rng.randint(1, 5)}", forms["things"],
            f"- {topic}\n- {two}", f"{title} ({rng.randint(1900, 2026)})", f"A. {topic}\nB. {two}",
            f"{names[0]}: {forms['text']}\n{names[1]}: I see.", f"{forms['number']} {topic}",
            f"Text: {forms['text']}\nQuestion: why?", forms["code"], f"{title} = {two}",
        ))  # fmt: skip
        clause = choose(rng, rng.choice(row[self.test])).format_map(forms)
        if rng.random() < 0.7:
            clause = clause.replace(forms["input"], rng.choice(("\n", "\n\n")) + forms["input"])
            clause = re.sub(r" (?=\n)", "", clause).strip()
        if rng.random() < 0.7:
            clause = re.sub(r"(?<=[.?] )[a-z]", lambda m: m[0].upper(), clause)
        text = put(rng, clause, texts, True)
        reply = f"{rng.choice(row[2])} {rng.choice(ways('instead'))}"
        texts += [text, reply]

    def outside_chat(self) -> dict[str, Any]:
        """Ask for things that the assistant cannot do, and for some that it can."""
        texts: list[str] = []
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            self.outside_turn(texts)
            if self.rng.random() < 0.25:
                self.fact_turn(texts)
        return conversation("outside", texts)

    def unknown_turn(self, texts: list[str]) -> None:
        """Ask for what nobody has told, or for what does not exist, and say so."""
        rng, cased = self.rng, False
        if rng.random() < 0.2:
            row = rng.choice(list(table("beyond").values()))
            family = coined(rng, self.cities, self.test)
            forms = {"n": rng.choice(rng.choice(self.people())), "c": rng.choice(self.cities)}
            forms["f"] = (
                f"{coined(rng, world_words('girls') + world_words('boys'), self.test)} {family}"
            )
            clause, reply = (rng.choice(row[i]).format_map(forms) for i in (self.test, 2))
        else:
            name = rng.choice(list(self.models))
            forward = name not in section("backward").split(", ") or rng.random() < 0.7
            s = coined(rng, self.models[name][0], self.test)
            o = s if forward else coined(rng, self.models[name][1], self.test)
            wording = rng.choice(questions(name, forward, self.test))
            forms = Fact(name, s, o, "").forms()
            clause = wording if self.test else mistyped(rng, hurried(rng, wording))
            clause, cased = clause.format_map(forms), name in CASED
            reply = rng.choice(ways("dont_know")).format(
                s=as_asked(wording, forms) if forward else o
            )
        text = sentence(clause) if self.test else put(rng, clause, texts, cased)
        texts += [text, greeted(rng, text, reply)]

    def unknown_chat(self) -> dict[str, Any]:
        """Ask for things that do not exist, and for some that do."""
        texts: list[str] = []
        turns = range(self.rng.choice((1, 1, 2, 3)))
        for i in self.rng.sample(turns, len(turns)):
            (self.fact_turn if i and self.rng.random() < 0.5 else self.unknown_turn)(texts)
        return conversation("unknown", texts)

    def about_request(self) -> tuple[str, str]:
        """Return a subject, and some facts of it."""
        first, *others = self.more[self.it.deal().subject]
        others = self.rng.sample(others, min(len(others), 3))
        told = [self.reply((first, True), 0, True), *map(self.follow, others)]
        creature = first.relation in ("class", "young", "sound", "legs", "food", "sides")
        return first.forms()["as" if creature else "s"], " ".join(told)

    def list_request(self) -> tuple[str, str]:
        """Return how many of which kind of thing, and as many of them."""
        name, kind = self.rng.choice([key for key, group in self.groups.items() if len(group) > 3])
        words = self.rng.sample(self.groups[name, kind], self.rng.choice((2, 3, 3, 4)))
        what = f"{number_word(len(words))} {plural(kind)}"
        words = [plural(word) if name in ("class", "kind") else word for word in words]
        if self.rng.random() < 0.4:
            return what, "\n".join(f"- {word}" for word in words)
        words = [f"the {word}" for word in words] if name == "family" else words
        return what, sentence(f"{join_and(words)} are {plural(kind)}")

    def story_request(self) -> tuple[str, str]:
        """Return names, and a story about them."""
        while True:
            teller = Teller(self.rng, *self.people())
            text = teller.tell(self.rng.randint(1, 4)).text
            if len(text) < 500:
                return join_and(list(teller.he)), text

    def talk_turn(self, texts: list[str], keys: str = "") -> None:
        """Say something small, or ask for a text, and reply."""
        rng = self.rng
        if keys or rng.random() < 0.55:
            among = keys.split() or [key for key in table("talk") if key != "hello" or not texts]
            asked, reply = map(rng.choice, table("talk")[rng.choice(among)])
        else:
            makers: dict[str, Callable[[], tuple[str, str]]] = {
                "rhyme": partial(rhyme_request, rng), "how": partial(how_request, rng),
                "list": self.list_request, "about": self.about_request, "story": self.story_request,
            }  # fmt: skip
            key = rng.choice(list(makers))
            what, reply = makers[key]()
            asked = rng.choice(table("requests")[key][0])
            asked = asked.format(w=what.replace("your ", "my ") if " I " in asked else what)
        texts += [sentence(asked) if rng.random() < 0.85 else asked.rstrip(".!?"), reply]

    def talk_chat(self) -> dict[str, Any]:
        """Talk of this and that."""
        texts: list[str] = []
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.talk_turn(texts)
        return conversation("talk", texts)

    def mixed_chat(self) -> dict[str, Any]:
        """Greet, ask for this and that, thank and go."""
        rng, texts = self.rng, list[str]()
        ask = partial(identity_turn, rng, self.name)
        if rng.random() < 0.7:
            self.talk_turn(texts, "hello hello how sad glad like")
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice((self.fact_turn, self.fact_turn, self.unknown_turn, ask))(texts)
        if rng.random() < 0.7:
            self.talk_turn(texts, "thanks thanks praise bye")
        system = rng.choice(ways("instructions")) if rng.random() < 0.3 else ""
        return conversation("mixed", texts, system.format(name=self.name))


# Shares of the turns of conversations of each kind.
KINDS = {
    "fact": 30, "letters": 7, "problem": 30, "sum": 8, "outside": 8,
    "spelling": 11, "story": 9, "follow-up": 5, "memory": 6,
    "identity": 5, "unknown": 9, "talk": 2, "mixed": 2,
}  # fmt: skip
LONGEST = 700  # characters of a conversation, so that nearly all fit a context of 256 tokens


def world_conversations(
    seed: int, split: str, count: int | None = None, name: str = "Nano"
) -> Iterator[dict[str, Any]]:
    """Yield conversations of "mid", "sft" or "val", or the problems of "rl"; no two are equal.

    They are a function of seed and name, without end unless `count` says how many. None of val
    is one of mid or sft, whatever their seeds: a hash of the conversation decides.
    """
    rng = random.Random(f"world {split} {seed}")
    asker = Asker(rng, name)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "fact": asker.fact_chat, "letters": asker.letters_chat, "story": asker.story_chat,
        "follow-up": asker.follow_chat, "memory": asker.memory_chat, "unknown": asker.unknown_chat, "outside": asker.outside_chat,
        "talk": asker.talk_chat, "mixed": asker.mixed_chat,
        "identity": partial(identity_chat, rng, name), "problem": partial(problem_chat, rng),
        "sum": partial(sum_chat, rng), "spelling": partial(spelling_chat, rng),
    }  # fmt: skip
    shares = KINDS
    if split == "rl":
        makers, shares = {"problem": partial(rl_problems, rng)}, {"problem": 1}
    turns = dict.fromkeys(shares, 0)
    seen: set[bytes] = set()
    while count is None or len(seen) < count:
        kind = min(shares, key=lambda kind: (turns[kind] + rng.random()) / shares[kind])
        made = makers[kind]()
        messages = made["messages"]
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=12).digest()
        good = split == "rl" or (digest[0] % 10 == 0) == (split == "val")
        if good and digest not in seen and sum(map(text_size, messages)) <= LONGEST:
            seen.add(digest)
            turns[kind] += len(messages) // 2 or 1
            yield made


def text_size(message: dict[str, Any]) -> int:
    """Count the characters of a message."""
    content = message["content"]
    return len(content if isinstance(content, str) else "".join(part["text"] for part in content))


def take_items(count: int, make: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Make items until there are `count` that differ in what they ask."""
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        item = make()
        made.setdefault(json.dumps(item["messages"]), item)
    return list(made.values())


def identity_set(rng: random.Random, name: str) -> list[dict[str, Any]]:
    """Ask for name, maker and kind in wordings that are kept for the test, in many manners."""
    made = []
    for key, words in lists("identity_keys").items():
        accept = [word.format(name=name) for word in words]
        _, unseen, replies = table("identity")[key]
        for clause, manner in itertools.product(unseen, ["{Q}", "{q}", *ways("polite")]):
            text = manner.format(Q=sentence(clause), q=clause)
            reply = rng.choice(replies).format(name=name)
            made.append(conversation("identity", [text, reply], answer=accept[0], accept=accept))
    return made


@cache
def world_sets(name: str = "Nano") -> dict[str, list[dict[str, Any]]]:
    """Return the evaluation sets: graded items, functions of the tables alone."""
    rng = random.Random("evaluation")
    asker = Asker(rng, name, test=True)
    sides: dict[Fact, list[Card]] = {}  # of each fact one way round is asked for
    for card in (*fact_cards(True), *fact_cards(False)):
        sides.setdefault(card[0], []).append(card)
    cards = [s[zlib.crc32(fact.subject.encode()) % len(s)] for fact, s in sides.items()]

    def by_letter() -> dict[str, Any]:
        fact, forward = card = asker.lettered.deal()
        asked = rng.choice([w for w in questions(fact.relation, forward, True) if fits(w, fact)])
        return asker.by_letter(card, sentence(asked.format_map(fact.forms())))

    def unknown() -> dict[str, Any]:
        texts: list[str] = []
        asker.unknown_turn(texts)
        phrase = "I don't know"
        return conversation("unknown", texts, answer=phrase, accept=[phrase])

    def outside() -> dict[str, Any]:
        texts: list[str] = []
        asker.outside_turn(texts)
        return conversation("outside", texts, answer=HONEST[0], accept=HONEST)

    tellers = (asker.story_chat, asker.follow_chat, asker.memory_chat)
    return {
        "letters": take_items(1000, by_letter),
        "facts": [asker.fact_item(card) for card in cards if card[0].askable],
        "never_asked": [
            asker.fact_item(card)
            for card in cards
            if not card[0].askable and card[0].relation not in ELSEWHERE
        ],
        "stories": [item for make in tellers for item in take_items(200, make)],
        "identity": identity_set(rng, name),
        "unknown": take_items(500, unknown),
        "remembered": take_items(400, partial(asker.memory_chat, 5)),
        "outside": take_items(400, outside),
        "sums": take_items(500, partial(sum_item, random.Random("sums"), True)),
        "spelling": spelling_set(),
        **problem_sets(),
    }


# 9. World: problems --------------------------------------------------------------------------


def weighed(rng: random.Random, table: dict[str, int]) -> str:
    """Choose a key by its weight."""
    return rng.choices(list(table), list(table.values()))[0]


def require(fits: bool) -> None:
    """Give up a problem whose parts do not go together."""
    if not fits:
        raise ValueError("parts that do not go together")


PRONOUNS = {key: row.split() for key, row in {
    "he": "he him his", "she": "she her her", "they": "they them their", "it": "it it its",
    "I": "I me my", "we": "we us our",
}.items()}  # fmt: skip
OBJECTS = """gave gives give sent sends send lent lends lend handed hands hand than from for to of
took takes take cost costs with""".split()  # words after which a pronoun is an object
ASKED = re.compile("(find|tell) ")  # questions that end in a full stop


@dataclass
class Scheme:
    """A kind of word problem: an equation, how its numbers are told, asked for and explained."""

    name: str
    roles: list[str]  # the whole, then its parts
    times: bool  # the whole is the product of its parts, not their sum
    kinds: dict[str, set[str]]  # role -> of what kind its number is
    sizes: dict[str, tuple[int, int]]
    nouns: list[str]
    any_order: bool
    tells: dict[tuple[str, ...], list[str]]
    asks: dict[str, list[str]]
    whys: dict[str, str]


@cache
def schemes() -> list[Scheme]:
    """Read the kinds of word problems."""
    made = []
    for block in re.split(r"(?m)^@ ", section("problems"))[1:]:
        header, *lines = block.strip().replace("\n ", " ").splitlines()
        name, equation, nouns, *flags = (cell.strip() for cell in header.split("|"))
        terms = [term.split() for term in re.split("[=+*]", equation)]
        names = [term[0].partition(":") for term in terms]
        sizes = {n[0]: term[1].split("-") for n, term in zip(names, terms) if term[1:]}
        scheme = Scheme(
            name, [n[0] for n in names], "*" in equation, {n[0]: {n[2]} - {""} for n in names},
            {role: (int(low), int(high)) for role, (low, high) in sizes.items()},
            nouns.split(), "any" in flags, {}, {}, {},
        )  # fmt: skip
        for line in lines:
            roles, _, text = line[2:].partition(": ")
            ways = [way.strip() for way in text.split(" / ")]
            if line[0] == "+":
                scheme.tells[tuple(roles.split())] = ways
            elif line[0] == "?":
                scheme.asks[roles] = ways
            else:
                scheme.whys[roles] = text
        made.append(scheme)
    return made


@cache
def part_set(text: str) -> str:
    """Return who meets a wording, verb or noun: "test", "practised" by rl without solution, or all."""
    n = int.from_bytes(hashlib.sha256(f"part {text}".encode()).digest()[:4], "big") % 16
    return "test" if n < 2 else "practised" if n < 4 else "shown"


@cache
def noun_kinds() -> dict[str, list[str]]:
    """Return the nouns of problems by their kind."""
    rows = (line.partition(": ") for line in section("nouns").replace("\n ", " ").splitlines())
    return {kind: list(dict.fromkeys(items(row))) for kind, _, row in rows}


@cache
def problem_verbs() -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return by effect the verbs of problems: infinitive, past, and kinds of nouns, if not all."""
    table: dict[str, list[tuple[str, str, list[str]]]] = {}
    for line in section("verbs").replace("\n ", " ").splitlines():
        effect, _, row = line.partition(": ")
        for entry in items(row):
            verb, _, kinds = entry.partition(": ")
            words = verb.split()
            half = len(words) // 2
            form = " ".join(words[:half]), " ".join(words[half:])
            table.setdefault(effect, []).append((*form, kinds.split()))
    return table


def third_person(verb: str) -> str:
    """Return the third person of an infinitive: gives away, fetches."""
    first, _, rest = verb.partition(" ")
    odd = {"have": "has", "go": "goes", "do": "does"}
    return f"{odd.get(first) or plural(first)} {rest}".strip()


class Problem:
    """One word problem: a scheme whose told numbers other schemes may tell, with its solution.

    Parts (wordings, verbs, nouns) are of the sets allowed; those used are in `parts`. `held`: what
    is_held_out may say. Raises ValueError where parts do not go together.
    """

    def __init__(
        self, rng: random.Random, sets: Sequence[str], people: list[list[str]],
        held: Sequence[tuple[bool, bool]] = ((False, False),), tale: bool = False,
    ) -> None:  # fmt: skip
        self.rng, self.sets, self.parts = rng, sets, set[tuple[str, str]]()
        self.calls: list[tuple[str, str]] = []  # why, call
        self.pairs: list[tuple[int, int]] = []
        self.frames: list[str] = []
        self.shown: dict[str, str] = {}
        self.seen, self.topic, self.told = set[str](), "", set[str]()
        fits = [s for s in schemes() if s.asks]
        if tale:  # all of its numbers are told, and nothing is asked
            fits = [s for s in fits if all((role,) in s.tells for role in s.asks)]
        self.scheme = scheme = rng.choice(fits)
        self.past = rng.random() < 0.7
        self.set_scene(scheme, people)
        asked = rng.choice(list(scheme.asks))
        question = self.pick(scheme.tells[asked,] if tale else scheme.asks[asked])
        clauses = self.work(scheme, asked, None, 2 * tale, question)
        question = self.bind(question)
        self.value = calculate(self.calls[-1][1])
        require(not self.value.startswith("-") and len(self.value) < 9)
        require(self.is_held_out() in held)
        self.said = self.tell([*clauses, question] if tale else clauses, "" if tale else question)

    def pick(self, ways: Sequence[str]) -> str:
        """Choose a wording, of those that are allowed."""
        sets = ["shown", *map(part_set, ways[1:])]  # the first one is never held out
        fits = [(w, s) for w, s in zip(ways, sets) if s in self.sets]
        require(bool(fits))
        chosen = self.rng.choices(
            fits, [4 if s == self.sets[-1] != "shown" else 1 for _, s in fits]
        )[0]
        self.parts.add(chosen)
        self.frames.append(chosen[0])
        return chosen[0]

    def set_scene(self, scheme: Scheme, people: list[list[str]]) -> None:
        """Choose who and what it is about, and how numbers are written."""
        rng, kind = self.rng, self.rng.choice(scheme.nouns)
        self.kind, self.goods = (
            kind,
            kind if kind in noun_kinds() else rng.choice(("things", "food")),
        )
        nouns = [noun for noun in noun_kinds()[self.goods] if part_set(noun) in self.sets]
        one, *more, extra = rng.sample(nouns, 4)
        self.noun = one
        kinds = world_items("kinds_of_things") if self.goods == "things" else []
        adjectives = rng.sample(world_items("kinds_of") + kinds, 3)
        plain = (
            self.goods in ("marks", "measures", "amounts", "times", "people") or rng.random() < 0.6
        )
        if not plain and rng.random() < 0.5:
            more = [one, one]
        names = [noun if plain else f"{a} {noun}" for a, noun in zip(adjectives, [one, *more])]
        box, (day, day2) = rng.choice(world_items("containers")), rng.sample(world_items("days"), 2)
        self.people = {}
        for letter, names_of in zip("nmo", rng.sample(people, len(people)) + [rng.choice(people)]):
            name = rng.choice(names_of)
            he = "she" if names_of is people[0] else "he"
            self.people[letter] = [name, name, he]
        require(len({row[0] for row in self.people.values()}) == 3)
        subjects = world_items("subjects")
        if rng.random() < 0.3:
            self.people["n"] = rng.choice(subjects[: rng.choice((2, 99))]).split(": ")
        if rng.random() < 0.15:
            self.people["m"] = rng.choice([s for s in subjects if s.endswith("e")]).split(": ")
            require(self.people["m"][0] != self.people["n"][0])
        self.people = {k: [v[0], v[1], v[2] if v[2:] else v[1]] for k, v in self.people.items()}
        self.money = rng.choice(("$", "$", "dollars", "dollars", "euros", "cents", "pounds"))
        self.forms = {
            "extra": plural(extra), "things": plural(names[0]), "thing": names[0], "athing": with_article(names[0]),
            "others": plural(names[1]), "other0": names[1], "another": with_article(names[1]),
            "thirds": plural(names[2]), "box": box, "abox": with_article(box), "boxes": plural(box), "day": day, "day2": day2,
            "spot": rng.choice(world_items("spots")), "kind": adjectives[0],
            "line": rng.choice("rope string ribbon board wire pipe chain fence path".split()),
            "units": rng.choice("feet inches meters centimeters yards miles".split()),
            "dollars": {"$": "dollars"}.get(self.money, self.money),
        }  # fmt: skip
        self.bare = plural(one) if names[1] != one and more[0] != one else plural(names[0])
        self.scale = rng.choice((10, 100)) if kind in ("money", "length", "distance") and (
            rng.random() < 0.12 and self.money != "cents"
            and not any(low == high for low, high in scheme.sizes.values())) else 1  # fmt: skip
        self.words = rng.choices((0, 20, 100), (75, 15, 10))[0]  # up to what numbers are words
        self.verbs: dict[str, tuple[str, str]] = {}

    def size(self) -> int:
        """Draw a number: mostly a small one."""
        low, high = self.rng.choices(
            ((2, 12), (2, 60), (10, 200), (100, 999), (1000, 99_999)), (35, 40, 14, 7, 4)
        )[0]
        return self.rng.randint(low, high)

    def numbers(self, scheme: Scheme, asked: str, value: int | None) -> dict[str, int]:
        """Choose the numbers of a scheme, of which one may be given."""
        whole, *parts = scheme.roles
        made = {}
        if scheme.times:
            for role, most in zip(parts, (12, 40)):
                low, high = scheme.sizes.get(role, (2, most if self.rng.random() < 0.8 else 150))
                made[role] = self.rng.randint(low, high)
            if value and asked == whole:
                low, high = scheme.sizes.get(parts[0], (2, 12))
                fits = [n for n in range(low, high + 1) if value % n == 0 and value // n > 1]
                require(bool(fits))
                made[parts[0]] = self.rng.choice(fits)
                made[parts[1]] = value // made[parts[0]]
            elif value:
                made[asked] = value
            made[whole] = math.prod(made[part] for part in parts)
        else:
            for role in parts:
                low, high = scheme.sizes.get(role, (0, 0))
                made[role] = self.rng.randint(low, high) if high else self.size()
            if value and asked == whole:
                require(value >= 3 * len(parts))
                cuts = sorted(self.rng.sample(range(1, value), len(parts) - 1))
                made |= zip(parts, (b - a for a, b in itertools.pairwise([0, *cuts, value])))
            elif value:
                made[asked] = value
            made[whole] = sum(made[part] for part in parts)
        require(all(low <= made[role] <= high for role, (low, high) in scheme.sizes.items()))
        return made

    def work(
        self, scheme: Scheme, asked: str, value: int | None, depth: int, question: str = ""
    ) -> list[str]:
        """Return the clauses that tell a scheme's numbers but one, and those in the question.

        Notes how that one is worked out.
        """
        rng, made = self.rng, self.numbers(scheme, asked, value)
        whole, *parts = scheme.roles
        named = dict.fromkeys(role for key in scheme.tells for role in key)
        told = [r for r in named if r != asked and not re.search(rf"\{{\$?{r}\}}", question)]
        shown = {
            role: str(n if self.scale == 1 or scheme.times and role == parts[0] else n / self.scale)
            for role, n in made.items()
        }
        if scheme.any_order:
            rng.shuffle(told)
        ways, joint = {}, [key for key in scheme.tells if sorted(key) == sorted(told)]
        inner: dict[str, list[str]] = {}
        for role in told if self.scale == 1 and depth < 2 else []:
            subs = [
                (s, r) for s in schemes() for r in s.roles
                if s.kinds[r] & scheme.kinds[role] and s is not scheme and r in s.whys
                and (self.goods in s.nouns or self.kind in s.nouns)
            ]  # fmt: skip
            if subs and rng.random() < (0.5, 0.08)[depth] and not inner:
                sub, answer = rng.choice(subs)
                inner[role] = self.work(sub, answer, made[role], depth + 1)
        single = all((role,) in scheme.tells or role in inner for role in told)
        if joint and not inner and (rng.random() < 0.6 or not single):
            ways = {joint[0]: self.pick(scheme.tells[joint[0]])}
        else:
            require(single)
            ways = {(r,): "" if r in inner else self.pick(scheme.tells[r,]) for r in told}
        clauses, self.shown = [], shown
        for key, way in ways.items():
            clauses += [self.bind(way)] if way else inner[key[0]]
        if asked == whole:
            call = ("*" if scheme.times else "+").join(shown[part] for part in parts)
        else:
            call = ("/" if scheme.times else "-").join(
                [shown[whole], *(shown[p] for p in parts if p != asked)]
            )
        used = [made[r] for r in scheme.roles if r != asked]
        self.pairs += itertools.pairwise(used)
        self.calls.append((scheme.whys[asked], call))
        return clauses

    def bind(self, way: str) -> str:
        """Put a scheme's numbers into a wording."""
        for role, number in self.shown.items():
            way = way.replace(f"{{{role}}}", f"{{={number}}}")
            way = way.replace(f"{{${role}}}", f"{{$={number}}}")
        return way

    def verb(self, effect: str) -> tuple[str, str]:
        """Return infinitive and past of the verb for an effect, the same throughout the problem."""
        if effect not in self.verbs:
            goods = {self.goods, self.forms["things"].split()[-1]}
            fits = [
                v for v in problem_verbs()[effect]
                if (not v[2] or goods & {*v[2]}) and part_set(v[0]) in self.sets
            ]  # fmt: skip
            require(bool(fits) and (effect != "gain" or self.goods not in ("marks", "people")))
            chosen = self.rng.choice(fits)
            self.parts.add((chosen[0], part_set(chosen[0])))
            self.verbs[effect] = chosen[:2]
        return self.verbs[effect]

    def person(self, token: str, first: bool, object_: bool) -> str:
        """Name somebody: in full at first, then by a pronoun where it is clear."""
        who = {"n": "n", "ns": "n", "he": "n", "him": "n", "his": "n"}.get(token, token[0])
        whole, later, he = self.people[who]
        cases = PRONOUNS[he]
        new, self.seen = who not in self.seen, self.seen | {who}
        pronoun = token in ("he", "him", "his") and not new or he in ("I", "we")
        pronoun = pronoun or (
            who == "n" and not new and first and self.topic == "n" and self.rng.random() < 0.6
        )
        name = whole if new else later
        if first:
            self.topic = who
        if token in ("ns", "ms", "his"):
            return cases[2] if pronoun else name + ("'" if name[-1] == "s" else "'s")
        return cases[1 if object_ or token == "him" else 0] if pronoun else name

    def number(self, text: str, rest: str) -> str:
        """Write a number in digits or words."""
        if not text.isdigit() or int(text) > self.words:
            if text == "12" and rest.startswith((" {things}", " more")) and self.rng.random() < 0.3:
                return "a dozen"
            if self.scale == 100 and "." in text:
                return f"{float(text):.2f}"
            return f"{int(text):,}" if text.isdigit() and len(text) > 3 and self.words else text
        return number_word(int(text))

    def fill(self, clause: str) -> str:
        """Write out a clause: people, verbs, nouns, numbers."""
        out, at, last = "", 0, ""
        people = "n|m|o|ns|ms|he|him|his"
        for found in re.finditer(r"\{(\$?=?)([\w.]+)\}|<(.*?)>", clause):
            out, rest = out + clause[at : found.start()], clause[found.end() :]
            at, (mark, token, choice) = found.end(), found.groups()
            ahead = re.search(rf"\{{({people})\}}", rest)
            if choice:
                forms = choice.split("|")
                who = last
                if ahead and (not last or forms[0] == "did"):
                    who = ahead[1][0] if ahead[1][0] in "mo" else "n"
                he = self.people[who][2] if who in self.people else "he"
                form = 0 if self.past else min(1 + (he in ("they", "we", "I")), len(forms) - 1)
                out += (
                    "am"
                    if forms[form] == "are" and he == "I" and forms[0] == "was"
                    else forms[form]
                )
            elif mark:
                value = self.number(token, rest)
                if "$" in mark:
                    value = (
                        f"${value}"
                        if self.money == "$" and value[0].isdigit()
                        else f"{value} {self.forms['dollars']}"
                    )
                out += value
            elif re.fullmatch(people, token):
                before = (out.split() or [""])[-1]
                out += self.person(token, not last, before in OBJECTS)
                if token[-1] != "s" or token == "his":
                    last = token[0] if token[0] in "mo" else "n"
                else:
                    last = last or "x"
            elif token.rstrip("0") in problem_verbs():
                base, past = self.verb(token.rstrip("0"))
                he = self.people.get(last, ["", "", "they"])[2]
                shape = (
                    base if token[-1] == "0" or he in ("they", "we", "I") else third_person(base)
                )
                out += shape if token[-1] == "0" or not self.past else past
            else:
                again = token == "things" and self.rng.random() < 0.3 and "things" in self.told
                self.told.add(token)
                if token in ("things", "thing", "athing"):
                    self.parts.add((self.noun, part_set(self.noun)))
                out += self.bare if again else self.forms[token]
        return (out + clause[at:]).replace("  ", " ")

    def tell(self, clauses: list[str], question: str) -> str:
        """Put clauses and question into sentences."""
        rng, order = self.rng, self.rng.random()
        extra = ["scenes"] * (rng.random() < 0.12) + ["asides"] * (rng.random() < 0.3)
        plain = all(". " not in c for c in clauses)
        for key in extra:
            clause = rng.choice(ways(key)).replace("{d}", f"{{={rng.randint(2, 60)}}}")
            clauses.insert(0 if key == "scenes" else rng.randint(0, len(clauses)), clause)
        if (
            question
            and order < 0.06
            and plain
            and 0 < len(clauses) < 3
            and not ASKED.match(question)
        ):
            text = f"{self.fill(question)} if {' and '.join(map(self.fill, clauses))}"
            return self.finish([text + "?"])
        out: list[str] = []
        if not question:
            order = 0.5
        end = question + ("." if ASKED.match(question) else "?")
        if clauses and order > 0.84 and plain and re.match("(how|what|in|by) ", question):
            some = clauses[-(1 if len(clauses) > 2 or rng.random() < 0.5 else 2) :]
            clauses = clauses[: -len(some)]
            end = f"if {' and '.join(some)}, {end}"
        if clauses:  # "then" and "also" need something before them
            clauses[0] = re.sub(
                r"^(then|later|after that|after a while) |(?<=\}) (also|then)(?= )|"
                r"\b(more|another) ",
                "",
                clauses[0],
            )
        while clauses:
            clause = clauses.pop(0)
            roll = rng.random()
            if (
                clauses
                and clause.startswith("{n} ")
                and clauses[0].startswith("{n} ")
                and roll < 0.35
            ):
                second = clauses.pop(0).removeprefix("{n} ")
                link = rng.choice((" and ", " and ", ", and then ", " and then "))
                link = " and " if second.startswith("then") else link
                # one person acts twice: the verb of the second part agrees with the same subject
                text = self.fill(clause) + link + self.again(second)
            else:
                text = self.fill(clause)
                if clauses and roll > 0.85 and ". " not in clauses[0]:
                    text += rng.choice((", and ", ", and ", ", but ", "; ")) + self.fill(
                        clauses.pop(0)
                    )
            out.append(text)
        return self.finish([*out, self.fill(end)] if question else out)

    def again(self, rest: str) -> str:
        """Fill what the last named person goes on to do."""
        marked = self.fill("{he} " + rest)
        return marked.split(" ", 1)[1]

    def finish(self, texts: list[str]) -> str:
        """Write sentences, at times as they are typed in a hurry."""
        text = " ".join(sentence(part) for text in texts for part in text.split(". "))
        text = re.sub(
            r"\b([Tt])wo times as", lambda m: "Twice as" if m[1] == "T" else "twice as", text
        )
        text = re.sub(r"\b2 times as", "twice as", text)
        roll = self.rng.random()
        if roll < 0.12 and "?" in text:
            text = text.lower() if roll < 0.08 else text
            text = text.rstrip("?.") if roll > 0.04 else text
        return text

    def is_held_out(self) -> tuple[bool, bool]:
        """Say whether its combination of parts, and whether a pair of operands, is for the test."""
        pair = any(held_out_pair(a, b) for a, b in self.pairs)
        return held_out("problem " + " ".join(self.frames), 4), pair

    def item(self) -> dict[str, Any]:
        """Return it as a graded item with its solution."""
        reply = []
        for why, call in self.calls:
            reply += [text_part(sentence(f"{why}:") + " "), *tool_parts(call)]
        reply.append(text_part(f"The answer is {self.value}."))
        return conversation("problem", [self.said, reply], grade="number", answer=self.value)


def text_part(text: str) -> dict[str, str]:
    """Return what a reply says."""
    return {"type": "text", "text": text}


def tool_parts(call: str) -> list[dict[str, str]]:
    """Return a call of the tool and its output."""
    return [{"type": "python", "text": call}, {"type": "output", "text": calculate(call)}]


def problem(rng: random.Random, wanted: str, held: list[tuple[bool, bool]]) -> dict[str, Any]:
    """Compose problems until one is what is wanted.

    `wanted`: the set of its rarest part; `held`: what is_held_out may say.
    """
    test = "test_" * (wanted == "test")
    people = [world_words(f"{test}girls"), world_words(f"{test}boys")]
    if not test and rng.random() < 0.3:
        people = [[coined(rng, names) for _ in range(3)] for names in people]
    several = rng.random() < 0.3  # steps: others would be rarer, as their parts seldom fit
    while True:
        try:
            found = Problem(rng, ["shown", wanted] if wanted != "shown" else [wanted], people, held)
        except ValueError:
            continue
        if (len(found.calls) > 1) == several and any(s == wanted for _, s in found.parts):
            return found.item()


def tale(rng: random.Random) -> str:
    """Tell tales of counted things, in the words of problems but those of the test."""
    tales: list[str] = []
    people, count = [world_words("girls"), world_words("boys")], rng.choice((2, 3, 4))
    while len(tales) < count:
        try:
            tales.append(Problem(rng, ["shown", "practised"], people, tale=True).said)
        except ValueError:
            continue
    return "\n\n".join(tales)


def problem_chat(rng: random.Random) -> dict[str, Any]:
    """Return a word problem of shown parts, solved with the tool, for training."""
    return solved(problem(rng, "shown", [(False, False)]))


def rl_problems(rng: random.Random) -> dict[str, Any]:
    """Return a word problem with its answer alone; most have a practised part."""
    wanted = "practised" if rng.random() < 0.85 else "shown"
    item = problem(rng, wanted, [(False, False)])
    return {key: value for key, value in item.items() if key != "reply"}


@cache
def problem_sets() -> dict[str, list[dict[str, Any]]]:
    """Return the word problems of the test, the same for every seed, 500 in a set.

    Each set differs in one way from what is trained on: in pairs of numbers, in combinations of
    shown parts, in parts that rl practises, in wordings, verbs and nouns that no problem has.
    """
    held = {
        "numbers": ("shown", [(False, True)]),
        "combinations": ("shown", [(True, False)]),
        "practised": ("practised", [(True, False)]),
        "new": ("test", [(False, False), (True, False)]),
    }
    return {
        f"problems_{name}": take_items(500, partial(problem, random.Random(name), *wanted))
        for name, wanted in held.items()
    }


def draw_number(rng: random.Random) -> str:
    """Draw a number as it stands in a sum: mostly whole and small, some decimal or negative."""
    roll, top = rng.random(), rng.choice((10, 12, 20, 99, 99, 999, 9999))
    if roll < 0.12:
        return f"{rng.randint(1, 10 * min(top, 999)) / rng.choice((10, 10, 100)):g}"
    return str(rng.randint(-20, -1) if roll < 0.16 else rng.randint(2, top))


def expression(rng: random.Random, depth: int = 0) -> str:
    """Return a sum in signs, with parentheses where they are needed or just put."""
    if depth == 2 or depth and rng.random() < 0.6:
        number = draw_number(rng)
        return f"({number})" if number[0] == "-" else number
    parts = [expression(rng, depth + 1) for _ in range(rng.choice((2, 2, 2, 3)))]
    sign = rng.choice("++--***//^")
    if sign == "^":
        return f"{rng.choice((rng.randint(2, 12), parts[0]))}^{rng.randint(2, 3)}"
    parts = [f"({p})" if re.search(r"\d[-+*/]", p) and (sign in "*/" or rng.random() < 0.2)
             and not p.startswith("(") else p for p in parts]  # fmt: skip
    return sign.join(parts)


def sum_in_signs(rng: random.Random) -> tuple[str, str]:
    """Return a sum as it is typed, and the tool's call."""
    call = expression(rng)
    if call[0] == "(" and rng.random() < 0.7:
        call = re.sub(r"^\((-[\d.]+)\)(?!\^)", r"\1", call)
    blank, sign = rng.choice(("", " ")), rng.choice(("*", "*", "*", "x", "\u00d7"))
    said = re.sub(r"(?<=[\d)])([-+*/^])", rf"{blank}\1{blank}", call).replace("*", sign)
    said = said.replace("/", rng.choice(("/", "/", "/", "\u00f7")))
    return said.replace("^", rng.choice(("^", "^", "^", "**"))), call.replace("^", "**")


def sum_in_words(rng: random.Random) -> tuple[str, str, bool]:
    """Return a sum as it is said, the tool's call, and whether it is no answer to "what is"."""
    line = rng.choice(section("sums").replace("\n ", " ").splitlines())
    said, call = line.removeprefix("do ").split(" > ")
    y, few = draw_number(rng), rng.choice((5, 10, 20, 25, 30, 50, 75, rng.randint(1, 99)))
    forms = {
        "x": draw_number(rng), "y": y, "z": draw_number(rng), "t": str(2 * rng.randint(1, 50)),
        "k": str(rng.randint(2, rng.choice((10, 25)))), "p": str(few),
        "m": calculate(f"{y}*{rng.randint(2, 30)}"),
    }  # fmt: skip
    said = rng.choice(said.split(" / ")).format_map(forms)
    for name, number in forms.items():  # a negative number behind a sign stands in parentheses
        call = re.sub(rf"^\{{{name}\}}", number, call)
        call = call.replace(f"{{{name}}}", f"({number})" if number[0] == "-" else number)
    if rng.random() < 0.12:
        number = r"(?<![\d.-])\d{1,2}(?![\w.%])"
        said = re.sub(number, lambda m: number_word(int(m[0])), said)
    return said, call, line.startswith("do ")


def sum_item(rng: random.Random, test: bool = False) -> dict[str, Any]:
    """Ask for a sum in words or signs, worked with the tool, whose result the reply repeats.

    Of the test, and of no training file, is one with a held-out pair of neighbours.
    """
    said, call, whole = sum_in_words(rng) if rng.random() < 0.5 else (*sum_in_signs(rng), False)
    numbers = map(int, re.findall(r"(?<![\d.])\d+(?![\d.])", call))
    held = any(itertools.starmap(held_out_pair, itertools.pairwise(numbers)))
    result = calculate(call)
    decimals = len(result.partition(".")[2])
    if held != test or result == "error" or len(result) > 12 or decimals > rng.choice((2, 2, 4)):
        return sum_item(rng, test)
    asked = put(rng, said)
    if not whole:
        asked = rng.choice(ways("sum_manners")).format(s=said)
        asked = asked.lower() if rng.random() < 0.2 else asked
        if asked[0].isalpha() and rng.random() < 0.6:
            asked = re.sub(r"(?<=[?!=])\.$", "", sentence(asked))
    reply = [*tool_parts(call), text_part(f"The answer is {result}.")]
    return conversation("sum", [asked, reply], grade="number", answer=result)


def sum_chat(rng: random.Random) -> dict[str, Any]:
    """Return a sum with its solution."""
    return solved(sum_item(rng))


SPELLING_KINDS = {"spell": 3, "count": 3, "letters": 1, "first": 1, "last": 1, "back": 1}


def spelling_item(rng: random.Random, word: str, split: Literal["?", "!"]) -> dict[str, Any]:
    """Ask about a word's letters; the reply spells the word, and counts with the tool."""
    kind, back = weighed(rng, SPELLING_KINDS), "-".join(word[::-1])
    x = rng.choice(word if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")
    call = {"count": f'"{word}".count("{x}")', "letters": f'len("{word}")'}.get(kind, "")
    forms = {"w": word, "l": "-".join(word), "x": x, "f": word[0], "z": word[-1], "b": back,
             "r": calculate(call), "times": "time" if word.count(x) == 1 else "times"}  # fmt: skip
    asked = rng.choice(wordings(kind + split, "spelling")).format_map(forms)
    asked = asked if rng.random() < 0.75 else asked.replace('"', "")
    asked = put(rng, asked) if split == "?" else sentence(asked)
    said, _, last = wordings(f"{kind}=", "spelling")[0].format_map(forms).partition("#")
    if call:
        reply = [text_part(said), *tool_parts(call), text_part(last)]
        return conversation("spelling", [asked, reply], grade="number", answer=forms["r"])
    accept = {"spell": [forms["l"]], "back": [back, word[::-1]]}.get(kind, [said[-2]])
    return conversation("spelling", [asked, said], answer=accept[0], accept=accept, reject=[])


def spelling_chat(rng: random.Random) -> dict[str, Any]:
    """Return a question about a word's letters, answered; some words are made up."""
    word = rng.choice(shown_words()) if rng.random() < 0.7 else made_word(rng)
    return solved(spelling_item(rng, word, "?"))


@cache
def spelling_set() -> list[dict[str, Any]]:
    """Return 500 questions about words that no training file spells, in wordings of the test."""
    rng = random.Random("spelling")
    return take_items(500, lambda: spelling_item(rng, rng.choice(held_words()), "!"))


# 10. Main ------------------------------------------------------------------------------------

# A folder's manifest has the settings that determine the data, what was left out, and the size of
# each file: manifest.json that of text, conversations.json that of other files, which may share the
# folder with text. New files are made in a folder beside; then the old manifest goes, the new files
# replace the old ones one by one, and the new manifest comes. Meanwhile .NAME.partial lists them:
# after a kill in between, another run makes them again.


def make_world(settings: Settings, folder: Path) -> Manifest:
    """Write the embedded world: text, conversations, and what evaluate.py asks for."""
    sorter = Sorter(folder / "buckets", settings.seed, settings.documents * 1000)
    for text in world_documents(settings.seed, settings.documents):
        sorter.add(text)
    count, made = settings.num_conversations, Files()
    (folder / "eval").mkdir()
    for split in ("trained", "unseen"):
        path = folder / "eval" / f"facts_{split}.jsonl"
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in fact_prompts(split)]
        path.write_text("".join(lines), "utf-8")
        made[f"eval/{path.name}"] = {"size": size_of(path)}
    for split, share in {"mid": 1, "sft": 6, "val": 60, "rl": 10}.items():
        size = max(count // share, min(count, 20))
        chats = world_conversations(settings.seed, split, size, settings.name)
        made |= write_lines(folder / f"{split}.jsonl", map(as_line, chats))
    for name, graded in world_sets(settings.name).items():
        about = write_lines(folder / "eval" / f"{name}.jsonl", map(as_line, graded))
        made[f"eval/{name}.jsonl"] = about[f"{name}.jsonl"]
    return {"files": write_splits(folder, sorter, settings), "chats": made}


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON says, {} where there is none or it is broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_manifest(listing: Path) -> Manifest:
    """Return what a manifest says, or what is known of files that a killed process left, or {}."""
    manifest = read_json(listing) or read_json(listing.with_name(f".{listing.name}.partial"))
    return manifest if {"settings", "files"} <= set(manifest) else {}


def all_files(manifest: Manifest) -> Files:
    """Return the text and the conversations that a manifest lists, by name."""
    return {**manifest.get("files", {}), **manifest.get("chats", {})}


def check_folder(folder: Path, manifest: Manifest, wanted: dict[str, Any]) -> None:
    """Raise Stop rather than write over other data; say what is made anew, and why."""
    remedy = f"give this one a name of its own with --source=NAME, or delete {folder}"
    if not manifest:
        raise Stop(f"{folder} holds files that were not made of {wanted['data']}: {remedy}")
    before = manifest["settings"]
    if before["data"] != wanted["data"]:
        raise Stop(f"{folder} holds what was made of {before['data']}: {remedy}")
    words = {"input": "other files", "tests": "other evaluation sets"}
    words |= dict.fromkeys(("version", "world"), "another version of prepare.py")
    changed = [words.get(name) or f"--{name.replace('_', '-')}={before.get(name)}"
               for name in wanted if before.get(name) != wanted[name]]  # fmt: skip
    if changed:
        print(f"prepare: {folder} was made with {', '.join(dict.fromkeys(changed))}")


def replace_files(
    listing: Path, wanted: dict[str, Any], make: Callable[[Path], Manifest], keep: bool = False
) -> None:
    """Make files beside a folder and put them in; `listing` becomes their manifest.

    With `keep` the files of evaluation sets that are not made anew stay.
    """
    folder = listing.parent
    beside, unsure = (p.with_name(f".{p.name}.partial") for p in (folder, listing))
    shutil.rmtree(beside, ignore_errors=True)  # a killed process left it
    beside.mkdir(parents=True)
    try:
        new = {"settings": wanted, **make(beside)}
        names = [*all_files(new)]
        old = all_files(read_manifest(listing))
        sets = {name.split("/")[0] for name in names}
        kept = {n: old.pop(n) for n in list(old) if keep and n.split("/")[0] not in sets}
        files = {**kept, **{name: {"size": -1} for name in (*old, *names)}}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(unsure, {"settings": wanted, "files": files})
        listing.unlink(missing_ok=True)
        if listing.name == "manifest.json":
            shutil.rmtree(folder / "tokens", ignore_errors=True)  # of the old text
        for name in set(old) - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        new["files"] |= kept
        write_json(listing, new)
        unsure.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def prepare_folder(
    listing: Path, wanted: dict[str, Any], write: Callable[[], None], strange: bool
) -> Manifest:
    """Write a folder's files unless they are there; say what it holds; return the manifest.

    `strange`: there are files that the manifest does not explain.
    """
    folder, manifest = listing.parent, read_manifest(listing)
    whole = (size_of(folder / name) == e["size"] for name, e in all_files(manifest).items())
    before = manifest.get("settings", {})
    if before.get("input"):  # content decides, wherever it lies
        before = {**before, "data": wanted["data"]}
    again = before == wanted and all(whole)
    if not again:
        if (manifest or strange) and listing != data_dir("eval") / "conversations.json":
            check_folder(folder, manifest, wanted)  # evaluation sets may come from several places
        write()
        manifest = read_manifest(listing)
    files = all_files(manifest)
    state = " is complete, nothing to do" if again else ""
    if text := [entry for entry in files.values() if "documents" in entry]:
        val = files["val.parquet"]["documents"]
        train = sum(entry["documents"] for entry in text) - val
        chars = format_count(sum(entry["characters"] for entry in text))
        state += f": {train:,} train and {val:,} validation documents, {chars} characters"
    print(f"prepare: {folder}{state}")
    for name, entry in files.items():
        if "kinds" in entry and not name.startswith("eval/"):
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in entry["kinds"].items())
            kinds = f" ({kinds})" if len(entry["kinds"]) > 1 else ""
            print(f"prepare: {folder / name}: {entry['conversations']:,}{kinds}")
    print(left_out(manifest.get("dropped", {}), "prepare: {}\n"), end="")
    return manifest


def prepare_eval(settings: Settings, net: Net | None) -> Manifest:
    """Make data/eval/ of the hub's sets or of a folder's, unless it is there."""
    listing, hub = data_dir("eval") / "conversations.json", settings.eval_data == "hub"
    root = data_dir("downloads") if hub else resolve(settings.eval_data)
    wanted: dict[str, Any] = {"data": "hub", "version": DATA_VERSION}
    if not hub:
        wanted |= {"data": printable(root), "input": OwnFiles(root).fingerprint()}

    def write() -> None:
        if hub:
            splits = [(name, about.test) for name, about in SETS.items() if about.test]
            fetch_sets(net or Net(), root, splits, settings.workers)
        replace_files(listing, wanted, partial(make_eval, root), keep=True)

    manifest = prepare_folder(listing, wanted, write, strange=False)
    titles = [*(about.title for about in SETS.values() if about.test), "SpellingBee"]
    missing = [title for title in titles if f"{title}.jsonl" not in manifest["files"]]
    missing += ["CORE"] * (not any("task" in entry for entry in manifest["files"].values()))
    if missing:
        print(f"prepare: {root} does not have {', '.join(missing)}: left out")
    return manifest


def prepare_chat(settings: Settings, net: Net | None) -> Manifest:
    """Make data/SOURCE/{mid,sft,rl,val}.jsonl of the hub's conversations or of your own."""
    listing = data_dir(settings.source) / "conversations.json"
    root, files = data_dir("downloads"), None
    wanted: dict[str, Any] = {"data": "hub", "name": settings.name, "seed": settings.seed}
    wanted["version"] = DATA_VERSION
    wanted["tests"] = OwnFiles(data_dir("eval")).fingerprint()  # their questions are left out
    if settings.conversations == "hub":
        wanted["world"] = world_version()  # of the conversations on who the assistant is
    else:
        files = OwnFiles(resolve(settings.conversations), settings.encoding, with_text=False)
        wanted |= {"data": printable(files.root), "input": files.fingerprint(),
                   "val_percent": settings.val_percent, "val_mb": settings.val_mb,
                   "encoding": settings.encoding}  # fmt: skip

    def write() -> None:
        if not files:
            splits = [(name, split) for name, about in SETS.items() if about.train
                      for split in (about.train, about.val) if split]  # fmt: skip
            fetch_sets(net or Net(), root, splits, settings.workers)
        replace_files(listing, wanted, partial(make_chat, settings, files, root))

    strange = any((listing.parent / f"{file}.jsonl").exists() for file in FILES)
    return prepare_folder(listing, wanted, write, strange)


def prepare_text(settings: Settings, net: Net | None) -> Manifest:
    """Make the text of data/SOURCE/, of the world its conversations too."""
    folder = data_dir(settings.source)
    listing = folder / "manifest.json"
    wanted: dict[str, Any] = {"data": "world", "version": world_version()}
    names = ["val_percent", "val_mb", "shard_mb", "seed"]
    strange = {path.name for path in folder.glob("[!.]*")}
    if settings.kind == "hub":
        wanted, names, strange = {"data": HUB[settings.data][1]}, ["shards"], set()
    elif settings.kind == "world":
        names += ["documents", "num_conversations", "name"]
        make = partial(make_world, settings)
    else:
        files = OwnFiles(resolve(settings.data), settings.encoding)
        wanted = {"data": printable(files.root), "version": DATA_VERSION}
        wanted["input"] = files.fingerprint()
        names += ["doc_chars", "document_ends", "encoding"]
        make = partial(make_own_text, settings, files)
        strange -= {*read_manifest(folder / "conversations.json").get("files", {}), "tokens",
                    "conversations.json"}  # fmt: skip
    wanted |= {name: getattr(settings, name) for name in names}

    def write() -> None:
        if settings.kind == "hub":
            made = make_hub_text(settings, net or Net(), folder)
            write_json(listing, {"settings": wanted, "files": made})
        else:
            replace_files(listing, wanted, make)

    return prepare_folder(listing, wanted, write, bool(strange))


def main(settings: Settings, net: Net | None = None) -> Manifest:
    """Prepare what the settings name, unless it is there; return its manifest."""
    with one_sentence("prepare"):
        if settings.conversations == "hub":
            settings = replace(settings, eval_data=settings.eval_data or "hub")
        made = prepare_eval(settings, net) if settings.eval_data else {}
        if settings.conversations:
            return prepare_chat(settings, net)
        return made or prepare_text(settings, net)


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
