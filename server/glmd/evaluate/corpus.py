"""Text to evaluate on: the package's corpus or files, as tokens."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.errors import SettingsError

CORPUS = Path(__file__).with_name("corpus.jsonl.gz")
"""Written by tools/corpus.py; see docs/quality.md."""

CONTEXT = 4096
"""Tokens at which samples are cut, by default."""

Split = Literal["calibration", "test"]
TokenIds = npt.NDArray[np.int32]


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A text, or a conversation that the checkpoint's chat template renders.

    Attributes:
        domain: such as "code/go" or "tools"; scores are reported for each.
        split: "calibration" for recipe searches, "test" for evaluations.
        messages, tools: in the template's (OpenAI's) shape; empty: `text` is plain text.
    """

    domain: str
    split: Split = "test"
    text: str = ""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Batch:
    """Tokens `start` to `end`, which are whole samples beginning at `starts`."""

    start: int
    end: int
    starts: tuple[int, ...]

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        """Start and end of each sample."""
        return zip(self.starts, (*self.starts[1:], self.end), strict=True)


@dataclass(frozen=True)
class TokenSet:
    """Concatenated token ids of samples.

    Attributes:
        tokens: [n].
        starts: [samples + 1], the first token of each sample, and n.
        domains: of each sample.
    """

    tokens: TokenIds
    starts: npt.NDArray[np.int64]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def sample_of(self) -> npt.NDArray[np.int64]:
        """[n], the sample of each token."""
        return np.repeat(np.arange(len(self.domains)), np.diff(self.starts))

    @cached_property
    def positions(self) -> TokenIds:
        """[n], from 0 in each sample."""
        return (np.arange(len(self)) - self.starts[self.sample_of]).astype(np.int32)

    @cached_property
    def scored(self) -> npt.NDArray[np.int64]:
        """Tokens with a successor in their sample, whose predictions are scored."""
        last = self.starts[1:] - 1
        return np.setdiff1d(np.arange(len(self)), last, assume_unique=True)

    @cached_property
    def successors(self) -> TokenIds:
        """[n], the token behind each; that of a sample's last token has no meaning."""
        return np.append(self.tokens[1:], self.tokens[-1:]).astype(np.int32)

    @cached_property
    def digest(self) -> str:
        """Identifies tokens and samples."""
        return hashlib.sha256(self.tokens.tobytes() + self.starts.tobytes()).hexdigest()[:16]

    def batches(self, rows: int) -> list[Batch]:
        """Whole samples in order, up to `rows` tokens together; a longer sample is alone."""
        batches: list[Batch] = []
        starts: list[int] = []
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            if starts and end - starts[0] > rows:
                batches.append(Batch(starts[0], start, tuple(starts)))
                starts = []
            starts.append(start)
        return [*batches, Batch(starts[0], len(self), tuple(starts))]


def read_corpus(split: Split) -> list[Sample]:
    """Read the corpus in the package."""
    with gzip.open(CORPUS) as stream:
        samples = [msgspec.json.decode(line, type=Sample) for line in stream]
    return [sample for sample in samples if sample.split == split]


def read_files(files: Iterable[Path]) -> list[Sample]:
    """Read text files, each a domain of its own, or JSON lines of `Sample`.

    Raises:
        SettingsError: a file cannot be read.
    """
    samples = []
    for file in files:
        try:
            content = file.read_bytes()
            if file.suffix == ".jsonl":
                decoder = msgspec.json.Decoder(Sample)
                samples += [decoder.decode(line) for line in content.splitlines() if line.strip()]
            else:
                samples.append(Sample(domain=file.name, text=content.decode()))
        except OSError as error:
            raise SettingsError(f"--text: {file} cannot be read: {error.strerror}.") from None
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise SettingsError(f"--text: {file}: {error}. Give UTF-8 text or samples.") from None
    return samples


def tokenize(
    samples: Sequence[Sample], folder: Path, *, context: int = CONTEXT, limit: int | None = None
) -> TokenSet:
    """Encode samples with a checkpoint's tokenizer and chat template.

    Args:
        context: tokens at which a sample is cut; the rest is a sample of its own.
        limit: about how many tokens to take, in equal shares of the samples; None: all.

    Raises:
        CheckpointError: the tokenizer or the template is missing or damaged.
        SettingsError: there is no text.
    """
    tokenizer = Tokenizer.load(folder)
    rendered = any(sample.messages for sample in samples)
    template = ChatTemplate.load(folder, tokenizer.controls) if rendered else None
    prefix = [tokenizer.controls[name] for name in _PREFIX if name in tokenizer.controls]
    parts: list[tuple[str, TokenIds]] = []
    for sample in _thinned(samples, limit):
        if template is not None and sample.messages:
            pieces = template.render(
                sample.messages, tools=sample.tools, add_generation_prompt=False
            )
            ids = tokenizer.encode_rendered(pieces)
        else:
            ids = np.array([*prefix, *tokenizer.encode(sample.text)], np.int32)
        cuts = range(0, len(ids), context)
        parts += [(sample.domain, ids[cut : cut + context]) for cut in cuts]
    parts = [(domain, ids) for domain, ids in parts if len(ids) > 1]
    if not parts:
        raise SettingsError("There is no text to evaluate on. Give files with --text.")
    lengths = [len(ids) for _, ids in parts]
    return TokenSet(
        np.concatenate([ids for _, ids in parts]),
        np.cumsum([0, *lengths]),
        tuple(domain for domain, _ in parts),
    )


_PREFIX = ("[gMASK]", "<sop>")
"""Tokens in front of every text that the model was trained on."""

_TOKENS_PER_CHAR = 0.3


def _thinned(samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
    """Take every n-th sample, so that about `limit` tokens remain."""
    if limit is None:
        return samples
    chars = sum(len(s.text) + len(msgspec.json.encode(s.messages)) for s in samples)
    share = min(1.0, limit / max(1.0, chars * _TOKENS_PER_CHAR))
    chosen = [s for i, s in enumerate(samples) if int((i + 1) * share) > int(i * share)]
    return chosen or samples[:1]
