"""Files: arrays, tensor files, state files, and the checkpoint folder."""
