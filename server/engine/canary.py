"""Proof that an adapter in the pool does what its files say, before any request runs on it.

A fixed prompt goes through the model twice in one pass: tokens whose low-rank term comes from the pool, as in
serving, and tokens whose term is W's delta computed here from the files: scaling · (x Aᵀ) Bᵀ in float32, module by
module. The base's products are shared. Only the reading of the file is shared with the loader: which tensor belongs
to which layer, the scaling, the slices of fused products and the rows of the pool are established here anew.

Compared are each projection's term on the same input, which no noise of the base hides, and the logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.layout import AdapterHead, layout_of, read_head
from adapters.patterns import PatternCompiler
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE, Limits, opened, parse_header, parse_json
from server.errors import CanaryFailed
from server.kernels import silu_mul
from server.lora.batch import LowRankTerm, TokenSpan, build_lora_batch
from server.lora.pace import Pace
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import read_tensors
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.transformer import Transformer

PROMPT_LENGTH = 4
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far serving may be off: a projection's term relative to the norm of what it is a sum of, and the logits
    relative to the largest. Rounding takes a tenth of it; one lost rank row of 128 is 0.09 of a term."""

    term: float
    logits: float


TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.float16: Tolerance(5e-3, 3e-2),
    torch.bfloat16: Tolerance(3e-2, 1e-1),
}


