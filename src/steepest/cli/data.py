"""`steepest data`: prepare a corpus as tokens, list what is known, inspect what was prepared."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from tyro.conf import Positional

from steepest.cli.arguments import parse
from steepest.cores import cores
from steepest.data import preparation, verifying
from steepest.data.preparation import Progress
from steepest.data.shards import Index, is_prepared, map_split
from steepest.data.sources import Source, corpora, open_source
from steepest.data.tokenizers import Tokenizer, load_tokenizer, named, open_tokenizer
from steepest.errors import UserError, unknown
from steepest.report import formatting

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
LOG_SECONDS = 30
"""Time between two lines of progress where the output is not a terminal."""
SAMPLE_CHARACTERS = 400


@dataclass(frozen=True)
class Data:
    """Prepare a corpus as tokens, list corpora and tokenizers, or inspect what was prepared."""


@dataclass(frozen=True)
class Prepare:
    """Write a corpus as shards of tokens for training and validation.

    Started again with the same arguments, it continues where it was stopped.
    """

    corpus: Positional[str]
    """A name of `steepest data list`; ORG/NAME[:CONFIG] of the Hugging Face Hub; or a file or
    folder of .txt, .jsonl(.gz, .zst), .json.gz or .parquet."""
    out: Path
    """Folder to write."""
    tokenizer: str = "gpt2"
    """bytes, chars, bpe-N (trained on the corpus), a name of `steepest data list`, hf:ORG/NAME, or
    the path of a tokenizer.json, a SentencePiece .model, or a folder with one."""
    vocab_size: int | None = None
    """Of the tokenizer, to leave out special tokens at its end: t5 has 32000 without them."""
    end_token: str | None = None
    """Token that ends a document, if the tokenizer doesn't say or another is wanted."""
    tokens: str | None = None
    """Training tokens, such as 500k, 10M or 1B; if not given, all there are."""
    validation_tokens: str = f"{preparation.VALIDATION_TOKENS // 10**6}M"
    """Validation tokens, or as many as there are."""
    held_out: float = preparation.HELD_OUT
    """Share of documents held out for validation, if the corpus has no split of its own."""
    shard_tokens: str = f"{preparation.SHARD_TOKENS // 10**6}M"
    """Tokens of a shard."""
    text_column: str | None = None
    """Column of the text, if it is not "text"."""
    workers: int = field(default_factory=cores)
    """Processes that tokenize; what is written is the same with any number."""


@dataclass(frozen=True)
class List:
    """List the corpora and tokenizers that are known by name."""


@dataclass(frozen=True)
class Inspect:
    """Check a prepared corpus and show what is in it."""

    folder: Positional[Path]
    """What `steepest data prepare` wrote."""
    sample: int = 1
    """Training documents to show."""


def data(arguments: list[str]) -> None:
    """Do one of the three."""
    if not arguments or arguments[0] in ("-h", "--help"):
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (kind, _) in COMMANDS.items():
            summary = (kind.__doc__ or "").strip().splitlines()[0]
            table.add_row(f"  steepest data {name}", summary)
        console = Console()
        console.print(f"{Data.__doc__}\n")
        console.print(table)
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise unknown("data command", name, COMMANDS)
    COMMANDS[name][1](rest)


def prepare(arguments: list[str]) -> None:
    """Prepare a corpus and say what came out."""
    args: Prepare = parse(Prepare, "data prepare", arguments)
    tokens = None if args.tokens is None else count("--tokens", args.tokens)
    validation_tokens = count("--validation-tokens", args.validation_tokens)
    shard_tokens = count("--shard-tokens", args.shard_tokens)
    console = Console()
    source = open_source(args.corpus, text_column=args.text_column)
    tokenizer = _tokenizer(args, source, console)
    with LivePreparation(console) as watcher:
        index = preparation.prepare(
            source,
            tokenizer,
            args.out,
            tokens=tokens,
            validation_tokens=validation_tokens,
            held_out=args.held_out,
            shard_tokens=shard_tokens,
            workers=args.workers,
            on_progress=watcher,
        )
    console.print(_table(index))
    found = index.splits["train"].tokens
    if tokens is not None and found < tokens:
        console.print(f"The corpus has no more than these of the {tokens:,} tokens asked for.")
    console.print(f"Prepared in {args.out}", soft_wrap=True)


def list_data(arguments: list[str]) -> None:
    """List corpora and tokenizers."""
    parse(List, "data list", arguments)
    table = Table("corpus", "tokens", "download", "validation", "what", box=None, pad_edge=False)
    for entry in corpora().values():
        table.add_row(
            entry.name,
            formatting.NONE if entry.tokens is None else formatting.count(entry.tokens),
            formatting.NONE if entry.download is None else _bytes(entry.download),
            "own" if entry.own_validation else "held out",
            f"{entry.title} ({entry.hub or entry.kind}). Licence: {entry.licence}",
        )
    tokenizers = Table("tokenizer", "vocabulary", "what", box=None, pad_edge=False)
    tokenizers.add_row("bytes", "257", "UTF-8 bytes; needs nothing")
    tokenizers.add_row("chars", "", "the characters of the training documents")
    tokenizers.add_row("bpe-N", "N", "byte-level BPE trained on the training documents")
    for name, about in named().items():
        tokenizers.add_row(name, f"{about['vocab_size']:,}", about["description"])
    console = Console()
    console.print(table)
    console.print()
    console.print(tokenizers)
    console.print(
        "\nAny other: a file or folder, ORG/NAME[:CONFIG] of the Hugging Face Hub as a corpus, "
        "hf:ORG/NAME as a tokenizer."
    )


