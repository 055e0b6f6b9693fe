"""Get text: from the hub, from files of one's own, or from the embedded world.

Usage:   python prepare.py                                 # the embedded world, no network
         python prepare.py --data=../books                 # a folder or file of one's own
         python prepare.py --data=hub --shards=8           # FineWeb-Edu; --data=climbmix
Reads:   the hub (HF_ENDPOINT, HF_TOKEN), a path, or nothing
Writes:  data/SOURCE/train-00000.parquet ... val.parquet, manifest.json; world also eval/
Method:  documents are cut at paragraph ends, then sorted by a hash of seed and text: this
         shuffles them, drops duplicates and splits off validation text in bounded memory
         and does not depend on how the files lie on the disk
"""

from __future__ import annotations

import codecs
import contextlib
import email.utils
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
from urllib3.exceptions import MaxRetryError

from common import (
    MissingInput,
    Stop,
    base_dir,
    check_name,
    data_dir,
    disk_sentence,
    format_count,
    format_duration,
    parse_settings,
    setting,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------

# name: folder below data/, repository; its last shard is for validation
HUB = {
    "hub": ("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle"),  # 1,823 shards
    "climbmix": ("climbmix", "karpathy/climbmix-400b-shuffle"),  # 6,543 shards
}
RESERVED = {"world", "eval", *(folder for folder, _ in HUB.values())}


@dataclass
class Settings:
    data: str = setting("world", "world, hub (FineWeb-Edu), climbmix, or a path of your own")
    source: str = setting(
        "", "folder below data/; none = world, fineweb-edu, climbmix, path's name"
    )
    shards: int = setting(8, "hub: shards to train on, about 250 M characters each")
    documents: int = setting(16_000, "world: documents to write, about 370 characters each")
    doc_chars: int = setting(20_000, "own files: longer documents are cut at paragraph ends")
    val_percent: float = setting(2.0, "world, own files: share of the validation documents")
    val_mb: int = setting(20, "world, own files: MB of validation text at most")
    shard_mb: int = setting(100, "world, own files: MB of text in one train shard")
    seed: int = setting(0, "world, own files: order, split, and what the world tells")
    workers: int = setting(4, "hub: downloads at once")

    def __post_init__(self) -> None:
        if self.kind == "own" and not self.path.is_dir() and not self.path.is_file():
            others = ", ".join(["world", *HUB])
            raise ValueError(f"--data={self.data}: no such file or folder, nor one of {others}")
        for name in ("shards", "documents", "val_mb", "shard_mb", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.doc_chars < 200:
            raise ValueError("--doc-chars must be 200 or more")
        if not 0 < self.val_percent <= 50:
            raise ValueError("--val-percent must be over 0 and at most 50: training needs both")
        self.source = self.source or self.default_source()
        check_name(self.source, "--source")
        if self.source == "eval":
            raise ValueError("--source=eval is the folder of the evaluation sets: take another")

    @property
    def kind(self) -> str:
        return "hub" if self.data in HUB else "world" if self.data == "world" else "own"

    @property
    def path(self) -> Path:
        return Path(self.data).expanduser().resolve()

    def default_source(self) -> str:
        """Derive the folder below data/: a fixed name, or the path's name in plain letters."""
        if self.kind != "own":
            return HUB[self.data][0] if self.kind == "hub" else "world"
        plain = unicodedata.normalize("NFKD", self.path.name.split(".")[0].lower())
        plain = plain.encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        slug = slug or "text-" + hashlib.sha256(str(self.path).encode()).hexdigest()[:6]
        return f"{slug}-files" if slug in RESERVED else slug

    def identity(self) -> dict[str, Any]:
        """Return what decides the text: two preparations with equal identities are equal."""
        if self.kind == "hub":
            return {"data": HUB[self.data][1], "shards": self.shards}
        names = ["val_percent", "val_mb", "shard_mb", "seed"]
        names += ["documents"] if self.kind == "world" else ["doc_chars"]
        place = {"data": "world" if self.kind == "world" else str(self.path)}
        return place | {name: getattr(self, name) for name in names}


# 2. Documents --------------------------------------------------------------------------------

# Where a long document is cut, best first: chapters and headings, paragraphs, lines, sentences.
CUTS = (
    ("\n# ", "\n## ", "\n = ", "\nCHAPTER ", "\nChapter ", "\n\n\n", "\f"),
    ("\n\n",),
    ("\n",),
    (". ", "! ", "? ", '." ', "。", "！", "？", "। ", "؟ "),
    (" ", "\u3000"),
)
BUCKET_BYTES = 1 << 26  # text sorted at once: what one bucket may hold in memory


def cut_point(text: str, start: int, window: int) -> int:
    """Find where to end a piece of text[start:] of at most `window` characters."""
    end, half = start + window, start + window // 2
    for marks in CUTS:
        found = max((at, mark) for mark in marks for at in [text.rfind(mark, half, end)])
        if found[0] > half:
            at, mark = found
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
    """Sort documents by a hash of seed and text through files: a shuffle in bounded memory.

    Equal documents meet and are dropped. Disk: once the text, below `folder`.
    """

    def __init__(self, folder: Path, seed: int, expected_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.key = folder, f"nanochat {seed}".encode()
        count = max(1, min(4096, expected_bytes // BUCKET_BYTES))
        self.buckets = [bytearray() for _ in range(count)]
        self.held = 0
        self.few: set[bytes] = set()  # the first 20 distinct documents
        self.last = b""  # the greatest hash of all
        self.duplicates = self.total_chars = 0

    def add(self, text: str) -> None:
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=self.key).digest()
        bucket = self.buckets[int.from_bytes(key[:4], "big") * len(self.buckets) >> 32]
        bucket += key + len(data).to_bytes(8, "big") + data
        self.last = max(self.last, key)
        self.total_chars += len(text)
        if len(self.few) < 20:
            self.few.add(key)
        self.held += len(data)
        if self.held >= BUCKET_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, bucket in enumerate(self.buckets):
            if bucket:
                with open(self.folder / f"{number:04d}", "ab") as file:
                    file.write(bucket)
                bucket.clear()
        self.held = 0

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Yield (hash, text) in the order of the hashes, each text once."""
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
            while head := file.read(24):
                yield head[:16], file.read(int.from_bytes(head[16:], "big"))


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


def write_splits(folder: Path, sorter: Sorter, settings: Settings) -> dict[str, dict]:
    """Write val.parquet from the smallest hashes, then the train shards; describe each file.

    Both splits exist wherever there are two distinct documents, and share none.
    """
    documents = sorter.documents()
    below = int(settings.val_percent / 100 * (1 << 128)).to_bytes(16, "big")
    first_train: list[str] = []

    def validation() -> Iterator[str]:
        taken = 0
        for key, text in documents:
            enough = taken and (key >= below or taken >= settings.val_mb * 10**6)
            if enough or key == sorter.last:
                first_train.append(text)
                return
            taken += len(text.encode())
            yield text

    files = {"val.parquet": write_shard(folder / "val.parquet", validation(), float("inf"))}
    train = chain(first_train, (text for _, text in documents))
    for number, text in enumerate(train):
        name = f"train-{number:05d}.parquet"
        cap_bytes = settings.shard_mb * 10**6
        files[name] = write_shard(folder / name, chain([text], train), cap_bytes)
    return files


class Progress:
    """One line of bytes done, rate and time left: rewritten on a terminal, else every 10 s."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.skipped = 0  # skipped: was there before, so it does not count as speed
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int, skipped: bool = False) -> None:
        with self.lock:
            self.done += count
            self.skipped += count if skipped else 0
            self._say()

    def at(self, done: int) -> None:
        self.add(done - self.done)

    def _say(self) -> None:
        now, tty = time.monotonic(), sys.stdout.isatty()
        if now - self.said < (0.2 if tty else 10):
            return
        self.said = now
        rate = max(1.0, (self.done - self.skipped) / (now - self.start))
        left = format_duration(max(0, self.total - self.done) / rate)
        line = f"prepare: {self.what} {self.done / 1e6:,.0f}/{self.total / 1e6:,.0f} MB"
        line = f"{line}  {rate / 1e6:.1f} MB/s  left {left}"
        print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty() and self.said > self.start:
            print("\r\x1b[K", end="", flush=True)  # what follows gets a line of its own


def check_space(need: int, remedy: str) -> None:
    """Raise Stop where the base directory's disk has less than `need` bytes free."""
    free = shutil.disk_usage(base_dir()).free
    if free < need:
        have = f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise Stop(f"{base_dir()}: {have}: free some space, set NANOCHAT_BASE_DIR, or {remedy}")


# 3. Hub --------------------------------------------------------------------------------------


def file_digest(path: Path, digest: str = "") -> str:
    """Hash a file as the hub does: sha256, or git's blob id where `digest` has 40 digits."""
    state = hashlib.sha256()
    if len(digest) == 40:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


BLOCK_BYTES = 1 << 18  # read at once; what a cut connection may lose


@dataclass(frozen=True)
class Remote:
    """A file to fetch: where it is and what is known of it (size None, digest "" = unknown)."""

    url: str
    size: int | None = None
    digest: str = ""
    version: str = ""  # an ETag that is no digest: tells versions apart, proves nothing


class Busy(Exception):
    """The server is not well now: try again, not before wait_s."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def retry_after(response: requests.Response) -> float:
    """Read a Retry-After header, seconds or a date, as seconds; 10 minutes at most."""
    text = response.headers.get("Retry-After", "")
    try:
        date = None if text.isdigit() else email.utils.parsedate_to_datetime(text)
        wait_s = date.timestamp() - time.time() if date else float(text)
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait_s, 0.0), 600.0)


@dataclass
class Net:
    """How the hub is talked to. Only `endpoint` gets the token, redirects elsewhere do not."""

    endpoint: str = field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    )
    tries: int = 8  # failures in a row without a byte gained
    backoff_s: float = 1.0
    timeout_s: float = 30.0
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")
        good: Any = False
        with contextlib.suppress(ValueError):
            parts = urlsplit(self.endpoint)
            good = parts.scheme in ("http", "https") and parts.hostname
        if not good:
            raise Stop(f"HF_ENDPOINT={self.endpoint} is no address like https://huggingface.co")

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add HF_TOKEN to requests for the endpoint; requests drops it when another host comes."""
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and urlsplit(request.url or "").netloc == urlsplit(self.endpoint).netloc:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def open(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """Start one GET. Raises Busy where a later try may help, Stop where none will."""
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        options: dict[str, Any] = {"stream": True, "timeout": (10, self.timeout_s)}
        try:
            response = requests.get(url, headers=headers, auth=self.sign, **options)
        except (ValueError, requests.TooManyRedirects):
            raise Stop(f"{url} cannot be asked: is HF_ENDPOINT right?") from None
        code = response.status_code
        if code in (200, 206, 416):
            return response
        response.close()
        if code in (408, 429) or code >= 500:
            raise Busy(f"it answered {code}", retry_after(response))
        refused = "set HF_TOKEN to a token that may read it"
        remedy = refused if code in (401, 403) else "it is not there, or HF_ENDPOINT is no hub"
        raise Stop(f"{url} answered {code}: {remedy}")

    def pause(self, failures: int, url: str, error: Exception) -> None:
        """Wait before the next try, twice as long each time; raises Stop after the last."""
        if failures >= self.tries:
            slow = isinstance(error, requests.Timeout)
            broken = "no answer in time" if slow else "the connection broke"
            reason = str(error) if isinstance(error, Busy) else broken
            raise Stop(f"{url} failed {failures} times in a row ({reason}): "
                       "run the same command again later to go on from here")  # fmt: skip
        delay_s = min(60, self.backoff_s * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
        if self.stopping.wait(max(delay_s, getattr(error, "wait_s", 0.0))):
            raise Stop("stopped")

    def ask(self, url: str, read: Callable[[requests.Response], Any]) -> Any:
        """Return read(response) of a small GET; raises Stop at once where no hub is reached."""
        for failures in range(1, self.tries + 1):
            try:
                with self.open(url) as response:
                    return read(response)
            except (ValueError, AttributeError, KeyError, TypeError):
                raise Stop(f"{url} answered something else than a hub does: is HF_ENDPOINT right?")
            except (Busy, requests.RequestException) as error:
                if isinstance(next(iter(error.args), None), MaxRetryError):  # never connected
                    raise Stop(
                        f"the hub at {self.endpoint} cannot be reached: check the network or set "
                        "HF_ENDPOINT to a mirror; without one take --data=world, the embedded "
                        "text, or --data=PATH, files of your own"
                    ) from None
                self.pause(failures, url, error)


def hub_files(net: Net, repo: str, revision: str = "main") -> dict[str, Remote]:
    """List a dataset repository's files by path, with the sizes and hashes the hub announces."""
    here, place = urlsplit(net.endpoint), f"{net.endpoint}/datasets/{repo}/resolve/{revision}"

    def read(response: requests.Response) -> tuple[dict[str, Remote], str]:
        files = {}
        for item in response.json():
            lfs, path = item.get("lfs") or item, item["path"]
            if item.get("type", "file") == "file":
                digest = (lfs.get("oid") or "").removeprefix("sha256:")
                files[path] = Remote(f"{place}/{quote(path)}", lfs.get("size"), digest)
        link = urlsplit(response.links.get("next", {}).get("url", ""))
        # a mirror may name the original host in the link: stay with the endpoint
        return files, urlunsplit((here.scheme, here.netloc, *link[2:])) if link.path else ""

    files, url = {}, f"{net.endpoint}/api/datasets/{repo}/tree/{revision}?recursive=true"
    while url:
        page, url = net.ask(url, read)
        files.update(page)
    return files


def announced(net: Net, remote: Remote) -> Remote:
    """Complete what is known of a file from the headers that the hub sends with it."""

    def read(response: requests.Response) -> Remote:
        size, digest, version = remote.size, remote.digest, ""
        for headers in (r.headers for r in [*response.history, response]):
            etag = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").strip('W/"')
            version = version or etag
            digest = digest or (etag if re.fullmatch("[0-9a-f]{64}", etag) else "")
            size = size or int(headers.get("X-Linked-Size") or 0)
        size = size or int(response.headers.get("Content-Length") or 0)
        return Remote(remote.url, size or None, digest, version)

    return remote if remote.size and remote.digest else net.ask(remote.url, read)


def is_whole(path: Path, remote: Remote) -> bool:
    """Say whether a file has the announced size and hash, as far as these are known."""
    if not path.is_file() or remote.size not in (None, path.stat().st_size):
        return False
    return not remote.digest or file_digest(path, remote.digest) == remote.digest


def fetch_part(net: Net, remote: Remote, partial: Path, progress: Progress) -> None:
    """Fetch what is missing of a partial file in one request; it may end early."""
    have = partial.stat().st_size if partial.exists() else 0
    with net.open(remote.url, {"Range": f"bytes={have}-"} if have else {}) as response:
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        resumes = response.status_code == 206 and span and int(span[1]) == have
        if resumes and span and remote.size and span[2] not in ("*", str(remote.size)):
            resumes = False  # another version of the file lies there now
        if have and not resumes:
            partial.unlink()
            progress.add(-have, skipped=True)
        if response.status_code == 416 or (response.status_code == 206 and not resumes):
            raise Busy(f"it cannot go on from byte {have}")
        with open(partial, "ab") as file:
            for block in response.iter_content(BLOCK_BYTES):
                file.write(block)
                progress.add(len(block))
                if net.stopping.is_set():
                    raise Stop("stopped")


def download(net: Net, remote: Remote, path: Path, progress: Progress | None = None) -> None:
    """Fetch a file whole and checked, or raise Stop; what a stopped call got is gone on from."""
    remote = announced(net, remote)
    progress = progress or Progress(path.name, remote.size or 0)
    known = remote.digest or remote.version
    name = hashlib.sha256(f"{remote.size} {known}".encode()).hexdigest()[:12]
    partial = path.with_name(f".{path.name}.{name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial"):
        if old != partial or not known:
            old.unlink()  # of another version of the file
    if partial.exists():
        progress.add(partial.stat().st_size, skipped=True)
    failures = wrong = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if not before or remote.size is None or before < remote.size:
                fetch_part(net, remote, partial, progress)
            if remote.size and partial.stat().st_size < remote.size:
                raise Busy("it cut the connection")
        except (Busy, requests.RequestException) as error:
            gained = partial.exists() and partial.stat().st_size > before
            failures = 1 if gained else failures + 1
            net.pause(failures, remote.url, error)
            continue
        if is_whole(partial, remote):
            os.replace(partial, path)
            return
        progress.add(-partial.stat().st_size, skipped=True)
        partial.unlink()
        wrong += 1
        if wrong == 3:
            raise Stop(f"{remote.url} gave {wrong} times other bytes than the hub announces: "
                       "try again later, or another HF_ENDPOINT")  # fmt: skip


def download_all(fetch: Callable[[str], Any], names: list[str], workers: int, net: Net) -> list:
    """Run fetch(name) for all names in threads; return the results; the first error stops all."""
    futures: list[Future] = [Future() for _ in names]
    todo = iter(list(zip(futures, names)))

    def work() -> None:
        for future, name in todo:
            if net.stopping.is_set():
                return
            try:
                future.set_result(fetch(name))
            except (Stop, OSError) as error:  # raised again where the results are read
                future.set_exception(error)
            finally:
                if not future.done():
                    future.set_exception(RuntimeError("a download's thread died, see above"))

    for _ in range(workers):  # daemons: Ctrl-C need not wait until a stalled read times out
        threading.Thread(target=work, daemon=True).start()
    try:
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        if not all(future.done() for future in futures):
            net.stopping.set()


def make_hub(settings: Settings, known: dict[str, dict], net: Net) -> dict[str, dict]:
    """Fetch the first shards of a hub repository and its last one, for validation."""
    folder, (_, repo) = data_dir(settings.source), HUB[settings.data]
    remotes = hub_files(net, repo)
    shards = [remotes[name] for name in sorted(remotes) if re.search(r"shard_\d+\.parquet$", name)]
    if not shards:
        raise Stop(f"{net.endpoint} lists no shards of {repo}: is HF_ENDPOINT right?")
    if settings.shards >= len(shards):
        raise Stop(f"{repo} has {len(shards) - 1} train shards: --shards={len(shards) - 1} at most")
    wanted = {f"train-{i:05d}.parquet": shards[i] for i in range(settings.shards)}
    wanted["val.parquet"] = shards[-1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # written again when all is there
    for path in sorted(folder.glob("*.parquet")):  # shards beyond --shards are kept for later
        other = path.with_name(path.name.replace("train-", "unused-"))
        if path.name.startswith("train-") and path.name not in wanted:
            path.rename(other)
        elif (name := path.name.replace("unused-", "train-")) in wanted and name != path.name:
            path.rename(folder / name)
    there = {name: (folder / name).stat().st_size for name in wanted if (folder / name).exists()}
    missing = {name: remote for name, remote in wanted.items() if name not in there
               or there[name] != (remote.size or there[name])}  # fmt: skip
    total = sum(remote.size or 0 for remote in missing.values())
    partial = sum(path.stat().st_size for path in folder.glob(".*.partial"))
    check_space(total - partial, "take fewer --shards")
    if missing:
        print(f"prepare: fetching {len(missing)} of {len(wanted)} shards of {repo}, "
              f"{total / 1e6:,.0f} MB", flush=True)  # fmt: skip
    progress = Progress(repo, total)

    def fetch(name: str) -> dict[str, Any]:
        path, remote, entry = folder / name, wanted[name], known.get(name, {})
        if name not in missing and entry.get("sha256") == remote.digest:
            return entry
        if name in missing or not is_whole(path, remote):
            download(net, remote, path, progress)
        return describe_shard(path)

    with contextlib.closing(progress):
        return dict(zip(wanted, download_all(fetch, list(wanted), settings.workers, net)))


# 4. Own files --------------------------------------------------------------------------------

TEXT_SUFFIXES = """
 txt text md markdown json csv tsv rst org adoc tex bib srt vtt log html htm xml svg py pyi js mjs
 jsx ts tsx css scss c h cc cpp cxx hpp cu cuh java kt scala go rs rb php pl pm lua r jl m swift cs
 fs hs ml mli ex exs erl clj lisp el scm sh bash zsh fish ps1 bat sql yaml yml toml ini cfg conf
 cmake mk proto graphql vue svelte dart zig nim v sv vhd vhdl asm s f f90 pas d tcl diff
"""
COLUMNS = ("text", "content")  # of records, the first that is there
LINE_CHARS = 1 << 25  # the longest line of .jsonl that is read; longer ones are left out


def file_kind(path: Path) -> str:
    """Return .parquet, .jsonl or .txt by a file's name without .gz, "" where it is none."""
    name = path.name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1].replace(".ndjson", ".jsonl")
    plain = not suffix or suffix[1:] in TEXT_SUFFIXES.split()
    return suffix if suffix in (".parquet", ".jsonl") else ".txt" if plain else ""


def sniff_encoding(head: bytes) -> str:
    """Return the encoding of text that begins with `head`, "" where it is no text."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    strange = len(re.findall("[\0-\x06\x0e-\x1a\x7f\ufffd]", text))
    return "utf-8-sig" if strange * 10 <= len(text) + 10 else ""


def clean(text: str) -> str:
    """Return text with plain line ends, without NULs, outer blanks and halves of characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\0", "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class OwnFiles:
    """Read documents from the files below a path; what is left out or mended is counted."""

    def __init__(self, root: Path) -> None:
        self.root, self.limit = root, 0
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.example: dict[str, str] = {}  # reason: the first place it was met at
        self.raw: IO[bytes] | None = None  # the file being read
        self.done_bytes = 0  # of the files before it
        self.files = {path: path.stat() for path in self.find_files()}
        self.unread = Counter(self.dropped)

    def drop(self, reason: str, place: Path | str) -> None:
        self.dropped[reason] += 1
        place = os.path.relpath(place, self.root.parent)
        self.example.setdefault(reason, place.encode("utf-8", "replace").decode())

    def find_files(self) -> list[Path]:
        """List the files to read: no hidden ones, no loops of links, not what is written here."""
        if self.root.is_file():
            return [self.root]
        found, seen, stack = [], set(), [self.root]
        while stack:
            folder = stack.pop()
            try:
                info = folder.stat()
                paths = sorted(folder.iterdir())
            except OSError:
                self.drop("unreadable folders", folder)
                continue
            if (info.st_dev, info.st_ino) in seen or folder.resolve() == base_dir().resolve():
                continue
            seen.add((info.st_dev, info.st_ino))
            for path in paths:
                if path.name.startswith("."):
                    self.drop("hidden files and folders", path)
                elif path.is_dir():
                    stack.append(path)
                elif not path.is_file():
                    self.drop("broken links and special files", path)
                elif not file_kind(path):
                    self.drop("files of other kinds", path)
                else:
                    found.append(path)
        return sorted(found)

    def left_out(self) -> str:
        """Say what was left out and mended, with the first place of each kind."""
        out = [f"{count:,} {reason} ({self.example[reason]})"
               for reason, count in self.dropped.most_common()]  # fmt: skip
        mended = [f"{what} in {count:,} documents" for what, count in (+self.mended).items()]
        parts = ["left out " + ", ".join(out)] if out else []
        return "; ".join(parts + mended)

    def size(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def expected_bytes(self) -> int:
        """Guess the size of the text: packed files hold about four times theirs."""
        packed = (".gz", ".parquet")
        extra = (i.st_size for p, i in self.files.items() if p.suffix.lower() in packed)
        return self.size() + 3 * sum(extra)

    def position(self) -> int:
        """Return how many bytes of the files have been read."""
        return self.done_bytes + (self.raw.tell() if self.raw and not self.raw.closed else 0)

    def fingerprint(self) -> str:
        """Hash names, sizes and times of the files: changed input is prepared anew."""
        stats = [(str(p), i.st_size, i.st_mtime_ns) for p, i in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def documents(self, limit: int) -> Iterator[str]:
        """Yield the clean documents of all files, each at most `limit` characters long."""
        self.limit, self.done_bytes = limit, 0
        self.dropped, self.mended = Counter(self.unread), Counter()
        for path, info in self.files.items():
            if not info.st_size:
                self.drop("empty files", path)
                continue
            try:
                with open(path, "rb") as self.raw:
                    for piece in self._pieces(path):
                        text = clean(piece)
                        if text:
                            self.mended["invalid characters replaced"] += "\ufffd" in text
                            self.mended["NUL bytes removed"] += "\0" in piece
                            yield text
                        else:
                            self.drop("empty documents", path)
            except (OSError, EOFError, zlib.error, pa.ArrowException):
                self.drop("damaged or unreadable files", path)
            self.done_bytes += info.st_size

    def _pieces(self, path: Path) -> Iterator[str]:
        assert self.raw
        packed = path.suffix.lower() == ".gz"
        with gzip.open(self.raw) if packed else contextlib.nullcontext(self.raw) as file:
            kind = file_kind(path)
            if kind == ".parquet":
                records = self._parquet(path, file)
            else:
                encoding = sniff_encoding(file.read(1 << 13))
                file.seek(0)
                if not encoding:
                    self.drop("binary files", path)
                    return
                lines = io.TextIOWrapper(file, encoding, "replace")
                if kind != ".jsonl":
                    yield from cut_pieces(iter(lambda: lines.read(1 << 20), ""), self.limit)
                    return
                records = self._jsonl(path, lines)
            for text in records:
                yield from cut_pieces([text], self.limit)

    def _value_text(self, value: Any, place: Path | str) -> Iterator[str]:
        """Yield a record's text: the record itself or its column; else count it."""
        if isinstance(value, dict):
            value = next((value[name] for name in COLUMNS if value.get(name) is not None), None)
        if isinstance(value, str):
            yield value
        else:
            self.drop("records without `text` or `content`", place)

    def _jsonl(self, path: Path, file: IO[str]) -> Iterator[str]:
        number = 0
        while line := file.readline(LINE_CHARS):
            number += 1
            place = f"{path}:{number}"
            if len(line) == LINE_CHARS and line[-1] != "\n":
                self.drop("lines that are too long", place)
                while (rest := file.readline(LINE_CHARS)) and rest[-1] != "\n":
                    pass
            elif line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    self.drop("lines of broken JSON", place)
                else:
                    yield from self._value_text(value, place)

    def _parquet(self, path: Path, file: Any) -> Iterator[str]:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            name = next((name for name in COLUMNS if name in names), None)
            if name is None:
                self.drop(f"tables without `text` or `content` (has {', '.join(names[:8])})", path)
                return
            for batch in table.iter_batches(batch_size=64, columns=[name]):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield from self._value_text(value and value.decode("utf-8", "replace"), path)


def read_own(files: OwnFiles, limit: int, settings: Settings, folder: Path) -> Sorter:
    """Read all files into a sorter below `folder`, their documents cut at `limit` characters."""
    shutil.rmtree(folder, ignore_errors=True)
    sorter = Sorter(folder, settings.seed, files.expected_bytes())
    with contextlib.closing(Progress("reading", files.size())) as progress:
        for text in files.documents(limit):
            sorter.add(text)
            progress.at(files.position())
    return sorter


def make_own(settings: Settings, files: OwnFiles, folder: Path) -> tuple[Sorter, dict]:
    """Write shards of the user's files to `folder`; return the sorter and the files made."""
    check_space(files.expected_bytes() * 3 // 2, "name a smaller --data")
    print(f"prepare: reading {len(files.files)} files, {files.size() / 1e6:,.1f} MB", flush=True)
    sorter = read_own(files, settings.doc_chars, settings, folder / "buckets")
    shorter = max(200, sorter.total_chars // 50)
    if len(sorter.few) < 20 and shorter < settings.doc_chars:  # so that validation is a small part
        print(f"prepare: few documents: they are cut into pieces of {shorter:,} characters")
        sorter = read_own(files, shorter, settings, folder / "buckets")
    if len(sorter.few) < 2:
        why = f": {files.left_out()}" if files.dropped else ""
        what = f"only {sorter.total_chars:,} characters of text" if sorter.few else "no text"
        need = "training and validation need two documents, better a million characters"
        raise MissingInput(f"{files.root} holds {what} that can be used{why}; {need}")
    return sorter, write_splits(folder, sorter, settings)


# 5. World: tables ----------------------------------------------------------------------------

# 6. World: text ------------------------------------------------------------------------------

sys.path.insert(0, "/tmp/w")  # these two lines go when the world is pasted in here
from world import fact_prompts, world_documents  # noqa: I001


# 7. Main -------------------------------------------------------------------------------------


def make_world(settings: Settings, folder: Path) -> tuple[Sorter, dict]:
    """Write the embedded world's shards to `folder`, and the facts that evaluate.py asks for."""
    sorter = Sorter(folder / "buckets", settings.seed, settings.documents * 1000)
    for text in world_documents(settings.seed, settings.documents):
        sorter.add(text)
    (folder / "eval").mkdir()
    for split in ("trained", "unseen"):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in fact_prompts(split)]
        (folder / "eval" / f"facts_{split}.jsonl").write_text("".join(lines), "utf-8")
    return sorter, write_splits(folder, sorter, settings)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a source's manifest.json, {} where there is none or it is broken."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        return manifest if {"settings", "files"} <= set(manifest) else {}
    except (OSError, ValueError, TypeError):
        return {}


def is_prepared(folder: Path, manifest: dict, wanted: dict) -> bool:
    """Say whether the files of `wanted` settings are all there with their sizes."""
    if not manifest or manifest["settings"] != wanted:
        return False
    paths = {folder / name: entry["size"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def check_folder(folder: Path, manifest: dict, settings: Settings, wanted: dict) -> None:
    """Raise Stop rather than write over another source's text; say what is made anew, and why."""
    remedy = f"give this text a name of its own with --source=NAME, or delete {folder}"
    before = manifest.get("settings", {})
    if before and before["data"] != wanted["data"]:
        raise Stop(f"{folder} holds the text of {before['data']}: {remedy}")
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").exists()
    if foreign and settings.kind != "hub":
        raise Stop(f"{folder} holds files that were not made from --data={settings.data}: {remedy}")
    words = {"input": "other files", "program": "another version of prepare.py"}
    changed = [words.get(name) or f"--{name.replace('_', '-')}={before.get(name)}"
               for name in wanted if before and before.get(name) != wanted[name]]  # fmt: skip
    if changed:
        again = "completed" if settings.kind == "hub" else "made anew"
        print(f"prepare: {settings.source} was made with {', '.join(changed)}: it is {again}")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes were writing beside a source's folder."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        number = path.name.split(".")[-2]
        try:
            if number.isdigit() and int(number) != os.getpid():
                os.kill(int(number), 0)  # asks whether the process lives
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            continue  # it lives and is another user's


def summary(manifest: dict) -> str:
    """Say in a line what a source holds."""
    files = manifest["files"]
    val = files["val.parquet"]["documents"]
    train = sum(entry["documents"] for entry in files.values()) - val
    chars = format_count(sum(entry["characters"] for entry in files.values()))
    return f"{train:,} train and {val:,} validation documents, {chars} characters"


def prepare(settings: Settings, net: Net | None) -> dict[str, Any]:
    """Make data/SOURCE/ as the settings say, unless it is there; return its manifest."""
    folder = data_dir(settings.source)
    manifest, wanted = read_manifest(folder), settings.identity()
    files = OwnFiles(settings.path) if settings.kind == "own" else None
    if files:
        wanted["input"] = files.fingerprint()
    if settings.kind == "world":
        wanted["program"] = file_digest(Path(__file__))
    if is_prepared(folder, manifest, wanted):
        print(f"prepare: {folder} is complete, nothing to do: {summary(manifest)}")
        return manifest
    check_folder(folder, manifest, settings, wanted)
    new: dict[str, Any] = {"source": settings.source, "settings": wanted}
    if settings.kind == "hub":
        new["files"] = make_hub(settings, manifest.get("files", {}), net or Net())
        write_json(folder / "manifest.json", new)
    else:
        remove_leftovers(folder)
        with written_beside(folder) as beside:
            beside.mkdir()
            made = make_own(settings, files, beside) if files else make_world(settings, beside)
            sorter, new["files"] = made
            new["dropped"] = {"duplicates": sorter.duplicates, **(files.dropped if files else {})}
            new["mended"] = dict(files.mended) if files else {}
            shutil.rmtree(beside / "buckets")
            write_json(beside / "manifest.json", new)
    print(f"prepare: {folder}: {summary(new)}")
    if files and sorter.duplicates:
        print(f"prepare: left out {sorter.duplicates:,} duplicates")
    if files and (files.dropped or +files.mended):
        print(f"prepare: {files.left_out()}")
    return new


def main(settings: Settings, net: Net | None = None) -> dict[str, Any]:
    """Prepare one source; every failure is one sentence."""
    try:
        return prepare(settings, net)
    except KeyboardInterrupt:
        raise Stop("prepare: stopped; run the same command again to go on") from None
    except OSError as error:
        raise Stop(disk_sentence(error)) from None


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
