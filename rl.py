"""Improve the model by reinforcement learning on problems whose answer can be checked.

Usage:   python rl.py                                       # after sft.py
         torchrun --nproc_per_node=8 rl.py --tag=d20
Reads:   runs/TAG/sft/, data/CHATS/rl.jsonl
Writes:  runs/TAG/rl/step-001234/, runs/TAG/metrics.jsonl
Method:  policy gradient with group-relative advantages: each problem is answered num_samples
         times with the tool live, and an answer's advantage is its reward less its group's mean
         (GRPO, arXiv:2402.03300). Left out of GRPO: the reference model and its KL term, as the
         rewards cannot be gamed by drift (arXiv:2503.14476); the ratio and its clipping, as each
         batch of samples makes one update and is on-policy (at temperature 1 and without top-k,
         as by default: others sample from another policy than is learned); the division by the group's
         deviation and by each answer's length, which bias towards easy problems and long wrong
         answers (arXiv:2503.20783): all tokens of a step weigh alike (arXiv:2503.14476).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common import (
    GPT,
    IGNORE,
    RL_VAL,
    Batch,
    Engine,
    GPTConfig,
    MissingInput,
    Reply,
    Request,
    Run,
    Sampling,
    all_sum,
    at_least,
    check_data,
    check_name,
    choose_micro_batch,
    continue_stage,
    crc32,
    data_dir,
    dist_info,
    find_checkpoint,
    grade,
    newest_checkpoint,
    parent_key,
    parse_settings,
    pick_dtype,
    prompt_room,
    read_conversations,
    read_meta,
    render_prompt,
    reply_parts,
    reply_text,
    rl_held,
    run_tokenizer,
    save_checkpoint,
    schedule,
    setting,
    shuffled,
    start_run,
    training_steps,
    try_micro_batch,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    tag: str = setting("main", "name of the run, a folder below runs/")
    chats: str = setting("", "folder below data/ with the problems; empty = the sft run's")
    start_from: str = setting("sft", "stage whose model is improved", choices=("mid", "sft"))
    epochs: int = setting(1, "passes over the problems")
    num_iterations: int = setting(0, "optimizer steps; 0 = from the epochs")
    problems_per_step: int = setting(16, "problems of a step over all ranks")
    num_samples: int = setting(16, "answers to each problem")
    max_tokens: int = setting(128, "tokens of an answer at most")
    temperature: float = setting(1.0, "of the answers; more explores more")
    top_k: int = setting(0, "sample among the k likeliest tokens; 0 = all")
    slots: int = setting(128, "answers that are written at once")
    device_batch_size: int = setting(0, "rows of one forward pass in training; 0 = what fits")
    lr_scale: float = setting(0.1, "factor on all learning rates")
    matrix_lr: float = setting(0.0, "learning rate of the matrices (Muon); 0 = the base run's")
    embed_lr: float = setting(0.0, "learning rate of the embedding; 0 = the base run's")
    head_lr: float = setting(0.0, "learning rate of the head; 0 = the base run's")
    weight_decay: float = setting(-1.0, "decay of the matrices; -1 = the base run's")
    warm_start: bool = setting(False, "begin with the sft run's moments of the optimizer")
    warmup: int = setting(0, "steps in which the learning rate rises")
    warmdown: float = setting(0.5, "share of the run in which the learning rate falls")
    final_lr: float = setting(0.0, "factor on the learning rate at the end")
    eval_every: int = setting(50, "steps between validations; 0 = never")
    val_problems: int = setting(RL_VAL, "problems that are kept for validation")
    save_every: int = setting(50, "steps between checkpoints; the last is always saved")
    keep: int = setting(2, "checkpoints kept; 0 = all")
    log_every: int = setting(1, "steps between log lines")
    seed: int = setting(0, "of the order of problems and of the samples")
    device: str = setting("", "cuda, xpu, mps or cpu; empty = the best present")
    dtype: str = setting(
        "",
        "of activations; empty = bfloat16 or float16 where fast",
        choices=("", "float32", "bfloat16", "float16"),
    )
    run: str = setting("", "name of a wandb run, where wandb is installed")
    restart: bool = setting(False, "delete this run's rl checkpoints and begin anew")

    # what may change when a run is resumed: it alters no sample and no update
    may_differ: ClassVar[set[str]] = {
        "device_batch_size", "eval_every", "save_every", "keep", "log_every", "device", "dtype",
        "run", "restart", "slots",
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        at_least(self, 1, "epochs", "problems_per_step", "max_tokens", "slots")
        at_least(
            self, 0, "num_iterations", "device_batch_size", "top_k", "warmup", "val_problems", "keep",
            "seed",
        )  # fmt: skip
        if self.val_problems > RL_VAL:
            raise ValueError(
                f"--val-problems must be {RL_VAL} or less: training shows others solved"
            )
        if self.num_samples < 2:
            raise ValueError("--num-samples must be 2 or more: answers are compared in their group")
        Sampling(self.max_tokens, self.temperature, self.top_k)  # raises
        if self.temperature <= 0 or self.lr_scale <= 0 or not 0 <= self.warmdown <= 1:
            raise ValueError("--temperature and --lr-scale must be over 0, --warmdown from 0 to 1")


# 2. Answers and their rewards ----------------------------------------------------------------


@dataclass
class Group:
    """One problem's answers: its prompt, the replies and their rewards, 0 or 1."""

    prompt_ids: list[int]
    replies: list[Reply]
    rewards: list[float]

    def advantages(self) -> list[float]:
        """Return each reward less the mean of the group."""
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]


