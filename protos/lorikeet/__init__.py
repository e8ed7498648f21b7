"""The wire contract; `v1` holds the .proto files and the stubs generated from them (scripts/proto)."""
