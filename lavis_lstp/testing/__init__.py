"""Tools for trying the code without published weights; see `tiny_checkpoints`."""
