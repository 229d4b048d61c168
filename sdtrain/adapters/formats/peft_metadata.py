"""The settings of peft that give a file in diffusers names its meaning, as diffusers keeps them in the header.

diffusers reads the JSON under `lora_adapter_metadata`, keys prefixed by the network, and builds peft's config from it
as it stands: either every network of a file is described or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, assert_never

from sdtrain.adapters.formats.alphas import most_frequent
from sdtrain.adapters.formats.metadata import DIFFUSERS_KEY, OTHER_ROTATIONS, json_table, number_of
from sdtrain.adapters.formats.tensor_names import factor_shape
from sdtrain.adapters.kinds import Adapters, AdapterWeights, LokrWeights, kind_of
from sdtrain.errors import user_error

NEUMANN_TERMS = 5
"""How many terms peft takes where its settings do not say."""
MOST_TERMS = 100
"""More were not meant, and each is a product of matrices."""
MOST_REPETITIONS = 2
"""Of a stranger's pattern; with more, or with one of a group, matching could take longer than anybody waits."""


def peft_metadata(path: Path, adapters: Adapters) -> str:
    """Return the JSON for the header; it is empty where readers need none, for LoRA with alpha = rank everywhere.

    Raises UserError for adapters that peft cannot describe.
    """
    kinds = {kind_of(weights) for modules in adapters.values() for weights in modules.values()}
    if len(kinds) > 1:
        found = ", ".join(sorted(kinds))
        raise user_error(str(path), "adapters", f"are of several kinds ({found}); diffusers names hold one kind a file")
    plain = kinds <= {"lora", "dora"}
    if plain and all(w.alpha == w.rank for modules in adapters.values() for w in modules.values()):
        return ""
    settings = {
        f"{component}.{key}": value
        for component, modules in adapters.items()
        for key, value in _settings(path, component, modules).items()
    }
    return json.dumps(settings, indent=2, sort_keys=True)


def _settings(path: Path, component: str, modules: Mapping[str, AdapterWeights]) -> dict[str, Any]:
    """Return the arguments of peft's config for one network.

    Modules are named without `text_model.`: peft matches the ends of names, so that a text encoder is found by
    classes that have the prefix and by those that do not.
    """
    stripped = {module.removeprefix("text_model."): weights for module, weights in modules.items()}
    ranks = {module: _peft_rank(weights) for module, weights in stripped.items()}
    alphas = {module: _peft_alpha(weights) for module, weights in stripped.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    found = {
        "target_modules": sorted(stripped),
        "r": rank,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    kind = kind_of(next(iter(modules.values())))
    match kind:
        case "lora" | "dora":
            return found | {"lora_alpha": alpha, "use_dora": kind == "dora", "use_rslora": False, "lora_bias": False}
        case "loha":
            return found | {"alpha": alpha}
        case "lokr":
            factor = _decompose_factor(path, [w for w in modules.values() if isinstance(w, LokrWeights)])
            both = any(isinstance(w, LokrWeights) and isinstance(w.w1, tuple) for w in modules.values())
            return found | {"alpha": alpha, "decompose_both": both, "decompose_factor": factor}
        case "diff":
            raise user_error(str(path), component, "has whole changes, which peft has no words for")
        case "oft":
            if rank_pattern:
                raise user_error(str(path), component, "has OFT blocks of several sizes, which peft has no words for")
            return {"target_modules": sorted(stripped), "r": 0, "oft_block_size": rank, "use_cayley_neumann": False}
        case _:
            assert_never(kind)


def _peft_rank(weights: AdapterWeights) -> int:
    if isinstance(weights, LokrWeights) and not weights.rank:
        assert not isinstance(weights.w2, tuple)
        return max(weights.w2.shape[:2])  # large enough for peft to keep both factors whole
    return weights.rank


def _peft_alpha(weights: AdapterWeights) -> float:
    whole = isinstance(weights, LokrWeights) and not weights.rank
    return float(_peft_rank(weights)) if whole else weights.alpha


def _common(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and the others under peft's pattern for exactly that module."""
    common = most_frequent(values.values())
    return common, {re.escape(module): value for module, value in values.items() if value != common}


def _decompose_factor(path: Path, modules: Iterable[LokrWeights]) -> int:
    """Return the setting from which peft derives the same factors. Raises UserError when there is none."""
    from peft.tuners.lokr.layer import factorization

    shapes = [(factor_shape(weights.w1), factor_shape(weights.w2)) for weights in modules]
    for candidate in [-1, *sorted({left[0] for left, _ in shapes})]:

        def derives(left: int, right: int, factor: int = candidate) -> bool:
            return bool(factorization(left * right, factor) == (left, right))

        # The second factor of a convolution, written as a product, has its kernel's pixels among its inputs.
        if all(
            derives(left[0], right[0]) and any(derives(left[1], right[1] // area) for area in (1, 9))
            for left, right in shapes
        ):
            return candidate
    raise user_error(str(path), "adapters", "have Kronecker factors that peft cannot name; use sd-scripts names")


def alpha_in_metadata(metadata: Mapping[str, str], component: str, module: str, rank: int) -> float | None:
    """Return the alpha that `lora_adapter_metadata` gives a module, None where it gives none.

    A rank-stabilised scale is turned into the alpha that has the same effect.
    """
    every = json_table(metadata, DIFFUSERS_KEY)
    settings = {key.removeprefix(f"{component}."): v for key, v in every.items() if key.startswith(f"{component}.")}
    default = settings.get("lora_alpha", settings.get("alpha"))
    if default is None:
        return None
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"cannot be read: `{DIFFUSERS_KEY}` in the header has an alpha_pattern that is no table")
    alpha = number_of(_matching(patterns, module, default), DIFFUSERS_KEY)
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def series_terms(metadata: Mapping[str, str], component: str) -> int:
    """Return how many terms of a series peft computes for the rotations of an OFT; 0 for Cayley's transform itself.

    Raises ValueError for settings of peft under which the file means something that is not computed here.
    """
    every = json_table(metadata, DIFFUSERS_KEY)
    settings = {key.removeprefix(f"{component}."): v for key, v in every.items() if key.startswith(f"{component}.")}
    for setting, meaning in OTHER_ROTATIONS.items():
        if settings.get(setting):
            raise ValueError(
                f"is OFT with peft's `{setting}`, {meaning}, which is not computed here; merge it with peft"
            )
    if not settings.get("use_cayley_neumann"):
        return 0
    terms = number_of(settings.get("num_cayley_neumann_terms", NEUMANN_TERMS), DIFFUSERS_KEY)
    if terms not in range(1, MOST_TERMS + 1):
        raise ValueError(f"cannot be read: `{DIFFUSERS_KEY}` in the header has {terms:g} terms of a series")
    return int(terms)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value whose pattern fits a module as peft matches: at the end of its name, from a dot on."""
    for pattern, value in patterns.items():
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MOST_REPETITIONS:
            raise ValueError(f"cannot be read: `{DIFFUSERS_KEY}` in the header has a pattern that could take for ever")
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, RecursionError, OverflowError):
            raise ValueError(f"cannot be read: `{DIFFUSERS_KEY}` in the header has a pattern that is none") from None
        if found:
            return value
    return default
