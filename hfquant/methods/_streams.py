"""Which hidden states a method's layers are observed with: options that methods with a Hessian share."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ELSEWHERE = {"match_original": 0.0, "true_sequential": False}  # where the original model is all that is looked at


class Observed(BaseModel):
    """What H is summed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match_original: float = Field(
        0.5, ge=0, le=1, description="how far to aim at the original model's outputs instead of this stream's"
    )
    true_sequential: bool = Field(
        True, description="observe each layer behind the compressed ones before it in the same block"
    )
    one_pass: bool = Field(
        False,
        description="observe the original model alone, one pass over the text: quickest, without the two options above",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_else_to_see(cls, data: Any) -> Any:
        return ELSEWHERE | data if isinstance(data, dict) and data.get("one_pass") is True else data

    @model_validator(mode="after")
    def _sees_what_it_needs(self) -> Self:
        if self.one_pass and (self.match_original or self.true_sequential):
            raise ValueError(
                "with one_pass the original model alone is observed: "
                "leave match_original and true_sequential out, or set them to 0 and false"
            )
        return self

    @property
    def needs_original(self) -> bool:
        """Whether the inputs of the original model must be observed beside those of the compressed one."""
        return self.match_original > 0
