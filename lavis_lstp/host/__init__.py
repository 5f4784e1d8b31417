"""Standing inside LAVIS: the import hook, registration, shims for today's transformers, and the launcher."""
