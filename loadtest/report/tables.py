"""A comparison's numbers as tables of text: a head and rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.metrics.plot import size_text

Report = Mapping[str, Any]

COMPARED = (  # a mode, against another, and what that tells
    ("lora-16", "base-16", "adapters on the 16-bit base"),
    ("merged-16", "base-16", "a merged adapter on the 16-bit base"),
    ("base-4", "base-16", "4 bits instead of 16, no adapter"),
    ("lora-4", "base-4", "adapters on the 4-bit base"),
    ("merged-4", "base-4", "a merged adapter on the 4-bit base"),
    ("lora-4", "lora-16", "QLoRA instead of LoRA"),
)

# A change below it is none: what two runs of one mode differ by.
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is text, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def speed(report: Report) -> Table:
    """Throughput, how many requests it and the percentiles are of, and these, of each mode at each load."""
    head: tuple[str, ...] = ("mode", "users", "tokens/s", "requests/s", "requests")
    times = [(key, share) for key in ("ttft_seconds", "tpot_seconds") for share in ("p50", "p95", "p99")]
    head += tuple(f"{key[:4].upper()} {share}, ms" for key, share in times)
    rows = []
    for mode in report["modes"]:
        for load in mode["loads"]:
            rates = (f"{load['output_tokens_per_second']:.1f}", f"{load['requests_per_second']:.2f}")
            latencies = tuple(milliseconds(load, key, share) for key, share in times)
            failed = sum(load["failures"].values())
            rows.append((mode["title"], str(load["users"]), *rates, str(load["requests"]), *latencies, str(failed)))
    return Table((*head, "failed"), tuple(rows))


def generator(report: Report) -> Table:
    """What the load generator did against a server that computes nothing: the most that it can measure."""
    rows = [
        (
            str(load["users"]),
            f"{load['output_tokens_per_second']:.0f}",
            milliseconds(load, "ttft_seconds", "p50"),
            milliseconds(load, "tpot_seconds", "p50"),
        )
        for load in report["echo"]
    ]
    return Table(("users", "tokens/s", "TTFT p50, ms", "TPOT p50, ms"), tuple(rows))


def costs(report: Report) -> Table:
    """Each pair of `COMPARED` that was measured, at each load: how throughput and time per token change."""
    modes = {mode["name"]: mode for mode in report["modes"]}
    rows = []
    for name, other, title in COMPARED:
        if name not in modes or other not in modes:
            continue
        for load, against in zip(modes[name]["loads"], modes[other]["loads"], strict=True):
            throughput = _change(load["output_tokens_per_second"], against["output_tokens_per_second"])
            times = [found["tpot_seconds"].get("p50", 0.0) for found in (load, against)]
            first = [found["ttft_seconds"].get("p50", 0.0) for found in (load, against)]
            rows.append((title, str(load["users"]), throughput, _change(*times), _change(*first)))
    return Table(("what is changed", "users", "tokens/s", "TPOT p50", "TTFT p50"), tuple(rows))


def four_bits(report: Report) -> Table:
    """Is it slower to serve from 4 bits? Each use of the base at each load, in both; no rows where only one was
    measured."""
    found = {(mode["use"], mode["bits"]): mode["loads"] for mode in report["modes"]}
    rows = []
    for use in dict.fromkeys(mode["use"] for mode in report["modes"]):
        for wide, narrow in zip(found.get((use, 16), ()), found.get((use, 4), ()), strict=False):
            tokens = tuple(f"{load['output_tokens_per_second']:.1f}" for load in (wide, narrow))
            times = tuple(milliseconds(load, "tpot_seconds", "p50") for load in (wide, narrow))
            rows.append((use, str(wide["users"]), *tokens, *times, _verdict(wide, narrow)))
    columns = tuple(f"{what}, {bits}-bit" for what in ("tokens/s", "TPOT p50, ms") for bits in (16, 4))
    return Table(("requests for", "users", *columns, "4-bit is"), tuple(rows))


def memory(report: Report) -> Table:
    """Bytes by kind, at each mode's last load."""
    kinds = list(dict.fromkeys(kind for mode in report["modes"] for kind in _memory(mode)))
    rows = []
    for mode in report["modes"]:
        found = _memory(mode)
        rows.append((mode["title"], *(size_text(found[kind]) if kind in found else "–" for kind in kinds)))
    return Table(("mode", *kinds), tuple(rows))


def device_memory(report: Report) -> list[tuple[str, list[tuple[str, float]]]]:
    """What the engine holds on its device, by kind, of each mode: for a bar."""
    skipped = ("resident", "gpu")
    return [
        (mode["title"], [(kind, size) for kind, size in _memory(mode).items() if not kind.startswith(skipped)])
        for mode in report["modes"]
    ]


def milliseconds(load: Mapping[str, Any], key: str, share: str) -> str:
    value = load[key].get(share)
    return "–" if value is None else f"{value * 1000:.1f}"


def _verdict(wide: Mapping[str, Any], narrow: Mapping[str, Any]) -> str:
    """By tokens a second and by the median time per token; changes within NOISE count as none."""
    times = [load["tpot_seconds"].get("p50") for load in (wide, narrow)]
    tokens = [load["output_tokens_per_second"] for load in (narrow, wide)]
    if not all((*times, *tokens)):
        return "–"
    gains = {(gain > 1 + NOISE) - (gain < 1 - NOISE) for gain in (times[0] / times[1], tokens[0] / tokens[1])}
    if gains == {1, -1}:
        return "slower in one of them"
    return "faster" if 1 in gains else "slower" if -1 in gains else "as fast"


def _memory(mode: Mapping[str, Any]) -> dict[str, int]:
    return dict(mode["loads"][-1]["memory_bytes"]) if mode["loads"] else {}


def _change(value: float, against: float) -> str:
    return f"{(value / against - 1) * 100:+.1f} %" if against and value else "–"
