"""Models that read chosen frames and a prompt, and answer."""
