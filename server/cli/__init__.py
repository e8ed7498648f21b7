"""The command line, `lorikeet`: reads options, calls the layers below, prints. Exit codes are in `server.cli.exits`.

Starts fast: modules import typer and nothing heavier; gRPC, the store and the server load inside the command
that needs them. Never loads torch.
"""

from server.cli.app import main

__all__ = ["main"]
