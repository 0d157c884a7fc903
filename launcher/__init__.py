"""Everything that knows of Ray, and the `arat` command."""
