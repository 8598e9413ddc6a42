"""Rollouts by vLLM. The only package that imports vllm, and only once the engine's environment has been checked."""
