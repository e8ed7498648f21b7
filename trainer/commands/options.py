"""Every setting as a flag: the signature that typer reads is made from `Settings`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_origin

import typer

from trainer.errors import SettingsError
from trainer.settings import Settings

Given = Mapping[str, Any]
ALIASES = {"learning_rate": "--lr"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command(given, ...)` as a function whose flags are the settings, and `command`'s other parameters. `given` has
    the settings that were passed, by name."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
    flags = [_parameter(f) for f in fields(Settings)]

    def call(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        command({name: value for name, value in given.items() if value not in (None, [], ())}, **values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*flags, *own)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def merge(given: Given, config: Path | None) -> Settings:
    """The settings of the file `config` with those `given` on top. Raises SettingsError."""
    values: dict[str, Any] = {}
    if config is not None:
        values = {str(name).replace("-", "_"): value for name, value in Settings.read(config).items()}
        Settings.from_mapping(values, str(config))
    for name, value in given.items():
        values[name] = _pairs(name, value) if name.endswith("_pattern") else value
    return Settings.from_mapping(values)


def _pairs(name: str, texts: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in texts:
        pattern, separator, number = text.rpartition("=")
        try:
            pairs[pattern] = int(number) if name == "rank_pattern" else float(number)
        except ValueError as error:
            raise SettingsError(f"{name.replace('_', '-')} {text!r}: use PATTERN=NUMBER") from error
        if not separator or not pattern:
            raise SettingsError(f"{name.replace('_', '-')} {text!r}: use PATTERN=NUMBER")
    return pairs


def _parameter(setting: "Field[Any]") -> inspect.Parameter:
    kind, default = setting.type, setting.default
    text = setting.metadata["help"]
    flag = "--" + setting.name.replace("_", "-")
    names = [flag, *filter(None, [ALIASES.get(setting.name)])]
    if kind is bool:
        names = [f"{flag}/--no-{flag[2:]}"]
    if default not in (None, MISSING, "") and default != ():
        shown = ",".join(default) if isinstance(default, tuple) else default
        shown = ("off", "on")[shown] if isinstance(shown, bool) else shown
        text += f" [{shown}]"
    option = typer.Option(*names, help=text, metavar=setting.metadata["metavar"], show_default=False)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_flag_type(kind), option]
    )


def _flag_type(kind: Any) -> Any:
    """What typer is to parse: mappings are lists of pairs, sequences are one word with commas."""
    if get_origin(kind) is tuple:
        return str | None
    if get_origin(kind) is not None and get_origin(kind) not in (Literal, UnionType):
        return list[str] | None  # a mapping
    return kind | None
