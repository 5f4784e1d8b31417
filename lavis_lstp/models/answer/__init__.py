"""What to say: models that read chosen frames and a prompt, and answer."""
