"""The engine process: scheduler, KV pages, runner, sampler and the step loop. Never protobuf or gRPC."""
