"""Pretrain the base model on packed text.

Usage:   python pretrain.py --depth=4                       # laptop
         torchrun --nproc_per_node=8 pretrain.py --depth=20 # one node
         python pretrain.py --depth=20 --plan --plan-device=H100 --plan-count=8
Reads:   data/SOURCE/*.parquet, runs/TAG/tokenizer/         # prepare.py, train_tokenizer.py
Writes:  runs/TAG/base/step-001234/, runs/TAG/metrics.jsonl
Method:  Muon + AdamW (arXiv:2502.16982, 1711.05101); depth sets width, batch and steps;
         20 tokens per parameter by default (arXiv:2203.15556)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common import (
    ADAMW,
    GPT,
    PEAK_FLOPS,
    REFERENCE_BATCH,
    REFERENCE_TOKENS,
    Batch,
    Engine,
    GPTConfig,
    Horizon,
    MissingInput,
    Optimizer,
    Rows,
    RowSettings,
    Run,
    Sampling,
    Tokenizer,
    accum_steps,
    all_sum,
    at_least,
    begin_or_resume,
    card_name,
    check_data,
    data_setting,
    device_setting,
    dist_info,
    drop_replaced,
    evaluate_bpb,
    find_checkpoint,
    format_count,
    format_duration,
    free_bytes,
    list_shards,
    log_setting,
    logits_at_once,
    memory_bytes,
    model_setting,
    optim_setting,
    optimizer_groups,
    out_of_memory,
    parse_settings,
    peak_flops,
    pick_device,
    pick_dtype,
    rate_scale,
    read_meta,
    read_texts,
    rms_norm,
    row_batches,
    run_dir,
    save_checkpoint,
    schedule,
    setting,
    start_run,
    suited_batch,
    text_key,
    token_rows,
    training_steps,
    trapezoid,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(RowSettings):
    source: str = data_setting(
        "", "folder below data/ with the text; empty: the tokenizer's", may_differ=True
    )
    depth: int = model_setting(12, "transformer blocks; width, batch and steps follow from it")
    head_dim: int = model_setting(0, "channels of an attention head; 0: 128, or 64 below depth 8")
    n_kv_head: int = model_setting(0, "heads of keys and values; 0: as many as of queries")
    max_seq_len: int = model_setting(2048, "context: positions of a row")
    window_pattern: str = model_setting(
        "L", "a letter a layer, repeated: L attends to the whole context, S to a quarter"
    )
    smear: bool = model_setting(True, "mix the token before into each position's input")
    value_embeds: bool = model_setting(True, "embed tokens into every other layer's values too")
    skip: bool = model_setting(True, "mix the first block's input into every block's")
    bigram_rows: int = model_setting(32768, "rows of a table that embeds pairs of tokens; 0: none")
    qk_scale: float = model_setting(1.2, "factor on normalised queries and keys")
    num_iterations: int = optim_setting(
        0, "optimizer steps; 0: derived from --target-flops or --target-param-data-ratio"
    )
    target_flops: float = optim_setting(
        0.0, "train for this many FLOPs; 0: derived from --target-param-data-ratio"
    )
    target_param_data_ratio: float = optim_setting(20.0, "train on so many tokens per parameter")
    total_batch_size: int = optim_setting(
        0, "tokens of a step over all ranks; 0: derived from the tokens of the run"
    )
    bigram_steps: int = optim_setting(
        60, "steps that first fit embedding and head to the counts of pairs of tokens"
    )
    bigram_tokens: float = optim_setting(
        1e9, "runs of more tokens do without --bigram-rows and --bigram-steps"
    )
    matrix_lr: float = optim_setting(0.02, "learning rate of the blocks' matrices (Muon)")
    embed_lr: float = optim_setting(0.2, "learning rate of the embedding at width 768 (AdamW)")
    head_lr: float = optim_setting(0.004, "learning rate of the head at width 768 (AdamW)")
    muon_steps: int = optim_setting(
        0, "steps of Muon's orthogonalisation, 3 or 5; 0: 5, or 3 below width 512"
    )
    weight_decay: float = optim_setting(0.0, "weight decay of the matrices")
    warmup: int = 10
    warmdown: float = 0.6
    final_lr: float = 0.05
    eval_tokens: int = log_setting(100_000, "about how many tokens a validation reads")
    sample_every: int = log_setting(0, "steps between samples of text; 0: never")
    fp8: bool = device_setting(
        False, "multiply the blocks' matrices in 8 bits: H100 and newer", may_differ=False
    )
    recompute: bool = device_setting(
        False, "save memory: compute activations again in the backward pass"
    )
    plan: bool = setting(
        False, "print parameters, FLOPs, memory, time and cost, and end", may_differ=True
    )
    plan_device: str = device_setting("", "GPU that --plan is for, as H100; empty: this machine's")
    plan_count: int = device_setting(1, "number of GPUs that --plan is for")
    plan_vocab_size: int = device_setting(65536, "size of the vocabulary that --plan is for")

    derived: ClassVar[dict[str, str]] = {
        "model_dim": "the width is derived from --depth (64 channels a block)",
        "n_embd": "the width is derived from --depth (64 channels a block)",
        "n_layer": "it is --depth",
        "n_head": "it is derived from --depth and --head-dim",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= 128:
            raise ValueError(f"--depth={self.depth} must be from 1 to 128")
        at_least(self, 2, "max_seq_len")
        at_least(self, 0, "head_dim", "n_kv_head", "target_flops", "bigram_rows", "weight_decay")
        at_least(self, 1, "plan_count", "plan_vocab_size")
        if self.total_batch_size % self.max_seq_len:
            near = max(1, round(self.total_batch_size / self.max_seq_len)) * self.max_seq_len
            raise ValueError(
                f"--total-batch-size={self.total_batch_size} does not divide into rows of "
                f"--max-seq-len={self.max_seq_len}: {near} would"
            )
        if not 0 < self.target_param_data_ratio < math.inf:
            raise ValueError("--target-param-data-ratio must be above 0")
        if self.muon_steps not in (0, 3, 5):
            raise ValueError("--muon-steps must be 3, 5 or 0")
        model_config(self, 512)  # raises for heads that do not fit


# 2. What follows from the depth --------------------------------------------------------------


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """Derive the model's shape: width 64 x depth, rounded up to whole heads.

    With two heads of 128 a depth of 4 copies worse from its context than with four of 64. Long
    runs have no table of pairs: published runs of depth 25 gained nothing by one.
    """
    head_dim = settings.head_dim or (128 if settings.depth >= 8 else 64)
    n_head = max(1, math.ceil(settings.depth * 64 / head_dim))
    config = GPTConfig(
        vocab_size=vocab_size,
        n_layer=settings.depth,
        n_embd=n_head * head_dim,
        n_head=n_head,
        n_kv_head=settings.n_kv_head or n_head,
        max_seq_len=settings.max_seq_len,
        window_pattern=settings.window_pattern or "L",
        qk_scale=settings.qk_scale,
        smear=settings.smear,
        value_embeds=settings.value_embeds,
        skip=settings.skip,
    )
    tokens = derive_horizon(settings, config).num_rows * settings.max_seq_len
    return replace(config, bigram_rows=settings.bigram_rows * (tokens <= settings.bigram_tokens))


def derive_horizon(settings: Settings, config: GPTConfig) -> Horizon:
    """Derive steps and batch from the first of steps, FLOPs and tokens a parameter that is set."""
    if settings.num_iterations:
        # batch = REFERENCE_BATCH * sqrt(tokens / REFERENCE_TOKENS) with tokens = steps * batch
        batch, why = REFERENCE_BATCH**2 * settings.num_iterations / REFERENCE_TOKENS, "as set"
        tokens = settings.num_iterations * batch
    else:
        each = config.flops_per_token()
        tokens = settings.target_param_data_ratio * config.scaling_params()
        why = f"{settings.target_param_data_ratio:g} tokens a parameter"
        if settings.target_flops:
            tokens = settings.target_flops / each
            why = f"{format_count(settings.target_flops)}FLOP at {each:.3g} a token"
        batch = suited_batch(tokens)
    T = settings.max_seq_len
    rows = 2 ** max(0, round(math.log2(batch / T)))  # a power of two divides among most ranks
    rows = settings.total_batch_size // T or rows
    return Horizon(settings.num_iterations or max(1, round(tokens / (rows * T))), rows, why)


# 3. Memory and plan --------------------------------------------------------------------------

PRICE_PER_HOUR = {"H200": 3.5, "H100": 3.0, "A100": 1.8, "A6000": 0.8, "RTX 4090": 0.5}  # USD
# bytes a second that a rank sends: inside a node over NVLink, as its maker says, or PCIe; between
# nodes of 8 H100s with a port of 400 Gb/s each, where reduce-scatter was measured at 360 (4 nodes)
# to 260 GB/s (128; NVIDIA/nccl#1229)
NODE_RATES = {
    **dict.fromkeys(("B200", "GB200", "B300"), 900e9), "A100": 300e9, "A800": 200e9, "H800": 200e9,
    **dict.fromkeys(("H200", "GH200", "H100", "H20"), 450e9),
}  # fmt: skip
PCIE_RATE, NETWORK_RATE = 25e9, 300e9
MEMORY_GB = {
    "H200": 141, "GH200": 96, "H100 PCIe": 80, "H100": 80, "H800": 80, "H20": 96, "B200": 180,
    "GB200": 186, "B300": 270, "A100": 80, "A800": 80, "L40S": 48, "L4": 24, "A10G": 24, "A40": 48,
    "A6000": 48, "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24,
}  # fmt: skip


def exchanged_bytes(config: GPTConfig, world_size: int) -> int:
    """Return what a rank sends in a step: gradients summed by chunks, parameters gathered, fp32.

    As much as it receives. Chunks are whole matrices, so many ranks send filling too.
    """
    with torch.device("meta"):
        units = Optimizer(optimizer_groups(GPT(config), 1, 1, 1, 0), torch.float32).units
    whole = 0
    for unit in units:
        size = unit.params[0].numel() if unit.group["kind"] == "muon" else 1
        whole += -(-unit.length // world_size) * world_size * size
    return 2 * 4 * whole * (world_size - 1) // world_size


def print_plan(settings: Settings) -> dict[str, float]:
    """Print what a run would take, without touching data or a device; return the numbers."""
    config = model_config(settings, settings.plan_vocab_size)
    horizon = derive_horizon(settings, config)
    T, count, name = settings.max_seq_len, settings.plan_count, settings.plan_device
    if name and name not in PEAK_FLOPS:
        raise MissingInput(f"--plan-device={name} is unknown: choose of {', '.join(PEAK_FLOPS)}")
    device = torch.device("cuda") if name else pick_device(settings.device)
    name = name or card_name(device)
    dtype = torch.bfloat16 if name else pick_dtype(device, settings.dtype)
    peak = PEAK_FLOPS[name] if name else peak_flops(device, dtype)
    # of the peak: on a GPU never measured (docs/choices.md), so the worst and the best are said
    worst, used, best = (0.35, 0.45, 0.55) if name else (0.5, 0.5, 0.5)
    flops = horizon.num_rows * T * config.flops_per_token()
    each = -(-horizon.batch_rows // count)  # rows; with more ranks than rows some have filling
    step_s = flops / horizon.num_rows * each / (peak * used)
    rate = NETWORK_RATE if count > 8 else NODE_RATES.get(name, PCIE_RATE)
    sent = exchanged_bytes(config, count)

    def memory(rows: int) -> dict[str, int]:
        return memory_bytes(config, rows, dtype.itemsize, device, world_size=count,
                            recompute=settings.recompute, slots=1)  # fmt: skip

    rows = settings.device_batch_size or each
    room = 0.9 * (MEMORY_GB[name] * 1e9 if name else free_bytes(device))
    while not settings.device_batch_size and rows > 1 and sum(memory(rows).values()) >= room:
        rows = -(-rows // 2)
    numbers: dict[str, float] = {
        "parameters": config.num_params(), "flops_per_token": config.flops_per_token(),
        "tokens": horizon.num_rows * T, "steps": horizon.num_steps, "flops": flops,
        "batch_tokens": horizon.batch_rows * T, "step_seconds": step_s, "exchanged_bytes": sent,
        "exchange_seconds": sent / rate, "seconds": horizon.num_steps * (step_s + sent / rate),
        **{f"{part}_bytes": size for part, size in memory(rows).items()},
    }  # fmt: skip
    parts_of = memory(rows)
    total, parts = sum(parts_of.values()) / 1e9, parts_of.items()
    print(f"depth {config.n_layer}, width {config.n_embd}, {config.n_head} heads, context {T}")
    print(f"parameters   {format_count(config.num_params())}, vocabulary {config.vocab_size:,}")
    print(f"FLOPs        {format_count(flops)}, {format_count(config.flops_per_token())} a token")
    print(f"tokens       {format_count(horizon.num_rows * T)} ({horizon.why})")
    # 4.8 characters a token, a quarter to spare, 250 M characters a shard; run.sh reads this line
    numbers["shards"] = 2 + int(numbers["tokens"] * 4.8 * 1.25 / 250e6)
    print(f"shards       {numbers['shards']} of the hub's text")
    print(f"steps        {horizon.num_steps:,} of {horizon.batch_rows * T:,} tokens")
    print(f"memory       {total:.1f} GB a device at {rows} rows: "
          + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts))  # fmt: skip
    print(f"device       {count} x {name or device.type}, {format_count(peak)}FLOP/s each")
    print(f"step         {1e3 * step_s:,.0f} ms at {used:.0%} of the peak")
    if count > 1:
        print(f"exchange     {1e3 * sent / rate:,.0f} ms a step: each GPU sends and receives "
              f"{sent / 1e9:.1f} GB at {rate / 1e9:.0f} GB/s")  # fmt: skip
    some = [format_duration(horizon.num_steps * (step_s * used / share + sent / rate))
            for share in (best, worst)]  # fmt: skip
    between = f", {some[0]} to {some[1]} at {best:.0%} to {worst:.0%}" * (best > worst)
    print(f"time         {format_duration(numbers['seconds'])} of pretraining{between}")
    # of the hub's text 0.1 GB a shard; ids of 2 or 4 bytes; two checkpoints of each of four stages
    text_gb = 0.1 * numbers["shards"] if horizon.num_rows * T > 3e8 else 0.1
    ids_gb = horizon.num_rows * T * (2 if config.vocab_size <= 1 << 16 else 4) / 1e9
    saved_gb = (4 * config.num_params() + parts_of["optimizer"] * count) / 1e9
    numbers["disk_gb"] = text_gb + ids_gb + 8 * saved_gb
    print(f"disk         {math.ceil(numbers['disk_gb'])} GB: text {text_gb:.1f}, rows "
          f"{ids_gb:.1f}, checkpoints 8 x {saved_gb:.1f} (--keep=1: half of them)")  # fmt: skip
    if price := PRICE_PER_HOUR.get(name):
        numbers["cost_usd"] = price * count * numbers["seconds"] / 3600
        print(f"cost         {numbers['cost_usd']:,.0f} USD at {price} USD a GPU and hour")
    return numbers


# 4. Events -----------------------------------------------------------------------------------


def find_openings(texts: list[str], count: int = 5) -> list[str]:
    """Return how some texts begin: by four words, or by characters where there are no spaces."""
    found = []
    for text in texts:
        opening = " ".join(text.split()[:4])
        found.append(opening if len(opening) < 40 else opening[:8])
    return list(dict.fromkeys(filter(None, found)))[:count]


def print_samples(run: Run, model: GPT, tokenizer: Tokenizer, openings: list[str]) -> None:
    """Print greedy completions of openings; training's weights are left as they are."""
    if run.rank:
        return
    try:
        copy = GPT.create(model.config, run.device, model.dtype)
        copy.load_state_dict(model.state_dict())
        engine = Engine(copy, tokenizer, slots=1)
        for prompt in openings[:3]:
            pieces = engine.complete(prompt, Sampling(max_tokens=24, temperature=0))
            run.say(f"sample: {prompt}|{''.join(pieces)!r}")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        run.say("sample: none, as memory is full: --sample-every=0 leaves them out")


