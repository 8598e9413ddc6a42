"""Prompts from files, their order, batches of rollouts and their packing into micro-batches."""
