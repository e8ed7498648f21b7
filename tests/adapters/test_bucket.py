"""What a service that misbehaves comes to: one error, in good time."""

import socketserver
import threading
from collections.abc import Callable, Iterator

import pytest

from adapters import bucket as bucket_module
from adapters.bucket import Bucket, open_bucket
from adapters.errors import StoreUnavailable

HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: 9999\r\nETag: "x"\r\nLast-Modified: Sun, 22 Nov 2026 05:47:38 GMT\r\n\r\n'
ANSWERS = {
    "cut short": HEAD + b"a" * 100,
    "an error": b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    "a refusal": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    "nothing at all": b"",
    "junk": b"\x00\x01\x02\r\n\r\n",
    "too much": HEAD.replace(b"9999", b"99999999999"),
    "silence": None,
}
CALLS: dict[str, Callable[[Bucket], object]] = {
    "read": lambda bucket: bucket.read("names/a.json"),
    "chunks": lambda bucket: list(bucket.chunks("versions/x/y")),
    "find": lambda bucket: bucket.find("names"),
    "delete": lambda bucket: bucket.delete("names/a.json"),
}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes | None], Bucket]]:
    """A bucket on a server that gives every request the same answer; None is none, ever."""
    over = threading.Event()
    servers: list[socketserver.ThreadingTCPServer] = []

    def make(answer: bytes | None) -> Bucket:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(1 << 16)
                if answer is None:
                    over.wait()
                else:
                    self.request.sendall(answer)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        return open_bucket("s3://bucket/x")

    yield make
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


WRITES: dict[str, Callable[[Bucket], object]] = {
    "create": lambda bucket: bucket.write("names/a.json", b"x", None),
    "overwrite": lambda bucket: bucket.overwrite("versions/x/y", b"x"),
    "find": lambda bucket: bucket.find("names"),
}


@pytest.mark.parametrize("call", WRITES)
def test_a_service_that_knows_nothing_of_buckets_is_an_unavailable_store(
    call: str, answering: Callable[[bytes | None], Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer to everything is 404; where that cannot mean "no such object", it is an error."""
    monkeypatch.setattr(bucket_module, "_QUICK_SECONDS", 240)  # it is the answer that counts, however late it comes
    bucket = answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\noops")
    assert bucket.read("names/a.json") is None
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/x .*404") as caught:
        WRITES[call](bucket)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(
            ("AWS_ENDPOINT_URL", value)
            for value in (
                "",
                "localhost:9000",
                "http://",
                "http://x:65536",
                "http://a b",
                "http://[",
                "ftp://x",
                "http://x/?",
            )
        ),
        ("AWS_ENDPOINT_URL_S3", "not a url"),
        ("AWS_SKIP_SIGNATURE", "maybe"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told_when_opening(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreUnavailable, match=rf"^{variable}=|maybe") as caught:
        open_bucket("s3://bucket/x")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "value", ["http://127.0.0.1:9", "https://s3.example.com/", "http://[::1]:9000", "http://a_b/c/d"]
)
def test_endpoints_that_are_taken(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    assert open_bucket("s3://bucket/x").location == "s3://bucket/x"


# Files may be large and slow; and to a deletion any 200 is a good answer.
SLOW, GOOD = {"too much", "silence"}, {"cut short"}
PAIRS = [(answer, call) for answer in ANSWERS for call in CALLS if call == "read" or answer not in SLOW]


@pytest.mark.parametrize(("answer", "call"), [pair for pair in PAIRS if pair[1] != "delete" or pair[0] not in GOOD])
def test_a_bad_answer_is_an_unavailable_store(
    answer: str, call: str, answering: Callable[[bytes | None], Bucket]
) -> None:
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/x") as caught:
        CALLS[call](answering(ANSWERS[answer]))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
