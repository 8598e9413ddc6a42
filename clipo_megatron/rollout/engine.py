"""One vLLM engine: groups of rollouts from the weights it holds, and new weights into it. No Ray in here."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.errors import CheckError, EngineError
from clipo_megatron.imports import large_imports
from clipo_megatron.records import Finish, Prompt, Rollout, RolloutGroup, Routes, Sampling, VersionSpan, WeightBucket
from clipo_megatron.rollout.environment import environment_problems
from clipo_megatron.rollout.native_transfer import NativeTransfer
from clipo_megatron.rollout.planned_support import planned_sync_problem
from clipo_megatron.rollout.quantization import quantization_arguments
from clipo_megatron.rollout.routes import rollout_routes
from clipo_megatron.rollout.sampling import rollout_seed, stop_token_ids
from clipo_megatron.rollout.settings import EngineSettings
from clipo_megatron.rollout.shared_names import drop_names
from clipo_megatron.rollout.sleep import Sleep
from clipo_megatron.rollout.updates import WeightUpdates
from clipo_megatron.rollout.workers import Workers
from clipo_megatron.weights.architecture import read_architecture

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.outputs import RequestOutput

    from clipo_megatron.sync.meeting import Meeting

_CPU_BATCH_TOKENS = 4096
"""Prompt tokens of one forward on a CPU; prompts that don't fit wait for the next one."""


