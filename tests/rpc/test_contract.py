"""The .proto files against themselves and the types they stand for."""

import msgspec
from google.protobuf.descriptor import Descriptor

from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2
from server.config import EngineConfig, ServeConfig
from server.engine.messages import Ready, SamplingParams


def shape(descriptor: Descriptor) -> list[tuple[object, ...]]:
    """What the wire and a client see of a message's fields."""
    return [
        (
            field.number,
            field.name,
            field.type,
            field.is_repeated,
            field.has_presence,
            field.message_type and field.message_type.full_name,
            field.containing_oneof and field.containing_oneof.name,
        )
        for field in descriptor.fields
    ]


def test_streamed_and_whole_generations_have_the_same_fields() -> None:
    whole, stream = inference_pb2.GenerateRequest, inference_pb2.StreamGenerateRequest
    assert shape(whole.DESCRIPTOR) == shape(stream.DESCRIPTOR)
    assert shape(inference_pb2.GenerateResponse.DESCRIPTOR) == shape(inference_pb2.StreamGenerateResponse.DESCRIPTOR)


def test_streamed_and_whole_loads_and_unloads_ask_for_the_same() -> None:
    assert shape(adapter_pb2.LoadAdapterRequest.DESCRIPTOR) == shape(adapter_pb2.StreamLoadAdapterRequest.DESCRIPTOR)
    unload, stream = adapter_pb2.UnloadAdapterRequest, adapter_pb2.StreamUnloadAdapterRequest
    assert shape(unload.DESCRIPTOR) == shape(stream.DESCRIPTOR)


def test_every_sampling_parameter_is_on_the_wire() -> None:
    on_wire = set(common_pb2.Sampling.DESCRIPTOR.fields_by_name)
    assert on_wire == {field.name for field in msgspec.structs.fields(SamplingParams)}


def test_a_sampling_field_has_presence_exactly_when_zero_is_not_its_default() -> None:
    default = SamplingParams()
    for field in common_pb2.Sampling.DESCRIPTOR.fields:
        assert field.has_presence == (getattr(default, field.name) != 0), field.name


def test_limits_are_settings_or_what_the_engine_says() -> None:
    known = {field.name for field in msgspec.structs.fields(Ready)}
    known |= set(ServeConfig.__dataclass_fields__) | set(EngineConfig.__dataclass_fields__)
    derived = {"kv_cache_tokens"}
    assert set(server_pb2.Limits.DESCRIPTOR.fields_by_name) - derived <= known
