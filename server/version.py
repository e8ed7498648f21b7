"""The version of this installation."""

from importlib import metadata


def lorikeet_version() -> str:
    """The distribution's version; "unknown" when run from a source tree that is not installed."""
    try:
        return metadata.version("lorikeet")
    except metadata.PackageNotFoundError:
        return "unknown"
