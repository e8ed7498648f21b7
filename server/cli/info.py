"""`lorikeet info`: what a server serves, on what, within which limits."""

from typing import Any

from server.cli.options import DEFAULT_SERVER, Debug, Json, Server, Timeout
from server.cli.output import print_fields, print_json


def info(server: Server = DEFAULT_SERVER, json: Json = False, timeout: Timeout = 10.0, debug: Debug = False) -> None:
    """Show what a server serves, on what device, within which limits."""
    from lorikeet.v1 import server_pb2, server_pb2_grpc
    from server.cli.client import connect

    with connect(server) as channel:
        reply = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
            server_pb2.GetServerInfoRequest(), timeout=timeout
        )
    base, limits = reply.base, reply.limits
    fields: dict[str, Any] = {
        "version": reply.version,
        "base": {
            "name": base.name,
            "digest": base.digest,
            "family": base.family,
            "vocab_size": base.vocab_size,
        },
        "device": reply.device,
        "dtype": reply.dtype,
        "quantization": reply.quantization,
        "draining": reply.draining,
        "merged_adapter": reply.merged_adapter_digest,
        "merged_others": "compensate" if reply.compensates_merged else "refuse",
        "limits": {
            "max_model_len": limits.max_model_len,
            "max_num_seqs": limits.max_num_seqs,
            "max_waiting": limits.max_waiting,
            "max_batch_tokens": limits.max_batch_tokens,
            "kv_cache_tokens": limits.kv_cache_tokens,
            "max_message_bytes": limits.max_message_bytes,
            "max_stop_strings": limits.max_stop_strings,
        },
    }
    if json:
        print_json(fields)
    else:
        print_fields(fields)
