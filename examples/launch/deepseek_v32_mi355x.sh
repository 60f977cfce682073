#!/usr/bin/env bash
# DeepSeek-V3.2 on 8 x MI355X (gfx950), with the flags and environment of sglang pull request 23562.
# AMD: compile-checked, not run.
# Expect: no public figure with these flags. Compare arms on your host: nsa-plugin gsm8k --arms nsa_plugin,dsa -- --tp 8
set -euo pipefail
model=deepseek-ai/DeepSeek-V3.2
if [[ "${1:--}" != -* ]]; then model="$1"; shift; fi

export SGLANG_ROCM_FUSED_DECODE_MLA=0            # stock MLA decode fusion, which does not know DSA's cache
export ROCM_QUICK_REDUCE_QUANTIZATION=INT4       # all-reduce of TP8 in four bits: bandwidth between GPUs is the limit
export SAFETENSORS_FAST_GPU=1                    # loads weights straight to the GPUs

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000 --trust-remote-code
  --attention-backend nsa_plugin
  --dsa-prefill-backend tilelang --dsa-decode-backend tilelang  # decides the pool's plain fp8 rows; attention is ours
  --tp 8
  --kv-cache-dtype fp8_e4m3
  --disable-radix-cache           # as in the public measurement, so that figures compare; drop it to reuse prefixes
  --mem-fraction-static 0.85
  --tool-call-parser deepseekv32 --reasoning-parser deepseek-v3
  --model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 8}'
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
