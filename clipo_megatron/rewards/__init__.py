"""Verifiers: is the answer in a response's last box the gold one? Correct, wrong, or undecided."""
