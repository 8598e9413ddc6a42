"""Hugging Face folders <-> Megatron parameters: one rule table per model family for import, export and sync."""
