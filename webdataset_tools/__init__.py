"""Tools for WebDataset tar shards: `python -m webdataset_tools VERB`; the format is told in docs/data_format.md.

`format`, `tar`, `storage` and `index` know the form of shards; both the tools and the loader stand on them.
"""
