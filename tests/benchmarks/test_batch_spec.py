"""The batch-spec grammar."""

from __future__ import annotations

import pytest

from benchmarks.batch_spec import BatchRequest, expand_batch_specs, format_batch_spec, get_batch_stats, parse_batch_spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("q2k", [(2048, 2048)]),
        ("q1s1k", [(1, 1024)]),
        ("8q1s1k", [(1, 1024)] * 8),
        ("q4s1k", [(4, 1024)]),
        ("q4ks8k", [(4096, 8192)]),
        ("q1s100", [(1, 100)]),
        ("2q2k_32q1s1k", [(2048, 2048)] * 2 + [(1, 1024)] * 32),
        ("q1", [(1, 1)]),
    ],
)
def test_parse(spec: str, expected: list[tuple[int, int]]) -> None:
    assert [r.as_tuple() for r in parse_batch_spec(spec)] == expected


@pytest.mark.parametrize(
    ("spec", "segment", "reason"),
    [
        ("", "''", "expected"),
        ("8q1s1k_", "''", "expected"),
        ("8q1s1k_bad", "'bad'", "expected"),
        ("q", "'q'", "expected"),
        ("q1s", "'q1s'", "expected"),
        ("q1s1m", "'q1s1m'", "expected"),
        ("-1q1s1", "'-1q1s1'", "expected"),
        ("Q1s1", "'Q1s1'", "expected"),
        ("q1 s1", "'q1 s1'", "expected"),
        ("0q1s1k", "'0q1s1k'", "count is 0"),
        ("q0s1k", "'q0s1k'", "q_len is 0"),
        ("q1_q2ks1k", "'q2ks1k'", "seq_len 1024 is less than q_len 2048"),
        ("q1s0", "'q1s0'", "seq_len 0 is less"),
    ],
)
def test_errors_name_the_segment(spec: str, segment: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_batch_spec(spec)
    assert f"segment {segment}" in str(caught.value)
    assert reason in str(caught.value)


def test_not_a_string() -> None:
    with pytest.raises(ValueError, match="spec=3"):
        parse_batch_spec(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (BatchRequest(1, 1024), "decode"),
        (BatchRequest(4, 1024), "extend"),
        (BatchRequest(1024, 1024), "prefill"),
        (BatchRequest(1, 1), "prefill"),
    ],
)
def test_every_request_is_exactly_one_kind(request_: BatchRequest, kind: str) -> None:
    kinds = {"decode": request_.is_decode, "extend": request_.is_extend, "prefill": request_.is_prefill}
    assert [k for k, is_it in kinds.items() if is_it] == [kind]
    assert request_.context_len == request_.kv_len - request_.q_len


def test_format() -> None:
    words = format_batch_spec(parse_batch_spec("2q2k_q4s1k_32q1s1k"))
    assert words == "2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)"
    assert format_batch_spec(parse_batch_spec("q1s1k_2q1s100")) == "3 decode (1x1k, 2x100)"


def test_stats() -> None:
    stats = get_batch_stats(parse_batch_spec("2q2k_q4s1k_32q1s1k"))
    assert stats == {
        "total_requests": 35,
        "num_decode": 32,
        "num_prefill": 2,
        "num_extend": 1,
        "total_tokens": 2 * 2048 + 4 + 32,
        "total_kv_cache": 2 * 2048 + 33 * 1024,
        "max_q_len": 2048,
        "max_kv_len": 2048,
        "avg_q_len": (2 * 2048 + 4 + 32) / 35,
        "avg_kv_len": (2 * 2048 + 33 * 1024) / 35,
    }
    with pytest.raises(ValueError, match="requests"):
        get_batch_stats([])


def test_ranges_are_cartesian() -> None:
    entry = {
        "template": "q{q_len}s{kv_len}k",
        "q_len": {"start": 1, "stop": 5, "step": 2},
        "kv_len": {"start": 1, "stop": 3, "end_inclusive": False},
    }
    assert expand_batch_specs([entry, "8q1s1k"]) == [
        "q1s1k",
        "q1s2k",
        "q3s1k",
        "q3s2k",
        "q5s1k",
        "q5s2k",
        "8q1s1k",
    ]
    assert expand_batch_specs([{"template": "{n}q1s{s}", "n": [2, 4], "s": 7}]) == ["2q1s7", "4q1s7"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"q_len": 1}, "template"),
        ({"template": "q{q_len}"}, "q_len"),
        ({"template": "q{q_len}", "q_len": 1, "other": 2}, "other"),
        ({"template": "q{q_len}", "q_len": {"start": 1}}, "q_len"),
        ({"template": "q{q_len}", "q_len": {"start": 1, "stop": 2, "step": 0}}, "step"),
        ({"template": "q{q_len}", "q_len": {"start": 1.5, "stop": 2}}, "q_len.start=1.5"),
        ({"template": "q{q_len}", "q_len": [1, "two"]}, "q_len='two'"),
        ({"template": "q{q_len}", "q_len": {"start": 3, "stop": 2}}, "empty"),
        ({"template": "q{q_len}s1", "q_len": [1, 2]}, "segment 'q2s1'"),
    ],
)
def test_bad_ranges(entry: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expand_batch_specs([entry])
