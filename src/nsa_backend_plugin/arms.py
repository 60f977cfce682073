"""What a comparison is made of: arms (an attention backend with its own variables and server arguments) and shapes."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_backend_plugin.settings import OPERATIONS


@dataclass(frozen=True)
class Arm:
    """text: as the user wrote it. backend: of --attention-backend. env, args: added to the server's."""

    text: str
    backend: str
    env: dict[str, str]
    args: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The text where it is short and plain; else its beginning and a digest, because names end at 255 bytes."""
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", self.text).strip("-")
        return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"


def parse_arms(texts: list[str]) -> list[Arm]:
    """One arm per text, "BACKEND [NAME=VALUE ...] [--flag=value ...]"; one text without spaces may list backends
    with commas. Raises ValueError for an arm without a backend, an unknown word, or two equal arms."""
    if len(texts) == 1 and " " not in texts[0]:
        texts = texts[0].split(",")
    arms = []
    for text in texts:
        words = shlex.split(text)
        if not words or words[0].startswith("-") or "=" in words[0]:
            raise ValueError(f"--arms {text!r}: expected BACKEND [NAME=VALUE ...] [--flag=value ...]")
        env, args = {}, []
        for word in words[1:]:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                args.append(word)
            elif equals and name.isidentifier():
                env[name] = value
            else:
                raise ValueError(f"--arms {text!r}: {word!r} is neither NAME=VALUE nor --flag=value")
        arms.append(Arm(text, words[0], env, tuple(args)))
    names = [arm.file_name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"--arms {texts}: expected different arms")
    return arms


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(batch, context) of every "BATCH:CONTEXT". Raises ValueError for anything but two whole numbers from 1 on."""
    for text in texts:
        if not re.fullmatch(r"0*[1-9][0-9]*:0*[1-9][0-9]*", text):
            raise ValueError(f"--shapes {text}: expected BATCH:CONTEXT, whole numbers of at least 1, as in 16:8192")
    return [(int(batch), int(context)) for batch, _, context in (text.partition(":") for text in texts)]


def kernel_lines(log: Path) -> list[str]:
    """`operation: implementation runs ...`, what our backend logged when an implementation first ran."""
    pattern = re.compile(rf"(?:{'|'.join(OPERATIONS)})\.\w+: \w+ runs .*")
    found = (pattern.search(line) for line in log.read_text(errors="replace").splitlines())
    return list(dict.fromkeys(match.group(0) for match in found if match))
