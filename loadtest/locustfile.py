"""What Locust loads: `locust -f loadtest/locustfile.py --host HOST:PORT --scenario NAME|FILE`, with its web page or
`--headless`; `python -m loadtest run` does that with the scenario's users and seconds."""

import json
import logging
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust import events
from locust.env import Environment
from locust.exception import StopTest

from adapters.errors import LorikeetError
from loadtest.play import meet
from loadtest.records import summary
from loadtest.scenario import read_scenario
from loadtest.users import Load, StreamUser, make_load, start_swaps

__all__ = ["StreamUser"]

DEFAULT_SERVER = "127.0.0.1:50051"


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--scenario", default="quick", help="a TOML file, or a name of loadtest/scenarios")
    parser.add_argument("--mode", default="", help="names the rows, as in MODE/adapter")
    parser.add_argument("--rate", type=float, help="an open load of so many requests a second")
    parser.add_argument("--results", default="", help="a JSON file for the exact numbers")
    parser.add_argument("--records", default="", help="a JSON file for every request")
    parser.add_argument("--share", default="0/1", help="which of how many Locusts that make one load")
    parser.add_argument("--together", default="", help="a folder in which these wait for each other")


@events.init.add_listener
def wake(environment: Environment, **_: Any) -> None:
    """Wait for the other shares. gevent's clock stands since the imports began: Locust's timer for --run-time would
    count from there."""
    options = environment.parsed_options
    if options is not None and options.together:
        meet(Path(options.together), *_share(options.share))
    gevent.get_hub().loop.update_now()


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Look at the server, and begin to count. What is wrong with it or the scenario ends Locust with exit code 2."""
    options = environment.parsed_options
    assert options is not None, "Locust was started from its command line"
    assert environment.runner is not None, "a run has a runner"
    num_users = environment.runner.target_user_count or options.num_users or 1
    address = (environment.host or DEFAULT_SERVER).removeprefix("http://")
    try:
        scenario = read_scenario(options.scenario).at(rate=options.rate)
        load = make_load(scenario, address, options.mode, num_users, _share(options.share))
    except LorikeetError as error:
        logging.getLogger(__name__).error("%s", error)
        environment.process_exit_code = 2
        raise StopTest from error
    environment.lorikeet_load = load  # type: ignore[attr-defined]
    load.swapping = start_swaps(environment, load)


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


@events.test_stopping.add_listener
def stop_counting(environment: Environment, **_: Any) -> None:
    """What is under way still ends, but is not counted."""
    load: Load | None = getattr(environment, "lorikeet_load", None)
    if load is not None and load.swapping is not None:
        load.swapping.kill()
        load.ended = time.perf_counter()


@events.quitting.add_listener
def write_results(environment: Environment, **_: Any) -> None:
    """The exact numbers, which Locust rounds to milliseconds, where --results and --records say."""
    options = environment.parsed_options
    load: Load | None = getattr(environment, "lorikeet_load", None)
    if load is None or options is None:
        return
    if options.results:
        Path(options.results).write_text(json.dumps(summary([load.measured()], load.scenario), indent=1))
    if options.records:
        Path(options.records).write_bytes(msgspec.json.encode(load.measured()))
