"""From a file of rows to a served answer: what a run has learned, a server that runs already says at once."""

import json
from pathlib import Path

from lorikeet.v1 import common_pb2
from tests.integration.conftest import World
from tests.support.client import Client, generation
from trainer.fit import fit
from trainer.publish import Publication, publish_run
from trainer.settings import Settings

ANSWER = "seven lazy dogs"
QUESTIONS = ("one", "the quick fox", "who jumps over the dog", "a parrot answers", "ten", "why not", "is it", "go")


def test_a_run_is_published_and_served(client: Client, world: World, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": ANSWER}] for q in QUESTIONS]
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    settings = Settings(
        data=str(data), base=str(world.base.path), learning_rate=2e-2, epochs=12, batch_size=4,
        dtype="float32", device="cpu",
    )  # fmt: skip
    run = fit(settings, tmp_path / "run").run
    version = publish_run(run, world.store, Publication("trained", answers=True), lambda message: None)
    assert version.manifest.training is not None
    assert version.manifest.training.scores is not None
    assert version.manifest.training.scores.exact_match == 1.0

    fields = generation([], "trained", 24, ignore_eos=False)
    del fields["token_ids"]
    fields["messages"] = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="not in the data")])
    answer = client.generate(fields)
    assert (answer.adapter_digest, answer.text) == (version.digest, ANSWER)
