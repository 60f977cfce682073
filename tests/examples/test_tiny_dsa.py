"""The tiny DSA model: its training code, its export and its evaluation, on a CPU."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_dsa"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402
import evaluate  # noqa: E402
import export  # noqa: E402
import model as tiny  # noqa: E402
import muon  # noqa: E402
import overlap  # noqa: E402
import train  # noqa: E402
from config import RECIPES, Mode, ModelConfig, Phase  # noqa: E402
from tokenizer import Encoder  # noqa: E402

SMALL = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=16,
    intermediate_size=32,
    index_n_heads=16,
    index_topk=8,
    max_position_embeddings=128,
)


def small_model(seed: int, config: ModelConfig = SMALL) -> tiny.TinyDSA:
    torch.manual_seed(seed)
    return tiny.TinyDSA(config)


# Model


def naive_attention(layer: tiny.Attention, x: torch.Tensor, topk: int) -> torch.Tensor:
    """Sparse MLA of one sequence, position by position in fp64. x [T, hidden]."""
    c, weights = layer.config, {name: p.double() for name, p in layer.named_parameters()}

    def norm(v, name):
        return v / (v.square().mean() + c.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def rotate(v, position, neighbours):
        v, out, half = v.clone(), v.clone(), c.qk_rope_head_dim // 2
        for i in range(half):
            angle = position * c.rope_theta ** (-i / half)
            one, two = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
            out[one] = v[one] * math.cos(angle) - v[two] * math.sin(angle)
            out[two] = v[two] * math.cos(angle) + v[one] * math.sin(angle)
        return out

    queries, keys, index_keys, index_queries, gates = [], [], [], [], []
    for position, hidden in enumerate(x.double()):
        q_latent = norm(weights["q_a_proj.weight"] @ hidden, "q_a_layernorm")
        query = (weights["q_b_proj.weight"] @ q_latent).view(c.num_heads, c.qk_head_dim)
        compressed = weights["kv_a_proj_with_mqa.weight"] @ hidden
        kv = weights["kv_b_proj.weight"] @ norm(compressed[: c.kv_lora_rank], "kv_a_layernorm")
        kv = kv.view(c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        k_rope = rotate(compressed[c.kv_lora_rank :], position, True)
        for head in query:
            head[c.qk_nope_head_dim :] = rotate(head[c.qk_nope_head_dim :], position, True)
        queries.append(query)
        keys.append((kv, k_rope))
        index_query = (weights["indexer.wq_b.weight"] @ q_latent).view(c.index_n_heads, c.index_head_dim)
        index_key = weights["indexer.wk.weight"] @ hidden
        index_key = (index_key - index_key.mean()) / (index_key.var(correction=0) + 1e-6).sqrt()
        index_key = index_key * weights["indexer.k_norm.weight"] + weights["indexer.k_norm.bias"]
        for vector in (*index_query, index_key):
            vector[: c.qk_rope_head_dim] = rotate(vector[: c.qk_rope_head_dim], position, False)
        index_queries.append(index_query)
        index_keys.append(index_key)
        gates.append(weights["indexer.weights_proj.weight"] @ hidden)
    rows = []
    for t in range(len(x)):
        scores = [float(gates[t] @ (index_queries[t] @ index_keys[s]).relu()) for s in range(t + 1)]
        chosen = sorted(range(t + 1), key=lambda s: -scores[s])[:topk]
        heads = []
        for h in range(c.num_heads):
            full = [torch.cat([keys[s][0][h, : c.qk_nope_head_dim], keys[s][1]]) for s in chosen]
            probs = torch.stack([queries[t][h] @ key * c.qk_head_dim**-0.5 for key in full]).softmax(0)
            heads.append(sum(p * keys[s][0][h, c.qk_nope_head_dim :] for p, s in zip(probs, chosen, strict=True)))
        rows.append(weights["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("mode,topk", [(Mode.DENSE, 99), (Mode.WARMUP, 99), (Mode.SPARSE, 8)])
def test_attention_equals_naive_reference(seed, mode, topk, monkeypatch):
    monkeypatch.setattr(tiny, "ROWS", 7)
    layer = small_model(seed).model.layers[0].self_attn
    torch.nn.init.normal_(layer.indexer.k_norm.bias)
    torch.nn.init.normal_(layer.q_a_layernorm.weight)
    x = torch.randn(24, SMALL.hidden_size)
    cos, sin = tiny.rope_table(24, SMALL.qk_rope_head_dim, SMALL.rope_theta, x.device)
    with torch.no_grad():
        out, _ = layer(x[None], cos, sin, mode)
        expected = naive_attention(layer, x, topk)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-5, rtol=2e-4)


def test_sparse_is_dense_while_topk_covers_everything(seed):
    net = small_model(seed, replace(SMALL, index_topk=20))
    ids = torch.randint(512, (2, 40))
    with torch.no_grad():
        dense, sparse, window = (net(ids, mode).logits for mode in (Mode.DENSE, Mode.SPARSE, Mode.WINDOW))
    for other in (sparse, window):
        torch.testing.assert_close(other[:, :20], dense[:, :20], atol=1e-4, rtol=1e-4)
        assert (other[:, 20:] - dense[:, 20:]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [Mode.WARMUP, Mode.SPARSE])
def test_losses_reach_only_their_own_parameters(seed, mode, monkeypatch):
    """The KL trains the indexer alone; the language-model loss trains everything else."""
    monkeypatch.setattr(tiny, "ROWS", 16)
    net = small_model(seed)
    ids = torch.randint(512, (2, 40))
    for from_kl in (True, False):
        net.zero_grad(set_to_none=True)
        logits, kl = net(ids, mode)
        (kl if from_kl else logits.square().mean()).backward()
        for name, parameter in net.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached == (from_kl == ("indexer" in name)), name


def test_index_kl_is_the_divergence(seed, monkeypatch):
    """KL against probabilities formed in one piece, and zero when the indexer agrees with the attention."""
    monkeypatch.setattr(tiny, "ROWS", 5)
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 1, 12, width) for width in (16, 16, 4))
    index = tiny.IndexInputs(torch.randn(1, 12, 3, 8), torch.randn(1, 12, 8), torch.randn(1, 12, 3))
    causal = torch.ones(12, 12).tril().bool()
    _, kl = tiny.indexed_attention(query, key, value, index, Mode.WARMUP, 4)
    probs = (query[0, 0] @ key[0, 0].T).masked_fill(~causal, -math.inf).softmax(-1)
    per_head = torch.einsum("thd,sd->ths", index.query[0], index.key[0]).relu()
    log_index = torch.einsum("th,ths->ts", index.weight[0], per_head).masked_fill(~causal, -math.inf).log_softmax(-1)
    rows = [(p[: t + 1] * (p[: t + 1].log() - log_index[t, : t + 1])).sum() for t, p in enumerate(probs)]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-4)
    # Logits that are relu'd scores of one head with weight 1 on both sides give no divergence.
    same = torch.rand(1, 12, 16)
    agreeing = tiny.IndexInputs(same[:, :, None], same, torch.ones(1, 12, 1))
    _, zero = tiny.indexed_attention(same[:, None], same[:, None], value, agreeing, Mode.SPARSE, 4)
    assert abs(float(zero)) < 1e-5


def test_previous_token_heads_look_back(seed):
    config = replace(RECIPES["tiny-dsa-2k"].model, num_layers=1)
    net = small_model(seed, config)
    net.start_as_previous_token_heads()
    seen = {}
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        scores = query @ key.transpose(-1, -2) * config.qk_head_dim**-0.5
        seen["target"] = scores.masked_fill(~torch.ones(200, 200).tril().bool(), -math.inf).argmax(-1)
        return plain(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tiny.F, "scaled_dot_product_attention", spy)
        net(torch.randint(512, (1, 200)), Mode.DENSE)
    back = torch.arange(20, 200) - seen["target"][0, :, 20:]
    for head in range(config.num_heads):
        assert (back[head] == head + 1).float().mean() > 0.9


def test_muon_orthogonalizes(seed):
    torch.manual_seed(seed)
    for shape in ((2, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(muon.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


# Training


def arguments(out: Path) -> argparse.Namespace:
    return argparse.Namespace(seed=0, workers=0, smoke=False, smoke_steps=0, report=1000, out=out, mantissa_bits=7)


@pytest.mark.timeout(600)
def test_training_lowers_both_losses(tmp_path):
    config = replace(SMALL, index_topk=24, max_position_embeddings=4096)
    net = small_model(0, config)
    net.start_as_previous_token_heads()
    before = net.model.layers[0].self_attn.indexer.wk.weight.clone()
    common = {"batch": 8, "length": 64, "share": 1.0}
    dense = Phase("dense", Mode.DENSE, steps=40, main_lr=1e-2, **common)
    warmup = Phase("warmup", Mode.WARMUP, steps=40, index_lr=5e-3, **common)
    ids, answer = (t.long() for t in train.Batches(dense, 1, seed=9)[0])

    def losses(mode):
        with torch.no_grad():
            logits, kl = net(ids[:, :-1], mode)
            return float(train.answer_loss(logits, ids, answer)[0]), float(kl)

    with open(tmp_path / "log", "w") as file:
        log = train.Log(file)
        start = losses(Mode.DENSE)[0]
        train.run_phase(net, dense, arguments(tmp_path), torch.device("cpu"), log, seconds=math.inf)
        assert losses(Mode.DENSE)[0] < 0.7 * start
        assert torch.equal(before, net.model.layers[0].self_attn.indexer.wk.weight)
        answer_loss, kl = losses(Mode.WARMUP)
        train.run_phase(net, warmup, arguments(tmp_path), torch.device("cpu"), log, seconds=math.inf)
        assert losses(Mode.WARMUP)[1] < 0.7 * kl
        assert losses(Mode.WARMUP)[0] == answer_loss, "the warm-up trains the indexer only"
    assert "ended after 40 of 40 steps" in (tmp_path / "log").read_text()


def test_a_phase_stops_on_time(tmp_path):
    phase = Phase("endless", Mode.DENSE, 2, 32, steps=10**6, share=1.0, main_lr=1e-3)
    with open(tmp_path / "log", "w") as file:
        train.run_phase(small_model(0), phase, arguments(tmp_path), torch.device("cpu"), train.Log(file), seconds=0.5)
    assert re.search(r"ended after \d+ of 1000000 steps", (tmp_path / "log").read_text())


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_rounding_keeps_the_leading_bits(seed, bits):
    torch.manual_seed(seed)
    values = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-6, 6, (5000,)), torch.zeros(3), torch.ones(3)])
    rounded = train.round_mantissa(values, bits)
    assert ((rounded - values).abs() <= values.abs() * 2.0 ** -(bits + 1)).all()
    assert torch.equal(rounded.bfloat16().float(), rounded)
    mantissas = torch.frexp(rounded).mantissa.abs() * 2 ** (bits + 1)
    assert torch.equal(mantissas, mantissas.round())
    assert len(mantissas.unique()) == 2**bits + 1  # zero among them


def test_block_diagonal_kv_b_stays_so(tmp_path):
    """Training leaves the zeros zero, every head reads its own slice of the latent, and all slices are read."""
    net = small_model(0, replace(SMALL, kv_b_block_diagonal=True))
    weight = net.model.layers[1].self_attn.kv_b_proj.weight
    before = weight.detach().clone()
    phase = Phase("dense", Mode.DENSE, 2, 32, steps=3, share=1.0, main_lr=1e-2)
    with open(tmp_path / "log", "w") as file:
        train.run_phase(net, phase, arguments(tmp_path), torch.device("cpu"), train.Log(file), seconds=math.inf)
    assert not torch.equal(weight, before)
    blocks = weight.detach().unflatten(0, (SMALL.num_heads, -1)).unflatten(-1, (SMALL.num_heads, -1))
    for head in range(SMALL.num_heads):
        for part in range(SMALL.num_heads):
            assert bool((blocks[head, :, part] != 0).all()) == (head == part)
            assert bool((blocks[head, :, part] == 0).all()) == (head != part)


# Export


@pytest.mark.parametrize("arch", ["deepseek", "glm"])
def test_export_gives_the_same_logits_in_transformers(seed, arch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

    net = small_model(seed)
    for layer in net.model.layers:
        torch.nn.init.normal_(layer.self_attn.indexer.k_norm.bias)
    train.save(net, tmp_path / "model.pt", mantissa_bits=7)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    net.load_state_dict(state)
    folder = tmp_path / "hf"
    config = export.model_config_json(SMALL)
    export.write_folder(folder, state, config, arch=arch, name="small", prompt_tokens=(1, 2))
    if arch == "glm" and "indexer_rope_interleave" not in Path(modeling_glm_moe_dsa.__file__).read_text():
        # This transformers ignores the flag and always splits GLM's indexer in halves, so give it that order.
        from safetensors.torch import load_file, save_file

        permuted = load_file(folder / "model.safetensors")
        assert any(not torch.equal(permuted[name], state[name]) for name in state)
        half_split = {name: state[name] if "indexer" in name else permuted[name] for name in permuted}
        save_file(half_split, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(loaded).__name__ == export.ARCHITECTURES[arch]["architectures"][0]
    assert not any(info.values())
    ids = torch.randint(512, (2, 60))
    with torch.no_grad():
        expected, dense = net(ids, Mode.SPARSE).logits, net(ids, Mode.DENSE).logits
        actual = loaded(ids).logits
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)
    assert (expected - dense).abs().max() > 1e-2, "top-k 8 of 60 must matter, or this compares nothing"
    text = "Question: Tom has 5 apples.\nAnswer:"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == Encoder()(text)


def test_interleaved_indexer_scores_the_same(seed):
    """GLM's weights under interleaved RoPE give DeepSeek's index scores."""
    net = small_model(seed)
    indexer = net.model.layers[0].self_attn.indexer
    permuted = small_model(seed)
    permuted.load_state_dict(export.interleave_indexer_rope(net.state_dict(), 64, 128))
    x, latent = torch.randn(1, 30, SMALL.hidden_size), torch.randn(1, 30, SMALL.q_lora_rank)
    cos, sin = tiny.rope_table(30, 64, SMALL.rope_theta, x.device)
    with torch.no_grad():
        expected = tiny.index_scores(*swap(indexer(x, latent, cos, sin)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "rope_half_split", tiny.rope_interleaved)
            actual = tiny.index_scores(*swap(permuted.model.layers[0].self_attn.indexer(x, latent, cos, sin)))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def swap(index: tiny.IndexInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return index.query, index.key, index.weight


def test_export_refuses(tmp_path):
    weights, config = {"lm_head.weight": torch.zeros(4_700_000)}, export.model_config_json(SMALL)
    with pytest.raises(ValueError, match="9400000"):
        export.write_folder(tmp_path, weights, config, arch="deepseek", name="x", prompt_tokens=(1, 2))
    with pytest.raises(ValueError, match="arch"):
        export.write_folder(tmp_path, {}, config, arch="llama", name="x", prompt_tokens=(1, 2))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_fit_and_ship_with_their_log(name, tmp_path):
    recipe = RECIPES[name]
    state = tiny.TinyDSA(recipe.model).state_dict()
    log = tmp_path / "train.log"
    log.write_text("[   1.0s] x\n[   2.0s] held-out exact answers, 1\n[   3.0s] a  b\n[   4.0s] done\n")
    export.write_folder(
        tmp_path / "out",
        state,
        export.model_config_json(recipe.model),
        arch="deepseek",
        name=name,
        prompt_tokens=recipe.prompt_tokens,
        log=log,
    )
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= export.MAX_BYTES
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```\nheld-out exact answers, 1\na  b\n```" in card
    assert "not a GSM8K model" in card
    assert recipe.prompt_tokens[1] + 100 < recipe.model.max_position_embeddings
    assert sum(phase.share for phase in recipe.phases) <= 0.96, "the final evaluation needs time too"
    weights, config = export.read_folder(tmp_path / "out")
    assert set(weights) == set(state)
    export.write_folder(tmp_path / "g", weights, config, arch="glm", name="g", prompt_tokens=(1, 2))
    with pytest.raises(ValueError, match="model_type"):
        export.read_folder(tmp_path / "g")


def test_shipped_checkpoints_follow_their_recipes():
    """Shapes, rounding and config of the recipe that the log names; compressed they leave room below 15 MB."""
    compressed = 0
    for name, recipe in RECIPES.items():
        folder = EXAMPLE.parent / "models" / name
        weights, config = export.read_folder(folder)
        tiny.TinyDSA(recipe.model).load_state_dict(weights)
        assert config == export.model_config_json(recipe.model)
        for tensor in weights.values():
            if tensor.dim() == 2:
                assert torch.equal(train.round_mantissa(tensor, recipe.mantissa_bits), tensor.float())
        log = (folder / "train.log").read_text()
        assert f"{name}: " in log.splitlines()[0]
        assert export.result_table(folder / "train.log") in (folder / "README.md").read_text()
        compressed += len(zlib.compress((folder / "model.safetensors").read_bytes()))
    assert compressed < 9_000_000


# Evaluation


def test_scoring_takes_the_last_number_before_the_next_question():
    problem = data.Problem("find", "q", "5+3=<<5+3=8>>8.\n#### 8")
    assert evaluate.is_right(problem, " so 8.\n#### 8\n\nQuestion: Tom has 9")
    assert not evaluate.is_right(problem, " so 8.\n#### 9")
    assert not evaluate.is_right(problem, " no idea")


@pytest.mark.parametrize("api", ["completions", "generate"])
def test_server_generate(api):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "m"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            self.reply({"text": "out"} if self.path == "/generate" else {"choices": [{"text": "out"}]})

        def reply(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        generate = evaluate.server_generate(f"http://127.0.0.1:{server.server_port}/v1", api)
        assert generate("hello") == "out"
    finally:
        server.shutdown()
        server.server_close()
    path, body = seen[0]
    if api == "completions":
        assert path == "/v1/completions"
        assert (body["prompt"], body["temperature"], body["model"]) == ("hello", 0, "m")
    else:
        assert path == "/generate"
        assert (body["text"], body["sampling_params"]["temperature"]) == ("hello", 0)


# What adjacent queries share


def test_selections_are_those_of_the_model():
    """Of the queries that select at all: as many rows as top-k has, none of a later token, and the unions of groups."""
    network = small_model(1)
    ids = torch.randint(512, (1, 29))
    layers = overlap.selections(network, ids)
    assert len(layers) == SMALL.num_layers
    for chosen in layers:
        assert chosen.shape == (21, 29)
        assert (chosen.sum(1) == 8).all()
        assert not chosen.triu(9).any()
        pairs = [int((chosen[i] | chosen[i + 1]).sum()) for i in range(0, 20, 2)]
        assert overlap.union_share(chosen, 2) == pytest.approx(sum(pairs) / 80)
