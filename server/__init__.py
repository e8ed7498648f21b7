"""The server: a front end that speaks gRPC, and an engine that runs the model, each a process of its own."""
