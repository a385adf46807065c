"""Graph in, graph out: pure functions on torch.fx graphs as Dynamo hands them to a backend. No GPU, no state."""
