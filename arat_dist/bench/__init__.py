"""What `arat bench` measures, always side by side in one run."""
