"""What a model is called with, for a batch of tokens: the same for calibration and for evaluation."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

SILENCE = -1.5  # Whisper's log-mel of no sound: (log10(1e-10) + 4) / 4, after its floor of 8 below the loudest


def model_inputs(config: PretrainedConfig, tokens: Tensor) -> dict[str, Tensor]:
    """Arguments of forward.  tokens int64 [batch, seq]

    A decoder reads the tokens.  An encoder-decoder reads them as its source and, shifted right behind its start
    token, as what it has generated so far; where the source is sound (Whisper), it hears silence.
    """
    if not config.is_encoder_decoder:
        return {"input_ids": tokens}
    start = config.decoder_start_token_id
    if start is None:
        start = config.bos_token_id if config.bos_token_id is not None else config.pad_token_id
    decoder = torch.cat([tokens.new_full((tokens.shape[0], 1), int(start or 0)), tokens[:, :-1]], 1)
    if hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        return {
            "input_features": torch.full((tokens.shape[0], config.num_mel_bins, frames), SILENCE),
            "decoder_input_ids": decoder,
        }
    return {"input_ids": tokens, "decoder_input_ids": decoder}


def positions(config: PretrainedConfig, seq: int) -> dict[str, int]:
    """How many hidden states `seq` tokens become in the decoder, and in the encoder where there is one."""
    if not config.is_encoder_decoder:
        return {"decoder": seq}
    return {"encoder": config.max_source_positions if hasattr(config, "num_mel_bins") else seq, "decoder": seq}


def vocabulary(config: PretrainedConfig) -> int:
    """Token ids the model's embedding has room for."""
    return int(config.get_text_config(decoder=True).vocab_size)


def longest(config: PretrainedConfig) -> int | None:
    """The most tokens a window may have, None where the config does not say."""
    text = config.get_text_config(decoder=True)
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    limits = [getattr(c, name, None) for c in (text, config) for name in names]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
