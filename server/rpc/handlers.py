"""Binds a service's coroutines to its descriptor: parsing, the call around each, serialization.

The generated `add_…_to_server` would let a request that does not parse end as UNKNOWN with the text of a Python
exception; here it ends as INVALID_ARGUMENT and names the field.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from server.errors import InvalidRequest, UnknownMethod
from server.rpc.call import Call, Calls, Context
from server.rpc.record import UNKNOWN_METHOD

# Takes the request and its call. A unary method returns the response; a streaming one sends with `call.write`.
Method = Callable[[Any, Call], Awaitable[Message | None]]

# Where a request says which adapter it is about.
ADAPTER_FIELDS = ("adapter_id", "name")

# Of that, for who hears of the call: more than an adapter's id can have.
MAX_ADAPTER_ID = 300


def service_handler(
    service: ServiceDescriptor, methods: Mapping[str, Method], calls: Calls, *, while_draining: bool = False
) -> grpc.GenericRpcHandler:
    """The handler of a service, to be added to a server. `while_draining`: answer also while the server stops."""
    assert set(methods) == set(service.methods_by_name), f"{service.full_name} has other methods than {set(methods)}"
    handlers = {
        name: _method_handler(service.methods_by_name[name], method, calls, while_draining)
        for name, method in methods.items()
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


class UnknownMethods(grpc.GenericRpcHandler):
    """Refuses every call, as one of a method that there is not, and so that it is counted and logged: to be added after
    all services."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        method = handler_call_details.method

        async def refuse(requests: Any, context: Context) -> None:
            async with Call(self._calls, "", UNKNOWN_METHOD, context):
                raise UnknownMethod(f"{method}: there is no such method; is the client newer than the server?")

        return grpc.stream_stream_rpc_method_handler(refuse)  # as which calls of every kind can be taken


def _method_handler(
    descriptor: MethodDescriptor, method: Method, calls: Calls, while_draining: bool
) -> "grpc.RpcMethodHandler[Any, Any]":
    service, name = descriptor.containing_service.full_name, descriptor.name
    adapter_field = next((field for field in ADAPTER_FIELDS if field in descriptor.input_type.fields_by_name), None)

    async def handle(request: Message | InvalidRequest, context: Context) -> Message | None:
        async with Call(calls, service, name, context) as call:
            if adapter_field is not None and not isinstance(request, InvalidRequest):
                call.record.adapter_id = getattr(request, adapter_field)[:MAX_ADAPTER_ID]
            if not while_draining:
                call.refuse_if_draining()
            if isinstance(request, InvalidRequest):
                raise request
            answer = await method(request, call)
            if answer is not None:
                call.check_size(answer)
            return answer

    make = grpc.unary_stream_rpc_method_handler if descriptor.server_streaming else grpc.unary_unary_rpc_method_handler
    response = message_factory.GetMessageClass(descriptor.output_type)
    return make(
        handle,
        request_deserializer=parser(message_factory.GetMessageClass(descriptor.input_type)),
        response_serializer=response.SerializeToString,
    )


def parser(request: type[Message]) -> Callable[[bytes], Message | InvalidRequest]:
    """What makes a request of bytes, or of bytes that are none, the error to raise: gRPC gives a parser no way to
    choose the status."""
    descriptor = cast(Descriptor, request.DESCRIPTOR)  # typeshed leaves upb's own class open

    def parse(data: bytes) -> Message | InvalidRequest:
        try:
            return request.FromString(data)
        except DecodeError:
            field = _field_without_utf8(descriptor, data)
            if field is not None:
                return InvalidRequest(field, "is not valid UTF-8")
            return InvalidRequest("request", f"does not parse as {descriptor.full_name}")

    return parse


def _field_without_utf8(descriptor: Descriptor, data: bytes) -> str | None:
    """The path of the first string field that is not UTF-8, None if there is none or the data is no message."""
    empty = Empty()
    try:
        empty.MergeFromString(data)  # keeps every field as unknown, with its bytes
    except DecodeError:
        return None
    unknown_fields = UnknownFieldSet(empty)
    for unknown in (unknown_fields[index] for index in range(len(unknown_fields))):
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or not isinstance(unknown.data, bytes):
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(unknown.data):
            return field.name
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            inner = _field_without_utf8(field.message_type, unknown.data)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