def sample_seed(*numbers: int) -> int:
    """Make one seed of several numbers, such as run, step, problem and sample."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def answer_problems(
    engine: Engine, problems: list[dict[str, Any]], seeds: list[int], settings: Settings
) -> list[Group]:
    """Answer each problem num_samples times, sample j of problem i by seeds[i] and j."""
    tokenizer, n = engine.tokenizer, settings.num_samples
    prompts = [render_prompt(tokenizer, problem["messages"]) for problem in problems]
    requests = [
        Request(prompt, Sampling(settings.max_tokens, settings.temperature, settings.top_k,
                                 seed=sample_seed(seed, j)))
        for prompt, seed in zip(prompts, seeds) for j in range(n)
    ]  # fmt: skip
    replies = [reply for _, reply in sorted(engine.run(requests), key=lambda pair: pair[0])]
    groups = []
    for i, (prompt, problem) in enumerate(zip(prompts, problems)):
        mine = replies[i * n : (i + 1) * n]
        rewards = [
            float(r.reason == "stop" and grade(problem, reply_text(reply_parts(tokenizer, r.ids))))
            for r in mine
        ]
        groups.append(Group(prompt, mine, rewards))
    return groups


# 3. Batches ----------------------------------------------------------------------------------


@dataclass
class WeightedBatch(Batch):
    """A micro-batch whose targets are weighted: weights (B, T), an answer's advantage."""

    weights: Tensor


def make_batch(
    rows: list[tuple[list[int], list[int], float]], bos: int, device: torch.device
) -> WeightedBatch:
    """Pad rows of (ids, mask, advantage) to one micro-batch; mask 1 where an id is a target."""
    width = max([len(ids) for ids, _, _ in rows] or [2]) - 1
    count = max(1, len(rows))  # without rows: one without targets
    ids = torch.full((count, width), bos)
    targets = torch.full((count, width), IGNORE)
    weights = torch.zeros(count, width)
    for i, (row, mask, advantage) in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        learned = torch.tensor(mask[1:], dtype=torch.bool)
        targets[i, : len(row) - 1] = torch.where(learned, torch.tensor(row[1:]), IGNORE)
        weights[i] = advantage
    number = int((targets != IGNORE).sum())
    return WeightedBatch(ids.to(device), targets.to(device), number, weights.to(device))


