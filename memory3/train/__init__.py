"""Training for memory: the loop, the two stages of the paper, and the recipes."""
