"""An engine in this process, driven by hand, and PEFT adapters for it."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapters.content import content_digest
from adapters.files import hash_file
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.messages import (
    AdapterRef,
    CallDone,
    CallProgress,
    LoadAdapter,
    MergeAdapter,
    Output,
    RequestFailed,
    SamplingParams,
    Stats,
    StepOutputs,
    StopParams,
    Submit,
    ToEngine,
    ToFrontend,
    UnloadAdapter,
    UnmergeAdapter,
    UnpinAdapter,
)

Call = LoadAdapter | UnloadAdapter | UnpinAdapter | MergeAdapter | UnmergeAdapter

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


BASE_DIGEST = "sha256:0"
# Not seconds: a process that stands still, or has little of a busy machine, is not one that hangs. Two minutes idle.
MAX_STEPS = 100_000


class Inbox:
    """Keeps what the engine sends."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Output]] = {}
        self.failed: dict[str, RequestFailed] = {}
        self.calls: dict[str, CallDone] = {}
        self.progress: list[CallProgress] = []
        self.stats: list[Stats] = []

    def receive(self, timeout: float) -> Iterable[ToEngine]:
        return ()

    def wake(self) -> None:
        pass

    def send(self, message: ToFrontend) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)
            case RequestFailed():
                self.failed[message.request_id] = message
            case CallDone():
                self.calls[message.call_id] = message
            case CallProgress():
                self.progress.append(message)
            case Stats():
                self.stats.append(message)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def ended(self, request_id: str) -> bool:
        outputs = self.outputs.get(request_id, [])
        return request_id in self.failed or any(output.finish_reason is not None for output in outputs)


class Driver:
    """Submits to an engine and steps it."""

    def __init__(self, directory: Path, overlap: int | None = 0, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "kv_cache_bytes": 8 << 20,
            "adapter_cache_bytes": 32 << 20,
            "max_batch_tokens": 64,
            "max_num_seqs": 32,
            "page_size": 8,
        }
        self.inbox = Inbox()
        config = EngineConfig(base_path=str(directory), base_digest=BASE_DIGEST, **{**defaults, **settings})
        self.engine: Engine = build_engine(config, self.inbox, overlap=overlap)

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, adapter: AdapterRef | None = None, **sampling: Any
    ) -> None:
        params = SamplingParams(**{"temperature": 0.0, "seed": 0, **sampling})
        stopping = StopParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.handle(Submit(request_id, prompt, params, stopping, adapter))

    def run(self, *request_ids: str) -> None:
        """Step until these have ended."""
        self.step_until(lambda: all(self.inbox.ended(request_id) for request_id in request_ids))

    def call(self, message: Call) -> CallDone:
        """Step until the call is answered."""
        self.engine.handle(message)
        return self.answer(message.call_id)

    def answer(self, call_id: str) -> CallDone:
        """Step until a call that was made is answered."""
        self.step_until(lambda: call_id in self.inbox.calls)
        return self.inbox.calls.pop(call_id)

    def step_until(self, is_done: Callable[[], bool]) -> None:
        """Step until it is so; all must be accounted for then."""
        for _ in range(MAX_STEPS):
            if is_done():
                break
            self.engine.step()
            if not self.engine.is_busy:
                time.sleep(0.001)  # an adapter is on its way: leave the interpreter to the thread that reads it
        assert is_done(), f"not after {MAX_STEPS} steps"
        self.engine.check_integrity()

    def generate(
        self, prompt: list[int], max_tokens: int, adapter: AdapterRef | None = None, **sampling: Any
    ) -> list[int]:
        """One sequence, alone."""
        request_id = f"alone-{len(self.inbox.outputs)}"
        self.submit(request_id, prompt, max_tokens, adapter, **sampling)
        self.run(request_id)
        return self.inbox.tokens(request_id)


def make_adapter(model: PreTrainedModel, directory: Path, seed: int, std: float = 0.12, **config: Any) -> AdapterRef:
    """A random PEFT adapter of `model`, saved; the model is left as it was."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**{**settings, **config}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    peft.save_pretrained(directory)
    peft.unload()
    return adapter_ref(directory)


def adapter_ref(directory: Path) -> AdapterRef:
    """A PEFT directory under the digest of its files, for the base of `Driver`."""
    hashes = {name: hash_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return AdapterRef(content_digest(BASE_DIGEST, hashes), str(directory))


@torch.no_grad()
def oracle_tokens(model: PreTrainedModel, prompt: list[int], max_tokens: int, adapter: AdapterRef | None) -> list[int]:
    """Greedy tokens by transformers and PEFT, one forward pass over everything for each token."""
    net = model if adapter is None else PeftModel.from_pretrained(model, adapter.path).eval()
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(net(torch.tensor([ids], device=net.device)).logits[0, -1].argmax()))
    if isinstance(net, PeftModel):
        net.unload()
    return ids[len(prompt) :]
