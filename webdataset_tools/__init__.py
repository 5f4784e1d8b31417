"""Tools for WebDataset tar shards. Empty so far: this release reads files and folders."""
