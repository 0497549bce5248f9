"""What outlives a process: files on any file system, complete or absent."""