def inspect(arguments: list[str]) -> None:
    """Verify a prepared corpus and show its counts and a sample."""
    args: Inspect = parse(Inspect, "data inspect", arguments)
    if args.sample < 0:
        raise UserError(f"--sample must not be negative, but it is {args.sample}.")
    console = Console()
    began = Index.read(args.folder)
    total = sum(entry.tokens for entry in began.splits.values())
    columns = (TextColumn("checking"), BarColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=total)
        index = verifying.verify(args.folder, lambda tokens: bar.advance(task, tokens))
    recipe = index.recipe
    about = Table(box=None, show_header=False, pad_edge=False)
    about.add_row("corpus", f"{recipe.source}: {recipe.source_description}")
    about.add_row("licence", recipe.licence)
    about.add_row(
        "tokenizer",
        f"{recipe.tokenizer}, vocabulary {recipe.vocab_size:,}, {recipe.tokenizer_fingerprint}",
    )
    about.add_row("fingerprint", index.fingerprint or "none yet: it is not complete")
    console.print(about, highlight=False)
    console.print(_table(index))
    files = 3 * sum(len(entry.shards) for entry in index.splits.values())
    console.print(
        f"Checked: the checksums of {formatting.plural(files, 'file')}, the ends of documents, the "
        "tokenizer; no training document is a validation document.",
        highlight=False,
    )
    _print_sample(console, args.folder, index, args.sample)


def count(flag: str, text: str) -> int:
    """Return a number such as 500k, 10M, 1.5B or 2_000_000.

    Raises UserError for anything else, and for less than 1.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower())
    number = 0
    if match:
        number = round(Fraction(re.sub("[_,]", "", match[1])) * UNITS[match[2]])
    if number < 1:
        raise UserError(f"{flag} must be a number such as 500k, 10M or 1B, not {text!r}.")
    return number


class LivePreparation:
    """Shows how far a preparation is; a line now and then where that is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.logged = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None, detail="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one more report."""
        detail = progress_line(progress)
        self.bar.update(
            self.task,
            description=progress.split,
            total=progress.wanted,
            completed=progress.tokens,
            detail=detail,
        )
        now = time.monotonic()
        if not self.console.is_terminal and now - self.logged >= LOG_SECONDS:
            self.logged = now
            self.console.print(f"{progress.split}: {detail}", highlight=False, soft_wrap=True)


def progress_line(progress: Progress) -> str:
    """Return how far a preparation is, at what rate, and how long it may take."""
    wanted = "" if progress.wanted is None else f" of {formatting.count(progress.wanted)}"
    left = progress.seconds_left
    return (
        f"{formatting.count(progress.tokens)}{wanted} tokens, "
        f"{formatting.count(progress.documents)} documents read, "
        f"{formatting.count(progress.tokens_per_second)} tokens/s, "
        f"{progress.bytes_per_second / 1e6:.1f} MB/s"
        + ("" if left is None else f", about {formatting.duration(round(left))} left")
    )


def _tokenizer(args: Prepare, source: Source, console: Console) -> Tokenizer:
    """Open the tokenizer; the one that the folder was begun with need not be trained again."""
    if is_prepared(args.out):
        begun = Index.read(args.out).recipe
        same = begun.tokenizer == args.tokenizer and args.vocab_size in (None, begun.vocab_size)
        if same and args.end_token is None:
            return load_tokenizer(args.out / "tokenizer")

    def documents() -> Iterator[str]:
        console.print("Reading the training documents to make the tokenizer ...")
        return preparation.training_documents(source, args.held_out)

    return open_tokenizer(
        args.tokenizer,
        documents=documents,
        vocab_size=args.vocab_size,
        end=args.end_token,
    )


def _table(index: Index) -> Table:
    columns = ("", "documents", "tokens", "text", "bytes/token", "shards", "left out")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in index.splits.items():
        ratio = f"{entry.bytes / entry.tokens:.2f}" if entry.tokens else formatting.NONE
        numbers = (f"{entry.documents:,}", f"{entry.tokens:,}", _bytes(entry.bytes), ratio)
        state = "" if entry.complete else " (unfinished)"
        table.add_row(name + state, *numbers, f"{len(entry.shards)}", f"{entry.left_out:,}")
    return table


def _print_sample(console: Console, folder: Path, index: Index, number: int) -> None:
    split = map_split(folder, index, "train")
    number = min(number, len(split.ends))
    tokenizer = verifying.tokenizer_of(folder, index)
    for place in range(number):
        document = place * len(split.ends) // number
        text = tokenizer.decode(split.document(document)[:-1].tolist())
        shown = textwrap.shorten(text, SAMPLE_CHARACTERS, placeholder=" ...")
        console.print(f"\nTraining document {document:,} ({len(text):,} characters):")
        console.print(shown, markup=False, highlight=False)


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{formatting.significant(value / size)} {unit}"
    return f"{value:.0f} B"


COMMANDS: dict[str, tuple[type[Any], Callable[[list[str]], None]]] = {
    "prepare": (Prepare, prepare),
    "list": (List, list_data),
    "inspect": (Inspect, inspect),
}
