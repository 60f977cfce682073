#!/usr/bin/env bash
# DeepSeek-V3.2 on 8 x H200.
# Not run here: no host with eight GPUs and these weights was at hand.
# Expect: no public figure for this backend; compare with the stock one on your own host:
#   nsa-plugin gsm8k --model-path MODEL --data-path test.jsonl --arms nsa_plugin,dsa -- --tp 8 --kv-cache-dtype fp8_e4m3
set -euo pipefail
model=deepseek-ai/DeepSeek-V3.2
if [[ "${1:--}" != -* ]]; then model="$1"; shift; fi

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000
  --attention-backend nsa_plugin
  --tp 8                          # 16 of 128 query heads per GPU: our kernels run 16, they are not padded to 64
  --kv-cache-dtype fp8_e4m3       # 656-byte latent rows instead of 1152: nearly twice the context
  --mem-fraction-static 0.85      # weights and cache; the rest is for activations and CUDA graphs
  --tool-call-parser deepseekv32 --reasoning-parser deepseek-v3
  --model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 8}'  # minutes less to load
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
