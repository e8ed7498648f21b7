"""An engine process without a model: speaks the messages, and does what the first token of a prompt tells it.

Any other first token: the whole prompt is the answer. With --say and --exit it fails to start.
"""

import argparse
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

sys.path.insert(0, str(Path(__file__).parents[2]))

from server.config import EngineConfig
from server.engine.messages import (
    CallDone,
    CallProgress,
    Cancel,
    ErrorPayload,
    LoadAdapter,
    Output,
    Ready,
    RequestFailed,
    ResidentAdapter,
    Shutdown,
    Stats,
    StepOutputs,
    Submit,
    Timings,
    ToEngine,
    ToFrontend,
    TokenLogprob,
    UnloadAdapter,
    UnpinAdapter,
    decode_to_engine,
    encode,
)

ECHO = 390  # the rest of the prompt is the answer
HOLD = 391  # the same, but then it runs on without a token until it is cancelled
CRASH = 392  # the same, but then the process dies
REFUSE = 393  # the queue is full
AT_ONCE = 394  # ECHO, all steps at once
NO_MESSAGE = 395  # sends a frame that is no message
REFUSE_ADAPTER = 396
FIRST_OPCODE = 390
EOS = 1
VOCAB_SIZE = 400
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 64
RETRY_AFTER = 2.5
TIMINGS = Timings(queue=0.25, load=0.125, prefill=0.5, decode=0.0)


@dataclass(slots=True)
class Running:
    submit: Submit
    answer: list[int]
    opcode: int
    num_sent: int = 0


