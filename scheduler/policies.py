"""The catalogue of diffusion methods: names, parameters with defaults and bounds, and the policies made of them.

One table that everybody reads: the API validates against it, the worker and the state machines look their parameters up
in it, the documentation's tables are generated from it (`python -m scheduler.policies`). A policy is a selector, a
planner, a cache and a stopper, each with its own parameters, so every combination that makes sense can be asked for by
naming a policy and overriding its parts. What each method does and where it departs from its source:
`server/worker/denoising/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from scheduler.diffusion import Choice, Diffusion, EosRule, Topology

_INF = float("inf")


class Parameter(NamedTuple):
    """A number of a method. Bounds are inclusive; is_integer: only whole numbers."""

    default: float
    low: float
    high: float
    meaning: str
    is_integer: bool = False


Methods = Mapping[str, Mapping[str, Parameter]]

_CONFIDENCE = "confidence from which a mask is fixed; above 1: only the surest of each step"

SELECTORS: Methods = {
    "auto": {
        "threshold": Parameter(0.9, 0.0, 2.0, "confidence to begin with"),
        "lowest": Parameter(0.6, 0.0, 2.0, "the request's own agreement never lowers it further"),
        "load": Parameter(0.0, 0.0, 1.0, "how far a full step may lower it; above 0 the text depends on the load"),
    },
    "sequential": {},
    "low_confidence": {},
    "random": {},
    "origin": {},
    "maskgit_plus": {"alg_temp": Parameter(0.0, 0.0, 100.0, "temperature of the choice of positions; 0 = the surest")},
    "topk_margin": {"alg_temp": Parameter(0.0, 0.0, 100.0, "temperature of the choice of positions; 0 = the surest")},
    "entropy": {"alg_temp": Parameter(0.0, 0.0, 100.0, "temperature of the choice of positions; 0 = the surest")},
    "threshold": {"threshold": Parameter(0.9, 0.0, 2.0, _CONFIDENCE)},
    "factor": {
        "factor": Parameter(1.0, 0.0, 100.0, "n masks are fixed while (n + 1)(1 - confidence of the n-th) < it")
    },
    "localleap": {
        "threshold": Parameter(0.9, 0.0, 2.0, "confidence of an anchor"),
        "relaxed": Parameter(0.75, 0.0, 2.0, "confidence near an anchor"),
        "radius": Parameter(4, 0, 1024, "positions that count as near", is_integer=True),
    },
    "entropy_threshold": {"entropy": Parameter(0.5, -1.0, 100.0, "nats up to which a mask is fixed")},
    "entropy_bounded": {"gamma": Parameter(0.35, 0.0, 100.0, "nats that the fixed masks may have together")},
    "dynamic": {
        "threshold": Parameter(0.85, 0.0, 2.0, "confidence; if fewer than the quota have it, the quota's best")
    },
    "hierarchy": {
        "threshold": Parameter(0.9, 0.0, 2.0, _CONFIDENCE),
        "low": Parameter(0.4, 0.0, 2.0, "confidence from which each run of masks fixes its best"),
    },
    "edit": {
        "threshold": Parameter(0.5, 0.0, 2.0, _CONFIDENCE),
        "edit_threshold": Parameter(0.9, 0.0, 2.0, "confidence from which a fixed token is replaced"),
        "max_post_edits": Parameter(16, 0, 256, "steps of a full block that only edit", is_integer=True),
    },
    "wino": {
        "wide": Parameter(0.6, 0.0, 2.0, "confidence from which a mask is fixed"),
        "narrow": Parameter(0.9, 0.0, 1.0, "confidence of the block's others below which it is masked again"),
    },
    "learn2pd": {"threshold": Parameter(0.96, 0.0, 2.0, "the filter's output from which a mask is fixed")},
}
"""Which masks of the window are fixed in a step; each fixes at least one."""

WITH_QUOTA = frozenset(
    {"sequential", "low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy", "dynamic"}
) | {"learn2pd"}
"""Selectors that `Diffusion.steps` means something to."""

PLANNERS: Methods = {
    "fixed": {},
    "sub_blocks": {"sub_block": Parameter(8, 1, 1024, "tokens of a sub-block, filled left to right", is_integer=True)},
    "adablock": {"threshold": Parameter(0.3, 0.0, 2.0, "confidence from which a delimiter ends the window")},
    "dsb": {
        "first": Parameter(4, 1, 4096, "width of the first window", is_integer=True),
        "most": Parameter(0, 0, 4096, "widest window; 0 = no bound", is_integer=True),
    },
    "masks": {"width": Parameter(16, 1, 4096, "the first so many masks anywhere (Elastic-Cache)", is_integer=True)},
}
"""Which part of a block may be fixed."""

CACHES: Methods = {
    "exact": {},
    "none": {},
    "prefix": {},
    "dual": {},
    "vicinity": {
        "margin": Parameter(16, 0, 4096, "positions beside the block that are computed too", is_integer=True),
        "warm_up": Parameter(4, 0, 256, "first steps of a block that compute all rows", is_integer=True),
    },
    "dsb": {"prefix": Parameter(24, 0, 4096, "rows before the window that are computed too", is_integer=True)},
    "dkv_decode": {"refresh": Parameter(8, 1, 4096, "steps between two that compute all rows", is_integer=True)},
    "dkv_greedy": {
        "refresh": Parameter(2, 1, 4096, "steps between two that compute all rows", is_integer=True),
        "window": Parameter(4, 0, 4096, "masks next to those just fixed that are computed too", is_integer=True),
    },
    "elastic": {
        "drift": Parameter(0.9, 0.0, 2.0, "similarity of attention below which all rows are computed; 0 = never"),
        "width": Parameter(16, 1, 4096, "masks whose rows are computed", is_integer=True),
    },
    "sub_block": {},
}
"""Which rows are computed. "exact" is the block-causal model's own cache and "none" computes every row; "sub_block"
(block-causal) computes only the rows of the window after the first step of a sub-block; all others are of
bidirectional models, and approximate."""

STOPPERS: Methods = {
    "eos": {},
    "eotp": {},
    "prophet": {
        "early": Parameter(7.5, -_INF, _INF, "mean logit gap to fill all masks at once in the first third"),
        "middle": Parameter(5.0, -_INF, _INF, "the same in the second third"),
        "late": Parameter(2.5, -_INF, _INF, "the same in the last third"),
    },
}
"""When it ends before every mask was chosen one by one."""

PARTS: Mapping[str, Methods] = {
    "selector": SELECTORS,
    "planner": PLANNERS,
    "cache": CACHES,
    "stopper": STOPPERS,
}


class Policy(NamedTuple):
    """A named combination. Parameters that differ from the parts' own defaults are in `values`.

    cache    "" = "exact" for block-causal models, "none" for bidirectional ones
    topology None = of either
    """

    selector: str
    planner: str = "fixed"
    cache: str = ""
    stopper: str = "eos"
    values: Mapping[str, float] = {}
    topology: Topology | None = None
    source: str = ""


_FB, _BC = Topology.BIDIRECTIONAL, Topology.BLOCK_CAUSAL

POLICIES: Mapping[str, Policy] = {
    "auto": Policy("auto", source="ours"),
    "sequential": Policy("sequential", source="leftmost mask, one a step"),
    "low_confidence": Policy("low_confidence", source="LLaDA"),
    "random": Policy("random", source="LLaDA"),
    "origin": Policy("origin", source="Dream"),
    "maskgit_plus": Policy("maskgit_plus", source="Dream"),
    "topk_margin": Policy("topk_margin", source="Dream"),
    "entropy": Policy("entropy", source="Dream"),
    "threshold": Policy("threshold", source="Fast-dLLM"),
    "factor": Policy("factor", source="Fast-dLLM"),
    "prefix": Policy("threshold", cache="prefix", topology=_FB, source="Fast-dLLM, prefix cache"),
    "dual": Policy("threshold", cache="dual", topology=_FB, source="Fast-dLLM, dual cache"),
    "localleap": Policy("localleap", source="LocalLeap"),
    "dparallel": Policy("entropy_threshold", source="dParallel"),
    "entropy_bounded": Policy("entropy_bounded", source="EB sampler; SDAR"),
    "sdar_static": Policy("low_confidence", topology=_BC, source="SDAR"),
    "sdar_dynamic": Policy("dynamic", topology=_BC, source="SDAR"),
    "llada2": Policy("threshold", values={"selector.threshold": 0.95}, topology=_BC, source="LLaDA2.0"),
    "llada2_edit": Policy("edit", topology=_BC, source="LLaDA2.1"),
    "hierarchy": Policy("hierarchy", source="dInfer"),
    "vicinity": Policy("threshold", cache="vicinity", topology=_FB, source="dInfer"),
    "wino": Policy("wino", source="WINO"),
    "learn2pd": Policy("learn2pd", stopper="eotp", source="Learn2PD + EoTP"),
    "prophet": Policy("low_confidence", stopper="prophet", source="Prophet"),
    "adablock": Policy("threshold", planner="adablock", source="AdaBlock"),
    "dsb": Policy("threshold", planner="dsb", source="DSB"),
    "dsb_cache": Policy("threshold", planner="dsb", cache="dsb", topology=_FB, source="DSB with its cache"),
    "fast_dllm_v2": Policy("threshold", planner="sub_blocks", topology=_BC, source="Fast-dLLM v2"),
    "fast_dllm_v2_cache": Policy(
        "threshold", planner="sub_blocks", cache="sub_block", topology=_BC, source="Fast-dLLM v2, sub-block cache"
    ),
    "dkv_decode": Policy("low_confidence", cache="dkv_decode", topology=_FB, source="dKV-Cache-Decode"),
    "dkv_greedy": Policy("random", cache="dkv_greedy", topology=_FB, source="dKV-Cache-Greedy"),
    "elastic": Policy("threshold", planner="masks", cache="elastic", topology=_FB, source="Elastic-Cache"),
}


class BadPolicy(ValueError):
    """A policy that cannot be had; `field` is the key of the `decoding` object to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def make_diffusion(
    policy: str,
    topology: Topology,
    parts: Mapping[str, str] | None = None,
    values: Mapping[str, float] | None = None,
    **settings: object,
) -> Diffusion:
    """A policy by name, some of its parts replaced and some of its parameters set.

    parts     {"selector" | "planner" | "cache" | "stopper": name of a method}
    values    {parameter: number}; "part.parameter" where two parts have one of that name
    settings  the other fields of `Diffusion`
    Raises BadPolicy for an unknown name, a number out of bounds, a parameter that no part has or that two have, and
    parts that do not go together or not with the topology.
    """
    if policy not in POLICIES:
        raise BadPolicy("policy", f"policy is {policy}, but must be one of {', '.join(POLICIES)}")
    entry = POLICIES[policy]
    if entry.topology not in (None, topology):
        raise BadPolicy("policy", f"policy is {policy}, which is for {entry.topology} models; this one is {topology}")
    names = {
        "selector": entry.selector,
        "planner": entry.planner,
        "cache": entry.cache or ("exact" if topology is _BC else "none"),
        "stopper": entry.stopper,
    }
    names |= dict(parts or {})
    for part, name in names.items():
        if part not in PARTS or name not in PARTS[part]:
            raise BadPolicy(part, f"{part} is {name}, but must be one of {', '.join(PARTS.get(part, PARTS))}")
    given = {name: value for name, value in entry.values.items() if _owners(name, names)} | dict(values or {})
    chosen = _place(names, given)
    _check_together(names, topology)
    selector, planner, cache, stopper = (
        Choice(names[part], tuple(chosen[part].items())) for part in ("selector", "planner", "cache", "stopper")
    )
    return Diffusion(policy, selector, planner, cache, stopper, **settings)  # type: ignore[arg-type]


