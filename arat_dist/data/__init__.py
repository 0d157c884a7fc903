"""Pictures: sources, .beton files, the order of the samples, and the loaders."""