def group_batches(
    groups: list[Group], micro_batch: int, accum: int, bos: int, device: torch.device
) -> list[WeightedBatch]:
    """Make exactly `accum` micro-batches of all answers.

    Answers without advantage, whose groups are all right or all wrong, have no gradient: they
    are counted, not computed.
    """
    rows, uncounted = [], 0
    for group in groups:
        for reply, advantage in zip(group.replies, group.advantages()):
            if advantage:
                mask = [0] * len(group.prompt_ids) + reply.mask
                rows.append((group.prompt_ids + reply.ids, mask, advantage))
            else:
                uncounted += sum(reply.mask)
    rows.sort(key=lambda row: len(row[0]))  # equal lengths side by side waste less padding
    batches = []
    for i in range(accum):
        batches.append(make_batch(rows[i * micro_batch : (i + 1) * micro_batch], bos, device))
    assert len(rows) <= accum * micro_batch, (len(rows), accum, micro_batch)
    batches[0].num_targets += uncounted
    return batches


@dataclass
class Sampler:
    """Yields the micro-batches of step after step, sampled from the model as it is by then."""

    run: Run
    model: GPT
    engine: Engine
    problems: list[dict[str, Any]]
    micro: int  # rows of a micro-batch
    accum: int
    stats: dict[str, float] = field(default_factory=dict)  # of the last step

    def problems_of(self, step: int) -> list[int]:
        """Return the indices of a step's problems, shuffled anew each epoch by the seed."""
        settings, count = self.run.settings, len(self.problems)
        first = step * settings.problems_per_step
        positions = range(first, first + settings.problems_per_step)
        return [shuffled(position, count, settings.seed) for position in positions]

    def batches(self, start: int) -> Iterator[WeightedBatch]:
        """Yield `accum` micro-batches a step from step `start` on, without end."""
        settings = self.run.settings
        for step in itertools.count(start):
            began = time.perf_counter()
            self.engine.refresh(self.model)
            numbered = list(enumerate(self.problems_of(step)))
            mine = numbered[self.run.rank :: self.run.world_size]
            seeds = [sample_seed(settings.seed, step, place) for place, _ in mine]
            problems = [self.problems[index] for _, index in mine]
            groups = answer_problems(self.engine, problems, seeds, settings)
            self.stats = pass_rates(groups, self.run.device)
            self.stats["sampling_s"] = time.perf_counter() - began
            yield from group_batches(
                groups, self.micro, self.accum, self.engine.tokenizer.bos, self.run.device
            )  # fmt: skip


def pass_rates(groups: list[Group], device: torch.device) -> dict[str, float]:
    """Return pass@1, pass@k, the mean length of answers and the share cut off, over all ranks."""
    sums = torch.zeros(6, device=device)
    for g in groups:
        tokens = sum(len(reply.ids) for reply in g.replies)
        cut = sum(reply.reason == "length" for reply in g.replies)
        mine = [sum(g.rewards), len(g.rewards), any(g.rewards), 1, tokens, cut]
        sums += torch.tensor(mine, device=device)
    right, answers, solved, problems, tokens, cut = all_sum(sums).tolist()
    return {
        "pass_at_1": right / max(1, answers),
        "pass_at_k": solved / max(1, problems),
        "answer_tokens": tokens / max(1, answers),
        "cut_off": cut / max(1, answers),  # without reward, however right so far
    }


