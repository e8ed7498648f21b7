"""Adapters as JSON and as rows of a table, be they a server's or a store's."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from server.cli.output import human_size, short_digest

if TYPE_CHECKING:
    from adapters.versions import Version
    from lorikeet.v1.adapter_pb2 import Adapter

COLUMNS = ("name", "digest", "labels", "rank", "method", "size", "created", "in")


def adapter_fields(adapter: "Adapter") -> dict[str, Any]:
    """A server's adapter as JSON."""
    from lorikeet.v1.adapter_pb2 import Adapter

    created = adapter.create_time.ToDatetime(UTC).isoformat() if adapter.HasField("create_time") else None
    residency = Adapter.Residency.Name(adapter.residency).removeprefix("RESIDENCY_").lower()
    return {
        "name": adapter.name,
        "digest": adapter.digest,
        "labels": list(adapter.labels),
        "base_digest": adapter.base_digest,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "dtype": adapter.dtype,
        "size_bytes": adapter.size_bytes,
        "num_parameters": adapter.num_parameters,
        "method": adapter.method or None,
        "create_time": created,
        "residency": residency,
        "pinned": adapter.pinned,
        "merged": adapter.merged,
        "trained_quantization": adapter.trained_quantization or None,
        "scores": _scores(adapter),
    }


def version_fields(version: "Version") -> dict[str, Any]:
    """A store's version as JSON, with the keys of `adapter_fields`; where it resides only a server knows."""
    manifest = version.manifest
    return {
        "name": version.name,
        "digest": version.digest,
        "labels": list(version.labels),
        "base_digest": manifest.base_digest,
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "target_modules": list(manifest.target_modules),
        "dtype": manifest.dtype,
        "size_bytes": manifest.size_bytes,
        "num_parameters": manifest.num_parameters,
        "method": manifest.training.method if manifest.training else None,
        "create_time": datetime.fromisoformat(manifest.created_at).isoformat(),
        "residency": None,
        "pinned": None,
        "merged": None,
        "trained_quantization": manifest.training.held_base if manifest.training else None,
        "scores": asdict(manifest.training.scores) if manifest.training and manifest.training.scores else {},
    }


def version_details(version: "Version") -> dict[str, Any]:
    """`version_fields`, and what only a store's manifest tells."""
    manifest = version.manifest
    training, trained_base = manifest.training, manifest.trained_base
    return version_fields(version) | {
        "base_name": manifest.base_name,
        "trained_base": {"name": trained_base.name, "digest": trained_base.digest} if trained_base else None,
        "base_quantization": training.base_quantization if training else None,
        "hyperparameters": dict(training.hyperparameters) if training else {},
        "metrics": dict(training.metrics) if training else {},
        "data_digest": training.data_digest if training else None,
        "tokenizer_digest": training.tokenizer_digest if training else None,
        "template_digest": training.template_digest if training else None,
        "notes": manifest.notes or (training.notes if training else ""),
    }


def _scores(adapter: "Adapter") -> dict[str, Any]:
    """As a version's manifest has them; empty where it has none."""
    if not adapter.HasField("scores"):
        return {}
    told = {field.name: value for field, value in adapter.scores.ListFields()}  # neither zeros nor what is absent
    fields = adapter.scores.DESCRIPTOR.fields
    return {field.name: told.get(field.name, None if field.has_presence else field.default_value) for field in fields}


def row(fields: dict[str, Any]) -> tuple[str, ...]:
    """The cells under COLUMNS."""
    created = datetime.fromisoformat(fields["create_time"]).astimezone() if fields["create_time"] else None
    return (
        fields["name"],
        short_digest(fields["digest"]),
        ", ".join(fields["labels"]),
        str(fields["rank"]),
        fields["method"] or "",
        human_size(fields["size_bytes"]),
        f"{created:%Y-%m-%d %H:%M}" if created else "",
        fields["residency"] or "store",
    )
