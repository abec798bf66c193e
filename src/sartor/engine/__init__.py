"""The engine: requests in, chunks out; scheduler, state cache and the step loop between."""
