"""A version's files changed in place into another valid adapter: it is not served under a digest that is not its."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from adapters.store import Version
from lorikeet.v1 import adapter_pb2
from tests.integration.conftest import World
from tests.support.client import Client, failure_of, generation
from tests.support.peft_model import ATTENTION, lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = [40, 41, 42, 43]


def other_weights(version: Version, other: Path) -> None:
    """In the same file, as a careless copy does it."""
    size = (version.path / WEIGHTS).stat().st_size
    shutil.copyfile(other / WEIGHTS, version.path / WEIGHTS)
    assert (version.path / WEIGHTS).stat().st_size == size


def replaced_weights(version: Version, other: Path) -> None:
    """A new file in the place of the old."""
    shutil.copyfile(other / WEIGHTS, version.path / "new")
    (version.path / "new").replace(version.path / WEIGHTS)


def other_alpha(version: Version, other: Path) -> None:
    config = json.loads((version.path / CONFIG).read_text())
    (version.path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("change", [other_weights, replaced_weights, other_alpha])
def test_changed_content_is_refused_by_its_digest(
    client: Client, world: World, change: Callable[[Version, Path], None]
) -> None:
    name = change.__name__.replace("_", "-")
    source, other = (world.make(f"{name}-{which}", lora_config(4, ATTENTION)) for which in ("published", "other"))
    version = world.publish(source, name)
    change(version, other)
    failure = client.refused(generation(PROMPT, name))
    assert failure.code == grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "ADAPTER_INVALID"
    assert version.digest in failure.message
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=name), timeout=30)
    assert failure_of(caught.value) == failure

    # Publishing the content again puts it right, and the changed bytes are welcome under a digest of their own.
    assert world.publish(source, name).digest == version.digest
    answer = client.generate(generation(PROMPT, name, 8))
    assert answer.adapter_digest == version.digest
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, f"{name}-published")
    assert world.publish(other, name).digest != version.digest
    answer = client.generate(generation(PROMPT, name, 8))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, f"{name}-other")
