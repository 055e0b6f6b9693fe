#!/usr/bin/env bash
# torch 2.15.0: on a CPU the gradient of an embedding in bf16 stops growing at 256 uses of a token.
# Documented: nothing on how the gradient is summed; sum, index_add and an expanded tensor's gradient sum in fp32.
# Expected: 4,096 uses of one row, each with gradient 1, give 4,096, which bf16 can hold.
# Seen (Linux x86-64, 2026-12-01): nn.Embedding and weight[ids] give 256 in bf16 and 2,048 in fp16, where one more added
# rounds back to the same number; index_select of the same rows gives 4,096. So does an embedding that stays in fp32
# with its output cast. A batch of half a million tokens has a comma far more than 256 times.
# Avoided in: common.py, GPT.trunk, which looks tables up in fp32 and casts what it found.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --target="$work" 'torch==2.15.0' 'numpy==2.4.6' || exit 2
cat > "$work/try.py" <<'PY'
import torch
import torch.nn.functional as F

ids = torch.zeros(4096, dtype=torch.long)
for dtype in (torch.bfloat16, torch.float16):
    for name, look_up in {
        "embedding": lambda weight: F.embedding(ids, weight),
        "weight[ids]": lambda weight: weight[ids],
        "index_select": lambda weight: weight.index_select(0, ids),
    }.items():
        weight = torch.ones(2, 4, dtype=dtype, requires_grad=True)
        look_up(weight).sum().backward()
        print(str(dtype)[6:], name, int(weight.grad[0, 0]))
weight = torch.ones(2, 4, requires_grad=True)
F.embedding(ids, weight).bfloat16().sum().backward()
print("float32, output cast", int(weight.grad[0, 0]))
PY
seen=$(PYTHONPATH=$work python3 "$work/try.py" 2> /dev/null) || exit 2
expected='bfloat16 embedding 256
bfloat16 weight[ids] 256
bfloat16 index_select 4096
float16 embedding 2048
float16 weight[ids] 2048
float16 index_select 4096
float32, output cast 4096'
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "it differs now"; exit 1; }
