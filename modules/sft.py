"""Supervised fine-tuning: maximum likelihood of the completions.

    python train.py fit --model SFTModule --model.model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data SFTDataModule --data.data my_answers.csv
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .checks import require
from .completions import targets
from .metrics import Perplexity
from .reading import read
from .rollout import Sampling, row_noise, sample, texts
from .text_module import TextModule


class SFTModule(TextModule):
    """Fine-tunes a causal language model on completions.

    loss = − Σ_t log π(token t | all before it) / number of tokens that count

    The mean is over all tokens of the optimizer step. Batches come from `SFTDataModule`; `predict` takes
    `PromptDataModule` batches and writes completions.

    Args:
        model: a hub id, a local folder, `package:NAME`, or a `PreTrainedModel`.
        max_new_tokens: length limit of `predict`.
        temperature: of `predict`.
        **kwargs: see `TextModule`.
    """

    def __init__(
        self, model: str | PreTrainedModel, *, max_new_tokens: int = 64, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        require("max_new_tokens", max_new_tokens >= 1, "at least 1", max_new_tokens)
        require("temperature", temperature > 0, "above 0", temperature)
        self.network: nn.Module | None = None
        self._perplexity = Perplexity()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(N,) negative log-likelihoods of the N tokens that count."""
        where = targets(batch)
        return -read(self.network, batch["input_ids"], batch["attention_mask"], where).logprobs

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Summed negative log-likelihood of the tokens that count."""
        nll = self(batch)
        return self.mean_loss(nll.sum(), len(nll))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and perplexity per token."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and perplexity per token."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        nll = self(batch)
        self.log_mean(f"{stage}/loss", nll, batch_size=len(nll))
        self._perplexity.update(nll)
        self.log(f"{stage}/perplexity", self._perplexity, prog_bar=True, on_epoch=True, batch_size=len(nll))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sampled completions of the prompts."""
        hparams = self.hparams
        sampling = Sampling.of(self.network, self.tokenizer, hparams.max_new_tokens, temperature=hparams.temperature)
        prompts, mask = batch["input_ids"], batch["attention_mask"]
        noise = row_noise(self.next_rows(len(prompts)), sampling.max_new_tokens, self.seed).to(self.device)
        with self.rollout_weights():
            rollout = sample(self.network, prompts, mask, sampling, noise, self.any_rank)
        return {"prompt": batch["prompts"], "response": texts(rollout, self.tokenizer)}
