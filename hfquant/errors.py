"""Everything hfquant raises on purpose.

HfquantError
├── RecipeError        a recipe, method or option that does not exist or does not fit
├── SourceError        a model that cannot be read as it is
├── CalibrationError   calibration text that is missing, too short or unusable
├── FormatError        a wire format that cannot say what was asked of it
├── CheckpointError    an output folder that is not ours, not finished or damaged
├── ResourceError      too little memory or disk for the plan
├── HubError           a push that the Hub refuses, or that did not arrive whole
├── ShapeError         a tensor that does not fit the layer it was given to
├── KernelError        a kernel that was asked for by a name that does not exist
├── ExportError        a target format that cannot say what a checkpoint holds
├── RequestError       a conversion that cannot be asked for like this
├── LimitError         a conversion that has to wait: too many of them, or too large a one
├── JobError           a job that does not exist (for this user), or is not in the state that this needs
├── FleetError         a manifest of conversions that cannot be read, or a webhook that is not safe to open
├── TrainingError      a training that cannot be run as asked, or adapters that cannot be merged
├── TokenError         a token of the Hub that is missing, has expired or may not do this
└── QualityError       the result was written, measured, and found to have collapsed
"""


class HfquantError(Exception):
    """A problem the user can fix: what and where, and in `hint` the way out."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint


class RecipeError(HfquantError): ...


class SourceError(HfquantError): ...


class CalibrationError(HfquantError): ...


class FormatError(HfquantError): ...


class CheckpointError(HfquantError): ...


class ResourceError(HfquantError): ...


class HubError(HfquantError): ...


class ExportError(HfquantError): ...


class RequestError(HfquantError): ...


class LimitError(HfquantError): ...


class JobError(HfquantError): ...


class FleetError(HfquantError): ...


class TrainingError(HfquantError): ...


class TokenError(HfquantError): ...


class ShapeError(HfquantError, ValueError): ...


class KernelError(HfquantError): ...


class QualityError(HfquantError):
    exit_code = 3
