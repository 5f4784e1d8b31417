"""DeepSpeed behind the runner: its configuration, its engine, what a checkpoint keeps."""
