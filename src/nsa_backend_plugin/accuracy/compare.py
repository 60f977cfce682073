"""What two runs over the same questions say about each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy.stats import binomtest

from nsa_backend_plugin.accuracy.ask import Answer
from nsa_backend_plugin.accuracy.sgl_eval import ChatAnswer

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with a Wilson interval."""

    right: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.total


@dataclass(frozen=True)
class Paired:
    """Paired comparison of run `b` with run `a`.

    only_a, only_b: questions that only one of them got right. p_value: exact McNemar test of only_a against only_b.
    agreement: share of equal predictions.
    """

    only_a: int
    only_b: int
    p_value: float
    agreement: float

    @property
    def differs(self) -> bool:
        """Whether accuracy differs by more than chance."""
        return self.p_value < 1 - CONFIDENCE


@dataclass(frozen=True)
class Comparison(Paired):
    """Of completions. same_text: share of equal texts. logprob_difference: mean |logprob a - logprob b| over the tokens
    before the first one that differs; None when there are none.
    """

    same_text: float
    logprob_difference: float | None


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """Raises ValueError when there is no answer."""
    if not correct:
        raise ValueError("no answers: expected at least one")
    interval = binomtest(sum(correct), len(correct)).proportion_ci(CONFIDENCE, method="wilson")
    return Accuracy(sum(correct), len(correct), float(interval.low), float(interval.high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value: with no real difference each discordant pair falls either way with probability 1/2."""
    discordant = only_a + only_b
    return 1.0 if discordant == 0 else float(binomtest(only_a, discordant).pvalue)


def paired(a: Sequence[Answer | ChatAnswer], b: Sequence[Answer | ChatAnswer]) -> Paired:
    """Of answers to the same questions in the same order."""
    both = list(zip(a, b, strict=True))
    only_a = sum(x.correct and not y.correct for x, y in both)
    only_b = sum(y.correct and not x.correct for x, y in both)
    agreement = sum(x.predicted == y.predicted for x, y in both) / len(both)
    return Paired(only_a, only_b, mcnemar(only_a, only_b), agreement)


def compare(a: Sequence[Answer], b: Sequence[Answer]) -> Comparison:
    """Raises ValueError when the runs did not answer the same prompts in the same order."""
    if [x.prompt_hash for x in a] != [y.prompt_hash for y in b]:
        raise ValueError("the two runs did not answer the same prompts")
    differences = [d for x, y in zip(a, b, strict=True) for d in _logprob_differences(x, y)]
    return Comparison(
        **asdict(paired(a, b)),
        same_text=sum(x.text == y.text for x, y in zip(a, b, strict=True)) / len(a),
        logprob_difference=sum(differences) / len(differences) if differences else None,
    )


def _logprob_differences(x: Answer, y: Answer) -> list[float]:
    """Over the common prefix: behind the first different token the two runs have read different texts."""
    result = []
    for token_x, token_y, logprob_x, logprob_y in zip(x.tokens, y.tokens, x.logprobs, y.logprobs, strict=False):
        if token_x != token_y:
            break
        result.append(abs(logprob_x - logprob_y))
    return result