def validate(
    engine: Engine, problems: list[dict[str, Any]], settings: Settings, device: torch.device
) -> dict[str, float]:
    """Return pass@1 and pass@k on problems that rl keeps apart, always with the same seeds."""
    rank, world_size = dist_info()
    mine = list(enumerate(problems))[rank::world_size]
    seeds = [sample_seed(settings.seed, 1 << 32, i) for i, _ in mine]
    rates = pass_rates(answer_problems(engine, [p for _, p in mine], seeds, settings), device)
    return {"val_pass_at_1": rates["pass_at_1"], "val_pass_at_k": rates["pass_at_k"]}


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict:
    """Improve, or go on with, the rl model of a run; return the last metrics."""
    with start_run("rl", settings) as run:
        parent = find_checkpoint(settings.tag, settings.start_from)
        before = read_meta(parent)
        tokenizer = run_tokenizer(settings.tag)
        chats = settings.chats or before["chats"]
        newest, saved = newest_checkpoint(run, parent)
        start = saved.get("step", 0)
        path = data_dir(chats) / "rl.jsonl"
        config = GPTConfig(**before["config"])
        every, longest = list(read_conversations(path)), prompt_room(config.max_seq_len)
        data = [path.name, path.stat().st_size, crc32(path)]
        kept = min(settings.val_problems, rl_held(len(every)))
        val_problems, problems = (
            [p for p in part if len(render_prompt(tokenizer, p["messages"])) <= longest]
            for part in (every[:kept], every[kept:])
        )
        too_long = len(every) - len(val_problems) - len(problems)
        if not problems:
            raise MissingInput(
                f"{path} has no problems to train on, beside {too_long} that leave no room for an "
                f"answer in a context of {config.max_seq_len} tokens"
            )
        total = settings.epochs * len(problems)
        num_steps = settings.num_iterations or math.ceil(total / settings.problems_per_step)
        run.num_steps = num_steps
        check_data(run, saved, data=data)
        if run.finished():
            run.say(f"rl: {newest} is there, finished")
            return run.metrics
        why = "as set" if settings.num_iterations else f"{settings.epochs} epochs"
        run.say(f"problems: {len(problems):,}, and {len(val_problems)} for validation; "
                f"too long and left out: {too_long:,}")  # fmt: skip
        run.say(f"steps: {num_steps:,} ({why}) of {settings.problems_per_step} problems x "
                f"{settings.num_samples} answers")  # fmt: skip

        # what alters rounding is kept when a run goes on: bit for bit the unbroken run
        dtype = pick_dtype(run.device, settings.dtype or saved.get("dtype", ""))
        most = -(-settings.problems_per_step // run.world_size) * settings.num_samples
        rows = 32 if run.device.type == "cpu" else most
        micro = choose_micro_batch(run, config, saved, most, rows, dtype.itemsize)
        model, optimizer = continue_stage(run, parent, newest, False, dtype, settings.warm_start)
        copy = GPT.create(model.config, run.device, dtype)
        copy.load_state_dict(model.state_dict())
        engine = Engine(copy, tokenizer, settings.slots)
        engine.expect(num_steps * most * settings.max_tokens)

        def compute_loss(batch: WeightedBatch) -> Tensor:
            return model(batch.ids, batch.targets, batch.weights)

        if run.device.type == "cuda":
            filled = [0] * (config.max_seq_len + 1)
            micro = try_micro_batch(
                micro, compute_loss, optimizer,
                lambda n: make_batch([(filled, filled, 1.0)] * n, 0, run.device),
            )  # fmt: skip
        accum = -(-most // micro)
        sampler = Sampler(run, model, engine, problems, micro, accum)
        run.begin(saved)
        began = time.time()
        for s in training_steps(
            sampler.batches(start),
            compute_loss,
            optimizer,
            schedule(settings, num_steps),
            num_steps,
            accum=accum,
            micro=micro,
            start=start,
            stop=lambda: run.stopping,
        ):
            new, last = s.step > start, s.step == num_steps
            if new and (last or s.due(settings.log_every)):
                run.log(s.step, loss=s.loss, lr=s.lr, tok_per_s=s.tok_per_s, data=s.data,
                        **sampler.stats, left_s=s.left_s)  # fmt: skip
            if new and (last or s.stopping or s.due(settings.save_every)):  # before evaluating
                meta = {
                    "dtype": str(dtype)[6:], "micro_batch": s.micro, "parent": parent_key(parent),
                    "source": before["source"], "chats": chats, "data": data,
                    "metrics": run.metrics,
                    "seconds": saved.get("seconds", 0) + time.time() - began,
                }  # fmt: skip
                save_checkpoint(run, s.step, model, optimizer, meta, settings.keep)
            run.end_if_stopped(s)
            if val_problems and run.validates(s):
                engine.refresh(model)
                run.log(s.step, **validate(engine, val_problems, settings, run.device))
    return run.metrics


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
