"""The net is tested: kernels that are broken in one place each must be caught."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from cases import cases
from cuda_calls import CudaCalls
from emulator import BUILD, CSRC, KERNELS, Emulator, modes

if modes() == ["asan"]:
    pytest.skip("planted faults are looked for in the race build", allow_module_level=True)


@dataclass(frozen=True)
class Fault:
    """`before`, which stands once in `file`, becomes `after`; `caught` is part of the report, or
    empty where results are wrong and nothing else is."""

    name: str
    file: str
    before: str
    after: str
    caught: str = ""

    def __str__(self) -> str:
        return self.name


FAULTS = (
    Fault(
        "tail of row terms",
        "search_tiles.h",
        "from[min(first_row + row, call.rows - 1)]",
        "from[min(first_row + row, call.rows)]",
        "out of bounds",
    ),
    Fault(
        "tail of records",
        "search_tiles.h",
        "row < kRows && first_row + row < call.rows",
        "row < kRows && first_row + row <= call.rows",
        "out of bounds",
    ),
    Fault(
        "tail of codes",
        "prepare.h",
        "if (code < size) sums",
        "if (code <= size) sums",
        "out of bounds",
    ),
    Fault(
        "fragment of B",
        "search_tiles.h",
        "b_row = lane % 8 + lane / 16 * 8, b_piece = step * 2 + lane / 8 % 2",
        "b_row = lane % 16, b_piece = step * 2 + lane / 16",
    ),
    Fault(
        "fragment of A",
        "search_tiles.h",
        "a_piece = step * 2 + lane / 16;",
        "a_piece = step * 2 + lane / 8 % 2;",
    ),
    Fault(
        "row of a score",
        "search_tiles.h",
        "return scores[slot / 2][number / 2][slot % 2 * 2 + number % 2];",
        "return scores[slot / 2][number / 2][number % 2 * 2 + slot % 2];",
    ),
    Fault(
        "row of a score of warpgroups",
        "search_warpgroups.h",
        "return scores[half][number / 2 * 4 + slot * 2 + number % 2];",
        "return scores[half][number / 2 * 4 + number % 2 * 2 + slot];",
    ),
    Fault(
        "a wait for the phase before",
        "search_warpgroups.h",
        "int stage = 0, parity = 0;",
        "int stage = 0, parity = 1;",
        "missing wait for a copy",
    ),
    Fault(
        "a load too early",
        "search_warpgroups.h",
        "start_load(tile + kStages);",
        "start_load(tile + kStages - 1);",
        "more arrivals than it has places",
    ),
    Fault(
        "permutation of tiles",
        "prepare.h",
        "column % kChunk / kPiece ^ (code & 7)",
        "column % kChunk / kPiece ^ (code & 3)",
    ),
    Fault("a part of the bias", "prepare.h", "if (lane == part) part", "if (lane == 0) part"),
    Fault(
        "permutation of shared memory",
        "search_tiles.h",
        "to + row * kChunkBytes + ((piece ^ (row & 7)) << 4)",
        "to + row * kChunkBytes + ((piece ^ (row & 3)) << 4)",
    ),
    Fault("a stage too many", "search_tiles.h", "stage + 1 == stages", "stage == stages"),
    Fault(
        "no bound",
        "candidates.h",
        "fmaf(row.error, code.norm, fmaf(row.norm, code.error, of_bias))",
        "of_bias",
    ),
    Fault(
        "codes that are not named",
        "candidates.h",
        "open(slot, thread) = fmaxf(open(slot, thread), fminf(second, high));",
        "",
    ),
    Fault(
        "first of equals",
        "decide.h",
        "(bad == badness && code < index)",
        "(bad == badness && code > index)",
    ),
    Fault("slots of a tile", "decide.h", "slot / 4 * 64 + i % kSlotCodes", "i % kSlotCodes"),
    Fault(
        "loss of the last group",
        "quantize.cu",
        "other = 1; other < groups;",
        "other = 1; other < groups - 1;",
    ),
    Fault("code over two chunks", "quantize.cu", "if (goes_on && !began_before)", "if (false)"),
    Fault("row of keys", "attention_tiles.h", "lane % 8 + lane / 16 * 8", "lane % 16"),
    Fault(
        "fragment of keys", "attention_tiles.h", "step * 2 + lane / 8 % 2", "step * 2 + lane / 16"
    ),
    Fault(
        "fragment of values", "attention_tiles.h", "pair * 2 + lane / 16", "pair * 2 + lane / 8 % 2"
    ),
    Fault(
        "last eight columns of queries",
        "attention_tiles.h",
        "queries + Tile::at(m * 16 + lane % 16, Tile::kPieces - 1)",
        "queries + Tile::at(m * 16 + lane % 16, Tile::kPieces - 2)",
    ),
    Fault(
        "row behind the last key",
        "attention_tiles.h",
        "const bool inside = first + row < end;",
        "const bool inside = first + row <= end;",
        "out of bounds",
    ),
    Fault("key behind the last", "attention.cu", "place.key(n, i) >= end", "place.key(n, i) > end"),
    Fault("diagonal", "attention.cu", "min(place.query(slot) + 1,", "min(place.query(slot),"),
    Fault(
        "mask of a row that is none",
        "attention.cu",
        "min(place.query(slot), call.queries - 1)",
        "place.query(slot)",
        "out of bounds",
    ),
    Fault("head of keys", "attention.cu", "head / (call.heads / call.key_heads)", "head / 4"),
    Fault(
        "sum that does not fade",
        "attention.cu",
        "total[slot] = fmaf(total[slot], faded, sum);",
        "total[slot] += sum;",
    ),
    Fault("values that do not fade", "attention.cu", "out[m][n][first] *= faded;", ""),
    Fault("row that sees no key", "attention.cu", "risen == -INFINITY ? 0.0f : risen;", "risen;"),
    Fault("ring of tiles", "attention.cu", "read_slot + 1 == kSlots", "read_slot + 2 == kSlots"),
    Fault(
        "row behind the last query",
        "attention.cu",
        "if (query >= call.queries) break;",
        "if (query > call.queries) break;",
        "out of bounds",
    ),
    Fault(
        "row behind a span",
        "modulation_rows.h",
        "end = start + min(first + tiles.rows, tiles.length);",
        "end = start + first + tiles.rows;",
    ),
    Fault("vector of a frame", "modulation_rows.h", "tile.begin / unsigned(vectors.each)", "0"),
    Fault(
        "piece behind the last",
        "modulation_rows.h",
        "if (i < kWhole || column < width) f(i, column);",
        "f(i, column);",
        "out of bounds",
    ),
    Fault(
        "pieces that memory does not align",
        "modulation_rows.h",
        "of->data == nullptr || are_packed(of->data, of->dtype, of->strides, count)",
        "true",
        "misaligned",
    ),
    Fault("turns of row sums", "modulation_rows.h", "turn_ ^= 1;", "", "race"),
    Fault("last warp of a row", "modulation_rows.h", "lane < warps_ ?", "lane < 2 ?"),
    Fault("what is left of the mean", "ada_layer_norm.cu", "-left * inverse", "left * inverse"),
    Fault(
        "sum before it is rounded",
        "ada_layer_norm.cu",
        "values[i][e] = element(rounded<T>(sum));",
        "values[i][e] = sum;",
    ),
    Fault("row ahead", "ada_layer_norm.cu", "fetch(token + blockDim.y)", "fetch(token)"),
    Fault(
        "row ahead of a gradient",
        "ada_layer_norm_backward.cu",
        "fetch(token + blockDim.y)",
        "fetch(token)",
    ),
    Fault("bias under the scale", "ada_layer_norm.cu", "fmaf(bias[e], ones[e]", "fmaf(bias[e], 1"),
    Fault(
        "gradient that passes by",
        "ada_layer_norm_backward.cu",
        "fmaf(centered, inverse, others[e])",
        "centered * inverse",
    ),
    Fault(
        "sums of the last group",
        "ada_layer_norm_backward.cu",
        "group < int(blockDim.y); ++group",
        "group < int(blockDim.y) - 1; ++group",
    ),
    Fault(
        "a gradient that is no one chunk's",
        "ada_layer_norm_backward.cu",
        "if (alone && rows / of.each == tiles.count)",
        "if (alone)",
    ),
    Fault(
        "share behind the last chunk",
        "modulation_sums.h",
        "first + min((share + 1) * each, total.chunks)",
        "first + (share + 1) * each",
    ),
    Fault(
        "bias of a scale's gradient",
        "modulation_sums.h",
        "fmaf(beside, element_of",
        "fmaf(1, element_of",
    ),
)


def _is_of_modulation(fault: Fault) -> bool:
    return fault.file.startswith(("ada_layer_norm", "modulation"))


def _planted(fault: Fault) -> Emulator:
    """The kernels with this fault in them, compiled once for each text of the file."""
    text = (CSRC / "cuda" / fault.file).read_text()
    assert text.count(fault.before) == 1, f"{fault.before!r} is not once in {fault.file}"
    text = text.replace(fault.before, fault.after)
    copy = BUILD / "planted" / hashlib.sha256(text.encode()).hexdigest()[:16]
    shutil.copytree(CSRC, copy, dirs_exist_ok=True)
    (copy / "cuda" / fault.file).write_text(text)
    changed = {"quantize.cu"}
    if fault.file.startswith("attention"):
        changed = {"attention.cu"}
    elif _is_of_modulation(fault):
        changed = {"ada_layer_norm.cu", "ada_layer_norm_backward.cu"}
    elif fault.file != "quantize.cu":
        changed = {"nearest_code.cu", "search_warpgroups.cu"}
    sources = [copy / "cuda" / path.name if path.name in changed else path for path in KERNELS]
    return Emulator("race", tuple(sources))


@pytest.fixture(scope="module")
def emulators() -> dict[str, Emulator]:
    Emulator("race")  # so that what all share is compiled once
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(_planted, FAULTS), strict=True))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(emulators: dict[Fault, Emulator], fault: Fault) -> None:
    emulator = emulators[fault]
    emulator.set_order("reverse")
    found = ""
    of_attention = fault.file.startswith("attention")
    of_modulation = _is_of_modulation(fault)
    for case in cases():
        if case.name.startswith("attention") != of_attention:
            continue
        if case.name.startswith("modulation") != of_modulation:
            continue
        try:
            case.run(CudaCalls(emulator.library, emulator.declare, case.device))
        except (AssertionError, RuntimeError) as error:
            found = f"{case.name}: {type(error).__name__} {error}"
            break
        finally:
            emulator.forget()
    emulator.release()
    assert found, "every case passed"
    assert fault.caught in found
