"""Adapter ids: `name`, `name@label` or `name@sha256:<64 hex digits>`. Checked before any path is made of them."""

import re
from dataclasses import dataclass

from adapters.errors import InvalidAdapterId

DEFAULT_LABEL = "latest"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RULE = "lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit, without '..'"


@dataclass(frozen=True, slots=True)
class AdapterId:
    """A parsed id: exactly one of `label` and `digest` is set."""

    name: str
    label: str | None
    digest: str | None


def parse_adapter_id(text: str) -> AdapterId:
    """Raises InvalidAdapterId. A bare name means its label `latest`."""
    name, separator, version = text.partition("@")
    check_name(name)
    if not separator:
        return AdapterId(name, DEFAULT_LABEL, None)
    if version.startswith("sha256:"):
        return AdapterId(name, None, check_digest(version))
    return AdapterId(name, check_label(version), None)


def is_name(name: str) -> bool:
    """Whether this can be the name of an adapter."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str) -> str:
    """The name of an adapter: at most 128 characters."""
    if not is_name(name):
        raise InvalidAdapterId(f"adapter name {name!r:.80} is not valid: 1 to 128 {_RULE}")
    return name


def check_label(label: str) -> str:
    """A label of an adapter's version: at most 64 characters."""
    if not _LABEL.fullmatch(label) or ".." in label:
        raise InvalidAdapterId(f"adapter label {label!r:.80} is not valid: 1 to 64 {_RULE}")
    return label


def is_digest(text: str) -> bool:
    """Whether this is a content digest."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(digest: str) -> str:
    """A content digest: `sha256:` and 64 lower-case hex digits."""
    if not is_digest(digest):
        raise InvalidAdapterId(f"adapter digest {digest!r:.80} is not valid: 'sha256:' and 64 lower-case hex digits")
    return digest
