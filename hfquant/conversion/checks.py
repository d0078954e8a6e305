"""What is asked before any work: of the original, by its page and headers, and of the place where the result goes."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from ..errors import HfquantError, LimitError, RequestError, SourceError
from ..model.headers import DTYPES
from ..model.hub import facts as page
from ..model.hub import terms
from ..model.remote import Look, Tensors, Token, read_config, read_headers
from ..recipe import Recipe
from . import access, licences
from .facts import ModelFacts, Problem
from .pull import wanted
from .request import Request
from .settings import Limits

CODE = "use a model of an architecture that transformers has, or convert its checkpoint to one"
TOKENS = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.bpe", "*.tiktoken")  # one of which any tokenizer has
BLOCK = re.compile(r"\.(\d+)\.")


def model(seen: Look, limits: Limits, request: Request, token: Token) -> ModelFacts:
    """Raises the first thing that stands in the way of compressing this model, in the words of `problems`."""
    config, tensors = read_config(seen, token), read_headers(seen, token)
    for found in problems(seen, config, tensors, limits, request):
        if found.blocks:
            kinds: dict[str, type[HfquantError]] = {"size": LimitError, "license": RequestError}
            raise kinds.get(found.kind, SourceError)(found.message, found.hint)
    return describe(seen, config, tensors)


def problems(
    seen: Look, config: Mapping[str, Any], tensors: Tensors, limits: Limits, request: Request
) -> Iterator[Problem]:
    """What the page, the config and the headers say against it."""
    facts = describe(seen, config, tensors)
    try:
        wanted(seen)
    except SourceError as error:
        yield Problem("damaged", error.message, error.hint)
    if not any(fnmatch(name, pattern) for name in seen.files for pattern in TOKENS):
        said = f"{seen.model} has no tokenizer, without which nothing about its quality can be measured"
        yield Problem("tokenizer", said, "put its tokenizer.json and tokenizer_config.json there")
    if config.get("quantization_config") or config.get("compression_config"):
        yield Problem(
            "quantized", f"{seen.model} is already quantized", "start from the original: rounding twice costs twice"
        )
    if config.get("auto_map") and not known(config):
        yield Problem("code", f"{seen.model} brings its own modelling code, which is never run here", CODE)
    elif not known(config):
        yield Problem("architecture", f"`{config.get('model_type')}` is no model type that transformers knows", CODE)
    if facts.parameters > limits.parameters:
        yield Problem(
            "size",
            f"{seen.model} has {facts.parameters / 1e9:,.1f} billion parameters,"
            f" at most {limits.parameters / 1e9:,.1f} are taken here",
            "take a smaller model, or run `hfquant` on a machine of your own",
        )
    if unknown := sorted({kind for kind, _ in tensors.values()} - DTYPES.keys()):
        yield Problem("damaged", f"{seen.model} has weights of the type {unknown[0]}, which cannot be read", None)
    blocks = {found[1] for name in tensors if (found := BLOCK.search(name))}
    layers = config.get("num_hidden_layers", config.get("n_layer", config.get("num_layers")))
    if isinstance(layers, int) and blocks and layers > 2 * len(blocks):
        yield Problem(
            "damaged",
            f"config.json of {seen.model} says {layers:,} layers, its files hold {len(blocks):,}",
            "config.json and the weights do not belong together",
        )
    if found_licence := licences.problem(page(seen.info), request.accept_terms):
        yield found_licence
    if facts.gated and request.private is False:
        yield Problem("license", f"{seen.model} is gated, its compressed copy would be public", None, blocks=False)


def too_long(config: Mapping[str, Any], recipe: Recipe) -> Problem | None:
    """Calibration that the compression would refuse, as far as config.json tells."""
    inner = config.get("text_config")
    told = inner if isinstance(inner, Mapping) else config
    longest = told.get("max_position_embeddings", told.get("n_positions", told.get("max_target_positions")))
    asked = recipe.calibration.seq_len
    if not recipe.needs_calibration or not isinstance(longest, int) or asked <= longest:
        return None
    said = f"calibration sequences of {asked} tokens are longer than the model's {longest}"
    return Problem("recipe", said, f"set `calibration.seq_len` to {longest}")


def known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has this type of model itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def describe(seen: Look, config: Mapping[str, Any], tensors: Tensors) -> ModelFacts:
    kinds: Counter[str] = Counter()
    for kind, shape in tensors.values():
        count = 1
        for n in shape:
            count *= n
        kinds[kind] += count
    info, told = seen.info, page(seen.info)
    card = terms(info.card_data.to_dict()) if info.card_data is not None else {}
    architectures = config.get("architectures")
    return ModelFacts(
        id=seen.model,
        revision=seen.commit,
        parameters=sum(kinds.values()),
        bytes=seen.bytes,
        files=len(seen.weights),
        dtypes=dict(kinds),
        model_type=_text(config.get("model_type")),
        architecture=_text(architectures[0]) if isinstance(architectures, list) and architectures else None,
        license=card.get("license_name") or card.get("license"),
        license_link=card.get("license_link"),
        gated=told["gated"],
        private=told["private"],
        pipeline=info.pipeline_tag,
        tags=tuple(info.tags or ())[:50],
        likes=info.likes,
        downloads=info.downloads,
    )


def _text(value: Any) -> str | None:
    return value[:100] if isinstance(value, str) else None


def target(request: Request, token: Token) -> access.Target | None:
    """Raises HubError if the result could not be pushed where the request wants it."""
    if request.target is None:
        return None
    return access.check_access(request.target, private=request.private, pr=request.pull_request, token=token)
