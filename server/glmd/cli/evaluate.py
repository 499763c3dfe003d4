"""`glmd evaluate`: measure the quality of checkpoints against a reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from glmd.utils.mlx_environment import prepare_mlx

if TYPE_CHECKING:
    from glmd.evaluate.model_pass import Candidate
    from glmd.evaluate.model_pass import Progress as OnProgress
    from glmd.kv_cache.stored_keys import KVBits

Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="Text files, or JSON lines of samples, in place of the corpus in the package."
        " Example: --text notes.md --text main.py",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(min=2, help="Take about so many tokens of the text. Default: all of it."),
]
Context = Annotated[int, typer.Option(min=2, help="Cut texts at this many tokens.")]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of interrupted and complete passes. Default: in the user's cache folder.",
        show_default=False,
    ),
]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders or Hugging Face repo ids."),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="Reference, usually the BF16 source, in Hugging Face's layout or MLX's."
            " Default: none, only perplexities.",
            show_default=False,
        ),
    ] = None,
    text: Text = None,
    tokens: Tokens = None,
    context: Context = 4096,
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            "--from-context",
            min=0,
            help="Add rows of the tokens with at least so many tokens before them."
            " Example: --from-context 0 --from-context 2048",
            show_default=False,
        ),
    ] = None,
    kv_bits: Annotated[
        list[int] | None,
        typer.Option(
            "--kv-bits",
            help="Add rows of all models and the reference with their KV in so many bits."
            " Example: --kv-bits 8 --kv-bits 4",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file.")
    ] = None,
    no_noise_floor: Annotated[
        bool,
        typer.Option(
            "--no-noise-floor",
            help="Leave out the reference against itself, in another precision.",
        ),
    ] = False,
    work: Work = None,
) -> None:
    """Measure the quality of checkpoints against a reference.

    All tokens run through one layer at a time, so models of any size are measured in less than
    8 GB of memory. An interrupted command resumes.

    Example: glmd evaluate ./GLM-4.7-Flash-8-5 --against zai-org/GLM-4.7-Flash --json quality.json
    """
    prepare_mlx()
    from glmd.evaluate.corpus import read_corpus, read_files, tokenize
    from glmd.evaluate.run import evaluate as run

    quantized: dict[int, KVBits] = {8: 8, 4: 4}
    if not set(kv_bits or ()) <= set(quantized):
        raise typer.BadParameter("--kv-bits: must be 8 or 4. Rows without it have 16.")
    reference = find_candidate(against) if against is not None else None
    candidates = [find_candidate(model) for model in models]
    samples = read_files(text) if text else read_corpus("test")
    source = reference or candidates[0]
    encoded = tokenize(samples, source.folder, context=context, limit=tokens)
    with progress_bar() as on_progress:
        rows = run(
            candidates,
            reference,
            encoded,
            work=work or work_folder(),
            on_progress=on_progress,
            noise_floor=not no_noise_floor,
            contexts=contexts or (),
            kv_bits=[quantized[bits] for bits in kv_bits or ()],
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(quality_table(rows), domain_table(rows))
    if json_file is not None:
        content = json.dumps(rows, indent=2, allow_nan=False) + "\n"
        json_file.write_text(content, encoding="utf-8")


def find_candidate(model: str) -> Candidate:
    """The folder of a model named on the command line; `demo` is the bundled demo."""
    from glmd.checkpoint.hub import DEMO, resolve_model
    from glmd.evaluate.model_pass import Candidate

    return Candidate(model, DEMO if model == "demo" else resolve_model(model))


def work_folder() -> Path:
    """The default folder of passes."""
    import platformdirs

    return Path(platformdirs.user_cache_path("glmd")) / "evaluate"


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """Show one bar per pass on stderr, with the remaining time."""
    tasks: dict[str, Any] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield on_progress


_COLUMNS = (
    ("Bits per\nweight", "bits_per_weight", "{:.3f}"),
    ("Mean KL", "mean_kl", "{:.5f}"),
    ("KL 99 %", "kl_99", "{:.4f}"),
    ("Same top\ntoken", "same_top", "{:.2%}"),
    ("PPL", "ppl", "{:.4f}"),
    ("PPL ratio", "ppl_ratio", "{:.4f}"),
    ("RMS Δp", "dp_rms", "{:.2%}"),
    ("Expert\noverlap", "expert_overlap", "{:.2%}"),
    ("Router\nflips", "router_flips", "{:.2%}"),
    ("MTP\naccepted", "mtp_acceptance", "{:.2%}"),
)
"""Heading, key and format; a standard error follows in the same format if there is one."""


def quality_table(rows: list[dict[str, Any]]) -> Table:
    """All models; ± is the standard error."""
    table = _table("Model", f"{rows[0]['tokens']:,} tokens")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in rows:
        table.add_row(each["model"], *(_cell(each, key, how) for _, key, how in _COLUMNS))
    return table


def domain_table(rows: list[dict[str, Any]]) -> Table:
    """Mean KL by domain, or perplexity without a reference."""
    from glmd.evaluate.scores import domain_order

    compared = any(each["mean_kl"] is not None for each in rows)
    key, how = ("mean_kl", "{:.5f}") if compared else ("ppl", "{:.4f}")
    shown = [each for each in rows if "domains" in each]
    if compared:
        shown = shown[1:]  # The reference's own are zero.
    table = _table("Domain", "Mean KL by domain" if compared else "Perplexity by domain")
    for each in shown:
        table.add_column(each["model"], justify="right")
    for domain in domain_order(rows):
        table.add_row(domain, *(_cell(each["domains"][domain], key, how) for each in shown))
    return table


def _table(first: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column(first)
    return table


def _cell(values: dict[str, Any], key: str, how: str) -> str:
    value = values.get(key)
    if value is None:
        return ""
    error = values["standard_errors"].get(key)
    return how.format(value) + (f"\n±{how.format(error)}" if error else "")
