"""Tools that write and check WebDataset shards for LAVIS; filled by a later issue."""
