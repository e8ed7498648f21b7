"""The base's weights with one adapter in them, and back again bit for bit.

W' = W + scaling · B A (Hu et al. 2021, arXiv 2106.09685), computed in float32 from the rows that unmerged serving
reads and rounded once to the format of W. Weights are written in place, so that CUDA graphs keep working. The originals
of the products that change lie in host memory meanwhile: as many bytes as these products have on the device.

A merge and an unmerge are iterators: each step writes one product, and the loop looks after its messages in between.
The caller sees to it that nothing else runs the model before the last step.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.messages import LayerError, MergeReport
from server.errors import MergeRefused, MergeTooLarge
from server.kernels import Linear
from server.lora.batch import LowRankTerm, TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool, Ranges
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.transformer import Transformer

# Nats between the next-token distributions of unmerged and of merged serving, on average over the probe's tokens.
MAX_KL = 0.05
HOST_SHARE = 0.8  # of the host's free memory that the originals may take
DIGEST_WORKERS = 4
BLOCK_ROWS = 4096  # of a weight that are in float32 at a time


@dataclass(frozen=True, slots=True)
class _Product:
    """One fused product of one layer."""

    layer: int
    group: str
    weight: Linear


@dataclass(frozen=True, slots=True)
class _Original:
    """What a product was before the merge, and its digest."""

    product: _Product
    saved: tuple[Tensor, ...]
    digest: Future[str]


@dataclass(slots=True)
class _Squares:
    """Sums of squares over a layer: of what rounding took off, of the adapter's delta, of the merged weight."""

    error: float = 0.0
    delta: float = 0.0
    weight: float = 0.0

    def report(self, layer: int) -> LayerError:
        return LayerError(layer, _relative(self.error, self.weight), _relative(self.error, self.delta))


