#!/usr/bin/env bash
# GLM-5.x-FP8 or DeepSeek-V3.2 on 8 x MI300X (gfx942): mi300x.sh MODEL.
# AMD: compile-checked, not run.
# Expect: no public figure. gfx942 has another fp8 (e4m3fnuz, largest value 240): cached bytes are not those of MI355X.
set -euo pipefail
if [[ "${1:--}" == -* ]]; then echo "usage: mi300x.sh MODEL [more server arguments]" >&2; exit 2; fi
model="$1"; shift

export SGLANG_ROCM_FUSED_DECODE_MLA=0            # stock MLA decode fusion, which does not know DSA's cache
export ROCM_QUICK_REDUCE_QUANTIZATION=INT4       # all-reduce of TP8 in four bits: bandwidth between GPUs is the limit
export SAFETENSORS_FAST_GPU=1                    # loads weights straight to the GPUs

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000 --trust-remote-code
  --attention-backend nsa_plugin
  --dsa-prefill-backend tilelang --dsa-decode-backend tilelang  # decides the pool's plain fp8 rows; attention is ours
  --tp 8
  --kv-cache-dtype fp8_e4m3
  --disable-radix-cache           # as in the public measurements on MI355X; drop it to reuse prefixes
  --mem-fraction-static 0.80      # 192 GB per GPU instead of 288: leave more for activations
  --model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 8}'
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
