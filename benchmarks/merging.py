"""What merging an adapter costs in time, memory and accuracy; one JSON line for each base format and adapter.

    python -m benchmarks.merging --store DIR [--model DIR] [--format bfloat16 nf4 …] [--device cpu] NAME OTHER

NAME is merged. On a text of `tokens` tokens, next-token distributions are compared with those of unmerged serving on
the same base, and the likeliest tokens: `merged` are NAME's, `base` and `other` (OTHER's) are compensated. KL is in
nats, the mean and the largest over the text. For scale, `dtype_kl` compares the base in this dtype with float32, and
`adapter_kl` the base without NAME with NAME unmerged.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adapters.stores import open_store
from benchmarks.live import surroundings
from server.base.quantization import QUANT_TYPES, Quantization
from server.base.resolve import BaseModel, resolve_base
from server.engine.merging import BaseMerger, divergence, probe_logits
from server.engine.messages import MergeReport
from server.frontend.merging import PROBE_TEXT
from server.frontend.tokenizer import Tokenizer
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import load_adapter
from server.model.loader import DTYPES, load_weights
from server.model.transformer import Transformer

POOL_BYTES = 1 << 28
TEXT = Path(__file__).parent.parent / "docs" / "architecture.md"


class Subject:
    """A base in one format, with two adapters in memory."""

    def __init__(self, base: BaseModel, name: str, device: torch.device, adapters: list[Path]) -> None:
        quantization = Quantization(name) if name in QUANT_TYPES else None
        self._dtype = torch.bfloat16 if quantization else DTYPES[name]
        weights = load_weights(base.path, base.spec, self._dtype, device, quantization)
        self.model = Transformer(base.spec, weights, base.spec.max_position)
        self.pool = AdapterPool(base.spec, POOL_BYTES, self._dtype, device)
        self.rows = [self._load(base, path) for path in adapters]

    def logits(self, tokens: list[int], rows: Ranges | None = None) -> Tensor:
        return probe_logits(self.model, tokens, build_lora_batch(self.pool, [], [TokenSpan(len(tokens), rows)]))

    def _load(self, base: BaseModel, path: Path) -> Ranges:
        packed = load_adapter(path, base.spec, self._dtype)
        rows = self.pool.allocate(packed.rank)
        assert rows is not None, "the pool has room"
        self.pool.write(rows, packed)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs=2, metavar="NAME", help="the adapter that is merged, and another")
    parser.add_argument("--store", help="where they are published")
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--format", nargs="+", default=["bfloat16", "nf4"], help=f"dtypes and {', '.join(QUANT_TYPES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    base, store = resolve_base(args.model), open_store(args.store)
    device = torch.device(args.device)
    versions = [store.resolve(name) for name in args.adapters]
    tokenizer = Tokenizer.load(base.path)
    text = TEXT.read_text()
    tokens = tokenizer.encode_text(text, len(text))[: args.tokens]
    probe = tokenizer.encode_text(PROBE_TEXT, len(PROBE_TEXT))
    exact = Subject(base, "float32", device, []).logits(tokens)
    for name in args.format:
        subject = Subject(base, name, device, [version.path for version in versions])
        result = measure(subject, tokens, probe)
        kl, largest = divergence(exact, subject.logits(tokens))
        case: dict[str, object] = {"bench": "merging", "format": name, "device": args.device, "tokens": len(tokens)}
        case |= {"ranks": [version.manifest.rank for version in versions]}
        case |= result | {"dtype_kl": kl, "dtype_largest_kl": largest}
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in case.items()}
        print(json.dumps(rounded | surroundings()), flush=True)


def measure(subject: Subject, tokens: list[int], probe: list[int]) -> dict[str, object]:
    mine, other = subject.rows
    merger = BaseMerger(subject.model, subject.pool, lambda: 1 << 62)
    unmerged = {"base": subject.logits(tokens), "merged": subject.logits(tokens, mine)}
    unmerged["other"] = subject.logits(tokens, other)
    before = merger.digest()
    (*_, report), merge_seconds = timed(lambda: list(merger.merge(mine, probe, force=True)))
    assert isinstance(report, MergeReport)
    subject.pool.negate(mine)
    found = {"base": subject.logits(tokens, mine), "merged": subject.logits(tokens)}
    found["other"] = subject.logits(tokens, mine + other)
    _, unmerge_seconds = timed(lambda: list(merger.unmerge()))
    subject.pool.negate(mine)
    assert merger.digest() == before, "the base has its own weights back"
    result: dict[str, object] = {
        "merge_s": merge_seconds,
        "unmerge_s": unmerge_seconds,
        "held_bytes": report.held_bytes,
        "probe_kl": report.kl,
        "probe_largest_kl": report.largest_kl,
        "largest_weight_error": max(layer.weight for layer in report.layers),
        "largest_delta_error": max(layer.delta for layer in report.layers),
        "adapter_kl": divergence(unmerged["merged"], unmerged["base"])[0],
    }
    for way, logits in found.items():
        kl, largest = divergence(unmerged[way], logits)
        same = (unmerged[way].argmax(-1) == logits.argmax(-1)).float().mean()
        result |= {f"{way}_kl": kl, f"{way}_largest_kl": largest, f"{way}_same_token": float(same)}
    return result


def timed(work: Callable[[], list[object]]) -> tuple[list[object], float]:
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


if __name__ == "__main__":
    main()
