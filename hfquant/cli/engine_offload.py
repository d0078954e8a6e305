"""The calls of the command line into offloaded generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from .engine import quiet

if TYPE_CHECKING:
    from ..runtime.offload.hardware import Hardware
    from ..runtime.offload.jsonl import Answers
    from ..runtime.offload.planning import OffloadPlan


def plan(model: str, prompt: int, new: int, prompts: int, **settings: Any) -> "OffloadPlan":
    """Open the model, measure a block of it, and solve for a policy."""
    quiet()
    from ..runtime.offload.cost import Workload
    from ..runtime.offload.model import OffloadedModel
    from ..runtime.offload.planning import Budget, plan_offload
    from ..runtime.offload.policy import Policy

    disk, like = settings["disk"], Policy(cache_bits=settings["cache_bits"], attention=settings["attention"])
    with OffloadedModel(model, disk=disk, dtype=_dtype(settings["dtype"])) as offloaded:
        budget = Budget(settings["host_memory"], None, disk)
        work = Workload(prompts, prompt, new)
        return plan_offload(offloaded, work, budget, like=like, latency=settings["latency"])


def hardware(disk: Path | None, fresh: bool) -> "Hardware":
    from ..runtime.offload.hardware import profile
    from ..runtime.offload.scratch import default_folder

    return profile(disk or default_folder(), fresh)


def texts(model: str, prompts: list[str], **settings: Any) -> list[str]:
    """Texts that follow some prompts, by offloaded generation."""
    quiet()
    from ..runtime.offload.door import offload_generate

    given, how = _settings(settings)
    _check_chunk(model, settings["chunk"])
    return [str(text) for text in offload_generate(model, prompts, **given, **how)]


def answers(model: str, source: Path, out: Path, settings: Mapping[str, Any]) -> "Answers":
    """The answers that are there already, and where new ones go."""
    from ..runtime.offload.jsonl import Answers, read_prompts

    decisive = ("max_new_tokens", "cache_bits", "attention", "dtype", "temperature", "seed")
    return Answers(out, read_prompts(source), {"model": model} | {key: settings[key] for key in decisive})


def answer(model: str, answers: "Answers", meter: Any, **settings: Any) -> None:
    """Generate what is missing; each answer is written as soon as it is there."""
    quiet()
    from ..runtime.offload.door import decode, opened

    given, how = _settings(settings)
    _check_chunk(model, settings["chunk"])
    seed = how.pop("seed", None)
    if seed is not None:  # a batch draws by its number: those of this run are not those of an earlier one
        seed += len(answers.done) * len(answers.prompts)
    if missing := answers.missing:
        texts = [answers.prompts[i]["prompt"] for i in missing]
        with opened(model, texts, **given) as (offloaded, ids):
            tokenizer = offloaded.skeleton.source.tokenizer()
            new = given["max_new_tokens"]
            offloaded.on_tokens = progress = meter(len(ids) * new)
            for i, tokens in offloaded.stream(ids, seed, max_new_tokens=new, **how):
                answers.add(missing[i], decode(tokenizer, tokens), len(tokens))
                progress.saved(new - len(tokens))
    answers.finish()


def _settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line says of the policy, and of the tokens."""
    from ..runtime.offload.policy import Policy

    asked = ("max_new_tokens", "host_memory", "disk", "cache_bits", "attention", "latency")
    given = {key: settings[key] for key in asked} | {"dtype": _dtype(settings["dtype"])}
    batch, batches, chunk = settings["batch"], settings["batches"], settings["chunk"]
    if any(number is not None for number in (batch, batches, chunk)):
        for name in ("host_memory", "latency"):
            if given[name] is not None:
                bound = f"--{name.replace('_', '-')}"
                raise RecipeError(
                    f"--batch, --batches and --chunk set the policy, which {bound} would be solved for",
                    "leave one of them out",
                )
        if chunk is not None and batch is None:
            raise RecipeError("--chunk without --batch would pass prompts one by one", "give --batch too")
        like = {"cache_bits": given["cache_bits"], "attention": given["attention"]}
        given["policy"] = Policy(batch=batch or 1, batches=batches or 1, chunk=chunk, **like)
    if settings["temperature"] is None:
        return given, {"do_sample": False}
    return given, {"do_sample": True, "temperature": settings["temperature"], "seed": settings["seed"]}


def _check_chunk(model: str, chunk: int | None) -> None:
    """Raises RecipeError for chunks of what an encoder reads: it would be read as a whole, whatever was asked for."""
    from ..model.source import open_source

    if chunk is not None and open_source(model, None, quantized=True).config.is_encoder_decoder:
        raise RecipeError("an encoder reads its input as a whole: --chunk does nothing here", "leave it out")


def _dtype(name: str | None) -> Any:
    """float32 -> torch.float32; None stays."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise RecipeError(f"weights cannot be computed with in {name}", f"choose one of {', '.join(known)}")
    return None if name is None else known[name]
