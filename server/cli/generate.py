"""`lorikeet generate`: one prompt to a server, the answer as it comes."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.exits import ExitCode, Failure
from server.cli.options import DEFAULT_SERVER, MAX_TIMEOUT, Debug, Json, Server
from server.cli.output import print_json, print_text

if TYPE_CHECKING:
    from lorikeet.v1.common_pb2 import TokenLogprobs
    from lorikeet.v1.inference_pb2 import GenerateResponse, StreamGenerateRequest, StreamGenerateResponse

_TOKEN_MAX = 2**32 - 1


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input.")],
    adapter: Annotated[str, typer.Option(help="name, name@label or name@sha256:…; without it the base answers.")] = "",
    server: Server = DEFAULT_SERVER,
    raw: Annotated[
        bool, typer.Option("--raw/--chat", help="Continue the text as it is, or answer it as a chat message.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message to go before the prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=0, max=_TOKEN_MAX, help="Most tokens to generate [what the context has left].")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [1].")] = None,
    top_k: Annotated[int, typer.Option(min=0, max=_TOKEN_MAX, help="Draw among so many; 0 among all.")] = 0,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that sum to it [1].")] = None,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option(help="On tokens of prompt and output [1].")] = None,
    presence_penalty: Annotated[float, typer.Option(help="On tokens of the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="On tokens of the output, each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed draws the same.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=_TOKEN_MAX, help="With --json: log-probabilities, of so many likeliest.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, max=_TOKEN_MAX, help="End after this token; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end of text.")] = False,
    request_id: Annotated[str, typer.Option(help="A name for the call, in logs and the answer.")] = "",
    timeout: Annotated[
        float | None, typer.Option(min=0.001, max=MAX_TIMEOUT, metavar="SECONDS", help="Give up after so long [never].")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print as it comes, or at the end [--json: at the end].")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate from a prompt and print the answer as it comes.

    With --json the answer is one object; with --json --stream, one object a line for each piece.
    """
    from lorikeet.v1 import common_pb2, inference_pb2

    if raw and system is not None:
        raise Failure("--system needs --chat: raw text has no messages", ExitCode.USAGE)
    text = _read_prompt(prompt)
    request = inference_pb2.StreamGenerateRequest(
        adapter_id=adapter,
        sampling=common_pb2.Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            logprobs=logprobs,
        ),
        stopping=common_pb2.Stopping(
            max_tokens=max_tokens, stop_strings=stop, stop_token_ids=stop_token_id, ignore_eos=ignore_eos
        ),
        request_id=request_id,
    )
    if raw:
        request.text = text
    else:
        if system is not None:
            request.messages.messages.add(role="system", content=system)
        request.messages.messages.add(role="user", content=text)
    _call(server, request, timeout, stream=not json if stream is None else stream, json=json)


def _read_prompt(prompt: str) -> str:
    """The prompt, or standard input's text for "-". Raises Failure for bytes that are not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # arguments that are not UTF-8 arrive as lone surrogates
    except UnicodeError:
        raise Failure("prompt: not valid UTF-8", ExitCode.USAGE) from None
    return text


def _call(server: str, request: "StreamGenerateRequest", timeout: float | None, *, stream: bool, json: bool) -> None:
    from lorikeet.v1 import inference_pb2, inference_pb2_grpc
    from server.cli.client import cancelled_by_interrupt, connect

    with connect(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        if not stream:
            whole = inference_pb2.GenerateRequest.FromString(request.SerializeToString())  # the same fields
            reply = stub.Generate(whole, timeout=timeout)
            print_json(answer_fields(reply)) if json else print_text(reply.text)
            return
        call = stub.StreamGenerate(request, timeout=timeout)
        with cancelled_by_interrupt(call):
            for piece in call:
                print_json(answer_fields(piece)) if json else print_text(piece.text, end="")
        if not json:
            print_text("")


def answer_fields(reply: "GenerateResponse | StreamGenerateResponse") -> dict[str, Any]:
    """An answer, or a piece of one, as JSON; what comes only with the last piece is absent before it."""
    fields: dict[str, Any] = {
        "request_id": reply.request_id,
        "adapter_digest": reply.adapter_digest,
        "text": reply.text,
        "token_ids": list(reply.token_ids),
    }
    if reply.logprobs:
        fields["logprobs"] = [_logprob_fields(position) for position in reply.logprobs]
    if reply.finish_reason:
        from lorikeet.v1.common_pb2 import FinishReason, Serving

        fields["finish_reason"] = FinishReason.Name(reply.finish_reason).removeprefix("FINISH_REASON_").lower()
        usage, timings = reply.usage, reply.timings
        fields["serving"] = Serving.Name(reply.serving).removeprefix("SERVING_").lower()
        fields["trained_quantization"] = reply.trained_quantization or None
        fields["usage"] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        fields["timings"] = {
            "queue_seconds": timings.queue_seconds,
            "adapter_load_seconds": timings.adapter_load_seconds,
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
        }
    return fields


def _logprob_fields(position: "TokenLogprobs") -> dict[str, Any]:
    return {
        "token_id": position.drawn.token_id,
        "logprob": position.drawn.logprob,
        "top": [{"token_id": token.token_id, "logprob": token.logprob} for token in position.top],
    }
