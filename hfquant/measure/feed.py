"""Which token each row of a model's logits predicts, and how a model is made to go on from a prompt.

Told apart by the config alone, so that a model that is loaded, streamed from disk or compressed is fed the
same: what a window becomes is `model.inputs.model_inputs`, for all of them.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from ..model.inputs import model_inputs


@dataclass(frozen=True)
class Feed:
    """How models with a config are fed."""

    config: PretrainedConfig

    @property
    def decodes(self) -> bool:
        """Whether there is an encoder; then the decoder starts with a token that is not in the window."""
        return bool(self.config.is_encoder_decoder)

    @property
    def hears(self) -> bool:
        """Whether that encoder takes sound (Whisper): it gets silence, and the decoder alone sees text."""
        return self.decodes and hasattr(self.config, "num_mel_bins")

    @property
    def shift(self) -> int:
        """Row t of the logits predicts token t + shift of the window."""
        return 0 if self.decodes else 1

    @property
    def name(self) -> str:
        """For the settings that travel with the numbers."""
        if self.hears:
            return "decoder: each token from those before it in the window, the audio silent"
        if self.decodes:
            return "encoder-decoder: the window is both the encoder's input and the labels"
        return "causal: each token from those before it in the window"

    def inputs(self, windows: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's forward for windows int64 [n, seq]; the logits are [n, seq, vocab]."""
        return model_inputs(self.config, windows)

    def prompt(self, ids: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
        """How to go on from a prompt int64 [1, n]: (arguments that stay, name of the growing one, its start).

        An encoder-decoder reads the prompt and its decoder starts anew; one that hears gets silence, and its
        decoder goes on from the prompt.
        """
        if not self.decodes:
            return {}, "input_ids", ids
        made = self.inputs(ids)
        start = made.pop("decoder_input_ids")[:, :1]
        return made, "decoder_input_ids", ids if self.hears else start

    def predicted(self, rows: Tensor) -> Tensor:
        """The rows that predict a token of the window: [seq, ...] -> [seq - shift, ...]"""
        return rows[: len(rows) - self.shift]

    def targets(self, window: Tensor) -> Tensor:
        """The tokens they predict: [seq] -> [seq - shift]"""
        return window[self.shift :]
