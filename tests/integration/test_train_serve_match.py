"""Adapters trained on another form of the base than is served: allowed, and marked."""

import grpc
import pytest

from adapters.manifest import TrainingInfo
from lorikeet.v1 import adapter_pb2, common_pb2
from tests.integration.conftest import StartServer, World
from tests.support.client import Client, failure_of, generation
from tests.support.peft_model import ATTENTION, MLP, lora_config

PROMPT = [40, 41, 42, 43]
TRAINED = {"on-nf4": "nf4", "on-16-bits": "none", "on-unknown": ""}


@pytest.fixture(scope="module")
def names(world: World) -> list[str]:
    for name, quantization in TRAINED.items():
        training = TrainingInfo(method="lora", base_quantization=None if quantization == "none" else quantization)
        world.store.publish(
            world.make(name, lora_config(8, ATTENTION + MLP)),
            name,
            base_digest=world.base.digest,
            base_name=world.base.name,
            linears=world.base.spec.linears(),
            training=training if quantization else None,
        )
    return list(TRAINED)


def marks(client: Client, names: list[str]) -> dict[str, str]:
    """What answers say, streamed or not; the base's own say nothing."""
    found = {}
    for name in ("", *names):
        answer = client.generate(generation(PROMPT, name, 4))
        pieces = list(client.open(generation(PROMPT, name, 4)))
        assert pieces[-1].trained_quantization == answer.trained_quantization
        assert not any(piece.trained_quantization for piece in pieces[:-1])
        found[name] = answer.trained_quantization
    assert found.pop("") == ""
    return found


def test_answers_mark_adapters_trained_on_another_form_of_the_base(
    client: Client, names: list[str], start_server: StartServer
) -> None:
    for name in names:
        request = adapter_pb2.GetAdapterRequest(adapter_id=name)
        assert client.adapters.GetAdapter(request, timeout=30).adapter.trained_quantization == TRAINED[name]
    assert marks(client, names) == {"on-nf4": "nf4", "on-16-bits": "", "on-unknown": ""}
    server = start_server("--kv-cache-memory", "16MiB", "--adapter-memory", "8MiB", "--quantization", "nf4")
    four_bit = Client(server.port)
    assert marks(four_bit, names) == {"on-nf4": "", "on-16-bits": "none", "on-unknown": ""}
    unmerged = four_bit.generate(generation(PROMPT, "on-nf4", 24))
    with pytest.raises(grpc.RpcError) as caught:
        four_bit.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id="on-nf4"), timeout=60)
    refused = failure_of(caught.value)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_MERGE_REFUSED")
    assert float(refused.metadata["kl"]) > float(refused.metadata["max_kl"])
    assert list(four_bit.generate(generation(PROMPT, "on-nf4", 24)).token_ids) == list(unmerged.token_ids)
    forced = adapter_pb2.MergeAdapterRequest(adapter_id="on-nf4", force=True)
    assert four_bit.adapters.MergeAdapter(forced, timeout=60).report.kl == pytest.approx(
        float(refused.metadata["kl"]), rel=1e-2
    )
    assert four_bit.generate(generation(PROMPT, "on-nf4", 24)).serving == common_pb2.SERVING_MERGED
    four_bit.adapters.UnmergeAdapter(adapter_pb2.UnmergeAdapterRequest(adapter_id="on-nf4"), timeout=60)
    assert list(four_bit.generate(generation(PROMPT, "on-nf4", 24)).token_ids) == list(unmerged.token_ids)
    four_bit.close()
