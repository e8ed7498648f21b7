"""The status page of a live server, in a browser."""

import re
import urllib.request
from collections.abc import Iterator

import pytest

from lorikeet.v1 import adapter_pb2
from tests.integration.conftest import StartServer
from tests.support.browser import Browser, check_pictures
from tests.support.client import Client, generation
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def used(start_server: StartServer) -> ServerProcess:
    """A server that has answered, and holds a pinned adapter."""
    server = start_server("--kv-cache-memory", "32MiB", "--adapter-memory", "16MiB")
    client = Client(server.port)
    client.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id="rank-8"), timeout=60)
    for adapter in ("", "rank-8", "rank-4"):
        client.generate(generation([5, 6, 7], adapter, 40))
    client.close()
    eventually(lambda: server.metrics().get("lorikeet_adapters_loaded", 0) >= 2, "the engine has told of both")
    eventually(lambda: num_points(server) >= 3, "there is a line to draw")
    return server


def num_points(server: ServerProcess) -> int:
    """Of the first line on the page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/", timeout=30) as page:
        found = re.search(r'<polyline points="([^"]*)"', page.read().decode())
    return len(found[1].split()) if found is not None else 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser.start(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_shows_adapters_memory_and_the_last_minutes(used: ServerProcess, browser: Browser, scheme: str) -> None:
    browser.open(f"http://127.0.0.1:{used.metrics_port}/", scheme=scheme)
    titles = ["Output tokens a second", "Requests", "Memory that the engine has set aside, by kind"]
    assert check_pictures(browser) == titles
    rows = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    table = {row[0]: row for row in rows}
    assert table["rank-8"][1] == "latest"
    assert "device" in table["rank-8"][3]
    assert "pinned" in table["rank-8"][3]
    assert "pinned" not in table["rank-4"][3]
    assert [table[name][5:7] for name in ("the base", "rank-8", "rank-4")] == [["1", "40"]] * 3
    assert all(time.endswith(("ms", " s")) for time in table["rank-8"][7:])
    assert table["rank-64"][5:] == [""] * 5, "published, and never asked for"
    names = [row[0] for row in rows]
    assert names[0] == "the base"
    assert set(names[1:3]) == {"rank-4", "rank-8"}


def test_it_comes_anew_by_itself(used: ServerProcess, browser: Browser) -> None:
    browser.open(f"http://127.0.0.1:{used.metrics_port}/", scheme="light", reloads=True)
    made = browser.evaluate("performance.timeOrigin")
    eventually(lambda: browser.evaluate("performance.timeOrigin") > made, "the page was loaded again")
