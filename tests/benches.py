"""Engines on a bench: weights and the slow truth about them, and an engine with the loop that it lives on."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from potstill.config import SamplingConfig
from potstill.types import WeightsVersion
from potstill.weights import pack
from rollout_worker.engine import Completion, GenerationRequest, RolloutEngine
from rollout_worker.sampling import processed_logits


class Student:
    """Weights A or B: the folder, a payload, and the slow truth about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def payload(self, version: int) -> tuple[WeightsVersion, np.ndarray]:
        tensors = load_file(self.folder / "model.safetensors")
        return pack({name: tensor.numpy() for name, tensor in tensors.items()}, version)

    @torch.inference_mode()
    def logits(self, prompt_ids: np.ndarray, token_ids: np.ndarray) -> torch.Tensor:
        """[T, V] before each token of a completion."""
        text = torch.from_numpy(np.concatenate((prompt_ids, token_ids)).astype(np.int64))
        return self.model(text[None]).logits[0, len(prompt_ids) - 1 : -1].float()

    def logprobs(self, prompt_ids: np.ndarray, token_ids: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
        """[T] of the tokens under what `sampling` samples from."""
        logprobs = processed_logits(self.logits(prompt_ids, token_ids), sampling).log_softmax(-1)
        return logprobs.gather(-1, torch.from_numpy(token_ids.astype(np.int64))[:, None])[:, 0].numpy()


@dataclasses.dataclass
class Bench:
    """An engine, the loop it lives on, and what it wrote first, fresh from its model folder."""

    name: str
    engine: RolloutEngine
    runner: asyncio.Runner
    first: list[Completion]

    def write(
        self, requests: list[GenerationRequest], config: SamplingConfig, *, k: int = 0, want: bool = True
    ) -> list[Completion]:
        return self.runner.run(self.engine.generate(requests, config, want_logprobs=want, support_k=k))

    def load(self, student: Student) -> int:
        version, payload = student.payload(self.engine.version + 1)
        self.runner.run(self.engine.load_weights(version, payload))
        return version.version


def requests(lengths: tuple[int, ...], *, copies: int = 1) -> list[GenerationRequest]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size=length).astype(np.int32) for length in lengths]
    return [
        GenerationRequest(id=f"{i}.{copy}", prompt_ids=prompt, seed=1000 * i + copy)
        for i, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


def sampling(tokens: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k)
