"""The subcommands of `trainer`, and what they print."""
