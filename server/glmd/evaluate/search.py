"""Search for the recipe with the least KL divergence at a given size."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import msgspec

from glmd.checkpoint.config import QuantizedAs
from glmd.checkpoint.layout import Weight
from glmd.convert.recipes import (
    RECIPES,
    MeasuredOption,
    PlannedWeight,
    RecipeFile,
    SearchedComponent,
    SearchedDrafts,
    SearchResult,
    find_recipe,
    plan_recipe,
    total,
)
from glmd.errors import SettingsError
from glmd.evaluate.allocation import Option, allocate
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.drafts import choose_option, mtp_modules
from glmd.evaluate.layer_pass import LayerReader
from glmd.evaluate.model_pass import pass_key
from glmd.evaluate.sensitivity import (
    OPTIONS,
    PROBES,
    Group,
    Sensitivities,
    groups_of,
    measure,
    options_of,
    read_sensitivities,
)
from glmd.evaluate.variants import VariantsRun
from glmd.utils.files import atomic_write
from glmd.utils.text import gib

REFINED = ", refined"
"""Suffix of names in `SearchResult.measured_kl`."""


@dataclass(frozen=True)
class _Candidate:
    """An allocation, the size of the main model with it, and its predicted KL."""

    modules: dict[str, QuantizedAs]
    nbytes: int
    predicted: float
    bound: float = 0.0


_VERSION = "search 1"
"""Changed when sensitivities of earlier searches cannot be used."""

Progress = Callable[[str, int, int], None]


def search(
    folder: Path,
    out: Path,
    text: TokenSet,
    work: Path,
    *,
    nbytes: int | None = None,
    bits: float | None = None,
    bands: int = 8,
    dtype: mx.Dtype,
    on_progress: Progress,
) -> SearchResult:
    """Search a recipe and write it, with importances for refinement.

    Args:
        folder: the BF16 checkpoint.
        out: the recipe's file; `out` with the suffix `.importance.safetensors` is written too.
        text: for calibration.
        work: sensitivities are kept in a folder in it, for further sizes; so is all that an
            interrupted search has measured.
        nbytes: size of the main model; None: from `bits`.
        bits: bits per weight of the main model; None: from `nbytes`.

    Raises:
        CheckpointError: the checkpoint is quantised or damaged.
        SettingsError: no recipe is so small.
    """
    reader = LayerReader(folder, dtype)
    whole = total(plan_recipe(reader.config, find_recipe("bf16"), mtp=False).main)
    budget = nbytes if nbytes is not None else int((bits or 0) * whole.parameters / 8)
    smallest = _smallest(reader, whole.nbytes)
    if budget < smallest:
        raise SettingsError(
            f"--bytes: no recipe takes {gib(budget)} GiB; the smallest takes {gib(smallest)} GiB."
        )
    options = repr((PROBES, OPTIONS))
    work = work / pass_key(folder, [_VERSION, str(dtype), bands, options, text.digest])
    work.mkdir(parents=True, exist_ok=True)
    measured = read_sensitivities(work, reader, bands)
    if measured is None:
        measured = measure(
            reader, text, work / "sensitivities", bands=bands,
            on_progress=lambda done, of: on_progress("Sensitivities", done, of),
        )  # fmt: skip
        measured.save(work)
    shutil.rmtree(work / "sensitivities", ignore_errors=True)
    candidates = {
        "power law": _solve(measured, whole.nbytes, budget, measured.exponent),
        "quadratic": _solve(measured, whole.nbytes, budget, 1.0),
        **_fixed(reader, measured, budget),
    }
    modules_of = {name: each.modules for name, each in candidates.items()}
    key = hashlib.sha256(msgspec.json.encode(modules_of)).hexdigest()[:16]
    verification = work / f"verification-{key}"
    kl = _verify(
        reader, text, verification, modules_of, measured,
        lambda done, of: on_progress("Verification", done, of),
    )  # fmt: skip
    best = min(candidates, key=lambda name: kl[name + REFINED])
    chosen = candidates[best]
    importance = out.with_name(f"{out.stem}.importance.safetensors")
    mx.save_safetensors(str(importance), measured.importance)
    drafts, mtp = choose_option(measured.drafts), None
    if measured.drafts:
        unquantised = measured.drafts[0].acceptance + measured.drafts[0].loss
        mtp = SearchedDrafts(chosen=drafts, reference=unquantised, options=measured.drafts)
    result = SearchResult(
        bits_per_weight=8 * chosen.nbytes / whole.parameters,
        nbytes=chosen.nbytes,
        tokens=len(text),
        allocation=best,
        predicted_kl=chosen.predicted,
        bound=candidates["power law"].bound,
        measured_kl=kl,
        components=[_explain(group, measured, chosen.modules) for group in measured.groups],
        mtp=mtp,
    )
    layer = mtp_modules(reader.config, drafts and drafts.quantized) if reader.stored.mtp else {}
    content = RecipeFile(
        name=out.stem,
        modules=chosen.modules | layer,
        importance=importance.name,
        search=result,
    )
    atomic_write(out, msgspec.json.format(msgspec.json.encode(content), indent=2))
    shutil.rmtree(verification)
    return result


def _smallest(reader: LayerReader, unquantized: int) -> int:
    sizes = [
        min(PlannedWeight(weight, how).nbytes for how in options_of(weight))
        - PlannedWeight(weight, None).nbytes
        for group in groups_of(reader, 1)
        for weight in group.weights
    ]
    return unquantized + sum(sizes)


def _solve(measured: Sensitivities, unquantized: int, budget: int, exponent: float) -> _Candidate:
    """Choose each matrix's quantisation.

    Gate and up projection get the same: only then does the engine multiply with both at once.
    """
    items: dict[str, list[tuple[Group, Weight]]] = {}
    for group in measured.groups:
        for weight in group.weights:
            joined = weight.path.replace("up_proj", "gate_proj")
            items.setdefault(joined, []).append((group, weight))
    choices = [options_of(parts[0][1]) for parts in items.values()]
    options = [
        [
            Option(
                sum(PlannedWeight(weight, how).nbytes for _, weight in parts),
                sum(measured.cost(group, weight, how, exponent) for group, weight in parts),
            )
            for how in choice
        ]
        for parts, choice in zip(items.values(), choices, strict=True)
    ]
    weights = [[weight for _, weight in parts] for parts in items.values()]
    fixed = unquantized - sum(PlannedWeight(each, None).nbytes for part in weights for each in part)
    found = allocate(options, budget - fixed)
    if found is None:
        raise SettingsError("--bytes: no recipe is so small.")
    modules = {
        weight.path: choice[index]
        for part, choice, index in zip(weights, choices, found.chosen, strict=True)
        for weight in part
    }
    return _Candidate(modules, found.nbytes + fixed, found.cost**exponent, found.bound**exponent)


def _fixed(reader: LayerReader, measured: Sensitivities, budget: int) -> dict[str, _Candidate]:
    """The largest of the recipes with a name that fits, by name; empty: none fits."""
    fitting: dict[str, _Candidate] = {}
    for recipe in RECIPES.values():
        plan = plan_recipe(reader.config, recipe, mtp=False).main
        size = total(plan).nbytes
        if size <= budget and recipe.default is not None:
            modules = {p.weight.path: p.quantized for p in plan if p.quantized is not None}
            cost = sum(
                measured.cost(group, weight, modules[weight.path], measured.exponent)
                for group in measured.groups
                for weight in group.weights
                if weight.path in modules
            )
            fitting[recipe.name] = _Candidate(modules, size, cost**measured.exponent)
    largest = sorted(fitting, key=lambda name: fitting[name].nbytes)[-1:]
    return {name: fitting[name] for name in largest}


def _verify(
    reader: LayerReader,
    text: TokenSet,
    work: Path,
    candidates: Mapping[str, dict[str, QuantizedAs]],
    measured: Sensitivities,
    on_progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Measure the KL of whole models, with scales of `mx.quantize` and refined."""
    variants = {
        name + REFINED if refined else name: (how, refined)
        for name, how in candidates.items()
        for refined in (False, True)
    }
    run = VariantsRun(reader, text, work, list(variants.values()), importance=measured.importance)
    return dict(zip(variants, run.run(on_progress), strict=True))


def _explain(
    group: Group, measured: Sensitivities, modules: Mapping[str, QuantizedAs]
) -> SearchedComponent:
    """A component's sensitivities and bits."""

    def kl(quantized: Mapping[str, QuantizedAs]) -> float:
        costs = [
            measured.cost(group, weight, quantized[weight.path], measured.exponent)
            for weight in group.weights
            if weight.path in quantized
        ]
        return float(sum(costs) ** measured.exponent)

    line = total(PlannedWeight(weight, modules.get(weight.path)) for weight in group.weights)
    paths = [weight.path for weight in group.weights]
    common = set.intersection(*(set(options_of(weight)) for weight in group.weights))
    options = [
        MeasuredOption(how.bits, how.group_size, how.mode, kl=kl(dict.fromkeys(paths, how)))
        for how in sorted(common, key=lambda how: (how.stored_bits, how.mode))
    ]
    at_4 = [each.kl for each in options if each.quantized == QuantizedAs(bits=4)]
    return SearchedComponent(
        component=group.component,
        layers=group.layers,
        parameters=line.parameters,
        bits=line.bits,
        bits_per_weight=line.bits_per_weight,
        kl=kl(modules),
        kl_at_4_bits=at_4[0] if at_4 else None,
        options=options,
    )
