"""What the files under deploy/ say, and how the real command line understands it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import typer.main
import yaml
from dockerfile_parse import DockerfileParser

from server.cli.app import build_app
from tests.support.server_process import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
ENDING_SECONDS = 10  # for what comes after --grace: the engine is ended, last messages leave


def options(arguments: Sequence[str]) -> Mapping[str, Any]:
    """The options of `lorikeet COMMAND …` by name, defaults too; raises what the command line raises of wrong usage."""
    name, *rest = arguments
    return typer.main.get_group(build_app()).commands[name].make_context(name, rest).params


def load(path: str) -> list[dict[str, Any]]:
    """The documents of a YAML file under deploy/."""
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction of a Dockerfile, as "RUN", and what follows."""

    instruction: str
    value: str


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    base: str
    steps: tuple[Step, ...]

    def values(self, instruction: str) -> list[str]:
        return [step.value for step in self.steps if step.instruction == instruction]

    def command(self, instruction: str) -> list[str]:
        """The words of the only ENTRYPOINT, CMD or the like, which has to be in its JSON form."""
        (value,) = self.values(instruction)
        words: list[str] = json.loads(value)
        return words


def stages() -> list[Stage]:
    """The image's; what comes before the first FROM is left out."""
    parser = DockerfileParser(fileobj=BytesIO((DEPLOY / "Dockerfile").read_bytes()))
    found: list[Stage] = []
    for part in parser.structure:
        step = Step(part["instruction"], part["value"])
        if step.instruction == "FROM":
            found.append(Stage(step.value, ()))
        elif found and step.instruction != "COMMENT":
            found[-1] = Stage(found[-1].base, (*found[-1].steps, step))
    return found


def is_below(path: str, directory: str) -> bool:
    """Whether a path of the image is the directory or in it."""
    return Path(path).is_relative_to(directory)
