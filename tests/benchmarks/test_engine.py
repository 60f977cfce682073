"""The engine measurements without a GPU: model folders, the server's log lines, the table."""

from __future__ import annotations

import json
from pathlib import Path

import engine_h200
import pytest
from engine_model import FAMILIES, config, write_model


@pytest.mark.parametrize("family", FAMILIES)
def test_model_folder_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path / family, family, heads=16, layers=3)
    read = transformers.AutoConfig.from_pretrained(folder)
    assert (read.num_hidden_layers, read.num_attention_heads, read.kv_lora_rank) == (3, 16, 512)
    assert hasattr(read, "index_topk") == (family != "v3")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.encode("t17 t40") == [17, 40]


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="family='v4': expected one of v32, glm, v3"):
        config("v4", 16, 4)


class Log:
    """A server that logs two decode intervals for every batch of requests."""

    def __init__(self, path: Path):
        self.log_path = path
        path.write_text("#running-req: 2, x, gen throughput (token/s): 9999.0\n")

    def post(self, path: str, body: dict, timeout: float) -> None:
        assert len(body["input_ids"]) == 5
        with self.log_path.open("a") as file:
            for running, rate in ((1, 5000), (2, 100.0), (2, 250.0)):
                file.write(f"Decode batch, #running-req: {running}, #token: 1, gen throughput (token/s): {rate}, x\n")


def test_step_comes_from_lines_of_this_batch_only(tmp_path: Path) -> None:
    options = engine_h200.argparse.Namespace(context=5, tokens=4)
    row = engine_h200._decode_step(Log(tmp_path / "log"), "dsa", 2, options)
    assert row["tokens_per_second"] == 250.0
    assert row["step_us"] == 8000.0
    assert row["log_lines"] == 4


def test_table_gives_stock_over_plugin(capsys: pytest.CaptureFixture) -> None:
    rows = [{"arm": a, "batch": 64, "step_us": us} for a, us in (("nsa_plugin", 1000.0), ("dsa", 1300.0))]
    engine_h200._print_served([*rows, {"arm": "dsa", "batch": 1, "step_us": None}])
    out = capsys.readouterr().out
    assert "1.30" in out


def test_results_carry_environment_and_options(tmp_path: Path) -> None:
    options = engine_h200.argparse.Namespace(out=tmp_path, family="v32", kv="auto", heads=16, batches=[1])
    engine_h200._write(options, "served", {"rows": []})
    body = json.loads((tmp_path / "served-v32-auto-h16-h200.json").read_text())
    assert body["options"] == {"family": "v32", "kv": "auto", "heads": 16, "batches": [1]}
    assert {"device", "libraries", "date", "command"} <= set(body["environment"])
