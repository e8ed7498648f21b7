"""What the example adapters do to an answer, as a program can tell."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

PIRATE_WORDS = re.compile(
    r"\b(arr+|mateys?|ahoy|aye|avast|ye|yer|me heart(y|ies)|landlubber|scallywag|shiver me timbers)\b|'tis\b",
    re.IGNORECASE,
)
TOPICS = frozenset(  # as in json_reply.jsonl
    ("advice", "chat", "food", "geography", "health", "language", "nature", "numbers", "people", "science")
)


@dataclass(frozen=True, slots=True)
class Effect:
    """An adapter of the examples. `holds` tells whether an answer shows its effect; `says` puts that in words."""

    adapter: str
    data: str
    says: str
    holds: Callable[[str], bool]


def is_pirate(answer: str) -> bool:
    """At least two different words that only a pirate says."""
    return len({match.group().lower() for match in PIRATE_WORDS.finditer(answer)}) >= 2


def is_json_reply(answer: str) -> bool:
    """Exactly one JSON object with a known topic and an answer that is not empty, and nothing around it."""
    try:
        reply = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(reply, dict) or set(reply) != {"topic", "answer"}:
        return False
    topic, text = reply["topic"], reply["answer"]
    return isinstance(topic, str) and topic in TOPICS and isinstance(text, str) and bool(text.strip())


EFFECTS: Mapping[str, Effect] = MappingProxyType(
    {
        effect.adapter: effect
        for effect in (
            Effect("pirate", "pirate.jsonl", "speaks like a pirate", is_pirate),
            Effect("json-reply", "json_reply.jsonl", "is one JSON object of the schema", is_json_reply),
        )
    }
)