class RolloutEngine:
    """A vLLM engine in this process; with tp > 1 its workers are child processes.

    It starts with the model folder's own weights, which are version None. The process must have been started with the
    variables of `engine_environment`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            EngineError: the process's environment does not suit vLLM or holds an engine already, or vLLM is built for
                another device.
            ConfigError: the model folder has no tokenizer or no stop id.
        """
        _check_environment(settings.device, settings.tp)
        self._tokenizer = load_tokenizer(settings.model_path)
        self._stop_ids = stop_token_ids(settings.model_path, self._tokenizer.eos_token_id)  # pyright: ignore
        self._max_model_len = settings.max_model_len
        self._settings = settings
        self._return_routed_experts = settings.return_routed_experts
        self._records_routes = settings.return_routed_experts and settings.device == "cpu"
        self._workers = Workers(_start_vllm(settings), settings.tp)
        sleep = Sleep(self._workers, device=settings.device, is_allowed=settings.sleeps)
        self._updates = WeightUpdates(self._workers, Path(settings.model_path), sleep)
        self._is_closed = False
        if settings.tp > 1:
            drop_names()
            self._workers.call("clipo_drop_names")
        if self._records_routes:
            self._workers.call("clipo_record_routes")

    @property
    def version(self) -> int | None:
        """The version served, None for the model folder's own weights.

        Raises:
            EngineError: an update is under way or was not finished.
        """
        return self._updates.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        """Sample responses to each prompt.

        A response depends on (weights, seed, step, prompt, sample number) only: not on the other prompts of the call,
        nor on the calls before. Log-probs are those of the distribution sampled from; at temperature 0, those of
        temperature 1. Routed experts are those of every token but the last; they are returned if both the settings and
        `sampling` ask for them.

        Args:
            prompts: at most max_model_len - max_tokens ids each.
            sampling: how many, and how they are drawn.
            version: the version to sample from; None is the model folder's own weights, and such rollouts have no
                `policy_versions`.

        Returns:
            One group a prompt, in the order of `prompts`.

        Raises:
            EngineError: the engine does not hold `version`, or a prompt is too long.
            EngineLostError: a worker of several died or hangs.
            CheckError: a log-prob is not finite, or a token has no routed experts though they were asked for.
        """
        self._updates.ready(version)
        self._check_lengths(prompts, sampling.max_tokens)
        # Cached blocks of an earlier call change the last bits: without them a resumed run equals an uninterrupted one.
        self._updates.drop_prefix_cache()

        requests, parameters = [], []
        for prompt in prompts:
            token_ids = prompt.token_ids.tolist()
            for sample in range(sampling.samples):
                request_seed = rollout_seed(
                    seed=sampling.seed, step=sampling.step, prompt_index=prompt.index, sample=sample
                )
                requests.append({"prompt_token_ids": token_ids})
                parameters.append(self._parameters(request_seed, sampling))
        with self._workers.generating() as llm:
            outputs = llm.generate(requests, parameters, use_tqdm=False)
        recorded: dict[str, Routes] = self._workers.call("clipo_take_routes")[0] if self._records_routes else {}
        with_routes = self._return_routed_experts and sampling.routed_experts
        rollouts = [
            self._rollout(output, self._routes(output, recorded) if with_routes else None, version)
            for output in outputs
        ]
        return [
            RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[row * sampling.samples : (row + 1) * sampling.samples]))
            for row, prompt in enumerate(prompts)
        ]

    def begin_update(self, version: int, *, timeout_s: float | None = None) -> None:
        """See `WeightUpdates.begin`."""
        self._updates.begin(version, timeout_s=timeout_s)

    def load_bucket(self, bucket: WeightBucket, *, timeout_s: float | None = None) -> None:
        """See `WeightUpdates.load_bucket`."""
        self._updates.load_bucket(bucket, timeout_s=timeout_s)

    def commit_update(self, version: int, num_tensors: int, *, timeout_s: float | None = None) -> None:
        """See `WeightUpdates.commit`."""
        self._updates.commit(version, num_tensors, timeout_s=timeout_s)

    @property
    def native(self) -> NativeTransfer:
        """The weight transfer of vLLM itself, if the settings name one."""
        return NativeTransfer(self._workers, self._settings.native_transfer)

    def planned_sync_problem(self, *, is_asked_for: bool) -> str:
        """Why this engine must not be filled by a plan; empty if it may be. See rollout/planned_support.py."""
        import vllm

        return planned_sync_problem(
            release=vllm.__version__,
            family=read_architecture(Path(self._settings.model_path)).family,
            dtype=self._settings.dtype,
            device=self._settings.device,
            quantization=self._settings.quantization,
            kernels=[] if self._settings.quantization == "none" else self._names("clipo_fp8_kernels"),
            expert_backends=self._names("clipo_expert_backends"),
            is_asked_for=is_asked_for,
        )

    def open_plan(self, plan: str, engine: int, handles: Sequence[str]) -> tuple[int, float]:
        """See `WeightUpdates.open_plan`.

        Raises:
            EngineError: also if this engine must not be filled by a plan.
        """
        self._require_planned()
        return self._updates.open_plan(plan, engine, handles)

    def open_links(self, plan: str, engine: int, meeting: Meeting) -> tuple[int, float]:
        """See `WeightUpdates.open_links`.

        Raises:
            EngineError: also if this engine must not be filled by a plan.
        """
        self._require_planned()
        return self._updates.open_links(plan, engine, meeting)

    def begin_pull(self, version: int, *, timeout_s: float) -> None:
        """See `WeightUpdates.begin_pull`."""
        self._updates.begin_pull(version, timeout_s=timeout_s)

    def pull(self, version: int, *, verify: bool, timeout_s: float) -> None:
        """See `WeightUpdates.pull`."""
        self._updates.pull(version, verify=verify, timeout_s=timeout_s)

    def commit_pull(self, version: int, *, timeout_s: float) -> None:
        """See `WeightUpdates.commit_pull`."""
        self._updates.commit_pull(version, timeout_s=timeout_s)

    def write_stacks(self, signal_number: int, stem: Path) -> None:
        """Have workers that are processes of their own write their stacks to STEM.workerRANK.log when the signal comes."""
        if self._settings.tp > 1:
            self._workers.call("clipo_write_stacks", signal_number, str(stem))

    def sleep(self) -> None:
        """See `WeightUpdates.sleep`."""
        self._updates.sleep()

    def abort_update(self, *, timeout_s: float | None = None) -> None:
        """See `WeightUpdates.abort`."""
        self._updates.abort(timeout_s=timeout_s)

    def close(self) -> None:
        """End the workers and free the memory; the engine can't be used any more. Closing twice is fine."""
        if self._is_closed:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._is_closed = True
        self._workers.close()
        gc.collect()  # the model is part of reference cycles
        cleanup_dist_env_and_memory()

    def _names(self, method: str) -> list[str]:
        """Names that any worker gives."""
        of_workers: list[list[str]] = self._workers.call(method)
        return sorted({name for names in of_workers for name in names})

    def _require_planned(self) -> None:
        if problem := self.planned_sync_problem(is_asked_for=True):
            raise EngineError(f"{problem}; set sync.transport to stream")

    def _parameters(self, seed: int, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            seed=seed,
            max_tokens=sampling.max_tokens,
            min_tokens=0,
            stop_token_ids=list(self._stop_ids),
            ignore_eos=True,  # nothing but the ids above stops
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            detokenize=False,
        )

    def _check_lengths(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        for prompt in prompts:
            length = len(prompt.token_ids)
            if not 0 < length <= self._max_model_len - max_tokens:
                raise EngineError(
                    f"prompt {prompt.index} has {length} tokens: with responses of up to {max_tokens} tokens the "
                    f"engine takes 1 to {self._max_model_len - max_tokens} (max_model_len = {self._max_model_len}); "
                    "lower data.max_prompt_tokens or start the engine with a larger max_model_len"
                )

    def _rollout(self, output: RequestOutput, routes: Routes | None, version: int | None) -> Rollout:
        completion = output.outputs[0]
        ids = np.asarray(completion.token_ids, np.int32)
        logprobs = np.asarray(completion.logprobs.logprobs, np.float32)  # pyright: ignore
        if len(logprobs) != len(ids) or not np.isfinite(logprobs).all():
            raise CheckError(
                f"engine: {len(ids)} tokens with {len(logprobs)} log-probs, {np.count_nonzero(~np.isfinite(logprobs))} "
                "of them not finite: the weights or the KV cache are broken"
            )
        if completion.finish_reason not in set(Finish):
            raise EngineError(f"engine: a response ended for the unknown reason {completion.finish_reason!r}")
        spans = () if version is None else (VersionSpan(version=version, start=0, end=len(ids)),)
        return Rollout(
            response_ids=ids,
            sampled_logprobs=logprobs,
            finish=Finish(completion.finish_reason),
            policy_versions=spans,
            text=str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            routed_experts=routes,
        )

    def _routes(self, output: RequestOutput, recorded: dict[str, Routes]) -> Routes | None:
        completion = output.outputs[0]
        if completion.finish_reason == Finish.ABORT:
            return None
        fed = recorded.get(output.request_id) if self._records_routes else completion.routed_experts
        return rollout_routes(fed, len(output.prompt_token_ids or ()) + len(completion.token_ids))


def _check_environment(device: str, tp: int) -> None:
    problems = environment_problems(device, tp, os.environ)
    if problems:
        raise EngineError(
            "a process that holds an engine must be started with engine_environment: " + "; ".join(problems)
        )


def _start_vllm(settings: EngineSettings) -> LLM:
    make_llm = _import_vllm(settings.device)
    on_cpu = settings.device == "cpu"
    from vllm.config import WeightTransferConfig

    native = WeightTransferConfig(backend=settings.native_transfer) if settings.native_transfer else None
    return make_llm(
        model=settings.model_path,
        # Ids in, ids out. The tokenizer's and generation_config.json's ideas about sampling stay out as well.
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        dtype=settings.dtype,
        load_format="safetensors",
        use_tqdm_on_load=False,
        tensor_parallel_size=settings.tp,
        distributed_executor_backend="uni" if settings.tp == 1 else "mp",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_memory_bytes=settings.kv_cache_mib << 20 if on_cpu else None,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager or on_cpu,
        enable_sleep_mode=settings.sleeps and not on_cpu,
        enable_prefix_caching=settings.prefix_caching,
        # vLLM 0.32 turns back the generator of a seeded request whose prompt it splits, and a CPU generator can't be.
        enable_chunked_prefill=False if on_cpu else None,
        max_num_batched_tokens=max(_CPU_BATCH_TOKENS, settings.max_model_len) if on_cpu else None,
        enable_return_routed_experts=settings.return_routed_experts and not on_cpu,
        weight_transfer_config=native,
        worker_extension_cls=_receiver(settings),
        seed=settings.seed,
        **quantization_arguments(settings),
    )


def _receiver(settings: EngineSettings) -> str:
    if settings.device == "cpu" and settings.quantization != "none":
        return "clipo_megatron.rollout.cpu_fp8.WeightReceiver"
    return "clipo_megatron.rollout.receiver.WeightReceiver"


def _import_vllm(device: str) -> type[LLM]:
    with large_imports():
        from vllm import LLM
        from vllm.distributed import model_parallel_is_initialized
        from vllm.platforms import current_platform

    if model_parallel_is_initialized():
        raise EngineError("this process holds an engine already; close it first, or start the new one elsewhere")
    if current_platform.is_cpu() != (device == "cpu"):
        raise EngineError(
            f"device = {device}: the installed vLLM runs on {current_platform.device_type}; set run.device to match or "
            "install the other build"
        )
    return LLM
