"""Search for the recipe with the least KL divergence at a given size."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from glmd.checkpoint.config import QuantizedAs
from glmd.checkpoint.layout import mtp_weights
from glmd.convert.recipes import (
    RECIPES,
    PlannedWeight,
    RecipeFile,
    find_recipe,
    plan_recipe,
    total,
)
from glmd.errors import SettingsError
from glmd.evaluate.allocation import Option, allocate
from glmd.evaluate.corpus import TokenSet
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

BASELINE = "mixed-8-5"
"""Recipe whose bits the MTP layer gets: drafts are verified, so
its bits cost acceptance and no quality."""

REFINED = ", refined"
"""Suffix of names in `Found.measured`."""


@dataclass(frozen=True)
class Found:
    """A searched recipe.

    Attributes:
        file: the recipe's JSON file, written.
        nbytes: of the main model.
        predicted: KL by the components' sensitivities.
        bound: no allocation of the size has a smaller prediction.
        measured: KL of the whole on the calibration text, by name of the allocation.
    """

    file: Path
    nbytes: int
    bits_per_weight: float
    predicted: float
    bound: float
    measured: dict[str, float]
    components: list[dict[str, Any]]


@dataclass(frozen=True)
class _Candidate:
    """An allocation, the size of the main model with it, and its predicted KL."""

    modules: dict[str, QuantizedAs]
    nbytes: int
    predicted: float
    bound: float = 0.0


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
) -> Found:
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
    work = work / pass_key(folder, ["search", str(dtype), bands, options, text.digest])
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
    modules, size = candidates[best].modules, candidates[best].nbytes
    predicted, bound = candidates[best].predicted, candidates["power law"].bound
    components = [_explain(group, measured, modules) for group in measured.groups]
    importance = out.with_name(f"{out.stem}.importance.safetensors")
    mx.save_safetensors(str(importance), measured.importance)
    bits_per_weight = 8 * size / whole.parameters
    baseline = find_recipe(BASELINE)
    layer = {
        weight.path: how
        for weight in mtp_weights(reader.config)
        if reader.stored.mtp and (how := baseline.quantization(weight)) is not None
    }
    content = RecipeFile(
        name=out.stem,
        modules=modules | layer,
        importance=importance.name,
        search={
            "bits_per_weight": bits_per_weight,
            "bytes": size,
            "tokens": len(text),
            "allocation": best,
            "predicted_kl": predicted,
            "bound": bound,
            "measured_kl": kl,
            "components": components,
        },
    )
    atomic_write(out, msgspec.json.format(msgspec.json.encode(content), indent=2))
    shutil.rmtree(verification)
    return Found(out, size, bits_per_weight, predicted, bound, kl, components)


def _smallest(reader: LayerReader, unquantized: int) -> int:
    sizes = [
        min(PlannedWeight(weight, how).nbytes for how in options_of(weight))
        - PlannedWeight(weight, None).nbytes
        for group in groups_of(reader, 1)
        for weight in group.weights
    ]
    return unquantized + sum(sizes)


def _solve(measured: Sensitivities, unquantized: int, budget: int, exponent: float) -> _Candidate:
    """Choose each matrix's quantisation."""
    pairs = [(group, weight) for group in measured.groups for weight in group.weights]
    choices = [options_of(weight) for _, weight in pairs]
    items = [
        [
            Option(PlannedWeight(weight, how).nbytes, measured.cost(group, weight, how, exponent))
            for how in options
        ]
        for (group, weight), options in zip(pairs, choices, strict=True)
    ]
    fixed = unquantized - sum(PlannedWeight(weight, None).nbytes for _, weight in pairs)
    found = allocate(items, budget - fixed)
    if found is None:
        raise SettingsError("--bytes: no recipe is so small.")
    modules = {
        weight.path: options[index]
        for (_, weight), options, index in zip(pairs, choices, found.chosen, strict=True)
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
    group: Group, measured: Sensitivities, modules: dict[str, QuantizedAs]
) -> dict[str, Any]:
    """A component's sensitivities and bits, as JSON."""
    planned = [PlannedWeight(weight, modules.get(weight.path)) for weight in group.weights]
    line = total(planned)
    common = set.intersection(*(set(options_of(weight)) for weight in group.weights))
    exponent = measured.exponent
    own = sum(
        measured.cost(group, weight, modules[weight.path], exponent)
        for weight in group.weights
        if weight.path in modules
    )
    options = []
    for how in sorted(common, key=lambda how: (how.stored_bits, how.mode)):
        cost = sum(measured.cost(group, weight, how, exponent) for weight in group.weights)
        options.append({**msgspec.to_builtins(how), "kl": cost**exponent})
    return {
        "component": group.component,
        "layers": group.layers,
        "parameters": line.parameters,
        "bits": line.bits,
        "bits_per_weight": line.bits_per_weight,
        "kl": own**exponent,
        "options": options,
    }
