"""The adapter of negative prompts: the states it learns from, its run, and how well it carries over."""
