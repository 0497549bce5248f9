"""One machine's part: the agent in a barrier task, and the rank process that it looks after."""
