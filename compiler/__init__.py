"""What torch.compile calls, and what the user holds: backend, recipe, weights, step, session."""
