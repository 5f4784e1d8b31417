"""Where to look: flow of frames, the temporal sampler that scores them, and the selector that chooses."""
