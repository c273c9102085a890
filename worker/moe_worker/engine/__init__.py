"""The engine: model, scheduler and sampling in one step loop; a library without gRPC."""