def _owners(parameter: str, names: Mapping[str, str]) -> list[str]:
    part, _, bare = parameter.rpartition(".")
    return [p for p, name in names.items() if bare in PARTS[p][name] and part in ("", p)]


def _place(names: Mapping[str, str], given: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """All parameters of the chosen methods, defaults and what is given."""
    chosen = {part: {key: p.default for key, p in PARTS[part][name].items()} for part, name in names.items()}
    for parameter, value in given.items():
        owners = _owners(parameter, names)
        if len(owners) != 1:
            known = sorted(key for part in chosen.values() for key in part)
            problem = f"belongs to {' and '.join(owners)}; write e.g. {owners[0]}.{parameter}" if owners else (
                f"is no parameter here; there are {', '.join(known) or 'none'}"
            )  # fmt: skip
            raise BadPolicy(parameter, f"{parameter} {problem}")
        bare = parameter.rpartition(".")[2]
        rule = PARTS[owners[0]][names[owners[0]]][bare]
        if not rule.low <= value <= rule.high or (rule.is_integer and value != int(value)):
            kind = "a whole number" if rule.is_integer else "a number"
            raise BadPolicy(parameter, f"{parameter} is {value}, but must be {kind} from {rule.low:g} to {rule.high:g}")
        chosen[owners[0]][bare] = value
    return chosen


def _check_together(names: Mapping[str, str], topology: Topology) -> None:
    cache = names["cache"]
    if topology is _BC and cache not in ("exact", "sub_block"):
        raise BadPolicy("cache", f"cache is {cache}, which is for bidirectional models; this one's cache is exact")
    if topology is _FB and cache in ("exact", "sub_block"):
        raise BadPolicy("cache", f"cache is {cache}, which is for block_causal models; a bidirectional one has none")
    if cache == "sub_block" and names["planner"] != "sub_blocks":
        raise BadPolicy("cache", f"cache is sub_block, which goes with planner sub_blocks, not {names['planner']}")
    if cache == "dkv_greedy" and names["selector"] != "random":
        raise BadPolicy("cache", f"cache is dkv_greedy, which goes with selector random, not {names['selector']}")
    if names["selector"] in ("edit", "wino") and (cache not in ("exact", "none") or names["stopper"] != "eos"):
        raise BadPolicy("selector", f"selector is {names['selector']}, which goes with no approximate cache or stopper")


def plain(policy: str = "sequential", topology: Topology = _BC) -> Diffusion:
    """A policy with its own defaults."""
    return make_diffusion(policy, topology, eos=EosRule.FREE)


def table() -> str:
    """The policies as a Markdown table."""
    lines = ["| policy | selector | planner | cache | stopper | source |", "| --- | --- | --- | --- | --- | --- |"]
    for name, p in POLICIES.items():
        selector = p.selector + "".join(f", {key.rpartition('.')[2]} {value:g}" for key, value in p.values.items())
        lines.append(
            f"| `{name}` | {selector} | {p.planner} | {p.cache or 'exact / none'} | {p.stopper} | {p.source} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
