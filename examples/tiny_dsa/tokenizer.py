"""The tokenizer: a dependency-free encoder for training, and the builder of tokenizer.json.

`tokenizer.json` is a 456-entry byte-level BPE in which every digit, with or without a leading space, is a token
of its own, so arithmetic is learnt digit by digit. The file is frozen: shipped checkpoints depend on its ids.
`python tokenizer.py NEW.json` trains another one the same way (needs the `tokenizers` package).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path

TOKENIZER_FILE = Path(__file__).with_name("tokenizer.json")
SPLIT = r" ?\d| ?[^\W\d_]+| ?[^\s\w]+|\n|\s"
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]


class Encoder:
    """Text to ids for the ASCII text that data.py writes; equal to `tokenizers` on it, and picklable.

    Raises:
        ValueError: the text holds a character that is not ASCII.
    """

    def __init__(self, path: Path = TOKENIZER_FILE) -> None:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        self.vocab: dict[str, int] = model["vocab"]
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.split = re.compile(SPLIT)
        self.cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if not text.isascii():
            raise ValueError(f"text: expected ASCII, got {text!r}")
        ids: list[int] = []
        for piece in self.split.findall(text):
            known = self.cache.get(piece)
            if known is None:
                known = self.cache[piece] = self._merge(piece)
            ids += known
        return ids

    def _merge(self, piece: str) -> list[int]:
        # Byte-level BPE writes a space as U+0120 and a newline as U+010A.
        parts = list(piece.replace(" ", "\u0120").replace("\n", "\u010a"))
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]


def build(path: Path, sequences: int = 3000, seed: int = 1) -> None:
    """Train a byte-level BPE of at most 512 entries on generated text and write it to `path`."""
    from data import Mix, training_text
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    mix = Mix(drill=0.2, lookup=0.2, copy=0.2)
    corpus = [training_text(rng, mix, problems=6) for _ in range(sequences)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(path))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
