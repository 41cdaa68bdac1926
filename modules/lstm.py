"""A recurrent language model behind the interface of every other: LSTM layers under a language-model or scalar head.

Importing this file registers it with the Auto classes of transformers, so a folder is all that a `model` flag needs:

    LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), hidden_size=256)).save_pretrained("lstm")
    tokenizer.save_pretrained("lstm")

How it departs from Hochreiter & Schmidhuber 1997 (https://doi.org/10.1162/neco.1997.9.8.1735), as LSTMs do since:
1. A forget gate (Gers et al. 2000, https://doi.org/10.1162/089976600300015015), whose bias starts at 1
   (Jozefowicz et al. 2015, https://proceedings.mlr.press/v37/jozefowicz15.html).
2. Layers are stacked: layer l + 1 reads the outputs of layer l.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

LayerState = tuple[Tensor, Tensor]
"""h and c of one layer after the last token, (1, B, H) each."""


class LSTMConfig(PreTrainedConfig):
    """Sizes of an LSTM language model.

    Args:
        vocab_size: V, number of tokens.
        hidden_size: H, size of the outputs and of the state.
        embedding_size: E, size of the token embeddings; None is `hidden_size`.
        num_hidden_layers: LSTM layers.
        initializer_range: standard deviation of new embeddings and heads.
        use_cache: return the state unless a call says otherwise.
        tie_word_embeddings: the head reads the embeddings' own weights; needs E = H.
        **kwargs: `pad_token_id`, `bos_token_id`, `eos_token_id`, and what else every configuration takes.
    """

    model_type = "lightning_rlhf_lstm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 512,
        embedding_size: int | None = None,
        num_hidden_layers: int = 2,
        initializer_range: float = 0.1,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        embedding_size = hidden_size if embedding_size is None else embedding_size
        if tie_word_embeddings and embedding_size != hidden_size:
            raise ValueError(
                f"`tie_word_embeddings` needs `embedding_size` = `hidden_size`, but got {embedding_size} and "
                f"{hidden_size}."
            )
        self.vocab_size, self.hidden_size, self.embedding_size = vocab_size, hidden_size, embedding_size
        self.num_hidden_layers, self.initializer_range = num_hidden_layers, initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class LSTMBlock(GradientCheckpointingLayer):
    """One layer.

    i_t, f_t, g_t, o_t = W x_t + U h_{t−1} + b,   c_t = σ(f_t) c_{t−1} + σ(i_t) tanh(g_t),   h_t = σ(o_t) tanh(c_t)

    Args:
        input_size: size of x_t.
        hidden_size: H, size of h_t and c_t.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, lengths: list[int], state: LayerState) -> tuple[Tensor, LayerState]:
        """Outputs (B, L, H), 0 behind a row's end, and the state after each row's last token.

        Args:
            x: (B, L, input_size), each row's tokens at its front.
            lengths: tokens of each row, at least 1.
            state: before the first token.
        """
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed, state)
        return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


class LSTMPreTrainedModel(PreTrainedModel):
    """What the models of this file share: names, initial weights, what transformers may do with them."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LSTMBlock"]  # noqa: RUF012, transformers' own attribute
    _is_stateful = True  # the state cannot be cut back to an earlier token

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            gates = torch.zeros_like(module.bias_ih_l0)
            gates[module.hidden_size : 2 * module.hidden_size] = 1  # of i, f, g, o the second
            initialization.copy_(module.bias_ih_l0, gates)


class LSTMModel(LSTMPreTrainedModel):
    """Embeddings and LSTM layers.

    Masked positions do not exist for the recurrence: no padding, on whichever side, touches the state.

    Args:
        config: the sizes.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        sizes = [config.embedding_size] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(LSTMBlock(size, config.hidden_size) for size in sizes)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[LayerState, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Outputs of the last layer (B, L, H), 0 at masked positions.

        Args:
            input_ids: (B, L).
            attention_mask: (B, any length ≥ L), of which the last L columns are those of `input_ids`; None masks
                nothing.
            position_ids: not needed; the order of the tokens is their position.
            past_key_values: the state that an earlier call returned, which the tokens continue.
            inputs_embeds: (B, L, E), instead of `input_ids`.
            use_cache: return the state.
            output_hidden_states: return the embeddings and every layer's outputs.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, E)
        columns = embeddings.shape[:2]
        mask = embeddings.new_ones(columns) if attention_mask is None else attention_mask[:, -columns[1] :]
        to_front = mask.bool().long().argsort(dim=1, descending=True, stable=True)  # (B, L), real tokens first
        outputs, state = self._run(_reordered(embeddings, to_front), mask.bool().sum(1), past_key_values)
        back = to_front.argsort(dim=1)
        kept = [_reordered(x, back) for x in (outputs if output_hidden_states else outputs[-1:])]
        return BaseModelOutputWithPast(
            last_hidden_state=kept[-1],
            past_key_values=state if use_cache else None,
            hidden_states=(embeddings, *kept) if output_hidden_states else None,
        )

    def _run(
        self, x: Tensor, lengths: Tensor, state: tuple[LayerState, ...] | None
    ) -> tuple[list[Tensor], tuple[LayerState, ...]]:
        """Each layer's outputs for rows with all tokens at their front, and the states after them."""
        if state is None:
            zeros = x.new_zeros(1, len(x), self.config.hidden_size)
            state = ((zeros, zeros),) * len(self.layers)
        is_empty = (lengths == 0)[:, None]  # (B, 1); the packed form has no rows of 0 tokens
        counts = lengths.clamp(min=1).tolist()
        outputs, states = [], []
        for layer, before in zip(self.layers, state, strict=True):
            x, after = layer(x, counts, before)
            x = x.masked_fill(is_empty[..., None], 0)
            outputs.append(x)
            states.append(tuple(old.where(is_empty, new) for old, new in zip(before, after, strict=True)))
        return outputs, tuple(states)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, L, ...) with the positions of each row in the given order (B, L)."""
    return x.take_along_dim(order[..., None], dim=1)


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """An LSTM with a language-model head.

    Args:
        config: the sizes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012, transformers' own attribute

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` makes no key-value cache: it hands on the state, as `sample` does

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[LayerState, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), or (B, `logits_to_keep`, V) at the last so many positions.

        `return_dict` is there for `generate`; the rest is as for `LSTMModel`, and so is what comes back: the head reads
        `hidden_states[-1]`.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state[:, -logits_to_keep:]),  # 0 keeps all
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )


class LSTMForSequenceClassification(GenericForSequenceClassification, LSTMPreTrainedModel):
    """An LSTM with a linear `score` head: a reward model or a value network."""


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModel.register(LSTMConfig, LSTMModel, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LSTMConfig, LSTMForSequenceClassification, exist_ok=True)
