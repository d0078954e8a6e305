"""`hfquant generate`"""

from pathlib import Path
from typing import Annotated

import typer

from . import engine, engine_offload, offload
from .output import data


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A folder that `hfquant compress` wrote; with --offload any model.", show_default=False
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="When to stop at the latest.")] = 64,
    use_offload: Annotated[
        bool, typer.Option("--offload", help="Keep weights on disk as the memory demands; any model, many prompts.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help='With --offload: prompts, one {"prompt": "..."} a line.', show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="With --input: where the answers go.", show_default=False),
    ] = None,
    host_memory: offload.Memory = None,
    disk: offload.Disk = None,
    cache_bits: offload.Bits = 16,
    attention: offload.Top = 1.0,
    latency: offload.Latency = None,
    dtype: offload.Dtype = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Prompts computed together.", show_default="solved for")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Batches that share a load of a layer.", show_default="solved for"),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="With --batch: tokens of a prompt computed together.", show_default="solved for"
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, metavar="T", help="With --offload: sample.", show_default="greedy")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Of sampling.")] = 0,
) -> None:
    """Let a model go on from a prompt, and print each token as it comes; or answer a file of prompts.

    Without --temperature the most likely token is always taken, so that the same model gives the same text.
    """
    if (prompt is None) == (source is None):
        raise typer.BadParameter("give either --prompt or --input")
    if not use_offload:
        if prompt is None:
            raise typer.BadParameter("--input needs --offload")
        engine.read_config(Path(model))
        engine.stream(Path(model), prompt, max_new_tokens)
        return
    settings = {
        "max_new_tokens": max_new_tokens, "host_memory": host_memory, "disk": disk, "cache_bits": cache_bits,
        "attention": attention, "latency": latency, "dtype": dtype, "batch": batch, "batches": batches,
        "chunk": chunk, "temperature": temperature, "seed": seed,
    }  # fmt: skip
    if source is not None:
        if out is None:
            raise typer.BadParameter("--input needs --output")
        offload.batch(model, source, out, **settings)
    elif prompt is not None:
        for text in engine_offload.texts(model, [prompt], **settings):
            data().print(prompt + text, markup=False, soft_wrap=True)
