"""What outlives a process: checkpoints, and other files, on any file system; complete or absent."""
