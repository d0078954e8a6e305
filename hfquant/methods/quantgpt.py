"""QuantGPT (Tao et al., 2022; arXiv:2203.10705): the whole model learns with its weights on their grid.

Weights have n = 2ᵇ⁻¹ − 1 levels on each side of zero, at 2 bit −1, 0 and 1. The clipping of each matrix, or each row,
is γ · mean|w| with γ learned (module-wise dynamic scaling, section 3.2); embeddings have one for each row, and a tied
head shares it. The original model is the teacher: the student matches its predictions, and its representation of each
token is pulled towards the teacher's of the same token and away from the teacher's of the other tokens of the sequence
(token-level contrastive distillation, section 3.1).

Beside the paper: the clipping begins where the squared error of the weight is least (`start: paper`: γ = 1); the
quantizers that the paper compares with are options of the same; tokens may be weighted by how sure the teacher is.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import RecipeError

if TYPE_CHECKING:
    import torch

    from ..tensors.grid import Grid
    from ..tensors.layer import Layer


class Method(BaseModel):
    """Options of QuantGPT."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "model"
    needs_hessian: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    # the paper's W-E-A: embeddings as the weights, inputs 8 bit; levels on both sides of zero
    defaults: ClassVar[dict[str, Any]] = {
        "grid": {"symmetric": True}, "embeddings": {}, "activations": {"bits": 8}, "format": "native",
    }  # fmt: skip

    quantizer: Literal["dynamic", "pact", "lsq", "laq"] = Field(
        "dynamic", description="how the clipping is found: the paper's, or one of those it compares with"
    )
    per: Literal["matrix", "group"] = Field(
        "matrix", description="one clipping for a whole matrix, as in the paper, or for each row or group of the grid"
    )
    start: Literal["search", "paper"] = Field(
        "search",
        description="where the clipping begins: at the least squared error, or as the quantizer's paper says",
    )
    epochs: float = Field(8.0, gt=0, description="times that the text is read")
    batch: int = Field(32, ge=1, description="sequences in a step, over all devices")
    seq_len: int = Field(512, ge=8, description="tokens in a sequence, at most")
    lr: float = Field(5e-4, gt=0, description="learning rate of the weights; it falls to 0 linearly")
    scale_lr: float = Field(1e-3, gt=0, description="learning rate of the clipping")
    logits: float = Field(1.0, ge=0, description="share of the teacher's predictions in the loss")
    contrast: float = Field(0.1, ge=0, description="share of the contrastive term in the loss")
    truth: float = Field(0.0, ge=0, description="share of the text's own next tokens in the loss")
    temperature: float = Field(0.1, gt=0, description="of the contrastive term")
    momentum: float = Field(0.5, ge=0, lt=1, description="how much of a token's earlier representations is kept")
    projection: int = Field(0, ge=0, description="width in which representations are compared; 0: the model's own")
    negatives: int = Field(0, ge=0, description="other tokens that each is compared with; 0: all of its sequence")
    token_scaled: bool = Field(False, description="tokens that the teacher is less sure of count more (TSLD)")
    dropout: bool = Field(False, description="keep the model's dropout while it learns")
    seed: int = Field(0, ge=0, description="of the order of the text and of all that is drawn")

    def __call__(self, layer: "Layer", grid: "Grid", scale_dtype: "torch.dtype") -> "Layer":
        raise RecipeError("`quantgpt` trains a whole model, not one layer", "use `hfquant train`")