class FakeEngine:
    """Counts in its Stats what tests want to know: num_running, and as `preemptions` the Cancels it has had."""

    def __init__(self, address: str, *, is_talkative: bool) -> None:
        self.socket = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.connect(address)
        self.is_talkative = is_talkative
        self.running: dict[str, Running] = {}
        self.resident: dict[str, bool] = {}  # digest → whether it is pinned
        self.drains: list[UnloadAdapter] = []
        self.num_cancels = 0

    def run(self) -> None:
        self.send(
            Ready(
                device="cpu",
                dtype="float32",
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=MAX_NUM_SEQS,
                max_batch_tokens=512,
                page_size=16,
                num_pages=100,
            )
        )
        if self.is_talkative:
            self.stats()
        parent = os.getppid()
        while os.getppid() == parent:
            while self.socket.poll(0 if self.has_work() else 1000):
                message = decode_to_engine(self.socket.recv())
                if isinstance(message, Shutdown):
                    return
                self.handle(message)
            self.step()

    def has_work(self) -> bool:
        return any(seq.num_sent < len(seq.answer) for seq in self.running.values())

    def handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self.submit(message)
            case Cancel(request_id=request_id):
                self.running.pop(request_id, None)
                self.num_cancels += 1
                self.finish_drains()
                self.stats()
            case LoadAdapter(call_id=call_id, adapter=adapter, pin=pin):
                self.send(CallProgress(call_id, "reading", 0, 8))
                self.send(CallProgress(call_id, "reading", 8, 8))
                if "broken" in adapter.path:
                    faults = ["lora_A has a NaN", "lora_B has shape [1, 2]"]
                    message = f"{adapter.path}: {'; '.join(faults)}"
                    error = ErrorPayload("FAILED_PRECONDITION", "ADAPTER_INVALID", message, faults=faults)
                    self.send(CallDone(call_id, error))
                elif "slow" not in adapter.path:
                    self.resident[adapter.digest] = pin or self.resident.get(adapter.digest, False)
                    self.stats()
                    self.send(CallDone(call_id))
            case UnpinAdapter(call_id=call_id, digest=digest):
                if digest in self.resident:
                    self.resident[digest] = False
                self.stats()
                self.send(CallDone(call_id))
            case UnloadAdapter(call_id=call_id, digest=digest, drain=drain):
                if not self.num_users(digest):
                    self.unload(message)
                elif drain:
                    self.drains.append(message)
                    self.send(CallProgress(call_id, "draining"))
                else:
                    self.send(CallDone(call_id, ErrorPayload("FAILED_PRECONDITION", "ADAPTER_IN_USE", "in use")))

    def num_users(self, digest: str) -> int:
        adapters = [seq.submit.adapter for seq in self.running.values()]
        return sum(adapter is not None and adapter.digest == digest for adapter in adapters)

    def unload(self, message: UnloadAdapter) -> None:
        self.resident.pop(message.digest, None)
        self.stats()
        self.send(CallDone(message.call_id))

    def finish_drains(self) -> None:
        for message in [drain for drain in self.drains if not self.num_users(drain.digest)]:
            self.drains.remove(message)
            self.unload(message)

    def submit(self, message: Submit) -> None:
        opcode, answer = message.prompt[0], message.prompt[1:]
        if opcode < FIRST_OPCODE:
            opcode, answer = ECHO, message.prompt
        if opcode == REFUSE:
            full = ErrorPayload("RESOURCE_EXHAUSTED", "SERVER_BUSY", "the queue is full", {"limit": "8"}, 1.5)
            self.send(RequestFailed(message.request_id, full))
        elif opcode == REFUSE_ADAPTER:
            bad = ErrorPayload("FAILED_PRECONDITION", "ADAPTER_UNSUPPORTED", "use_dora is not supported")
            self.send(RequestFailed(message.request_id, bad))
        elif opcode == NO_MESSAGE:
            self.socket.send(b"\xc1")
        else:
            answer = answer[: message.stopping.max_tokens]
            seq = self.running[message.request_id] = Running(message, answer, opcode)
            if message.adapter is not None:
                self.resident.setdefault(message.adapter.digest, False)
            self.stats()
            while opcode == AT_ONCE and message.request_id in self.running:
                self.send(StepOutputs([self.advance(seq)]))

    def step(self) -> None:
        ready = [seq for seq in self.running.values() if seq.num_sent < len(seq.answer)]
        if ready:
            self.send(StepOutputs([self.advance(seq) for seq in ready]))
            self.finish_drains()
        if any(seq.opcode == CRASH and seq.num_sent == len(seq.answer) for seq in self.running.values()):
            self.socket.close(linger=1000)
            zmq.Context.instance().term()
            os.kill(os.getpid(), signal.SIGKILL)

    def advance(self, seq: Running) -> Output:
        token = seq.answer[seq.num_sent]
        seq.num_sent += 1
        stopping, is_last = seq.submit.stopping, seq.num_sent == len(seq.answer)
        stops = token in stopping.stop_token_ids or (token == EOS and not stopping.ignore_eos)
        finish = "stop" if stops else "length" if is_last and seq.opcode in (ECHO, AT_ONCE) else None
        if finish is not None:
            del self.running[seq.submit.request_id]
        logprobs = seq.submit.sampling.logprobs
        return Output(
            request_id=seq.submit.request_id,
            token_ids=[token],
            logprobs=None if logprobs is None else [TokenLogprob(-float(token), [(token, -float(token))] * logprobs)],
            finish_reason=finish,
            num_cached=3 if seq.num_sent == 1 else None,
            timings=TIMINGS if finish is not None or seq.num_sent == 1 else None,
        )

    def stats(self) -> None:
        self.send(
            Stats(
                num_running=len(self.running),
                num_waiting=0,
                pages_used=0,
                pages_total=100,
                adapters=[
                    ResidentAdapter(digest, tier, size, self.num_users(digest) if tier == "device" else 0, pinned)
                    for digest, pinned in self.resident.items()
                    for tier, size in (("host", 8), ("device", 16))
                ],
                memory={},
                preemptions=self.num_cancels,
                retry_after=RETRY_AFTER,
            )
        )

    def send(self, message: ToFrontend) -> None:
        self.socket.send(encode(message))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--say", default="")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--deaf", action="store_true", help="start to load, and end only when killed")
    parser.add_argument("--talkative", action="store_true", help="send Stats with Ready, not only with a change")
    args = parser.parse_args()
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    assert config.base_path
    if args.say:
        print(args.say, file=sys.stderr)
    if args.exit is not None:
        return int(args.exit)
    if args.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
        while True:
            signal.pause()
    FakeEngine(args.socket, is_talkative=args.talkative).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
