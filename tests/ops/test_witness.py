"""The witness beside a call: it sees what differs, says where, and saves a call that can be replayed."""

from __future__ import annotations

import logging

import pytest
import torch

from nsa_backend_plugin import cli
from nsa_backend_plugin.ops import dispatch, topk, witness
from nsa_backend_plugin.ops.topk import reference


@pytest.fixture
def watching(monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_PLUGIN_WITNESS", "topk.select")
    monkeypatch.setenv("NSA_PLUGIN_WITNESS_DIR", str(tmp_path))
    monkeypatch.setattr(witness, "EVERY", 1)
    monkeypatch.setattr(witness, "ROWS", 16)
    monkeypatch.setattr(witness, "_files", iter(range(100)))
    dispatch.forget()
    yield tmp_path
    monkeypatch.undo()
    dispatch.forget()


def arguments(paged: bool) -> dict:
    rows, pages = 5, 4
    table = torch.randperm(2 * pages).int().view(2, pages)
    request = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32)
    return {
        "logits": torch.randn(rows, 60),
        "lengths": torch.tensor([3, 50, 9, 0, 32], dtype=torch.int32),
        "row_starts": torch.tensor([5, 0, 1, 2, 0], dtype=torch.int32),
        "k": 8,
        **({"page_table": table, "page_rows": request, "page_size": 16} if paged else {}),
    }


@pytest.mark.parametrize("paged", [False, True])
def test_a_right_call_passes_and_a_wrong_row_is_named_and_saved(watching, monkeypatch, caplog, capsys, paged):
    topk.select(**arguments(paged))
    assert "witness" not in caplog.text
    right = reference.select

    def wrong(call):
        out = right(call)
        if out.shape[0] == 5:  # as served; the witness asks for its rows in another call
            out[1, 2] = out[1, 3]
        return out

    monkeypatch.setattr(reference, "select", wrong)
    dispatch.forget()
    with caplog.at_level(logging.ERROR):
        topk.select(**arguments(paged))
    assert "topk.select by torch: row 1 of 5 differs from torch" not in caplog.text, "all rows are sampled: same call"
    monkeypatch.setattr(witness, "ROWS", 4)
    for _ in range(20):
        topk.select(**arguments(paged))
    assert "topk.select by torch: row 1 of 5 differs from torch" in caplog.text
    saved = sorted(watching.iterdir())
    assert saved
    monkeypatch.setattr(reference, "select", right)
    dispatch.forget()
    assert cli.main(["replay", str(saved[0]), "--impl", "torch", "triton"]) == 0
    printed = capsys.readouterr().out
    assert "triton: agrees" in printed


def test_replay_says_what_differs(watching, monkeypatch, tmp_path, capsys):
    call = topk.select.call(**arguments(False))
    path = tmp_path / "call.pt"
    witness.save(path, "topk.select", "triton", call)
    monkeypatch.setattr("nsa_backend_plugin.ops.topk.triton.select", lambda call: call.out.fill_(0))
    dispatch.forget()
    assert cli.main(["replay", str(path)]) == 1
    assert "triton: differs, row" in capsys.readouterr().out
    assert cli.main(["replay", str(tmp_path / "nothing.pt")]) == 1
    assert "nothing.pt: expected a call that the witness saved" in capsys.readouterr().out
    saved = torch.load(path, weights_only=True)
    saved["arguments"]["since"] = 1  # another version's
    torch.save(saved, path)
    assert cli.main(["replay", str(path)]) == 1
    assert "call.pt: expected a call that the witness saved (TypeError" in capsys.readouterr().out


def test_files_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_PLUGIN_WITNESS_DIR", str(tmp_path))
    monkeypatch.setattr(witness, "_files", iter(range(100)))
    seen = witness.Witness("topk.select", reference.select)
    paths = [seen._save("triton", topk.select.call(**arguments(False))) for _ in range(witness.MOST_FILES + 3)]
    assert len(list(tmp_path.iterdir())) == witness.MOST_FILES
    assert paths[-1] is None


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("NSA_PLUGIN_WITNESS", "topk.selct")
    with pytest.raises(ValueError, match=r"NSA_PLUGIN_WITNESS='topk\.selct': expected some of"):
        dispatch.validate_forced()


def test_row_distance():
    rows = torch.randn(4, 3, 5)
    assert witness.row_distance(rows, rows).max() < 1e-12
    lost = rows.clone()
    lost[2] = 0
    assert witness.row_distance(lost, rows).argmax() == 2
    assert witness.row_distance(lost, rows)[2] == 1
    rows[1, 0, 0] = float("-inf")
    assert witness.row_distance(rows, rows).max() < 1e-12
    other = rows.clone()
    other[1, 0, 0] = float("nan")
    assert witness.row_distance(other, rows)[1] == 2
