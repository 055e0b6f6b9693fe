#!/usr/bin/env bash
# torch 2.15.0: with one seed, the normal numbers of a smaller tensor are not the first ones of a larger, on a CPU.
# Documented: a seed makes results repeat. numpy's generators and torch.rand give a stream: n numbers are the first n of
# any longer draw. Expected of torch.randn, too.
# Seen (Linux x86-64, 2026-12-01): under 16 numbers none agree with those of a longer tensor; from 16 on the last 16 of
# each tensor whose size is no multiple of 16 are drawn anew, at its end. And a transposed view is filled in another
# way: none of its numbers are those of a contiguous tensor of its shape.
# So two models that differ by one row of a table, or in the memory order of a weight, begin from other numbers: for a
# comparison of seeds draw at a common size and cut, or have a generator of its own for each weight.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --target="$work" 'torch==2.15.0' 'numpy==2.4.6' || exit 2
cat > "$work/try.py" <<'PY'
import numpy as np
import torch


def seeded(draw):
    torch.manual_seed(0)
    return draw()


long = {name: seeded(lambda: getattr(torch, name)(48)) for name in ("rand", "randn")}
whole = np.random.default_rng(0).standard_normal(48)
for n in (15, 16, 20, 32, 33):
    same = {name: int((seeded(lambda: getattr(torch, name)(n)) == long[name][:n]).sum())
            for name in ("rand", "randn")}
    numpy_same = int((np.random.default_rng(0).standard_normal(n) == whole[:n]).sum())
    print(f"{n}: rand {same['rand']}, numpy {numpy_same}, randn {same['randn']}")
plain = seeded(lambda: torch.empty(16, 4).normal_())
transposed = seeded(lambda: torch.empty(4, 16).t().normal_())
print("transposed:", int((plain == transposed).sum()), "of", plain.numel())
PY
seen=$(PYTHONPATH=$work python3 "$work/try.py" 2> /dev/null) || exit 2
expected='15: rand 15, numpy 15, randn 0
16: rand 16, numpy 16, randn 16
20: rand 20, numpy 20, randn 4
32: rand 32, numpy 32, randn 32
33: rand 33, numpy 33, randn 17
transposed: 0 of 64'
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "it differs now"; exit 1; }
