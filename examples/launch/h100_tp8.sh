#!/usr/bin/env bash
# A DSA model that fits 8 x H100 (640 GB) at tensor parallelism 8: h100_tp8.sh MODEL.
# GLM-5.x-FP8 and DeepSeek-V3.2 (about 700 GB of weights) do not fit: take H200, or two nodes with --tp 16 --nnodes 2.
# Not run here: no host with eight GPUs and such weights was at hand.
# Expect: GSM8K 0.972 to 0.976 for GLM-5.3-Flash (public figures for H100, quoted, not repeated here).
set -euo pipefail
if [[ "${1:--}" == -* ]]; then echo "usage: h100_tp8.sh MODEL [more server arguments]" >&2; exit 2; fi
model="$1"; shift

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000
  --attention-backend nsa_plugin
  --tp 8                          # few query heads per GPU: our kernels run the real count, not one padded to 64
  --kv-cache-dtype fp8_e4m3       # 80 GB per GPU: the packed cache matters more than on H200
  --mem-fraction-static 0.85
  --cuda-graph-max-bs-decode 64   # each captured batch size takes memory; larger batches run without a graph
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