def validation_texts(source: str, max_tokens: int) -> list[str]:
    """Return the first validation documents, about max_tokens of them at 4 characters each."""
    texts, chars = [], 0
    for text in itertools.chain.from_iterable(map(read_texts, list_shards(source, "val"))):
        texts.append(text)
        chars += len(text)
        if chars >= 4 * max_tokens:
            break
    return texts


# 5. Start -----------------------------------------------------------------------------------

MANY_EPOCHS = 10  # of the same text; past four more bring little (arXiv:2305.16264)
LITTLE_TEXT = ": little text for such a model: get more, or lower --depth or --num-iterations"
BIGRAM_PAIRS = 12_000_000  # counted at most
BIGRAM_SHARE = 0.06  # of the run's FLOPs that the fit may take
# factor on the rate of a head that was fitted, in pretraining alone: much of it is there
FITTED_HEAD_LR = 0.25


def bigram_steps(settings: Settings, config: GPTConfig, tokens: int) -> int:
    """Choose the steps of fit_bigrams: none where they would be too few to be worth it."""
    step = 6 * config.padded_vocab_size**2 * config.n_embd
    affordable = int(BIGRAM_SHARE * tokens * config.flops_per_token() / step)
    steps = min(settings.bigram_steps, affordable)
    return steps if steps >= 20 and tokens <= settings.bigram_tokens else 0


