"""Every case there is, and how a command line picks among them."""

from __future__ import annotations

from . import (
    bench_attention,
    bench_dit_block,
    bench_modulation,
    bench_nearest_code,
    bench_noise,
    bench_qk_norm_rope,
    bench_scheduler_step,
    bench_vector_quantize,
)
from .case import Case, key

CASES: tuple[Case, ...] = (
    *bench_nearest_code.CASES,
    *bench_vector_quantize.CASES,
    *bench_modulation.CASES,
    *bench_attention.CASES,
    *bench_qk_norm_rope.CASES,
    *bench_dit_block.CASES,
    *bench_noise.CASES,
    *bench_scheduler_step.CASES,
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def find_case(wanted: str) -> Case:
    for case in CASES:
        if key(case) == wanted:
            return case
    raise KeyError(f"no case {wanted!r}")


def select_cases(ops: list[str], shapes: list[str], *, quick: bool) -> list[Case]:
    """Cases of `ops` whose name or key contains one of `shapes`.

    Without `shapes` the default selection (or the quick one); `all` takes every shape.

    Raises:
        ValueError: an unknown op, or nothing matches.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"ops must be among {', '.join(OPS)}, got {', '.join(unknown)}")

    def chosen(case: Case) -> bool:
        if not shapes:
            return case.quick if quick else case.default
        return "all" in shapes or any(part in key(case) for part in shapes)

    cases = [case for case in CASES if (not ops or case.op in ops) and chosen(case)]
    if not cases:
        names = ", ".join(dict.fromkeys(case.name for case in CASES))
        raise ValueError(f"no case matches shapes {', '.join(shapes)}; there are {names}")
    return cases