class BaseMerger:
    """Writes the weights of one model; at most one adapter is in them. `available_bytes` is the host's free memory."""

    def __init__(
        self,
        model: Transformer,
        pool: AdapterPool,
        available_bytes: Callable[[], int],
        workers: Executor | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._available_bytes = available_bytes
        self._workers = workers or ThreadPoolExecutor(DIGEST_WORKERS, thread_name_prefix="weights-digest")
        self._originals: list[_Original] = []

    @property
    def held_bytes(self) -> int:
        """Host memory that originals take."""
        return sum(tensor.numel() * tensor.element_size() for each in self._originals for tensor in each.saved)

    def merge(self, rows: Ranges, probe: Sequence[int], force: bool) -> Iterator[tuple[int, int] | MergeReport]:
        """Adds the adapter in these rows of the pool; yields (bytes written, of how many), at last the report.

        `probe` are the tokens on which merged serving is compared with unmerged. Where they differ by more than MAX_KL
        all is written back and MergeRefused raised, unless `force`. Raises MergeTooLarge before anything is written.
        """
        assert not self._originals, "one adapter is merged at a time"
        products = [product for product in self._products() if self._changes(product, rows)]
        total = sum(product.weight.num_bytes for product in products)
        if total > HOST_SHARE * (available := self._available_bytes()):
            raise MergeTooLarge(
                f"merging keeps {total} bytes of the base's weights in host memory, of which {available} are free"
            )
        unmerged = probe_logits(self._model, probe, build_lora_batch(self._pool, [], [TokenSpan(len(probe), rows)]))
        squares: dict[int, _Squares] = {}
        done = 0
        for product in products:
            self._add(product, rows, squares.setdefault(product.layer, _Squares()))
            done += product.weight.num_bytes
            yield done, total
        mean, largest = divergence(unmerged, probe_logits(self._model, probe, None))
        layers = [squares[layer].report(layer) for layer in sorted(squares)]
        if not mean <= MAX_KL and not force:
            yield from self.unmerge()
            worst = max(layers, key=lambda layer: layer.delta)
            raise MergeRefused(
                f"merged serving would differ by {mean:.3g} nats a token from unmerged, more than {MAX_KL}: rounding "
                f"to the base's format takes {worst.delta:.0%} of the adapter in layer {worst.layer}; force it, or "
                "serve it unmerged",
                kl=f"{mean:.4g}",
                max_kl=f"{MAX_KL}",
            )
        yield MergeReport(kl=mean, largest_kl=largest, layers=layers, held_bytes=self.held_bytes)

    def unmerge(self) -> Iterator[tuple[int, int]]:
        """Writes the originals back; yields (bytes written, of how many). That they are what they were is checked."""
        total = sum(original.product.weight.num_bytes for original in self._originals)
        done = 0
        found: list[tuple[_Original, Future[str]]] = []
        for original in self._originals:
            weight = original.product.weight
            with torch.no_grad():
                weight.restore(original.saved)
            found.append((original, self._digest(weight.save())))
            done += weight.num_bytes
            yield done, total
        for original, digest in found:
            product = original.product
            assert digest.result() == original.digest.result(), f"layer {product.layer} {product.group} is not restored"
        self._originals = []

    def digest(self) -> str:
        """Of all weights that a merge can change."""
        digests = [self._digest(product.weight.save()) for product in self._products()]
        return hashlib.sha256("".join(digest.result() for digest in digests).encode()).hexdigest()

    def _products(self) -> list[_Product]:
        return [
            _Product(index, group, getattr(layer, group))
            for index, layer in enumerate(self._model.weights.layers)
            for group in self._pool.groups
        ]

    def _factors(self, product: _Product, rows: Ranges) -> list[tuple[Tensor, Tensor]]:
        """A [r, in] and scaled B [r, out_s] of each projection of a product, in the pool's dtype."""
        pool = self._pool.groups[product.group]
        index = torch.cat([torch.arange(start, stop) for start, stop in rows]).to(pool.a.device)
        a = pool.a[product.layer][index]
        return [(a[:, s], b[product.layer][index]) for s, b in enumerate(pool.b)]

    def _changes(self, product: _Product, rows: Ranges) -> bool:
        return any(bool(a.any()) and bool(b.any()) for a, b in self._factors(product, rows))

    @torch.no_grad()
    def _add(self, product: _Product, rows: Ranges, squares: _Squares) -> None:
        """Beside the weight itself, its merged form and BLOCK_ROWS of it in float32 are all that this takes."""
        weight = product.weight
        saved = weight.save()
        self._originals.append(_Original(product, saved, self._digest(saved)))
        before = weight.dense()
        merged = torch.empty_like(before)
        first = 0
        for a, b in self._factors(product, rows):
            for columns in b.split(BLOCK_ROWS, dim=1):  # rows of the weight
                block = slice(first, first + columns.shape[1])
                delta = columns.float().t() @ a.float()
                wanted = before[block].float() + delta
                merged[block] = wanted
                squares.delta += _square(delta)
                squares.weight += _square(wanted)
                squares.error += _square(wanted - merged[block])
                first = block.stop
        weight.write(merged)
        for found, asked in zip(weight.dense().split(BLOCK_ROWS), merged.split(BLOCK_ROWS), strict=True):
            squares.error += _square(found.float() - asked.float())

    def _digest(self, saved: tuple[Tensor, ...]) -> Future[str]:
        """Of bits in host memory, computed beside the loop."""
        return self._workers.submit(_sha256, saved)


@torch.inference_mode()
def probe_logits(model: Transformer, tokens: Sequence[int], lora: LowRankTerm | None) -> Tensor:
    """[len(tokens), vocab], by a pass with a KV cache of its own."""
    spec, embedding, n = model.spec, model.weights.embedding, len(tokens)
    device = embedding.device
    attention = TorchAttention(spec.softmax_scale, spec.num_kv_heads, n, device)
    batch = ForwardBatch(
        input_ids=torch.tensor(tokens, device=device),
        positions=torch.arange(n, device=device),
        slots=torch.arange(n, device=device),
        sample_index=None,
        attention=attention.plan([], [AttentionChunk(0, n, [0])]),
        lora=lora,
    )
    return model.forward(batch, KVCache.allocate(spec, 1, n, embedding.dtype, device))


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """KL(expected ‖ found) of the distributions in rows of logits, in nats: the mean and the largest."""
    p, q = (logits.float().log_softmax(dim=-1) for logits in (expected, found))
    rows = (p.exp() * (p - q)).sum(dim=-1)
    return float(rows.mean()), float(rows.max())


def _sha256(tensors: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _square(tensor: Tensor) -> float:
    """The square of its Frobenius norm."""
    return float(tensor.norm()) ** 2


def _relative(error: float, whole: float) -> float:
    """A norm relative to another, of their squares. Nothing relative to nothing is nothing, as where A and B that are
    not zero make no delta."""
    if not whole:
        return math.inf if error else 0.0
    return math.sqrt(error / whole)