def count_pairs(rows: Rows, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count which id follows which: ids, followers and shares of all pairs, sorted by id."""
    ids = np.stack([rows.row(i) for i in range(min(len(rows), BIGRAM_PAIRS // rows.row(0).size))])
    before, after = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    real = (before != rows.bos) | (after != rows.bos)  # the last row may be filled up with bos
    keys, counts = np.unique(before[real] * V + after[real], return_counts=True)
    shares = torch.from_numpy(counts / counts.sum()).float()
    return torch.from_numpy(keys // V), torch.from_numpy(keys % V), shares


def fit_bigrams(model: GPT, rows: Rows, num_steps: int) -> float:
    """Fit the embedding and the head to the counts of pairs; return the last nats per token.

    While the blocks' outputs are zero the model sees one token back. All pairs at once teach it
    in seconds what batches of text would in the first hundred steps. Ranks share the work.
    """
    rank, world_size = dist_info()
    V, device = model.config.vocab_size, model.embed.weight.device
    before, after, shares = (x.to(device) for x in count_pairs(rows, V))
    embed, head = model.embed.weight, model.head.weight
    rates = {embed: 0.3, head: 0.012 * rate_scale(model.config)}
    optimizer = Optimizer([{**ADAMW, "params": [p], "lr": lr} for p, lr in rates.items()],
                          torch.float32)  # fmt: skip
    size = logits_at_once(device) // V or 1  # ids
    starts = range(rank * size, V, world_size * size)
    chunks = [torch.tensor([start, min(start + size, V)], device=device) for start in starts]
    bounds = [torch.searchsorted(before, chunk).tolist() for chunk in chunks]
    total = torch.zeros((), device=device)
    for step in range(num_steps):
        total.zero_()
        for start, (first, last) in zip(starts, bounds):
            end = min(start + size, V)
            source, target, share = (x[first:last] for x in (before, after, shares))
            source = source - start
            logits = model.logits(rms_norm(embed[start:end]))
            weights = torch.zeros(end - start, device=device).index_add(0, source, share)
            loss = (weights * logits.logsumexp(1)).sum() - (share * logits[source, target]).sum()
            loss.backward()
            total += loss.detach()
        optimizer.step(trapezoid(step, num_steps, 4, 0.6, 0.0))
    with torch.no_grad():
        embed.copy_(rms_norm(embed))  # its size counts nothing but against the learning rate
    return all_sum(total).item()


def describe(run: Run, config: GPTConfig, horizon: Horizon, micro: int, dtype: torch.dtype) -> None:
    """Print what was derived, each with its reason."""
    T, rows, peak = config.max_seq_len, horizon.batch_rows, peak_flops(run.device, dtype)
    windows = f"windows {config.window_pattern}, " if "S" in config.window_pattern else ""
    why = f"{REFERENCE_BATCH:,} x root(tokens / {format_count(REFERENCE_TOKENS)}), power of 2"
    run.say(f"model: {format_count(config.num_params())} parameters: width {config.n_embd} "
            f"(64 x depth {config.n_layer}), {config.n_head} heads of {config.head_dim}, "
            f"context {T}, {windows}vocabulary {config.vocab_size:,}")  # fmt: skip
    run.say(f"steps: {horizon.num_steps:,} ({horizon.why}), {horizon.num_rows * T:,} tokens")
    run.say(
        f"batch: {rows * T:,} tokens ({'as set' if run.settings.total_batch_size else why}) "
        f"= {run.world_size} ranks x {accum_steps(rows, micro)} passes x {micro} rows x {T}"
    )
    run.say(
        f"device: {run.device}, {str(dtype)[6:]}, matmul peak {format_count(peak)}FLOP/s, "
        f"{format_count(config.flops_per_token())}FLOP a token"
    )


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict[str, Any]:
    """Train, or go on with, the base model of a run; return the last metrics."""
    if settings.plan:
        return print_plan(settings)
    with start_run("base", settings) as run:
        tokenizer = Tokenizer.load(run_dir(settings.tag) / "tokenizer")
        source = settings.source or tokenizer.info["source"]
        text = text_key(source)
        config = model_config(settings, tokenizer.vocab_size)
        horizon, T = derive_horizon(settings, config), config.max_seq_len
        begun = begin_or_resume(run, config, horizon, {"tokenizer": tokenizer.fingerprint})
        if begun is None:
            trained_on = read_meta(find_checkpoint(settings.tag, "base"))["text"]
            if text and trained_on != text:
                run.say("base: the text has changed since; --restart trains on it")
            return run.metrics
        model, optimizer, start, meta = begun
        micro, num_steps, batch_rows = meta["micro_batch"], horizon.num_steps, horizon.batch_rows
        describe(run, config, horizon, micro, model.dtype)

        check_data(run, meta, {"source": source})  # before hours of tokenizing
        rows = token_rows(source, tokenizer, T, horizon.num_rows, run)  # (rows, T + 1) ids
        check_data(run, meta, {"data": rows.names})
        meta |= {"source": source, "text": text, "data": rows.names, "batch_tokens": batch_rows * T}
        epochs = horizon.num_rows / len(rows)
        little = LITTLE_TEXT * (epochs > MANY_EPOCHS and not settings.num_iterations)
        run.say(f"rows: {len(rows):,} of {T} tokens, {epochs:.2f} epochs{little}")
        val_texts = validation_texts(source, settings.eval_tokens)
        meta["openings"] = find_openings(val_texts)  # what a base model is tried with
        if pairs := bigram_steps(settings, config, horizon.num_rows * T):
            if not start:
                nats = fit_bigrams(model, rows, pairs)
                run.say(f"bigrams: {pairs} steps over counts of pairs, loss {nats:.3f}")
            for group in optimizer.groups:
                if group["params"][0] is model.head.weight:
                    group["lr"] *= FITTED_HEAD_LR

        def compute_loss(batch: Batch) -> Tensor:
            return model(batch.ids, batch.targets)  # (B, T) each; nats, summed over the targets

        flops, peak = config.flops_per_token(), peak_flops(run.device, model.dtype) * run.world_size
        drop_replaced(run, start)
        for s in training_steps(
            run.closing(row_batches(rows, batch_rows, micro, settings.seed, start, run.device)),
            compute_loss, optimizer, schedule(settings, num_steps), num_steps,
            accum=accum_steps(batch_rows, micro), micro=micro, start=start,
            stop=lambda: run.stopping,
        ):  # fmt: skip
            if s.due(settings.log_every or num_steps):
                run.log(
                    s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s,
                    mfu=s.tok_per_s * flops / peak, data=s.data, update=s.update, left_s=s.left_s,
                )  # fmt: skip
            if s.due(settings.save_every or num_steps):  # before evaluating, which may fail
                save_checkpoint(run, s, model, optimizer, meta)
            if s.stopping:
                break
            if s.due(settings.eval_every, first=not run.validated):
                val_bpb, _ = evaluate_bpb(model, tokenizer, val_texts, s.micro)
                run.log(s.step, val_bpb=val_bpb)
            if s.due(settings.sample_every):
                print_samples(run, model, tokenizer, meta["openings"])
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
