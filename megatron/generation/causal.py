"""Text by next-token prediction with a KV cache: one forward pass over the prompts, then one per new token."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron.generation.sampling import Sampling, choose, draw_keys
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer
from megatron.randomness import stream


class CausalGenerator:
    """Continues prompts, batch by batch.

    A text is complete at `eod`, which is left out, or where `finished(new_tokens)` is true; `advance(n)` is called
    after n tokens are decided.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        *,
        eod: int,
        advance: Callable[[int], None],
        finished: Callable[[list[int]], bool],
    ):
        self.model = model
        self.sampling = sampling
        self.eod = eod
        self.advance = advance
        self.finished = finished
        self.device = model.embed_tokens.weight.device

    def generate(self, prompts: list[list[int]], batch_size: int) -> list[list[int]]:
        """Return the new tokens of each prompt."""
        length, seed = self.sampling.max_new_tokens, self.sampling.seed
        keys = draw_keys(prompts)
        texts = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # similar lengths share a batch
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            draws = np.stack([stream(seed, "generation", *keys[index]).random(length) for index in indices])
            batch = self._batch([prompts[index] for index in indices], torch.from_numpy(draws).to(self.device))
            for index, text in zip(indices, batch, strict=True):
                texts[index] = text
        return texts

    def _batch(self, prompts: list[list[int]], draws: Tensor) -> list[list[int]]:
        """Return the new tokens of B prompts; `draws` [B, max_new_tokens] are the uniform numbers of each token."""
        cache = KVCache()
        texts = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=self.device)  # of the texts that are not finished
        hidden = self._prefill(prompts, cache)
        for step in range(self.sampling.max_new_tokens):
            tokens = choose(self.model.head(hidden), self.sampling, draws[rows, step])
            remaining = self.sampling.max_new_tokens - step
            active = self._append(rows.tolist(), tokens.tolist(), texts, remaining)
            if not all(active):  # finished texts leave the batch
                indices = torch.tensor(
                    [index for index, is_active in enumerate(active) if is_active], dtype=torch.int64
                )
                indices = indices.to(self.device)
                rows, tokens, cache = rows[indices], tokens[indices], cache.select(indices)
            if remaining == 1 or not len(rows):
                break
            hidden = self.model.read(tokens[:, None], cache)[:, -1]
        return texts

    def _prefill(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Fill the KV cache with B prompts; return the hidden states of their last tokens, [B, H]."""
        longest = max(map(len, prompts))
        # padded on the left, so that all prompts end at the same index
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        present = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # [B, T]
        return self.model.read(tokens, cache, present)[:, -1]

    def _append(self, rows: list[int], tokens: list[int], texts: list[list[int]], remaining: int) -> list[bool]:
        """Append a token to each of R texts; return which of them continue, [R].

        `remaining` is the number of tokens up to the maximum, this one included.
        """
        active = []
        for row, token in zip(rows, tokens, strict=True):
            if token != self.eod:
                texts[row].append(token)
            active.append(token != self.eod and not self.finished(texts[row]))
            self.advance(1 if active[-1] else remaining)
        return active
