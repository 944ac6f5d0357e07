"""The memory hierarchy: every piece of knowledge in its cheapest form, by its use."""
