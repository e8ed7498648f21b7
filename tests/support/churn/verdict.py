"""Whether each answer is the one that its adapter gives alone, by transformers and PEFT."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from tests.support.churn.traffic import Record

TIE = 1e-4  # logits, of a spread of about 1, that float32 cannot tell apart for certain


@dataclass(slots=True)
class Verdict:
    """`mismatches` says each wrong answer in a line, `num_distinct` how many different ones were computed again."""

    num_distinct: int = 0
    num_ties: int = 0
    mismatches: list[str] = field(default_factory=list)


class Judge:
    """The base in transformers; the adapters through PEFT, from the directories they were published from."""

    def __init__(self, base: LlamaForCausalLM, sources: Mapping[str, Path], prompts: Sequence[list[int]]) -> None:
        self._base = base
        self._sources = sources
        self._prompts = prompts

    def judge(self, records: Iterable[Record]) -> Verdict:
        """Every answer of `records`, each different one computed once."""
        answers: defaultdict[str, set[tuple[int, tuple[int, ...]]]] = defaultdict(set)
        for record in records:
            answers[record.digest].add((record.prompt, record.token_ids))
        verdict = Verdict()
        for digest, given in answers.items():
            model = PeftModel.from_pretrained(self._base, str(self._sources[digest])).eval()
            for prompt, token_ids in _longest(given):
                self._compare(model, digest, prompt, token_ids, verdict)
            model.unload()
        return verdict

    @torch.inference_mode()
    def _compare(self, model: PeftModel, digest: str, prompt: int, answer: tuple[int, ...], verdict: Verdict) -> None:
        """An answer is the greedy one exactly if each of its tokens is the likeliest after those before it: so one
        pass over all of it tells."""
        verdict.num_distinct += 1
        tokens = [*self._prompts[prompt], *answer]
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0, -len(answer) :]
        given = torch.tensor(answer)
        short = logits.amax(1) - logits.gather(1, given[:, None])[:, 0]
        verdict.num_ties += int(((short > 0) & (short < TIE)).sum())
        wrong = (short >= TIE).nonzero()
        if len(wrong):
            at = int(wrong[0])
            verdict.mismatches.append(
                f"{digest}, prompt {prompt}: token {at} is {answer[at]}, alone it is {int(logits[at].argmax())} "
                f"(by {float(short[at]):.3g})"
            )


def _longest(answers: set[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Without those that another one begins with."""
    kept: list[tuple[int, tuple[int, ...]]] = []
    for prompt, answer in sorted(answers, reverse=True):  # what begins with an answer comes just before it
        if not (kept and kept[-1][0] == prompt and kept[-1][1][: len(answer)] == answer):
            kept.append((prompt, answer))
    return kept
