"""The gRPC services. Protobuf ends here: `convert` maps it to the project's own types, `status` errors to it."""
