"""Moving weights to the engines: buckets of whole Hugging Face tensors, the versions' state machine, shared memory."""
