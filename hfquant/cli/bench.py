"""`hfquant bench`"""

from typing import TYPE_CHECKING, Annotated

import typer

from . import engine
from .arguments import Folder, Json
from .output import busy, data, print_facts, print_json, print_table
from .units import size

if TYPE_CHECKING:
    from ..measure.bench import Bench


def bench(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original, if the report does not know it.", show_default=False),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens decoded one by one.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="The median of so many is shown.")] = 3,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Arithmetic: `auto`, `float32`, `bfloat16`, `float16`.")
    ] = "auto",
    kernels: Annotated[
        str, typer.Option(metavar="KERNELS", help="`auto`, `exact`, `reference`, or the names of kernels.")
    ] = "auto",
    into_report: Annotated[bool, typer.Option("--report", help="Put the numbers into DIR/report.json too.")] = False,
    as_json: Json = False,
) -> None:
    """Measure speed beside the original: prompt and decoding, the kernel of every shape, the share of what memory
    allows.

    Both models run in turns, batch 1, with torch's threads (OMP_NUM_THREADS).
    """
    engine.read_config(folder)
    with busy("measuring"):
        done = engine.bench(
            folder, against=against, prompt=prompt, new_tokens=new_tokens, rounds=rounds, dtype=dtype, mode=kernels,
            into_report=into_report,
        )  # fmt: skip
    if as_json:
        print_json(done.to_dict())
        return
    print_facts(data(), _facts(done))
    print()
    rows = [
        [" x ".join(map(str, kind.shape)), kind.encoding, str(kind.layers), kind.decode, kind.prefill]
        for kind in done.kinds
    ]
    print_table(["shape", "encoding", "layers", "one token", "prompt"], rows, right=("layers",))


def _facts(done: "Bench") -> dict[str, str | None]:
    ours, theirs, memory = done.compressed, done.original, done.memory
    threads, kind = done.settings["threads"], done.settings["dtype"]
    packed, derived, other = (size(memory[name]) for name in ("stored", "kernels", "other"))
    limit = f"{size(done.bytes_per_token)} a token, memory reads {size(done.bandwidth)} a second"
    return {
        "prompt": _against(ours.prefill, theirs.prefill if theirs else None),
        "decoding": _against(ours.decode, theirs.decode if theirs else None),
        "of the limit": f"{done.share:.0%}: {limit}",
        "memory": f"{packed} packed + {derived} for kernels + {other} other",
        "loading": f"{done.load['open']:.1f} s, first prompt {max(0.0, done.load['first']):.1f} s more",
        "settings": f"{kind}, {threads} thread{'' if threads == 1 else 's'}, kernels `{done.settings['kernels']}`",
    }


def _against(ours: float, theirs: float | None) -> str:
    found = f"{ours:.1f} tokens/s"
    return found if theirs is None else f"{found}, original {theirs:.1f}: {ours / theirs:.2f}x"
