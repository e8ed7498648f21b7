"""The engine process: `python -m server.engine.process --socket ipc://…`, its settings as JSON on stdin.

Exits 0 after Shutdown or when the front end is gone, 2 when a setting is refused and 3 when the base model is (one
line on stderr says why); anything else is a crash that the front end answers by starting it again.
"""

import argparse
import logging
import os
import signal
import sys

import msgspec

from adapters.errors import LorikeetError
from server import logs
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.link import Link
from server.errors import ConfigError, DoesNotFit

CONFIG_REFUSED = 2
BASE_REFUSED = 3


def main() -> int:
    parent = os.getppid()  # now: it may be gone by the time that the base is loaded
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True, help="the ipc:// address that the front end has bound")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises another package on a CPU
    # The front end decides when to stop: a terminal's Ctrl-C reaches both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    logs.set_up(config.log_format, config.log_level)
    link = Link(args.socket)
    try:
        engine = build_engine(config, link)
    except LorikeetError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return CONFIG_REFUSED if isinstance(error, ConfigError | DoesNotFit) else BASE_REFUSED
    engine.run(parent)
    link.close()
    engine.check_integrity()  # a page, row or lease that was lost shows nowhere else
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: neither a loader's thread that is still reading nor the freeing of every tensor is waited for.
    os._exit(code)
