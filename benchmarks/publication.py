"""From a finished run to the first token that a running server says with it; one JSON line.

    python -m benchmarks.publication RUN [--count 5]

RUN is one of `trainer fit`'s. `gate_seconds` is the whole of `trainer publish`'s work in this process: the base loaded
for the server's forward pass and for the trainer's, rows scored by both, the version published. `publish_ms` is the
publication alone, `first_token_ms` from the moment before it until a client of a server that was running all along has
the first token of the new version; medians over `count` versions.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import grpc
from safetensors.torch import load_file, save_file

from adapters.store import AdapterStore
from benchmarks.live import serving, surroundings
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import resolve_base
from trainer.publish import Publication, publish_run
from trainer.run_directory import RunDirectory

PROMPT = list(range(1000, 1032))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args()
    run = RunDirectory.open(args.run)
    base = resolve_base(run.settings().base)
    with tempfile.TemporaryDirectory() as scratch:
        store = AdapterStore(Path(scratch) / "store")
        began = time.perf_counter()
        version = publish_run(run, store, Publication("gated"), lambda message: None)
        gate = time.perf_counter() - began
        published: list[float] = []
        first: list[float] = []
        with serving(store.root, run.settings().base) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            first_token(stub, "gated")
            for number in range(args.count):
                source = another(version.path, Path(scratch) / f"source-{number}", number)
                began = time.perf_counter()
                store.publish(
                    source,
                    f"new-{number}",
                    base_digest=base.digest,
                    base_name=base.name,
                    linears=base.spec.linears(),
                    training=version.manifest.training,
                )
                published.append(time.perf_counter() - began)
                first_token(stub, f"new-{number}")
                first.append(time.perf_counter() - began)
    assert version.manifest.training is not None, "the gate says how it was trained"
    assert version.manifest.training.scores is not None, "the gate scores"
    scores = version.manifest.training.scores
    case = {"bench": "publication", "bytes": version.manifest.size_bytes, "rows": scores.num_rows}
    case |= {"gate_seconds": round(gate, 2), "publish_ms": round(statistics.median(published) * 1e3, 1)}
    case |= {"first_token_ms": round(statistics.median(first) * 1e3, 1), "slowest_ms": round(max(first) * 1e3, 1)}
    case |= {"served_loss": scores.loss, "trainer_loss": scores.trainer_loss}
    print(json.dumps(case | surroundings()), flush=True)


def another(source: Path, directory: Path, number: int) -> Path:
    """The same adapter with other values, so that it is another version."""
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    scaled = {name: value * (1 + (number + 1) / 1000) for name, value in tensors.items()}
    save_file(scaled, directory / "adapter_model.safetensors")
    return directory


def first_token(stub: inference_pb2_grpc.InferenceServiceStub, adapter: str) -> None:
    """Returns when it is there."""
    request = inference_pb2.StreamGenerateRequest(
        adapter_id=adapter,
        token_ids=common_pb2.TokenIds(ids=PROMPT),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=1, ignore_eos=True),
    )
    pieces = stub.StreamGenerate(request, timeout=120)
    next(pieces)
    pieces.cancel()


if __name__ == "__main__":
    main()
