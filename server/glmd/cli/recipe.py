"""`glmd recipe`: search quantisation recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from glmd.cli.evaluate import Work, find_candidate, progress_bar, work_folder
from glmd.convert.recipes import SearchedDrafts, SearchResult, name_bits
from glmd.utils.mlx_environment import prepare_mlx
from glmd.utils.text import gib

app = typer.Typer(help="Search quantisation recipes. See docs/quality.md.", no_args_is_help=True)

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@app.callback()
def recipe() -> None:
    """Search quantisation recipes."""


@app.command()
def search(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="BF16 checkpoint: a folder or a repo id.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Recipe file. A file with importances is written beside it.",
        ),
    ] = Path("recipe.json"),
    nbytes: Annotated[
        str | None,
        typer.Option("--bytes", help="Size of the main model, such as 18GiB.", show_default=False),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(min=2, max=9, help="Bits per weight, such as 5.7.", show_default=False),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Calibration text. Default: a part of the corpus."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens for calibration.")] = 16_384,
    context: Annotated[int, typer.Option(min=2, help="Cut texts at this many tokens.")] = 1024,
    bands: Annotated[
        int, typer.Option(min=1, help="Parts in which the layers of a component are measured.")
    ] = 8,
    work: Work = None,
) -> None:
    """Find the bits of each matrix with the least KL divergence at a given size.

    An interrupted search resumes.

    Then: glmd convert REF OUT --recipe recipe.json

    Example: glmd recipe search zai-org/GLM-4.7-Flash --bytes 18GiB
    """
    if (nbytes is None) == (bits is None):
        raise typer.BadParameter("give one of --bytes and --bits.")
    size = None if nbytes is None else read_bytes(nbytes)

    prepare_mlx()
    from glmd.evaluate.corpus import read_corpus, read_files, tokenize
    from glmd.evaluate.search import search as run
    from glmd.model.loader import choose_dtype

    out = out.expanduser()
    folder = find_candidate(reference).folder
    samples = read_files(text) if text else read_corpus("calibration")
    encoded = tokenize(samples, folder, context=context, limit=tokens)
    with progress_bar() as on_progress:
        found = run(
            folder,
            out,
            encoded,
            (work or work_folder()) / "search",
            nbytes=size,
            bits=bits,
            bands=bands,
            dtype=choose_dtype("auto"),
            on_progress=on_progress,
        )
    console = Console()
    console.width = max(console.width, 100)
    explain(found, console)
    console.print(
        f"{out}: {gib(found.nbytes)} GiB, {found.bits_per_weight:.3f} bits per weight.",
        highlight=False,
        soft_wrap=True,
    )


def read_bytes(text: str) -> int:
    """Read a size such as `18GiB`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise typer.BadParameter(f"--bytes: {text!r} is not a size. Use for example 18GiB.")
    return int(float(match[1]) * unit)


def explain(found: SearchResult, console: Console) -> None:
    """Print why a searched recipe has its bits: what each component costs."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("Component", "Layers", "Bits"):
        table.add_column(name, no_wrap=name != "Bits")
    for name in ("Parameters", "Bits per\nweight", "KL at\n4 bits", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in found.components:
        table.add_row(
            line.component,
            "" if line.layers is None else "–".join(map(str, dict.fromkeys(line.layers))),
            line.bits,
            f"{line.parameters:,}",
            f"{line.bits_per_weight:.2f}",
            "" if line.kl_at_4_bits is None else f"{line.kl_at_4_bits:.6f}",
            f"{line.kl:.6f}",
        )
    console.print(table)
    for name, kl in found.measured_kl.items():
        kept = " (kept)" if name == f"{found.allocation}, refined" else ""
        console.print(f"{name}{kept}: mean KL {kl:.5f} on {found.tokens:,} tokens", highlight=False)
    sentences = [
        f"Predicted KL {found.predicted_kl:.5f}, no less than {found.bound:.5f} at this size."
    ]
    if found.mtp is not None:
        sentences.append(_explain_drafts(found.mtp))
    console.print("\n".join(sentences), highlight=False, soft_wrap=True)


def _explain_drafts(mtp: SearchedDrafts) -> str:
    chosen = mtp.chosen
    if chosen is None:
        return (
            "MTP layer: as in mixed-8-5, since no option is known to keep the acceptance of drafts."
            " More --tokens tell smaller losses from noise."
        )
    return (
        f"MTP layer: routed experts {name_bits(chosen)}, others 8 bits. {chosen.acceptance:.2%} of"
        f" its drafts are accepted, {mtp.reference:.2%} of the unquantised layer's (lower by"
        f" {chosen.loss:.2%} ± {chosen.loss_error:.2%})."
    )