class Canary:
    """Checks adapters in rows that no sequence holds yet. Runs on a loader's thread, with KV of its own and, all but
    the model's pass, in a stream of its own; what computes keeps to `pace`."""

    def __init__(
        self,
        model: Transformer,
        pool: AdapterPool,
        max_model_len: int,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._model = model
        self._pool = pool
        embedding = model.weights.embedding
        self._dtype, self._device = embedding.dtype, embedding.device
        self._length = min(PROMPT_LENGTH, max_model_len)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def check(self, directory: Path, ranges: Ranges) -> None:
        """Raises CanaryFailed if what the pool's rows compute is not what the files say, InvalidAdapter if these are no
        adapter of the base any more."""
        files = _Files.read(directory)  # what waits for a disk holds up nobody's turn
        with torch.cuda.stream(self._stream), self._pace:  # None: no stream
            layout_of(files.head, self._model.spec.linears())
            self._compare(directory, Reference.of(files, self._device, self._pace), ranges)

    def _compare(self, directory: Path, reference: "Reference", ranges: Ranges) -> None:
        n, tolerance = self._length, TOLERANCES[self._dtype]
        served = build_lora_batch(self._pool, [], [TokenSpan(n, ranges), TokenSpan(n, None)])
        assert served is not None, "an adapter has rows"
        both = _Both(n, self._pool, served, reference, self._pace)
        logits = self._logits(both).float()
        faults = both.faults(tolerance.term)
        off, largest = float((logits[0] - logits[1]).abs().max()), float(logits[1].abs().max())
        if not off <= tolerance.logits * largest:
            faults.append(f"logits: off by {off:.3g} where the largest is {largest:.3g}")
        if faults:
            more = f" … ({len(faults)} in all)" if len(faults) > 3 else ""
            raise CanaryFailed(
                f"{directory.name}: what the loaded adapter computes is not what its files say: "
                f"{'; '.join(faults[:3])}{more}",
                faults=faults,
            )

    def _logits(self, lora: "_Both") -> Tensor:
        """[2, vocab] for the prompt's last token, served and by reference: two sequences of one step."""
        n = self._length
        spec = self._model.spec
        ids = [(7919 * i + 104_729) % spec.vocab_size for i in range(n)]
        cache = KVCache.allocate(spec, 2, n, self._dtype, self._device)
        chunks = [AttentionChunk(0, n, [0]), AttentionChunk(0, n, [1])]
        batch = ForwardBatch(
            input_ids=torch.tensor(ids * 2, device=self._device),
            positions=torch.arange(n, device=self._device).repeat(2),
            slots=torch.arange(2 * n, device=self._device),
            sample_index=torch.tensor([n - 1, 2 * n - 1], device=self._device),
            attention=TorchAttention(spec.softmax_scale, spec.num_kv_heads, n, self._device).plan([], chunks),
            lora=lora,
        )
        return self._forward(batch, cache)

    def _forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """On a GPU in the step loop's stream, between its kernels: the blocks of threads of a 4-bit product meet at
        counters that there are one set of for each weight."""
        if self._stream is None:
            return self._model.forward(batch, cache)
        loop = torch.cuda.default_stream(self._device)
        loop.wait_stream(self._stream)
        with torch.cuda.stream(loop):
            logits = self._model.forward(batch, cache)
        self._stream.wait_stream(loop)
        return logits


@dataclass(frozen=True, slots=True)
class _Module:
    """A [r, in] of the file, and scaling · B [out, r]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class _Files:
    """What an adapter's files hold now; the loader has validated what they held then."""

    head: AdapterHead
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> "_Files":
        with opened(directory / CONFIG_FILE) as config_fd, opened(directory / WEIGHTS_FILE) as fd:
            head = read_head(config_fd, fd)
            return cls(head, read_tensors(fd, parse_header(head.weights, Limits())))


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter by module path, straight from its files."""

    modules: Mapping[str, _Module]

    @classmethod
    def of(cls, files: _Files, device: torch.device, pace: Pace) -> "Reference":
        config, tensors = parse_json(files.head.config, CONFIG_FILE), files.tensors
        alpha_of = _alphas(config)
        modules: dict[str, _Module] = {}
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                b, rank = tensors[f"{path}.lora_B.weight"], a.shape[0]
                path = path.removeprefix(_PREFIX)
                scaling = alpha_of(path) / (math.sqrt(rank) if config.get("use_rslora") else rank)
                modules[path] = _Module(a.to(device).float(), b.to(device).float() * scaling)
                pace.breathe()
        return cls(modules)

    def term(self, x: Tensor, paths: Sequence[str], widths: Sequence[int]) -> Tensor:
        """x [n, in] → [n, sum(widths)] float32: the deltas of projections that share an input, side by side."""
        parts = []
        for path, width in zip(paths, widths, strict=True):
            module = self.modules.get(path)
            if module is None:
                parts.append(x.new_zeros(len(x), width))
            else:
                parts.append(x @ module.a.t() @ module.b.t())
        return torch.cat(parts, dim=1)


def _alphas(config: Mapping[str, Any]) -> Callable[[str], float]:
    """module path → lora_alpha, by PEFT's rule: the first pattern that matches the end of the path, at a dot."""
    given: Mapping[str, float] = config.get("alpha_pattern") or {}
    alphas, first = list(given.values()), PatternCompiler().compile_keys(list(given))
    default: float = config.get("lora_alpha", 8)
    return lambda path: default if (at := first(path)) is None else alphas[at]


class _Both:
    """The low-rank terms of the two halves of a batch of 2 · n tokens: from the pool, and by reference."""

    def __init__(self, n: int, pool: AdapterPool, served: LowRankTerm, reference: Reference, pace: Pace) -> None:
        self._n = n
        self._pace = pace
        self._served = served
        self._reference = reference
        self._smallest = torch.finfo(pool.dtype).smallest_normal
        self._groups = {name: group.group for name, group in pool.groups.items()}
        self._seen: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        n = self._n
        served = torch.zeros_like(y)
        self._served.add(served, x, group, layer)
        exact = self._reference.term(x.float(), self._paths(group, layer), self._groups[group].widths)
        self._seen[group, layer] = served[:n] - exact[:n], exact[:n], x[:n].clone()
        y[:n] += served[:n]
        y[n:] += exact[n:].to(y.dtype)
        self._pace.breathe()

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """See `LowRankTerm`."""
        self.add(y, x, "gate_up", layer)
        return silu_mul(y)

    def faults(self, tolerance: float) -> list[str]:
        """The projections that are off by more than `tolerance`, each with how much."""
        found: list[str] = []
        for (group, layer), (off, exact, x) in self._seen.items():
            self._pace.breathe()
            widths = list(self._groups[group].widths)
            parts = zip(off.split(widths, dim=1), exact.split(widths, dim=1), strict=True)
            norms = torch.stack([part.norm() for pair in parts for part in pair]).tolist()
            for path, error, norm in zip(self._paths(group, layer), norms[::2], norms[1::2], strict=True):
                if not error <= tolerance * norm:
                    norm = self._norm_of_parts(path, x.float(), off.shape[1])
                    if not error <= tolerance * norm:
                        found.append(f"{path}: off by {error:.3g} of {norm:.3g}")
        return found

    def _norm_of_parts(self, path: str, x: Tensor, width: int) -> float:
        """The norm that a term would have if what its rank rows contribute did not cancel, and no less than what the
        dtype cannot tell from zero."""
        smallest = self._smallest * math.sqrt(len(x) * width)
        module = self._reference.modules.get(path)
        if module is None:
            return smallest
        squares = float((x @ module.a.t()).square().sum(0) @ module.b.square().sum(0))
        return max(smallest, math.sqrt(squares))

    def _paths(self, group: str, layer: int) -> list[str]:
        return [f"model.layers.{layer}.{module}" for module in self._groups[group].modules]
