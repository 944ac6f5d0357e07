"""What a user would pick instead of memory, on the same machine and the same model, each in an interpreter of its own."""
