"""Protobuf to the project's own types and back: the only mapping. Past this module nothing knows protobuf.

Only structure is checked here (a prompt is set, a request id is well formed); ranges are the front end's.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict

from adapters.versions import Version
from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.engine.messages import CallProgress, MergeReport, Ready, SamplingParams, Serving, Timings, TokenLogprob
from server.errors import InvalidRequest
from server.frontend.types import ChatMessage, Delta, GenerateRequest, MergeOptions, Prompt, Residency, Usage
from server.version import lorikeet_version

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.StreamGenerateRequest
AnyGenerateResponse = inference_pb2.GenerateResponse | inference_pb2.StreamGenerateResponse
AnyMergeRequest = adapter_pb2.MergeAdapterRequest | adapter_pb2.StreamMergeAdapterRequest
AnyUnmergeRequest = adapter_pb2.UnmergeAdapterRequest | adapter_pb2.StreamUnmergeAdapterRequest

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)

_FINISH_REASONS = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "cancelled": common_pb2.FINISH_REASON_CANCELLED,
}

_STAGES = {
    "fetching": adapter_pb2.Progress.STAGE_FETCHING,
    "reading": adapter_pb2.Progress.STAGE_READING,
    "waiting": adapter_pb2.Progress.STAGE_WAITING,
    "copying": adapter_pb2.Progress.STAGE_COPYING,
    "checking": adapter_pb2.Progress.STAGE_CHECKING,
    "draining": adapter_pb2.Progress.STAGE_DRAINING,
    "merging": adapter_pb2.Progress.STAGE_MERGING,
}

_SERVINGS = {
    Serving.UNMERGED: common_pb2.SERVING_UNMERGED,
    Serving.MERGED: common_pb2.SERVING_MERGED,
    Serving.COMPENSATED: common_pb2.SERVING_COMPENSATED,
}

_RESIDENCIES = {
    "disk": adapter_pb2.Adapter.RESIDENCY_DISK,
    "host": adapter_pb2.Adapter.RESIDENCY_HOST,
    "device": adapter_pb2.Adapter.RESIDENCY_DEVICE,
}


def generate_request(message: AnyGenerateRequest, request_id: str) -> GenerateRequest:
    """A request with an id: its own or, without one, `request_id`. Raises InvalidRequest."""
    stopping = message.stopping
    return GenerateRequest(
        request_id=_request_id(message.request_id, request_id),
        adapter_id=message.adapter_id,
        prompt=_prompt(message),
        sampling=_sampling(message.sampling),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop_strings=tuple(stopping.stop_strings),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )


def stream_response(delta: Delta, request_id: str) -> inference_pb2.StreamGenerateResponse:
    """One message of a stream. On the path of every token: it builds one message and nothing else."""
    message = inference_pb2.StreamGenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        adapter_digest=delta.adapter_digest,
        request_id=request_id,
        serving=_SERVINGS[delta.serving],
    )
    if delta.logprobs is not None:
        message.logprobs.extend(map(_token_logprobs, delta.token_ids, delta.logprobs))
    if delta.finish_reason is not None:
        _finish(message, delta)
    return message


def whole_response(deltas: Sequence[Delta], request_id: str) -> inference_pb2.GenerateResponse:
    """The answer that the deltas of a stream, all of them, make together."""
    last = deltas[-1]
    message = inference_pb2.GenerateResponse(
        text="".join(delta.text for delta in deltas),
        adapter_digest=last.adapter_digest,
        request_id=request_id,
        serving=_SERVINGS[last.serving],
    )
    for delta in deltas:
        message.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            message.logprobs.extend(map(_token_logprobs, delta.token_ids, delta.logprobs))
    _finish(message, last)
    return message


def adapter(version: Version, residency: Residency) -> adapter_pb2.Adapter:
    """A published version, and where it is."""
    manifest = version.manifest
    message = adapter_pb2.Adapter(
        name=version.name,
        digest=version.digest,
        labels=version.labels,
        base_digest=manifest.base_digest,
        rank=manifest.rank,
        alpha=manifest.alpha,
        target_modules=sorted(manifest.target_modules),
        dtype=manifest.dtype,
        size_bytes=manifest.size_bytes,
        num_parameters=manifest.num_parameters,
        method=manifest.training.method if manifest.training is not None else "",
        trained_quantization=manifest.training.held_base if manifest.training is not None else "",
        residency=_RESIDENCIES[residency.fastest],
        tiers=[
            adapter_pb2.Adapter.Tier(
                residency=_RESIDENCIES[tier.tier], size_bytes=tier.size_bytes, num_leases=tier.leases
            )
            for tier in residency.tiers
        ],
        pinned=residency.pinned,
        merged=residency.merged,
    )
    message.create_time.FromJsonString(manifest.created_at)
    if manifest.training is not None and manifest.training.scores is not None:
        message.scores.CopyFrom(adapter_pb2.Adapter.Scores(**asdict(manifest.training.scores)))
    return message


def progress(progress: CallProgress) -> adapter_pb2.Progress:
    return adapter_pb2.Progress(
        stage=_STAGES.get(progress.stage, adapter_pb2.Progress.STAGE_UNSPECIFIED),
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
    )


def merge_options(message: AnyMergeRequest | AnyUnmergeRequest) -> MergeOptions:
    default = MergeOptions()
    drain_seconds = message.drain_seconds if message.HasField("drain_seconds") else default.drain_seconds
    if isinstance(message, AnyMergeRequest):
        return MergeOptions(drain_seconds, message.force, message.probe_text)
    return MergeOptions(drain_seconds)


def merge_report(report: MergeReport | None) -> adapter_pb2.MergeReport | None:
    if report is None:
        return None
    return adapter_pb2.MergeReport(
        kl=report.kl,
        largest_kl=report.largest_kl,
        layers=[
            adapter_pb2.MergeReport.Layer(index=layer.layer, weight_error=layer.weight, delta_error=layer.delta)
            for layer in report.layers
        ],
        held_bytes=report.held_bytes,
    )


def server_info(
    config: ServeConfig, base: BaseModel, ready: Ready, merged_digest: str | None, *, draining: bool
) -> server_pb2.GetServerInfoResponse:
    return server_pb2.GetServerInfoResponse(
        version=lorikeet_version(),
        base=server_pb2.BaseModel(
            name=base.name, digest=base.digest, family=base.spec.family, vocab_size=base.spec.vocab_size
        ),
        device=ready.device,
        dtype=ready.dtype,
        quantization=ready.quantization,
        limits=server_pb2.Limits(
            max_model_len=ready.max_model_len,
            max_num_seqs=ready.max_num_seqs,
            max_waiting=config.engine.max_waiting,
            max_batch_tokens=ready.max_batch_tokens,
            kv_cache_tokens=ready.num_pages * ready.page_size,
            max_message_bytes=config.max_message_bytes,
            max_stop_strings=config.max_stop_strings,
        ),
        draining=draining,
        merged_adapter_digest=merged_digest or "",
        compensates_merged=config.engine.compensates_merged,
    )


def _request_id(given: str, otherwise: str) -> str:
    if not given:
        return otherwise
    if _REQUEST_ID.fullmatch(given) is None:
        raise InvalidRequest("request_id", "must be at most 128 characters of A-Z a-z 0-9 . _ : -")
    return given


def _prompt(message: AnyGenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return list(message.token_ids.ids)
        case "messages":
            return [ChatMessage(role=turn.role, content=turn.content) for turn in message.messages.messages]
        case _:
            raise InvalidRequest("prompt", "is not set; set one of text, token_ids, messages")


def _sampling(message: common_pb2.Sampling) -> SamplingParams:
    """What is absent takes SamplingParams' default."""
    default = SamplingParams()
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else default.repetition_penalty
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else None,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def _finish(message: AnyGenerateResponse, last: Delta) -> None:
    assert last.finish_reason is not None, "a generation ended without a finish reason"
    assert last.usage is not None, "a generation ended without usage"
    message.finish_reason = _FINISH_REASONS[last.finish_reason]
    message.usage.MergeFrom(_usage(last.usage))
    message.trained_quantization = last.trained_quantization
    if last.timings is not None:
        message.timings.MergeFrom(_timings(last.timings))


def _usage(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _timings(timings: Timings) -> common_pb2.Timings:
    return common_pb2.Timings(
        queue_seconds=timings.queue,
        adapter_load_seconds=timings.load,
        prefill_seconds=timings.prefill,
        decode_seconds=timings.decode,
    )


def _token_logprobs(token_id: int, logprob: TokenLogprob) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        drawn=common_pb2.Logprob(token_id=token_id, logprob=logprob.logprob),
        top=[common_pb2.Logprob(token_id=token, logprob=value) for token, value in logprob.top],
    )
